// The two products for a few query rows (decoding): every key and value row is read once, from
// where it lies and in its own dtype, for all query rows of the group. Bound by memory, so nothing
// is packed; value rows are prefetched while the keys of the same block are being used.
#pragma once
#include "cpu/attention/geometry.h"

namespace genfast::cpu {
namespace {

// In place up to this many query rows per key/value head and from this many keys on; beside it,
// packing pays for itself.
constexpr int64_t kDecodeRows = 8, kDecodeKeys = 64;

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

// Sums over lanes of up to W vectors at once: result lane i = sum of v[i].
GENFAST_INLINE f32v sum_each(f32v (&v)[W]) {
  transpose(v);
  for (int step = W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) v[i] += v[i + step];
  return v[0];
}

// scores of R rows x K keys, R * K <= W.
template <class Load, int R, int K>
GENFAST_INLINE void dot_block(const float* q, int64_t ldq, const char* const* keys,
                              const char* const* values, int dim, int value_bytes, float* s,
                              int64_t lds) {
  f32v acc[W] = {};
  const int whole = dim / W * W;
  // Row after row: one stream for the hardware prefetcher reads twice as fast as K side by side.
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) {
    f32v even[R] = {}, odd[R] = {};
    int d = 0;
    for (; d + 2 * W <= whole; d += 2 * W) {
      const f32v y0 = Load::at(keys[k], d), y1 = Load::at(keys[k], d + W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        even[r] = fused_multiply_add(load(q + r * ldq + d), y0, even[r]);
        odd[r] = fused_multiply_add(load(q + r * ldq + d + W), y1, odd[r]);
      }
    }
    if (d < whole)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        even[r] = fused_multiply_add(load(q + r * ldq + d), Load::at(keys[k], d), even[r]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r * K + k] = even[r] + odd[r];
  }
  if (whole < dim) {
    for (int k = 0; k < K; ++k) {
      const f32v y = load_tail<Load>(keys[k], whole, dim - whole);
      for (int r = 0; r < R; ++r)
        acc[r * K + k] = fused_multiply_add(load(q + r * ldq + whole), y, acc[r * K + k]);
    }
  }
  if (values != nullptr)
    for (int k = 0; k < K; ++k)
      for (int at = 0; at < value_bytes; at += 64) __builtin_prefetch(values[k] + at, 0, 2);
  const f32v sums = sum_each(acc);
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < K; ++k) s[r * lds + k] = sums[r * K + k];
}

template <class Load, int R>
GENFAST_INLINE int dot_rows(int r, int rows, const float* q, int64_t ldq, const char* const* keys,
                            const char* const* values, int count, int dim, int value_bytes,
                            float* s, int64_t lds) {
  constexpr int K = W / R;
  for (; r + R <= rows; r += R) {
    int k = 0;
    const char* const* ahead = r == 0 ? values : nullptr;
    for (; k + K <= count; k += K)
      dot_block<Load, R, K>(q + r * ldq, ldq, keys + k, ahead != nullptr ? ahead + k : nullptr, dim,
                            value_bytes, s + r * lds + k, lds);
    for (; k < count; ++k)
      dot_block<Load, R, 1>(q + r * ldq, ldq, keys + k, ahead != nullptr ? ahead + k : nullptr, dim,
                            value_bytes, s + r * lds + k, lds);
  }
  return r;
}

template <class Load>
inline void dot_all(const float* q, int64_t ldq, int rows, const char* const* keys,
                    const char* const* values, int n, int dim, int value_bytes, float* s,
                    int64_t lds) {
  for (int j = 0; j < n; j += W) {  // W keys stay in L1 for all rows
    const int count = n - j < W ? n - j : W;
    int r = 0;
    if constexpr (W >= 8)
      r = dot_rows<Load, 4>(r, rows, q, ldq, keys + j, values + j, count, dim, value_bytes, s + j,
                            lds);
    r = dot_rows<Load, 2>(r, rows, q, ldq, keys + j, values + j, count, dim, value_bytes, s + j,
                          lds);
    dot_rows<Load, 1>(r, rows, q, ldq, keys + j, values + j, count, dim, value_bytes, s + j, lds);
  }
}

// o[r] = o[r] * alpha[r] + sum_j weights[r][j] values[j] for R rows and C vectors from column d.
template <class Load, int R, int C, bool Tail>
GENFAST_INLINE void weigh_block(const float* weights, int64_t ldw, const char* const* values, int n,
                                const float* alpha, float* o, int64_t ldo, int d, int tail) {
  f32v acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = load(o + r * ldo + d + c * W) * alpha[r];
  for (int j = 0; j < n; ++j) {
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
                       const float* alpha, float* o, int64_t ldo, int dim) {
  int d = 0;
  for (; d + C * W <= dim; d += C * W)
    weigh_block<Load, R, C, false>(weights, ldw, values, n, alpha, o, ldo, d, 0);
  for (; d + W <= dim; d += W)
    weigh_block<Load, R, 1, false>(weights, ldw, values, n, alpha, o, ldo, d, 0);
  if (d < dim) weigh_block<Load, R, 1, true>(weights, ldw, values, n, alpha, o, ldo, d, dim - d);
}

// kWeighKeys value rows at a time, so that they are read once: 8 KiB of fp32 at Dv = 128.
constexpr int kWeighKeys = 16;

template <class Load>
inline void weigh_all(const float* weights, int64_t ldw, int rows, const char* const* values, int n,
                      const float* alpha, float* o, int64_t ldo, int dim) {
  const float ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  for (int j = 0; j < n; j += kWeighKeys) {
    const int count = n - j < kWeighKeys ? n - j : kWeighKeys;
    const float* w = weights + j;
    int r = 0;
    for (; r + 4 <= rows; r += 4)
      weigh_rows<Load, 4, 2>(w + r * ldw, ldw, values + j, count, j ? ones : alpha + r, o + r * ldo,
                             ldo, dim);
    for (; r + 2 <= rows; r += 2)
      weigh_rows<Load, 2, 4>(w + r * ldw, ldw, values + j, count, j ? ones : alpha + r, o + r * ldo,
                             ldo, dim);
    for (; r < rows; ++r)
      weigh_rows<Load, 1, 8>(w + r * ldw, ldw, values + j, count, j ? ones : alpha + r, o + r * ldo,
                             ldo, dim);
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
                           int64_t ldo) {
  with_loader(p.dtype, [&](auto loader) {
    using Load = decltype(loader);
    weigh_all<Load>(weights, ldw, rows, values, n, alpha, o, ldo, static_cast<int>(p.Dv));
  });
}

}  // namespace
}  // namespace genfast::cpu
