// Sixteen lanes for every ISA: one AVX-512 register, two AVX2 registers or four SSE/NEON ones. The lane
// structure (which element meets which in a reduction) is therefore the same everywhere, and a body written
// once over vf / vi / vm serves every unit. The parts are a struct, not one 64-byte vector: GCC keeps
// vectors wider than the target in memory, while the members of a struct get registers.
//
// Some AVX-512 intrinsics appear in their masked form with a full mask, because the plain form draws false
// warnings of uninitialized use from GCC 12; the instruction is the same.
//
// fma() rounds once where the ISA has FMA and twice where it has not; nothing else differs between ISAs.

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = 16;
constexpr int kParts = 64 / kBytes;
constexpr int kPartLanes = kBytes / 4;
constexpr float kInf = __builtin_inff();

#define GOSSAMER_INLINE inline __attribute__((always_inline))

typedef float nf __attribute__((vector_size(kBytes)));
typedef int32_t ni __attribute__((vector_size(kBytes)));
typedef uint32_t nu __attribute__((vector_size(kBytes)));
typedef uint16_t nh __attribute__((vector_size(kBytes / 2)));
#if defined(__AVX512F__)
typedef __mmask16 nm;
#else
typedef ni nm;
#endif

struct vf {
  nf p[kParts];
};
struct vi {
  ni p[kParts];
};
struct vm {
  nm p[kParts];
};

template <class R, class F>
GOSSAMER_INLINE R each(F f) {
  R r;
  r.p[0] = f(0);
  if constexpr (kParts > 1) r.p[1] = f(1);
  if constexpr (kParts > 2) {
    r.p[2] = f(2);
    r.p[3] = f(3);
  }
  return r;
}

// ---- arithmetic ----------------------------------------------------------------------------------

GOSSAMER_INLINE vf operator+(vf a, vf b) {
  return each<vf>([&](int i) { return a.p[i] + b.p[i]; });
}
GOSSAMER_INLINE vf operator-(vf a, vf b) {
  return each<vf>([&](int i) { return a.p[i] - b.p[i]; });
}
GOSSAMER_INLINE vf operator*(vf a, vf b) {
  return each<vf>([&](int i) { return a.p[i] * b.p[i]; });
}
GOSSAMER_INLINE vf operator/(vf a, vf b) {
  return each<vf>([&](int i) { return a.p[i] / b.p[i]; });
}
GOSSAMER_INLINE vi operator+(vi a, vi b) {
  return each<vi>([&](int i) { return (ni)((nu)a.p[i] + (nu)b.p[i]); });
}
GOSSAMER_INLINE vi operator-(vi a, vi b) {
  return each<vi>([&](int i) { return (ni)((nu)a.p[i] - (nu)b.p[i]); });
}
GOSSAMER_INLINE vi operator&(vi a, vi b) {
  return each<vi>([&](int i) { return a.p[i] & b.p[i]; });
}
GOSSAMER_INLINE vi operator^(vi a, vi b) {
  return each<vi>([&](int i) { return a.p[i] ^ b.p[i]; });
}
GOSSAMER_INLINE vi shl(vi a, int n) {
  return each<vi>([&](int i) { return (ni)((nu)a.p[i] << n); });
}
GOSSAMER_INLINE vi sra(vi a, int n) {
  return each<vi>([&](int i) { return a.p[i] >> n; });
}

GOSSAMER_INLINE vf set1(float x) {
  return each<vf>([&](int) { return x - nf{}; });
}
GOSSAMER_INLINE vi set1(int32_t x) {
  return each<vi>([&](int) { return x - ni{}; });
}
GOSSAMER_INLINE vi as_int(vf a) {
  return each<vi>([&](int i) { return (ni)a.p[i]; });
}
GOSSAMER_INLINE vf as_float(vi a) {
  return each<vf>([&](int i) { return (nf)a.p[i]; });
}
GOSSAMER_INLINE vf to_float(vi a) {
  return each<vf>([&](int i) { return __builtin_convertvector(a.p[i], nf); });
}

GOSSAMER_INLINE vi to_int(vf a) {  // towards zero
  return each<vi>([&](int i) { return __builtin_convertvector(a.p[i], ni); });
}

GOSSAMER_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return each<vf>([&](int i) { return _mm512_fmadd_ps(a.p[i], b.p[i], c.p[i]); });
#elif defined(__FMA__)
  return each<vf>([&](int i) { return _mm256_fmadd_ps(a.p[i], b.p[i], c.p[i]); });
#else
  return a * b + c;
#endif
}

// ---- masks ---------------------------------------------------------------------------------------

#if defined(__AVX512F__)
GOSSAMER_INLINE vm operator<(vf a, vf b) { return {{_mm512_cmp_ps_mask(a.p[0], b.p[0], _CMP_LT_OQ)}}; }
GOSSAMER_INLINE vm operator>=(vf a, vf b) { return {{_mm512_cmp_ps_mask(a.p[0], b.p[0], _CMP_GE_OQ)}}; }
GOSSAMER_INLINE vm operator==(vf a, vf b) { return {{_mm512_cmp_ps_mask(a.p[0], b.p[0], _CMP_EQ_OQ)}}; }
GOSSAMER_INLINE vm operator==(vi a, vi b) {
  return {{_mm512_cmpeq_epi32_mask((__m512i)a.p[0], (__m512i)b.p[0])}};
}
GOSSAMER_INLINE vm operator<(vi a, vi b) {
  return {{_mm512_cmplt_epi32_mask((__m512i)a.p[0], (__m512i)b.p[0])}};
}
GOSSAMER_INLINE vm operator|(vm a, vm b) { return {{nm(a.p[0] | b.p[0])}}; }
GOSSAMER_INLINE vm operator&(vm a, vm b) { return {{nm(a.p[0] & b.p[0])}}; }
GOSSAMER_INLINE vm is_nan(vf a) { return {{_mm512_cmp_ps_mask(a.p[0], a.p[0], _CMP_UNORD_Q)}}; }
GOSSAMER_INLINE vf select(vm m, vf a, vf b) { return {{_mm512_mask_blend_ps(m.p[0], b.p[0], a.p[0])}}; }
GOSSAMER_INLINE vi select(vm m, vi a, vi b) {
  return {{(ni)_mm512_mask_blend_epi32(m.p[0], (__m512i)b.p[0], (__m512i)a.p[0])}};
}
GOSSAMER_INLINE vf max(vf a, vf b) { return {{_mm512_maskz_max_ps(0xffff, a.p[0], b.p[0])}}; }
GOSSAMER_INLINE uint32_t bits(vm m) { return m.p[0]; }
// Lanes [lo, hi); lo and hi may lie outside 0..16.
GOSSAMER_INLINE vm lanes(int64_t lo, int64_t hi) {
  const uint32_t below_hi = hi >= 16 ? 0xffffu : hi <= 0 ? 0u : (1u << hi) - 1;
  const uint32_t below_lo = lo >= 16 ? 0xffffu : lo <= 0 ? 0u : (1u << lo) - 1;
  return {{nm(below_hi & ~below_lo)}};
}
#else
GOSSAMER_INLINE vm operator<(vf a, vf b) {
  return each<vm>([&](int i) { return a.p[i] < b.p[i]; });
}
GOSSAMER_INLINE vm operator>=(vf a, vf b) {
  return each<vm>([&](int i) { return a.p[i] >= b.p[i]; });
}
GOSSAMER_INLINE vm operator==(vf a, vf b) {
  return each<vm>([&](int i) { return a.p[i] == b.p[i]; });
}
GOSSAMER_INLINE vm operator==(vi a, vi b) {
  return each<vm>([&](int i) { return a.p[i] == b.p[i]; });
}
GOSSAMER_INLINE vm operator<(vi a, vi b) {
  return each<vm>([&](int i) { return a.p[i] < b.p[i]; });
}
GOSSAMER_INLINE vm operator|(vm a, vm b) {
  return each<vm>([&](int i) { return a.p[i] | b.p[i]; });
}
GOSSAMER_INLINE vm operator&(vm a, vm b) {
  return each<vm>([&](int i) { return a.p[i] & b.p[i]; });
}
GOSSAMER_INLINE vm is_nan(vf a) {
  return each<vm>([&](int i) { return a.p[i] != a.p[i]; });
}
GOSSAMER_INLINE vf select(vm m, vf a, vf b) {
  return each<vf>([&](int i) { return m.p[i] ? a.p[i] : b.p[i]; });
}
GOSSAMER_INLINE vi select(vm m, vi a, vi b) {
  return each<vi>([&](int i) { return m.p[i] ? a.p[i] : b.p[i]; });
}
GOSSAMER_INLINE vf max(vf a, vf b) {
#if defined(__AVX2__)
  return each<vf>([&](int i) { return _mm256_max_ps(a.p[i], b.p[i]); });
#else
  return each<vf>([&](int i) { return a.p[i] > b.p[i] ? a.p[i] : b.p[i]; });
#endif
}
GOSSAMER_INLINE uint32_t bits(vm m) {
  uint32_t all = 0;
  for (int i = 0; i < kParts; i++) {
#if defined(__AVX2__)
    all |= uint32_t(_mm256_movemask_ps((__m256)m.p[i])) << (8 * i);
#elif defined(__SSE2__)
    all |= uint32_t(_mm_movemask_ps((__m128)m.p[i])) << (4 * i);
#else
    for (int j = 0; j < 4; j++) all |= uint32_t(m.p[i][j] != 0) << (4 * i + j);
#endif
  }
  return all;
}
#endif

GOSSAMER_INLINE vi iota() {
  vi r;
  for (int i = 0; i < kParts; i++)
    for (int j = 0; j < kPartLanes; j++) r.p[i][j] = i * kPartLanes + j;
  return r;
}
#if !defined(__AVX512F__)
// Lanes [lo, hi); lo and hi may lie outside 0..16.
GOSSAMER_INLINE vm lanes(int64_t lo, int64_t hi) {
  const int32_t first = lo < 0    ? 0
                        : lo > 16 ? 16
                                  : int32_t(lo),
                last = hi < 0    ? 0
                       : hi > 16 ? 16
                                 : int32_t(hi);
  return (set1(first - 1) < iota()) & (iota() < set1(last));
}
#endif

// ---- memory --------------------------------------------------------------------------------------

// Part by part: copied whole, a struct would go through the stack.
GOSSAMER_INLINE vf load(const float* x) {
  return each<vf>([&](int i) {
    nf part;
    __builtin_memcpy(&part, x + i * kPartLanes, kBytes);
    return part;
  });
}
GOSSAMER_INLINE vi load(const int32_t* x) {
  return each<vi>([&](int i) {
    ni part;
    __builtin_memcpy(&part, x + i * kPartLanes, kBytes);
    return part;
  });
}
GOSSAMER_INLINE void store(float* x, vf v) {
  for (int i = 0; i < kParts; i++) __builtin_memcpy(x + i * kPartLanes, &v.p[i], kBytes);
}
GOSSAMER_INLINE void store(int32_t* x, vi v) {
  for (int i = 0; i < kParts; i++) __builtin_memcpy(x + i * kPartLanes, &v.p[i], kBytes);
}

// The lowest byte of every lane.
GOSSAMER_INLINE void store_bytes(uint8_t* x, vi v) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)x, _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v.p[0]));
#else
  typedef uint8_t nb __attribute__((vector_size(kPartLanes)));
  for (int i = 0; i < kParts; i++) {
    const nb bytes = __builtin_convertvector((nu)v.p[i] & 255, nb);
    __builtin_memcpy(x + i * kPartLanes, &bytes, sizeof bytes);
  }
#endif
}

// The first n <= 16 lanes; a load fills the others with `rest`.
GOSSAMER_INLINE vf load_n(const float* x, int64_t n, float rest = 0.0f) {
#if defined(__AVX512F__)
  return {{_mm512_mask_loadu_ps(_mm512_set1_ps(rest), lanes(0, n).p[0], x)}};
#else
  float all[kLanes];
  store(all, set1(rest));
  __builtin_memcpy(all, x, size_t(n) * sizeof(float));
  return load(all);
#endif
}
GOSSAMER_INLINE void store_n(float* x, vf v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(x, lanes(0, n).p[0], v.p[0]);
#else
  float all[kLanes];
  store(all, v);
  __builtin_memcpy(x, all, size_t(n) * sizeof(float));
#endif
}

// Folds halves, so that lane pairs (i, i + 8), then (i, i + 4), ... meet on every ISA.
typedef float quad __attribute__((vector_size(16)));
template <class F>
GOSSAMER_INLINE float fold(vf v, F f) {
  float x[kLanes];
  store(x, v);
  quad a, b, c, d;
  __builtin_memcpy(&a, x, 16);
  __builtin_memcpy(&b, x + 4, 16);
  __builtin_memcpy(&c, x + 8, 16);
  __builtin_memcpy(&d, x + 12, 16);
  const quad r = f(f(a, c), f(b, d));
  return f(f(r[0], r[2]), f(r[1], r[3]));
}
GOSSAMER_INLINE float sum(vf v) {
  return fold(v, [](auto a, auto b) { return a + b; });
}
GOSSAMER_INLINE float max(vf v) {
  return fold(v, [](auto a, auto b) { return a > b ? a : b; });
}

// ---- 16-bit floats -------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

GOSSAMER_INLINE vf load(const bf16* x) {
#if defined(__AVX512F__)
  const __m512i u = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)x));
  return {{(nf)_mm512_maskz_slli_epi32(0xffff, u, 16)}};
#elif defined(__AVX2__)
  return each<vf>([&](int i) {
    return (nf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(x + 8 * i))), 16);
  });
#else
  return each<vf>([&](int i) {
    nh h;
    __builtin_memcpy(&h, x + i * kPartLanes, sizeof h);
    return (nf)(__builtin_convertvector(h, nu) << 16);
  });
#endif
}

// Round to nearest even, in integers: VCVTNEPS2BF16 would flush denormals.
GOSSAMER_INLINE void store(bf16* x, vf v) {
  for (int i = 0; i < kParts; i++) {
    const nu u = (nu)v.p[i];
    const nu even = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const nu quiet = (u >> 16) | 0x40;
    const nu nan = (nu)((ni)(u & 0x7fffffff) > 0x7f800000);
    const nh h = __builtin_convertvector((nan & quiet) | (~nan & even), nh);
    __builtin_memcpy(x + i * kPartLanes, &h, sizeof h);
  }
}

GOSSAMER_INLINE vf load(const f16* x) {
#if defined(__AVX512F__)
  return {{_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)x))}};
#elif defined(__F16C__)
  return each<vf>([&](int i) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + 8 * i))); });
#else
  // The bits moved up make a float 2^112 too small (denormals included); all-ones exponents stay so.
  return each<vf>([&](int i) {
    nh h;
    __builtin_memcpy(&h, x + i * kPartLanes, sizeof h);
    const nu u = __builtin_convertvector(h, nu);
    const nf scaled = (nf)((u & 0x7fff) << 13) * 0x1p112f;
    const nu special = (nu)((ni)(u & 0x7fff) >= 0x7c00) & 0x7f800000;
    return (nf)((nu)scaled | special | ((u & 0x8000) << 16));
  });
#endif
}

GOSSAMER_INLINE void store(f16* x, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)x, _mm512_maskz_cvtps_ph(0xffff, v.p[0], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  for (int i = 0; i < kParts; i++)
    _mm_storeu_si128((__m128i*)(x + 8 * i), _mm256_cvtps_ph(v.p[i], _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kParts; i++) {
    const nu u = (nu)v.p[i], a = u & 0x7fffffff;
    const nu normal = (a - (112u << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
    // Below 2^-14: adding 0.5 aligns the mantissa to halves' denormal step and rounds to nearest even.
    const nu small = (nu)((nf)a + 0.5f) - 0x3f000000;
    const nu is_small = (nu)((ni)a < 0x38800000), is_big = (nu)((ni)a >= 0x477ff000);
    const nu is_nan = (nu)((ni)a > 0x7f800000);
    nu r = (is_small & small) | (~is_small & normal);
    r = (is_big & 0x7c00) | (~is_big & r);
    r = (is_nan & (0x7e00 | ((a >> 13) & 0x3ff))) | (~is_nan & r);
    const nh h = __builtin_convertvector(r | ((u >> 16) & 0x8000), nh);
    __builtin_memcpy(x + i * kPartLanes, &h, sizeof h);
  }
#endif
}

template <class T>
GOSSAMER_INLINE void store_n(T* x, vf v, int64_t n) {
  T all[kLanes];
  store(all, v);
  __builtin_memcpy(x, all, size_t(n) * sizeof(T));
}
