// filtering: bias + noise + activation, gated activations, and up/down-sampling by a finite impulse
// response.
#pragma once
#include "api/rng.h"

namespace genfast {

enum class Activation : uint8_t {
  linear,
  relu,
  lrelu,
  tanh,
  sigmoid,
  elu,
  selu,
  softplus,
  swish,
  gelu,
  gelu_tanh
};

// y = clamp(act(x + strength n + b) gain, +-clamp).
struct BiasActParams {
  TensorView x, y;      // one shape and memory order, dense as `planes` says; f32/f16/bf16
  TensorView b;         // [channels] f32/f16/bf16; undefined: 0
  TensorView noise;     // [outer, inner], or [inner] for every outer; contiguous floats; undefined
  TensorView strength;  // f32, one element; defined where there is noise
  Noise drawn;          // `draws`: the noise, of `drawn_rows` rows (dim 0), instead of `noise`
  int64_t drawn_rows = 1;
  bool draws = false;
  Planes planes;
  Activation act = Activation::linear;
  float alpha = 0.0f, gain = 1.0f;
  float clamp = -1.0f;  // < 0: none
  int threads = 1;
};

// dz = grad gain act'(z), 0 where clamped; db and d_strength are its sums. The slope is taken from
// y where act' is a function of its sign (linear, relu, lrelu), else z is made again from x.
struct BiasActBackwardParams {
  BiasActParams forward;  // x: x or, with from_y, y; forward.y is not used
  bool from_y = false;
  TensorView grad, dz;    // like x
  TensorView db;          // f32 [channels] or undefined
  TensorView d_strength;  // f32, one element, or undefined; wants noise
  TensorView scratch;     // CUDA: f64, room for partial sums where db or d_strength is wanted
};

// y = act(x[:, : half]) x[:, half :], alpha = 0.
struct GatedActParams {
  TensorView x, y;  // [rows, 2 half] and [rows, half], contiguous; f32/f16/bf16
  int64_t rows = 0, half = 0;
  Activation act = Activation::linear;
  int threads = 1;
};

struct GatedActBackwardParams {
  GatedActParams forward;  // y is not used
  TensorView grad, dx;     // like y and x
};

// Zeros between the samples (up - 1 after each), zeros before and after (negative: cropped), the
// filter along H and W, every down-th sample. Index 0: H, 1: W.
struct UpfirdnParams {
  TensorView x, y;  // (N, C, H, W) and (N, C, OH, OW), both contiguous or both channels_inner
  TensorView f;     // f32 contiguous [fh, fw], or [n]: along both axes
  int64_t up[2] = {1, 1}, down[2] = {1, 1}, before[2] = {0, 0};
  bool flip = false;  // false: convolution, true: correlation
  double gain = 1.0;
  bool channels_inner = false;
  int threads = 1;
};

namespace cuda {  // on the device and stream of the first tensor; null, or an error text
const char* bias_act(const BiasActParams& p);
const char* bias_act_backward(const BiasActBackwardParams& p);
const char* gated_act(const GatedActParams& p);
const char* gated_act_backward(const GatedActBackwardParams& p);
const char* upfirdn2d(const UpfirdnParams& p);
}  // namespace cuda

}  // namespace genfast
