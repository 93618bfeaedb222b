// normalization: group, layer and RMS norm with affine, modulation and activation in one pass; of a
// sum of two tensors in the same.
#pragma once
#include "api/tensor.h"

namespace genfast {

enum class NormActivation : uint8_t { linear, silu, gelu, gelu_tanh };

// y = act(((x - mean) rstd w + b) (1 + scale) + shift), mean and rstd of each group. With `add`, of
// layer and RMS norm, sum = x + gate add has x's place.
struct NormalizeParams {
  TensorView x, y;  // one shape and memory order, dense as `planes` says; f32/f16/bf16
  // f32, contiguous, one number a group: the means, none with `rms`, then 1 / deviation. Written by
  // the forward unless undefined, read by the backward.
  TensorView statistics;
  TensorView w, b;          // [channels] f32/f16/bf16; undefined: 1 and 0
  TensorView scale, shift;  // [outer, channels], rows of any stride; undefined: 0
  TensorView add;           // like x, f32/f16/bf16, or undefined
  TensorView gate;          // with add: [outer, channels], rows of any stride; undefined: 1
  TensorView sum;           // with add: like x
  // Group norm: channels / groups channels over all `inner` places of a sample make a group.
  // groups = 0, layer and RMS norm: the channels of one place do; they lie inside.
  Planes planes;
  int64_t groups = 1;
  bool rms = false;
  NormActivation act = NormActivation::linear;
  float eps = 1e-5f;
  int threads = 1;
  // CUDA, of long or scattered groups: f32, two numbers of each channel of each part of a sample's
  // places, in [outer * parts][3][channels], then two of each group. Undefined: a block a group.
  TensorView scratch;

  int64_t parts() const { return parts_in(scratch, planes.outer, true); }
  // What a scratch has room for, 0 where that is not enough.
  int64_t parts_in(const TensorView& t, int64_t samples, bool of_groups) const {
    const int64_t room = t.numel - (of_groups ? 2 * group_count() : 0);
    const int64_t each = 3 * samples * planes.channels;
    return t.defined() && each > 0 && room > 0 ? room / each : 0;
  }
  int64_t group_count() const { return planes.outer * (groups > 0 ? groups : planes.inner); }
  float* mean() const { return rms ? nullptr : static_cast<float*>(statistics.data); }
  float* rstd() const { return static_cast<float*>(statistics.data) + (rms ? 0 : group_count()); }
};

struct NormalizeBackwardParams {
  NormalizeParams forward;  // x is the forward's sum; y and sum are not used, add with gate alone
  TensorView grad, dx;      // like x
  TensorView grad_sum;      // like x, joins dx; undefined: 0
  TensorView d_add;         // with gate: like add
  TensorView d_gate;        // with gate: f32 [outer, channels], contiguous
  TensorView dw, db;        // f32 [channels] or undefined
  TensorView d_scale, d_shift;  // f32 [outer, channels], contiguous, or undefined
  // CUDA: f32, the sums of parts of rows, [samples * parts][3][channels], and with gate or of group
  // norms two numbers a group; wanted with any gradient of a parameter, and of long groups.
  TensorView scratch;

  bool by_sample() const {
    return forward.groups > 0 || forward.scale.defined() || forward.shift.defined() ||
           forward.gate.defined();
  }
  int64_t samples() const { return by_sample() ? forward.planes.outer : 1; }  // summed apart
  int64_t parts() const {
    return forward.parts_in(scratch, samples(), forward.groups > 0 || forward.gate.defined());
  }
};

namespace cuda {  // on the device and stream of the first tensor; null, or an error text
const char* normalize(const NormalizeParams& p);
const char* normalize_backward(const NormalizeBackwardParams& p);
}  // namespace cuda

}  // namespace genfast
