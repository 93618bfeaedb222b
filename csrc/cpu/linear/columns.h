// What both directions pack: columns of a matrix, next to each other.
#pragma once
#include "math/lane.h"

namespace genfast::cpu {
namespace {

// Columns [0, n) of rows [0, rows), zeros up to whole vectors.
void copy_columns(const float* from, int64_t stride, int64_t rows, int64_t n, float* to,
                  int64_t ld) {
  for (int64_t r = 0; r < rows; ++r, from += stride, to += ld) {
    int64_t c = 0;
    for (; c + W <= n; c += W) store(to + c, load(from + c));
    for (; c < n; ++c) to[c] = from[c];
    for (; c % W != 0; ++c) to[c] = 0.0f;
  }
}

}  // namespace
}  // namespace genfast::cpu
