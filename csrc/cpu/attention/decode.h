// The two products for a few query rows (decoding): every key and value row is read once, from
// where it lies and in its own dtype, for all query rows of the group. Bound by memory, so nothing
// is packed; value rows are prefetched while the keys of the same block are being used.
#pragma once
#include <type_traits>

#include "cpu/attention/geometry.h"

namespace genfast::cpu {
namespace {

// In place up to this many query rows per key/value head and from this many keys on; beside it,
// packing pays for itself.
constexpr int64_t kDecodeRows = 8, kDecodeKeys = 64;
inline bool decodes(int64_t rows, int64_t keys) {
  return rows <= kDecodeRows && keys >= kDecodeKeys;
}

struct LoadF32 {
  static constexpr int bytes = 4;
  static GENFAST_INLINE f32v at(const char* row, int d) {
    return load(reinterpret_cast<const float*>(row) + d);
  }
};

typedef uint16_t u16v __attribute__((vector_size(2 * W)));

struct LoadBf16 {
  static constexpr int bytes = 2;
  static GENFAST_INLINE f32v at(const char* row, int d) {
    u16v h;
    __builtin_memcpy(&h, row + 2 * d, sizeof h);
#if defined(__AVX512F__)
    return (f32v)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(__AVX2__)
    return (f32v)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
    return from_bits(__builtin_convertvector(h, u32v) << 16);
#endif
  }
};

struct LoadF16 {
  static constexpr int bytes = 2;
  static GENFAST_INLINE f32v at(const char* row, int d) {
#if defined(__AVX512F__)
    return (f32v)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(row + 2 * d)));
#elif defined(__F16C__) && defined(__AVX2__)
    return (f32v)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(row + 2 * d)));
#else
    f32v v;
    for (int i = 0; i < W; ++i) v[i] = f32_of_f16(reinterpret_cast<const uint16_t*>(row)[d + i]);
    return v;
#endif
  }
};

// The last, partial vector of a row; zeros behind it.
template <class Load>
GENFAST_INLINE f32v load_tail(const char* row, int d, int count) {
  alignas(64) char part[4 * W] = {};
  __builtin_memcpy(part, row + d * Load::bytes, count * Load::bytes);
  return Load::at(part, 0);
}

// x0+x1 x2+x3 y0+y1 y2+y3 of every four lanes, and the same of quadruples instead of lanes.
GENFAST_INLINE f32v fold_lanes(f32v x, f32v y) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, y, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         __builtin_shufflevector(x, y, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, y, 0, 2, 8, 10, 4, 6, 12, 14) +
         __builtin_shufflevector(x, y, 1, 3, 9, 11, 5, 7, 13, 15);
#else
  return __builtin_shufflevector(x, y, 0, 2, 4, 6) + __builtin_shufflevector(x, y, 1, 3, 5, 7);
#endif
}
GENFAST_INLINE f32v fold_quadruples([[maybe_unused]] f32v x, [[maybe_unused]] f32v y) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15);
#else
  return x;  // four lanes are one quadruple
#endif
}

// Sums over lanes of W vectors at once: result lane i = sum of v[i]. Halving while transposing
// takes 2 (W - 1) shuffles, a whole transpose W log2 W: with four query rows it was half of the
// work.
GENFAST_INLINE f32v sum_each(f32v (&v)[W]) {
  int n = W;
#pragma GCC unroll 2
  for (int level = 0; level < 2; ++level, n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) v[i] = fold_lanes(v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 2
  for (; n > 1; n /= 2)
#pragma GCC unroll 2
    for (int i = 0; i < n / 2; ++i) v[i] = fold_quadruples(v[2 * i], v[2 * i + 1]);
  return v[0];
}

// Bytes that a prefetch brings.
constexpr int kLine = 64;

// scores of R rows x K keys, R * K <= W. Fetch: asks for the value rows of the same keys and for
// the keys `ahead`, a line for every line that is used. Bursts of rows fill the queue of misses,
// and the products wait behind them (fp32, four query rows, AVX2: 38 ns a key instead of 32 from
// memory, 29 instead of 18 where half of it lies in L3).
template <class Load, int R, int K, bool Fetch>
GENFAST_INLINE void dot_block(const float* q, int64_t ldq, const char* const* keys,
                              const char* const* ahead, const char* const* values, int dim,
                              int value_bytes, float* s, int64_t lds) {
  // One row of q: a key at a time with two chains (K streams side by side read half as fast).
  // Several rows: two keys at a time, so that q is loaded half as often.
  constexpr int P = R > 1 && K > 1 ? 2 : 1, C = R * P > 2 ? 1 : 2;
  constexpr int U = kLine / Load::bytes / W > C ? kLine / Load::bytes / W : C;
  constexpr int kLines = U * W * Load::bytes;
  f32v acc[W] = {};
  const int whole = dim / W * W;
#pragma GCC unroll 16
  for (int k = 0; k < K; k += P) {
    f32v chain[P][R][C] = {};
    int d = 0;
    for (; d + U * W <= whole; d += U * W) {
      if constexpr (Fetch)
#pragma GCC unroll 2
        for (int i = 0; i < P; ++i)
#pragma GCC unroll 2
          for (int at = 0; at < kLines; at += kLine) {
            __builtin_prefetch(ahead[k + i] + d * Load::bytes + at, 0, 3);
            __builtin_prefetch(values[k + i] + d * Load::bytes + at, 0, 2);
          }
#pragma GCC unroll 4
      for (int c = 0; c < U; ++c) {
        f32v y[P];
#pragma GCC unroll 2
        for (int i = 0; i < P; ++i) y[i] = Load::at(keys[k + i], d + c * W);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          f32v x = load(q + r * ldq + d + c * W);
          // In a register: gcc would load it for each product, and ten loads take longer than eight
          // products (25 ns a key and thread instead of 22).
          if constexpr (P > 1) keep_in_register(x);
#pragma GCC unroll 2
          for (int i = 0; i < P; ++i)
            chain[i][r][c % C] = fused_multiply_add(x, y[i], chain[i][r][c % C]);
        }
      }
    }
    for (; d < dim; d += W) {
#pragma GCC unroll 2
      for (int i = 0; i < P; ++i) {
        const f32v y =
            d < whole ? Load::at(keys[k + i], d) : load_tail<Load>(keys[k + i], d, dim - whole);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          chain[i][r][0] = fused_multiply_add(load(q + r * ldq + d), y, chain[i][r][0]);
      }
    }
    if constexpr (Fetch)
#pragma GCC unroll 2
      for (int i = 0; i < P; ++i)
        for (int at = whole / (U * W) * kLines; at < value_bytes; at += kLine)
          __builtin_prefetch(values[k + i] + at, 0, 2);
#pragma GCC unroll 2
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        acc[r * K + k + i] = C == 2 ? chain[i][r][0] + chain[i][r][C - 1] : chain[i][r][0];
  }
  alignas(64) float sums[W];
  store(sums, sum_each(acc));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) __builtin_memcpy(s + r * lds, sums + r * K, K * sizeof(float));
}

// `fetch`: these are the first rows to use the keys.
template <class Load, int R>
GENFAST_INLINE int dot_rows(int r, int rows, const float* q, int64_t ldq, const char* const* keys,
                            const char* const* ahead, const char* const* values, int count, int dim,
                            int value_bytes, float* s, int64_t lds) {
  constexpr int K = W / R;
  for (; r + R <= rows; r += R) {
    const float* row = q + r * ldq;
    float* to = s + r * lds;
    const auto products = [&](auto fetch) {
      constexpr bool F = decltype(fetch)::value;
      int k = 0;
      for (; k + K <= count; k += K)
        dot_block<Load, R, K, F>(row, ldq, keys + k, ahead + k, values + k, dim, value_bytes,
                                 to + k, lds);
      for (; k < count; ++k)
        dot_block<Load, R, 1, F>(row, ldq, keys + k, ahead + k, values + k, dim, value_bytes,
                                 to + k, lds);
    };
    if (r == 0)
      products(std::true_type{});
    else
      products(std::false_type{});
  }
  return r;
}

// Key rows that are asked for ahead of their use.
constexpr int kAhead = 16;

template <class Load>
inline void dot_all(const float* q, int64_t ldq, int rows, const char* const* keys,
                    const char* const* values, int n, int dim, int value_bytes, float* s,
                    int64_t lds) {
  for (int j = 0; j < n; j += W) {  // W keys stay in L1 for all rows
    const int count = n - j < W ? n - j : W;
    const char* const* ahead = keys + (j + kAhead + W <= n ? j + kAhead : j);
    int r = 0;
    if constexpr (W >= 8)
      r = dot_rows<Load, 4>(r, rows, q, ldq, keys + j, ahead, values + j, count, dim, value_bytes,
                            s + j, lds);
    r = dot_rows<Load, 2>(r, rows, q, ldq, keys + j, ahead, values + j, count, dim, value_bytes,
                          s + j, lds);
    dot_rows<Load, 1>(r, rows, q, ldq, keys + j, ahead, values + j, count, dim, value_bytes, s + j,
                      lds);
  }
}

// o[r] = o[r] * alpha[r] + sum_j weights[r][j] values[j] for R rows and C vectors from column d.
// soon: rows asked for meanwhile, the same columns; or null.
template <class Load, int R, int C, bool Tail>
GENFAST_INLINE void weigh_block(const float* weights, int64_t ldw, const char* const* values, int n,
                                const float* alpha, float* o, int64_t ldo, int d, int tail,
                                const char* const* soon) {
  f32v acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = load(o + r * ldo + d + c * W) * alpha[r];
  const bool fetch = soon != nullptr && d * Load::bytes % kLine == 0;
  for (int j = 0; j < n; ++j) {
    if (fetch)
#pragma GCC unroll 8
      for (int at = 0; at < C * W * Load::bytes; at += kLine)
        __builtin_prefetch(soon[j] + d * Load::bytes + at, 0, 2);
    f32v y[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
      y[c] = Tail ? load_tail<Load>(values[j], d, tail) : Load::at(values[j], d + c * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const f32v x = splat(weights[r * ldw + j]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = fused_multiply_add(x, y[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(o + r * ldo + d + c * W, acc[r][c]);
}

template <class Load, int R, int C>
inline void weigh_rows(const float* weights, int64_t ldw, const char* const* values, int n,
                       const float* alpha, float* o, int64_t ldo, int dim,
                       const char* const* soon) {
  int d = 0;
  for (; d + C * W <= dim; d += C * W)
    weigh_block<Load, R, C, false>(weights, ldw, values, n, alpha, o, ldo, d, 0, soon);
  for (; d + W <= dim; d += W)
    weigh_block<Load, R, 1, false>(weights, ldw, values, n, alpha, o, ldo, d, 0, soon);
  if (d < dim)
    weigh_block<Load, R, 1, true>(weights, ldw, values, n, alpha, o, ldo, d, dim - d, soon);
}

// kWeighKeys value rows at a time, so that they are read once: 8 KiB of fp32 at Dv = 128.
constexpr int kWeighKeys = 16;

// soon: the keys of the next block, asked for as the values of this one are used.
template <class Load>
inline void weigh_all(const float* weights, int64_t ldw, int rows, const char* const* values, int n,
                      const float* alpha, float* o, int64_t ldo, int dim, const char* const* soon,
                      int soon_count) {
  const float ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  for (int j = 0; j < n; j += kWeighKeys) {
    const int count = n - j < kWeighKeys ? n - j : kWeighKeys;
    const float* w = weights + j;
    const char* const* next = j + count <= soon_count ? soon + j : nullptr;
    int r = 0;
    for (; r + 4 <= rows; r += 4, next = nullptr)
      weigh_rows<Load, 4, MR / 3>(w + r * ldw, ldw, values + j, count, j ? ones : alpha + r,
                                  o + r * ldo, ldo, dim, next);
    for (; r + 2 <= rows; r += 2, next = nullptr)
      weigh_rows<Load, 2, 4>(w + r * ldw, ldw, values + j, count, j ? ones : alpha + r, o + r * ldo,
                             ldo, dim, next);
    for (; r < rows; ++r, next = nullptr)
      weigh_rows<Load, 1, 8>(w + r * ldw, ldw, values + j, count, j ? ones : alpha + r, o + r * ldo,
                             ldo, dim, next);
  }
}

template <class Fn>
inline void with_loader(Dtype d, Fn&& fn) {
  if (d == Dtype::f32) return fn(LoadF32{});
  if (d == Dtype::bf16) return fn(LoadBf16{});
  return fn(LoadF16{});
}

inline void scores_in_place(const AttentionParams& p, const float* q, int64_t ldq, int rows,
                            const char* const* keys, const char* const* values, int n, float* s,
                            int64_t lds) {
  with_loader(p.dtype, [&](auto loader) {
    using Load = decltype(loader);
    dot_all<Load>(q, ldq, rows, keys, values, n, static_cast<int>(p.D),
                  static_cast<int>(p.Dv) * Load::bytes, s, lds);
  });
}

inline void weigh_in_place(const AttentionParams& p, const float* weights, int64_t ldw, int rows,
                           const char* const* values, int n, const float* alpha, float* o,
                           int64_t ldo, const char* const* soon, int soon_count) {
  with_loader(p.dtype, [&](auto loader) {
    using Load = decltype(loader);
    weigh_all<Load>(weights, ldw, rows, values, n, alpha, o, ldo, static_cast<int>(p.Dv), soon,
                    soon_count);
  });
}

}  // namespace
}  // namespace genfast::cpu
