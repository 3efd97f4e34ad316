// Packed weights and prepared activations: sizes, layouts, and packing from floats.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "api.h"
#include "generic/numbers.h"

namespace gossamer {
namespace {

constexpr int64_t kAlign = 64;

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

int64_t unit_inputs(Format format) {
  switch (format) {
    case Format::f32:
    case Format::f16:
      return 1;
    case Format::bf16:
      return 2;
    case Format::int8:
      return 4;
    case Format::int4:
      return 8;
  }
  return 1;
}

int64_t weight_bits(Format format) {
  switch (format) {
    case Format::f32:
      return 32;
    case Format::f16:
    case Format::bf16:
      return 16;
    case Format::int8:
      return 8;
    case Format::int4:
      return 4;
  }
  return 32;
}

int64_t activation_row_bytes(Format format, int32_t group, int64_t k) {
  const int64_t bytes = padded_k(format, group, k) * (format == Format::bf16 ? 2 : 1);
  const int64_t stride = round_up(bytes, kAlign);
  // Rows a power of two apart would compete for the same few cache sets.
  return stride % 1024 == 0 ? stride + kAlign : stride;
}

int64_t activation_groups(Format format, int32_t group, int64_t k) {
  return format == Format::int4 ? padded_k(format, group, k) / group : 1;
}

// Sixteen rows of the matrix; rows at n and beyond read as `zeros`.
struct Panel {
  const float* row[kPanel];
};

template <class T, class Convert>
void pack_plain(const Panel& panel, int64_t k, T* to, Convert convert) {
  for (int64_t i = 0; i < k; i++) {
    for (int64_t j = 0; j < kPanel; j++) to[i * kPanel + j] = convert(panel.row[j][i]);
  }
}

void pack_bf16(const Panel& panel, int64_t k, int64_t k_pad, uint16_t* to) {
  for (int64_t i = 0; i < k_pad; i += 2) {
    for (int64_t j = 0; j < kPanel; j++) {
      to[i * kPanel + 2 * j] = float_to_bf16(panel.row[j][i]);
      to[i * kPanel + 2 * j + 1] = i + 1 < k ? float_to_bf16(panel.row[j][i + 1]) : 0;
    }
  }
}

// integers[0, count) = clamp(round(x / scale)) + offset; a scale of zero stands for a run of zeros.
void quantize(const float* x, int64_t count, float scale, int32_t low, int32_t high, int32_t offset,
              uint8_t* integers) {
  const float divisor = scale == 0.0f ? INFINITY : scale;
  const float low_f = float(low), high_f = float(high);
  for (int64_t i = 0; i < count; i++) {
    float v = x[i] / divisor;
    v = v < low_f ? low_f : v;
    v = v > high_f ? high_f : v;
    integers[i] = uint8_t(round_to_int(v) + offset);
  }
}

void extremes(const float* x, int64_t count, float* low, float* high) {
  float l = 0.0f, h = 0.0f;
  for (int64_t i = 0; i < count; i++) {
    l = x[i] < l ? x[i] : l;
    h = x[i] > h ? x[i] : h;
  }
  *low = l;
  *high = h;
}

uint32_t load_word(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

constexpr int64_t kRun = 128;  // inputs quantized at a time; every group divides it

void pack_int8(const Panel& panel, int64_t k, int64_t k_pad, uint8_t* to, float* scales) {
  for (int64_t j = 0; j < kPanel; j++) {
    float low, high;
    extremes(panel.row[j], k, &low, &high);
    scales[j] = std::max(high, -low) / 127.0f;
  }
  uint8_t integers[kPanel][kRun];
  for (int64_t k0 = 0; k0 < k_pad; k0 += kRun) {
    const int64_t count = std::min(kRun, k - k0), steps = std::min(kRun, k_pad - k0) / 4;
    for (int64_t j = 0; j < kPanel; j++) {
      if (count < kRun) std::memset(integers[j], 128, kRun);
      quantize(panel.row[j] + k0, count, scales[j], -127, 127, 128, integers[j]);
    }
    for (int64_t i = 0; i < steps; i++) {
      for (int64_t j = 0; j < kPanel; j++, to += 4) std::memcpy(to, integers[j] + 4 * i, 4);
    }
  }
}

void pack_int4(const Panel& panel, int64_t k, int64_t k_pad, int64_t group, uint8_t* to, uint16_t* scales) {
  uint8_t integers[kPanel][kRun];
  for (int64_t k0 = 0; k0 < k_pad; k0 += group, scales += kPanel) {
    const int64_t count = std::min(group, k - k0);
    for (int64_t j = 0; j < kPanel; j++) {
      float low, high;
      extremes(panel.row[j] + k0, count, &low, &high);
      scales[j] = float_to_half((high > -low ? high : low) / -8.0f);
      if (count < group) std::memset(integers[j], 8, kRun);
      quantize(panel.row[j] + k0, count, half_to_float(scales[j]), -8, 7, 8, integers[j]);
    }
    for (int64_t i = 0; i < group; i += 8) {
      for (int64_t j = 0; j < kPanel; j++, to += 4) {
        const uint32_t word = load_word(integers[j] + i) | load_word(integers[j] + i + 4) << 4;
        std::memcpy(to, &word, sizeof word);
      }
    }
  }
}

}  // namespace

int64_t padded_k(Format format, int32_t group, int64_t k) {
  return round_up(k, format == Format::int4 ? group : unit_inputs(format));
}

int64_t packed_data_bytes(Format format, int32_t group, int64_t n, int64_t k) {
  return round_up(n, kPanel) * padded_k(format, group, k) * weight_bits(format) / 8;
}

int64_t packed_scale_bytes(Format format, int32_t group, int64_t n, int64_t k) {
  const int64_t n_pad = round_up(n, kPanel);
  if (format == Format::int8) return n_pad * 4;
  if (format == Format::int4) return n_pad * (padded_k(format, group, k) / group) * 2;
  return 0;
}

int64_t activation_bytes(Format format, int32_t group, int64_t m, int64_t k) {
  if (format == Format::f32 || format == Format::f16) return 0;
  const int64_t data = m * activation_row_bytes(format, group, k);
  if (format == Format::bf16) return data;
  return data + 2 * round_up(m * activation_groups(format, group, k) * 4, kAlign);
}

Activations activations_over(Format format, int32_t group, int64_t m, int64_t k, void* buffer, const float* x,
                             int64_t ldx) {
  Activations act{m, x, ldx * 4, nullptr, nullptr};
  if (format == Format::f32 || format == Format::f16) return act;
  act.data = buffer;
  act.row_stride_bytes = activation_row_bytes(format, group, k);
  if (format == Format::bf16) return act;
  const int64_t count = round_up(m * activation_groups(format, group, k) * 4, kAlign);
  const char* scales = static_cast<const char*>(buffer) + m * act.row_stride_bytes;
  act.scales = reinterpret_cast<const float*>(scales);
  act.sums = reinterpret_cast<const int32_t*>(scales + count);
  return act;
}

void pack_rows(Format format, int32_t group, int64_t n, int64_t k, const float* rows, int64_t n0, int64_t n1,
               void* data, void* scales) {
  const int64_t k_pad = padded_k(format, group, k);
  const int64_t panel_bytes = kPanel * k_pad * weight_bits(format) / 8;
  const std::unique_ptr<float[]> zeros(new float[size_t(k)]());
  for (int64_t first = n0; first < n1; first += kPanel) {
    Panel panel;
    for (int64_t j = 0; j < kPanel; j++) {
      panel.row[j] = first + j < std::min(n, n1) ? rows + (first + j - n0) * k : zeros.get();
    }
    const int64_t index = first / kPanel;
    uint8_t* to = static_cast<uint8_t*>(data) + index * panel_bytes;
    switch (format) {
      case Format::f32:
        pack_plain(panel, k, reinterpret_cast<float*>(to), [](float v) { return v; });
        break;
      case Format::f16:
        pack_plain(panel, k, reinterpret_cast<uint16_t*>(to), float_to_half);
        break;
      case Format::bf16:
        pack_bf16(panel, k, k_pad, reinterpret_cast<uint16_t*>(to));
        break;
      case Format::int8:
        pack_int8(panel, k, k_pad, to, static_cast<float*>(scales) + first);
        break;
      case Format::int4:
        pack_int4(panel, k, k_pad, group, to, static_cast<uint16_t*>(scales) + first * (k_pad / group));
        break;
    }
  }
}

}  // namespace gossamer
