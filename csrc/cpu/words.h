// Numbers of 16 bits that kernels widen in a register, where the level has the instructions:
// through a buffer, group norms took 1.5 times as long.
#pragma once
#include <cstring>
#include <type_traits>

#include "cpu/convert.h"

namespace genfast::cpu {
namespace {

using genfast::load;  // of fp32
using genfast::store;

template <class T>
constexpr Dtype kDtype = Dtype::f32;

#if defined(__AVX2__)
struct Bf16 {
  uint16_t bits;
  static float wide(Bf16 x) { return f32_of_bf16(x.bits); }
  static Bf16 narrow(float x) { return {bf16_of_f32(x)}; }
};
struct Fp16 {
  uint16_t bits;
  static float wide(Fp16 x) { return f32_of_f16(x.bits); }
  static Fp16 narrow(float x) { return {f16_of_f32(x)}; }
};
#if defined(__AVX512F__)
typedef __m256i Words;
GENFAST_FN f32v widened(Words words, Bf16) {
  return (f32v)_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
}
GENFAST_FN f32v widened(Words words, Fp16) { return (f32v)_mm512_cvtph_ps(words); }
GENFAST_FN Words narrowed(f32v v, Bf16) { return bf16_of_f32((__m512)v); }
GENFAST_FN Words narrowed(f32v v, Fp16) { return _mm512_cvtps_ph((__m512)v, 0); }
#else
typedef __m128i Words;
GENFAST_FN f32v widened(Words words, Bf16) {
  return (f32v)_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16);
}
GENFAST_FN f32v widened(Words words, Fp16) { return (f32v)_mm256_cvtph_ps(words); }
GENFAST_FN Words narrowed(f32v v, Bf16) { return bf16_of_f32((__m256)v); }
GENFAST_FN Words narrowed(f32v v, Fp16) { return _mm256_cvtps_ph((__m256)v, 0); }
#endif
template <>
constexpr Dtype kDtype<Bf16> = Dtype::bf16;
template <>
constexpr Dtype kDtype<Fp16> = Dtype::f16;

template <class T>
using IfWords = std::enable_if_t<sizeof(T) == 2, f32v>;
template <class T>
GENFAST_FN IfWords<T> load(const T* p) {
  Words words;
  __builtin_memcpy(&words, p, sizeof words);
  return widened(words, T{});
}
template <class T>
GENFAST_FN void store(T* p, IfWords<T> v) {
  const Words words = narrowed(v, T{});
  __builtin_memcpy(p, &words, sizeof words);
}
#endif

}  // namespace
}  // namespace genfast::cpu
