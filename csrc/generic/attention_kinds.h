// What attention does with each storage format of keys and values: how it makes its queries and its
// probabilities ready, and how blocks become words of its Dot.
//
//   Row            the format's rows in a page (kv.h)
//   Dot            the arithmetic
//   kInteger       sums are integers: scores and p V are multiplied by scales afterwards
//   kOffset        what stored integers have added
//   kParts         rows that a row of p becomes
//   kDirect        whether blocks are read as they lie; otherwise unpack_keys and unpack_values make them so
//   kBlockBytes    of a row of p, for 16 keys, all parts
//   query          one row, d_pad / Dot::kUnit words; gives the factor and the sum of its integers
//   put_p          16 probabilities of a float format; p may lie on the scores it came from

struct Query {
  float factor;
  int32_t sum;
};

struct FloatKind {
  using Dot = DotF32;
  static constexpr bool kInteger = false;
  static constexpr int kOffset = 0, kParts = 1;
  static constexpr int64_t kBlockBytes = 64;
  static Query query(const float* x, int64_t d, int64_t d_pad, float scale, uint8_t* to) {
    float* row = reinterpret_cast<float*>(to);
    __builtin_memcpy(row, x, size_t(d) * sizeof(float));
    for (int64_t i = d; i < d_pad; i++) row[i] = 0.0f;
    return {scale, 0};
  }
  static GOSSAMER_INLINE void put_p(uint8_t* to, vf p) { store(reinterpret_cast<float*>(to), p); }
};

struct KindF32 : FloatKind {
  using Row = RowF32;
  static constexpr bool kDirect = true;
  static void unpack_keys(const uint8_t*, int64_t, uint8_t*) {}
  static void unpack_values(const uint8_t*, int64_t, uint8_t*) {}
};

struct KindF16 : FloatKind {
  using Row = RowF16;
  static constexpr bool kDirect = false;
  static void unpack_keys(const uint8_t* block, int64_t d_pad, uint8_t* to) {
    const f16* from = reinterpret_cast<const f16*>(block);
    float* floats = reinterpret_cast<float*>(to);
    for (int64_t i = 0; i < d_pad * kBlockTokens; i += 16) store(floats + i, load(from + i));
  }
  static void unpack_values(const uint8_t* block, int64_t d_pad, uint8_t* to) {
    unpack_keys(block, d_pad, to);
  }
};

#if defined(__AVX512BF16__)
struct KindBf16 : FloatKind {
  using Row = RowBf16;
  using Dot = DotBf16;
  static constexpr bool kDirect = true;
  static constexpr int64_t kBlockBytes = 32;
  static Query query(const float* x, int64_t d, int64_t d_pad, float scale, uint8_t* to) {
    RowBf16::make(x, d, d_pad, reinterpret_cast<bf16*>(to), nullptr, 0);
    return {scale, 0};
  }
  static GOSSAMER_INLINE void put_p(uint8_t* to, vf p) {  // p is no denormal: exp gives none
    const __m256bh pairs = _mm512_maskz_cvtneps_pbh(0xffff, p.p[0]);
    __builtin_memcpy(to, &pairs, sizeof pairs);
  }
  static void unpack_keys(const uint8_t* block, int64_t d_pad, uint8_t* to) {
    __builtin_memcpy(to, block, size_t(d_pad) * kBlockTokens * 2);
  }
  static void unpack_values(const uint8_t* block, int64_t d_pad, uint8_t* to) {
    unpack_keys(block, d_pad, to);
  }
};
#else
GOSSAMER_INLINE vf rounded_to_bf16(vf x) {
  bf16 halves[kLanes];
  store(halves, x);
  return load(halves);
}

// The same numbers as with bf16 dots, in floats.
struct KindBf16 : FloatKind {
  using Row = RowBf16;
  static constexpr bool kDirect = false;
  static Query query(const float* x, int64_t d, int64_t d_pad, float scale, uint8_t* to) {
    float* row = reinterpret_cast<float*>(to);
    FloatKind::query(x, d, d_pad, scale, to);
    for (int64_t i = 0; i < d_pad; i += 16) store(row + i, rounded_to_bf16(load(row + i)));
    return {scale, 0};
  }
  static GOSSAMER_INLINE void put_p(uint8_t* to, vf p) { FloatKind::put_p(to, rounded_to_bf16(p)); }
  // Pairs of (depth, depth + 1) for `columns` columns become two rows.
  static void unpack(const uint8_t* block, int64_t pairs, int64_t columns, uint8_t* to) {
    float* row = reinterpret_cast<float*>(to);
    for (int64_t i = 0; i < pairs; i++, row += 2 * columns) {
      for (int64_t j = 0; j < columns; j += 16, block += 64) {
        const vi words = load_words(block);
        store(row + j, as_float(shl(words, 16)));
        store(row + columns + j, as_float(words & set1(int32_t(0xffff0000))));
      }
    }
  }
  static void unpack_keys(const uint8_t* block, int64_t d_pad, uint8_t* to) {
    unpack(block, d_pad / 2, kBlockTokens, to);
  }
  static void unpack_values(const uint8_t* block, int64_t d_pad, uint8_t* to) {
    unpack(block, kBlockTokens / 2, d_pad, to);
  }
};
#endif

struct IntegerKind {
  using Dot = DotInt8;
  static constexpr bool kInteger = true;
  static constexpr int kParts = 2;
  static constexpr int64_t kBlockBytes = 2 * kPartBytes;
  // A NaN or an infinity makes the factor NaN.
  static Query query(const float* x, int64_t d, int64_t d_pad, float scale, uint8_t* to) {
    Query q;
    quantize_run(x, d, d_pad, reinterpret_cast<int8_t*>(to), &q.factor, &q.sum);
    q.factor *= scale;
    return q;
  }
};

struct KindInt8 : IntegerKind {
  using Row = RowInt8;
  using Scale = float;
  static constexpr int kOffset = 128;
  static constexpr bool kDirect = true;
  static void unpack_keys(const uint8_t*, int64_t, uint8_t*) {}
  static void unpack_values(const uint8_t*, int64_t, uint8_t*) {}
};

struct KindInt4 : IntegerKind {
  using Row = RowInt4;
  using Scale = f16;
  static constexpr int kOffset = 8;
  static constexpr bool kDirect = false;
  // 8 steps of depth in nibbles become two rows of 4 in bytes.
  static void unpack(const uint8_t* block, int64_t steps, int64_t columns, uint8_t* to) {
    for (int64_t i = 0; i < steps; i++, to += 8 * columns) {
      for (int64_t j = 0; j < columns; j += 16, block += 64) {
        const vi words = load_words(block), low = set1(int32_t(0x0f0f0f0f));
        store(reinterpret_cast<int32_t*>(to + 4 * j), words & low);
        store(reinterpret_cast<int32_t*>(to + 4 * (columns + j)), sra(words, 4) & low);
      }
    }
  }
  static void unpack_keys(const uint8_t* block, int64_t d_pad, uint8_t* to) {
    unpack(block, d_pad / 8, kBlockTokens, to);
  }
  static void unpack_values(const uint8_t* block, int64_t d_pad, uint8_t* to) {
    unpack(block, kBlockTokens / 8, d_pad, to);
  }
};

template <class F>
inline void with_kind(Format dtype, F f) {
  switch (dtype) {
    case Format::f32:
      return f(KindF32{});
    case Format::f16:
      return f(KindF16{});
    case Format::bf16:
      return f(KindBf16{});
    case Format::int8:
      return f(KindInt8{});
    case Format::int4:
      return f(KindInt4{});
    case Format::uint4:  // of weights alone
    case Format::nf4:
      return;
  }
}
