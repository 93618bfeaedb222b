// linear: the gradients of y = x weight^T + bias by weight and bias.
#pragma once
#include "api/tensor.h"

namespace genfast {

struct LinearWeightParams {
  TensorView x, grad;  // f32 [M, K] and [M, N], unit last strides
  TensorView dweight;  // f32 [N, K], contiguous
  TensorView dbias;    // f32 [N], contiguous, or undefined
  int threads = 1;
};

}  // namespace genfast
