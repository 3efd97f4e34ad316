// Paged attention, exact under any tiling. For each query row the positions are cut into splits of 512
// at absolute multiples of 512. Within a split: scores, row maximum, p = e^(score - maximum), sum of p lane
// by lane, and sum of p V in ascending position; the splits merge in ascending order. Every one of these is a
// fixed sequence of operations on the row's own visible keys: others are skipped or add exact zeros, so
// a row's bits depend neither on the rows it shares a tile with nor on page size, chunking or garbage in
// slots it cannot see. In a tree a row's keys come in the order of positions too, its own path last, so that
// its bits are those of a chain.
//
// The rows of a tile are (query row, head of the group) pairs, so that a group's heads share K and V. While
// a chunk of keys is worked on, the next is on its way from memory, which a decode step over a long context
// does little else than wait for.

// kApart: keys and values are passes of their own over scores in memory (attention_materialised.h).
template <class Kind, bool kApart = false>
struct Attention {
  using Dot = typename Kind::Dot;
  static constexpr int kUnit = Dot::kUnit, kParts = Kind::kParts;

  const AttentionArgs& args;
  const AttentionTile& tile;
  const Blocks& blocks;
  const AttentionScratch& w;
  float* scores;          // from the split's first key on, then p
  int64_t row_of_scores;  // from a row of them to the next
  const int64_t d = args.kv.head_dim, d_pad = args.kv.d_pad;
  const int64_t q_bytes = d_pad / kUnit * 4, unpacked_bytes = d_pad * (kBlockTokens / kUnit) * 4;

  int64_t stride() const { return kApart ? row_of_scores : kScoreStride; }
  uint8_t* p_of(int64_t m) const { return reinterpret_cast<uint8_t*>(scores + m * stride()); }
  float* part_of(int64_t m) const { return w.part + m * kParts * d_pad; }

  void make_queries() const {
    for (int64_t m = 0; m < tile.rows; m++) {
      const float* q = tile.q + m / tile.heads * args.ldq + m % tile.heads * d;
      const Query made = Kind::query(q, d, d_pad, args.scale, w.q + m * q_bytes);
      w.factors[m] = made.factor;
      w.starts[m] = -Kind::kOffset * made.sum;
    }
  }

  // f(range of keys) for the chunks of a range, none of them on both sides of a tree's tail.
  template <class F>
  void chunks(KeyRange keys, F f) const {
    for (int64_t j = keys.lo, end; j < keys.hi; j = end) {
      end = j + kChunk < keys.hi ? j + kChunk : keys.hi;
      if (j < blocks.tail && end > blocks.tail) end = blocks.tail;
      f(KeyRange{j, end});
    }
  }

  // f(first row, number of rows, what any of them sees of `keys`, in whole blocks).
  template <class F>
  void register_rows(const TileRows& rows, KeyRange keys, F f) const {
    constexpr int64_t kStep = kMaxRows / kParts;
    for (int64_t m = rows.first, count; m < rows.first + rows.count; m += count) {
      count = rows.first + rows.count - m < kStep ? rows.first + rows.count - m : kStep;
      const KeyRange seen = clip(TileRows(tile, m, count).all, keys.lo, keys.hi);
      if (seen.lo < seen.hi) f(m, count, seen);
    }
  }

  // What is asked for while keys at j are read: in a first split keys further on, later the first half of the
  // split's values (at every other block), for the keys came during the split before. Apart: keys alone.
  const uint8_t* after_keys(const TileRows& rows, int64_t base, int64_t j) const {
    const KeyRange split = clip(rows.all, base, kApart ? rows.all.hi : base + kSplit);
    const bool first = kApart || rows.all.lo >= base;
    const int64_t block = (j - split.lo) / kBlockTokens;
    const int64_t at = first ? j + kAhead : split.lo + block / 2 * kBlockTokens;
    if (at >= split.hi || at >= blocks.tail || (!first && block % 2 == 0)) return nullptr;
    return blocks.block(at) + (first ? 0 : blocks.at.values);
  }
  // While values are read: the next split's keys. Apart: values further on.
  const uint8_t* after_values(const TileRows& rows, int64_t j) const {
    const int64_t at = j + (kApart ? kAhead : kSplit);
    if (at >= rows.all.hi || at >= blocks.tail) return nullptr;
    return blocks.block(at) + (kApart ? blocks.at.values : 0);
  }
  // During the softmax: the rest of the split's values.
  Errand values_errand(const TileRows& rows, int64_t base) const {
    const KeyRange split = clip(rows.all, base, base + kSplit);
    const int64_t count = (split.hi - split.lo + kBlockTokens - 1) / kBlockTokens;
    const int64_t skip = rows.all.lo >= base ? 0 : count / 2;
    return Errand(blocks, {split.lo + skip * kBlockTokens, split.hi}, rows.count * count);
  }

  void add_scores(const TileRows& rows, KeyRange keys, int64_t base, int64_t token) const {
    Chunk chunk = find_chunk<Kind>(blocks, keys, token, w.gathered);
    for (int64_t b = 0; b < chunk.count(); b++) {
      const int64_t j = keys.lo + b * kBlockTokens;
      const uint8_t* later = after_keys(rows, base, j);
      chunk.next[b] = later ? later : chunk.block[b];
      if constexpr (Kind::kInteger) {
        using Scale = typename Kind::Scale;
        const uint8_t* block = chunk.block[b];
        if (rows.all.lo >= base && later) prefetch_scales(blocks, later);
        store(w.key_scales + (j - keys.lo),
              load(reinterpret_cast<const Scale*>(block + blocks.at.key_scales)));
        store(w.value_scales + (j - base),
              load(reinterpret_cast<const Scale*>(block + blocks.at.value_scales)));
      }
      if constexpr (!Kind::kDirect) {
        uint8_t* to = w.unpacked + b * unpacked_bytes;
        if (later) prefetch(later, blocks.at.key_scales);
        Kind::unpack_keys(chunk.block[b], d_pad, to);
        chunk.block[b] = chunk.next[b] = to;
      }
    }
    register_rows(rows, keys, [&](int64_t m, int64_t count, KeyRange seen) {
      const int64_t skip = (seen.lo - keys.lo) / kBlockTokens;
      const ScoreTask task{w.q + m * q_bytes, q_bytes,      d_pad / kUnit,
                           w.factors + m,     w.starts + m, scores + m * stride() + (seen.lo - base),
                           stride()};
      const uint8_t* const* next = m == rows.first ? chunk.next : chunk.block;
      score_rows<Dot>(count, task, chunk.block + skip, next + skip, w.key_scales + skip * kBlockTokens,
                      (seen.hi - seen.lo + kBlockTokens - 1) / kBlockTokens);
    });
  }

  // What softmax multiplies p by, where no scores were made just before.
  void load_value_scales(const TileRows& rows, int64_t base, int64_t token) const {
    if constexpr (Kind::kInteger) {
      chunks(clip(rows.all, base, base + kSplit), [&](KeyRange keys) {
        const Chunk chunk = find_chunk<Kind>(blocks, keys, token, w.gathered);
        using Scale = typename Kind::Scale;
        for (int64_t b = 0; b < chunk.count(); b++)
          store(w.value_scales + (keys.lo - base) + b * kBlockTokens,
                load(reinterpret_cast<const Scale*>(chunk.block[b] + blocks.at.value_scales)));
      });
    }
  }

  void add_values(int64_t m, int64_t count, const uint8_t* const* from, const uint8_t* const* next,
                  int64_t number, int64_t key) const {
    const uint8_t* p = p_of(m) + key / kBlockTokens * Kind::kBlockBytes;
    const ValueTask task{p, stride() * 4, Kind::kBlockBytes, from, next, number, d_pad, part_of(m)};
    value_rows<Dot, kParts>(count, task);
  }

  // Rows see a block whole, or p is zero where they do not and what they do not see is made zero or known to
  // be finite. A block with an infinity or a NaN that only some rows see goes to each row by itself.
  void add_values(const TileRows& rows, KeyRange keys, int64_t base, int64_t token) const {
    Chunk chunk = find_chunk<Kind>(blocks, keys, token, w.gathered);
    bool alone[kChunk / kBlockTokens] = {};
    bool any_alone = false;
    for (int64_t b = 0; b < chunk.count(); b++) {
      const int64_t j = keys.lo + b * kBlockTokens;
      chunk.block[b] += blocks.at.values;
      const uint8_t* later = after_values(rows, j);
      chunk.next[b] = later ? later : chunk.block[b];
      if (later) prefetch_scales(blocks, later);
      const bool whole = Kind::kInteger || (j >= rows.common.lo && j + kBlockTokens <= rows.common.hi);
      if (Kind::kDirect && whole) continue;
      uint8_t* to = w.unpacked + b * unpacked_bytes;
      if (later) prefetch(later, blocks.at.key_scales);
      if constexpr (Kind::kDirect)
        __builtin_memcpy(to, chunk.block[b], size_t(unpacked_bytes));
      else
        Kind::unpack_values(chunk.block[b], d_pad, to);
      chunk.block[b] = chunk.next[b] = to;
      if constexpr (!Kind::kInteger) {
        if (whole) continue;
        hide_values<kUnit>(to, d_pad, rows.seen_from - j, rows.all.hi - j);
        alone[b] = has_special<kUnit>(to, unpacked_bytes / 4);
        any_alone = any_alone || alone[b];
      }
    }
    if (!any_alone) {
      register_rows(rows, keys, [&](int64_t m, int64_t count, KeyRange seen) {
        const int64_t skip = (seen.lo - keys.lo) / kBlockTokens;
        add_values(m, count, chunk.block + skip, (m == rows.first ? chunk.next : chunk.block) + skip,
                   (seen.hi - seen.lo + kBlockTokens - 1) / kBlockTokens, seen.lo - base);
      });
      return;
    }
    for (int64_t m = rows.first; m < rows.first + rows.count; m++) {
      for (int64_t b = 0; b < chunk.count(); b++) {
        const int64_t j = keys.lo + b * kBlockTokens;
        const KeyRange seen = clip(tile.sees[m], j, j + kBlockTokens);
        if (seen.lo >= seen.hi) continue;
        const uint8_t* block = chunk.block[b];
        if (alone[b]) {
          __builtin_memcpy(w.single, block, size_t(unpacked_bytes));
          if constexpr (!Kind::kInteger) hide_values<kUnit>(w.single, d_pad, seen.lo - j, seen.hi - j);
          block = w.single;
        }
        add_values(m, 1, &block, &block, 1, j - base);
      }
    }
  }

  void start_part(int64_t m, const RowStatistics& split) const {
    float* part = part_of(m);
    if constexpr (Kind::kInteger) {
      for (int i = 0; i < kParts; i++) {
        int32_t* sums = reinterpret_cast<int32_t*>(part) + i * d_pad;
        const vi start = set1(-Kind::kOffset * split.sums[i]);
        for (int64_t j = 0; j < d_pad; j += 16) store(sums + j, start);
      }
    } else {
      for (int64_t j = 0; j < d_pad; j += 16) store(part + j, set1(0.0f));
    }
  }

  void merge(int64_t m, bool first, const RowStatistics& split) const {
    float *out = w.out + m * d_pad, *part = part_of(m);
    if constexpr (Kind::kInteger) {
      const int32_t* sums = reinterpret_cast<const int32_t*>(part);
      for (int64_t j = 0; j < d_pad; j += 16)
        store(part + j,
              to_float(shl(load(sums + j), kPartBits) + load(sums + d_pad + j)) * set1(split.scale));
    }
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

  void add_scores(const TileRows& rows, int64_t base, int64_t token) const {
    chunks(clip(rows.all, base, base + kSplit),
           [&](KeyRange chunk) { add_scores(rows, chunk, base, token); });
  }

  // of(m): statistics of row m within the split, whose part has been started.
  template <class F>
  void add_split(const TileRows& rows, int64_t base, int64_t token, F of) const {
    chunks(clip(rows.all, base, base + kSplit),
           [&](KeyRange chunk) { add_values(rows, chunk, base, token); });
    for (int64_t m = rows.first; m < rows.first + rows.count; m++) {
      const KeyRange seen = clip(tile.sees[m], base, base + kSplit);
      if (seen.lo < seen.hi) merge(m, tile.sees[m].lo >= base, of(m));
    }
  }

  void attend_split(const TileRows& rows, int64_t base, int64_t token) const {
    const KeyRange keys = clip(rows.all, base, base + kSplit);
    add_scores(rows, base, token);
    RowStatistics split[kTile];
    Errand errand = values_errand(rows, base);
    for (int64_t m = rows.first; m < rows.first + rows.count; m++) {
      const KeyRange seen = clip(tile.sees[m], base, base + kSplit);
      split[m] = softmax_row<Kind>(scores + m * stride(), {seen.lo - base, seen.hi - base},
                                   {keys.lo - base, keys.hi - base}, args.softcap, w.value_scales, errand);
      start_part(m, split[m]);
    }
    add_split(rows, base, token, [&](int64_t m) -> const RowStatistics& { return split[m]; });
  }

  // f(rows, first key, token) for every split that the tile's rows see. token: of the tree, when the rows are
  // its own and the split reaches the tail; else -1.
  template <class F>
  void splits(F f) const {
    const TileRows all(tile, 0, tile.rows);
    for (int64_t base = all.all.lo / kSplit * kSplit; base < all.all.hi; base += kSplit) {
      if (base + kSplit <= blocks.tail) {
        f(all, base, int64_t(-1));
        continue;
      }
      for (int64_t i = 0; i < tile.count; i++)
        f(TileRows(tile, i * tile.heads, tile.heads), base, blocks.before + tile.first + i);
    }
  }

  void finish() const {
    for (int64_t m = 0; m < tile.rows; m++) {
      float* out = tile.out + m / tile.heads * args.ldo + m % tile.heads * d;
      map_row(w.out + m * d_pad, out, d,
              [s = set1(1.0f / w.total[m])](int64_t, vf v, int64_t) { return v * s; });
    }
  }

  void run() const {
    make_queries();
    for (int64_t r = 0; r < tile.count; r++)
      prefetch(tile.out + r * args.ldo, tile.heads * d * int64_t(sizeof(float)));
    splits([&](const TileRows& rows, int64_t base, int64_t token) { attend_split(rows, base, token); });
    finish();
  }
};

// f(tile, its first head of the group) for the query rows [r0, r1) of a span under one kv head.
template <class F>
inline void attention_tiles(const AttentionArgs& args, const Span& span, int32_t kv_head, int64_t r0,
                            int64_t r1, F f) {
  const int64_t group = args.heads / args.kv.kv_heads;
  for (int64_t h = 0, heads; h < group; h += heads) {
    heads = group - h < kTile ? group - h : kTile;
    const int64_t height = kTile / heads;
    for (int64_t r = r0; r < r1; r += height) {
      const int64_t count = r1 - r < height ? r1 - r : height;
      for (int64_t next = r + height; next < r + 2 * height && next < r1; next++)
        prefetch(args.q + (span.row + next) * args.ldq + (kv_head * group + h) * args.kv.head_dim,
                 heads * args.kv.head_dim * int64_t(sizeof(float)));
      f(AttentionTile(args, span, r, count, kv_head * group + h, heads), h);
    }
  }
}

inline void attention(const AttentionArgs& args, const Span& span, int32_t kv_head, int64_t r0, int64_t r1,
                      void* scratch) {
  const AttentionScratch w(args.kv, scratch);
  const Blocks blocks(args, span, kv_head);
  attention_tiles(args, span, kv_head, r0, r1, [&](const AttentionTile& tile, int64_t) {
    with_kind(args.kv.dtype, [&](auto kind) {
      Attention<decltype(kind)>{args, tile, blocks, w, w.scores, kScoreStride}.run();
    });
  });
}
