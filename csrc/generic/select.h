// Selection among logits. A candidate is one 64-bit key that orders by (value descending, id ascending): the
// value's bits made monotonic and inverted above, the id below. Keys are distinct, so every selection has one
// answer, ties included.

GOSSAMER_INLINE uint64_t key_of(float value, int32_t id) {
  uint32_t u;
  value += 0.0f;  // -0 equals 0
  __builtin_memcpy(&u, &value, 4);
  u = u & 0x80000000u ? u : ~u & 0x7fffffffu;
  return uint64_t(u) << 32 | uint32_t(id);
}
GOSSAMER_INLINE float value_of(uint64_t key) {
  uint32_t u = uint32_t(key >> 32);
  u = u & 0x80000000u ? u : ~u & 0x7fffffffu;
  float value;
  __builtin_memcpy(&value, &u, 4);
  return value;
}
GOSSAMER_INLINE int32_t id_of(uint64_t key) { return int32_t(uint32_t(key)); }

inline void swap_keys(uint64_t& a, uint64_t& b) {
  const uint64_t t = a;
  a = b;
  b = t;
}

inline uint64_t median(uint64_t a, uint64_t b, uint64_t c) {
  if (a > b) swap_keys(a, b);
  return c < a ? a : c > b ? b : c;
}

// Splits [lo, hi), at least three keys, into non-empty halves, all of the left below all of the right;
// returns where the right one begins.
inline int64_t partition(uint64_t* keys, int64_t lo, int64_t hi) {
  const uint64_t pivot = median(keys[lo], keys[lo + (hi - lo) / 2], keys[hi - 1]);
  int64_t i = lo - 1, j = hi;
  for (;;) {
    while (keys[++i] < pivot) {
    }
    while (keys[--j] > pivot) {
    }
    if (i >= j) return j + 1;
    swap_keys(keys[i], keys[j]);
  }
}

inline void sort_keys(uint64_t* keys, int64_t lo, int64_t hi) {
  while (hi - lo > 16) {
    const int64_t mid = partition(keys, lo, hi);
    if (mid - lo < hi - mid) {  // recurse into the shorter half: the depth stays logarithmic
      sort_keys(keys, lo, mid);
      lo = mid;
    } else {
      sort_keys(keys, mid, hi);
      hi = mid;
    }
  }
  for (int64_t i = lo + 1; i < hi; i++) {
    const uint64_t key = keys[i];
    int64_t j = i;
    for (; j > lo && keys[j - 1] > key; j--) keys[j] = keys[j - 1];
    keys[j] = key;
  }
}

// Moves the k first of n keys to the front, in no order.
inline void select_first(uint64_t* keys, int64_t n, int64_t k) {
  int64_t lo = 0, hi = n;
  while (hi - lo > 16) {
    const int64_t mid = partition(keys, lo, hi);
    if (k < mid)
      hi = mid;
    else
      lo = mid;
  }
  sort_keys(keys, lo, hi);
}

// Gathers the keys of all values >= least, ids ascending; returns how many.
inline int64_t collect(const float* x, int64_t n, float least, uint64_t* keys) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const vf v = n - i >= 16 ? load(x + i) : load_n(x + i, n - i);
    uint32_t found = bits((v >= set1(least)) & lanes(0, n - i));
    for (; found; found &= found - 1) {
      const int64_t at = i + __builtin_ctz(found);
      keys[count++] = key_of(x[at], int32_t(at));
    }
  }
  return count;
}

// The k first keys (k <= n) of x, in no order. The k-th largest of the maxima of runs of 64 values bounds the
// k-th largest value from below, so that few values beyond k need a look.
inline void select_largest(const float* x, int64_t n, int64_t k, uint64_t* keys) {
  float least = -kInf;
  const int64_t runs = n / 64;
  if (k <= runs) {
    for (int64_t r = 0; r < runs; r++) {
      const float* run = x + r * 64;
      keys[r] =
          key_of(max(max(max(load(run), load(run + 16)), max(load(run + 32), load(run + 48)))), int32_t(r));
    }
    select_first(keys, runs, k);
    for (int64_t r = 0; r < k; r++)
      if (r == 0 || value_of(keys[r]) < least) least = value_of(keys[r]);
  }
  select_first(keys, collect(x, n, least, keys), k);
}

// Sums of e^x in double: their order does not show in the few digits that matter.
struct Mass {
  double lane[kLanes] = {};
  GOSSAMER_INLINE void add(vf x) {
    float p[kLanes];
    store(p, exp(x));
    for (int i = 0; i < kLanes; i++) lane[i] += p[i];
  }
  double value() const {
    double sum = 0;
    for (int i = 0; i < kLanes; i++) sum += lane[i];
    return sum;
  }
};

inline double mass_of(const float* x, int64_t n, float minus) {
  Mass mass;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) mass.add(load(x + i) - set1(minus));
  if (i < n) mass.add(load_n(x + i, n - i, -kInf) - set1(minus));
  return mass.value();
}

inline vf values_of(const uint64_t* keys, int64_t n) {
  float x[kLanes];
  for (int i = 0; i < kLanes; i++) x[i] = i < n ? value_of(keys[i]) : -kInf;
  return load(x);
}

inline double mass_of(const uint64_t* keys, int64_t n) {
  Mass mass;
  for (int64_t i = 0; i < n; i += 16) mass.add(values_of(keys + i, n - i));
  return mass.value();
}

// The shortest prefix, in key order, whose mass of e^value reaches `target`: moves it to the front, in no
// order, and returns its length (at least 1).
inline int64_t select_mass(uint64_t* keys, int64_t n, double target) {
  int64_t lo = 0, hi = n;
  double below = 0;
  while (hi - lo > 16) {
    const int64_t mid = partition(keys, lo, hi);
    const double mass = mass_of(keys + lo, mid - lo);
    if (below + mass >= target) {
      hi = mid;
    } else {
      below += mass;
      lo = mid;
    }
  }
  sort_keys(keys, lo, hi);
  for (int64_t i = lo; i < hi; i++) {
    below += mass_of(keys + i, 1);
    if (below >= target) return i + 1;
  }
  return hi;
}

// The last of the shortest prefix, in key order, of z (whose maximum is 0) whose share of the mass reaches
// top_p. A histogram of the mass finds the bin it lies in; only that bin's keys are looked at one by one.
inline uint64_t nucleus_end(const float* z, int64_t n, float top_p, uint64_t* keys) {
  constexpr int kBins = 1024;
  const auto bins_of = [](vf v) {  // a 32nd wide each; the last takes all the rest
    const vf below = v * set1(-32.0f), last = set1(float(kBins - 1));
    return to_int(select(below < last, below, last));
  };
  double mass[kBins] = {};
  for (int64_t i = 0; i < n; i += 16) {
    const vf v = n - i >= 16 ? load(z + i) : load_n(z + i, n - i, -kInf);
    float p[kLanes];
    int32_t bin[kLanes];
    store(p, exp(v));
    store(bin, bins_of(v));
    for (int j = 0; j < kLanes; j++) mass[bin[j]] += p[j];
  }
  double total = 0, before = 0;
  for (double m : mass) total += m;
  const double target = top_p * total;
  int last = 0;
  while (last < kBins - 1 && before + mass[last] < target) before += mass[last++];

  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const vf v = n - i >= 16 ? load(z + i) : load_n(z + i, n - i, -kInf);
    uint32_t found = bits((bins_of(v) == set1(int32_t(last))) & lanes(0, n - i));
    for (; found; found &= found - 1) {
      const int64_t at = i + __builtin_ctz(found);
      keys[count++] = key_of(z[at], int32_t(at));
    }
  }
  count = select_mass(keys, count, target - before);
  uint64_t end = 0;
  for (int64_t i = 0; i < count; i++)
    if (keys[i] > end) end = keys[i];
  return end;
}
