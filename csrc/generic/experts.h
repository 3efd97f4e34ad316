// Expert routing. The k largest are found one after another, each the next below the last in the order
// (logit descending, id ascending), which needs no scratch and suits the few dozen experts models have.

inline vf logits_at(const float* x, int64_t i, int64_t n) {
  const vf v = n - i >= 16 ? load(x + i) : load_n(x + i, n - i, -kInf);
  return select(is_nan(v), set1(-kInf), v);  // NaN logits give NaN weights, but ids stay valid and distinct
}

inline void top_k_experts(const float* logits, int64_t experts, int64_t k, bool renormalise, int32_t* ids,
                          float* weights, int64_t r0, int64_t r1) {
  for (int64_t r = r0; r < r1; r++) {
    const float* row = logits + r * experts;
    int32_t* row_ids = ids + r * k;
    float* row_weights = weights + r * k;

    float last = kInf;
    int32_t last_id = -1;
    for (int64_t j = 0; j < k; j++) {
      vf best = set1(-kInf);
      vi best_id = set1(int32_t(0x7fffffff));
      for (int64_t i = 0; i < experts; i += 16) {
        const vf v = logits_at(row, i, experts);
        const vi id = iota() + set1(int32_t(i));
        const vm after = (v < set1(last)) | ((v == set1(last)) & (set1(last_id) < id));
        const vm better = (best < v) | ((v == best) & (id < best_id));
        const vm take = after & better & lanes(0, experts - i);
        best = select(take, v, best);
        best_id = select(take, id, best_id);
      }
      float value[kLanes];
      int32_t id[kLanes];
      store(value, best);
      store(id, best_id);
      last = value[0], last_id = id[0];
      for (int i = 1; i < kLanes; i++)
        if (value[i] > last || (value[i] == last && id[i] < last_id)) last = value[i], last_id = id[i];
      row_ids[j] = last_id;
    }

    const vf top = set1(row[row_ids[0]]);
    vf total = set1(0.0f);
    for (int64_t i = 0; i < experts; i += 16)
      total = total + exp((experts - i >= 16 ? load(row + i) : load_n(row + i, experts - i, -kInf)) - top);
    const float all = sum(total);
    float chosen = 0.0f;
    for (int64_t j = 0; j < k; j++) {
      float p[kLanes];
      store(p, exp(set1(row[row_ids[j]]) - top));
      row_weights[j] = p[0] / all;
      chosen += row_weights[j];
    }
    if (renormalise)
      for (int64_t j = 0; j < k; j++) row_weights[j] /= chosen;
  }
}
