// The baseline: what any machine of this architecture runs.
#define GOSSAMER_ISA scalar
#ifdef __x86_64__
#include <immintrin.h>  // SSE2, which every x86-64 has
#endif

#include "generic/linear.h"

namespace gossamer {
namespace scalar {
#include "generic/table.h"

namespace {

// All formats are multiplied as floats here, in the vectors of the baseline.
int64_t peak_fp32(int64_t steps) {
  typedef float Lanes __attribute__((vector_size(16)));
  constexpr int kChains = 12;
  Lanes c[kChains];
  for (int j = 0; j < kChains; j++) c[j] = Lanes{};
  for (int64_t i = 0; i < steps; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; j++) c[j] = c[j] * 0.5f + 0.5f;
  }
  Lanes sum = c[0];
  for (int j = 1; j < kChains; j++) sum += c[j];
  volatile float sink = sum[0] + sum[1] + sum[2] + sum[3];
  (void)sink;
  return steps * kChains * 4;
}

}  // namespace
}  // namespace scalar

const Kernels* scalar_kernels() {
  static const Kernels table = [] {
    Kernels k{};
    scalar::fill_generic(k);
    k.isa = "scalar";
    k.prepare = scalar::prepare;
    k.linear = scalar::linear;
    k.linear_scratch = scalar::linear_scratch;
    k.embed = scalar::embed;
    k.peak_int8 = scalar::peak_fp32;
    k.peak_bf16 = scalar::peak_fp32;
    k.peak_fp32 = scalar::peak_fp32;
    return k;
  }();
  return &table;
}

}  // namespace gossamer
