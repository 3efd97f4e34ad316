// A model lowered to a list of instructions over one arena; run() executes a whole step in one call.
#pragma once
#include <string>
#include <vector>

#include "api.h"
#include "threads.h"

namespace gossamer {

enum class Op : int32_t {
  prepare,
  linear,
  embed,
  rms_norm,
  layer_norm,
  add,
  scale,
  softcap,
  activation,
  act_mul,
  rope,
  kv_write,
  attention,
  take_rows,
  top_k_experts,
  experts,
};

// Which of the step's counts an instruction's rows follow.
enum class Rows : int32_t { tokens, sampled };

// Offsets are bytes into the arena. What the fields mean per op stands beside its body in program.cpp.
struct Instruction {
  Op op;
  Rows rows;
  int64_t in[4];
  int64_t out[2];
  int32_t weights[4];
  int64_t ints[8];
  double reals[4];
  // Receipt.
  int64_t calls = 0, nanoseconds = 0, rows_done = 0;
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
  void set_arena(uint8_t* arena) { arena_ = arena; }
  void set_workspace(uint8_t* workspace) { workspace_ = workspace; }
  void emit(const Instruction& instruction) { segments_.back().push_back(instruction); }
  // Later instructions form a new segment; run() executes segments [first, last).
  void begin_segment() { segments_.emplace_back(); }
  // Bytes of scratch that each worker needs, over all instructions emitted so far.
  int64_t scratch_bytes(int64_t vocab) const;
  void set_scratch(uint8_t* scratch, int64_t bytes_per_worker);

  // Bytes of shared workspace an instruction needs for at most `rows` rows.
  int64_t workspace_bytes(const Instruction& instruction, int64_t rows) const;

  void run(const StepBuffers& buffers, const StepCounts& counts, int64_t first_segment, int64_t last_segment);
  // Chooses tokens for the step's sampled rows from the logits at this arena offset.
  void sample(const StepBuffers& buffers, int64_t rows, int64_t logits_offset);

  std::vector<std::vector<Instruction>>& segments() { return segments_; }
  const Kernels& kernels() const { return *kernels_; }
  Pool& pool() { return *pool_; }

 private:
  struct Weight {
    PackedWeight packed;
    const float* vector;
  };
  void execute(const Instruction& instruction, const StepBuffers& buffers, const StepCounts& counts);
  void linear(const Instruction& in, int64_t m);
  void attend(const Instruction& in, const StepBuffers& buffers, const StepCounts& counts);
  void write_kv(const Instruction& in, const StepBuffers& buffers, const StepCounts& counts);
  void experts(const Instruction& in, int64_t m);

  template <class T = float>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(arena_ + offset);
  }
  void* scratch(int worker) const { return scratch_ + worker * scratch_stride_; }
  template <class F>
  void over_rows(int64_t rows, int64_t work_per_row, F&& body);

  const Kernels* kernels_;
  std::shared_ptr<Pool> pool_;
  std::vector<Weight> weights_;
  std::vector<KvLayer> kv_;
  std::vector<std::vector<Instruction>> segments_;
  uint8_t* arena_ = nullptr;
  uint8_t* workspace_ = nullptr;
  uint8_t* scratch_ = nullptr;
  int64_t scratch_stride_ = 0;
};

}  // namespace gossamer
