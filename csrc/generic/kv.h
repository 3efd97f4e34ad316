// Writing keys and values into pages: V rows as they come, K transposed, up to 16 tokens at a time.

template <class T>
inline void write_keys(T* to, int64_t page_size, const float* from, int64_t ld, int64_t d, int64_t tokens) {
  for (int64_t i = 0; i < d; i++) {
    float side[kLanes];
    if (tokens == kLanes) {
      for (int t = 0; t < kLanes; t++) side[t] = from[t * ld + i];
      store(to + i * page_size, load(side));
    } else {
      for (int64_t t = 0; t < kLanes; t++) side[t] = t < tokens ? from[t * ld + i] : 0.0f;
      store_n(to + i * page_size, load(side), tokens);
    }
  }
}

template <class T>
inline void write_values(T* to, int64_t d_pad, const float* from, int64_t ld, int64_t d, int64_t tokens) {
  for (int64_t t = 0; t < tokens; t++) {
    int64_t i = 0;
    for (; i + 16 <= d; i += 16) store(to + t * d_pad + i, load(from + t * ld + i));
    if (i < d) store_n(to + t * d_pad + i, load_n(from + t * ld + i, d - i), d - i);
  }
}

template <class T>
inline void kv_write_as(const KvLayout& kv, T* pool, const int32_t* block_table, const Span& span,
                        const float* k, int64_t ldk, const float* v, int64_t ldv, int64_t r0, int64_t r1) {
  const int64_t d = kv.head_dim;
  const int64_t k_tile = d * kv.page_size, v_tile = int64_t(kv.page_size) * kv.d_pad;
  for (int64_t r = r0, tokens; r < r1; r += tokens) {
    const int64_t position = span.start + r, page = position / kv.page_size, slot = position % kv.page_size;
    tokens = kLanes - slot % kLanes;  // to the end of the 16 slots that lie side by side
    if (tokens > r1 - r) tokens = r1 - r;
    T* tile = pool + block_table[span.table + page] * (kv.kv_heads * (k_tile + v_tile));
    const float *k_row = k + (r - r0) * ldk, *v_row = v + (r - r0) * ldv;
    for (int64_t h = 0; h < kv.kv_heads; h++, tile += k_tile + v_tile) {
      write_keys(tile + slot, kv.page_size, k_row + h * d, ldk, d, tokens);
      write_values(tile + k_tile + slot * kv.d_pad, kv.d_pad, v_row + h * d, ldv, d, tokens);
    }
  }
}

inline void kv_write(const KvLayout& kv, void* pool, const int32_t* block_table, const Span& span,
                     const float* k, int64_t ldk, const float* v, int64_t ldv, int64_t r0, int64_t r1) {
  if (kv.dtype == Format::f32)
    kv_write_as(kv, static_cast<float*>(pool), block_table, span, k, ldk, v, ldv, r0, r1);
  else if (kv.dtype == Format::f16)
    kv_write_as(kv, static_cast<f16*>(pool), block_table, span, k, ldk, v, ldv, r0, r1);
  else
    kv_write_as(kv, static_cast<bf16*>(pool), block_table, span, k, ldk, v, ldv, r0, r1);
}
