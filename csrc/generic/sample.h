// From a row of logits to a token. With t the treated logits and z = (t - max t) / temperature, the sampled
// token is the argmax over the kept ids of z[id] + g(id), the Gumbel-max form of sampling from softmax(z);
// the lowest id wins ties. The noise is a pure function of (seed, output index, id):
//
//   G       = 0x9E3779B97F4A7C15                            all integers modulo 2^64
//   mix(x)  : x ^= x >> 30; x *= 0xBF58476D1CE4E5B9; x ^= x >> 27; x *= 0x94D049BB133111EB; x ^= x >> 31
//   key     = mix(mix(seed + G) + output_index + G)
//   bits    = mix(key + id) >> 33                           31 bits
//   v       = min((float32(bits) + 0.5f) * 2^-31, 1 - 2^-24)
//   g       = -log(-log1p(-v))                              float32; log_parts in vmath.h, free of fma
//
// v is the distance from 1 of the textbook's uniform u, g = -log(-log(u)). It may be as small as 2^-32, where
// u itself would round to 1 and g to infinity, so that the rare large g stay finely spaced.
//
// Everything is a function of the row alone, and elementary steps avoid fma: equal logits sample equal tokens
// on every ISA (but for top-p's mass, where e^x may differ in the last bit).

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

GOSSAMER_INLINE uint64_t mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xBF58476D1CE4E5B9u;
  x ^= x >> 27;
  x *= 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

GOSSAMER_INLINE vf uniform(uint64_t key, vi ids) {
  int32_t id[kLanes], random[kLanes];
  store(id, ids);
  for (int i = 0; i < kLanes; i++) random[i] = int32_t(mix(key + uint32_t(id[i])) >> 33);
  const vf v = (to_float(load(random)) + set1(0.5f)) * set1(0x1p-31f), most = set1(1.0f - 0x1p-24f);
  return select(v < most, v, most);
}

GOSSAMER_INLINE vf gumbel(vf v) { return set1(0.0f) - log(set1(0.0f) - log_one_minus(v)); }

// No less than gumbel(v): -log(v) rounded up to a power of two, and a little for rounding.
GOSSAMER_INLINE vf gumbel_bound(vf v) {
  return to_float(set1(int32_t(127)) - sra(as_int(v), 23)) * set1(0.69314718f) + set1(0.01f);
}

// The largest value of 16 running lanes and its lowest id.
struct Best {
  vf value = set1(-kInf);
  vi id = set1(int32_t(-1));

  // Candidates of one lane come with ascending ids.
  GOSSAMER_INLINE void offer(vf v, vi ids) {
    const vm better = value < v;
    value = select(better, v, value);
    id = select(better, ids, id);
  }
  GOSSAMER_INLINE void offer_unordered(vf v, vi ids) {
    const vm better = (value < v) | ((v == value) & (ids < id));
    value = select(better, v, value);
    id = select(better, ids, id);
  }
  void result(float& top, int32_t& token) const {
    float values[kLanes];
    int32_t ids[kLanes];
    store(values, value);
    store(ids, id);
    top = -kInf, token = -1;
    for (int i = 0; i < kLanes; i++)
      if (values[i] > top || (values[i] == top && ids[i] < token)) top = values[i], token = ids[i];
  }
};

inline Scan scan(const float* x, int64_t n) {
  Best best;
  vm nan = lanes(0, 0);
  vi ids = iota();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16, ids = ids + set1(int32_t(16))) {
    const vf v = load(x + i);
    nan = nan | is_nan(v);
    best.offer(v, ids);
  }
  if (i < n) {
    const vf v = load_n(x + i, n - i, -kInf);
    nan = nan | is_nan(v);
    best.offer(v, ids);
  }
  Scan s;
  best.result(s.maximum, s.argmax);
  s.bad = bits(nan) != 0 || s.maximum == kInf;
  return s;
}

// z in place of x.
inline void temper(const float* x, int64_t n, float maximum, float temperature, float* z) {
  map(x, z, 0, n, [m = set1(maximum), t = set1(temperature)](vf v) { return (v - m) / t; });
}

// Samples among z >= least up to `end` in key order. Most blocks cannot win whatever their logarithms are,
// which leaves little but the hash to compute.
inline int32_t sample_all(const float* z, int64_t n, float least, uint64_t end, uint64_t key) {
  const vf end_z = set1(value_of(end));
  const vi end_id = set1(int32_t(id_of(end) < 0x7fffffff ? id_of(end) + 1 : 0x7fffffff));
  Best best;
  float leader = -kInf;
  for (int64_t i = 0; i < n; i += 16) {
    vf v = n - i >= 16 ? load(z + i) : load_n(z + i, n - i, -kInf);
    const vi ids = iota() + set1(int32_t(i));
    const vm kept = (v >= set1(least)) & ((end_z < v) | ((v == end_z) & (ids < end_id)));
    v = select(kept, v, set1(-kInf));
    const vf u = uniform(key, ids);
    if (!bits(v + gumbel_bound(u) >= set1(leader))) continue;
    const vf score = v + gumbel(u);
    best.offer(score, ids);
    leader = max(max(score, set1(leader)));
  }
  float top;
  int32_t token;
  best.result(top, token);
  return token;
}

// p >= min_p * p_max is z >= log(min_p), as the largest z is 0.
inline float least_z(float min_p) {
  float bound[kLanes];
  store(bound, log(set1(min_p)));
  return !(min_p > 0.0f) ? -kInf : min_p < 1.0f ? bound[0] : 0.0f;
}

inline int32_t sample_some(const uint64_t* keys, int64_t n, float min_p, uint64_t key) {
  const vf least = set1(least_z(min_p));
  Best best;
  best.id = set1(int32_t(0x7fffffff));
  for (int64_t i = 0; i < n; i += 16) {
    int32_t id[kLanes];
    for (int j = 0; j < kLanes; j++) id[j] = i + j < n ? id_of(keys[i + j]) : 0x7fffffff;
    const vf z = values_of(keys + i, n - i);
    best.offer_unordered(select(z >= least, z + gumbel(uniform(key, load(id))), set1(-kInf)), load(id));
  }
  float top;
  int32_t token;
  best.result(top, token);
  return token;
}

// z has maximum 0.
inline int32_t sample_tempered(const SampleRow& row, const float* z, int64_t n, uint64_t key,
                               uint64_t* keys) {
  if (row.top_k > 0 && row.top_k < n) {
    int64_t kept = row.top_k;
    select_largest(z, n, kept, keys);
    if (row.top_p < 1.0f) kept = select_mass(keys, kept, row.top_p * mass_of(keys, kept));
    return sample_some(keys, kept, row.min_p, key);
  }
  const uint64_t end = row.top_p < 1.0f ? nucleus_end(z, n, row.top_p, keys) : key_of(-kInf, 0);
  return sample_all(z, n, least_z(row.min_p), end, key);
}

GOSSAMER_INLINE bool treated(const SampleRow& row) {
  return row.bias_begin < row.bias_end || row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f ||
         row.frequency_penalty != 0.0f || row.mask_row >= 0;
}

// Bias, penalties and mask over t. `count` is scratch of one integer per token, of which only entries that
// the history names are used (and set to 0 first).
inline void treat(const SampleArgs& args, const SampleRow& row, float* t, int32_t* count) {
  for (int32_t i = row.bias_begin; i < row.bias_end; i++) t[args.bias_ids[i]] += args.bias_values[i];

  const int32_t* history = args.history;
  if (row.repetition_penalty != 1.0f) {
    for (int32_t i = row.prompt_begin; i < row.prompt_end; i++) count[history[i]] = 0;
    for (int32_t i = row.output_begin; i < row.output_end; i++) count[history[i]] = 0;
    auto penalise = [&](int32_t id) {
      if (count[id]++) return;
      t[id] = t[id] > 0 ? t[id] / row.repetition_penalty : t[id] * row.repetition_penalty;
    };
    for (int32_t i = row.prompt_begin; i < row.prompt_end; i++) penalise(history[i]);
    for (int32_t i = row.output_begin; i < row.output_end; i++) penalise(history[i]);
  }
  if (row.presence_penalty != 0.0f || row.frequency_penalty != 0.0f) {
    for (int32_t i = row.output_begin; i < row.output_end; i++) count[history[i]] = 0;
    for (int32_t i = row.output_begin; i < row.output_end; i++) count[history[i]]++;
    for (int32_t i = row.output_begin; i < row.output_end; i++) {
      int32_t& times = count[history[i]];
      if (times) t[history[i]] -= row.frequency_penalty * float(times) + row.presence_penalty;
      times = 0;
    }
  }

  if (row.mask_row >= 0) {
    const int64_t words = (args.vocab + 31) / 32;
    const uint32_t* mask = args.masks + row.mask_row * words;
    for (int64_t w = 0; w < words; w++) {
      uint32_t banned = ~mask[w];
      if (args.vocab - w * 32 < 32) banned &= (1u << (args.vocab - w * 32)) - 1;
      if (banned == 0xffffffffu) {
        store(t + w * 32, set1(-kInf));
        store(t + w * 32 + 16, set1(-kInf));
        continue;
      }
      for (; banned; banned &= banned - 1) t[w * 32 + __builtin_ctz(banned)] = -kInf;
    }
  }
}

inline void write_logprobs(const SampleArgs& args, int64_t r, const float* x, float maximum, uint64_t* keys) {
  const SampleRow& row = args.rows[r];
  float log_mass[kLanes];
  store(log_mass, log(set1(float(mass_of(x, args.vocab, maximum)))));
  args.logprob[r] = (x[args.token[r]] - maximum) - log_mass[0];

  int64_t n = row.logprobs < args.max_logprobs ? row.logprobs : args.max_logprobs;
  if (n > args.vocab) n = args.vocab;
  if (n <= 0) return;
  select_largest(x, args.vocab, n, keys);
  sort_keys(keys, 0, n);
  for (int64_t i = 0; i < n; i++) {
    args.top_ids[r * args.max_logprobs + i] = id_of(keys[i]);
    args.top_logprobs[r * args.max_logprobs + i] = (value_of(keys[i]) - maximum) - log_mass[0];
  }
}

// A row's z (or treated logits), then its keys.
inline int64_t sample_scratch(int64_t vocab) {
  return (vocab + 15) / 16 * 16 * int64_t(sizeof(float) + sizeof(uint64_t));
}

inline void sample(const SampleArgs& args, int64_t r, void* scratch) {
  const SampleRow& row = args.rows[r];
  const int64_t n = args.vocab;
  const float* x = args.logits + r * args.ld;
  float* own = static_cast<float*>(scratch);
  uint64_t* keys = reinterpret_cast<uint64_t*>(own + (n + 15) / 16 * 16);

  args.token[r] = -1;
  args.logprob[r] = 0.0f;  // stays where no logprobs are asked for
  for (int64_t i = 0; i < args.max_logprobs; i++) {
    args.top_ids[r * args.max_logprobs + i] = -1;
    args.top_logprobs[r * args.max_logprobs + i] = -kInf;
  }

  const Scan raw = scan(x, n);
  args.bad[r] = raw.bad ? 1 : 0;
  if (raw.bad) return;
  if (row.target >= 0) {
    args.token[r] = raw.argmax < 0 ? -1 : row.target;
    args.bad[r] = raw.argmax < 0 ? 2 : 0;
    if (!args.bad[r]) write_logprobs(args, r, x, raw.maximum, keys);
    return;
  }

  const float* t = x;
  Scan s = raw;
  if (treated(row)) {
    __builtin_memcpy(own, x, size_t(n) * sizeof(float));
    treat(args, row, own, reinterpret_cast<int32_t*>(keys));
    t = own;
    s = scan(t, n);
    if (s.bad) args.bad[r] = 1;  // an infinite bias or a zero penalty
  }
  if (s.argmax < 0 && !s.bad) args.bad[r] = 2;
  if (args.bad[r]) return;

  if (row.temperature == 0.0f) {
    args.token[r] = s.argmax;
  } else {
    const uint64_t key = mix(mix(row.seed + kGolden) + uint64_t(row.output_index) + kGolden);
    temper(t, n, s.maximum, row.temperature, own);
    args.token[r] = sample_tempered(row, own, n, key, keys);
  }
  if (row.logprobs >= 0) write_logprobs(args, r, x, raw.maximum, keys);
}
