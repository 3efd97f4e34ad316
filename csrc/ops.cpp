// What each instruction does. Beside each case: what in, out, weights, ints and reals are.
#include <algorithm>
#include <cstring>

#include "program.h"

namespace gossamer {
namespace {

constexpr int64_t kNormRows = 8;     // normed at a time on their way to being prepared
constexpr int64_t kSideBySide = 16;  // slots that lie together in a page

}  // namespace

Activations rows_of(const Activations& a, int64_t r0, int64_t r1) {
  Activations part = a;
  part.m = r1 - r0;
  part.data = static_cast<const uint8_t*>(a.data) + r0 * a.row_stride_bytes;
  if (a.scales) part.scales = a.scales + r0;
  if (a.sums) part.sums = a.sums + r0;
  return part;
}

int64_t Program::instruction_scratch(const Instruction& in, int64_t rows) const {
  switch (in.op) {
    case Op::linear:
    case Op::linear_top1: {
      const PackedWeight& w = weights_[in.weights[0]].packed;
      const int64_t panels = ceil_div(w.n, kPanel);
      int64_t bytes = align64(kernels_->linear_scratch(w.format, w.group, w.k));
      // Tiles of few panels may pass kFinishBytes, where there are many rows; others may not.
      if (in.ints[kGated] || in.op == Op::linear_top1)
        bytes += std::max(kFinishBytes, std::min<int64_t>(2, panels) * rows * kPanel * 4);
      if (in.op == Op::linear_top1) bytes += align64(rows * int64_t(sizeof(Scan)));
      return bytes;
    }
    case Op::experts: {
      int64_t most = 0;
      for (int i = 0; i < 3; i++) {
        const PackedWeight& w = weights_[in.weights[i]].packed;
        most = std::max(most, kernels_->linear_scratch(w.format, w.group, w.k));
      }
      return most;
    }
    case Op::norm_prepare:
      return kNormRows * in.ints[0] * 4;
    case Op::qkv_write: {
      const KvLayout& kv = kv_[in.ints[0]].layout;
      return kSideBySide * kv.kv_heads * kv.head_dim * 4;
    }
    case Op::attention:
    case Op::attention_materialised: {
      AttentionArgs args{};
      args.kv = kv_[in.ints[0]].layout;
      args.heads = int32_t(in.ints[1]);
      return kernels_->attention_scratch(args);
    }
    default:
      return 0;
  }
}

void Program::execute(const Instruction& in, const Window& w, const StepBuffers& buffers,
                      const StepCounts& counts) {
  const int64_t m = w.count;
  const auto elements = [&](int64_t work, auto&& body) {
    over_rows(m * in.ints[0], work, [&](int64_t i0, int64_t i1, int) { body(i0, i1); });
  };
  switch (in.op) {
    case Op::prepare: {  // in: x; weights: any weight that will read it. Fills the workspace.
      const PackedWeight& reader = weights_[in.weights[0]].packed;
      const float* x = input(in, 0, w);
      return prepare(reader, x,
                     activations_over(reader.format, reader.group, m, reader.k, workspace_, x, reader.k));
    }
    case Op::linear:  // in: x, residual; out: y; weights: matrices, then as many biases or -1;
                      // ints: parts, source, gated, act or -1, residual, head
      return linear(in, w);
    case Op::linear_top1:  // as linear, of one plain part; chooses tokens in place of storing outputs
      return linear_top1(in, w, buffers.sample);
    case Op::embed: {  // out: y; weights: table; ints: 1 for positions instead of ids; reals: scale
      const PackedWeight& table = weights_[in.weights[0]].packed;
      const int32_t* ids = (in.ints[0] ? buffers.positions : buffers.ids) + w.first;
      return over_rows(m, table.k, [&](int64_t r0, int64_t r1, int) {
        kernels_->embed(table, ids, float(in.reals[0]), output(in, 0, w), table.k, r0, r1);
      });
    }
    case Op::rms_norm: {  // in: x; out: y; weights: gain; ints: size, runs per row; reals: eps
      const int64_t d = in.ints[0], runs = m * in.ints[1];
      return over_rows(runs, d, [&](int64_t r0, int64_t r1, int) {
        kernels_->rms_norm(input(in, 0, w), vector(in, 0), float(in.reals[0]), output(in, 0, w), d, r0, r1);
      });
    }
    case Op::layer_norm: {  // in: x; out: y; weights: gain, bias; ints: size; reals: eps
      const int64_t d = in.ints[0];
      return over_rows(m, d, [&](int64_t r0, int64_t r1, int) {
        kernels_->layer_norm(input(in, 0, w), vector(in, 0), vector(in, 1), float(in.reals[0]),
                             output(in, 0, w), d, r0, r1);
      });
    }
    case Op::norm_prepare:  // in: x; out: prepared rows; weights: gain, bias or -1, any weight that will
                            // read them; ints: size, 1 for layer_norm; reals: eps
      return norm_prepare(in, w);
    case Op::norm_add: {  // in: x, residual; out: y; weights: gain; ints: size; reals: eps
      const int64_t d = in.ints[0];
      return over_rows(m, d, [&](int64_t r0, int64_t r1, int) {
        float* y = output(in, 0, w);
        for (int64_t r = r0; r < r1; r++) {  // the normed row is still in L1 when the residual comes
          kernels_->rms_norm(input(in, 0, w), vector(in, 0), float(in.reals[0]), y, d, r, r + 1);
          kernels_->add(input(in, 1, w), y, y, r * d, (r + 1) * d);
        }
      });
    }
    case Op::add:  // in: a, b; out: y; ints: width
      return elements(1, [&](int64_t i0, int64_t i1) {
        kernels_->add(input(in, 0, w), input(in, 1, w), output(in, 0, w), i0, i1);
      });
    case Op::scale:  // in: x; out: y; ints: width; reals: factor
      return elements(1, [&](int64_t i0, int64_t i1) {
        kernels_->scale(input(in, 0, w), float(in.reals[0]), output(in, 0, w), i0, i1);
      });
    case Op::softcap:  // in: x; out: y; ints: width; reals: cap
      return elements(4, [&](int64_t i0, int64_t i1) {
        kernels_->softcap(input(in, 0, w), float(in.reals[0]), output(in, 0, w), i0, i1);
      });
    case Op::activation:  // in: x; out: y; ints: width, act
      return elements(4, [&](int64_t i0, int64_t i1) {
        kernels_->activation(Act(in.ints[1]), input(in, 0, w), output(in, 0, w), i0, i1);
      });
    case Op::act_mul:  // in: gate, up; out: y; ints: width, act
      return elements(4, [&](int64_t i0, int64_t i1) {
        kernels_->act_mul(Act(in.ints[1]), input(in, 0, w), input(in, 1, w), output(in, 0, w), i0, i1);
      });
    case Op::rope: {  // in: x; out: y; weights: inverse frequencies; ints: heads, head size, rotary;
                      // reals: magnitude
      const int64_t width = in.ints[0] * in.ints[1];
      return over_rows(m, width * 4, [&](int64_t r0, int64_t r1, int) {
        kernels_->rope(input(in, 0, w), width, buffers.positions + w.first, vector(in, 0), float(in.reals[0]),
                       output(in, 0, w), width, in.ints[0], in.ints[1], in.ints[2], r0, r1);
      });
    }
    case Op::kv_write:  // in: k, v; ints: KV layer
      return write_kv(in, w, buffers, counts);
    case Op::qkv_write:  // in: [q k v]; out: q; weights: inverse frequencies or -1, gains of q and k or -1;
                         // ints: KV layer, heads, rotary; reals: magnitude, eps
      return write_qkv(in, w, buffers, counts);
    case Op::attention:  // in: q; out: y; ints: KV layer, heads, window (0: none); reals: scale, softcap
                         // (0: none)
      return attend(in, w, buffers, counts);
    case Op::attention_materialised:  // as attention; ints: also the most keys that a row may have
      return attend_materialised(in, w, buffers, counts);
    case Op::take_rows: {  // in: x; out: y; ints: width
      const int64_t width = in.ints[0];
      return over_rows(m, width, [&](int64_t r0, int64_t r1, int) {
        for (int64_t r = r0; r < r1; r++)
          std::memcpy(output(in, 0, w) + r * width, input(in, 0, w) + buffers.rows[r] * width,
                      size_t(width) * sizeof(float));
      });
    }
    case Op::take_columns: {  // in: x; out: y; weights: order; ints: width
      const int64_t width = in.ints[0];
      const float* order = vector(in, 0);
      return over_rows(m, width, [&](int64_t r0, int64_t r1, int) {
        for (int64_t r = r0; r < r1; r++) {
          const float* x = input(in, 0, w) + r * width;
          float* y = output(in, 0, w) + r * width;
          for (int64_t i = 0; i < width; i++) y[i] = x[int64_t(order[i])];
        }
      });
    }
    case Op::top_k_experts:  // in: logits; out: ids, weights; ints: experts, k, renormalise
      return over_rows(m, in.ints[0] * 4, [&](int64_t r0, int64_t r1, int) {
        kernels_->top_k_experts(input(in, 0, w), in.ints[0], in.ints[1], in.ints[2] != 0,
                                output<int32_t>(in, 0, w), output(in, 1, w), r0, r1);
      });
    case Op::experts:  // in: x, ids, gains; out: y; weights: first of the gates, ups, downs; ints: experts,
                       // k, act
      return experts(in, w);
  }
}

void Program::prepare(const PackedWeight& reader, const float* x, const Activations& act) {
  const int64_t m = act.m, k = reader.k, group = reader.group;
  // A group's scales of several rows lie together: threads that share out such rows would fight for the line,
  // so they share out inputs instead.
  const int64_t rows = group ? std::min(m, kLineRows) : 1;
  const int64_t inputs = group ? std::max(kTileWork / rows / group, int64_t(1)) * group : k;
  const int64_t columns = ceil_div(k, inputs);
  over_rows(ceil_div(m, rows) * columns, rows * std::min(inputs, k), [&](int64_t t0, int64_t t1, int) {
    for (int64_t t = t0; t < t1; t++) {
      const int64_t r0 = t / columns * rows, c0 = t % columns * inputs;
      Activations part = rows_of(act, r0, std::min(m, r0 + rows));
      if (c0 > 0) {
        part.data = static_cast<const uint8_t*>(part.data) + c0;
        part.scales += c0 / group * part.scale_stride;
        part.sums += c0 / group * part.scale_stride;
      }
      kernels_->prepare(reader.format, reader.group, reader.activation_scale, std::min(inputs, k - c0),
                        x + r0 * k + c0, k, part, 0, part.m);
    }
  });
}

void Program::norm_prepare(const Instruction& in, const Window& w) {
  const PackedWeight& reader = weights_[in.weights[2]].packed;
  const int64_t d = in.ints[0];
  const float *x = input(in, 0, w), eps = float(in.reals[0]);
  const Activations act =
      activations_over(reader.format, reader.group, w.count, d, output(in, 0, w), nullptr, d);
  over_rows(
      w.count, 2 * d,
      [&](int64_t r0, int64_t r1, int worker) {
        float* normed = reinterpret_cast<float*>(scratch(worker));
        for (int64_t r = r0; r < r1; r += kNormRows) {
          const int64_t rows = std::min(kNormRows, r1 - r);
          if (in.ints[1])
            kernels_->layer_norm(x + r * d, vector(in, 0), vector(in, 1), eps, normed, d, 0, rows);
          else
            kernels_->rms_norm(x + r * d, vector(in, 0), eps, normed, d, 0, rows);
          kernels_->prepare(reader.format, reader.group, reader.activation_scale, d, normed, d,
                            rows_of(act, r, r + rows), 0, rows);
        }
      },
      reader.group ? kLineRows : 1);
}

// Where the block of 16 slots that row r lies in begins anew: r itself if it is the first of one or of a
// span.
static int64_t next_block(const Span& span, int64_t r) {
  const int64_t inside = r - span.row, slot = span.start + inside;
  if (inside <= 0 || slot % kSideBySide == 0) return std::max<int64_t>(r, span.row);
  return std::min<int64_t>(span.row + span.count, r + kSideBySide - slot % kSideBySide);
}

// Rows are shared out in whole blocks of slots, since slots that lie together may share bytes.
template <class F>
void Program::over_spans(const Window& w, int64_t work_per_row, F&& body) {
  const auto span_of = [&](int64_t row) {
    const Span* end = w.spans + w.span_count;
    return std::upper_bound(w.spans, end, row, [](int64_t r, const Span& s) { return r < s.row; }) - 1;
  };
  over_rows(w.count, work_per_row, [&](int64_t first, int64_t last, int worker) {
    const Span* span = span_of(first);
    int64_t r = next_block(*span, first);
    const int64_t end = last < w.count ? next_block(*span_of(last), last) : w.count;
    while (r < end) {
      while (r >= span->row + span->count) span++;
      const int64_t stop = std::min({end, next_block(*span, r + 1), int64_t(span->row + span->count)});
      body(*span, r - span->row, stop - span->row, worker);
      r = stop;
    }
  });
}

void Program::write_kv(const Instruction& in, const Window& w, const StepBuffers& buffers,
                       const StepCounts& counts) {
  const KvLayer& kv = kv_[in.ints[0]];
  const int32_t* table = buffers.tables + kv.group * counts.table_stride;
  const int64_t width = int64_t(kv.layout.kv_heads) * kv.layout.head_dim;
  const float *k = input(in, 0, w), *v = input(in, 1, w);
  over_spans(w, width * 4, [&](const Span& span, int64_t r0, int64_t r1, int) {
    const int64_t at = (span.row + r0) * width;
    kernels_->kv_write(kv.layout, kv.pool, table, span, k + at, width, v + at, width, r0, r1);
  });
}

void Program::write_qkv(const Instruction& in, const Window& w, const StepBuffers& buffers,
                        const StepCounts& counts) {
  const KvLayer& kv = kv_[in.ints[0]];
  const int32_t* table = buffers.tables + kv.group * counts.table_stride;
  const int64_t d = kv.layout.head_dim, heads = in.ints[1], keys = kv.layout.kv_heads, rotary = in.ints[2];
  const int64_t q_width = heads * d, k_width = keys * d, ld = q_width + 2 * k_width;
  const float *freq = vector(in, 0), *q_gain = vector(in, 1), *k_gain = vector(in, 2);
  const float magnitude = float(in.reals[0]), eps = float(in.reals[1]);
  // Norm and rotation of some heads of `rows` rows; either may be absent.
  const auto turn = [&](const float* x, int64_t ldx, const float* gain, const int32_t* positions, float* y,
                        int64_t count, int64_t rows) {
    if (gain) {
      for (int64_t r = 0; r < rows; r++)
        kernels_->rms_norm(x + r * ldx, gain, eps, y + r * count * d, d, 0, count);
      x = y;
      ldx = count * d;
    }
    if (freq) {
      kernels_->rope(x, ldx, positions, freq, magnitude, y, count * d, count, d, rotary, 0, rows);
    } else if (!gain) {
      for (int64_t r = 0; r < rows; r++)
        std::memcpy(y + r * count * d, x + r * ldx, size_t(count * d) * sizeof(float));
    }
  };
  over_spans(w, ld * 4, [&](const Span& span, int64_t r0, int64_t r1, int worker) {
    const int64_t row = span.row + r0, rows = r1 - r0;
    const float* x = input(in, 0, w) + row * ld;
    const int32_t* positions = buffers.positions + w.first + row;
    float* k = reinterpret_cast<float*>(scratch(worker));
    turn(x, ld, q_gain, positions, output(in, 0, w) + row * q_width, heads, rows);
    turn(x + q_width, ld, k_gain, positions, k, keys, rows);
    kernels_->kv_write(kv.layout, kv.pool, table, span, k, k_width, x + q_width + k_width, ld, r0, r1);
  });
}

AttentionArgs Program::attention_args(const Instruction& in, const Window& w, const StepBuffers& buffers,
                                      const StepCounts& counts) const {
  const KvLayer& kv = kv_[in.ints[0]];
  AttentionArgs args{};
  args.q = input(in, 0, w);
  args.out = output(in, 0, w);
  args.heads = int32_t(in.ints[1]);
  args.ldq = args.ldo = int64_t(args.heads) * kv.layout.head_dim;
  args.pool = kv.pool;
  args.kv = kv.layout;
  args.scale = float(in.reals[0]);
  args.softcap = float(in.reals[1]);
  args.window = int32_t(in.ints[2]);
  args.block_table = buffers.tables + kv.group * counts.table_stride;
  args.parents = buffers.parents + w.first;
  return args;
}

// A tile is one kv head over attention_rows queries of one span; spans differ in length.
template <class F>
void Program::over_attention_tiles(const Window& w, int64_t kv_heads, F&& body) {
  const int64_t height = kernels_->attention_rows;
  int64_t tiles = 0;
  for (int64_t s = 0; s < w.span_count; s++) tiles += ceil_div(w.spans[s].count, height) * kv_heads;
  pool_->parallel(tiles, [&](int64_t tile, int worker) {
    int64_t s = 0;
    for (;; s++) {
      const int64_t of_span = ceil_div(w.spans[s].count, height) * kv_heads;
      if (tile < of_span) break;
      tile -= of_span;
    }
    const int64_t count = w.spans[s].count;
    // The last rows see the most keys: they go first, so that the workers end together.
    const int64_t block = ceil_div(count, height) - 1 - tile / kv_heads;
    body(s, int32_t(tile % kv_heads), block * height, std::min<int64_t>(count, (block + 1) * height), worker);
  });
}

void Program::attend(const Instruction& in, const Window& w, const StepBuffers& buffers,
                     const StepCounts& counts) {
  const AttentionArgs args = attention_args(in, w, buffers, counts);
  over_attention_tiles(w, args.kv.kv_heads,
                       [&](int64_t s, int32_t kv_head, int64_t r0, int64_t r1, int worker) {
                         kernels_->attention(args, w.spans[s], kv_head, r0, r1, scratch(worker));
                       });
}

void Program::attend_materialised(const Instruction& in, const Window& w, const StepBuffers& buffers,
                                  const StepCounts& counts) {
  const AttentionArgs args = attention_args(in, w, buffers, counts);
  scores_.clear();
  int64_t bytes = 0;
  for (int64_t s = 0; s < w.span_count; s++) {
    const Span& span = w.spans[s];
    scores_.push_back(bytes);
    bytes += span.count * args.heads * kernels_->score_row_bytes(span.start + span.count);
  }
  for (AttentionPass pass : {AttentionPass::keys, AttentionPass::softmax, AttentionPass::values})
    over_attention_tiles(
        w, args.kv.kv_heads, [&](int64_t s, int32_t kv_head, int64_t r0, int64_t r1, int worker) {
          kernels_->attention_pass(args, w.spans[s], kv_head, r0, r1, pass,
                                   reinterpret_cast<float*>(workspace_ + scores_[s]), scratch(worker));
        });
}

}  // namespace gossamer
