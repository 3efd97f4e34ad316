#include "program.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace gossamer {

namespace {

constexpr int64_t kTileWork = 16384;  // elements below which waking another thread costs more than it saves

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t align64(int64_t bytes) { return (bytes + 63) & ~int64_t(63); }

// Rows [r0, r1) of prepared activations.
Activations rows_of(const Activations& a, const PackedWeight& w, int64_t r0, int64_t r1) {
  Activations part = a;
  const int64_t scales = w.group ? w.k_pad / w.group : 1;
  part.m = r1 - r0;
  part.data = static_cast<const uint8_t*>(a.data) + r0 * a.row_stride_bytes;
  if (a.scales) part.scales = a.scales + r0 * scales;
  if (a.sums) part.sums = a.sums + r0 * scales;
  return part;
}

// Panels per tile: a few tiles per worker, so that a slow core does not hold up the rest; an even number,
// since wide kernels take panels in pairs.
int64_t panels_per_tile(int64_t panels, int workers) {
  const int64_t even = ceil_div(ceil_div(panels, int64_t(workers) * 6), 2) * 2;
  return std::max<int64_t>(2, std::min<int64_t>(even, 64));
}

// Workspace of the experts op, in the order it is laid out.
struct ExpertSpace {
  int64_t order, slot, starts, gathered, prepared, gate, up, down, total;
};

ExpertSpace expert_space(const PackedWeight& gate, const PackedWeight& down, int64_t experts, int64_t rows) {
  ExpertSpace s{};
  int64_t at = 0;
  const auto take = [&](int64_t& field, int64_t bytes) {
    field = at;
    at += align64(bytes);
  };
  take(s.order, rows * 4);
  take(s.slot, rows * 4);
  take(s.starts, (experts + 1) * 4);
  take(s.gathered, rows * gate.k * 4);
  take(s.prepared, std::max(activation_bytes(gate.format, gate.group, rows, gate.k),
                            activation_bytes(down.format, down.group, rows, down.k)));
  take(s.gate, rows * gate.n * 4);
  take(s.up, rows * gate.n * 4);
  take(s.down, rows * down.n * 4);
  s.total = at;
  return s;
}

}  // namespace

Program::Program(const Kernels* kernels, std::shared_ptr<Pool> pool)
    : kernels_(kernels), pool_(std::move(pool)) {
  segments_.emplace_back();
}

int32_t Program::add_packed(const PackedWeight& weight) {
  weights_.push_back({weight, nullptr});
  return int32_t(weights_.size()) - 1;
}

int32_t Program::add_vector(const float* data) {
  weights_.push_back({{}, data});
  return int32_t(weights_.size()) - 1;
}

int32_t Program::add_kv(const KvLayer& layer) {
  kv_.push_back(layer);
  return int32_t(kv_.size()) - 1;
}

void Program::set_scratch(uint8_t* scratch, int64_t bytes_per_worker) {
  scratch_ = scratch;
  scratch_stride_ = bytes_per_worker;
}

int64_t Program::scratch_bytes(int64_t vocab) const {
  int64_t most = kernels_->sample_scratch(vocab);
  for (const auto& segment : segments_) {
    for (const auto& in : segment) {
      if (in.op == Op::linear || in.op == Op::experts) {
        for (int i = 0; i < (in.op == Op::linear ? 1 : 3); i++) {
          const PackedWeight& w = weights_[in.weights[i]].packed;
          most = std::max(most, kernels_->linear_scratch(w.format, w.group, w.k));
        }
      } else if (in.op == Op::attention) {
        AttentionArgs args{};
        args.kv = kv_[in.ints[0]].layout;
        args.heads = int32_t(in.ints[1]);
        most = std::max(most, kernels_->attention_scratch(args));
      }
    }
  }
  return align64(most);
}

int64_t Program::workspace_bytes(const Instruction& in, int64_t rows) const {
  if (in.op == Op::prepare) {
    const PackedWeight& w = weights_[in.weights[0]].packed;
    return activation_bytes(w.format, w.group, rows, w.k);
  }
  if (in.op == Op::experts) {
    return expert_space(weights_[in.weights[0]].packed, weights_[in.weights[2]].packed, in.ints[0],
                        rows * in.ints[1])
        .total;
  }
  return 0;
}

template <class F>
void Program::over_rows(int64_t rows, int64_t work_per_row, F&& body) {
  const int64_t step = std::max<int64_t>(1, kTileWork / std::max<int64_t>(1, work_per_row));
  pool_->parallel(ceil_div(rows, step), [&](int64_t tile, int worker) {
    body(tile * step, std::min(rows, (tile + 1) * step), worker);
  });
}

void Program::run(const StepBuffers& buffers, const StepCounts& counts, int64_t first, int64_t last) {
  using Clock = std::chrono::steady_clock;
  for (int64_t s = first; s < last; s++) {
    for (auto& in : segments_[s]) {
      const auto start = Clock::now();
      execute(in, buffers, counts);
      in.nanoseconds += std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
      in.calls += 1;
      in.rows_done += in.rows == Rows::tokens ? counts.tokens : counts.rows;
    }
  }
}

// Beside each case: what in, out, weights, ints and reals are.
void Program::execute(const Instruction& in, const StepBuffers& buffers, const StepCounts& counts) {
  const int64_t m = in.rows == Rows::tokens ? counts.tokens : counts.rows;
  if (m == 0) return;
  switch (in.op) {
    case Op::prepare: {  // in: x; weights: any weight that will read it. Fills the workspace.
      const PackedWeight& w = weights_[in.weights[0]].packed;
      const float* x = at(in.in[0]);
      const Activations act = activations_over(w.format, w.group, m, w.k, workspace_, x, w.k);
      over_rows(m, w.k, [&](int64_t r0, int64_t r1, int) {
        kernels_->prepare(w.format, w.group, w.k, x, w.k, act, r0, r1);
      });
      return;
    }
    case Op::linear:  // in: x; out: y; weights: weight, bias or -1
      return linear(in, m);
    case Op::embed: {  // out: y; weights: table; ints: 1 for positions instead of ids; reals: scale
      const PackedWeight& w = weights_[in.weights[0]].packed;
      const int32_t* ids = in.ints[0] ? buffers.positions : buffers.ids;
      return over_rows(m, w.k, [&](int64_t r0, int64_t r1, int) {
        kernels_->embed(w, ids, float(in.reals[0]), at(in.out[0]), w.k, r0, r1);
      });
    }
    case Op::rms_norm: {  // in: x; out: y; weights: gain; ints: size, runs per row; reals: eps
      const int64_t d = in.ints[0], runs = m * in.ints[1];
      return over_rows(runs, d, [&](int64_t r0, int64_t r1, int) {
        kernels_->rms_norm(at(in.in[0]), weights_[in.weights[0]].vector, float(in.reals[0]), at(in.out[0]), d,
                           r0, r1);
      });
    }
    case Op::layer_norm: {  // in: x; out: y; weights: gain, bias; ints: size; reals: eps
      const int64_t d = in.ints[0];
      return over_rows(m, d, [&](int64_t r0, int64_t r1, int) {
        kernels_->layer_norm(at(in.in[0]), weights_[in.weights[0]].vector, weights_[in.weights[1]].vector,
                             float(in.reals[0]), at(in.out[0]), d, r0, r1);
      });
    }
    case Op::add:  // in: a, b; out: y; ints: width
      return over_rows(m * in.ints[0], 1, [&](int64_t i0, int64_t i1, int) {
        kernels_->add(at(in.in[0]), at(in.in[1]), at(in.out[0]), i0, i1);
      });
    case Op::scale:  // in: x; out: y; ints: width; reals: factor
      return over_rows(m * in.ints[0], 1, [&](int64_t i0, int64_t i1, int) {
        kernels_->scale(at(in.in[0]), float(in.reals[0]), at(in.out[0]), i0, i1);
      });
    case Op::softcap:  // in: x; out: y; ints: width; reals: cap
      return over_rows(m * in.ints[0], 4, [&](int64_t i0, int64_t i1, int) {
        kernels_->softcap(at(in.in[0]), float(in.reals[0]), at(in.out[0]), i0, i1);
      });
    case Op::activation:  // in: x; out: y; ints: width, act
      return over_rows(m * in.ints[0], 4, [&](int64_t i0, int64_t i1, int) {
        kernels_->activation(Act(in.ints[1]), at(in.in[0]), at(in.out[0]), i0, i1);
      });
    case Op::act_mul:  // in: gate, up; out: y; ints: width, act
      return over_rows(m * in.ints[0], 4, [&](int64_t i0, int64_t i1, int) {
        kernels_->act_mul(Act(in.ints[1]), at(in.in[0]), at(in.in[1]), at(in.out[0]), i0, i1);
      });
    case Op::rope: {  // in: x; out: y; weights: inverse frequencies; ints: heads, head size, rotary; reals:
                      // magnitude
      return over_rows(m, in.ints[0] * in.ints[1] * 4, [&](int64_t r0, int64_t r1, int) {
        kernels_->rope(at(in.in[0]), buffers.positions, weights_[in.weights[0]].vector, float(in.reals[0]),
                       at(in.out[0]), in.ints[0], in.ints[1], in.ints[2], r0, r1);
      });
    }
    case Op::kv_write:  // in: k, v; ints: KV layer
      return write_kv(in, buffers, counts);
    case Op::attention:  // in: q; out: y; ints: KV layer, heads, window (0: none); reals: scale, softcap (0:
                         // none)
      return attend(in, buffers, counts);
    case Op::take_rows: {  // in: x; out: y; ints: width
      const int64_t width = in.ints[0];
      return over_rows(m, width, [&](int64_t r0, int64_t r1, int) {
        for (int64_t r = r0; r < r1; r++)
          std::memcpy(at(in.out[0]) + r * width, at(in.in[0]) + buffers.rows[r] * width,
                      width * sizeof(float));
      });
    }
    case Op::top_k_experts: {  // in: logits; out: ids, weights; ints: experts, k, renormalise
      return over_rows(m, in.ints[0] * 4, [&](int64_t r0, int64_t r1, int) {
        kernels_->top_k_experts(at(in.in[0]), in.ints[0], in.ints[1], in.ints[2] != 0, at<int32_t>(in.out[0]),
                                at(in.out[1]), r0, r1);
      });
    }
    case Op::experts:  // in: x, ids, gains; out: y; weights: first of the gates, ups, downs; ints: experts,
                       // k, act
      return experts(in, m);
  }
}

void Program::linear(const Instruction& in, int64_t m) {
  const PackedWeight& w = weights_[in.weights[0]].packed;
  const float* bias = in.weights[1] < 0 ? nullptr : weights_[in.weights[1]].vector;
  const Activations act = activations_over(w.format, w.group, m, w.k, workspace_, at(in.in[0]), w.k);
  const int64_t panels = ceil_div(w.n, kPanel), step = panels_per_tile(panels, pool_->size());
  pool_->parallel(ceil_div(panels, step), [&](int64_t tile, int worker) {
    kernels_->linear(w, act, bias, at(in.out[0]), w.n, tile * step, std::min(panels, (tile + 1) * step),
                     scratch(worker));
  });
}

void Program::write_kv(const Instruction& in, const StepBuffers& buffers, const StepCounts& counts) {
  const KvLayer& kv = kv_[in.ints[0]];
  const int32_t* table = buffers.tables + kv.group * counts.table_stride;
  const int64_t width = int64_t(kv.layout.kv_heads) * kv.layout.head_dim;
  over_rows(counts.spans, width * (counts.tokens / counts.spans + 1), [&](int64_t s0, int64_t s1, int) {
    for (int64_t s = s0; s < s1; s++) {
      const Span& span = buffers.spans[s];
      kernels_->kv_write(kv.layout, kv.pool, table, span, at(in.in[0]), at(in.in[1]), 0, span.count);
    }
  });
}

void Program::attend(const Instruction& in, const StepBuffers& buffers, const StepCounts& counts) {
  const KvLayer& kv = kv_[in.ints[0]];
  AttentionArgs args{};
  args.q = at(in.in[0]);
  args.out = at(in.out[0]);
  args.heads = int32_t(in.ints[1]);
  args.ldq = args.ldo = int64_t(args.heads) * kv.layout.head_dim;
  args.pool = kv.pool;
  args.kv = kv.layout;
  args.scale = float(in.reals[0]);
  args.softcap = float(in.reals[1]);
  args.window = int32_t(in.ints[2]);
  args.block_table = buffers.tables + kv.group * counts.table_stride;
  // A tile is one kv head over attention_rows queries of one span; spans differ in length.
  const int64_t height = kernels_->attention_rows, heads = kv.layout.kv_heads;
  int64_t tiles = 0;
  for (int64_t s = 0; s < counts.spans; s++) tiles += ceil_div(buffers.spans[s].count, height) * heads;
  pool_->parallel(tiles, [&](int64_t tile, int worker) {
    int64_t s = 0;
    for (;; s++) {
      const int64_t of_span = ceil_div(buffers.spans[s].count, height) * heads;
      if (tile < of_span) break;
      tile -= of_span;
    }
    const Span& span = buffers.spans[s];
    // The last rows see the most keys: they go first, so that the workers end together.
    const int64_t block = ceil_div(span.count, height) - 1 - tile / heads;
    kernels_->attention(args, span, int32_t(tile % heads), block * height,
                        std::min<int64_t>(span.count, (block + 1) * height), scratch(worker));
  });
}

// Rows are grouped by expert, so that each expert's weights are read once; a token's outputs are then
// summed in the order of its own slots, so that its neighbours do not matter.
void Program::experts(const Instruction& in, int64_t m) {
  const int64_t count = in.ints[0], k = in.ints[1], rows = m * k;
  const Weight* gates = &weights_[in.weights[0]];
  const Weight* ups = &weights_[in.weights[1]];
  const Weight* downs = &weights_[in.weights[2]];
  const PackedWeight &gate = gates->packed, &down = downs->packed;
  const int64_t hidden = gate.k, width = gate.n;
  const ExpertSpace space = expert_space(gate, down, count, rows);
  int32_t* order = reinterpret_cast<int32_t*>(workspace_ + space.order);  // sorted row -> token * k + slot
  int32_t* place = reinterpret_cast<int32_t*>(workspace_ + space.slot);   // token * k + slot -> sorted row
  int32_t* starts = reinterpret_cast<int32_t*>(workspace_ + space.starts);
  float* gathered = reinterpret_cast<float*>(workspace_ + space.gathered);
  float* gated = reinterpret_cast<float*>(workspace_ + space.gate);
  float* upped = reinterpret_cast<float*>(workspace_ + space.up);
  float* downed = reinterpret_cast<float*>(workspace_ + space.down);
  void* prepared = workspace_ + space.prepared;
  const int32_t* ids = at<int32_t>(in.in[1]);

  std::fill(starts, starts + count + 1, 0);
  for (int64_t i = 0; i < rows; i++) starts[ids[i] + 1]++;
  for (int64_t e = 0; e < count; e++) starts[e + 1] += starts[e];
  for (int64_t i = 0; i < rows; i++) {
    order[starts[ids[i]]] = int32_t(i);
    place[i] = starts[ids[i]]++;
  }
  for (int64_t e = count; e > 0; e--) starts[e] = starts[e - 1];
  starts[0] = 0;

  const float* x = at(in.in[0]);
  over_rows(rows, hidden, [&](int64_t r0, int64_t r1, int) {
    for (int64_t r = r0; r < r1; r++)
      std::memcpy(gathered + r * hidden, x + order[r] / k * hidden, hidden * sizeof(float));
  });

  const auto prepare = [&](const PackedWeight& w, const float* from) {
    const Activations act = activations_over(w.format, w.group, rows, w.k, prepared, from, w.k);
    over_rows(rows, w.k, [&](int64_t r0, int64_t r1, int) {
      kernels_->prepare(w.format, w.group, w.k, from, w.k, act, r0, r1);
    });
    return act;
  };
  // Tiles: (expert in use, range of panels).
  std::vector<int32_t> used;
  for (int64_t e = 0; e < count; e++)
    if (starts[e + 1] > starts[e]) used.push_back(int32_t(e));
  const auto project = [&](const Weight* weights, const Activations& act, float* out) {
    const PackedWeight& first = weights->packed;
    const int64_t panels = ceil_div(first.n, kPanel);
    const int64_t step = 2 * ceil_div(panels, 8);  // even, since wide kernels take panels in pairs
    const int64_t per_expert = ceil_div(panels, step);
    pool_->parallel(int64_t(used.size()) * per_expert, [&](int64_t tile, int worker) {
      const int32_t e = used[tile / per_expert];
      const int64_t p0 = tile % per_expert * step;
      const PackedWeight& w = weights[e].packed;
      kernels_->linear(w, rows_of(act, w, starts[e], starts[e + 1]), nullptr, out + starts[e] * w.n, w.n, p0,
                       std::min(panels, p0 + step), scratch(worker));
    });
  };
  const Activations act = prepare(gate, gathered);
  project(gates, act, gated);
  project(ups, act, upped);
  over_rows(rows * width, 4, [&](int64_t i0, int64_t i1, int) {
    kernels_->act_mul(Act(in.ints[2]), gated, upped, gated, i0, i1);
  });
  project(downs, prepare(down, gated), downed);

  const float* gains = at(in.in[2]);
  float* y = at(in.out[0]);
  over_rows(m, hidden * k, [&](int64_t r0, int64_t r1, int) {
    for (int64_t r = r0; r < r1; r++) {
      float* row = y + r * hidden;
      std::fill(row, row + hidden, 0.0f);
      for (int64_t s = 0; s < k; s++) {
        const float gain = gains[r * k + s];
        const float* from = downed + int64_t(place[r * k + s]) * hidden;
        for (int64_t i = 0; i < hidden; i++) row[i] += gain * from[i];
      }
    }
  });
}

void Program::sample(const StepBuffers& buffers, int64_t rows, int64_t logits_offset) {
  SampleArgs args = buffers.sample;
  args.logits = at(logits_offset);
  args.ld = args.vocab;
  pool_->parallel(rows, [&](int64_t row, int worker) { kernels_->sample(args, row, scratch(worker)); });
}

}  // namespace gossamer
