// linear: y = x weight^T + bias of few rows, and the gradients by weight and bias of any number.
#pragma once
#include "api/tensor.h"

namespace genfast {

struct LinearParams {
  TensorView x, weight;  // f32 [M, K] and [N, K], unit last strides, K a multiple of 16
  TensorView bias;       // f32 [N], contiguous, or undefined
  TensorView y;          // f32 [M, N], contiguous
  int threads = 1;
};

struct LinearWeightParams {
  TensorView x, grad;  // f32 [M, K] and [M, N], unit last strides
  TensorView dweight;  // f32 [N, K], contiguous
  TensorView dbias;    // f32 [N], contiguous, or undefined
  int threads = 1;
};

}  // namespace genfast
