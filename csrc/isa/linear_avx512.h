// Linear layers with AVX-512 (VNNI for integers, BF16 for bfloat16). A panel of 16 outputs is one register.
#pragma once
#include <immintrin.h>

#include "generic/blocks.h"
#include "generic/prepare.h"

#define GOSSAMER_INLINE inline __attribute__((always_inline))

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

GOSSAMER_INLINE int32_t load_word(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

GOSSAMER_INLINE __mmask16 panel_mask(const Tile& t, int p) {
  const int64_t left = t.w->n - (t.panel + p) * kPanel;
  return left >= kPanel ? __mmask16(0xffff) : __mmask16((1u << left) - 1);
}

GOSSAMER_INLINE void store_outputs(const Tile& t, int r, int p, __m512 value) {
  const __mmask16 mask = panel_mask(t, p);
  const int64_t column = (t.panel + p) * kPanel;
  if (t.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, t.bias + column));
  _mm512_mask_storeu_ps(t.out + (t.row + r) * t.ldo + column, mask, value);
}

// One step of a dot product: 64 bytes of weights (16 outputs), 4 bytes of activations.
struct DotF32 {
  using Acc = __m512;
  static constexpr int64_t kUnit = 1, kBytes = 64, kActBytes = 4;
  static GOSSAMER_INLINE __m512 weights(const uint8_t* b) { return _mm512_loadu_ps(b); }
  static GOSSAMER_INLINE Acc step(Acc c, __m512 w, int32_t x) {
    return _mm512_fmadd_ps(w, _mm512_castsi512_ps(_mm512_set1_epi32(x)), c);
  }
  static GOSSAMER_INLINE Acc start(const Tile&, int) { return _mm512_setzero_ps(); }
  static GOSSAMER_INLINE __m512 finish(const Tile&, int, int, Acc c) { return c; }
};

struct DotF16 : DotF32 {
  static constexpr int64_t kBytes = 32;
  static GOSSAMER_INLINE __m512 weights(const uint8_t* b) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  }
};

struct DotBf16 : DotF32 {
  static constexpr int64_t kUnit = 2, kActBytes = 2;
  static GOSSAMER_INLINE __m512i weights(const uint8_t* b) { return _mm512_loadu_si512(b); }
  static GOSSAMER_INLINE Acc step(Acc c, __m512i w, int32_t x) {
    return _mm512_dpbf16_ps(c, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
  }
};

struct DotInt8 {
  using Acc = __m512i;
  static constexpr int64_t kUnit = 4, kBytes = 64, kActBytes = 1;
  static GOSSAMER_INLINE __m512i weights(const uint8_t* b) { return _mm512_loadu_si512(b); }
  static GOSSAMER_INLINE Acc step(Acc c, __m512i w, int32_t x) {
    return _mm512_dpbusd_epi32(c, w, _mm512_set1_epi32(x));
  }
  // Weights are stored with 128 added: take it back for the whole row at once.
  static GOSSAMER_INLINE Acc start(const Tile& t, int r) {
    return _mm512_set1_epi32(-128 * t.act->sums[t.row + r]);
  }
  static GOSSAMER_INLINE __m512 finish(const Tile& t, int r, int p, Acc c) {
    const __m512 scale = _mm512_loadu_ps(static_cast<const float*>(t.w->scales) + (t.panel + p) * kPanel);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(c),
                         _mm512_mul_ps(scale, _mm512_set1_ps(t.act->scales[t.row + r])));
  }
};

template <class Dot, int MR, int P>
GOSSAMER_INLINE void accumulate(typename Dot::Acc (&c)[MR][P], const uint8_t* b, int64_t b_panel,
                                const uint8_t* a, int64_t lda, int64_t steps, const uint8_t*& ahead,
                                const Tile& t) {
  const int64_t ahead_step = t.ahead_step, ahead_panel = t.ahead_panel;
  for (int64_t i = 0; i < steps; i++, a += 4, b += Dot::kBytes, ahead += ahead_step) {
    decltype(Dot::weights(b)) w[P];
    for (int p = 0; p < P; p++) {
      w[p] = Dot::weights(b + p * b_panel);
      _mm_prefetch(ahead + p * ahead_panel, _MM_HINT_T0);
    }
    for (int r = 0; r < MR; r++) {
      const int32_t x = load_word(a + r * lda);
      for (int p = 0; p < P; p++) c[r][p] = Dot::step(c[r][p], w[p], x);
    }
  }
}

// Formats whose partial sums are plain accumulators all along K.
template <class Dot>
struct Direct {
  static constexpr int kRows = 8, kPanels = 2;
  static constexpr int64_t kUnit = Dot::kUnit, kBlock = 128 * kUnit, kUnpackedBytes = 0;
  using Narrow = Direct;

  template <int MR, int P>
  static void tile(const Tile& t) {
    typename Dot::Acc c[MR][P];
    for (int r = 0; r < MR; r++) {
      for (int p = 0; p < P; p++) {
        if (t.first()) {
          c[r][p] = Dot::start(t, r);
        } else {
          std::memcpy(&c[r][p], t.acc + (r * 2 + p) * 64, 64);
        }
      }
    }
    const uint8_t* ahead = t.ahead;
    accumulate<Dot, MR, P>(c, t.b, t.b_panel, activation_row(*t.act, t.row) + t.k0 * Dot::kActBytes,
                           t.act->row_stride_bytes, (t.k1 - t.k0) / kUnit, ahead, t);
    for (int r = 0; r < MR; r++) {
      for (int p = 0; p < P; p++) {
        if (t.last()) {
          store_outputs(t, r, p, Dot::finish(t, r, p, c[r][p]));
        } else {
          std::memcpy(t.acc + (r * 2 + p) * 64, &c[r][p], 64);
        }
      }
    }
  }
};

struct WideF16 : Direct<DotF32> {
  static constexpr int64_t kUnpackedBytes = 64;
  using Narrow = Direct<DotF16>;

  static void unpack(const PackedWeight& w, int64_t panel, int64_t k0, int64_t k1, uint8_t* to) {
    const uint8_t* from = panel_data(w, panel) + k0 * DotF16::kBytes;
    for (int64_t i = 0; i < k1 - k0; i++)
      _mm512_storeu_ps(to + i * 64, DotF16::weights(from + i * DotF16::kBytes));
  }
};

// ---- int4: an exact integer sum per group, then one fused multiply-add in ascending groups ---------------

GOSSAMER_INLINE __m512 group_scales(const Tile& t, int p, int64_t group) {
  const uint16_t* s = static_cast<const uint16_t*>(t.w->scales);
  s += ((t.panel + p) * (t.w->k_pad / t.w->group) + group) * kPanel;
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(s)));
}

struct NarrowInt4 {
  static constexpr int kRows = 8, kPanels = 1;
  static constexpr int64_t kUnit = 8;

  template <int MR, int P>
  static void tile(const Tile& t) {
    static_assert(P == 1, "one panel streams best");
    const int64_t groups = t.w->k_pad / t.w->group, steps = t.w->group / kUnit;
    const int64_t lda = t.act->row_stride_bytes;
    const uint8_t* a = activation_row(*t.act, t.row);
    const uint8_t* b = t.b;
    const float* scales = t.act->scales + t.row * groups;
    const int32_t* sums = t.act->sums + t.row * groups;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 f[MR];
    for (int r = 0; r < MR; r++) f[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
      __m512i low[MR], high[MR];
      for (int r = 0; r < MR; r++) {
        low[r] = _mm512_set1_epi32(-8 * sums[r * groups + g]);
        high[r] = _mm512_setzero_si512();
      }
      for (int64_t i = 0; i < steps; i++, a += kUnit, b += 64) {
        const __m512i v = _mm512_loadu_si512(b);
        _mm_prefetch(b + kPrefetchBytes, _MM_HINT_T0);
        const __m512i v0 = _mm512_and_si512(v, nibble);
        const __m512i v1 = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
        for (int r = 0; r < MR; r++) {
          low[r] = DotInt8::step(low[r], v0, load_word(a + r * lda));
          high[r] = DotInt8::step(high[r], v1, load_word(a + r * lda + 4));
        }
      }
      const __m512 s = group_scales(t, 0, g);
      for (int r = 0; r < MR; r++) {
        const __m512 scale = _mm512_mul_ps(s, _mm512_set1_ps(scales[r * groups + g]));
        f[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(low[r], high[r])), scale, f[r]);
      }
    }
    for (int r = 0; r < MR; r++) store_outputs(t, r, 0, f[r]);
  }
};

struct WideInt4 {
  static constexpr int kRows = 8, kPanels = 2;
  static constexpr int64_t kUnit = 4, kBlock = 512, kUnpackedBytes = 16;
  using Narrow = NarrowInt4;

  static void unpack(const PackedWeight& w, int64_t panel, int64_t k0, int64_t k1, uint8_t* to) {
    const uint8_t* from = panel_data(w, panel) + k0 * 8;
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t k = k0; k < k1; k += 8, from += 64, to += 128) {
      const __m512i v = _mm512_loadu_si512(from);
      _mm512_storeu_si512(to, _mm512_and_si512(v, nibble));
      _mm512_storeu_si512(to + 64, _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble));
    }
  }

  // The float sums live in t.acc all the time: the integer ones need the registers.
  template <int MR, int P>
  static void tile(const Tile& t) {
    const int64_t groups = t.w->k_pad / t.w->group, steps = t.w->group / kUnit;
    const uint8_t* a = activation_row(*t.act, t.row) + t.k0;
    const uint8_t* b = t.b;
    const uint8_t* ahead = t.ahead;
    const float* scales = t.act->scales + t.row * groups;
    const int32_t* sums = t.act->sums + t.row * groups;
    const int64_t g0 = t.k0 / t.w->group, g1 = t.k1 / t.w->group;
    for (int64_t g = g0; g < g1; g++, a += t.w->group, b += steps * 64) {
      __m512i c[MR][P];
      for (int r = 0; r < MR; r++) {
        for (int p = 0; p < P; p++) c[r][p] = _mm512_set1_epi32(-8 * sums[r * groups + g]);
      }
      accumulate<DotInt8, MR, P>(c, b, t.b_panel, a, t.act->row_stride_bytes, steps, ahead, t);
      for (int p = 0; p < P; p++) {
        const __m512 s = group_scales(t, p, g);
        for (int r = 0; r < MR; r++) {
          float* acc = reinterpret_cast<float*>(t.acc) + (r * 2 + p) * kPanel;
          const __m512 f = g == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(acc);
          const __m512 scale = _mm512_mul_ps(s, _mm512_set1_ps(scales[r * groups + g]));
          _mm512_storeu_ps(acc, _mm512_fmadd_ps(_mm512_cvtepi32_ps(c[r][p]), scale, f));
        }
      }
    }
    if (!t.last()) return;
    for (int r = 0; r < MR; r++) {
      for (int p = 0; p < P; p++) {
        store_outputs(t, r, p, _mm512_loadu_ps(reinterpret_cast<float*>(t.acc) + (r * 2 + p) * kPanel));
      }
    }
  }
};

void linear(const PackedWeight& w, const Activations& act, const float* bias, float* out, int64_t ldo,
            int64_t p0, int64_t p1, void* scratch) {
  switch (w.format) {
    case Format::f32:
      return linear_blocked<Direct<DotF32>>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::f16:
      return linear_blocked<WideF16>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::bf16:
      return linear_blocked<Direct<DotBf16>>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::int8:
      return linear_blocked<Direct<DotInt8>>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::int4:
      return linear_blocked<WideInt4>(w, act, bias, out, ldo, p0, p1, scratch);
  }
}

int64_t linear_scratch(Format, int32_t, int64_t) { return kLinearScratch; }

}  // namespace
}  // namespace GOSSAMER_ISA
}  // namespace gossamer
