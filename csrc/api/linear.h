// linear: y = act(x weight^T + bias), and the gradients by weight and bias.
#pragma once
#include "api/tensor.h"

namespace genfast {

struct LinearParams {
  TensorView x;       // f32 [M, K], unit last stride
  TensorView weight;  // f32 [N, K], one of its strides 1
  TensorView bias;    // f32 [N], contiguous, or undefined
  TensorView y;       // f32 [M, N], contiguous
  bool relu = false;
  int threads = 1;
};

struct LinearWeightParams {
  TensorView x, grad;  // f32 [M, K] and [M, N], unit last strides
  TensorView dweight;  // f32 [N, K], contiguous
  TensorView dbias;    // f32 [N], contiguous, or undefined
  int threads = 1;
};

}  // namespace genfast
