// Rotary embedding in the half-split layout. Angles are computed once per row and shared by its heads.

inline void rope(const float* x, int64_t ldx, const int32_t* positions, const float* inv_freq,
                 float magnitude, float* y, int64_t ldy, int64_t heads, int64_t head_dim, int64_t rotary,
                 int64_t r0, int64_t r1) {
  const int64_t half = rotary / 2;
  for (int64_t r = r0; r < r1; r++) {
    const float* from = x + r * ldx;
    float* to = y + r * ldy;
    const vf position = set1(float(positions[r]));
    for (int64_t i = 0; i < half; i += 16) {
      const int64_t n = half - i < 16 ? half - i : 16;
      const SinCos t = sin_cos(position * load_some(inv_freq + i, n));
      const vf cos = t.cos * set1(magnitude), sin = t.sin * set1(magnitude);
      for (int64_t h = 0; h < heads; h++) {
        const int64_t low = h * head_dim + i, high = low + half;
        const vf a = load_some(from + low, n), b = load_some(from + high, n);
        const vf rotated_a = fma(a, cos, set1(0.0f) - b * sin), rotated_b = fma(b, cos, a * sin);
        if (n == 16) {
          store(to + low, rotated_a);
          store(to + high, rotated_b);
        } else {
          store_n(to + low, rotated_a, n);
          store_n(to + high, rotated_b, n);
        }
      }
    }
    if (from != to && rotary < head_dim)
      for (int64_t h = 0; h < heads; h++)
        __builtin_memcpy(to + h * head_dim + rotary, from + h * head_dim + rotary,
                         size_t(head_dim - rotary) * sizeof(float));
  }
}
