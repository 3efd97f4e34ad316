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
    case Format::uint4:
    case Format::nf4:
      return 8;
  }
  return 1;
}

int64_t activation_row_bytes(Format format, int32_t group, int64_t k) {
  const int64_t bytes = padded_k(format, group, k) * (format == Format::bf16 ? 2 : 1);
  const int64_t stride = round_up(bytes, kAlign);
  // Rows a power of two apart would compete for the same few cache sets.
  return stride % 1024 == 0 ? stride + kAlign : stride;
}

int64_t activation_groups(Format format, int32_t group, int64_t k) {
  return group > 0 ? padded_k(format, group, k) / group : 1;
}

// Sixteen rows of the matrix; rows at n and beyond read as zeros.
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

float magnitude(const float* x, int64_t count) {
  float low, high;
  extremes(x, count, &low, &high);
  return std::max(high, -low);
}

uint32_t load_word(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

constexpr int64_t kRun = 128;  // inputs quantized at a time; every group divides it

// Lays `count` integers of every output side by side: words of 4, or of 8 nibbles. Gives the end.
template <int64_t kWord>
uint8_t* interleave(const uint8_t (*integers)[kRun], int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; i += kWord) {
    for (int64_t j = 0; j < kPanel; j++, to += 4) {
      uint32_t word = load_word(integers[j] + i);
      if (kWord == 8) word |= load_word(integers[j] + i + 4) << 4;
      std::memcpy(to, &word, sizeof word);
    }
  }
  return to;
}

void pack_int8(const Panel& panel, int64_t k, int64_t k_pad, uint8_t* to, float* scales) {
  for (int64_t j = 0; j < kPanel; j++) {
    scales[j] = magnitude(panel.row[j], k) / 127.0f;
  }
  uint8_t integers[kPanel][kRun];
  for (int64_t k0 = 0; k0 < k_pad; k0 += kRun) {
    const int64_t count = std::min(kRun, k - k0);
    for (int64_t j = 0; j < kPanel; j++) {
      if (count < kRun) std::memset(integers[j], 128, kRun);
      quantize(panel.row[j] + k0, count, scales[j], -127, 127, 128, integers[j]);
    }
    to = interleave<4>(integers, std::min(kRun, k_pad - k0), to);
  }
}

// One group of one output: integers [0, count) of x as they are stored, whose value 0 is `empty`.
struct GroupInt8 {
  static constexpr int64_t kWord = 4;  // inputs whose integers fill four bytes
  static uint8_t pack(const float* x, int64_t count, uint16_t* scale, uint8_t*, uint8_t* integers) {
    *scale = float_to_half(magnitude(x, count) / 127.0f);
    quantize(x, count, half_to_float(*scale), -127, 127, 128, integers);
    return 128;
  }
};

struct GroupInt4 {
  static constexpr int64_t kWord = 8;
  static uint8_t pack(const float* x, int64_t count, uint16_t* scale, uint8_t*, uint8_t* integers) {
    float low, high;
    extremes(x, count, &low, &high);
    *scale = float_to_half((high > -low ? high : low) / -8.0f);
    quantize(x, count, half_to_float(*scale), -8, 7, 8, integers);
    return 8;
  }
};

struct GroupUint4 {
  static constexpr int64_t kWord = 8;
  static uint8_t pack(const float* x, int64_t count, uint16_t* scale, uint8_t* zero, uint8_t* integers) {
    float low, high;
    extremes(x, count, &low, &high);
    *scale = float_to_half((high - low) / 15.0f);
    const float step = half_to_float(*scale);
    quantize(&low, 1, -step, 0, 15, 0, zero);
    quantize(x, count, step, -*zero, 15 - *zero, *zero, integers);
    return *zero;
  }
};

struct GroupNf4 {
  static constexpr int64_t kWord = 8;
  static uint8_t pack(const float* x, int64_t count, uint16_t* scale, uint8_t*, uint8_t* integers) {
    *scale = float_to_half(magnitude(x, count) / 127.0f);
    const float step = half_to_float(*scale), divisor = step == 0.0f ? INFINITY : step;
    for (int64_t i = 0; i < count; i++) {
      const float v = x[i] / divisor;
      uint8_t index = 0;  // how many midpoints between levels lie below
      for (int level = 0; level < 15; level++) index += v > float(kNf4[level] + kNf4[level + 1]) / 2.0f;
      integers[i] = index;
    }
    return 7;
  }
};

template <class Group>
void pack_groups(const Panel& panel, int64_t k, int64_t k_pad, int64_t group, uint8_t* to, uint16_t* scales,
                 uint8_t* zeros) {
  uint8_t integers[kPanel][kRun];
  for (int64_t k0 = 0; k0 < k_pad; k0 += group, scales += kPanel, zeros += kPanel) {
    const int64_t count = std::min(group, k - k0);
    for (int64_t j = 0; j < kPanel; j++) {
      const uint8_t empty = Group::pack(panel.row[j] + k0, count, scales + j, zeros + j, integers[j]);
      std::memset(integers[j] + count, empty, size_t(group - count));
    }
    to = interleave<Group::kWord>(integers, group, to);
  }
}

// What a stored integer of value 0 is added to, and what pads a row: api.h, PackedWeight.
int32_t code_offset(Format format) { return format == Format::int8 ? 128 : format == Format::int4 ? 8 : 0; }

}  // namespace

int64_t format_bits(Format format) {
  switch (format) {
    case Format::f32:
      return 32;
    case Format::f16:
    case Format::bf16:
      return 16;
    case Format::int8:
      return 8;
    case Format::int4:
    case Format::uint4:
    case Format::nf4:
      return 4;
  }
  return 32;
}

int64_t padded_k(Format format, int32_t group, int64_t k) {
  return round_up(k, group > 0 ? group : unit_inputs(format));
}

int64_t packed_data_bytes(Format format, int32_t group, int64_t n, int64_t k) {
  return round_up(n, kPanel) * padded_k(format, group, k) * format_bits(format) / 8;
}

int64_t packed_scale_bytes(Format format, int32_t group, int64_t n, int64_t k) {
  const int64_t n_pad = round_up(n, kPanel);
  if (group > 0) return n_pad * (padded_k(format, group, k) / group) * 2;
  return format == Format::int8 ? n_pad * 4 : 0;
}

int64_t packed_zero_bytes(Format format, int32_t group, int64_t n, int64_t k) {
  return format == Format::uint4 ? packed_scale_bytes(format, group, n, k) / 2 : 0;
}

int64_t activation_bytes(Format format, int32_t group, int64_t m, int64_t k) {
  if (format == Format::f32 || format == Format::f16) return 0;
  const int64_t data = m * activation_row_bytes(format, group, k);
  if (format == Format::bf16) return data;
  return data + 2 * round_up(m * activation_groups(format, group, k) * 4, kAlign);
}

Activations activations_over(Format format, int32_t group, int64_t m, int64_t k, void* buffer, const float* x,
                             int64_t ldx) {
  Activations act{m, x, ldx * 4, nullptr, nullptr, m};
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
               void* data, void* scales, void* zeros) {
  const int64_t k_pad = padded_k(format, group, k);
  const int64_t panel_bytes = kPanel * k_pad * format_bits(format) / 8;
  const std::unique_ptr<float[]> beyond(new float[size_t(k)]());
  for (int64_t first = n0; first < n1; first += kPanel) {
    Panel panel;
    for (int64_t j = 0; j < kPanel; j++) {
      panel.row[j] = first + j < std::min(n, n1) ? rows + (first + j - n0) * k : beyond.get();
    }
    const int64_t index = first / kPanel;
    uint8_t* to = static_cast<uint8_t*>(data) + index * panel_bytes;
    const int64_t before = group > 0 ? first * (k_pad / group) : 0;  // groups of the outputs up to here
    uint16_t* group_scales = static_cast<uint16_t*>(scales) + before;
    uint8_t* group_zeros = static_cast<uint8_t*>(zeros) + before;
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
        if (group > 0) {
          pack_groups<GroupInt8>(panel, k, k_pad, group, to, group_scales, group_zeros);
        } else {
          pack_int8(panel, k, k_pad, to, static_cast<float*>(scales) + first);
        }
        break;
      case Format::int4:
        pack_groups<GroupInt4>(panel, k, k_pad, group, to, group_scales, group_zeros);
        break;
      case Format::uint4:
        pack_groups<GroupUint4>(panel, k, k_pad, group, to, group_scales, group_zeros);
        break;
      case Format::nf4:
        pack_groups<GroupNf4>(panel, k, k_pad, group, to, group_scales, group_zeros);
        break;
    }
  }
}

void pack_codes(Format format, int32_t group, int64_t n, int64_t k, const int8_t* codes,
                const float* from_scales, const uint8_t* from_zeros, int64_t n0, int64_t n1, void* data,
                void* scales, void* zeros) {
  const int64_t k_pad = padded_k(format, group, k), run = group > 0 ? group : kRun;
  const int64_t groups = group > 0 ? k_pad / group : 1,
                source_groups = group > 0 ? (k + group - 1) / group : 1;
  const int64_t panel_bytes = kPanel * k_pad * format_bits(format) / 8;
  const int32_t offset = code_offset(format);
  uint8_t integers[kPanel][kRun];
  for (int64_t first = n0; first < n1; first += kPanel) {
    const int64_t index = first / kPanel, count = std::min<int64_t>(kPanel, std::min(n, n1) - first);
    uint8_t* to = static_cast<uint8_t*>(data) + index * panel_bytes;
    for (int64_t g = 0; g < groups; g++) {
      for (int64_t j = 0; j < kPanel; j++) {
        const bool there = j < count;
        const int64_t row = (first - n0 + j) * source_groups + g;
        const float scale = there ? from_scales[row] : 0.0f;
        if (group > 0) {
          const int64_t at = (index * groups + g) * kPanel + j;
          static_cast<uint16_t*>(scales)[at] = float_to_half(scale);
          if (format == Format::uint4) static_cast<uint8_t*>(zeros)[at] = there ? from_zeros[row] : 0;
        } else {
          static_cast<float*>(scales)[first + j] = scale;
        }
      }
    }
    for (int64_t k0 = 0; k0 < k_pad; k0 += run) {
      const int64_t filled = std::min(run, k - k0);
      for (int64_t j = 0; j < kPanel; j++) {
        const bool there = j < count;
        uint8_t empty = uint8_t(format == Format::nf4 ? 7 : offset);
        if (format == Format::uint4)
          empty = there ? from_zeros[(first - n0 + j) * source_groups + k0 / run] : 0;
        std::memset(integers[j], empty, kRun);
        for (int64_t i = 0; there && i < filled; i++) {
          integers[j][i] = uint8_t(codes[(first - n0 + j) * k + k0 + i] + offset);
        }
      }
      const int64_t width = std::min(run, k_pad - k0);
      to = format == Format::int8 ? interleave<4>(integers, width, to) : interleave<8>(integers, width, to);
    }
  }
}

// ---- sparse ------------------------------------------------------------------------------------------

namespace {

int64_t sparse_blocks(Format format, int64_t k) {
  return round_up(padded_k(format, 0, k), kSparseBlock) / kSparseBlock;
}

constexpr int64_t kBlockNumbers = kSparseBlock * kPanel, kBitsBytes = kBlockNumbers / 8;

template <class T>
int64_t count_of(Format format, int64_t k, const T* rows, int64_t n0, int64_t n1, int64_t* starts) {
  const int64_t bytes = format_bits(format) / 8, bits = sparse_blocks(format, k) * kBitsBytes;
  for (int64_t first = n0; first < n1; first += kPanel) {
    const T* from = rows + (first - n0) * k;
    const int64_t count = std::min(n1 - first, int64_t(kPanel)) * k;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++) kept += from[i] != T(0);
    starts[first / kPanel + 1] = starts[first / kPanel] + bits + kept * bytes;
  }
  return starts[(n1 + kPanel - 1) / kPanel];
}

// Panels [n0, n1) from `rows`; dense(first, count, panel) packs one densely.
template <class T, class Dense>
void compress(Format format, int64_t k, const T* rows, int64_t n0, int64_t n1, void* data,
              const int64_t* starts, Dense&& dense) {
  const int64_t unit = unit_inputs(format), bytes = format_bits(format) / 8,
                blocks = sparse_blocks(format, k);
  const std::unique_ptr<uint8_t[]> panel(new uint8_t[size_t(blocks * kBlockNumbers * bytes)]);
  for (int64_t first = n0; first < n1; first += kPanel) {
    const int64_t count = std::min(n1 - first, int64_t(kPanel));
    dense(first, count, panel.get());
    uint8_t* to = static_cast<uint8_t*>(data) + starts[first / kPanel];
    for (int64_t block = 0; block < blocks; block++) {
      uint8_t* values = to + kBitsBytes;
      std::memset(to, 0, kBitsBytes);
      for (int64_t i = 0; i < kBlockNumbers; i++) {
        const int64_t input = block * kSparseBlock + i / (kPanel * unit) * unit + i % unit,
                      j = i / unit % kPanel;
        if (j >= count || input >= k || rows[(first - n0 + j) * k + input] == T(0)) continue;
        to[i / 8] |= uint8_t(1 << i % 8);
        std::memcpy(values, panel.get() + (block * kBlockNumbers + i) * bytes, size_t(bytes));
        values += bytes;
      }
      to = values;
    }
  }
}

}  // namespace

int64_t sparse_data_bytes(Format format, int64_t n, int64_t k, int64_t kept) {
  const int64_t panels = round_up(n, kPanel) / kPanel;
  return panels * sparse_blocks(format, k) * kBitsBytes + kept * format_bits(format) / 8 + kAlign;
}

int64_t sparse_start_bytes(int64_t n) {
  return (round_up(n, kPanel) / kPanel + 1) * int64_t(sizeof(int64_t));
}

int64_t count_panels(Format format, int64_t k, const float* rows, int64_t n0, int64_t n1, int64_t* starts) {
  return count_of(format, k, rows, n0, n1, starts);
}

int64_t count_panels(Format format, int64_t k, const int8_t* codes, int64_t n0, int64_t n1, int64_t* starts) {
  return count_of(format, k, codes, n0, n1, starts);
}

void pack_sparse(Format format, int64_t k, const float* rows, int64_t n0, int64_t n1, void* data,
                 void* scales, const int64_t* starts) {
  float* own = static_cast<float*>(scales);
  compress(format, k, rows, n0, n1, data, starts, [&](int64_t first, int64_t count, uint8_t* panel) {
    pack_rows(format, 0, count, k, rows + (first - n0) * k, 0, count, panel, own ? own + first : nullptr,
              nullptr);
  });
}

void pack_sparse(Format format, int64_t k, const int8_t* codes, const float* from_scales, int64_t n0,
                 int64_t n1, void* data, void* scales, const int64_t* starts) {
  compress(format, k, codes, n0, n1, data, starts, [&](int64_t first, int64_t count, uint8_t* panel) {
    pack_codes(format, 0, count, k, codes + (first - n0) * k, from_scales + (first - n0), nullptr, 0, count,
               panel, static_cast<float*>(scales) + first, nullptr);
  });
}

}  // namespace gossamer
