// The bodies that are written once for every ISA. An isa/*.cpp includes this inside its own namespace, once,
// after <cstddef>, <cstdint>, api.h, generic/prepare.h and, on x86, <immintrin.h>. Nothing here may have
// external linkage or instantiate a shared template (std::vector, std::min, ...): the linker would keep one
// copy of such a function for all ISAs, and it might be the one that this machine cannot run.

namespace generic {
namespace {
#include "generic/vec.h"
// clang-format off: each needs what the ones above define.
#include "generic/vmath.h"
#include "generic/elementwise.h"
#include "generic/norm.h"
#include "generic/rope.h"
#include "generic/experts.h"
#include "generic/kv.h"
#include "generic/dots.h"
#include "generic/gemm.h"
#include "generic/attention_kinds.h"
#include "generic/attention_tile.h"
#include "generic/attention_keys.h"
#include "generic/softmax.h"
#include "generic/attention.h"
#include "generic/attention_materialised.h"
#include "generic/select.h"
#include "generic/sample.h"
#include "generic/read.h"
// clang-format on
}  // namespace
}  // namespace generic

// All but isa, prepare, linear, linear_scratch and embed.
static void fill_generic(Kernels& table) {
  table.rms_norm = generic::rms_norm;
  table.layer_norm = generic::layer_norm;
  table.add = generic::add;
  table.scale = generic::scale;
  table.softcap = generic::softcap;
  table.activation = generic::activation;
  table.act_mul = generic::act_mul;
  table.finish = generic::finish;
  table.rope = generic::rope;
  table.kv_write = generic::kv_write;
  table.kv_copy = generic::kv_copy;
  table.attention = generic::attention;
  table.attention_rows = generic::kAttentionRows;
  table.attention_scratch = generic::attention_scratch;
  table.attention_pass = generic::attention_pass;
  table.score_row_bytes = generic::score_row_bytes;
  table.top_k_experts = generic::top_k_experts;
  table.sample = generic::sample;
  table.sample_scratch = generic::sample_scratch;
  table.scan = generic::scan;
  table.read = generic::read;
}
