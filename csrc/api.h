// The contract between the program and its kernels: raw pointers, no ownership, no Python.
//
// Intermediates are fp32, row-major. Every kernel works on a tile named by its caller and writes only
// there; no reduction is ever split by tile, batch or thread, so a result does not depend on them.
// A suffix such as x_TN names the axes: T tokens, N outputs, K inputs, H heads, D head size, V vocabulary.
#pragma once
#include <cstddef>
#include <cstdint>

namespace gossamer {

// ---- weights -------------------------------------------------------------------------------------

enum class Format : int32_t { f32 = 0, f16 = 1, bf16 = 2, int8 = 3, int4 = 4, uint4 = 5, nf4 = 6 };

constexpr int kPanel = 16;  // outputs that lie together in a packed weight

// A packed weight of n outputs by k inputs. One layout for every ISA: outputs in panels of 16 (the last
// padded with zeros), within a panel k ascending in steps of `unit` inputs:
//   f32   unit 1: 16 floats            f16 unit 1: 16 halves
//   bf16  unit 2: 16 x {k, k+1}        (64 bytes, as VDPBF16PS reads them)
//   int8  unit 4: 16 x {k .. k+3}      stored unsigned (weight + 128), as VPDPBUSD reads them
//   int4  unit 8: 16 x 4 bytes         low nibbles k..k+3, high nibbles k+4..k+7, unsigned (weight + 8)
//   uint4, nf4                         nibbles as int4's: the integer q, the index of a level of kNf4
// k is padded to k_pad (a multiple of unit, and of group where there is one) with weights of value 0.
// scales, group 0 (int8): float[n_pad], value = scale * int. Otherwise fp16[panel][k_pad/group][16].
// zeros: uint8[panel][k_pad/group][16], 0 .. 15; value = scale * (q - zero). data, scales and zeros are
// 64-byte aligned.
//
// int8 of group 0 and bf16 may be sparse, which stores what is not zero alone. Panel p then begins at byte
// starts[p] of data (starts[panels]: its end). It is a run of blocks of kSparseBlock inputs: 64 bytes with a
// bit for each of their numbers, in the order in which the dense layout holds them, then those whose bit is
// set. 64 bytes follow the last panel, so that vectors may be read whole.
constexpr int64_t kSparseBlock = 32;

struct PackedWeight {
  Format format;
  int32_t group;  // int8: 0 (one scale per output), 16 or 32; int4, uint4, nf4: 32, 64 or 128; floats: 0
  int64_t n, k, k_pad;
  const void* data;
  const void* scales;  // null for floats
  const void* zeros;   // null for all but uint4
  // int8 of group 0: the scale that all its activations have; 0: one for each token, and for other formats.
  float activation_scale;
  const int64_t* starts;  // null: dense
};

// The levels of NF4 (Dettmers et al., QLoRA, 2023), which span -1 .. 1, times 127 and rounded.
constexpr int8_t kNf4[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};

// Activations of m rows made ready for one format. row_stride_bytes between rows of `data`.
//   f32, f16: data is the caller's float rows, untouched
//   bf16: bf16 rows, round to nearest even, padded to k_pad with zeros
//   int8: int8 rows (symmetric, scale = max|x| / 127, round to nearest even), scales[m], sums[m]; with a
//   scale that is given: clamp(round(x / scale), -127, 127) with a group: the same per group:
//   scales[k_pad/group][m], sums[k_pad/group][m]; sums of the integers
// One group's scales (and sums) of all rows lie together, as a tile of several rows reads them: scale_stride
// from there to the next group's.
struct Activations {
  int64_t m;
  const void* data;
  int64_t row_stride_bytes;
  const float* scales;
  const int32_t* sums;
  int64_t scale_stride;
};

// Sizes in bytes; the same everywhere, hence not per ISA (pack.cpp).
int64_t format_bits(Format format);  // of one number
int64_t padded_k(Format format, int32_t group, int64_t k);
int64_t packed_data_bytes(Format format, int32_t group, int64_t n, int64_t k);
int64_t packed_scale_bytes(Format format, int32_t group, int64_t n, int64_t k);
int64_t packed_zero_bytes(Format format, int32_t group, int64_t n, int64_t k);
// Of a sparse weight of which `kept` numbers (at most) are not zero.
int64_t sparse_data_bytes(Format format, int64_t n, int64_t k, int64_t kept);
int64_t sparse_start_bytes(int64_t n);
// Workspace for Activations of m rows (0 where the caller's floats are used).
int64_t activation_bytes(Format format, int32_t group, int64_t m, int64_t k);
// Lays out an Activations over `buffer` of activation_bytes (64-byte aligned), or over x itself.
Activations activations_over(Format format, int32_t group, int64_t m, int64_t k, void* buffer, const float* x,
                             int64_t ldx);
// Packs rows [n0, n1) of a float matrix whose row n0 lies at `rows` (leading dimension k), quantizing by
// round-to-nearest as graph/ops/formats.py specifies. n0 is a multiple of kPanel; n1 too, unless it is n.
// Safe to call from several threads on disjoint ranges.
void pack_rows(Format format, int32_t group, int64_t n, int64_t k, const float* rows, int64_t n0, int64_t n1,
               void* data, void* scales, void* zeros);
// The same from a matrix that is quantized already, rows [n0, n1) at `codes` (leading dimension k) as
// checkpoint/codes.py describes them; its scales (and zeros) of ceil(k / group) groups, or of one, per row.
void pack_codes(Format format, int32_t group, int64_t n, int64_t k, const int8_t* codes,
                const float* from_scales, const uint8_t* from_zeros, int64_t n0, int64_t n1, void* data,
                void* scales, void* zeros);

// The same for a sparse weight, in two steps: count_panels sets starts[p + 1] - starts[p] of the panels of
// these rows, from starts[n0 / kPanel] on, and gives where they end; pack_sparse fills them. What is zero
// among the numbers that are given is left out.
int64_t count_panels(Format format, int64_t k, const float* rows, int64_t n0, int64_t n1, int64_t* starts);
int64_t count_panels(Format format, int64_t k, const int8_t* codes, int64_t n0, int64_t n1, int64_t* starts);
void pack_sparse(Format format, int64_t k, const float* rows, int64_t n0, int64_t n1, void* data,
                 void* scales, const int64_t* starts);
void pack_sparse(Format format, int64_t k, const int8_t* codes, const float* from_scales, int64_t n0,
                 int64_t n1, void* data, void* scales, const int64_t* starts);

// ---- KV pages ------------------------------------------------------------------------------------

// One layer's pool: pages x kv_heads x (page_size / 16) blocks. A block is 16 tokens under one kv head: K,
// the scales of K, the scales of V, V. K is a matrix of d_pad x 16 tokens, V one of 16 tokens x d_pad; in
// both, `unit` steps of the axis that dot products run along (K: the head's, V: the tokens') lie side by
// side, as those of packed weights do: element (depth, column) is number
// ((depth / unit) * columns + column) * unit + depth % unit of
//   f32, f16  unit 1       bf16  unit 2
//   int8      unit 4       stored unsigned (value + 128), value = integer * scale, scales float[16]
//   int4      unit 8       in 4 bytes: low nibbles depth..depth+3, high nibbles depth+4..depth+7, unsigned
//                          (value + 8), scales fp16[16]
// There is one scale per token and head. page_size is a multiple of 16; d_pad is head_dim rounded up to 16,
// and what a token's key and value have there is zero.
struct KvLayout {
  Format dtype;
  int32_t kv_heads, head_dim, d_pad, page_size;
};
constexpr int kBlockTokens = 16;

// Byte offsets within a block, and its size.
struct KvBlock {
  int64_t key_scales, value_scales, values, bytes;
};
KvLayout kv_layout(Format dtype, int32_t kv_heads, int32_t head_dim, int32_t page_size);  // kv_layout.cpp
KvBlock kv_block(const KvLayout& kv);
int64_t kv_page_bytes(const KvLayout& kv);

// Tokens of page `source` from `source_slot` on go to page `target` from `target_slot` on.
struct KvCopy {
  int32_t source, source_slot, target, target_slot;
  int64_t tokens;
};

// One contiguous run of tokens of one sequence in this step: rows [row, row + count) of the step's matrices
// go to slots start, start + 1, ... of the sequence. Without a tree a token's position is its slot. In a tree
// it is start + depth, and it sees the slots below start and its own ancestors.
struct Span {
  int32_t row, count, start;
  int32_t table;  // offset of the sequence's pages in the group's block table
  // Tokens of a tree that come before row `row` (a tile of rows may begin inside one), or -1: no tree. The
  // step's `parents` of a tree's rows hold offsets from its first token, -1: the token before it.
  int32_t tree;
};

struct AttentionArgs {
  const float* q;  // q_T(HD), leading dimension ldq
  int64_t ldq;
  float* out;  // out_T(HD)
  int64_t ldo;
  const void* pool;  // the layer's pages
  KvLayout kv;
  int32_t heads;   // query heads; a multiple of kv.kv_heads
  float scale;     // scores = scale * q.k
  float softcap;   // > 0: scores = softcap * tanh(scores / softcap)
  int32_t window;  // > 0: a token sees the last `window` tokens, itself included
  const int32_t* block_table;
  const int32_t* parents;  // [T]; read for spans that are trees
};

// ---- sampling ------------------------------------------------------------------------------------

// What one row of logits needs to become a token. Order of treatment: logit_bias, penalties (repetition
// as in CTRL, then presence and frequency over the output), allowed-token mask, temperature, top-k, top-p,
// min-p, then argmax of (log-probability + Gumbel noise keyed by (seed, output_index, token id)).
// temperature 0 takes the argmax of the treated logits, the lowest id among equals.
struct SampleRow {
  float temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  int32_t top_k;     // 0: all
  int32_t logprobs;  // -1: none; n: the chosen token's and the n largest
  uint64_t seed;
  int32_t output_index;              // how many tokens this request has produced before
  int32_t prompt_begin, prompt_end;  // ranges in `history`: ids of the prompt and of the output so far,
  int32_t output_begin, output_end;  // given only where a penalty needs them
  int32_t bias_begin, bias_end;      // range in bias_ids / bias_values
  int32_t mask_row;                  // row of the bit masks (32 tokens a word), or -1
  int32_t target;                    // the token to take whatever the logits say, or -1
};

struct SampleArgs {
  const float* logits;  // [rows][vocab]
  int64_t vocab, ld;
  const SampleRow* rows;
  const int32_t* history;
  const int32_t* bias_ids;
  const float* bias_values;
  const uint32_t* masks;  // [mask rows][(vocab + 31) / 32]
  int32_t max_logprobs;   // leading dimension of the top outputs
  int32_t* token;         // [rows] the chosen id; -1 where the row has a NaN or nothing is allowed
  float* logprob;         // [rows] log-softmax of the *untreated* logits at the chosen id
  int32_t* top_ids;       // [rows][max_logprobs], largest first
  float* top_logprobs;
  uint8_t* bad;  // [rows] 1: NaN or +Inf among the logits, 2: nothing allowed
};

// What one pass over some logits tells.
struct Scan {
  float maximum;
  int32_t argmax;  // the lowest id of the maximum; -1: all are -Inf
  bool bad;        // NaN or +Inf
};

// ---- kernels -------------------------------------------------------------------------------------

enum class Act : int32_t { silu = 0, gelu = 1, gelu_tanh = 2, relu = 3 };

// What happens to a tile of a linear layer's outputs while it is in cache, in this order:
// y = act(gate) * y, or act(y) where there is no gate; then y = residual + y.
struct Finish {
  int32_t act;        // Act, or -1: none
  const float* gate;  // null: none
  int64_t ldg;
  const float* residual;  // null: none
  int64_t ldr;
};

// What attention does over a whole step at a time where its scores lie in memory.
enum class AttentionPass : int32_t { keys, softmax, values };

// One table per ISA. r0, r1: rows. Functions marked scratch get a per-thread buffer of at least the bytes
// that the matching *_scratch function says.
struct Kernels {
  const char* isa;

  // linear ------------------------------------------------------------------------------------------
  // Makes rows [r0, r1) of x ready inside `out`, as laid out by activations_over; nothing to do for f32, f16.
  // scale: PackedWeight::activation_scale.
  void (*prepare)(Format format, int32_t group, float scale, int64_t k, const float* x, int64_t ldx,
                  const Activations& out, int64_t r0, int64_t r1);
  // out_MN[:, 16*p0 .. min(16*p1, n)) = act . weight^T (+ bias[n], when not null) for all rows of `act`.
  void (*linear)(const PackedWeight& w, const Activations& act, const float* bias, float* out, int64_t ldo,
                 int64_t p0, int64_t p1, void* scratch);
  int64_t (*linear_scratch)(Format format, int32_t group, int64_t k);
  // Finishes out[rows][columns]; gate and residual point at the tile's first element.
  void (*finish)(const Finish& finish, float* out, int64_t ldo, int64_t rows, int64_t columns);
  // out[r] = scale * weight[ids[r], :] (dequantized), rows [r0, r1)
  void (*embed)(const PackedWeight& w, const int32_t* ids, float scale, float* out, int64_t ldo, int64_t r0,
                int64_t r1);

  // norms, elementwise ---------------------------------------------------------------------------------
  void (*rms_norm)(const float* x, const float* w, float eps, float* y, int64_t d, int64_t r0, int64_t r1);
  void (*layer_norm)(const float* x, const float* w, const float* b, float eps, float* y, int64_t d,
                     int64_t r0, int64_t r1);
  void (*add)(const float* a, const float* b, float* y, int64_t i0, int64_t i1);
  void (*scale)(const float* x, float factor, float* y, int64_t i0, int64_t i1);
  void (*softcap)(const float* x, float cap, float* y, int64_t i0, int64_t i1);
  void (*activation)(Act act, const float* x, float* y, int64_t i0, int64_t i1);
  void (*act_mul)(Act act, const float* gate, const float* up, float* y, int64_t i0, int64_t i1);
  // Rotates pairs (i, i + rotary/2) of the first `rotary` elements of each head; others are copied.
  // x_T(HD) -> y_T(HD), leading dimensions ldx and ldy. magnitude multiplies cos and sin.
  void (*rope)(const float* x, int64_t ldx, const int32_t* positions, const float* inv_freq, float magnitude,
               float* y, int64_t ldy, int64_t heads, int64_t head_dim, int64_t rotary, int64_t r0,
               int64_t r1);

  // attention ------------------------------------------------------------------------------------------
  // Writes rows [r0, r1) of one span (relative to it) into its pages; k and v point at row r0, leading
  // dimensions ldk and ldv. block_table is the whole group's; the span says where its own entries begin.
  // Two calls at a time must not write slots of the same 16 (4-bit numbers share bytes).
  void (*kv_write)(const KvLayout& kv, void* pool, const int32_t* block_table, const Span& span,
                   const float* k, int64_t ldk, const float* v, int64_t ldv, int64_t r0, int64_t r1);
  // Copies `tokens` tokens of a page, all heads; within a page to lower slots only, in ascending order.
  void (*kv_copy)(const KvLayout& kv, void* pool, const KvCopy& copy);
  // Attention of query rows [r0, r1) of one span (relative to it) under one kv head.
  void (*attention)(const AttentionArgs& args, const Span& span, int32_t kv_head, int64_t r0, int64_t r1,
                    void* scratch);
  int64_t attention_rows;  // most query rows a call takes (tile height)
  int64_t (*attention_scratch)(const AttentionArgs& args);
  // One pass of the same with scores in memory: `scores` is the span's matrix, span.count * heads rows of
  // score_row_bytes(span.start + span.count), 64-byte aligned. Scratch as attention's.
  void (*attention_pass)(const AttentionArgs& args, const Span& span, int32_t kv_head, int64_t r0, int64_t r1,
                         AttentionPass pass, float* scores, void* scratch);
  int64_t (*score_row_bytes)(int64_t keys);

  // experts ---------------------------------------------------------------------------------------------
  // Routing: softmax over all experts, the k largest (lowest id among equals), renormalised if asked.
  // ids_Tk, weights_Tk.
  void (*top_k_experts)(const float* logits, int64_t experts, int64_t k, bool renormalise, int32_t* ids,
                        float* weights, int64_t r0, int64_t r1);

  // sampling ---------------------------------------------------------------------------------------------
  void (*sample)(const SampleArgs& args, int64_t row, void* scratch);
  int64_t (*sample_scratch)(int64_t vocab);
  Scan (*scan)(const float* logits, int64_t n);

  // probe -------------------------------------------------------------------------------------------------
  // Reads `bytes` (a multiple of 512) at `data` (64-byte aligned) as 1 or 2 streams, prefetching `ahead`
  // bytes (0: not at all); returns the sum of the 32-bit words.
  uint32_t (*read)(const void* data, int64_t bytes, int streams, int64_t ahead);
  // Register-only loops of `steps` steps; they return the multiply-accumulates done.
  int64_t (*peak_int8)(int64_t steps);
  int64_t (*peak_bf16)(int64_t steps);
  int64_t (*peak_fp32)(int64_t steps);
};

// dispatch.cpp. Names: "scalar", "avx2", "avx512". nullptr when this machine (or build) lacks it.
const Kernels* find_kernels(const char* isa);
const char* best_isa();

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace gossamer
