// fp32 <-> fp16 / bf16 / fp64 over runs of elements, round to nearest even.
#pragma once
#include "api/tensor.h"
#include "math/lane.h"

namespace genfast::cpu {
namespace {

inline int dtype_bytes(Dtype d) {
  constexpr int bytes[] = {4, 2, 2, 8, 8, 4, 1, 1};
  return bytes[static_cast<int>(d)];
}

inline float f32_of_bf16(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }
inline uint16_t bf16_of_f32(float x) {
  const uint32_t b = bits(x);
  const uint32_t rounded = (b + 0x7FFFu + ((b >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((b & 0x7FFFFFFFu) > 0x7F800000u ? (b >> 16) | 0x40u : rounded);
}
inline float f32_of_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7FFFu;
  if (rest >= 0x7C00u) return from_bits(sign | 0x7F800000u | ((rest & 0x3FFu) << 13));
  // 2^112 times the number with its exponent bits moved up; exact for subnormals too
  return from_bits(sign | bits(from_bits(rest << 13) * 0x1p112f));
}
inline uint16_t f16_of_f32(float x) {
  const uint32_t b = bits(x), sign = (b >> 16) & 0x8000u, a = b & 0x7FFFFFFFu;
  if (a > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (a >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds past 65504
  if (a < 0x38800000u)  // subnormal half: let the float adder round at 2^-24
    return static_cast<uint16_t>(sign | (bits(from_bits(a) + 0.5f) - 0x3F000000u));
  const uint32_t rounded = a + 0xFFFu + ((a >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// One place says how each dtype is read and written; `visit` hands its accessors to a loop.
struct AsF32 {
  using type = float;
  static float get(float x) { return x; }
  static float put(float x) { return x; }
};
struct AsF16 {
  using type = uint16_t;
  static float get(uint16_t x) { return f32_of_f16(x); }
  static uint16_t put(float x) { return f16_of_f32(x); }
};
struct AsBf16 {
  using type = uint16_t;
  static float get(uint16_t x) { return f32_of_bf16(x); }
  static uint16_t put(float x) { return bf16_of_f32(x); }
};
struct AsF64 {
  using type = double;
  static float get(double x) { return static_cast<float>(x); }
  static double put(float x) { return x; }
};

template <class Fn>
void visit(Dtype d, Fn&& fn) {
  switch (d) {
    case Dtype::f16:
      return fn(AsF16{});
    case Dtype::bf16:
      return fn(AsBf16{});
    case Dtype::f64:
      return fn(AsF64{});
    default:
      return fn(AsF32{});
  }
}

inline void gather_f32(const char* from, Dtype d, int64_t stride, int n, float* to) {
  visit(d, [&](auto as) {
    const auto* p = reinterpret_cast<const typename decltype(as)::type*>(from);
    for (int i = 0; i < n; ++i) to[i] = as.get(p[i * stride]);
  });
}

inline void scatter_f32(const float* from, int n, char* to, Dtype d, int64_t stride) {
  visit(d, [&](auto as) {
    auto* p = reinterpret_cast<typename decltype(as)::type*>(to);
    for (int i = 0; i < n; ++i) p[i * stride] = as.put(from[i]);
  });
}

// Dense runs. Hardware fp16 conversion where the level has it (v3 and v4).
inline void to_f32(const char* from, Dtype d, int n, float* to) {
  int i = 0;
#if defined(__F16C__)
  if (d == Dtype::f16) {
    const auto* p = reinterpret_cast<const uint16_t*>(from);
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i))));
  }
#endif
  visit(d, [&](auto as) {
    const auto* p = reinterpret_cast<const typename decltype(as)::type*>(from);
    for (; i < n; ++i) to[i] = as.get(p[i]);
  });
}

// bf16_of_f32 of a vector, and of kBf16Run floats. Left to the compiler, its choice for NaN
// took 1.7 times as long at AVX2 and 1.3 times at AVX-512.
#if defined(__AVX512BW__)
constexpr int kBf16Run = 16;
inline __m256i bf16_of_f32(__m512 x) {
  const __m512i b = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, b, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
inline void bf16_run(const float* from, uint16_t* to) {
  _mm256_storeu_si256((__m256i*)to, bf16_of_f32(_mm512_loadu_ps(from)));
}
#elif defined(__AVX2__)
constexpr int kBf16Run = 16;
inline __m256i bf16_words(__m256 x) {
  const __m256i b = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(b, _mm256_set1_epi32(0x400000));
  return _mm256_srli_epi32(
      _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q))), 16);
}
inline __m128i bf16_of_f32(__m256 x) {
  const __m256i packed = _mm256_packus_epi32(bf16_words(x), _mm256_setzero_si256());
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xD8));
}
inline void bf16_run(const float* from, uint16_t* to) {
  const __m256i packed =
      _mm256_packus_epi32(bf16_words(_mm256_loadu_ps(from)), bf16_words(_mm256_loadu_ps(from + 8)));
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(packed, 0xD8));
}
#endif

inline void from_f32(const float* from, int n, char* to, Dtype d) {
  int i = 0;
#if defined(__AVX2__)
  if (d == Dtype::bf16)
    for (auto* p = reinterpret_cast<uint16_t*>(to); i + kBf16Run <= n; i += kBf16Run)
      bf16_run(from + i, p + i);
#endif
#if defined(__F16C__)
  if (d == Dtype::f16) {
    auto* p = reinterpret_cast<uint16_t*>(to);
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128((__m128i*)(p + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  }
#endif
  visit(d, [&](auto as) {
    auto* p = reinterpret_cast<typename decltype(as)::type*>(to);
    for (; i < n; ++i) p[i] = as.put(from[i]);
  });
}

}  // namespace
}  // namespace genfast::cpu
