// Writing keys and values into pages. Layout: api.h.

// One token's row as stored: `Element`s of which kUnit lie side by side in K and V.
template <class T, int kUnitOf>
struct PlainRow {
  using Element = T;
  static constexpr int kUnit = kUnitOf;
  static constexpr bool kNibbles = false;
  static void make(const float* x, int64_t d, int64_t d_pad, T* row, uint8_t*, int64_t) {
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) store(row + i, load(x + i));
    if (i < d_pad) store(row + i, load_n(x + i, d - i));
  }
};
using RowF32 = PlainRow<float, 1>;
using RowF16 = PlainRow<f16, 1>;
using RowBf16 = PlainRow<bf16, 2>;

struct RowInt8 {
  using Element = uint8_t;
  static constexpr int kUnit = 4;
  static constexpr bool kNibbles = false;
  static void make(const float* x, int64_t d, int64_t d_pad, uint8_t* row, uint8_t* scales, int64_t token) {
    int32_t sum;
    quantize_run(x, d, d_pad, reinterpret_cast<int8_t*>(row), reinterpret_cast<float*>(scales) + token, &sum);
    for (int64_t i = 0; i < d_pad; i++) row[i] ^= 0x80;
  }
};

// A nibble an element; put_key and put_value pair them.
struct RowInt4 {
  using Element = uint8_t;
  static constexpr int kUnit = 4;
  static constexpr bool kNibbles = true;
  static void make(const float* x, int64_t d, int64_t d_pad, uint8_t* row, uint8_t* scales, int64_t token) {
    float low = 0.0f, high = 0.0f, bad = 0.0f;
    for (int64_t i = 0; i < d; i++) {
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
      bad += x[i] * 0.0f;
    }
    uint16_t* half = reinterpret_cast<uint16_t*>(scales) + token;
    *half = float_to_half((high > -low ? high : low) / -8.0f + bad);
    const float scale = half_to_float(*half);
    const float magnitude = scale < 0.0f ? -scale : scale;
    const float divisor = magnitude > 0.0f && magnitude < kInf ? scale : kInf;
    for (int64_t i = 0; i < d; i++) {
      float v = x[i] / divisor;
      v = v >= -8.0f ? v : -8.0f;  // a NaN too: the scale carries it
      v = v > 7.0f ? 7.0f : v;
      row[i] = uint8_t(round_to_int(v) + 8);
    }
    for (int64_t i = d; i < d_pad; i++) row[i] = 8;
  }
};

template <class Row>
inline void put_key(uint8_t* keys, int64_t token, const typename Row::Element* row, int64_t d_pad) {
  using E = typename Row::Element;
  constexpr int kUnit = Row::kUnit;
  E* to = reinterpret_cast<E*>(keys) + token * kUnit;
  if constexpr (Row::kNibbles) {
    for (int64_t i = 0; i < d_pad; i += 8, to += kLanes * kUnit)
      for (int b = 0; b < 4; b++) to[b] = uint8_t(row[i + b] | row[i + 4 + b] << 4);
  } else {
    for (int64_t i = 0; i < d_pad; i += kUnit, to += kLanes * kUnit)
      __builtin_memcpy(to, row + i, kUnit * sizeof(E));
  }
}

template <class Row>
inline void put_value(uint8_t* values, int64_t token, const typename Row::Element* row, int64_t d_pad) {
  using E = typename Row::Element;
  constexpr int kUnit = Row::kUnit;
  if constexpr (Row::kNibbles) {
    uint8_t* to = values + token / 8 * d_pad * 4 + token % 4;
    const int shift = token & 4, keep = 0xf0 >> shift;
    for (int64_t i = 0; i < d_pad; i++) to[4 * i] = uint8_t((to[4 * i] & keep) | row[i] << shift);
  } else {
    E* to = reinterpret_cast<E*>(values) + token / kUnit * d_pad * kUnit + token % kUnit;
    for (int64_t i = 0; i < d_pad; i++) to[i * kUnit] = row[i];
  }
}

constexpr int64_t kMaxHeadDim = 1024;  // rows are staged on the stack

template <class Row>
inline void kv_write_as(const KvLayout& kv, void* pool, const int32_t* block_table, const Span& span,
                        const float* k, int64_t ldk, const float* v, int64_t ldv, int64_t r0, int64_t r1) {
  const KvBlock at = kv_block(kv);
  const int64_t d = kv.head_dim, blocks = kv.page_size / kBlockTokens;
  for (int64_t r = r0; r < r1; r++) {
    const int64_t slot = span.start + r, in_page = slot % kv.page_size, token = slot % kBlockTokens;
    const int64_t page = block_table[span.table + slot / kv.page_size];
    uint8_t* block =
        static_cast<uint8_t*>(pool) + (page * kv.kv_heads * blocks + in_page / kBlockTokens) * at.bytes;
    const float *key = k + (r - r0) * ldk, *value = v + (r - r0) * ldv;
    for (int64_t h = 0; h < kv.kv_heads; h++, block += blocks * at.bytes, key += d, value += d) {
      typename Row::Element row[kMaxHeadDim];
      Row::make(key, d, kv.d_pad, row, block + at.key_scales, token);
      put_key<Row>(block, token, row, kv.d_pad);
      Row::make(value, d, kv.d_pad, row, block + at.value_scales, token);
      put_value<Row>(block + at.values, token, row, kv.d_pad);
    }
  }
}

// Copies a token from one block to another, or to another place in its own.
template <class Row>
inline void copy_token(const KvBlock& at, int64_t d_pad, const uint8_t* from, int64_t source, uint8_t* to,
                       int64_t target) {
  using E = typename Row::Element;
  constexpr int kUnit = Row::kUnit;
  const int64_t word = kUnit * int64_t(sizeof(E)), step = word * kLanes;
  for (int64_t i = 0; i < at.key_scales; i += step)
    __builtin_memcpy(to + i + target * word, from + i + source * word, size_t(word));
  const int64_t scale = (at.value_scales - at.key_scales) / kBlockTokens;
  const int64_t offsets[] = {at.key_scales, at.value_scales};
  for (int64_t scales : offsets)
    __builtin_memcpy(to + scales + target * scale, from + scales + source * scale, size_t(scale));
  typename Row::Element row[kMaxHeadDim];
  if constexpr (Row::kNibbles) {
    const uint8_t* value = from + at.values + source / 8 * d_pad * 4 + source % 4;
    for (int64_t i = 0; i < d_pad; i++) row[i] = value[4 * i] >> (source & 4) & 15;
  } else {
    const E* value = reinterpret_cast<const E*>(from + at.values) + source / kUnit * d_pad * kUnit;
    for (int64_t i = 0; i < d_pad; i++) row[i] = value[i * kUnit + source % kUnit];
  }
  put_value<Row>(to + at.values, target, row, d_pad);
}

template <class Row>
inline void kv_copy_as(const KvLayout& kv, uint8_t* pool, const KvCopy& copy) {
  const KvBlock at = kv_block(kv);
  const int64_t blocks = kv.page_size / kBlockTokens;
  for (int64_t h = 0; h < kv.kv_heads; h++) {
    const uint8_t* from = pool + (copy.source * kv.kv_heads + h) * blocks * at.bytes;
    uint8_t* to = pool + (copy.target * kv.kv_heads + h) * blocks * at.bytes;
    for (int64_t t = 0, step; t < copy.tokens; t += step) {
      const int64_t source = copy.source_slot + t, target = copy.target_slot + t;
      const uint8_t* from_block = from + source / kBlockTokens * at.bytes;
      uint8_t* to_block = to + target / kBlockTokens * at.bytes;
      const int64_t s = source % kBlockTokens, d = target % kBlockTokens;
      step = s == 0 && d == 0 && copy.tokens - t >= kBlockTokens ? kBlockTokens : 1;
      if (from_block == to_block && s == d) continue;
      if (step == kBlockTokens)
        __builtin_memcpy(to_block, from_block, size_t(at.bytes));
      else
        copy_token<Row>(at, kv.d_pad, from_block, s, to_block, d);
    }
  }
}

// f(row type) of the format that the pages are stored in.
template <class F>
inline void with_row(Format dtype, F f) {
  switch (dtype) {
    case Format::f32:
      return f(RowF32{});
    case Format::f16:
      return f(RowF16{});
    case Format::bf16:
      return f(RowBf16{});
    case Format::int8:
      return f(RowInt8{});
    case Format::int4:
      return f(RowInt4{});
    case Format::uint4:  // of weights alone
    case Format::nf4:
      return;
  }
}

inline void kv_write(const KvLayout& kv, void* pool, const int32_t* block_table, const Span& span,
                     const float* k, int64_t ldk, const float* v, int64_t ldv, int64_t r0, int64_t r1) {
  with_row(kv.dtype, [&](auto row) {
    kv_write_as<decltype(row)>(kv, pool, block_table, span, k, ldk, v, ldv, r0, r1);
  });
}

inline void kv_copy(const KvLayout& kv, void* pool, const KvCopy& copy) {
  with_row(kv.dtype, [&](auto row) { kv_copy_as<decltype(row)>(kv, static_cast<uint8_t*>(pool), copy); });
}
