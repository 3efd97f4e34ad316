// Paged attention, exact under any tiling. For each query row the positions are cut into splits of 512
// at absolute multiples of 512. Within a split: scores, row maximum, p = e^(score - maximum), sum of p lane
// by lane, and sum of p V in ascending position; the splits merge in ascending order. Every one of these is a
// fixed sequence of operations on the row's own visible keys: masked keys are skipped or add exact zeros, so
// a row's bits depend neither on the rows it shares a tile with nor on page size, chunking or garbage in
// slots it cannot see.
//
// The rows of a tile are (query row, head of the group) pairs, so that a group's heads share the loads and
// conversions of K and V. Keys go through scratch as floats, a chunk at a time.

constexpr int kSplit = 512;                // part of the result's definition
constexpr int kChunk = 64;                 // keys converted at a time
constexpr int kTile = 64;                  // rows of a tile
constexpr int kScoreStride = kSplit + 16;  // off the power of two, which would crowd a few cache sets
constexpr int64_t kAttentionRows = 32;

struct AttentionScratch {
  float *q, *scores, *keys, *part, *out, *maximum, *total;
  int64_t bytes;
  AttentionScratch(const KvLayout& kv, void* base) : bytes(0) {
    auto take = [&](int64_t floats) {
      float* at = base ? reinterpret_cast<float*>(static_cast<char*>(base) + bytes) : nullptr;
      bytes += floats * int64_t(sizeof(float));
      return at;
    };
    q = take(int64_t(kv.d_pad) * kTile);           // scaled, [head_dim][kTile]
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

// Query rows [first, first + count) of a span under query heads [head, head + heads): row m of the tile is
// query row first + m / heads under head + m % heads, and sees the positions sees[m].
struct AttentionTile {
  int64_t first, count, head, heads, rows;
  KeyRange sees[kTile];

  AttentionTile(const AttentionArgs& args, const Span& span, int64_t first, int64_t count, int64_t head,
                int64_t heads)
      : first(first), count(count), head(head), heads(heads), rows(count * heads) {
    for (int64_t m = 0; m < rows; m++) {
      const int64_t position = span.start + first + m / heads, lo = position - args.window + 1;
      sees[m] = {args.window > 0 && lo > 0 ? lo : 0, position + 1};
    }
  }
};

inline KeyRange clip(KeyRange a, int64_t lo, int64_t hi) {
  return {a.lo > lo ? a.lo : lo, a.hi < hi ? a.hi : hi};
}

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

template <class T>
inline void load_keys(const Pages<T>& pages, int64_t position, int64_t blocks, float* to) {
  const T* from[kChunk / 16];
  for (int64_t b = 0; b < blocks; b++) from[b] = pages.keys(position + 16 * b);
  for (int64_t i = 0; i < pages.d; i++)
    for (int64_t b = 0; b < blocks; b++) store(to + i * kChunk + 16 * b, load(from[b] + i * pages.page_size));
}

template <class T>
inline void load_values(const Pages<T>& pages, int64_t position, int64_t count, float* to) {
  for (int64_t j = 0; j < count; j += 16) {
    const T* from = pages.values(position + j);
    const int64_t elements = (count - j < 16 ? count - j : 16) * pages.d_pad;
    for (int64_t i = 0; i < elements; i += 16) store(to + j * pages.d_pad + i, load(from + i));
  }
}

// Scores [lo, hi) of one row become p; the rest of the blocks they lie in becomes 0. Returns maximum and sum.
struct RowStatistics {
  float maximum, total;
};
inline RowStatistics softmax_row(float* s, int64_t lo, int64_t hi, float softcap) {
  const int64_t first = lo / 16 * 16;
  vf best = set1(-kInf);
  for (int64_t j = first; j < hi; j += 16) {
    vf x = load(s + j);
    if (softcap > 0) {
      x = set1(softcap) * tanh(x / set1(softcap));
      store(s + j, x);
    }
    if (j < lo || j + 16 > hi) {
      x = select(lanes(lo - j, hi - j), x, set1(-kInf));
      store(s + j, x);
    }
    best = max(x, best);
  }
  const float maximum = max(best);
  const vf top = set1(maximum);
  vf total = set1(0.0f);
  for (int64_t j = first; j < hi; j += 16) {
    const vf p = exp(load(s + j) - top);
    total = total + p;
    store(s + j, p);
  }
  return {maximum, sum(total)};
}

// Adds p V over keys [from, from + count), whose values lie in `values`, to `part`. Keys that all the rows
// of a register block see go through together; at the edges each row takes its own only.
inline void add_values(const AttentionTile& tile, const AttentionScratch& w, int64_t d_pad, int64_t base,
                       int64_t from, int64_t count) {
  const int64_t blocks = d_pad / 16;
  for (int64_t m = 0, rows; m < tile.rows; m += rows) {
    rows = tile.rows - m < kMaxRows ? tile.rows - m : kMaxRows;
    // Rows ascend in position, so the last starts latest and the first ends earliest.
    KeyRange all = clip({tile.sees[m + rows - 1].lo, tile.sees[m].hi}, from, from + count);
    if (all.hi < all.lo) all.hi = all.lo;
    auto run = [&](int64_t row, int64_t height, KeyRange keys) {
      if (keys.lo < keys.hi)
        gemm<kScoreStride, 1>(height, w.scores + row * kScoreStride + (keys.lo - base),
                              w.keys + (keys.lo - from) * d_pad, d_pad, w.part + row * d_pad, d_pad, blocks,
                              keys.hi - keys.lo, true);
    };
    for (int64_t r = m; r < m + rows; r++) run(r, 1, clip(tile.sees[r], from, all.lo));
    run(m, rows, all);
    for (int64_t r = m; r < m + rows; r++) run(r, 1, clip(tile.sees[r], all.hi, from + count));
  }
}

template <class T>
inline void attend_split(const AttentionArgs& args, const AttentionTile& tile, const Pages<T>& pages,
                         const AttentionScratch& w, int64_t base) {
  const int64_t d_pad = args.kv.d_pad, last = tile.rows - 1;
  const KeyRange keys = clip({tile.sees[0].lo / 16 * 16, tile.sees[last].hi}, base, base + kSplit);

  for (int64_t j = keys.lo; j < keys.hi; j += kChunk) {
    const int64_t blocks = (keys.hi - j < kChunk ? keys.hi - j + 15 : kChunk) / 16;
    load_keys(pages, j, blocks, w.keys);
    for (int64_t m = 0, rows; m < tile.rows; m += rows) {
      rows = tile.rows - m < kMaxRows ? tile.rows - m : kMaxRows;
      const KeyRange seen = clip({tile.sees[m].lo / 16 * 16, tile.sees[m + rows - 1].hi}, j, j + 16 * blocks);
      if (seen.lo < seen.hi)
        gemm<1, kTile>(rows, w.q + m, w.keys + (seen.lo - j), kChunk,
                       w.scores + m * kScoreStride + (seen.lo - base), kScoreStride,
                       (seen.hi - seen.lo + 15) / 16, args.kv.head_dim, false);
    }
  }

  float split_maximum[kTile], split_total[kTile];
  for (int64_t m = 0; m < tile.rows; m++) {
    const KeyRange seen = clip(tile.sees[m], base, base + kSplit);
    if (seen.lo >= seen.hi) continue;
    const RowStatistics s =
        softmax_row(w.scores + m * kScoreStride, seen.lo - base, seen.hi - base, args.softcap);
    split_maximum[m] = s.maximum, split_total[m] = s.total;
  }

  for (int64_t i = 0; i < tile.rows * d_pad; i += 16) store(w.part + i, set1(0.0f));
  for (int64_t j = keys.lo; j < keys.hi; j += kChunk) {
    const int64_t count = keys.hi - j < kChunk ? keys.hi - j : kChunk;
    load_values(pages, j, count, w.keys);
    add_values(tile, w, d_pad, base, j, count);
  }

  for (int64_t m = 0; m < tile.rows; m++) {
    const KeyRange row = tile.sees[m], seen = clip(row, base, base + kSplit);
    if (seen.lo >= seen.hi) continue;
    float *out = w.out + m * d_pad, *part = w.part + m * d_pad;
    if (row.lo >= base) {  // the row's first split
      __builtin_memcpy(out, part, size_t(d_pad) * sizeof(float));
      w.maximum[m] = split_maximum[m], w.total[m] = split_total[m];
      continue;
    }
    const float top = split_maximum[m] > w.maximum[m] ? split_maximum[m] : w.maximum[m];
    const vf keep = exp(set1(w.maximum[m] - top)), take = exp(set1(split_maximum[m] - top));
    for (int64_t i = 0; i < d_pad; i += 16) store(out + i, fma(load(out + i), keep, load(part + i) * take));
    float merged[kLanes];
    store(merged, fma(set1(w.total[m]), keep, set1(split_total[m]) * take));
    w.maximum[m] = top, w.total[m] = merged[0];
  }
}

template <class T>
inline void attend_tile(const AttentionArgs& args, const Span& span, const AttentionTile& tile,
                        int32_t kv_head, const AttentionScratch& w) {
  const int64_t d = args.kv.head_dim, d_pad = args.kv.d_pad;
  const Pages<T> pages(args, span, kv_head);
  for (int64_t m = 0; m < tile.rows; m++) {
    const float* q =
        args.q + (span.row + tile.first + m / tile.heads) * args.ldq + (tile.head + m % tile.heads) * d;
    for (int64_t i = 0; i < d; i++) w.q[i * kTile + m] = q[i] * args.scale;
  }

  const int64_t end = tile.sees[tile.rows - 1].hi;
  for (int64_t base = tile.sees[0].lo / kSplit * kSplit; base < end; base += kSplit)
    attend_split(args, tile, pages, w, base);

  for (int64_t m = 0; m < tile.rows; m++) {
    float* out =
        args.out + (span.row + tile.first + m / tile.heads) * args.ldo + (tile.head + m % tile.heads) * d;
    const vf inverse = set1(1.0f / w.total[m]);
    map_row(w.out + m * d_pad, out, d, [&](int64_t, vf v, int64_t) { return v * inverse; });
  }
}

inline void attention(const AttentionArgs& args, const Span& span, int32_t kv_head, int64_t r0, int64_t r1,
                      void* scratch) {
  const AttentionScratch w(args.kv, scratch);
  const int64_t group = args.heads / args.kv.kv_heads;
  for (int64_t h = 0, heads; h < group; h += heads) {
    heads = group - h < kTile ? group - h : kTile;
    const int64_t height = kTile / heads;
    for (int64_t r = r0; r < r1; r += height) {
      const int64_t count = r1 - r < height ? r1 - r : height;
      const AttentionTile tile(args, span, r, count, kv_head * group + h, heads);
      if (args.kv.dtype == Format::f32)
        attend_tile<float>(args, span, tile, kv_head, w);
      else if (args.kv.dtype == Format::f16)
        attend_tile<f16>(args, span, tile, kv_head, w);
      else
        attend_tile<bf16>(args, span, tile, kv_head, w);
    }
  }
}
