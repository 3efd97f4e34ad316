// Elementary functions over 16 lanes; a lane's result depends on its own input only.

// e^x within 2 ulp (Cephes expf). Results below 2^-125 are 0: denormals would slow what follows.
GOSSAMER_INLINE vf exp(vf x) {
  const vf shifter = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vf t = fma(x, set1(1.44269504088896341f), shifter);
  const vf n = t - shifter;
  const vf r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));
  vf y = set1(1.9875691500e-4f);
  y = fma(y, r, set1(1.3981999507e-3f));
  y = fma(y, r, set1(8.3334519073e-3f));
  y = fma(y, r, set1(4.1665795894e-2f));
  y = fma(y, r, set1(1.6666665459e-1f));
  y = fma(y, r, set1(5.0000001201e-1f));
  y = fma(y, r * r, r) + set1(1.0f);
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask(x.p[0], _mm512_set1_ps(-86.5f), _CMP_NLT_UQ);
  return {{_mm512_maskz_scalef_ps(normal, y.p[0], n.p[0])}};
#else
  // 2^(n-1), then doubled: 2^128 is no float.
  const vf half = as_float(shl(as_int(t) - as_int(shifter) + set1(int32_t(126)), 23));
  y = (y * half) * set1(2.0f);
  y = select(set1(88.7228394f) < x, set1(kInf), y);
  return select(x < set1(-86.5f), set1(0.0f), y);
#endif
}

// log(m * 2^e) for f = m - 1, sqrt(1/2) <= m < sqrt(2) (Cephes logf). Without fma on purpose: the sampling
// noise is built on it and has the same bits on every ISA.
GOSSAMER_INLINE vf log_parts(vf f, vf e) {
  vf y = set1(7.0376836292e-2f);
  y = y * f + set1(-1.1514610310e-1f);
  y = y * f + set1(1.1676998740e-1f);
  y = y * f + set1(-1.2420140846e-1f);
  y = y * f + set1(1.4249322787e-1f);
  y = y * f + set1(-1.6668057665e-1f);
  y = y * f + set1(2.0000714765e-1f);
  y = y * f + set1(-2.4999993993e-1f);
  y = y * f + set1(3.3333331174e-1f);
  const vf z = f * f;
  y = (y * f) * z;
  y = y + e * set1(-2.12194440e-4f);
  y = y + z * set1(-0.5f);
  return (f + y) + e * set1(0.693359375f);
}

struct Parts {
  vf f, e;
};
GOSSAMER_INLINE Parts split(vf x) {
  const vi root_half = set1(int32_t(0x3f3504f3));
  const vi u = as_int(x) - root_half;
  return {as_float((u & set1(int32_t(0x7fffff))) + root_half) - set1(1.0f), to_float(sra(u, 23))};
}

// Natural logarithm of positive normal floats.
GOSSAMER_INLINE vf log(vf x) {
  const Parts s = split(x);
  return log_parts(s.f, s.e);
}

// log(1 - v) for 0 < v < 1; keeps its relative precision for small v.
GOSSAMER_INLINE vf log_one_minus(vf v) {
  const Parts s = split(set1(1.0f) - v);
  const vm near_one = v < set1(0.29f);
  return log_parts(select(near_one, set1(0.0f) - v, s.f), select(near_one, set1(0.0f), s.e));
}

GOSSAMER_INLINE vf magnitude_of(vf x) { return as_float(as_int(x) & set1(int32_t(0x7fffffff))); }
GOSSAMER_INLINE vf with_sign_of(vf x, vf sign) {
  return as_float(as_int(x) ^ (as_int(sign) & set1(int32_t(0x80000000))));
}

// Cephes tanhf: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
GOSSAMER_INLINE vf tanh(vf x) {
  const vf a = magnitude_of(x), z = x * x;
  vf y = set1(-5.70498872745e-3f);
  y = fma(y, z, set1(2.06390887954e-2f));
  y = fma(y, z, set1(-5.37397155531e-2f));
  y = fma(y, z, set1(1.33314422036e-1f));
  y = fma(y, z, set1(-3.33332819422e-1f));
  const vf small = fma(y * z, x, x);
  const vf large = set1(1.0f) - set1(2.0f) / (exp(a + a) + set1(1.0f));
  return select(a < set1(0.625f), small, with_sign_of(large, x));
}

// 1 + erf(x), precise in both tails (polynomials by N. Juffa): beyond 0.92 erf is 1 - e^(polynomial).
GOSSAMER_INLINE vf one_plus_erf(vf x) {
  const vf a = magnitude_of(x), z = x * x;
  vf e = fma(set1(-1.72853470e-5f), a, set1(3.83197126e-4f));
  e = fma(e, z, fma(set1(-3.88396438e-3f), a, set1(2.42546219e-2f)));
  e = fma(e, a, set1(-1.06777877e-1f));
  e = fma(e, a, set1(-6.34846687e-1f));
  e = fma(e, a, set1(-1.28717512e-1f));
  e = exp(fma(e, a, set1(0.0f) - a));
  vf s = set1(-5.96761703e-4f);
  s = fma(s, z, set1(4.99119423e-3f));
  s = fma(s, z, set1(-2.67681349e-2f));
  s = fma(s, z, set1(1.12819925e-1f));
  s = fma(s, z, set1(-3.76125336e-1f));
  s = fma(s, z, set1(1.28379166e-1f));
  const vf small = set1(1.0f) + fma(s, x, x);
  return select(a < set1(0.921875f), small, select(x < set1(0.0f), e, set1(2.0f) - e));
}

struct SinCos {
  vf sin, cos;
};
// Cephes sinf / cosf after a reduction in double precision, which stays exact for positions in the millions.
GOSSAMER_INLINE SinCos sin_cos(vf x) {
  float angle[kLanes], rest[kLanes];
  int32_t quadrant[kLanes];
  store(angle, x);
  for (int i = 0; i < kLanes; i++) {
    const double a = angle[i], shifter = 6755399441055744.0;  // 1.5 * 2^52, as in exp
    const double n = (a * 0.63661977236758134308 + shifter) - shifter;
    rest[i] = float(a - n * 1.57079632679489661923);
    quadrant[i] = int32_t(n);
  }
  const vf r = load(rest), z = r * r;
  const vi q = load(quadrant);
  vf s = set1(-1.9515295891e-4f);
  s = fma(s, z, set1(8.3321608736e-3f));
  s = fma(s, z, set1(-1.6666654611e-1f));
  s = fma(s * z, r, r);
  vf c = set1(2.443315711809948e-5f);
  c = fma(c, z, set1(-1.388731625493765e-3f));
  c = fma(c, z, set1(4.166664568298827e-2f));
  c = fma(c * z, z, fma(z, set1(-0.5f), set1(1.0f)));
  const vm even = (q & set1(int32_t(1))) == set1(int32_t(0));
  const vf sin_sign = as_float(shl(q, 30)), cos_sign = as_float(shl(q + set1(int32_t(1)), 30));
  return {with_sign_of(select(even, s, c), sin_sign), with_sign_of(select(even, c, s), cos_sign)};
}
