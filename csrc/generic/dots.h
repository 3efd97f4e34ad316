// One step of a dot product in 16 lanes: a word of the row (broadcast: 1 float, 2 bf16 or 4 bytes) against 16
// words of the matrix. An Acc is a vf or a vi; integer sums are exact.

struct DotF32 {
  using Acc = vf;
  using Value = vf;
  using Operand = vf;
  static constexpr int kUnit = 1;
  static GOSSAMER_INLINE Acc zero() { return set1(0.0f); }
  static GOSSAMER_INLINE Value value(const uint8_t* b) { return load(reinterpret_cast<const float*>(b)); }
  static GOSSAMER_INLINE Operand operand(const uint8_t* a) {
    float x;
    __builtin_memcpy(&x, a, 4);
    return set1(x);
  }
  static GOSSAMER_INLINE Acc step(Acc c, Value b, Operand a) { return fma(a, b, c); }
};

GOSSAMER_INLINE vi load_words(const uint8_t* b) { return load(reinterpret_cast<const int32_t*>(b)); }
GOSSAMER_INLINE vi broadcast_word_of(const uint8_t* a) {
  int32_t x;
  __builtin_memcpy(&x, a, 4);
  return set1(x);
}

#if defined(__AVX512BF16__)
// Both products of a pair and the sum in one instruction, which takes denormals for zero.
struct DotBf16 {
  using Acc = vf;
  using Value = vi;
  using Operand = vi;
  static constexpr int kUnit = 2;
  static GOSSAMER_INLINE Acc zero() { return set1(0.0f); }
  static GOSSAMER_INLINE Value value(const uint8_t* b) { return load_words(b); }
  static GOSSAMER_INLINE Operand operand(const uint8_t* a) { return broadcast_word_of(a); }
  static GOSSAMER_INLINE Acc step(Acc c, Value b, Operand a) {
    return {{(nf)_mm512_dpbf16_ps(c.p[0], (__m512bh)b.p[0], (__m512bh)a.p[0])}};
  }
};
#endif

// Unsigned bytes of the matrix against signed bytes of the row.
struct DotInt8 {
  using Acc = vi;
  static constexpr int kUnit = 4;
  static GOSSAMER_INLINE Acc zero() { return set1(int32_t(0)); }
#if defined(__AVX512VNNI__)
  using Value = vi;
  using Operand = vi;
  static GOSSAMER_INLINE Value value(const uint8_t* b) { return load_words(b); }
  static GOSSAMER_INLINE Operand operand(const uint8_t* a) { return broadcast_word_of(a); }
  static GOSSAMER_INLINE Acc step(Acc c, Value b, Operand a) {
    return {{(ni)_mm512_dpbusd_epi32((__m512i)c.p[0], (__m512i)b.p[0], (__m512i)a.p[0])}};
  }
#else
  // Bytes 0 and 2 of each word, then 1 and 3, as 16-bit integers: their products are summed in 32 bits.
  struct Halves {
    vi even, odd;
  };
  using Value = Halves;
  using Operand = Halves;
  static GOSSAMER_INLINE Value value(const uint8_t* b) {
    const vi words = load_words(b);
    return {words & set1(int32_t(0x00ff00ff)), each<vi>([&](int i) { return (ni)((nw)words.p[i] >> 8); })};
  }
  static GOSSAMER_INLINE Operand operand(const uint8_t* a) {
    const vi words = broadcast_word_of(a);
    return {each<vi>([&](int i) { return (ni)((ns)((nw)words.p[i] << 8) >> 8); }),
            each<vi>([&](int i) { return (ni)((ns)words.p[i] >> 8); })};
  }
  static GOSSAMER_INLINE Acc step(Acc c, Value b, Operand a) {
    return c + (products(b.even, a.even) + products(b.odd, a.odd));
  }

 private:
  typedef int16_t ns __attribute__((vector_size(kBytes)));
  typedef uint16_t nw __attribute__((vector_size(kBytes)));
  static GOSSAMER_INLINE vi products(vi a, vi b) {
#if defined(__AVX2__)
    return each<vi>([&](int i) { return (ni)_mm256_madd_epi16((__m256i)a.p[i], (__m256i)b.p[i]); });
#elif defined(__SSE2__)
    return each<vi>([&](int i) { return (ni)_mm_madd_epi16((__m128i)a.p[i], (__m128i)b.p[i]); });
#else
    return each<vi>([&](int i) {
      const ni low = ((ni)((nu)a.p[i] << 16) >> 16) * ((ni)((nu)b.p[i] << 16) >> 16);
      return low + (a.p[i] >> 16) * (b.p[i] >> 16);
    });
#endif
  }
#endif
};
