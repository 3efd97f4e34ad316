// The experts op: a mixture-of-experts MLP over rows grouped by expert.
#include <algorithm>
#include <cstring>

#include "program.h"

namespace gossamer {
namespace {

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

int64_t Program::instruction_workspace(const Instruction& in, int64_t rows) const {
  if (in.op == Op::prepare) {
    const PackedWeight& w = weights_[in.weights[0]].packed;
    return activation_bytes(w.format, w.group, rows, w.k);
  }
  if (in.op == Op::experts) {
    return expert_space(weights_[in.weights[0]].packed, weights_[in.weights[2]].packed, in.ints[0],
                        rows * in.ints[1])
        .total;
  }
  // A step's spans are together at least as small as if each row had the most keys.
  if (in.op == Op::attention_materialised) return rows * in.ints[1] * kernels_->score_row_bytes(in.ints[3]);
  return 0;
}

// Rows are grouped by expert, so that each expert's weights are read once; a token's outputs are then
// summed in the order of its own slots, so that its neighbours do not matter.
void Program::experts(const Instruction& in, const Window& w) {
  const int64_t m = w.count, count = in.ints[0], k = in.ints[1], rows = m * k;
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
  const int32_t* ids = input<int32_t>(in, 1, w);

  std::fill(starts, starts + count + 1, 0);
  for (int64_t i = 0; i < rows; i++) starts[ids[i] + 1]++;
  for (int64_t e = 0; e < count; e++) starts[e + 1] += starts[e];
  for (int64_t i = 0; i < rows; i++) {
    order[starts[ids[i]]] = int32_t(i);
    place[i] = starts[ids[i]]++;
  }
  for (int64_t e = count; e > 0; e--) starts[e] = starts[e - 1];
  starts[0] = 0;

  const float* x = input(in, 0, w);
  over_rows(rows, hidden, [&](int64_t r0, int64_t r1, int) {
    for (int64_t r = r0; r < r1; r++)
      std::memcpy(gathered + r * hidden, x + order[r] / k * hidden, hidden * sizeof(float));
  });

  const auto ready = [&](const PackedWeight& reader, const float* from) {
    const Activations act =
        activations_over(reader.format, reader.group, rows, reader.k, prepared, from, reader.k);
    prepare(reader, from, act);
    return act;
  };
  // Tiles: (expert in use, range of panels).
  std::vector<int32_t> used;
  for (int64_t e = 0; e < count; e++)
    if (starts[e + 1] > starts[e]) used.push_back(int32_t(e));
  // Over (expert, range of panels): body(expert, p0, p1, worker).
  const auto over_panels = [&](int64_t n, auto&& body) {
    const int64_t panels = ceil_div(n, kPanel);
    const int64_t step = 2 * ceil_div(panels, 8);  // even, since wide kernels take panels in pairs
    const int64_t per_expert = ceil_div(panels, step);
    pool_->parallel(int64_t(used.size()) * per_expert, [&](int64_t tile, int worker) {
      const int64_t p0 = tile % per_expert * step;
      body(used[tile / per_expert], p0, std::min(panels, p0 + step), worker);
    });
  };
  const auto multiply = [&](const Weight* weights, int32_t e, const Activations& act, float* out, int64_t p0,
                            int64_t p1, int worker) {
    const PackedWeight& weight = weights[e].packed;
    kernels_->linear(weight, rows_of(act, starts[e], starts[e + 1]), nullptr, out + starts[e] * weight.n,
                     weight.n, p0, p1, scratch(worker));
  };
  const Activations act = ready(gate, gathered);
  over_panels(width, [&](int32_t e, int64_t p0, int64_t p1, int worker) {
    multiply(gates, e, act, gated, p0, p1, worker);
    multiply(ups, e, act, upped, p0, p1, worker);
    const int64_t at = starts[e] * width + p0 * kPanel;
    const Finish finish{int32_t(in.ints[2]), gated + at, width, nullptr, 0};
    kernels_->finish(finish, upped + at, width, starts[e + 1] - starts[e],
                     std::min(width, p1 * kPanel) - p0 * kPanel);
  });
  const Activations narrowed = ready(down, upped);
  over_panels(hidden, [&](int32_t e, int64_t p0, int64_t p1, int worker) {
    multiply(downs, e, narrowed, downed, p0, p1, worker);
  });

  const float* gains = input(in, 2, w);
  float* y = output(in, 0, w);
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

}  // namespace gossamer
