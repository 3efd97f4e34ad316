// Linear instructions: which tiles a layer is cut into, and how a tile is finished while it is in cache.
#include <algorithm>

#include "program.h"

namespace gossamer {

// An even number of panels, since wide kernels take them in pairs.
int64_t Program::panels_per_tile(int64_t panels, int64_t rows, bool gated, const Tuning& tuning) const {
  const int64_t tiles = int64_t(pool_->size()) * tuning.tiles_per_worker;
  int64_t step = std::min<int64_t>(ceil_div(ceil_div(panels, tiles), 2) * 2, 64);
  if (gated) step = std::min(step, kFinishBytes / (rows * kPanel * 4) / 2 * 2);
  return std::max<int64_t>(2, step);
}

Activations Program::activations_of(const Instruction& in, const Window& w, const PackedWeight& reader) {
  const float* x = nullptr;
  void* prepared = workspace_;
  if (Source(in.ints[kSource]) == Source::prepared)
    prepared = input(in, 0, w);
  else
    x = input(in, 0, w);
  return activations_over(reader.format, reader.group, w.count, reader.k, prepared, x, reader.k);
}

static const Tuning& tuning_of(const Instruction& in, int64_t rows) {
  return in.tunings[rows <= kTuningRows[0] ? 0 : rows <= kTuningRows[1] ? 1 : 2];
}

void Program::linear(const Instruction& in, const Window& w) {
  const int64_t parts = in.ints[kParts], m = w.count;
  const bool gated = in.ints[kGated];
  const PackedWeight* matrix[3];
  const float* bias[3];
  int64_t panels = 0, columns = 0;
  for (int64_t i = 0; i < parts; i++) {
    matrix[i] = &weights_[in.weights[i]].packed;
    bias[i] = vector(in, int(parts + i));
    if (gated && i == 1) continue;  // goes with the gates
    panels += ceil_div(matrix[i]->n, kPanel);
    columns += matrix[i]->n;
  }
  const Activations act = activations_of(in, w, *matrix[0]);
  float* out = output(in, 0, w);
  Finish finish{};
  finish.act = int32_t(in.ints[kAct]);
  const float* residual = in.ints[kResidual] ? input(in, 1, w) : nullptr;
  finish.ldr = columns;
  const bool finishes = gated || finish.act >= 0 || residual;

  const Tuning& tuning = tuning_of(in, m);
  const int64_t step = panels_per_tile(panels, m, gated, tuning);
  const int64_t sweeps = ceil_div(m, tuning.block_rows);
  int64_t tiles_before[4] = {0, 0, 0, 0};  // of each part
  for (int64_t i = 0; i < parts; i++)
    tiles_before[i + 1] = tiles_before[i] + (gated && i ? 0 : ceil_div(ceil_div(matrix[i]->n, kPanel), step));
  pool_->parallel(tiles_before[parts], [&](int64_t tile, int worker) {
    int64_t part = 0, column = 0;
    while (tile >= tiles_before[part + 1]) column += matrix[part++]->n;
    const PackedWeight& weight = *matrix[part];
    const int64_t p0 = (tile - tiles_before[part]) * step;
    const int64_t p1 = std::min(ceil_div(weight.n, kPanel), p0 + step);
    const int64_t c0 = p0 * kPanel, width = std::min(weight.n, p1 * kPanel) - c0;
    uint8_t* own = scratch(worker);
    const auto multiply = [&](const PackedWeight& weights, const float* add, float* to, int64_t ld) {
      for (int64_t i = 0; i < sweeps; i++) {
        const int64_t r0 = m * i / sweeps, r1 = m * (i + 1) / sweeps;
        kernels_->linear(weights, rows_of(act, r0, r1), add, to + r0 * ld, ld, p0, p1, own);
      }
    };
    Finish last = finish;
    if (gated) {
      // The gates of this tile alone, one row after the other: as if the tile were the whole layer.
      float* gates = reinterpret_cast<float*>(
          own + align64(kernels_->linear_scratch(weight.format, weight.group, weight.k)));
      multiply(weight, bias[0], gates - c0, width);
      multiply(*matrix[1], bias[1], out, columns);
      last.gate = gates;
      last.ldg = width;
    } else {
      multiply(weight, bias[part], out + column, columns);
    }
    if (!finishes) return;
    if (residual) last.residual = residual + column + c0;
    kernels_->finish(last, out + column + c0, columns, m, width);
  });
}

// The better of two scans of different outputs: larger, then lower id; in any order the same.
static void take_better(Scan& best, const Scan& other) {
  best.bad |= other.bad;
  if (other.argmax < 0) return;
  const bool equal = other.maximum == best.maximum && other.argmax < best.argmax;
  if (best.argmax >= 0 && !(other.maximum > best.maximum) && !equal) return;
  best.maximum = other.maximum;
  best.argmax = other.argmax;
}

// Each worker keeps the largest logit that its tiles gave for every row, and whether one was NaN or +Inf;
// what the sampler would choose at temperature 0 follows from these.
void Program::linear_top1(const Instruction& in, const Window& w, const SampleArgs& sample) {
  const PackedWeight& weight = weights_[in.weights[0]].packed;
  const Activations act = activations_of(in, w, weight);
  const int64_t m = w.count, panels = ceil_div(weight.n, kPanel), workers = pool_->size();
  const int64_t step = panels_per_tile(panels, m, true, tuning_of(in, m));
  const int64_t own = align64(kernels_->linear_scratch(weight.format, weight.group, weight.k));
  const auto scans = [&](int64_t worker) { return reinterpret_cast<Scan*>(scratch(int(worker)) + own); };
  for (int64_t i = 0; i < workers; i++) std::fill(scans(i), scans(i) + m, Scan{0.0f, -1, false});
  pool_->parallel(ceil_div(panels, step), [&](int64_t tile, int worker) {
    const int64_t p0 = tile * step, p1 = std::min(panels, p0 + step), c0 = p0 * kPanel;
    const int64_t width = std::min(weight.n, p1 * kPanel) - c0;
    float* logits = reinterpret_cast<float*>(scratch(worker) + own + align64(m * int64_t(sizeof(Scan))));
    kernels_->linear(weight, act, vector(in, 1), logits - c0, width, p0, p1, scratch(worker));
    for (int64_t r = 0; r < m; r++) {
      Scan scan = kernels_->scan(logits + r * width, width);
      if (scan.argmax >= 0) scan.argmax += int32_t(c0);
      take_better(scans(worker)[r], scan);
    }
  });
  for (int64_t r = 0; r < m; r++) {
    Scan best = scans(0)[r];
    for (int64_t i = 1; i < workers; i++) take_better(best, scans(i)[r]);
    sample.bad[r] = best.bad ? 1 : best.argmax < 0 ? 2 : 0;
    sample.token[r] = sample.bad[r] ? -1 : best.argmax;
    sample.logprob[r] = 0.0f;
  }
}

}  // namespace gossamer
