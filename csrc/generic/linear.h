// Linear layers in plain C++, for machines without a kernel of their own. Weights are decoded to floats, 16
// outputs at a time, in loops that any compiler vectorizes; integer sums are exact in floats for a run of
// kRun inputs (128 * 128 * 127 < 2^24), which multiply faster than integers on a baseline machine.
#pragma once
#include <type_traits>

#include "generic/blocks.h"
#include "generic/numbers.h"
#include "generic/prepare.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

constexpr int64_t kRun = 128;

inline uint32_t weight_word(const uint8_t* b, int64_t lane) {
  uint32_t word;
  std::memcpy(&word, b + 4 * lane, sizeof word);
  return word;
}

// A codec decodes input i of a unit at b into 16 floats, and reads an activation.
struct CodecF32 {
  using Sum = float;
  static constexpr int64_t kUnit = 1, kBytes = 64;
  static void weights(const uint8_t* b, int64_t, float* w) { std::memcpy(w, b, 64); }
  static float activation(const uint8_t* row, int64_t k) { return reinterpret_cast<const float*>(row)[k]; }
};

struct CodecF16 : CodecF32 {
  static constexpr int64_t kBytes = 32;
  static void weights(const uint8_t* b, int64_t, float* w) {
    const uint16_t* h = reinterpret_cast<const uint16_t*>(b);
    for (int64_t j = 0; j < kPanel; j++) w[j] = half_to_float(h[j]);
  }
};

struct CodecBf16 {
  using Sum = float;
  static constexpr int64_t kUnit = 2, kBytes = 64;
  static void weights(const uint8_t* b, int64_t i, float* w) {
    for (int64_t j = 0; j < kPanel; j++) {
      const uint32_t pair = weight_word(b, j);
      w[j] = bits_float(i == 0 ? pair << 16 : pair & 0xffff0000);
    }
  }
  static float activation(const uint8_t* row, int64_t k) {
    return bf16_to_float(reinterpret_cast<const uint16_t*>(row)[k]);
  }
};

struct CodecInt8 {
  using Sum = int32_t;
  static constexpr int64_t kUnit = 4, kBytes = 64;
  static void weights(const uint8_t* b, int64_t i, float* w) {
    for (int64_t j = 0; j < kPanel; j++) w[j] = float(int32_t(weight_word(b, j) >> (8 * i) & 255) - 128);
  }
  static float activation(const uint8_t* row, int64_t k) { return reinterpret_cast<const int8_t*>(row)[k]; }
};

// With a scale per group: sums of a group are integers, and what they add up to is floats.
struct CodecGroupedInt8 : CodecInt8 {
  using Sum = float;
};

inline uint32_t nibble(const uint8_t* b, int64_t i, int64_t lane) {
  return weight_word(b, lane) >> (8 * (i % 4) + i / 4 * 4) & 15;
}

struct CodecInt4 : CodecGroupedInt8 {
  static constexpr int64_t kUnit = 8;
  static void weights(const uint8_t* b, int64_t i, float* w) {
    for (int64_t j = 0; j < kPanel; j++) w[j] = float(int32_t(nibble(b, i, j)) - 8);
  }
};

// Zero points are taken off the sums.
struct CodecUint4 : CodecInt4 {
  static void weights(const uint8_t* b, int64_t i, float* w) {
    for (int64_t j = 0; j < kPanel; j++) w[j] = float(int32_t(nibble(b, i, j)));
  }
};

struct CodecNf4 : CodecInt4 {
  static void weights(const uint8_t* b, int64_t i, float* w) {
    for (int64_t j = 0; j < kPanel; j++) w[j] = float(kNf4[nibble(b, i, j)]);
  }
};

// Weights either packed, and decoded for every block of rows, or unpacked to floats before.
template <class Codec, bool Unpacked>
struct Plain {
  static constexpr int kRows = 4, kPanels = 1, kNarrowRows = 8, kStreamRows = 0;
  static constexpr int64_t kUnit = Codec::kUnit, kBlock = kRun, kUnpackedBytes = 64;
  using Narrow = Plain<Codec, false>;
  using Sum = typename Codec::Sum;

  static void unpack(const PackedWeight& w, int64_t panel, int64_t k0, int64_t k1, uint8_t* to) {
    const uint8_t* from = panel_data(w, panel) + k0 / kUnit * Codec::kBytes;
    for (int64_t k = 0; k < k1 - k0; k++) {
      Codec::weights(from + k / kUnit * Codec::kBytes, k % kUnit, reinterpret_cast<float*>(to) + k * kPanel);
    }
  }

  // sum += weights . activations over inputs [k, end), in ascending order.
  template <int MR>
  static void add(const Tile& t, int64_t k, int64_t end, float (&sum)[MR][kPanel]) {
    const uint8_t* a = activation_row(*t.act, t.row);
    for (; k < end; k++) {
      const int64_t at = k - t.k0;
      float w[kPanel];
      if constexpr (Unpacked) {
        std::memcpy(w, t.b + at * 64, sizeof w);
      } else {
        Codec::weights(t.b + at / kUnit * Codec::kBytes, at % kUnit, w);
      }
      for (int r = 0; r < MR; r++) {
        const float x = Codec::activation(a + r * t.act->row_stride_bytes, k);
        for (int64_t j = 0; j < kPanel; j++) sum[r][j] += w[j] * x;
      }
    }
  }

  static void store(const Tile& t, int r, const Sum* total) {
    const int64_t column = t.panel * kPanel, count = smaller(kPanel, t.w->n - column);
    float* to = t.out + (t.row + r) * t.ldo + column;
    for (int64_t j = 0; j < count; j++) {
      float value = float(total[j]);
      if constexpr (std::is_same_v<Codec, CodecInt8>) {
        value *= static_cast<const float*>(t.w->scales)[column + j] * t.act->scales[t.row + r];
      }
      to[j] = t.bias ? value + t.bias[column + j] : value;
    }
  }

  template <int MR, int P>
  static void tile(const Tile& t) {
    Sum total[MR][kPanel];
    for (int r = 0; r < MR; r++) {
      if (t.first()) {
        std::memset(total[r], 0, sizeof total[r]);
      } else {
        std::memcpy(total[r], t.acc + r * 128, sizeof total[r]);
      }
    }
    if constexpr (std::is_base_of_v<CodecInt8, Codec>) {
      const int64_t run = t.w->group > 0 ? t.w->group : kRun;
      for (int64_t k = t.k0; k < t.k1; k += run) {
        float sum[MR][kPanel] = {};
        add(t, k, smaller(k + run, t.k1), sum);
        for (int r = 0; r < MR; r++) fold(t, r, k / run, sum[r], total[r]);
      }
    } else {
      add(t, t.k0, t.k1, total);
    }
    for (int r = 0; r < MR; r++) {
      if (t.last()) {
        store(t, r, total[r]);
      } else {
        std::memcpy(t.acc + r * 128, total[r], sizeof total[r]);
      }
    }
  }

  static void fold(const Tile&, int, int64_t, const float* sum, int32_t* total) {
    for (int64_t j = 0; j < kPanel; j++) total[j] += int32_t(sum[j]);
  }

  static void fold(const Tile& t, int r, int64_t g, const float* sum, float* total) {
    const int64_t at = g * t.act->scale_stride + t.row + r;
    const uint16_t* scales = group_scales(*t.w, t.panel, g);
    for (int64_t j = 0; j < kPanel; j++) {
      float exact = sum[j];
      if constexpr (std::is_same_v<Codec, CodecUint4>) {
        exact -= float(int32_t(group_zeros(*t.w, t.panel, g)[j]) * t.act->sums[at]);
      }
      total[j] += exact * (half_to_float(scales[j]) * t.act->scales[at]);
    }
  }
};

template <class Codec>
using Wide = Plain<Codec, true>;

// ---- sparse weights ------------------------------------------------------------------------------------

template <int64_t kBytes>
const uint8_t* expand_block(const uint8_t* from, uint8_t* to) {
  const uint8_t* values = from + kBitsBytes;
  std::memset(to, kBytes == 1 ? 128 : 0,
              size_t(kBlockNumbers * kBytes));  // the zero of int8, as it is stored
  for (int64_t i = 0; i < kBitsBytes; i += 8, to += 64 * kBytes) {
    for (uint64_t bits = load_bits(from + i); bits; bits &= bits - 1, values += kBytes) {
      std::memcpy(to + __builtin_ctzll(bits) * kBytes, values, kBytes);
    }
  }
  return values;
}

void linear(const PackedWeight& w, const Activations& act, const float* bias, float* out, int64_t ldo,
            int64_t p0, int64_t p1, void* scratch) {
  if (w.starts && w.format == Format::int8)
    return linear_sparse<Plain<CodecInt8, false>, 1>(w, act, bias, out, ldo, p0, p1, scratch);
  if (w.starts) return linear_sparse<Plain<CodecBf16, false>, 2>(w, act, bias, out, ldo, p0, p1, scratch);
  switch (w.format) {
    case Format::f32:
      return linear_blocked<Wide<CodecF32>>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::f16:
      return linear_blocked<Wide<CodecF16>>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::bf16:
      return linear_blocked<Wide<CodecBf16>>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::int8:
      if (w.group > 0) return linear_blocked<Wide<CodecGroupedInt8>>(w, act, bias, out, ldo, p0, p1, scratch);
      return linear_blocked<Wide<CodecInt8>>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::int4:
      return linear_blocked<Wide<CodecInt4>>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::uint4:
      return linear_blocked<Wide<CodecUint4>>(w, act, bias, out, ldo, p0, p1, scratch);
    case Format::nf4:
      return linear_blocked<Wide<CodecNf4>>(w, act, bias, out, ldo, p0, p1, scratch);
  }
}

int64_t linear_scratch(Format, int32_t, int64_t) { return kLinearScratch; }

}  // namespace
}  // namespace GOSSAMER_ISA
}  // namespace gossamer
