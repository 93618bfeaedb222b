// What the diffusion kernels share: sums of scaled groups in the CPU's order, the row of the solver
// table that a group of elements uses, guided model outputs, coefficients of the forward process.
#pragma once
#include <type_traits>

#include "cuda/sums.cuh"
#include "math/diffusion.h"

namespace genfast::cuda {
namespace {

// c_0 s_0 + c_1 s_1 + ...: the first term is a product, not 0 + a product (the sign of a zero).
struct Terms {
  float v[kGroup] = {};
  bool any = false;

  __device__ __forceinline__ void add(const float (&s)[kGroup], float c) {
    if (c == 0.0f) return;  // what does not count is not even multiplied: it may be NaN
#pragma unroll
    for (int i = 0; i < kGroup; ++i) v[i] = any ? v[i] + s[i] * c : s[i] * c;
    any = true;
  }
};

__device__ __forceinline__ void copy(const float (&from)[kGroup], float (&to)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) to[i] = from[i];
}

// The row of the table for each row of the walk. On a device nobody has checked the index, so it is
// clamped; a step counter that ran past the end repeats the last step.
struct Rows {
  const float* table = nullptr;
  const int64_t* index = nullptr;
  int64_t row = 0, last = 0;
  int64_t per_group = 1;   // rows of the walk that share an index
  int64_t per_sample = 1;  // rows of the walk in one sample

  Rows() = default;
  Rows(const TensorView& t, const TensorView& i, int64_t r, int64_t rows, int64_t batch)
      : table(static_cast<const float*>(t.data)),
        index(i.defined() ? static_cast<const int64_t*>(i.data) : nullptr),
        row(r),
        last(t.ndim > 0 ? t.shape[0] - 1 : 0) {
    if (i.defined() && i.numel > 0) per_group = rows / i.numel;
    if (rows > batch && batch > 0) per_sample = rows / batch;
  }
  __device__ __forceinline__ const float* operator()(int64_t r) const {
    int64_t at = index == nullptr ? row : index[per_group == 1 ? r : r / per_group];
    at = at < 0 ? 0 : at > last ? last : at;
    return table + at * kRowColumns;
  }
  __device__ __forceinline__ int64_t sample(int64_t r) const {
    return per_sample == 1 ? r : r / per_sample;  // fewer rows than samples: one value for all
  }
};

__device__ __forceinline__ const float* output_row(const float* row, int output) {
  return row + kRowCoefficients + output * kSources;
}

// `width` numbers per sample, or for all.
struct PerSample {
  const float* data = nullptr;
  int64_t stride = 0;

  PerSample() = default;
  PerSample(const TensorView& t, int64_t width)
      : data(static_cast<const float*>(t.data)), stride(t.numel > width ? width : 0) {
    if (!t.defined()) data = nullptr;
  }
  __device__ __forceinline__ float operator()(int64_t sample, int at, float otherwise) const {
    return data == nullptr ? otherwise : data[sample * stride + at];
  }
};

// m: the model output, or the guided combination of up to three.
struct Guided {
  Stage stage[kModels];
  int count = 0;
  PerSample weights;

  Guided() = default;
  Guided(const TensorView* models, const TensorView& w) {
    for (; count < kModels && models[count].defined(); ++count) stage[count] = Stage(models[count]);
    weights = PerSample(w, count);
  }
  __device__ __forceinline__ float weight(int64_t sample, int j) const {
    return weights(sample, j, 1.0f);
  }
  __device__ __forceinline__ void load(const Group& g, int64_t sample, float (&m)[kGroup]) const {
    if (weights.data == nullptr) {
      cuda::load(stage[0], g.index, g.low, g.high, m);
      return;
    }
    Terms sum;
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      const float w = weight(sample, j);
      if (w == 0.0f) continue;
      float v[kGroup];
      cuda::load(stage[j], g.index, g.low, g.high, v);
      sum.add(v, w);
    }
    copy(sum.v, m);
  }
};

// A coefficient per group of rows, or one for all, in double like the CPU's.
struct Values {
  double value;
  const void* data;
  bool wide;

  Values() = default;
  explicit Values(const Coefficient& c) : value(c.value), data(c.data), wide(c.wide) {}
  __device__ __forceinline__ double operator()(int64_t group) const {
    if (data == nullptr) return value;
    return wide ? static_cast<const double*>(data)[group] : static_cast<const float*>(data)[group];
  }
};

inline int64_t batch_of(const TensorView& t) { return t.ndim > 0 ? t.shape[0] : 1; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace genfast::cuda
