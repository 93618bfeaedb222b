// convolution: 3 x 3, stride 1, padding 1, of fp32 images with the channels inside; of an image, or
// of one that is enlarged twice by nearest. Channels are multiples of 16, or up to four on one side
// without term, projection and enlarging.
#pragma once
#include "api/tensor.h"

namespace genfast {

// y = x * weight + bias + term, of which a 1 x 1 convolution may come first.
struct ConvolutionParams {
  TensorView x, y;        // f32 (B, I, H, W) and (B, O, H, W), the channels inside, dense
  TensorView weight;      // f32 (O, I, 3, 3), any strides; transposed: (I, O, 3, 3)
  TensorView bias;        // f32 [O], contiguous, or undefined
  TensorView term;        // like y, which it may be; with projection (B, C, H, W); or undefined
  TensorView projection;  // f32 [O, C], any strides, or undefined
  bool enlarged = false;  // y is (B, O, 2 H, 2 W)
  // The gradient by the input: x is the output's, y the input's.
  bool transposed = false;
  int threads = 1;
};

// The gradients by weight and bias.
struct ConvolutionWeightParams {
  TensorView x, grad;     // f32 (B, I, H, W) and (B, O, H, W), the channels inside, dense
  TensorView dweight;     // f32 (O, I, 3, 3), any strides
  TensorView dbias;       // f32 [O], contiguous, or undefined
  bool enlarged = false;  // grad is (B, O, 2 H, 2 W)
  int threads = 1;
};

}  // namespace genfast
