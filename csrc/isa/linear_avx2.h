// Linear layers with AVX2, FMA and F16C. A panel of 16 outputs is two registers.
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

GOSSAMER_INLINE __m256i load_bytes(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

GOSSAMER_INLINE __m256 load_halves(const void* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}

// Half h (8 outputs) of panel p.
GOSSAMER_INLINE void store_outputs(const Tile& t, int r, int p, int h, __m256 value) {
  const int64_t column = (t.panel + p) * kPanel + h * 8, left = t.w->n - column;
  float* to = t.out + (t.row + r) * t.ldo + column;
  if (left >= 8) {
    if (t.bias) value = _mm256_add_ps(value, _mm256_loadu_ps(t.bias + column));
    _mm256_storeu_ps(to, value);
    return;
  }
  float lanes[8];
  _mm256_storeu_ps(lanes, value);
  for (int64_t j = 0; j < left; j++) to[j] = t.bias ? lanes[j] + t.bias[column + j] : lanes[j];
}

// One step of a dot product: weights of both halves of a panel, 4 bytes of activations, in kPhases parts.
struct DotF32 {
  using Acc = __m256;
  using Weights = __m256;
  static constexpr int64_t kUnit = 1, kBytes = 64, kActBytes = 4;
  static constexpr int kPhases = 1;
  static GOSSAMER_INLINE Weights weights(const uint8_t* b, int h, int) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(b) + 8 * h);
  }
  static GOSSAMER_INLINE __m256 activation(int32_t x, int) {
    return _mm256_castsi256_ps(_mm256_set1_epi32(x));
  }
  static GOSSAMER_INLINE Acc step(Acc c, Weights w, __m256 x) { return _mm256_fmadd_ps(w, x, c); }
  static GOSSAMER_INLINE __m256 finish(const Tile&, int, int, int, Acc c) { return c; }
};

struct DotF16 : DotF32 {
  static constexpr int64_t kBytes = 32;
  static GOSSAMER_INLINE Weights weights(const uint8_t* b, int h, int) { return load_halves(b + 16 * h); }
};

// Pairs {k, k+1} in 32 bits: phase 0 is k, phase 1 is k + 1.
GOSSAMER_INLINE __m256 bf16_of_pairs(__m256i pairs, int phase) {
  return _mm256_castsi256_ps(phase == 0 ? _mm256_slli_epi32(pairs, 16)
                                        : _mm256_and_si256(pairs, _mm256_set1_epi32(int32_t(0xffff0000))));
}

struct DotBf16 : DotF32 {
  static constexpr int64_t kUnit = 2, kActBytes = 2;
  static constexpr int kPhases = 2;
  static GOSSAMER_INLINE Weights weights(const uint8_t* b, int h, int phase) {
    return bf16_of_pairs(load_bytes(b + 32 * h), phase);
  }
  static GOSSAMER_INLINE __m256 activation(int32_t x, int phase) {
    return bf16_of_pairs(_mm256_set1_epi32(x), phase);
  }
};

struct DotBf16Unpacked : DotBf16 {
  static constexpr int64_t kBytes = 128;
  static GOSSAMER_INLINE Weights weights(const uint8_t* b, int h, int phase) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(b) + 16 * phase + 8 * h);
  }
};

// Integer accumulators have the element type of their instruction: GCC copies them on every step when it has
// to look at the same register as __m256i (64-bit elements).
typedef int32_t Words __attribute__((vector_size(32)));
typedef int16_t Shorts __attribute__((vector_size(32)));

// maddubs takes unsigned by signed and saturates at 16 bits: |w| * (x with the sign of w) stays below,
// 2 * 128 * 127 < 2^15.
struct DotInt8 {
  using Acc = Words;
  struct Weights {
    __m256i value, magnitude;
  };
  static constexpr int64_t kUnit = 4, kBytes = 64, kActBytes = 1;
  static constexpr int kPhases = 1;
  static GOSSAMER_INLINE Weights of(__m256i value) { return {value, _mm256_abs_epi8(value)}; }
  static GOSSAMER_INLINE Weights weights(const uint8_t* b, int h, int) {
    return of(_mm256_xor_si256(load_bytes(b + 32 * h), _mm256_set1_epi8(-128)));
  }
  static GOSSAMER_INLINE __m256i activation(int32_t x, int) { return _mm256_set1_epi32(x); }
  static GOSSAMER_INLINE Acc step(Acc c, Weights w, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.value));
    return c + (Words)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  static GOSSAMER_INLINE __m256 finish(const Tile& t, int r, int p, int h, Acc c) {
    const float* scales = static_cast<const float*>(t.w->scales) + (t.panel + p) * kPanel + 8 * h;
    const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(scales), _mm256_set1_ps(t.act->scales[t.row + r]));
    return _mm256_mul_ps(_mm256_cvtepi32_ps((__m256i)c), scale);
  }
};

// Formats whose partial sums are plain accumulators all along K.
template <class Dot, int Rows, int Panels>
struct Direct {
  static constexpr int kRows = Rows, kPanels = Panels, kNarrowRows = 8, kStreamRows = 0;
  static constexpr int64_t kUnit = Dot::kUnit, kBlock = 128 * kUnit, kUnpackedBytes = 0;
  using Narrow = Direct;

  template <int MR, int P>
  static __attribute__((noinline)) void tile(const Tile& t) {
    typename Dot::Acc c[MR][P][2];
    for (int r = 0; r < MR; r++) {
      if (t.first()) {
        std::memset(c[r], 0, sizeof c[r]);
      } else {
        std::memcpy(c[r], t.acc + r * 128, sizeof c[r]);
      }
    }
    const uint8_t* a = activation_row(*t.act, t.row) + t.k0 * Dot::kActBytes;
    const uint8_t* b = t.b;
    const uint8_t* ahead = t.ahead;
    const int64_t lda = t.act->row_stride_bytes, b_panel = t.b_panel;
    const int64_t ahead_step = t.ahead_step, ahead_panel = t.ahead_panel;
    for (int64_t k = t.k0; k < t.k1; k += kUnit, a += 4, b += Dot::kBytes, ahead += ahead_step) {
      for (int p = 0; p < P; p++) _mm_prefetch(ahead + p * ahead_panel, _MM_HINT_T0);
      for (int phase = 0; phase < Dot::kPhases; phase++) {
        typename Dot::Weights w[P][2];
        for (int p = 0; p < P; p++) {
          for (int h = 0; h < 2; h++) w[p][h] = Dot::weights(b + p * b_panel, h, phase);
        }
        for (int r = 0; r < MR; r++) {
          const auto x = Dot::activation(load_word(a + r * lda), phase);
          for (int p = 0; p < P; p++) {
            for (int h = 0; h < 2; h++) c[r][p][h] = Dot::step(c[r][p][h], w[p][h], x);
          }
        }
      }
    }
    for (int r = 0; r < MR; r++) {
      if (!t.last()) {
        std::memcpy(t.acc + r * 128, c[r], sizeof c[r]);
        continue;
      }
      for (int p = 0; p < P; p++) {
        for (int h = 0; h < 2; h++) store_outputs(t, r, p, h, Dot::finish(t, r, p, h, c[r][p][h]));
      }
    }
  }
};

struct WideF16 : Direct<DotF32, 6, 1> {
  static constexpr int64_t kUnpackedBytes = 64;
  using Narrow = Direct<DotF16, 2, 2>;

  static void unpack(const PackedWeight& w, int64_t panel, int64_t k0, int64_t k1, uint8_t* to) {
    const uint8_t* from = panel_data(w, panel) + k0 * DotF16::kBytes;
    float* out = reinterpret_cast<float*>(to);
    for (int64_t i = 0; i < 2 * (k1 - k0); i++) _mm256_storeu_ps(out + 8 * i, load_halves(from + 16 * i));
  }
};

struct WideBf16 : Direct<DotBf16Unpacked, 6, 1> {
  static constexpr int64_t kUnpackedBytes = 64;
  using Narrow = Direct<DotBf16, 2, 2>;

  static void unpack(const PackedWeight& w, int64_t panel, int64_t k0, int64_t k1, uint8_t* to) {
    const uint8_t* from = panel_data(w, panel) + k0 * 32;
    float* out = reinterpret_cast<float*>(to);
    for (int64_t k = k0; k < k1; k += kUnit, from += DotBf16::kBytes, out += 32) {
      for (int phase = 0; phase < 2; phase++) {
        for (int h = 0; h < 2; h++)
          _mm256_storeu_ps(out + 16 * phase + 8 * h, DotBf16::weights(from, h, phase));
      }
    }
  }
};

// ---- groups: an exact integer sum of each, then one fused multiply-add in ascending groups ---------------
//
// Weights say how kRun inputs, kBytes each in a panel, are added to the integer sums; Zero where these start.

// Integers are stored with kZero added, or (0) decoded without it.
template <int32_t kZero>
struct FixedZero {
  static GOSSAMER_INLINE Words start(const uint8_t*, int32_t sum) { return Words{} + -kZero * sum; }
};

struct StoredZeros {
  static GOSSAMER_INLINE Words start(const uint8_t* zeros, int32_t sum) {
    const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros));
    return (Words)_mm256_cvtepu8_epi32(lanes) * -sum;
  }
};

GOSSAMER_INLINE __m256i low_nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
GOSSAMER_INLINE __m256i high_nibbles(__m256i v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }

// Products of 32 inputs surely fit 16 bits: 32 / 2 * 15 * 127 < 2^15.
template <int MR>
GOSSAMER_INLINE void add_shorts(Words (&total)[MR][2], const Shorts (&c)[MR][2]) {
  for (int r = 0; r < MR; r++) {
    for (int h = 0; h < 2; h++) {
      total[r][h] += (Words)_mm256_madd_epi16((__m256i)c[r][h], _mm256_set1_epi16(1));
    }
  }
}

struct PackedNibbles {
  static constexpr int64_t kUnit = 8, kRun = 32, kBytes = 8;
  template <int MR>
  static GOSSAMER_INLINE void add_run(Words (&total)[MR][2], const uint8_t* b, const uint8_t* a,
                                      int64_t lda) {
    Shorts c[MR][2] = {};
    for (int64_t i = 0; i < kRun; i += 8, b += 64, a += 8) {
      const __m256i v0 = load_bytes(b), v1 = load_bytes(b + 32);
      const __m256i w[2][2] = {{low_nibbles(v0), low_nibbles(v1)}, {high_nibbles(v0), high_nibbles(v1)}};
      for (int r = 0; r < MR; r++) {
        for (int part = 0; part < 2; part++) {
          const __m256i x = _mm256_set1_epi32(load_word(a + r * lda + 4 * part));
          for (int h = 0; h < 2; h++) c[r][h] += (Shorts)_mm256_maddubs_epi16(w[part][h], x);
        }
      }
    }
    add_shorts(total, c);
  }
};

struct UnpackedNibbles {
  static constexpr int64_t kUnit = 8, kRun = 32, kBytes = 16;
  template <int MR>
  static GOSSAMER_INLINE void add_run(Words (&total)[MR][2], const uint8_t* b, const uint8_t* a,
                                      int64_t lda) {
    Shorts c[MR][2] = {};
    for (int64_t i = 0; i < kRun; i += 4, b += 64, a += 4) {
      const __m256i w[2] = {load_bytes(b), load_bytes(b + 32)};
      for (int r = 0; r < MR; r++) {
        const __m256i x = _mm256_set1_epi32(load_word(a + r * lda));
        for (int h = 0; h < 2; h++) c[r][h] += (Shorts)_mm256_maddubs_epi16(w[h], x);
      }
    }
    add_shorts(total, c);
  }
  static GOSSAMER_INLINE __m256i unpack(__m256i nibbles) { return nibbles; }
};

template <int MR>
GOSSAMER_INLINE void add_bytes(Words (&total)[MR][2], DotInt8::Weights w0, DotInt8::Weights w1,
                               const uint8_t* a, int64_t lda) {
  for (int r = 0; r < MR; r++) {
    const __m256i x = _mm256_set1_epi32(load_word(a + r * lda));
    total[r][0] = DotInt8::step(total[r][0], w0, x);
    total[r][1] = DotInt8::step(total[r][1], w1, x);
  }
}

GOSSAMER_INLINE __m256i nf4_levels(__m256i nibbles) {
  const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kNf4));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), nibbles);
}

// int8, or levels unpacked to it.
struct Bytes {
  static constexpr int64_t kUnit = 4, kRun = 16, kBytes = 16;
  template <int MR>
  static GOSSAMER_INLINE void add_run(Words (&total)[MR][2], const uint8_t* b, const uint8_t* a,
                                      int64_t lda) {
    for (int64_t i = 0; i < kRun; i += 4, b += 64, a += 4) {
      add_bytes(total, DotInt8::weights(b, 0, 0), DotInt8::weights(b, 1, 0), a, lda);
    }
  }
  static GOSSAMER_INLINE __m256i unpack(__m256i nibbles) {
    return _mm256_xor_si256(nf4_levels(nibbles), _mm256_set1_epi8(-128));
  }
};

struct PackedLevels {
  static constexpr int64_t kUnit = 8, kRun = 32, kBytes = 8;
  template <int MR>
  static GOSSAMER_INLINE void add_run(Words (&total)[MR][2], const uint8_t* b, const uint8_t* a,
                                      int64_t lda) {
    for (int64_t i = 0; i < kRun; i += 8, b += 64, a += 8) {
      const __m256i v0 = load_bytes(b), v1 = load_bytes(b + 32);
      add_bytes(total, DotInt8::of(nf4_levels(low_nibbles(v0))), DotInt8::of(nf4_levels(low_nibbles(v1))), a,
                lda);
      add_bytes(total, DotInt8::of(nf4_levels(high_nibbles(v0))), DotInt8::of(nf4_levels(high_nibbles(v1))),
                a + 4, lda);
    }
  }
};

// Float sums live in t.acc: the integer ones need the registers.
template <class Weights, class Zero>
struct Grouped {
  static constexpr int kRows = 4, kPanels = 1, kNarrowRows = 8, kStreamRows = 0;
  static constexpr int64_t kUnit = Weights::kUnit, kBlock = 512, kUnpackedBytes = 0;
  using Narrow = Grouped;

  template <int MR, int P>
  static __attribute__((noinline)) void tile(const Tile& t) {
    static_assert(P == 1, "two registers a row are enough");
    const int64_t group = t.w->group, count = (t.k1 - t.k0) / group, lda = t.act->row_stride_bytes;
    const uint8_t* a = activation_row(*t.act, t.row) + t.k0;
    const uint8_t* b = t.b;
    const uint8_t* ahead = t.ahead;
    float* const acc = reinterpret_cast<float*>(t.acc);
    if (t.first()) std::memset(acc, 0, MR * 2 * kPanel * sizeof(float));
    GroupScales scales(t);
    for (int64_t g = 0; g < count; g++, scales.next()) {
      Words total[MR][2];
      for (int r = 0; r < MR; r++) {
        for (int h = 0; h < 2; h++) total[r][h] = Zero::start(scales.zeros + 8 * h, scales.sums[r]);
      }
      for (int64_t i = 0; i < group; i += Weights::kRun) {
        for (int64_t step = 0; step < Weights::kRun / kUnit; step++, ahead += t.ahead_step) {
          _mm_prefetch(ahead, _MM_HINT_T0);
        }
        Weights::template add_run<MR>(total, b, a, lda);
        a += Weights::kRun;
        b += Weights::kRun * Weights::kBytes;
      }
      for (int h = 0; h < 2; h++) {
        const __m256 s = load_halves(scales.weights + 8 * h);
        for (int r = 0; r < MR; r++) {
          float* f = acc + r * 2 * kPanel + 8 * h;
          const __m256 scale = _mm256_mul_ps(s, _mm256_set1_ps(scales.activations[r]));
          const __m256 sum = _mm256_cvtepi32_ps((__m256i)total[r][h]);
          _mm256_storeu_ps(f, _mm256_fmadd_ps(sum, scale, _mm256_loadu_ps(f)));
        }
      }
    }
    if (!t.last()) return;
    for (int r = 0; r < MR; r++) {
      for (int h = 0; h < 2; h++) store_outputs(t, r, 0, h, _mm256_loadu_ps(acc + r * 2 * kPanel + 8 * h));
    }
  }
};

using WideInt8Groups = Grouped<Bytes, FixedZero<0>>;

// Formats of 4 bits: Packed reads them as they are, Unpacked as bytes in the order of int8.
template <class Packed, class Unpacked, class Zero>
struct WideNibbles : Grouped<Unpacked, Zero> {
  static constexpr int64_t kUnpackedBytes = Unpacked::kBytes;
  using Narrow = Grouped<Packed, Zero>;

  static void unpack(const PackedWeight& w, int64_t panel, int64_t k0, int64_t k1, uint8_t* to) {
    const uint8_t* from = panel_data(w, panel) + k0 * Packed::kBytes;
    for (int64_t k = k0; k < k1; k += 8, from += 64, to += 128) {
      for (int h = 0; h < 2; h++) {
        const __m256i v = load_bytes(from + 32 * h), low = Unpacked::unpack(low_nibbles(v)),
                      high = Unpacked::unpack(high_nibbles(v));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * h), low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64 + 32 * h), high);
      }
    }
  }
};

using WideInt4 = WideNibbles<PackedNibbles, UnpackedNibbles, FixedZero<8>>;
using WideUint4 = WideNibbles<PackedNibbles, UnpackedNibbles, StoredZeros>;
using WideNf4 = WideNibbles<PackedLevels, Bytes, FixedZero<0>>;

// ---- sparse weights ------------------------------------------------------------------------------------

// For each byte of bits, where the values of its eight numbers lie among those that are there; 128: nowhere.
struct ExpandTable {
  uint8_t from[256][8];
  constexpr ExpandTable() : from() {
    for (int bits = 0; bits < 256; bits++) {
      uint8_t next = 0;
      for (int i = 0; i < 8; i++) from[bits][i] = (bits >> i & 1) ? next++ : uint8_t(128);
    }
  }
};
constexpr ExpandTable kExpand;

template <int64_t kBytes>
const uint8_t* expand_block(const uint8_t* from, uint8_t* to) {
  const uint8_t* values = from + kBitsBytes;
  const __m128i odd = _mm_set1_epi16(0x100), zero = _mm_set1_epi8(-128);  // int8 is stored with 128 added
  for (int64_t i = 0; i < kBitsBytes; i++, to += 8 * kBytes) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.from[from[i]]));
    if (kBytes == 1) {
      const __m128i bytes = _mm_xor_si128(_mm_shuffle_epi8(_mm_xor_si128(v, zero), places), zero);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to), bytes);
    } else {
      places = _mm_unpacklo_epi8(places, places);  // halves: bytes 2 i and 2 i + 1, nowhere saturates
      places = _mm_adds_epu8(_mm_adds_epu8(places, places), odd);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(v, places));
    }
    values += kBytes * __builtin_popcount(from[i]);
  }
  return values;
}

void linear(const PackedWeight& w, const Activations& act, const float* bias, float* out, int64_t ldo,
            int64_t p0, int64_t p1, void* scratch) {
  if (w.starts && w.format == Format::int8)
    return linear_sparse<Direct<DotInt8, 4, 1>, 1>(w, act, bias, out, ldo, p0, p1, scratch);
  if (w.starts) return linear_sparse<Direct<DotBf16, 2, 2>, 2>(w, act, bias, out, ldo, p0, p1, scratch);
  switch (w.format) {
    case Format::f32:
      return linear_blocked<Direct<DotF32, 6, 1>>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::f16:
      return linear_blocked<WideF16>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::bf16:
      return linear_blocked<WideBf16>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::int8:
      if (w.group > 0) return linear_blocked<WideInt8Groups>(w, act, bias, out, ldo, p0, p1, scratch);
      return linear_blocked<Direct<DotInt8, 4, 1>>(w, act, bias, out, ldo, p0, p1, scratch);
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
