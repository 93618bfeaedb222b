// Images and the kernels of a convolution where they lie.
#pragma once
#include <algorithm>

#include "api/convolution.h"
#include "cpu/microkernel.h"

namespace genfast::cpu {
namespace {

// (B, channels, height, width) with the channels inside.
struct Image {
  float* data;
  int64_t count, channels, height, width;

  explicit Image(const TensorView& t)
      : data(static_cast<float*>(t.data)),
        count(t.shape[0]),
        channels(t.shape[1]),
        height(t.shape[2]),
        width(t.shape[3]) {}
  int64_t row() const { return width * channels; }
  float* at(int64_t b, int64_t i, int64_t j) const {
    return data + ((b * height + i) * width + j) * channels;
  }
};

// The kernel of output o and input i, as strides: of the transposed convolution it is turned round.
struct Taps {
  const float* data;
  int64_t o, i, row, column;

  Taps(const TensorView& w, bool transposed)
      : data(static_cast<const float*>(w.data)),
        o(w.strides[transposed ? 1 : 0]),
        i(w.strides[transposed ? 0 : 1]),
        row(w.strides[2]),
        column(w.strides[3]) {
    if (!transposed) return;
    data += 2 * (row + column);
    row = -row, column = -column;
  }
  float at(int64_t output, int64_t input, int64_t r, int64_t c) const {
    return data[output * o + input * i + r * row + c * column];
  }
};

// Columns of a panel of outputs that begins at output o.
inline int columns_of(int64_t o, int64_t outputs) {
  return static_cast<int>(std::min<int64_t>(NR, outputs - o));
}

}  // namespace
}  // namespace genfast::cpu
