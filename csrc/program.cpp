#include "program.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

namespace gossamer {

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

void Program::begin_unit(int64_t rows) {
  Segment& segment = segments_.back();
  segment.units.push_back({int64_t(segment.instructions.size()), 0, rows});
}

void Program::end_unit() {
  Segment& segment = segments_.back();
  segment.units.back().last = int64_t(segment.instructions.size());
}

Instruction& Program::instruction(int64_t index) {
  for (Segment& segment : segments_) {
    if (index < int64_t(segment.instructions.size())) return segment.instructions[index];
    index -= int64_t(segment.instructions.size());
  }
  throw std::out_of_range("no such instruction");
}

double Program::time_linear(int64_t index, int64_t rows, const Tuning& tuning) {
  Instruction in = instruction(index);
  if (in.op != Op::linear) throw std::invalid_argument("only linear instructions are tuned");
  for (Tuning& own : in.tunings) own = tuning;
  const auto start = std::chrono::steady_clock::now();
  linear(in, {0, rows, nullptr, 0});
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void Program::set_scratch(uint8_t* scratch, int64_t bytes_per_worker) {
  scratch_ = scratch;
  scratch_stride_ = bytes_per_worker;
}

template <class F>
int64_t Program::most(int64_t tokens, int64_t sampled, F&& fn) const {
  int64_t found = 64;
  for (const Segment& segment : segments_) {
    size_t next = 0;
    for (size_t i = 0; i < segment.instructions.size(); i++) {
      while (next < segment.units.size() && segment.units[next].last <= int64_t(i)) next++;
      const bool inside = next < segment.units.size() && segment.units[next].first <= int64_t(i);
      const Instruction& in = segment.instructions[i];
      const int64_t rows = in.rows == Rows::tokens ? tokens : sampled;
      found = std::max(found, fn(in, inside ? std::min(rows, segment.units[next].rows) : rows));
    }
  }
  return align64(found);
}

int64_t Program::workspace_bytes(int64_t tokens, int64_t sampled) const {
  return most(tokens, sampled,
              [this](const Instruction& in, int64_t rows) { return instruction_workspace(in, rows); });
}

int64_t Program::scratch_bytes(int64_t vocab, int64_t tokens, int64_t sampled) const {
  const int64_t found = most(
      tokens, sampled, [this](const Instruction& in, int64_t rows) { return instruction_scratch(in, rows); });
  return align64(std::max(found, kernels_->sample_scratch(vocab)));
}

void Program::run(const StepBuffers& buffers, const StepCounts& counts, int64_t first, int64_t last,
                  bool top1) {
  for (int64_t s = first; s < last; s++) {
    Segment& segment = segments_[s];
    size_t unit = 0;
    for (int64_t i = 0; i < int64_t(segment.instructions.size());) {
      if (unit < segment.units.size() && segment.units[unit].first == i) {
        run_unit(segment, segment.units[unit], buffers, counts);
        i = segment.units[unit++].last;
        continue;
      }
      Instruction& in = segment.instructions[i++];
      if (in.op == Op::linear_top1 ? !top1 : top1 && in.op == Op::linear && in.ints[kHead]) continue;
      const int64_t rows = in.rows == Rows::tokens ? counts.tokens : counts.rows;
      timed(in, {0, rows, buffers.spans, counts.spans}, buffers, counts);
    }
  }
}

// Tiles of equal height (a multiple of 16, but the last), so that none is left with a few rows.
void Program::run_unit(Segment& segment, const Unit& unit, const StepBuffers& buffers,
                       const StepCounts& counts) {
  const int64_t tiles = ceil_div(counts.tokens, unit.rows);
  const int64_t height =
      tiles > 1 ? std::min(unit.rows, ceil_div(ceil_div(counts.tokens, tiles), 16) * 16) : counts.tokens;
  for (int64_t r0 = 0; r0 < counts.tokens; r0 += height) {
    Window window{r0, std::min(height, counts.tokens - r0), buffers.spans, counts.spans};
    if (tiles > 1) {
      clipped_.clear();
      for (int64_t s = 0; s < counts.spans; s++) {
        const Span& span = buffers.spans[s];
        const int64_t a = std::max<int64_t>(span.row, r0);
        const int64_t b = std::min<int64_t>(span.row + span.count, r0 + window.count);
        if (a >= b) continue;
        Span part = span;
        part.row = int32_t(a - r0);
        part.count = int32_t(b - a);
        part.start = int32_t(span.start + (a - span.row));
        if (span.tree >= 0) part.tree = int32_t(span.tree + (a - span.row));
        clipped_.push_back(part);
      }
      window.spans = clipped_.data();
      window.span_count = int64_t(clipped_.size());
    }
    for (int64_t i = unit.first; i < unit.last; i++) timed(segment.instructions[i], window, buffers, counts);
  }
}

void Program::timed(Instruction& in, const Window& window, const StepBuffers& buffers,
                    const StepCounts& counts) {
  using Clock = std::chrono::steady_clock;
  if (window.count == 0) return;
  const auto start = Clock::now();
  execute(in, window, buffers, counts);
  in.nanoseconds += std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
  in.calls += 1;
  in.rows_done += window.count;
}

void Program::sample(const StepBuffers& buffers, int64_t rows, int64_t logits_offset) {
  SampleArgs args = buffers.sample;
  args.logits = reinterpret_cast<const float*>(arena_ + logits_offset);
  args.ld = args.vocab;
  pool_->parallel(rows, [&](int64_t row, int worker) { kernels_->sample(args, row, scratch(worker)); });
}

}  // namespace gossamer
