// The two ends of a linear layer: making activations ready for a weight format, and reading rows of a packed
// weight as embeddings. Plain loops that every ISA's compiler flags vectorize.
#pragma once
#include "api.h"
#include "generic/blocks.h"
#include "generic/numbers.h"
#include "generic/sparse.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

// Symmetric int8 of x[0, count), zeros up to `padded`. x / scale is computed as x * (127 / max|x|).
// A NaN or infinity makes the scale NaN, and with it every output of the row: nothing gets lost in int8.
inline void quantize_run(const float* x, int64_t count, int64_t padded, int8_t* q, float* scale,
                         int32_t* sum) {
  uint32_t top = 0;  // magnitudes compare as integers, with NaN above infinity
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = float_bits(x[i]) & 0x7fffffff;
    top = bits > top ? bits : top;
  }
  const float most = bits_float(top);
  const float inverse = 127.0f / most;
  int32_t total = 0;
  if (top < 0x7f800000 && inverse <= 3.4e38f) {
    for (int64_t i = 0; i < count; i++) {
      const int32_t v = round_to_int(x[i] * inverse);
      q[i] = int8_t(v);
      total += v;
    }
    *scale = most / 127.0f;
  } else {
    std::memset(q, 0, size_t(count));
    *scale = top < 0x7f800000 ? 0.0f : bits_float(0x7fc00000);
  }
  std::memset(q + count, 0, size_t(padded - count));
  *sum = total;
}

// The same with a scale that was calibrated before: clamp(round(x / scale), -127, 127).
inline void quantize_static(const float* x, int64_t count, int64_t padded, int8_t* q, float given,
                            float* scale, int32_t* sum) {
  int32_t total = 0;
  uint32_t top = 0;
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = float_bits(x[i]) & 0x7fffffff;
    top = bits > top ? bits : top;
    float v = x[i] / given;
    v = v > -127.0f ? v : -127.0f;  // NaN too: what it becomes does not matter
    v = v < 127.0f ? v : 127.0f;
    const int32_t integer = round_to_int(v);
    q[i] = int8_t(integer);
    total += integer;
  }
  *scale = top < 0x7f800000 ? given : bits_float(0x7fc00000);
  std::memset(q + count, 0, size_t(padded - count));
  *sum = total;
}

void prepare(Format format, int32_t group, float scale, int64_t k, const float* x, int64_t ldx,
             const Activations& out, int64_t r0, int64_t r1) {
  if (format == Format::f32 || format == Format::f16) return;
  const int64_t k_pad = padded_k(format, group, k);
  float* scales = const_cast<float*>(out.scales);
  int32_t* sums = const_cast<int32_t*>(out.sums);
  for (int64_t r = r0; r < r1; r++) {
    const float* from = x + r * ldx;
    uint8_t* to = const_cast<uint8_t*>(activation_row(out, r));
    if (format == Format::bf16) {
      uint16_t* h = reinterpret_cast<uint16_t*>(to);
      for (int64_t i = 0; i < k; i++) h[i] = float_to_bf16(from[i]);
      for (int64_t i = k; i < k_pad; i++) h[i] = 0;
    } else if (group == 0 && scale > 0.0f) {
      quantize_static(from, k, k_pad, reinterpret_cast<int8_t*>(to), scale, scales + r, sums + r);
    } else if (group == 0) {
      quantize_run(from, k, k_pad, reinterpret_cast<int8_t*>(to), scales + r, sums + r);
    } else {
      const int64_t groups = k_pad / group;
      for (int64_t g = 0; g < groups; g++) {
        quantize_run(from + g * group, smaller(group, k - g * group), group,
                     reinterpret_cast<int8_t*>(to) + g * group, scales + g * out.scale_stride + r,
                     sums + g * out.scale_stride + r);
      }
    }
  }
}

inline float weight_scale(const PackedWeight& w, int64_t panel, int64_t g, int64_t lane) {
  if (w.group == 0) return static_cast<const float*>(w.scales)[panel * kPanel + lane];
  return half_to_float(group_scales(w, panel, g)[lane]);
}

inline int32_t stored_zero(const PackedWeight& w, int64_t panel, int64_t g, int64_t lane) {
  return w.format == Format::uint4  ? group_zeros(w, panel, g)[lane]
         : w.format == Format::int4 ? 8
         : w.format == Format::int8 ? 128
                                    : 0;
}

// The integer of input k of one output: level, for nf4; otherwise with its zero point.
inline int32_t stored_integer(Format format, const uint8_t* panel, int64_t k, int64_t lane) {
  if (format == Format::int8) return panel[(k / 4 * kPanel + lane) * 4 + k % 4];
  const int32_t byte = panel[(k / 8 * kPanel + lane) * 4 + k % 4];
  const int32_t nibble = (k & 4) ? byte >> 4 : byte & 15;
  return format == Format::nf4 ? kNf4[nibble] : nibble;
}

// One output of a packed weight, dequantized.
inline void embed_row(const PackedWeight& w, int64_t id, float scale, float* out) {
  if (w.starts) return embed_sparse_row(w, id, scale, out);
  const int64_t panel = id / kPanel, lane = id % kPanel;
  const uint8_t* data = panel_data(w, panel);
  switch (w.format) {
    case Format::f32: {
      const float* p = reinterpret_cast<const float*>(data) + lane;
      for (int64_t k = 0; k < w.k; k++) out[k] = p[k * kPanel] * scale;
      break;
    }
    case Format::f16: {
      const uint16_t* p = reinterpret_cast<const uint16_t*>(data) + lane;
      for (int64_t k = 0; k < w.k; k++) out[k] = half_to_float(p[k * kPanel]) * scale;
      break;
    }
    case Format::bf16: {
      const uint16_t* p = reinterpret_cast<const uint16_t*>(data) + 2 * lane;
      for (int64_t k = 0; k < w.k; k++) out[k] = bf16_to_float(p[k / 2 * 2 * kPanel + k % 2]) * scale;
      break;
    }
    case Format::int8:
    case Format::int4:
    case Format::uint4:
    case Format::nf4: {
      const int64_t group = w.group > 0 ? w.group : w.k;
      for (int64_t g = 0; g * group < w.k; g++) {
        const int64_t end = smaller(w.k, (g + 1) * group);
        const float group_scale = weight_scale(w, panel, g, lane);
        const int32_t zero = stored_zero(w, panel, g, lane);
        for (int64_t k = g * group; k < end; k++) {
          out[k] = (float(stored_integer(w.format, data, k, lane) - zero) * group_scale) * scale;
        }
      }
      break;
    }
  }
}

void embed(const PackedWeight& w, const int32_t* ids, float scale, float* out, int64_t ldo, int64_t r0,
           int64_t r1) {
  for (int64_t r = r0; r < r1; r++) embed_row(w, ids[r], scale, out + r * ldo);
}

}  // namespace
}  // namespace GOSSAMER_ISA
}  // namespace gossamer
