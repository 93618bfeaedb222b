// The products of bf16 operands as they are, with fp32 sums: on a matrix unit (AMX; 16 x 16 results
// from 32 elements of depth at a time, 16 times the speed of the FMA units), or by AVX512-BF16
// (sums of two products, twice the speed). What is left of a call is the softmax, so results go to
// memory and everything else is a pass over rows.
//
// A word is two bf16 that lie side by side in depth. Operand a has rows of words; operand b has, in
// panels of NR columns, for each pair of depth a row of NR words. Depth is padded with zeros to 16
// words, rows and columns of results to 16: the matrix unit is configured once, for whole tiles.
#pragma once
#include "cpu/microkernel.h"
#include "cpu/scratch.h"

#if defined(__AVX512BF16__)
namespace genfast::cpu {
namespace {

constexpr int kTile = 16;

#if defined(__AMX_BF16__)
// The depth in words that a product of this many elements takes: zeros behind it, to whole tiles.
inline int64_t depth_of(int64_t elements) { return round_up(elements, 2 * kTile) / 2; }
constexpr int64_t kMatrixKeys = 1;

// The unit's configuration belongs to a thread. Ours holds while this lives, then the earlier one
// (of a library that keeps its own, or none) is back. 50 ns each way.
class MatrixTurn {
 public:
  MatrixTurn() {
    _tile_storeconfig(before_);
    alignas(64) unsigned char ours[64] = {1};  // palette 1
    for (int t = 0; t < 8; ++t) ours[16 + 2 * t] = 4 * kTile, ours[48 + t] = kTile;
    __asm__ volatile("" : : "r"(ours), "r"(before_) : "memory");
    _tile_loadconfig(ours);
  }
  ~MatrixTurn() {
    __asm__ volatile("" : : "r"(before_) : "memory");
    _tile_loadconfig(before_);
  }
  MatrixTurn(const MatrixTurn&) = delete;
  MatrixTurn& operator=(const MatrixTurn&) = delete;

 private:
  alignas(64) unsigned char before_[64];
};

// One result of R x C tiles, R and C one or two: c = a b, or c += a b.
template <int R, int C>
GENFAST_INLINE void tiles(int64_t depth, const float* a, int64_t lda, const float* b, float* c,
                          int64_t ldc, bool add) {
  const int64_t step_a = 4 * lda, step_c = 4 * ldc, step_b = 4 * NR;
  const float *a1 = a + kTile * lda, *b1 = b + kTile;
  float *c1 = c + kTile, *c2 = c + kTile * ldc, *c3 = c2 + kTile;
  if (add) {
    _tile_loadd(0, c, step_c);
    if constexpr (C > 1) _tile_loadd(1, c1, step_c);
    if constexpr (R > 1) _tile_loadd(2, c2, step_c);
    if constexpr (R > 1 && C > 1) _tile_loadd(3, c3, step_c);
  } else {
    _tile_zero(0);
    if constexpr (C > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && C > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTile) {
    _tile_loadd(4, a + k, step_a);
    _tile_loadd(6, b + k * NR, step_b);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C > 1) {
      _tile_loadd(7, b1 + k * NR, step_b);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R > 1) {
      _tile_loadd(5, a1 + k, step_a);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (C > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, step_c);
  if constexpr (C > 1) _tile_stored(1, c1, step_c);
  if constexpr (R > 1) _tile_stored(2, c2, step_c);
  if constexpr (R > 1 && C > 1) _tile_stored(3, c3, step_c);
}

// c (m x columns) = or += a b; panel: words between the panels of b. The intrinsics of GCC 12 do
// not tell the compiler that they read and write memory: the two empty statements do.
inline void multiply_tiles(int m, int64_t columns, int64_t depth, const float* a, int64_t lda,
                           const float* b, int64_t panel, float* c, int64_t ldc, bool add) {
  __asm__ volatile("" ::: "memory");
  for (int r = 0; r < m; r += 2 * kTile)
    for (int64_t j = 0; j < columns; j += NR) {
      const float *rows = a + r * lda, *from = b + j / NR * panel;
      float* to = c + r * ldc + j;
      if (m - r > kTile && columns - j > kTile)
        tiles<2, 2>(depth, rows, lda, from, to, ldc, add);
      else if (m - r > kTile)
        tiles<2, 1>(depth, rows, lda, from, to, ldc, add);
      else if (columns - j > kTile)
        tiles<1, 2>(depth, rows, lda, from, to, ldc, add);
      else
        tiles<1, 1>(depth, rows, lda, from, to, ldc, add);
    }
  __asm__ volatile("" ::: "memory");
}
#else
inline int64_t depth_of(int64_t elements) { return (elements + 1) / 2; }
// Fewer keys are left to fp32 scores by columns: two Zen 5 cores take 1.1 to 1.3 times as long at
// 16 keys here, the same at 32, and 0.6 to 0.7 from 64 on (heads of 64).
constexpr int64_t kMatrixKeys = 32;
struct MatrixTurn {};  // vectors have no state of their own

// One result of M rows and N vectors: c = a b, or c += a b.
template <int M, int N>
GENFAST_INLINE void lanes(int64_t depth, const float* a, int64_t lda, const float* b, float* c,
                          int64_t ldc, bool add) {
  const float* row[M];
  __m512 acc[M][N];
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
    row[i] = a + i * lda;
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) acc[i][n] = (__m512)(add ? load(c + i * ldc + n * W) : f32v{});
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    __m512bh y[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) y[n] = (__m512bh)load(b + k * NR + n * W);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const __m512bh x = (__m512bh)splat(row[i][k]);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) acc[i][n] = _mm512_dpbf16_ps(acc[i][n], x, y[n]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) store(c + i * ldc + n * W, (f32v)acc[i][n]);
}

template <int N>
inline void panel_lanes(int m, int64_t depth, const float* a, int64_t lda, const float* b, float* c,
                        int64_t ldc, bool add) {
  int r = 0;
  for (; m - r > 8; r += 12) lanes<12, N>(depth, a + r * lda, lda, b, c + r * ldc, ldc, add);
  if (m - r > 4)
    lanes<8, N>(depth, a + r * lda, lda, b, c + r * ldc, ldc, add);
  else if (m > r)
    lanes<4, N>(depth, a + r * lda, lda, b, c + r * ldc, ldc, add);
}

// c (m x columns) = or += a b; panel: words between the panels of b.
inline void multiply_tiles(int m, int64_t columns, int64_t depth, const float* a, int64_t lda,
                           const float* b, int64_t panel, float* c, int64_t ldc, bool add) {
  for (int64_t j = 0; j < columns; j += NR, b += panel, c += NR)
    if (columns - j > W)
      panel_lanes<2>(m, depth, a, lda, b, c, ldc, add);
    else
      panel_lanes<1>(m, depth, a, lda, b, c, ldc, add);
}
#endif

// The words (x[i], y[i]) of two rows of fp32 or bf16, rounded to nearest even.
GENFAST_INLINE f32v pair_words(f32v x, f32v y) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (f32v)_mm512_permutexvar_epi16(order, halves);
}
// x[0 ... 32) and y[0 ... 32), 16 words each -> the words (x[i], y[i]), 32 of them.
GENFAST_INLINE void interleave_halves(f32v x, f32v y, f32v& low, f32v& high) {
  const __m512i from_low =
      _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                       37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i from_high = _mm512_add_epi16(from_low, _mm512_set1_epi16(16));
  low = (f32v)_mm512_permutex2var_epi16((__m512i)x, from_low, (__m512i)y);
  high = (f32v)_mm512_permutex2var_epi16((__m512i)x, from_high, (__m512i)y);
}
// 32 elements of one row: words that hold x (first) and y.
GENFAST_INLINE f32v row_words(f32v x, f32v y) {
  return (f32v)(__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
}

// 2^x for x <= 0 (and a rounding error above it): relative error <= 3.5e-6, exactly 0 at -inf, NaN
// at NaN. Weights are rounded to bf16 (2e-3) right after it; seven instructions where the one for
// fp32 takes twelve.
GENFAST_INLINE f32v exp2_of_scores(f32v x) {
  const f32v f = (f32v)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  f32v p = fused_multiply_add(splat(0.013555858284235f), f, splat(0.05203215405344963f));
  p = fused_multiply_add(p, f, splat(0.24137990176677704f));
  p = fused_multiply_add(p, f, splat(0.6930320858955383f));
  p = fused_multiply_add(p, f, splat(1.0f));
  return scale_by_power(p, x);  // takes the floor of x
}

}  // namespace
}  // namespace genfast::cpu
#endif
