// Where the keys of a tile come from: blocks of pages, or for the tail of a tree a copy in the order of one
// token's path.

// The blocks of one sequence under one kv head.
struct Blocks {
  const uint8_t* pool;
  const int32_t* table;
  KvBlock at;
  int64_t page_size, page_bytes, d_pad;
  const int32_t* parents;  // of the tree's tokens, or null
  int64_t before;          // tokens of the tree before the span's first row
  int64_t start, tail;     // tail: from here positions are not slots; beyond everything without a tree

  Blocks(const AttentionArgs& args, const Span& span, int32_t kv_head)
      : table(args.block_table + span.table), at(kv_block(args.kv)) {
    const KvLayout& kv = args.kv;
    page_size = kv.page_size, d_pad = kv.d_pad;
    const int64_t head_bytes = page_size / kBlockTokens * at.bytes;
    page_bytes = kv.kv_heads * head_bytes;
    pool = static_cast<const uint8_t*>(args.pool) + kv_head * head_bytes;
    const bool tree = span.tree >= 0;
    before = tree ? span.tree : 0;
    parents = tree ? args.parents + span.row - before : nullptr;
    start = span.start - before;
    tail = tree ? start / kBlockTokens * kBlockTokens : int64_t(1) << 40;
  }
  // The block that a slot lies in.
  const uint8_t* block(int64_t slot) const {
    return pool + table[slot / page_size] * page_bytes + slot % page_size / kBlockTokens * at.bytes;
  }
};

struct Chunk {
  KeyRange keys;  // at most kChunk, from a multiple of 16
  const uint8_t* block[kChunk / kBlockTokens];
  const uint8_t* next[kChunk / kBlockTokens];  // what is asked for meanwhile
  int64_t count() const { return (keys.hi - keys.lo + kBlockTokens - 1) / kBlockTokens; }
};

// Copies what the token sees of blocks from the tail on; other tokens of these blocks hold anything.
template <class Kind>
inline void gather_path(const Blocks& blocks, int64_t token, uint8_t* to, Chunk& chunk) {
  const int64_t d_pad = blocks.d_pad;
  auto put = [&](int64_t slot, int64_t position) {
    uint8_t* block = to + (position - chunk.keys.lo) / kBlockTokens * blocks.at.bytes;
    copy_token<typename Kind::Row>(blocks.at, d_pad, blocks.block(slot), slot % kBlockTokens, block,
                                   position % kBlockTokens);
  };
  for (int64_t j = chunk.keys.lo; j < chunk.keys.hi && j < blocks.start; j++) put(j, j);
  int64_t position = blocks.start + depth_of(blocks.parents, token);
  for (; token >= 0 && position >= chunk.keys.lo; token = blocks.parents[token], position--)
    if (position < chunk.keys.hi) put(blocks.start + token, position);
}

// token: whose path it is where the keys lie beyond the tail.
template <class Kind>
inline Chunk find_chunk(const Blocks& blocks, KeyRange keys, int64_t token, uint8_t* gathered) {
  Chunk chunk{keys, {}, {}};
  if (keys.lo < blocks.tail) {
    for (int64_t b = 0; b < chunk.count(); b++) chunk.block[b] = blocks.block(keys.lo + b * kBlockTokens);
  } else {
    gather_path<Kind>(blocks, token, gathered, chunk);
    for (int64_t b = 0; b < chunk.count(); b++) chunk.block[b] = gathered + b * blocks.at.bytes;
  }
  return chunk;
}

inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const uint8_t*>(from) + i);
}

inline void prefetch_scales(const Blocks& blocks, const uint8_t* block) {
  prefetch(block + blocks.at.key_scales, blocks.at.values - blocks.at.key_scales);
}

// Asks memory for the values of `keys`, spread over `steps` steps of other work.
struct Errand {
  const Blocks& blocks;
  KeyRange keys;
  int64_t rate, left = 0;
  const uint8_t* line = nullptr;

  Errand(const Blocks& blocks, KeyRange keys, int64_t steps) : blocks(blocks), keys(keys), rate(0) {
    if (keys.hi > blocks.tail) this->keys.hi = blocks.tail;
    const int64_t count = (this->keys.hi - keys.lo + kBlockTokens - 1) / kBlockTokens;
    if (count > 0) rate = (count * lines() + steps - 1) / steps;
  }
  int64_t lines() const { return (blocks.at.bytes - blocks.at.values + 63) / 64; }
  void step() {
    for (int64_t i = 0; i < rate; i++) {
      if (left == 0) {
        if (keys.lo >= keys.hi) return;
        line = blocks.block(keys.lo) + blocks.at.values;
        left = lines();
        keys.lo += kBlockTokens;
      }
      __builtin_prefetch(line);
      line += 64, left--;
    }
  }
};

// Whether a block of float values, d_pad columns of words, holds an infinity or a NaN.
template <int kUnit>
inline bool has_special(const uint8_t* block, int64_t words) {
  vm special{};
  const vi exponent = set1(int32_t(0x7f800000));
  for (int64_t i = 0; i < words; i += 16) {
    const vi v = load_words(block + 4 * i);
    special = special | ((v & exponent) == exponent);
    if (kUnit == 2) special = special | ((shl(v, 16) & exponent) == exponent);
  }
  return bits(special) != 0;
}

// Zeroes the values of tokens outside [lo, hi) of a block of 16.
template <int kUnit>
inline void hide_values(uint8_t* block, int64_t d_pad, int64_t lo, int64_t hi) {
  for (int64_t t = 0; t < kBlockTokens; t++) {
    if (t >= lo && t < hi) continue;
    int32_t* row = reinterpret_cast<int32_t*>(block) + t / kUnit * d_pad;
    if (kUnit == 1) {
      __builtin_memset(row, 0, size_t(d_pad) * 4);
    } else {
      const vi keep = set1(t % 2 ? int32_t(0x0000ffff) : int32_t(0xffff0000));
      for (int64_t i = 0; i < d_pad; i += 16) store(row + i, load(row + i) & keep);
    }
  }
}
