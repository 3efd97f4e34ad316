// The two products of attention over blocks of 16 tokens: scores = q K and part += p V. Every element is one
// chain of Dot steps in ascending order, so its bits do not depend on how rows and columns are blocked.
//
// `next`: blocks that will be wanted later, asked for along the way.
//
// Operands of the rows are words in scratch. Row r of a call is part r % kParts of row r / kParts: p of
// integer formats has two parts, each of them a row to the loops here.

#if defined(__AVX512F__)
constexpr int kMaxRows = 8;
constexpr int blocks_for(int rows) { return rows <= 4 ? 4 : 2; }
#elif defined(__AVX2__)
constexpr int kMaxRows = 6;
constexpr int blocks_for(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#else
constexpr int kMaxRows = 2;
constexpr int blocks_for(int rows) { return rows == 1 ? 2 : 1; }
#endif
constexpr int kPartBytes = 16;  // from a part to the next

template <class Acc>
struct LaneOf {
  using Type = float;
};
template <>
struct LaneOf<vi> {
  using Type = int32_t;
};

template <class Dot, int kParts, int R, int B>
GOSSAMER_INLINE void dot(typename Dot::Acc (&c)[R][B], const uint8_t* a, int64_t lda,
                         const uint8_t* const (&b)[B], const uint8_t* const (&ahead)[B], int64_t step,
                         int64_t depth) {
  for (int64_t k = 0; k < depth; k++, a += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < B; j++) __builtin_prefetch(ahead[j] + k * step);
    typename Dot::Value value[B];
#pragma GCC unroll 4
    for (int j = 0; j < B; j++) value[j] = Dot::value(b[j] + k * step);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const typename Dot::Operand x = Dot::operand(a + r / kParts * lda + r % kParts * kPartBytes);
#pragma GCC unroll 4
      for (int j = 0; j < B; j++) c[r][j] = Dot::step(c[r][j], value[j], x);
    }
  }
}

GOSSAMER_INLINE vf scores_of(vf c, float factor, const float*) { return c * set1(factor); }
GOSSAMER_INLINE vf scores_of(vi c, float factor, const float* key_scales) {
  return to_float(c) * (set1(factor) * load(key_scales));
}
GOSSAMER_INLINE vf start_at(vf, int32_t) { return set1(0.0f); }
GOSSAMER_INLINE vi start_at(vi, int32_t x) { return set1(x); }

// Rows of q against the keys of some blocks.
struct ScoreTask {
  const uint8_t* q;
  int64_t q_bytes;  // from a row to the next
  int64_t depth;    // words of a row
  const float* factors;
  const int32_t* starts;  // integers: what takes back the offset of stored keys
  float* scores;
  int64_t stride;
};

template <class Dot, int R, int B>
inline void score_block(const ScoreTask& t, const uint8_t* const* blocks, const uint8_t* const* next,
                        const float* key_scales, float* scores) {
  typename Dot::Acc c[R][B];
  const uint8_t *b[B], *ahead[B];
#pragma GCC unroll 4
  for (int j = 0; j < B; j++) b[j] = blocks[j], ahead[j] = next[j];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < B; j++) c[r][j] = start_at(typename Dot::Acc{}, t.starts[r]);
  dot<Dot, 1>(c, t.q, t.q_bytes, b, ahead, 64, t.depth);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < B; j++)
      store(scores + r * t.stride + 16 * j, scores_of(c[r][j], t.factors[r], key_scales + 16 * j));
}

template <class Dot, int R, int B>
inline void score_blocks(const ScoreTask& t, const uint8_t* const* blocks, const uint8_t* const* next,
                         const float* key_scales, int64_t count, float* scores) {
  for (; count >= B; count -= B, blocks += B, next += B, key_scales += 16 * B, scores += 16 * B)
    score_block<Dot, R, B>(t, blocks, next, key_scales, scores);
  if constexpr (B > 1)
    if (count) score_blocks<Dot, R, B / 2>(t, blocks, next, key_scales, count, scores);
}

template <class Dot, int R = kMaxRows>
inline void score_rows(int64_t rows, const ScoreTask& t, const uint8_t* const* blocks,
                       const uint8_t* const* next, const float* key_scales, int64_t count) {
  if (rows == R)
    score_blocks<Dot, R, blocks_for(R)>(t, blocks, next, key_scales, count, t.scores);
  else if constexpr (R > 1)
    score_rows<Dot, R - 1>(rows, t, blocks, next, key_scales, count);
}

// Rows of p against the values of some blocks, added to `part`.
struct ValueTask {
  const uint8_t* p;
  int64_t p_bytes;        // from a row (all its parts) to the next
  int64_t p_block_bytes;  // from 16 keys to the next
  const uint8_t *const *blocks, *const *next;
  int64_t count, d_pad;
  void* part;  // [row][part][d_pad]
};

template <class Dot, int kParts, int R, int B>
inline void value_block(const ValueTask& t, int64_t column) {
  using Acc = typename Dot::Acc;
  using Lane = typename LaneOf<Acc>::Type;
  Lane* part = static_cast<Lane*>(t.part) + column * 16;
  Acc c[R][B];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < B; j++) c[r][j] = load(static_cast<const Lane*>(part + r * t.d_pad + 16 * j));
  const uint8_t* p = t.p;
  for (int64_t i = 0; i < t.count; i++, p += t.p_block_bytes) {
    const uint8_t *b[B], *ahead[B];
#pragma GCC unroll 4
    for (int j = 0; j < B; j++) {
      b[j] = t.blocks[i] + (column + j) * 64;
      ahead[j] = t.next[i] + (column + j) * 64;
    }
    dot<Dot, kParts>(c, p, t.p_bytes, b, ahead, t.d_pad * 4, kBlockTokens / Dot::kUnit);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < B; j++) store(part + r * t.d_pad + 16 * j, c[r][j]);
}

template <class Dot, int kParts, int R, int B>
inline void value_columns(const ValueTask& t, int64_t column) {
  const int64_t columns = t.d_pad / 16;
  for (; column + B <= columns; column += B) value_block<Dot, kParts, R, B>(t, column);
  if constexpr (B > 1)
    if (column < columns) value_columns<Dot, kParts, R, B / 2>(t, column);
}

// rows: of p, at most kMaxRows / kParts.
template <class Dot, int kParts, int R = kMaxRows / kParts * kParts>
inline void value_rows(int64_t rows, const ValueTask& t) {
  if (rows * kParts == R)
    value_columns<Dot, kParts, R, blocks_for(R)>(t, 0);
  else if constexpr (R > kParts)
    value_rows<Dot, kParts, R - kParts>(rows, t);
}
