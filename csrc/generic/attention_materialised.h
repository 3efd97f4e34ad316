// Attention as textbooks have it, which FlashAttention (Dao et al., 2022) is measured against: the scores of
// all rows, heads and sequences of a step lie in memory; then the softmax goes over them where they are; then
// the values are added up. Each is a pass of its own. What a pass does to a split of a row is what
// attention.h does, over the same blocks of keys and with the same shortcuts (keys that no row sees are not
// multiplied), so that the two differ by where scores lie and by nothing else.
//
// A row of scores has a float for every key of its span, later p in its place, then RowStatistics of every
// split. p is relative to the maximum of the whole row; where that is one split, bits are attention.h's.

inline int64_t score_row_keys(const Span& span) {
  return (span.start + span.count + kBlockTokens - 1) / kBlockTokens * kBlockTokens;
}
inline int64_t score_row_bytes(int64_t keys) {
  const int64_t splits = (keys + kSplit - 1) / kSplit;
  return (keys + kBlockTokens - 1) / kBlockTokens * kBlockTokens * int64_t(sizeof(float)) +
         (splits * int64_t(sizeof(RowStatistics)) + 63) / 64 * 64;
}

template <class Kind>
struct MaterialisedAttention {
  const AttentionArgs& args;
  const AttentionTile& tile;
  const Blocks& blocks;
  const AttentionScratch& w;
  float* scores;  // of the tile's first row
  int64_t stride, keys;

  Attention<Kind, true> at(int64_t base) const { return {args, tile, blocks, w, scores + base, stride}; }
  RowStatistics& statistics(int64_t m, int64_t base) const {
    return reinterpret_cast<RowStatistics*>(scores + m * stride + keys)[base / kSplit];
  }

  void multiply_keys() const {
    at(0).make_queries();
    at(0).splits(
        [&](const TileRows& rows, int64_t base, int64_t token) { at(base).add_scores(rows, base, token); });
  }

  void softmax() const {
    for (int64_t m = 0; m < tile.rows; m++)
      w.maximum[m] = hide_and_find_top(scores + m * stride, tile.sees[m].lo, tile.sees[m].hi, args.softcap);
    Errand none(blocks, {0, 0}, 1);
    at(0).splits([&](const TileRows& rows, int64_t base, int64_t token) {
      at(base).load_value_scales(rows, base, token);
      const KeyRange all = clip(rows.all, base, base + kSplit);
      for (int64_t m = rows.first; m < rows.first + rows.count; m++) {
        const KeyRange seen = clip(tile.sees[m], base, base + kSplit);
        statistics(m, base) =
            put_row<Kind>(scores + m * stride + base, {seen.lo - base, seen.hi - base},
                          {all.lo - base, all.hi - base}, w.maximum[m], w.value_scales, none);
      }
    });
  }

  void add_values() const {
    at(0).splits([&](const TileRows& rows, int64_t base, int64_t token) {
      for (int64_t m = rows.first; m < rows.first + rows.count; m++)
        at(base).start_part(m, statistics(m, base));
      at(base).add_split(rows, base, token,
                         [&](int64_t m) -> const RowStatistics& { return statistics(m, base); });
    });
    at(0).finish();
  }
};

inline void attention_pass(const AttentionArgs& args, const Span& span, int32_t kv_head, int64_t r0,
                           int64_t r1, AttentionPass pass, float* scores, void* scratch) {
  const AttentionScratch w(args.kv, scratch);
  const Blocks blocks(args, span, kv_head);
  const int64_t keys = score_row_keys(span), stride = score_row_bytes(keys) / int64_t(sizeof(float));
  // Rows in the order of tiles: kv head, heads that share a tile, query row, head.
  float* const own = scores + kv_head * (args.heads / args.kv.kv_heads) * span.count * stride;
  attention_tiles(args, span, kv_head, r0, r1, [&](const AttentionTile& tile, int64_t h) {
    float* const rows = own + (h * span.count + tile.first * tile.heads) * stride;
    with_kind(args.kv.dtype, [&](auto kind) {
      const MaterialisedAttention<decltype(kind)> work{args, tile, blocks, w, rows, stride, keys};
      switch (pass) {
        case AttentionPass::keys:
          return work.multiply_keys();
        case AttentionPass::softmax:
          return work.softmax();
        case AttentionPass::values:
          return work.add_values();
      }
    });
  });
}
