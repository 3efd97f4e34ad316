// What a tile of attention is: which rows, which keys they see, and the scratch they work in.

constexpr int kSplit = 512;  // part of the result's definition
constexpr int kChunk = 64;   // keys that the rows of a tile go through together
constexpr int kAhead = 128;  // keys between asking memory for one and using it, in a first split
constexpr int kTile = 64;    // rows of a tile
constexpr int kScoreStride = kSplit + 16;  // off the power of two, which would crowd a few cache sets
constexpr int64_t kAttentionRows = 32;     // of a call: enough to share K and V, few enough to share out

struct KeyRange {
  int64_t lo, hi;
};

inline KeyRange clip(KeyRange a, int64_t lo, int64_t hi) {
  return {a.lo > lo ? a.lo : lo, a.hi < hi ? a.hi : hi};
}

struct AttentionScratch {
  uint8_t *q, *unpacked, *single, *gathered;
  float *factors, *scores, *key_scales, *value_scales, *part, *out, *maximum, *total;
  int32_t* starts;
  int64_t bytes;

  AttentionScratch(const KvLayout& kv, void* base) : bytes(0) {
    auto take = [&](int64_t size) {
      uint8_t* at = base ? static_cast<uint8_t*>(base) + bytes : nullptr;
      bytes += (size + 63) / 64 * 64;
      return at;
    };
    auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count * 4)); };
    const int64_t row = kv.d_pad, block = kBlockTokens * row * 4;
    q = take(kTile * row * 4);                       // as Dot's words
    unpacked = take(kChunk / kBlockTokens * block);  // blocks of K or V that cannot be read as they lie
    single = take(block);                            // one of V with what a single row sees
    gathered = take(kChunk / kBlockTokens * kv_block(kv).bytes);  // blocks of a tree's path
    starts = reinterpret_cast<int32_t*>(take(kTile * 4));
    factors = floats(kTile);
    scores = floats(kTile * kScoreStride);  // then p
    key_scales = floats(kChunk);
    value_scales = floats(kSplit);
    part = floats(kTile * 2 * row);  // this split's p V
    out = floats(kTile * row);       // merged so far
    maximum = floats(kTile);
    total = floats(kTile);
  }
};

inline int64_t attention_scratch(const AttentionArgs& args) {
  return AttentionScratch(args.kv, nullptr).bytes;
}

// How deep a token stands in its tree: 0 under the token before the span.
inline int64_t depth_of(const int32_t* parents, int64_t token) {
  int64_t depth = 0;
  for (; parents[token] >= 0; token = parents[token]) depth++;
  return depth;
}

// Query rows [first, first + count) of a span under query heads [head, head + heads): row m of the tile is
// query row first + m / heads under head + m % heads, and sees the positions sees[m].
struct AttentionTile {
  int64_t first, count, heads, rows;
  const float* q;
  float* out;
  KeyRange sees[kTile];

  AttentionTile(const AttentionArgs& args, const Span& span, int64_t first, int64_t count, int64_t head,
                int64_t heads)
      : first(first),
        count(count),
        heads(heads),
        rows(count * heads),
        q(args.q + (span.row + first) * args.ldq + head * args.kv.head_dim),
        out(args.out + (span.row + first) * args.ldo + head * args.kv.head_dim) {
    for (int64_t i = 0; i < count; i++) {
      const int64_t before = span.tree < 0 ? 0 : span.tree, token = before + first + i;
      const int64_t at = span.tree < 0 ? token : depth_of(args.parents + span.row - before, token);
      const int64_t position = span.start - before + at, lo = position - args.window + 1;
      for (int64_t m = i * heads; m < (i + 1) * heads; m++)
        sees[m] = {args.window > 0 && lo > 0 ? lo : 0, position + 1};
    }
  }
};

// Rows [first, first + count) of a tile, that go through keys together. all: what any of them sees, from a
// multiple of 16; common: what all of them see.
struct TileRows {
  int64_t first, count;
  KeyRange all, common;

  TileRows(const AttentionTile& tile, int64_t first, int64_t count)
      : first(first), count(count), all(tile.sees[first]), common(tile.sees[first]) {
    for (int64_t m = first + 1; m < first + count; m++) {
      const KeyRange sees = tile.sees[m];
      if (sees.lo < all.lo) all.lo = sees.lo;
      if (sees.hi > all.hi) all.hi = sees.hi;
      common = clip(common, sees.lo, sees.hi);
    }
    seen_from = all.lo;
    all.lo = all.lo / kBlockTokens * kBlockTokens;
  }
  int64_t seen_from;  // all.lo before it was rounded
};
