// c[m][n] (+)= sum over k, ascending, of a[m][k] * b[k][n]: the products of attention, all in scratch.
// Each element is one chain of fma, so its bits do not depend on how rows and columns are blocked.

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

template <int R, int B>
inline void gemm_block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                       int64_t depth, bool add) {
  vf acc[R][B];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < B; j++) acc[r][j] = add ? load(c + r * ldc + j * 16) : set1(0.0f);
  for (int64_t k = 0; k < depth; k++, b += ldb) {
    vf row[B];
#pragma GCC unroll 4
    for (int j = 0; j < B; j++) row[j] = load(b + j * 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const vf x = set1(a[r * lda + k]);
#pragma GCC unroll 4
      for (int j = 0; j < B; j++) acc[r][j] = fma(x, row[j], acc[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < B; j++) store(c + r * ldc + j * 16, acc[r][j]);
}

template <int R, int B>
inline void gemm_columns(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                         int64_t blocks, int64_t depth, bool add) {
  for (; blocks >= B; blocks -= B, b += 16 * B, c += 16 * B)
    gemm_block<R, B>(a, lda, b, ldb, c, ldc, depth, add);
  if constexpr (B > 1)
    if (blocks) gemm_columns<R, B / 2>(a, lda, b, ldb, c, ldc, blocks, depth, add);
}

// rows <= R: at most kMaxRows rows against `blocks` blocks of 16 columns.
template <int R = kMaxRows>
inline void gemm(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                 int64_t ldc, int64_t blocks, int64_t depth, bool add) {
  if (rows == R)
    gemm_columns<R, blocks_for(R)>(a, lda, b, ldb, c, ldc, blocks, depth, add);
  else if constexpr (R > 1)
    gemm<R - 1>(rows, a, lda, b, ldb, c, ldc, blocks, depth, add);
}
