// Linear layers with AVX-512 (VNNI for integers, BF16 for bfloat16). A panel of 16 outputs is one register.
#pragma once
#include <immintrin.h>

#include "generic/blocks.h"
#include "generic/prepare.h"

#define GOSSAMER_INLINE inline __attribute__((always_inline))

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

GOSSAMER_INLINE __m512i broadcast_word(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return _mm512_set1_epi32(word);
}

GOSSAMER_INLINE __m512 load_halves(const void* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
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

constexpr int kUnroll = 4;  // steps; divides the steps of every group

// Asks for the lines that store_outputs will write, before the last stretch of work on them.
template <int MR, int P>
GOSSAMER_INLINE void expect_outputs(const Tile& t) {
  for (int r = 0; r < MR; r++) {
    const float* row = t.out + (t.row + r) * t.ldo + t.panel * kPanel;
    for (int p = 0; p < P; p++) _mm_prefetch(row + p * kPanel, _MM_HINT_T0);
  }
}

// One step of a dot product: kUnit inputs, kBytes of weights for 16 outputs.
struct DotF32 {
  using Acc = __m512;
  static constexpr int64_t kUnit = 1, kBytes = 64, kActBytes = 4;
  static GOSSAMER_INLINE __m512 weights(const uint8_t* b) { return _mm512_loadu_ps(b); }
  static GOSSAMER_INLINE __m512i activation(const uint8_t* a) { return broadcast_word(a); }
  static GOSSAMER_INLINE Acc step(Acc c, __m512 w, __m512i x) {
    return _mm512_fmadd_ps(w, _mm512_castsi512_ps(x), c);
  }
  static GOSSAMER_INLINE Acc start(const Tile&, int) { return _mm512_setzero_ps(); }
  static GOSSAMER_INLINE __m512 finish(const Tile&, int, int, Acc c) { return c; }
};

struct DotF16 : DotF32 {
  static constexpr int64_t kBytes = 32;
  static GOSSAMER_INLINE __m512 weights(const uint8_t* b) { return load_halves(b); }
};

struct DotBf16 : DotF32 {
  static constexpr int64_t kUnit = 2, kActBytes = 2;
  static GOSSAMER_INLINE __m512i weights(const uint8_t* b) { return _mm512_loadu_si512(b); }
  static GOSSAMER_INLINE Acc step(Acc c, __m512i w, __m512i x) {
    return _mm512_dpbf16_ps(c, (__m512bh)w, (__m512bh)x);
  }
};

// Integer accumulators have the element type of VPDPBUSD: GCC copies every one of them on every step when it
// has to look at the same register as __m512i (64-bit elements).
typedef int32_t Sums __attribute__((vector_size(64)));

struct DotInt8 {
  using Acc = Sums;
  static constexpr int64_t kUnit = 4, kBytes = 64, kActBytes = 1;
  static GOSSAMER_INLINE __m512i weights(const uint8_t* b) { return _mm512_loadu_si512(b); }
  static GOSSAMER_INLINE __m512i activation(const uint8_t* a) { return broadcast_word(a); }
  static GOSSAMER_INLINE Acc step(Acc c, __m512i w, __m512i x) {
    return (Sums)_mm512_dpbusd_epi32((__m512i)c, w, x);
  }
  // Weights are stored with 128 added: take it back for the whole row at once.
  static GOSSAMER_INLINE Acc start(const Tile& t, int r) {
    return (Sums)_mm512_set1_epi32(-128 * t.act->sums[t.row + r]);
  }
  static GOSSAMER_INLINE __m512 finish(const Tile& t, int r, int p, Acc c) {
    const __m512 scale = _mm512_loadu_ps(static_cast<const float*>(t.w->scales) + (t.panel + p) * kPanel);
    return _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)c),
                         _mm512_mul_ps(scale, _mm512_set1_ps(t.act->scales[t.row + r])));
  }
};

// Adds `steps` steps in order, unrolled, asking for weights ahead every kEvery-th of them: in the narrow path
// each step consumes a cache line, in the wide one several row blocks share the asking.
template <class Dot, int kEvery, int MR, int P>
struct Dots {
  static constexpr int64_t kStepBytes = Dot::kUnit * Dot::kActBytes;
  typename Dot::Acc c[MR][P];

  GOSSAMER_INLINE void step(const uint8_t* b, int64_t b_panel, const uint8_t* a, int64_t lda) {
    decltype(Dot::weights(b)) w[P];
    for (int p = 0; p < P; p++) w[p] = Dot::weights(b + p * b_panel);
    for (int r = 0; r < MR; r++) {
      const auto x = Dot::activation(a + r * lda);
      for (int p = 0; p < P; p++) c[r][p] = Dot::step(c[r][p], w[p], x);
    }
  }

  GOSSAMER_INLINE void run(const uint8_t* b, const uint8_t* a, int64_t steps, const uint8_t*& ahead,
                           const Tile& t) {
    const int64_t b_panel = t.b_panel, lda = t.act->row_stride_bytes;
    const int64_t ahead_step = kEvery * t.ahead_step, ahead_panel = t.ahead_panel;
    for (; steps >= kUnroll; steps -= kUnroll, a += kStepBytes * kUnroll, b += Dot::kBytes * kUnroll) {
#pragma GCC unroll 4
      for (int i = 0; i < kUnroll; i++) {
        if (i % kEvery == 0) {
          for (int p = 0; p < P; p++) _mm_prefetch(ahead + p * ahead_panel, _MM_HINT_T0);
          ahead += ahead_step;
        }
        step(b + i * Dot::kBytes, b_panel, a + i * kStepBytes, lda);
      }
    }
    for (; steps > 0; steps--, a += kStepBytes, b += Dot::kBytes) step(b, b_panel, a, lda);
  }
};

// Formats whose partial sums are plain accumulators all along K.
template <class Dot, int kEvery>
struct Direct {
  static constexpr int kRows = 8, kPanels = 2, kNarrowRows = 8, kStreamRows = 0;
  static constexpr int64_t kUnit = Dot::kUnit, kBlock = 128 * kUnit, kUnpackedBytes = 0;
  using Narrow = Direct<Dot, 1>;

  template <int MR, int P>
  static __attribute__((noinline)) void tile(const Tile& t) {
    Dots<Dot, kEvery, MR, P> dots;
    auto& c = dots.c;
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
    if (t.last()) expect_outputs<MR, P>(t);
    dots.run(t.b, activation_row(*t.act, t.row) + t.k0 * Dot::kActBytes, (t.k1 - t.k0) / kUnit, ahead, t);
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

struct WideF16 : Direct<DotF32, 2> {
  static constexpr int64_t kUnpackedBytes = 64;
  using Narrow = Direct<DotF16, 1>;

  static void unpack(const PackedWeight& w, int64_t panel, int64_t k0, int64_t k1, uint8_t* to) {
    const uint8_t* from = panel_data(w, panel) + k0 * DotF16::kBytes;
    for (int64_t i = 0; i < k1 - k0; i++)
      _mm512_storeu_ps(to + i * 64, DotF16::weights(from + i * DotF16::kBytes));
  }
};

// ---- groups: an exact integer sum of each, then one fused multiply-add in ascending groups ---------------

// Where the integer sum of a group starts, `sum` being that of its activations: weights are stored with kZero
// added, which this takes back for the whole group at once.
template <int32_t kZero>
struct FixedZero {
  static GOSSAMER_INLINE Sums start(const uint8_t*, int32_t sum) {
    return (Sums)_mm512_mullo_epi32(_mm512_set1_epi32(-kZero), _mm512_set1_epi32(sum));
  }
};

struct StoredZeros {
  static GOSSAMER_INLINE Sums start(const uint8_t* zeros, int32_t sum) {
    const __m128i* lanes = reinterpret_cast<const __m128i*>(zeros);
    return (Sums)_mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(lanes)), _mm512_set1_epi32(-sum));
  }
};

// Eight inputs straight from the packed panel; Decode makes unsigned bytes of nibbles.
template <class Decode>
struct DotNibbles : DotInt8 {
  struct Pair {
    __m512i low, high;
  };
  static constexpr int64_t kUnit = 8;
  static GOSSAMER_INLINE Pair weights(const uint8_t* b) {
    const __m512i v = _mm512_loadu_si512(b), nibble = _mm512_set1_epi8(15);
    return {Decode::bytes(_mm512_and_si512(v, nibble)),
            Decode::bytes(_mm512_and_si512(_mm512_srli_epi16(v, 4), nibble))};
  }
  static GOSSAMER_INLINE Pair activation(const uint8_t* a) {
    return {broadcast_word(a), broadcast_word(a + 4)};
  }
  static GOSSAMER_INLINE Acc step(Acc c, Pair w, Pair x) {
    return DotInt8::step(DotInt8::step(c, w.low, x.low), w.high, x.high);
  }
};

struct Integers {
  static GOSSAMER_INLINE __m512i bytes(__m512i nibbles) { return nibbles; }
};

// Levels with 128 added, as int8 is stored.
struct Nf4Levels {
  static GOSSAMER_INLINE __m512i bytes(__m512i nibbles) {
    const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kNf4));
    const __m128i unsigned_levels = _mm_xor_si128(levels, _mm_set1_epi8(-128));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(unsigned_levels), nibbles);
  }
};

// The float sums live in t.acc all the time: the integer ones need the registers.
template <class Dot, class Zero, int kEvery>
struct Grouped {
  static constexpr int kRows = 8, kPanels = 2, kNarrowRows = 8, kStreamRows = 2;
  static constexpr int64_t kUnit = Dot::kUnit, kBlock = 512, kUnpackedBytes = 0;
  using Narrow = Grouped<Dot, Zero, 1>;

  template <int MR, int P>
  static __attribute__((noinline)) void tile(const Tile& t) {
    const int64_t group = t.w->group, steps = group / kUnit, count = (t.k1 - t.k0) / group;
    if (steps % kUnroll) __builtin_unreachable();
    const uint8_t* a = activation_row(*t.act, t.row) + t.k0;
    const uint8_t* b = t.b;
    const uint8_t* ahead = t.ahead;
    float* const acc = reinterpret_cast<float*>(t.acc);
    if (t.first()) std::memset(acc, 0, MR * 2 * kPanel * sizeof(float));
    if (t.last()) expect_outputs<MR, P>(t);
    GroupScales scales(t);
    for (int64_t g = 0; g < count; g++, a += group, b += steps * Dot::kBytes, scales.next()) {
      Dots<Dot, kEvery, MR, P> dots;
      for (int r = 0; r < MR; r++) {
        for (int p = 0; p < P; p++) {
          dots.c[r][p] = Zero::start(scales.zeros + p * scales.panel, scales.sums[r]);
        }
      }
      dots.run(b, a, steps, ahead, t);
      for (int p = 0; p < P; p++) {
        const __m512 s = load_halves(scales.weights + p * scales.panel);
        for (int r = 0; r < MR; r++) {
          float* f = acc + (r * 2 + p) * kPanel;
          const __m512 scale = _mm512_mul_ps(s, _mm512_set1_ps(scales.activations[r]));
          const __m512 sum = _mm512_cvtepi32_ps((__m512i)dots.c[r][p]);
          _mm512_storeu_ps(f, _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(f)));
        }
      }
    }
    if (!t.last()) return;
    for (int r = 0; r < MR; r++) {
      for (int p = 0; p < P; p++) store_outputs(t, r, p, _mm512_loadu_ps(acc + (r * 2 + p) * kPanel));
    }
  }
};

using WideInt8Groups = Grouped<DotInt8, FixedZero<128>, 2>;

// Formats of 4 bits, unpacked to bytes in the order of int8 where many rows share the stores; for a few tiles
// of rows, taking nibbles apart again in each costs less.
template <class Decode, class Zero>
struct WideNibbles : Grouped<DotInt8, Zero, 4> {
  static constexpr int kNarrowRows = 32;
  static constexpr int64_t kUnpackedBytes = 16;
  using Narrow = Grouped<DotNibbles<Decode>, Zero, 1>;

  static void unpack(const PackedWeight& w, int64_t panel, int64_t k0, int64_t k1, uint8_t* to) {
    const uint8_t* from = panel_data(w, panel) + k0 * 8;
    for (int64_t k = k0; k < k1; k += 8, from += 64, to += 128) {
      const auto v = DotNibbles<Decode>::weights(from);
      _mm512_storeu_si512(to, v.low);
      _mm512_storeu_si512(to + 64, v.high);
    }
  }
};

using WideInt4 = WideNibbles<Integers, FixedZero<8>>;
using WideUint4 = WideNibbles<Integers, StoredZeros>;
using WideNf4 = WideNibbles<Nf4Levels, FixedZero<128>>;

// ---- sparse weights ------------------------------------------------------------------------------------

constexpr int64_t kSparseAhead = 4096;  // how far ahead sparse weights are asked for

// One vector of a sparse weight at `values`, expanded; `values` moves on.
template <int64_t kBytes>
GOSSAMER_INLINE __m512i expand(const uint8_t* bits, const uint8_t*& values) {
  const __m512i v = _mm512_loadu_si512(values);
  _mm_prefetch(values + kSparseAhead, _MM_HINT_T0);
  if (kBytes == 1) {
    const uint64_t mask = load_bits(bits);
    values += _mm_popcnt_u64(mask);
    return _mm512_mask_expand_epi8(_mm512_set1_epi8(-128), mask, v);  // int8 is stored with 128 added
  }
  uint32_t mask;
  std::memcpy(&mask, bits, sizeof mask);
  values += 2 * _mm_popcnt_u32(mask);
  return _mm512_maskz_expand_epi16(mask, v);
}

template <int64_t kBytes>
const uint8_t* expand_block(const uint8_t* from, uint8_t* to) {
  constexpr int64_t step = 8 / kBytes;  // bytes of bits of one vector
  const uint8_t* values = from + kBitsBytes;
  _mm_prefetch(from + kSparseAhead, _MM_HINT_T0);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kBitsBytes; i += step, to += 64) {
    _mm512_storeu_si512(to, expand<kBytes>(from + i, values));
  }
  return values;
}

// For few rows: numbers go straight from memory into the dot products. One panel at a time keeps memory to
// one stream per thread, as in linear_narrow; Panels = 2 hides the latency of long additions where one or two
// rows would wait for them.
template <class Dot, int64_t kBytes, int Rows, int Panels>
struct SparseNarrow {
  static constexpr int kRows = Rows, kPanels = Panels;

  template <int MR, int P>
  static __attribute__((noinline)) void tile(const Tile& t) {
    constexpr int64_t vectors = kSparseBlock / Dot::kUnit, bits = 8 / kBytes;
    typename Dot::Acc c[MR][P];
    const uint8_t *block[P], *values[P];
    for (int p = 0; p < P; p++) {
      for (int r = 0; r < MR; r++) c[r][p] = Dot::start(t, r);
      block[p] = t.b + p * t.b_panel;
    }
    const int64_t lda = t.act->row_stride_bytes;
    const uint8_t* a = activation_row(*t.act, t.row);
    const auto step = [&](int64_t i) __attribute__((always_inline)) {
      decltype(expand<kBytes>(a, values[0])) w[P];
      for (int p = 0; p < P; p++) w[p] = expand<kBytes>(block[p] + i * bits, values[p]);
      for (int r = 0; r < MR; r++) {
        const auto x = Dot::activation(a + i * 4 + r * lda);
        for (int p = 0; p < P; p++) c[r][p] = Dot::step(c[r][p], w[p], x);
      }
    };
    expect_outputs<MR, P>(t);
    for (int64_t left = t.k1 / Dot::kUnit; left > 0; left -= vectors, a += vectors * 4) {
      for (int p = 0; p < P; p++) {
        values[p] = block[p] + kBitsBytes;
        _mm_prefetch(block[p] + kSparseAhead, _MM_HINT_T0);
      }
      if (left >= vectors) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < vectors; i++) step(i);
      } else {
        for (int64_t i = 0; i < left; i++) step(i);
      }
      for (int p = 0; p < P; p++) block[p] = values[p];
    }
    for (int r = 0; r < MR; r++) {
      for (int p = 0; p < P; p++) store_outputs(t, r, p, Dot::finish(t, r, p, c[r][p]));
    }
  }
};

template <class F>
void sparse_narrow(Tile t, int64_t p0, int64_t p1) {
  const int64_t blocks = ceil_div(t.act->m, F::kRows);
  t.k1 = t.w->k_pad;
  for (int64_t p = p0; p < p1; p += F::kPanels) {
    t.panel = p;
    t.b = sparse_panel(*t.w, p);
    t.b_panel = t.w->starts[p + 1] - t.w->starts[p];
    for (int64_t i = 0; i < blocks; i++) {
      t.row = t.act->m * i / blocks;
      run_tile<F>(t.act->m * (i + 1) / blocks - t.row, smaller(F::kPanels, p1 - p), t);
    }
  }
}

// PairRows: rows up to which two panels go side by side.
template <class Dot, int64_t kBytes, int PairRows>
void linear_without_zeros(const PackedWeight& w, const Activations& act, const float* bias, float* out,
                          int64_t ldo, int64_t p0, int64_t p1, void* scratch) {
  constexpr int64_t kNarrowRows = 32;
  if (act.m > kNarrowRows)
    return linear_sparse<Direct<Dot, 2>, kBytes>(w, act, bias, out, ldo, p0, p1, scratch);
  Tile t{};
  t.w = &w;
  t.act = &act;
  t.bias = bias;
  t.out = out;
  t.ldo = ldo;
  if constexpr (PairRows > 0) {
    if (act.m <= PairRows) return sparse_narrow<SparseNarrow<Dot, kBytes, PairRows, 2>>(t, p0, p1);
  }
  sparse_narrow<SparseNarrow<Dot, kBytes, 16, 1>>(t, p0, p1);
}

void linear(const PackedWeight& w, const Activations& act, const float* bias, float* out, int64_t ldo,
            int64_t p0, int64_t p1, void* scratch) {
  if (w.starts && w.format == Format::int8)
    return linear_without_zeros<DotInt8, 1, 0>(w, act, bias, out, ldo, p0, p1, scratch);
  if (w.starts) return linear_without_zeros<DotBf16, 2, 4>(w, act, bias, out, ldo, p0, p1, scratch);
  switch (w.format) {
    case Format::f32:
      return linear_blocked<Direct<DotF32, 2>>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::f16:
      return linear_blocked<WideF16>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::bf16:
      return linear_blocked<Direct<DotBf16, 2>>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::int8:
      if (w.group > 0) return linear_blocked<WideInt8Groups>(w, act, bias, out, ldo, p0, p1, scratch);
      return linear_blocked<Direct<DotInt8, 2>>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::int4:
      return linear_blocked<WideInt4>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::uint4:
      return linear_blocked<WideUint4>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::nf4:
      return linear_blocked<WideNf4>(w, act, bias, out, ldo, p0, p1, scratch);
  }
}

int64_t linear_scratch(Format, int32_t, int64_t) { return kLinearScratch; }

}  // namespace
}  // namespace GOSSAMER_ISA
}  // namespace gossamer
