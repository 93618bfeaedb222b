// The one matrix product of attention, convolution and linear: C (m x N W) = sum_k a(row, k) * b(k,
// column), accumulated in registers and handed to an epilogue. a is read by broadcast, b by
// vectors.
//   AVX2: 6 rows x 2 vectors = 12 accumulators of 16 registers, 8 loads for 12 FMAs.
//   AVX-512 and NEON: 12 x 2 = 24 of 32.
#pragma once
#include "math/lane.h"

namespace genfast::cpu {
namespace {

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int MR = 12;
#else
constexpr int MR = 6;
#endif
constexpr int NV = 2;
constexpr int NR = NV * W;  // columns of a packed panel

#define GENFAST_INLINE inline __attribute__((always_inline))

// One chain of FMAs over all of a long head loses accuracy: against float64 the error is 2.05x
// PyTorch's at D = 512 and 2.6x at D = 80. So products are summed in blocks of this depth: 0.3x to
// 1.3x, at no cost that can be measured (128: 1 % faster at D = 128, 2.6x the error; 32: 5 %
// slower).
constexpr int64_t kDepth = 64;

// a(row, k) = a[row * lda + k], or a[k * lda + row] when Transposed; b(k, :) = b + k * ldb.
// epilogue(row0, accumulators[M][N]).
template <int M, int N, bool Transposed, class Epilogue>
GENFAST_INLINE void micro(int row0, int64_t depth, const float* a, int64_t lda, const float* b,
                          int64_t ldb, Epilogue&& epilogue) {
  f32v acc[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[i][n] = f32v{};
  const float* row[Transposed ? 1 : M];
  if constexpr (!Transposed) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) row[i] = a + (row0 + i) * lda;
  } else {
    row[0] = a + row0;
  }
  f32v total[M][N];
  for (int64_t first = 0;; first += kDepth) {
    const int64_t end = depth - first > kDepth ? first + kDepth : depth;
#pragma GCC unroll 4
    for (int64_t k = first; k < end; ++k) {
      f32v y[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) y[n] = load(b + n * W);
      b += ldb;
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const f32v x = splat(Transposed ? row[0][i] : row[i][k]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[i][n] = fused_multiply_add(x, y[n], acc[i][n]);
      }
      if constexpr (Transposed) row[0] += lda;
    }
    if (depth <= kDepth) break;
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        total[i][n] = first == 0 ? acc[i][n] : total[i][n] + acc[i][n];
        acc[i][n] = end == depth ? total[i][n] : f32v{};
      }
    if (end == depth) break;
  }
  epilogue(row0, acc);
}

// The last m rows, at most M of them, in one piece.
template <int M, int N, bool Transposed, class Epilogue>
GENFAST_INLINE void last_rows(int m, int row0, int64_t depth, const float* a, int64_t lda,
                              const float* b, int64_t ldb, Epilogue&& epilogue) {
  if (m == M)
    micro<M, N, Transposed>(row0, depth, a, lda, b, ldb, epilogue);
  else if constexpr (M > 1)
    last_rows<M - 1, N, Transposed>(m, row0, depth, a, lda, b, ldb, epilogue);
}

// m rows (any number) by one panel of N vectors. A chain of FMAs waits 4 cycles for each: 8 chains
// keep two units busy, so one vector wants 8 rows.
template <int N, bool Transposed, class Epilogue>
GENFAST_INLINE void panel_rows(int m, int64_t depth, const float* a, int64_t lda, const float* b,
                               int64_t ldb, Epilogue&& epilogue) {
  constexpr int most = N == 1 && MR < 8 ? 8 : MR;
  int r = 0;
  for (; r + most <= m; r += most) micro<most, N, Transposed>(r, depth, a, lda, b, ldb, epilogue);
  if constexpr (most > 8)
    for (; r + 8 <= m; r += 8) micro<8, N, Transposed>(r, depth, a, lda, b, ldb, epilogue);
  if constexpr (most >= 8)
    for (; r + 4 <= m; r += 4) micro<4, N, Transposed>(r, depth, a, lda, b, ldb, epilogue);
  last_rows<most >= 8 ? 3 : most - 1, N, Transposed>(m - r, r, depth, a, lda, b, ldb, epilogue);
}

template <bool Transposed, class Epilogue>
GENFAST_INLINE void multiply(int m, int columns, int64_t depth, const float* a, int64_t lda,
                             const float* b, int64_t ldb, Epilogue&& epilogue) {
  if (columns > W)
    panel_rows<2, Transposed>(m, depth, a, lda, b, ldb, epilogue);
  else
    panel_rows<1, Transposed>(m, depth, a, lda, b, ldb, epilogue);
}

// An epilogue: rows to memory, `ld` floats apart; or added to what is there.
inline auto store_rows(float* to, int64_t ld, bool add = false) {
  return [=](int row0, auto& acc) {
    float* at = to + row0 * ld;
#pragma GCC unroll 16
    for (auto& row : acc) {
#pragma GCC unroll 4
      for (int n = 0; n < static_cast<int>(sizeof(row) / sizeof(f32v)); ++n)
        store(at + n * W, add ? row[n] + load(at + n * W) : row[n]);
      at += ld;
    }
  };
}

}  // namespace
}  // namespace genfast::cpu
