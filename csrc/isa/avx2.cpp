// AVX2 with FMA and F16C: one copy of every kernel, compiled with that ISA's flags.
#define GOSSAMER_ISA avx2
#include "isa/linear_avx2.h"

namespace gossamer {
namespace avx2 {
#include "generic/table.h"

namespace {

constexpr int kChains =
    10;  // independent chains: they cover the latency, and leave registers for the operands

template <class Acc, class Step>
GOSSAMER_INLINE int64_t peak(int64_t steps, int64_t macs, Step step) {
  Acc c[kChains];
  for (int j = 0; j < kChains; j++) c[j] = Acc{};
  for (int64_t i = 0; i < steps; i++) {
#pragma GCC unroll 10
    for (int j = 0; j < kChains; j++) c[j] = step(c[j]);
  }
#pragma GCC unroll 10
  for (int j = 0; j < kChains; j++) asm volatile("" : : "x"(c[j]));
  return steps * kChains * macs;
}

// Sums in 16 bits, as int4 can keep them for a while: an upper limit for int8, which needs two more steps.
int64_t peak_int8(int64_t steps) {
  __m256i x = _mm256_set1_epi32(0x01020304);
  return peak<__m256i>(steps, 32, [&x](__m256i c) {
    asm volatile("" : "+x"(x));  // a product like the one before is still to be computed
    return _mm256_add_epi16(c, _mm256_maddubs_epi16(x, x));
  });
}

int64_t peak_fp32(int64_t steps) {
  const __m256 x = _mm256_set1_ps(0.5f);
  return peak<__m256>(steps, 8, [x](__m256 c) { return _mm256_fmadd_ps(c, x, x); });
}

// There is no bf16 arithmetic: numbers are widened and multiplied as fp32.
int64_t peak_bf16(int64_t steps) { return peak_fp32(steps); }

}  // namespace
}  // namespace avx2

const Kernels* avx2_kernels() {
  static const Kernels table = [] {
    Kernels k{};
    avx2::fill_generic(k);
    k.isa = "avx2";
    k.prepare = avx2::prepare;
    k.linear = avx2::linear;
    k.linear_scratch = avx2::linear_scratch;
    k.embed = avx2::embed;
    k.peak_int8 = avx2::peak_int8;
    k.peak_bf16 = avx2::peak_bf16;
    k.peak_fp32 = avx2::peak_fp32;
    return k;
  }();
  return &table;
}

}  // namespace gossamer
