// A model lowered to a list of instructions over one arena; run() executes a whole step in one call.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "api.h"
#include "threads.h"

namespace gossamer {

enum class Op : int32_t {
  prepare,
  linear,
  linear_top1,
  embed,
  rms_norm,
  layer_norm,
  norm_prepare,
  norm_add,
  add,
  scale,
  softcap,
  activation,
  act_mul,
  rope,
  kv_write,
  qkv_write,
  attention,
  take_rows,
  take_columns,
  top_k_experts,
  experts,
  attention_materialised,
};

// Which of the step's counts an instruction's rows follow.
enum class Rows : int32_t { tokens, sampled };

// Where a linear instruction finds its activations.
enum class Source : int32_t { floats, workspace, prepared };

// How a linear instruction is cut; no choice changes a bit of any result.
struct Tuning {
  int32_t tiles_per_worker = 6;  // more even out cores of unequal speed, fewer cost less
  int32_t block_rows = 256;      // rows that share one sweep over a tile's weights
};

// Row counts that are cut alike: few rows are bound by memory, many by arithmetic.
constexpr int64_t kTuningRows[] = {8, 64};
constexpr int kTunings = 3;

// Offsets are bytes into the arena. What the fields mean per op stands beside its body in ops.cpp.
// in_row, out_row: bytes from one row to the next where the operand holds every row of the step; 0 where it
// holds the rows of the running tile only (a value inside a unit).
struct Instruction {
  Op op;
  Rows rows;
  int64_t in[4], in_row[4];
  int64_t out[2], out_row[2];
  int32_t weights[8];
  int64_t ints[8];
  double reals[4];
  Tuning tunings[kTunings];  // of up to kTuningRows[0] rows, up to kTuningRows[1], more
  // Receipt.
  int64_t calls = 0, nanoseconds = 0, rows_done = 0;
};

// Instructions [first, last) of a segment, run from first to last over at most `rows` rows before the next.
struct Unit {
  int64_t first, last, rows;
};

struct Segment {
  std::vector<Instruction> instructions;
  std::vector<Unit> units;  // in order, disjoint
};

// One layer's keys and values.
struct KvLayer {
  KvLayout layout;
  void* pool;
  int32_t group;
};

// Inputs and outputs of a step: buffers the caller owns and fills in place.
struct StepBuffers {
  const int32_t* ids = nullptr;        // [T]
  const int32_t* positions = nullptr;  // [T]
  const int32_t* rows = nullptr;       // [R] token of each sampled row
  const Span* spans = nullptr;         // [S]
  const int32_t* parents = nullptr;    // [T] of rows whose span is a tree
  const int32_t* tables = nullptr;     // [groups][S][pages]; a span's `table` is its offset within a group
  SampleArgs sample{};
};

struct StepCounts {
  int64_t tokens, spans, rows, table_stride;  // table_stride: entries of `tables` per group
};

class Program {
 public:
  Program(const Kernels* kernels, std::shared_ptr<Pool> pool);

  int32_t add_packed(const PackedWeight& weight);
  int32_t add_vector(const float* data);
  int32_t add_kv(const KvLayer& layer);
  // In every layer of a group.
  void copy_tokens(int32_t group, const KvCopy& copy) const {
    for (const KvLayer& layer : kv_)
      if (layer.group == group) kernels_->kv_copy(layer.layout, layer.pool, copy);
  }
  void set_arena(uint8_t* arena) { arena_ = arena; }
  void set_workspace(uint8_t* workspace) { workspace_ = workspace; }
  // Instruction `index` of all, counted over the segments.
  Instruction& instruction(int64_t index);
  // Seconds of one run of a linear instruction over `rows` rows of whatever the arena holds.
  double time_linear(int64_t index, int64_t rows, const Tuning& tuning);
  void emit(const Instruction& instruction) { segments_.back().instructions.push_back(instruction); }
  // Later instructions form a new segment; run() executes segments [first, last).
  void begin_segment() { segments_.emplace_back(); }
  // The instructions emitted between the two run as one unit over tiles of at most `rows` rows.
  void begin_unit(int64_t rows);
  void end_unit();

  // Bytes for steps of at most so many rows: shared workspace, and scratch of each worker.
  int64_t workspace_bytes(int64_t tokens, int64_t sampled) const;
  int64_t scratch_bytes(int64_t vocab, int64_t tokens, int64_t sampled) const;
  void set_scratch(uint8_t* scratch, int64_t bytes_per_worker);

  // top1: every sampled row takes its largest logit; the head chooses it tile by tile (linear_top1 runs in
  // place of the linear that gives the logits, which are then not stored).
  void run(const StepBuffers& buffers, const StepCounts& counts, int64_t first_segment, int64_t last_segment,
           bool top1);
  // Chooses tokens for the step's sampled rows from the logits at this arena offset.
  void sample(const StepBuffers& buffers, int64_t rows, int64_t logits_offset);

  const std::vector<Segment>& segments() const { return segments_; }
  const Kernels& kernels() const { return *kernels_; }
  Pool& pool() { return *pool_; }

 private:
  struct Weight {
    PackedWeight packed;
    const float* vector;
  };
  // The rows an instruction works on now, and the spans that lie in them, counted from the first.
  struct Window {
    int64_t first, count;
    const Span* spans;
    int64_t span_count;
  };

  void run_unit(Segment& segment, const Unit& unit, const StepBuffers& buffers, const StepCounts& counts);
  void timed(Instruction& in, const Window& window, const StepBuffers& buffers, const StepCounts& counts);
  void execute(const Instruction& in, const Window& window, const StepBuffers& buffers,
               const StepCounts& counts);
  // Makes act.m rows of x ready for a weight.
  void prepare(const PackedWeight& reader, const float* x, const Activations& act);
  void norm_prepare(const Instruction& in, const Window& w);
  void linear(const Instruction& in, const Window& w);
  void linear_top1(const Instruction& in, const Window& w, const SampleArgs& sample);
  Activations activations_of(const Instruction& in, const Window& w, const PackedWeight& reader);
  void write_kv(const Instruction& in, const Window& w, const StepBuffers& buffers, const StepCounts& counts);
  void write_qkv(const Instruction& in, const Window& w, const StepBuffers& buffers,
                 const StepCounts& counts);
  AttentionArgs attention_args(const Instruction& in, const Window& w, const StepBuffers& buffers,
                               const StepCounts& counts) const;
  void attend(const Instruction& in, const Window& w, const StepBuffers& buffers, const StepCounts& counts);
  void attend_materialised(const Instruction& in, const Window& w, const StepBuffers& buffers,
                           const StepCounts& counts);
  // body(index of the span, kv head, r0, r1, worker): rows [r0, r1) of the span, relative to it.
  template <class F>
  void over_attention_tiles(const Window& w, int64_t kv_heads, F&& body);
  void experts(const Instruction& in, const Window& w);

  int64_t panels_per_tile(int64_t panels, int64_t rows, bool gated, const Tuning& tuning) const;
  int64_t instruction_workspace(const Instruction& in, int64_t rows) const;
  int64_t instruction_scratch(const Instruction& in, int64_t rows) const;
  // What fn(instruction, most rows it runs over) gives at most.
  template <class F>
  int64_t most(int64_t tokens, int64_t sampled, F&& fn) const;

  template <class T = float>
  T* input(const Instruction& in, int i, const Window& w) const {
    return reinterpret_cast<T*>(arena_ + in.in[i] + w.first * in.in_row[i]);
  }
  template <class T = float>
  T* output(const Instruction& in, int i, const Window& w) const {
    return reinterpret_cast<T*>(arena_ + in.out[i] + w.first * in.out_row[i]);
  }
  const float* vector(const Instruction& in, int i) const {
    return in.weights[i] < 0 ? nullptr : weights_[in.weights[i]].vector;
  }
  uint8_t* scratch(int worker) const { return scratch_ + worker * scratch_stride_; }
  // body(r0, r1, worker) over row ranges that are worth waking a thread for; they begin at multiples of
  // `together`, for rows whose results share a cache line.
  template <class F>
  void over_rows(int64_t rows, int64_t work_per_row, F&& body, int64_t together = 1);
  // body(span, r0, r1, worker): rows [r0, r1) of a span, relative to it, at most `step` (a multiple of 16
  // slots wherever the span allows it).
  template <class F>
  void over_spans(const Window& w, int64_t work_per_row, F&& body);

  const Kernels* kernels_;
  std::shared_ptr<Pool> pool_;
  std::vector<Weight> weights_;
  std::vector<KvLayer> kv_;
  std::vector<Segment> segments_;
  std::vector<Span> clipped_;    // spans of the running tile
  std::vector<int64_t> scores_;  // where each span's lie in the workspace
  uint8_t* arena_ = nullptr;
  uint8_t* workspace_ = nullptr;
  uint8_t* scratch_ = nullptr;
  int64_t scratch_stride_ = 0;
};

// Places of a linear instruction's ints. kHead: 1 where linear_top1 may run in its place.
enum LinearInts { kParts, kSource, kGated, kAct, kResidual, kHead };

// ---- shared by the bodies of the ops ---------------------------------------------------------------

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t align64(int64_t bytes) { return (bytes + 63) & ~int64_t(63); }

constexpr int64_t kLineRows = 16;            // rows whose scales of one group lie in one cache line
constexpr int64_t kFinishBytes = 256 << 10;  // of a gated tile's gates, to stay in L2
constexpr int64_t kTileWork = 16384;  // elements below which waking another thread costs more than it saves

// Rows [r0, r1) of prepared activations.
Activations rows_of(const Activations& a, int64_t r0, int64_t r1);

template <class F>
void Program::over_rows(int64_t rows, int64_t work_per_row, F&& body, int64_t together) {
  const int64_t enough = std::max<int64_t>(1, kTileWork / std::max<int64_t>(1, work_per_row));
  const int64_t step = ceil_div(enough, together) * together;
  pool_->parallel(ceil_div(rows, step), [&](int64_t tile, int worker) {
    body(tile * step, std::min(rows, (tile + 1) * step), worker);
  });
}

}  // namespace gossamer
