// Normalisation over rows of d. A row is summed in four interleaved 16-lane accumulators, an order that
// depends on d alone.

template <class F>
GOSSAMER_INLINE float row_sum(const float* x, int64_t d, F value) {
  vf a0 = set1(0.0f), a1 = a0, a2 = a0, a3 = a0;
  int64_t i = 0;
  for (; i + 64 <= d; i += 64) {
    a0 = value(load(x + i), a0);
    a1 = value(load(x + i + 16), a1);
    a2 = value(load(x + i + 32), a2);
    a3 = value(load(x + i + 48), a3);
  }
  for (; i + 16 <= d; i += 16) a0 = value(load(x + i), a0);
  if (i < d) {
    const vf tail = value(load_n(x + i, d - i), set1(0.0f));
    a1 = a1 + select(lanes(0, d - i), tail, set1(0.0f));
  }
  return sum((a0 + a1) + (a2 + a3));
}

// y[i] = f(i, x[i]) over one row; f(i, v, n) sees n valid lanes.
template <class F>
GOSSAMER_INLINE void map_row(const float* x, float* y, int64_t d, F f) {
  int64_t i = 0;
  for (; i + 16 <= d; i += 16) store(y + i, f(i, load(x + i), 16));
  if (i < d) store_n(y + i, f(i, load_n(x + i, d - i), d - i), d - i);
}

GOSSAMER_INLINE vf load_some(const float* x, int64_t n) { return n == 16 ? load(x) : load_n(x, n); }

inline void rms_norm(const float* x, const float* w, float eps, float* y, int64_t d, int64_t r0, int64_t r1) {
  for (int64_t r = r0; r < r1; r++) {
    const float* row = x + r * d;
    const float squares = row_sum(row, d, [](vf v, vf acc) { return fma(v, v, acc); });
    const vf inverse = set1(1.0f / __builtin_sqrtf(squares / float(d) + eps));
    map_row(row, y + r * d, d,
            [&](int64_t i, vf v, int64_t n) { return (v * inverse) * load_some(w + i, n); });
  }
}

// b may be null.
inline void layer_norm(const float* x, const float* w, const float* b, float eps, float* y, int64_t d,
                       int64_t r0, int64_t r1) {
  for (int64_t r = r0; r < r1; r++) {
    const float* row = x + r * d;
    const vf mean = set1(row_sum(row, d, [](vf v, vf acc) { return acc + v; }) / float(d));
    const float squares = row_sum(row, d, [&](vf v, vf acc) { return fma(v - mean, v - mean, acc); });
    const vf inverse = set1(1.0f / __builtin_sqrtf(squares / float(d) + eps));
    map_row(row, y + r * d, d, [&](int64_t i, vf v, int64_t n) {
      const vf scaled = ((v - mean) * inverse) * load_some(w + i, n);
      return b ? scaled + load_some(b + i, n) : scaled;
    });
  }
}
