// Paged attention, exact under any tiling. For each query row the positions are cut into splits of 512
// at absolute multiples of 512. Within a split: scores, row maximum, p = e^(score - maximum), sum of p lane
// by lane, and sum of p V in ascending position; the splits merge in ascending order. Every one of these is a
// fixed sequence of operations on the row's own visible keys: masked keys are skipped or add exact zeros, so
// a row's bits depend neither on the rows it shares a tile with nor on page size, chunking or garbage in
// slots it cannot see.
//
// The rows of a tile are (query row, head of the group) pairs, so that a group's heads share the loads and
// conversions of K and V. Keys go through scratch as floats, a chunk at a time; meanwhile the next chunk is
// on its way from memory, which a decode step over a long context does little else than wait for.

constexpr int kSplit = 512;                // part of the result's definition
constexpr int kChunk = 64;                 // keys converted at a time
constexpr int kTile = 64;                  // rows of a tile
constexpr int kScoreStride = kSplit + 16;  // off the power of two, which would crowd a few cache sets
constexpr int64_t kAttentionRows = 32;     // of a call: enough to share K and V, few enough to share out

struct AttentionScratch {
  float *q, *scores, *keys, *part, *out, *maximum, *total;
  int64_t bytes;
  AttentionScratch(const KvLayout& kv, void* base) : bytes(0) {
    auto take = [&](int64_t floats) {
      float* at = base ? reinterpret_cast<float*>(static_cast<char*>(base) + bytes) : nullptr;
      bytes += floats * int64_t(sizeof(float));
      return at;
    };
    q = take(int64_t(kTile) * kv.d_pad);           // scaled
    scores = take(int64_t(kTile) * kScoreStride);  // then p
    keys = take(int64_t(kChunk) * kv.d_pad);       // K [head_dim][kChunk] or V [kChunk][d_pad]
    part = take(int64_t(kTile) * kv.d_pad);        // this split's p V
    out = take(int64_t(kTile) * kv.d_pad);         // merged so far
    maximum = take(kTile);
    total = take(kTile);
  }
};

inline int64_t attention_scratch(const AttentionArgs& args) {
  return AttentionScratch(args.kv, nullptr).bytes;
}

struct KeyRange {
  int64_t lo, hi;
};

inline KeyRange clip(KeyRange a, int64_t lo, int64_t hi) {
  return {a.lo > lo ? a.lo : lo, a.hi < hi ? a.hi : hi};
}

// Query rows [first, first + count) of a span under query heads [head, head + heads): row m of the tile is
// query row first + m / heads under head + m % heads, and sees the positions sees[m].
struct AttentionTile {
  int64_t count, heads, rows, q_row;  // q_row: floats of one query row
  const float* q;
  float* out;
  KeyRange sees[kTile];

  AttentionTile(const AttentionArgs& args, const Span& span, int64_t first, int64_t count, int64_t head,
                int64_t heads)
      : count(count),
        heads(heads),
        rows(count * heads),
        q_row(heads * args.kv.head_dim),
        q(args.q + (span.row + first) * args.ldq + head * args.kv.head_dim),
        out(args.out + (span.row + first) * args.ldo + head * args.kv.head_dim) {
    for (int64_t m = 0; m < rows; m++) {
      const int64_t position = span.start + first + m / heads, lo = position - args.window + 1;
      sees[m] = {args.window > 0 && lo > 0 ? lo : 0, position + 1};
    }
  }
  // All that its rows see, from a multiple of 16.
  KeyRange keys() const { return {sees[0].lo / 16 * 16, sees[rows - 1].hi}; }
};

template <class T>
struct Pages {
  const T* pool;
  const int32_t* table;
  int64_t page_size, d, d_pad, page_elements, head_offset;

  Pages(const AttentionArgs& args, const Span& span, int32_t kv_head)
      : pool(static_cast<const T*>(args.pool)), table(args.block_table + span.table) {
    const KvLayout& kv = args.kv;
    page_size = kv.page_size, d = kv.head_dim, d_pad = kv.d_pad;
    const int64_t tiles = d * page_size + page_size * d_pad;
    page_elements = kv.kv_heads * tiles, head_offset = kv_head * tiles;
  }
  const T* tile(int64_t position) const {
    return pool + table[position / page_size] * page_elements + head_offset;
  }
  const T* keys(int64_t position) const { return tile(position) + position % page_size; }
  const T* values(int64_t position) const {
    return tile(position) + d * page_size + position % page_size * d_pad;
  }
};

// Chunks: keys [chunk.lo, chunk.hi), at most kChunk, from a multiple of 16.
template <class T>
inline void load_keys(const Pages<T>& pages, KeyRange chunk, float* to) {
  const T* from[kChunk / 16];
  const int64_t blocks = (chunk.hi - chunk.lo + 15) / 16;
  for (int64_t b = 0; b < blocks; b++) from[b] = pages.keys(chunk.lo + 16 * b);
  for (int64_t i = 0; i < pages.d; i++)
    for (int64_t b = 0; b < blocks; b++) store(to + i * kChunk + 16 * b, load(from[b] + i * pages.page_size));
}

template <class T>
inline void load_values(const Pages<T>& pages, KeyRange chunk, float* to) {
  for (int64_t j = chunk.lo; j < chunk.hi; j += 16, to += 16 * pages.d_pad) {
    const T* from = pages.values(j);
    const int64_t elements = (chunk.hi - j < 16 ? chunk.hi - j : 16) * pages.d_pad;
    for (int64_t i = 0; i < elements; i += 16) store(to + i, load(from + i));
  }
}

template <class T>
inline void prefetch(const T* from, int64_t elements) {
  for (int64_t i = 0; i < elements; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i);
}

template <class T>
inline void prefetch_keys(const Pages<T>& pages, KeyRange chunk) {
  for (int64_t j = chunk.lo; j < chunk.hi;) {
    const int64_t page_end = (j / pages.page_size + 1) * pages.page_size;
    const int64_t end = page_end < chunk.hi ? page_end : chunk.hi;
    const T* from = pages.keys(j);
    if (pages.page_size == 16)
      prefetch(from, pages.d * 16);
    else
      for (int64_t i = 0; i < pages.d; i++) prefetch(from + i * pages.page_size, end - j);
    j = end;
  }
}

template <class T>
inline void prefetch_values(const Pages<T>& pages, KeyRange chunk) {
  for (int64_t j = chunk.lo; j < chunk.hi; j += 16) prefetch(pages.values(j), 16 * pages.d_pad);
}

// Scores [lo, hi) of one row become p; the rest of the blocks they lie in becomes 0.
struct RowStatistics {
  float maximum, total;
};
inline RowStatistics softmax_row(float* s, int64_t lo, int64_t hi, float softcap) {
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
  const float maximum = max(max(max(best[0], best[1]), max(best[2], best[3])));

  const vf top = set1(maximum);
  vf total = set1(0.0f);
  for (j = first; j < end; j += 16) {
    const vf p = exp(load(s + j) - top);
    total = total + p;
    store(s + j, p);
  }
  return {maximum, sum(total)};
}

inline int64_t block_rows(const AttentionTile& tile, int64_t m) {
  return tile.rows - m < kMaxRows ? tile.rows - m : kMaxRows;
}

inline void add_scores(const AttentionTile& tile, const AttentionScratch& w, int64_t d, int64_t d_pad,
                       int64_t base, KeyRange chunk) {
  for (int64_t m = 0, rows; m < tile.rows; m += rows) {
    rows = block_rows(tile, m);
    const KeyRange keys = clip({tile.sees[m].lo / 16 * 16, tile.sees[m + rows - 1].hi}, chunk.lo, chunk.hi);
    if (keys.lo < keys.hi)
      gemm(rows, w.q + m * d_pad, d_pad, w.keys + (keys.lo - chunk.lo), kChunk,
           w.scores + m * kScoreStride + (keys.lo - base), kScoreStride, (keys.hi - keys.lo + 15) / 16, d,
           false);
  }
}

// Keys that all the rows of a register block see go through together; at the edges each row takes only its
// own, for a zero times a masked key's value would not be zero if that is infinite.
inline void add_values(const AttentionTile& tile, const AttentionScratch& w, int64_t d_pad, int64_t base,
                       KeyRange chunk) {
  auto run = [&](int64_t row, int64_t rows, KeyRange keys) {
    if (keys.lo < keys.hi)
      gemm(rows, w.scores + row * kScoreStride + (keys.lo - base), kScoreStride,
           w.keys + (keys.lo - chunk.lo) * d_pad, d_pad, w.part + row * d_pad, d_pad, d_pad / 16,
           keys.hi - keys.lo, true);
  };
  for (int64_t m = 0, rows; m < tile.rows; m += rows) {
    rows = block_rows(tile, m);
    // Rows ascend in position, so the last starts latest and the first ends earliest.
    KeyRange all = clip({tile.sees[m + rows - 1].lo, tile.sees[m].hi}, chunk.lo, chunk.hi);
    if (all.lo > chunk.hi) all.lo = chunk.hi;
    if (all.hi < all.lo) all.hi = all.lo;
    for (int64_t r = m; r < m + rows; r++) run(r, 1, clip(tile.sees[r], chunk.lo, all.lo));
    run(m, rows, all);
    for (int64_t r = m; r < m + rows; r++) run(r, 1, clip(tile.sees[r], all.hi, chunk.hi));
  }
}

inline void merge(const AttentionScratch& w, int64_t m, int64_t d_pad, bool first, RowStatistics split) {
  float *out = w.out + m * d_pad, *part = w.part + m * d_pad;
  if (first) {
    __builtin_memcpy(out, part, size_t(d_pad) * sizeof(float));
    w.maximum[m] = split.maximum, w.total[m] = split.total;
    return;
  }
  const float top = split.maximum > w.maximum[m] ? split.maximum : w.maximum[m];
  const vf keep = exp(set1(w.maximum[m] - top)), take = exp(set1(split.maximum - top));
  for (int64_t i = 0; i < d_pad; i += 16) store(out + i, fma(load(out + i), keep, load(part + i) * take));
  float total[kLanes];
  store(total, fma(set1(w.total[m]), keep, set1(split.total) * take));
  w.maximum[m] = top, w.total[m] = total[0];
}

template <class T>
inline void attend_split(const AttentionArgs& args, const AttentionTile& tile, const Pages<T>& pages,
                         const AttentionScratch& w, int64_t base) {
  const KeyRange all = tile.keys(), keys = clip(all, base, base + kSplit);
  auto chunk_at = [&](int64_t j) { return clip(all, j, j + kChunk); };

  for (int64_t j = keys.lo; j < keys.hi; j += kChunk) {
    const KeyRange chunk = clip(keys, j, j + kChunk);
    load_keys(pages, chunk, w.keys);
    if (chunk.hi < keys.hi)
      prefetch_keys(pages, chunk_at(chunk.hi));
    else
      prefetch_values(pages, chunk_at(keys.lo));
    add_scores(tile, w, pages.d, pages.d_pad, base, chunk);
  }

  RowStatistics split[kTile];
  for (int64_t m = 0; m < tile.rows; m++) {
    const KeyRange seen = clip(tile.sees[m], base, base + kSplit);
    if (seen.lo < seen.hi)
      split[m] = softmax_row(w.scores + m * kScoreStride, seen.lo - base, seen.hi - base, args.softcap);
  }

  for (int64_t i = 0; i < tile.rows * pages.d_pad; i += 16) store(w.part + i, set1(0.0f));
  for (int64_t j = keys.lo; j < keys.hi; j += kChunk) {
    const KeyRange chunk = clip(keys, j, j + kChunk);
    load_values(pages, chunk, w.keys);
    if (chunk.hi < keys.hi)
      prefetch_values(pages, chunk_at(chunk.hi));
    else
      prefetch_keys(pages, chunk_at(chunk.hi));
    add_values(tile, w, pages.d_pad, base, chunk);
  }

  for (int64_t m = 0; m < tile.rows; m++) {
    const KeyRange seen = clip(tile.sees[m], base, base + kSplit);
    if (seen.lo < seen.hi) merge(w, m, pages.d_pad, tile.sees[m].lo >= base, split[m]);
  }
}

template <class T>
inline void attend_tile(const AttentionArgs& args, const AttentionTile& tile, const Pages<T>& pages,
                        const AttentionScratch& w) {
  const int64_t d = pages.d, d_pad = pages.d_pad;
  for (int64_t m = 0; m < tile.rows; m++) {
    const float* q = tile.q + m / tile.heads * args.ldq + m % tile.heads * d;
    map_row(q, w.q + m * d_pad, d, [s = set1(args.scale)](int64_t, vf v, int64_t) { return v * s; });
  }
  for (int64_t r = 0; r < tile.count; r++) prefetch(tile.out + r * args.ldo, tile.q_row);

  const KeyRange keys = tile.keys();
  for (int64_t base = keys.lo / kSplit * kSplit; base < keys.hi; base += kSplit)
    attend_split(args, tile, pages, w, base);

  for (int64_t m = 0; m < tile.rows; m++) {
    float* out = tile.out + m / tile.heads * args.ldo + m % tile.heads * d;
    map_row(w.out + m * d_pad, out, d,
            [s = set1(1.0f / w.total[m])](int64_t, vf v, int64_t) { return v * s; });
  }
}

template <class T>
inline void attend(const AttentionArgs& args, const Span& span, int32_t kv_head, int64_t r0, int64_t r1,
                   void* scratch) {
  const AttentionScratch w(args.kv, scratch);
  const Pages<T> pages(args, span, kv_head);
  const int64_t group = args.heads / args.kv.kv_heads;
  for (int64_t h = 0, heads; h < group; h += heads) {
    heads = group - h < kTile ? group - h : kTile;
    const int64_t height = kTile / heads;
    for (int64_t r = r0; r < r1; r += height) {
      const int64_t count = r1 - r < height ? r1 - r : height;
      for (int64_t next = r + height; next < r + 2 * height && next < r1; next++)
        prefetch(args.q + (span.row + next) * args.ldq + (kv_head * group + h) * pages.d, heads * pages.d);
      attend_tile(args, AttentionTile(args, span, r, count, kv_head * group + h, heads), pages, w);
    }
  }
}

inline void attention(const AttentionArgs& args, const Span& span, int32_t kv_head, int64_t r0, int64_t r1,
                      void* scratch) {
  if (args.kv.dtype == Format::f32)
    attend<float>(args, span, kv_head, r0, r1, scratch);
  else if (args.kv.dtype == Format::f16)
    attend<f16>(args, span, kv_head, r0, r1, scratch);
  else
    attend<bf16>(args, span, kv_head, r0, r1, scratch);
}
