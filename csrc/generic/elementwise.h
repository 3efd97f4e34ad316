// Elementwise ops over [i0, i1) of flat arrays; outputs may be inputs.

template <class F>
GOSSAMER_INLINE void map(const float* x, float* y, int64_t i0, int64_t i1, F f) {
  int64_t i = i0;
  for (; i + 16 <= i1; i += 16) store(y + i, f(load(x + i)));
  if (i < i1) store_n(y + i, f(load_n(x + i, i1 - i)), i1 - i);
}

template <class F>
GOSSAMER_INLINE void map(const float* a, const float* b, float* y, int64_t i0, int64_t i1, F f) {
  int64_t i = i0;
  for (; i + 16 <= i1; i += 16) store(y + i, f(load(a + i), load(b + i)));
  if (i < i1) store_n(y + i, f(load_n(a + i, i1 - i), load_n(b + i, i1 - i)), i1 - i);
}

inline void add(const float* a, const float* b, float* y, int64_t i0, int64_t i1) {
  map(a, b, y, i0, i1, [](vf u, vf v) { return u + v; });
}

inline void scale(const float* x, float factor, float* y, int64_t i0, int64_t i1) {
  map(x, y, i0, i1, [f = set1(factor)](vf v) { return v * f; });
}

inline void softcap(const float* x, float cap, float* y, int64_t i0, int64_t i1) {
  map(x, y, i0, i1, [c = set1(cap)](vf v) { return c * tanh(v / c); });
}

struct Silu {
  GOSSAMER_INLINE vf operator()(vf x) const { return x / (set1(1.0f) + exp(set1(0.0f) - x)); }
};
struct Gelu {
  GOSSAMER_INLINE vf operator()(vf x) const {
    return (set1(0.5f) * x) * one_plus_erf(x * set1(0.70710678118654752f));
  }
};
struct GeluTanh {
  GOSSAMER_INLINE vf operator()(vf x) const {
    const vf inner = set1(0.79788456080286536f) * fma((x * x) * x, set1(0.044715f), x);
    return (set1(0.5f) * x) * (set1(1.0f) + tanh(inner));
  }
};
struct Relu {
  GOSSAMER_INLINE vf operator()(vf x) const { return select(x < set1(0.0f), set1(0.0f), x); }
};

template <class F>
GOSSAMER_INLINE void with_act(Act act, F f) {
  switch (act) {
    case Act::silu:
      return f(Silu{});
    case Act::gelu:
      return f(Gelu{});
    case Act::gelu_tanh:
      return f(GeluTanh{});
    case Act::relu:
      return f(Relu{});
  }
}

inline void activation(Act act, const float* x, float* y, int64_t i0, int64_t i1) {
  with_act(act, [=](auto a) { map(x, y, i0, i1, a); });
}

inline void act_mul(Act act, const float* gate, const float* up, float* y, int64_t i0, int64_t i1) {
  with_act(act, [=](auto a) { map(gate, up, y, i0, i1, [a](vf g, vf u) { return a(g) * u; }); });
}

// One row at a time: a tile's rows lie apart.
inline void finish(const Finish& f, float* out, int64_t ldo, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r++) {
    float* y = out + r * ldo;
    if (f.gate)
      act_mul(Act(f.act), f.gate + r * f.ldg, y, y, 0, columns);
    else if (f.act >= 0)
      activation(Act(f.act), y, y, 0, columns);
    if (f.residual) add(f.residual + r * f.ldr, y, y, 0, columns);
  }
}
