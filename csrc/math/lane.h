// Lane types: the per-element maths of every family is a template over them, written once.
//   CPU: a vector of W lanes (GCC/Clang vector extensions, W from the ISA level of the file).
//   GPU thread, or GENFAST_SCALAR_LANES: plain float / uint32_t / int32_t.
// All functions are static and always inlined: the same header is compiled at several ISA levels
// and the linker must never choose one level's copy for another.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define GENFAST_FN static __host__ __device__ __forceinline__
#else
#define GENFAST_FN [[maybe_unused]] static inline __attribute__((always_inline))
#endif

#if !defined(__CUDACC__) && !defined(GENFAST_SCALAR_LANES)
#define GENFAST_VECTOR_LANES 1
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif
#else
#include <math.h>
#include <string.h>
#endif

namespace genfast {

// ---- scalar lanes -----------------------------------------------------------------------------

GENFAST_FN uint32_t bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
#endif
}
GENFAST_FN float from_bits(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
#endif
}
GENFAST_FN float to_float(int32_t i) { return static_cast<float>(i); }
GENFAST_FN float word_to_float(uint32_t w) { return static_cast<float>(w); }  // nearest
GENFAST_FN int32_t to_int(float x) { return static_cast<int32_t>(x); }        // toward zero
GENFAST_FN int32_t as_signed(uint32_t u) { return static_cast<int32_t>(u); }
GENFAST_FN uint32_t as_unsigned(int32_t i) { return static_cast<uint32_t>(i); }
GENFAST_FN float select(bool m, float a, float b) { return m ? a : b; }
GENFAST_FN float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}
GENFAST_FN float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
GENFAST_FN uint32_t multiply_high(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

template <class F>
struct lane {  // the integer partners of a float lane
  using U = uint32_t;
  using I = int32_t;
  static constexpr int width = 1;
};

#if GENFAST_VECTOR_LANES
// ---- vector lanes -----------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float f32v __attribute__((vector_size(4 * W)));
typedef uint32_t u32v __attribute__((vector_size(4 * W)));
typedef int32_t i32v __attribute__((vector_size(4 * W)));

template <>
struct lane<f32v> {
  using U = u32v;
  using I = i32v;
  static constexpr int width = W;
};

GENFAST_FN u32v bits(f32v x) { return (u32v)x; }
GENFAST_FN f32v from_bits(u32v u) { return (f32v)u; }
GENFAST_FN f32v to_float(i32v i) { return __builtin_convertvector(i, f32v); }
// Nearest float of an unsigned word: both halves convert exactly, one rounding at the sum.
GENFAST_FN f32v word_to_float(u32v w) {
#if defined(__AVX512F__)
  return (f32v)_mm512_cvtepu32_ps((__m512i)w);
#else
  return to_float((i32v)(w >> 16)) * 65536.0f + to_float((i32v)(w & 0xFFFFu));
#endif
}
GENFAST_FN i32v to_int(f32v x) { return __builtin_convertvector(x, i32v); }
GENFAST_FN i32v as_signed(u32v u) { return (i32v)u; }
GENFAST_FN u32v as_unsigned(i32v i) { return (u32v)i; }
GENFAST_FN f32v select(i32v m, f32v a, f32v b) { return m ? a : b; }
GENFAST_FN f32v splat(float x) { return x - f32v{}; }  // x - 0 is x; 0 + x is not for -0: an add
GENFAST_FN u32v splat(uint32_t x) { return u32v{} + x; }

GENFAST_FN f32v load(const float* p) {
  f32v v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
GENFAST_FN void store(float* p, f32v v) { __builtin_memcpy(p, &v, sizeof v); }

GENFAST_FN f32v square_root(f32v x) {
#if defined(__AVX512F__)
  return (f32v)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (f32v)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (f32v)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

GENFAST_FN f32v fused_multiply_add(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
  return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (f32v)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;  // no fused unit below v3: callers that need one rounding do not run here
#endif
}

// High 32 bits of the 64-bit products (the low ones are plain a * b).
GENFAST_FN u32v multiply_high(u32v a, uint32_t b) {
#if defined(__AVX512F__)
  const __m512i m = _mm512_set1_epi32(static_cast<int>(b)), x = (__m512i)a;
  const __m512i even = _mm512_mul_epu32(x, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), m);
  return (u32v)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  const __m256i m = _mm256_set1_epi32(static_cast<int>(b)), x = (__m256i)a;
  const __m256i even = _mm256_mul_epu32(x, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), m);
  return (u32v)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#elif defined(__SSE2__)
  const __m128i m = _mm_set1_epi32(static_cast<int>(b)), x = (__m128i)a;
  const __m128i even = _mm_mul_epu32(x, m), odd = _mm_mul_epu32(_mm_srli_epi64(x, 32), m);
  const __m128i high = _mm_set_epi32(-1, 0, -1, 0);
  return (u32v)_mm_or_si128(_mm_srli_epi64(even, 32), _mm_and_si128(odd, high));
#else
  u32v r;
  for (int i = 0; i < W; ++i) r[i] = multiply_high(a[i], b);
  return r;
#endif
}

// Words in the low halves of 64-bit lanes (whatever the high halves hold): one multiplication gives
// both halves of a product, and the high one is a shift away. Ten Philox rounds take 6 operations a
// vector and round so, 8 with words in 32-bit lanes (normals 0.57 -> 0.49 ns on AVX-512, measured).
struct Wide {
  typedef uint64_t Vector __attribute__((vector_size(4 * W)));
  Vector v;
};
GENFAST_FN Wide operator^(Wide x, Wide y) { return {x.v ^ y.v}; }
GENFAST_FN Wide operator^(Wide x, uint32_t y) { return {x.v ^ uint64_t{y}}; }
GENFAST_FN Wide operator+(Wide x, uint32_t y) { return {x.v + uint64_t{y}}; }
GENFAST_FN Wide operator*(Wide x, uint32_t y) {
#if defined(__AVX512F__)
  return {(Wide::Vector)_mm512_mul_epu32((__m512i)x.v, _mm512_set1_epi64(y))};
#elif defined(__AVX2__)
  return {(Wide::Vector)_mm256_mul_epu32((__m256i)x.v, _mm256_set1_epi64x(y))};
#elif defined(__SSE2__)
  return {(Wide::Vector)_mm_mul_epu32((__m128i)x.v, _mm_set1_epi64x(y))};
#else
  return {(x.v & 0xFFFFFFFFu) * y};
#endif
}
GENFAST_FN Wide multiply_high(Wide x, uint32_t y) { return {(x * y).v >> 32}; }
GENFAST_FN Wide even_words(u32v x) { return {(Wide::Vector)x}; }
GENFAST_FN Wide odd_words(u32v x) { return {(Wide::Vector)x >> 32}; }
GENFAST_FN u32v join_words(Wide even, Wide odd) {
  return (u32v)((even.v & 0xFFFFFFFFu) | (odd.v << 32));
}

// Low and high half of x0 y0 x1 y1 … over the whole vector.
GENFAST_FN void interleave(f32v x, f32v y, f32v& low, f32v& high) {
#if defined(__AVX512F__)
  low = __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high =
      __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  low = __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
  high = __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  low = __builtin_shufflevector(x, y, 0, 4, 1, 5);
  high = __builtin_shufflevector(x, y, 2, 6, 3, 7);
#endif
}

// p[4 j + i] = v_i[j]: four words per counter, counters in lanes.
GENFAST_FN void store_interleaved(float* p, f32v v0, f32v v1, f32v v2, f32v v3) {
  f32v a, b, c, d, o0, o1, o2, o3;
  interleave(v0, v2, a, b);
  interleave(v1, v3, c, d);
  interleave(a, c, o0, o1);
  interleave(b, d, o2, o3);
  store(p, o0);
  store(p + W, o1);
  store(p + 2 * W, o2);
  store(p + 3 * W, o3);
}
// One instruction with the meaning of the templates below (b when either is NaN); from the
// vector comparison GCC 12 makes two.
#if defined(__SSE2__)
#if defined(__AVX512F__)
GENFAST_FN f32v minimum(f32v a, f32v b) { return (f32v)_mm512_min_ps((__m512)a, (__m512)b); }
GENFAST_FN f32v maximum(f32v a, f32v b) { return (f32v)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
GENFAST_FN f32v minimum(f32v a, f32v b) { return (f32v)_mm256_min_ps((__m256)a, (__m256)b); }
GENFAST_FN f32v maximum(f32v a, f32v b) { return (f32v)_mm256_max_ps((__m256)a, (__m256)b); }
#else
GENFAST_FN f32v minimum(f32v a, f32v b) { return (f32v)_mm_min_ps((__m128)a, (__m128)b); }
GENFAST_FN f32v maximum(f32v a, f32v b) { return (f32v)_mm_max_ps((__m128)a, (__m128)b); }
#endif
#endif
#if defined(__AVX512F__)  // one operation for the ten of the template below; the same bits
GENFAST_FN f32v scale_by_power(f32v y, f32v n) {
  return (f32v)_mm512_scalef_ps((__m512)y, (__m512)n);
}
#endif

GENFAST_FN float horizontal_max(f32v v) {
  float m = v[0];
#if defined(__AVX512F__)
  m = _mm512_reduce_max_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 x = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  m = _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
#else
  for (int i = 1; i < W; ++i) m = m > v[i] ? m : v[i];
#endif
  return m;
}

// The compiler does not go back to the memory that x came from.
GENFAST_FN void keep_in_register(f32v& x) {
#if defined(__aarch64__)
  __asm__("" : "+w"(x));
#elif defined(__SSE2__)
  __asm__("" : "+v"(x));
#else
  (void)x;
#endif
}

GENFAST_FN float horizontal_sum(f32v v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 x = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
#else
  float s = v[0];
  for (int i = 1; i < W; ++i) s += v[i];
  return s;
#endif
}

// ---- two vectors side by side -------------------------------------------------------------------
// The polynomials are chains of dependent operations; two chains in flight fill the pipeline that
// one leaves half empty (normals 1.7 -> 1.2 ns on AVX2, measured). Same operations, same bits.

template <class V>
struct Pair {
  V a, b;
};
using f32p = Pair<f32v>;
using u32p = Pair<u32v>;
using i32p = Pair<i32v>;

template <>
struct lane<f32p> {
  using U = u32p;
  using I = i32p;
  static constexpr int width = 2 * W;
};

#define GENFAST_PAIR_OPERATOR(op)                              \
  template <class V>                                           \
  GENFAST_FN auto operator op(Pair<V> x, Pair<V> y) {          \
    return Pair<decltype(x.a op y.a)>{x.a op y.a, x.b op y.b}; \
  }                                                            \
  template <class V, class S, class = decltype(V {} op S{})>   \
  GENFAST_FN auto operator op(Pair<V> x, S y) {                \
    return Pair<decltype(x.a op y)>{x.a op y, x.b op y};       \
  }                                                            \
  template <class V, class S, class = decltype(S {} op V{})>   \
  GENFAST_FN auto operator op(S x, Pair<V> y) {                \
    return Pair<decltype(x op y.a)>{x op y.a, x op y.b};       \
  }
GENFAST_PAIR_OPERATOR(+)
GENFAST_PAIR_OPERATOR(-)
GENFAST_PAIR_OPERATOR(*)
GENFAST_PAIR_OPERATOR(/)
GENFAST_PAIR_OPERATOR(&)
GENFAST_PAIR_OPERATOR(|)
GENFAST_PAIR_OPERATOR(^)
GENFAST_PAIR_OPERATOR(<<)
GENFAST_PAIR_OPERATOR(>>)
GENFAST_PAIR_OPERATOR(<)
GENFAST_PAIR_OPERATOR(>)
GENFAST_PAIR_OPERATOR(==)
GENFAST_PAIR_OPERATOR(!=)
#undef GENFAST_PAIR_OPERATOR
template <class V>
GENFAST_FN Pair<V> operator-(Pair<V> x) {
  return {-x.a, -x.b};
}
template <class V, class T>
GENFAST_FN Pair<V>& operator+=(Pair<V>& x, T y) {
  return x = x + y;
}
template <class V, class T>
GENFAST_FN Pair<V>& operator-=(Pair<V>& x, T y) {
  return x = x - y;
}
template <class V, class T>
GENFAST_FN Pair<V>& operator|=(Pair<V>& x, T y) {
  return x = x | y;
}

GENFAST_FN u32p bits(f32p x) { return {bits(x.a), bits(x.b)}; }
GENFAST_FN f32p from_bits(u32p u) { return {from_bits(u.a), from_bits(u.b)}; }
GENFAST_FN f32p to_float(i32p i) { return {to_float(i.a), to_float(i.b)}; }
GENFAST_FN f32p word_to_float(u32p w) { return {word_to_float(w.a), word_to_float(w.b)}; }
GENFAST_FN i32p to_int(f32p x) { return {to_int(x.a), to_int(x.b)}; }
GENFAST_FN i32p as_signed(u32p u) { return {as_signed(u.a), as_signed(u.b)}; }
GENFAST_FN u32p as_unsigned(i32p i) { return {as_unsigned(i.a), as_unsigned(i.b)}; }
GENFAST_FN f32p select(i32p m, f32p x, f32p y) {
  return {select(m.a, x.a, y.a), select(m.b, x.b, y.b)};
}
GENFAST_FN f32p square_root(f32p x) { return {square_root(x.a), square_root(x.b)}; }
template <class V>
GENFAST_FN Pair<V> multiply_high(Pair<V> x, uint32_t y) {
  return {multiply_high(x.a, y), multiply_high(x.b, y)};
}
#if defined(__SSE2__)
GENFAST_FN f32p minimum(f32p x, f32p y) { return {minimum(x.a, y.a), minimum(x.b, y.b)}; }
GENFAST_FN f32p maximum(f32p x, f32p y) { return {maximum(x.a, y.a), maximum(x.b, y.b)}; }
#endif
#if defined(__AVX512F__)
GENFAST_FN f32p scale_by_power(f32p y, f32p n) {
  return {scale_by_power(y.a, n.a), scale_by_power(y.b, n.b)};
}
#endif
GENFAST_FN f32p load_pair(const float* p) { return {load(p), load(p + W)}; }
GENFAST_FN void store(float* p, f32p v) {
  store(p, v.a);
  store(p + W, v.b);
}
GENFAST_FN void store_interleaved(float* p, f32p v0, f32p v1, f32p v2, f32p v3) {
  store_interleaved(p, v0.a, v1.a, v2.a, v3.a);
  store_interleaved(p + 4 * W, v0.b, v1.b, v2.b, v3.b);
}
#endif  // GENFAST_VECTOR_LANES

// ---- either kind ------------------------------------------------------------------------------

template <class F>
GENFAST_FN F minimum(F a, F b) {  // b when either is NaN
  return select(a < b, a, b);
}
template <class F>
GENFAST_FN F maximum(F a, F b) {
  return select(a > b, a, b);
}
// min(max(v, -bound), bound); NaN stays NaN.
template <class F>
GENFAST_FN F clamp_symmetric(F v, F bound) {
  return minimum(bound, maximum(-bound, v));
}
// y 2^n for a whole n in [-252, 254], rounded once: two factors, so that 2^128 and 2^-150 are in
// reach; the first product is exact for the y near 1 that reach it.
template <class F>
GENFAST_FN F scale_by_power(F y, F n) {
  const auto k = to_int(n), half = k >> 1;
  const F s0 = from_bits(as_unsigned(half + 127) << 23);
  const F s1 = from_bits(as_unsigned(k - half + 127) << 23);
  return (y * s0) * s1;
}

}  // namespace genfast
