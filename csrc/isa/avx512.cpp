// AVX-512 with VNNI and BF16: one copy of every kernel, compiled with that ISA's flags.
// GCC 12's own _mm512_undefined_ps (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#define GOSSAMER_ISA avx512
#include "isa/linear_avx512.h"

namespace gossamer {
namespace avx512 {
#include "generic/table.h"

namespace {

// Sixteen independent chains cover the latency of any instruction measured here: VDPBF16PS takes 12 to 16.
constexpr int kChains = 16;

template <class Acc, class Step>
GOSSAMER_INLINE int64_t peak(int64_t steps, int64_t macs, Step step) {
  Acc c[kChains];
  for (int j = 0; j < kChains; j++) c[j] = Acc{};
  for (int64_t i = 0; i < steps; i++) {
#pragma GCC unroll 16
    for (int j = 0; j < kChains; j++) c[j] = step(c[j]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < kChains; j++) asm volatile("" : : "v"(c[j]));
  return steps * kChains * macs;
}

int64_t peak_int8(int64_t steps) {
  const __m512i x = _mm512_set1_epi32(0x01020304);
  return peak<__m512i>(steps, 64, [x](__m512i c) { return _mm512_dpbusd_epi32(c, x, x); });
}

int64_t peak_bf16(int64_t steps) {
  const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  return peak<__m512>(steps, 32, [x](__m512 c) { return _mm512_dpbf16_ps(c, x, x); });
}

int64_t peak_fp32(int64_t steps) {
  const __m512 x = _mm512_set1_ps(0.5f);
  return peak<__m512>(steps, 16, [x](__m512 c) { return _mm512_fmadd_ps(c, x, x); });
}

}  // namespace
}  // namespace avx512

const Kernels* avx512_kernels() {
  static const Kernels table = [] {
    Kernels k{};
    avx512::fill_generic(k);
    k.isa = "avx512";
    k.prepare = avx512::prepare;
    k.linear = avx512::linear;
    k.linear_scratch = avx512::linear_scratch;
    k.embed = avx512::embed;
    k.peak_int8 = avx512::peak_int8;
    k.peak_bf16 = avx512::peak_bf16;
    k.peak_fp32 = avx512::peak_fp32;
    return k;
  }();
  return &table;
}

}  // namespace gossamer
