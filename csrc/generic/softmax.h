// Softmax of a row of scores within a split. The row's blocks that any row of its tile sees hold p
// afterwards, zero for keys that this row does not see. Memory has an errand to do meanwhile.

struct RowStatistics {
  float maximum, total;
  float scale;      // integers: p V is this times the integer sum
  int32_t sums[2];  // integers: of each part
};

// [lo, hi): keys of the split the row sees. Applies the soft-cap, hides the edges, gives the largest score.
inline float hide_and_find_top(float* s, int64_t lo, int64_t hi, float softcap) {
  const int64_t first = lo / 16 * 16, end = (hi + 15) / 16 * 16;
  if (softcap > 0)
    for (int64_t j = first; j < end; j += 16) store(s + j, set1(softcap) * tanh(load(s + j) / set1(softcap)));
  auto mask = [&](int64_t j) { store(s + j, select(lanes(lo - j, hi - j), load(s + j), set1(-kInf))); };
  mask(first);
  mask(end - 16);
  vf best[4];
  for (vf& b : best) b = set1(-kInf);
  int64_t j = first;
  for (; j + 64 <= end; j += 64)
    for (int i = 0; i < 4; i++) best[i] = max(load(s + j + 16 * i), best[i]);
  for (; j < end; j += 16) best[0] = max(load(s + j), best[0]);
  return max(max(max(best[0], best[1]), max(best[2], best[3])));
}

// p times the scale of its value (which may be negative) becomes an integer of at most 16383, in two parts:
// the lower 7 bits, and what is above them with the sign.
constexpr float kTopP = 16383.0f;
constexpr int kPartBits = 7;

inline RowStatistics integer_p(float* s, int64_t lo, int64_t hi, float maximum, const float* value_scales,
                               Errand& errand) {
  const int64_t first = lo / 16 * 16, end = (hi + 15) / 16 * 16;
  const vf peak = set1(maximum);
  vf total = set1(0.0f), top = set1(0.0f), bad = set1(0.0f);
  for (int64_t j = first; j < end; j += 16) {
    errand.step();
    const vf p = exp(load(s + j) - peak);
    total = total + p;
    const vf v = select(lanes(lo - j, hi - j), p * load(value_scales + j), set1(0.0f));
    const vf magnitude = magnitude_of(v);
    top = max(magnitude, top);
    bad = fma(v, set1(0.0f), bad);  // NaN where one of them is no number
    store(s + j, v);
  }
  RowStatistics out{maximum, sum(total), 0.0f, {0, 0}};
  const float most = max(top), inverse = kTopP / most;
  const bool fits = inverse <= 3.4e38f;
  const vf factor = set1(fits ? inverse : 0.0f);
  vi sums[2] = {set1(int32_t(0)), set1(int32_t(0))};
  for (int64_t j = first; j < end; j += 16) {
    const vf shifter = set1(12582912.0f);  // rounds to an integer in the low bits
    const vi u = as_int(fma(load(s + j), factor, shifter)) - as_int(shifter);
    const vi high = sra(u, kPartBits), low = u & set1(int32_t((1 << kPartBits) - 1));
    uint8_t* to = reinterpret_cast<uint8_t*>(s) + j / 16 * 2 * kPartBytes;
    store_bytes(to, high);
    store_bytes(to + kPartBytes, low);
    sums[0] = sums[0] + high;
    sums[1] = sums[1] + low;
  }
  out.scale = sum(bad) == 0.0f ? (fits ? most / kTopP : 0.0f) : __builtin_nanf("");
  for (int i = 0; i < 2; i++) {
    int32_t lane[kLanes];
    store(lane, sums[i]);
    for (int32_t x : lane) out.sums[i] += x;
  }
  return out;
}

template <class Kind>
inline RowStatistics float_p(float* s, int64_t lo, int64_t hi, float maximum, Errand& errand) {
  const int64_t first = lo / 16 * 16, end = (hi + 15) / 16 * 16;
  const vf peak = set1(maximum);
  vf total = set1(0.0f);
  for (int64_t j = first; j < end; j += 16) {
    errand.step();
    const vf p = exp(load(s + j) - peak);
    total = total + p;
    Kind::put_p(reinterpret_cast<uint8_t*>(s) + j / 16 * Kind::kBlockBytes, p);
  }
  return {maximum, sum(total), 1.0f, {0, 0}};
}

// s: scores from the split's first key; seen: by the row, all: by any row of the tile, both from there.
// maximum: of the row's scores, whose edges are hidden.
template <class Kind>
inline RowStatistics put_row(float* s, KeyRange seen, KeyRange all, float maximum, const float* value_scales,
                             Errand& errand) {
  RowStatistics out{-kInf, 0.0f, 0.0f, {0, 0}};
  const bool any = seen.lo < seen.hi;
  if (any) {
    if constexpr (Kind::kInteger)
      out = integer_p(s, seen.lo, seen.hi, maximum, value_scales, errand);
    else
      out = float_p<Kind>(s, seen.lo, seen.hi, maximum, errand);
  }
  auto clear = [&](int64_t from, int64_t to) {
    for (int64_t j = from; j < to; j += 16)
      __builtin_memset(reinterpret_cast<uint8_t*>(s) + j / 16 * Kind::kBlockBytes, 0, Kind::kBlockBytes);
  };
  clear(all.lo / 16 * 16, any ? seen.lo / 16 * 16 : all.hi);
  if (any) clear((seen.hi + 15) / 16 * 16, all.hi);
  return out;
}

// The same from scores as they are, of which the row sees no others.
template <class Kind>
inline RowStatistics softmax_row(float* s, KeyRange seen, KeyRange all, float softcap,
                                 const float* value_scales, Errand& errand) {
  const float maximum = seen.lo < seen.hi ? hide_and_find_top(s, seen.lo, seen.hi, softcap) : -kInf;
  return put_row<Kind>(s, seen, all, maximum, value_scales, errand);
}
