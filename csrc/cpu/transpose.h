// Rows of a square of vectors become its columns, in registers.
#pragma once
#include "cpu/microkernel.h"

namespace genfast::cpu {
namespace {

// W x W transpose in registers.
GENFAST_INLINE void transpose(f32v (&v)[W]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  f32v t[8];  // 24 shuffles instead of the 48 of three interleavings
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[2 * i + 1] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  f32v u[8];
  for (int i = 0; i < 2; ++i)
    for (int h = 0; h < 2; ++h) {
      u[4 * i + 2 * h] =
          __builtin_shufflevector(t[4 * i + h], t[4 * i + 2 + h], 0, 1, 8, 9, 4, 5, 12, 13);
      u[4 * i + 2 * h + 1] =
          __builtin_shufflevector(t[4 * i + h], t[4 * i + 2 + h], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    v[i] = __builtin_shufflevector(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = __builtin_shufflevector(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#else
  for (int half = 1; half < W; half *= 2) {  // log2 W perfect shuffles
    f32v t[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) interleave(v[i], v[i + W / 2], t[2 * i], t[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = t[i];
  }
#endif
}

}  // namespace
}  // namespace genfast::cpu
