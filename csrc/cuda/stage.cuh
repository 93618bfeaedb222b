// Groups of 8 elements between memory of any dtype and strides and fp32 registers: the GPU's
// counterpart of csrc/cpu/stage.h. The dtype is a uniform branch, not a template: elementwise
// kernels wait for memory, and one kernel per dtype would only make the binary larger.
#pragma once
#include "api/tensor.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace genfast::cuda {

constexpr int kGroup = 8;  // 16 bytes of fp16 / bf16, 32 of fp32; two Philox blocks

struct Stage {
  char* base = nullptr;
  Dtype dtype = Dtype::f32;
  bool dense = true;
  int ndim = 0;
  int64_t shape[kMaxDims] = {}, strides[kMaxDims] = {};

  Stage() = default;
  explicit Stage(const TensorView& t) : base(static_cast<char*>(t.data)), dtype(t.dtype) {
    for (int i = 0; i < t.ndim; ++i) {  // drop ones, merge dimensions that continue each other
      if (t.shape[i] == 1) continue;
      if (ndim > 0 && strides[ndim - 1] == t.strides[i] * t.shape[i]) {
        shape[ndim - 1] *= t.shape[i];
        strides[ndim - 1] = t.strides[i];
      } else {
        shape[ndim] = t.shape[i];
        strides[ndim++] = t.strides[i];
      }
    }
    dense = ndim == 0 || (ndim == 1 && strides[0] == 1);
  }

  // Element offset of a logical (row-major) index.
  __device__ __forceinline__ int64_t offset(int64_t index) const {
    if (dense) return index;
    int64_t at = 0;
#pragma unroll 1
    for (int d = ndim - 1; d > 0; --d) {
      const int64_t q = index / shape[d];
      at += (index - q * shape[d]) * strides[d];
      index = q;
    }
    return at + index * strides[0];
  }
};

// Of memory of any dtype: element `at`.
__device__ __forceinline__ float read_one(const char* base, Dtype dtype, int64_t at) {
  switch (dtype) {
    case Dtype::f16:
      return f32_of_f16(reinterpret_cast<const uint16_t*>(base)[at]);
    case Dtype::bf16:
      return f32_of_bf16(reinterpret_cast<const uint16_t*>(base)[at]);
    case Dtype::f64:
      return static_cast<float>(reinterpret_cast<const double*>(base)[at]);
    default:
      return reinterpret_cast<const float*>(base)[at];
  }
}

__device__ __forceinline__ void write_one(char* base, Dtype dtype, int64_t at, float v) {
  switch (dtype) {
    case Dtype::f16:
      reinterpret_cast<uint16_t*>(base)[at] = static_cast<uint16_t>(pack_f16(v, 0.0f));
      break;
    case Dtype::bf16:
      reinterpret_cast<uint16_t*>(base)[at] = static_cast<uint16_t>(pack_bf16(v, 0.0f));
      break;
    case Dtype::f64:
      reinterpret_cast<double*>(base)[at] = v;
      break;
    default:
      reinterpret_cast<float*>(base)[at] = v;
  }
}

// Elements [at, at + 8) of f32, f16 or bf16, whose first lies on 16 bytes.
__device__ __forceinline__ void read_whole(const char* base, Dtype dtype, int64_t at,
                                           float (&v)[kGroup]) {
  if (dtype == Dtype::f32) {
    const float4* p = reinterpret_cast<const float4*>(base + at * 4);
    const float4 a = p[0], b = p[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    return;
  }
  const uint4 a = *reinterpret_cast<const uint4*>(base + at * 2);
  const uint32_t pairs[4] = {a.x, a.y, a.z, a.w};
  const bool half = dtype == Dtype::f16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto low16 = static_cast<uint16_t>(pairs[i]);
    const auto high16 = static_cast<uint16_t>(pairs[i] >> 16);
    v[2 * i] = half ? f32_of_f16(low16) : f32_of_bf16(low16);
    v[2 * i + 1] = half ? f32_of_f16(high16) : f32_of_bf16(high16);
  }
}

__device__ __forceinline__ void write_whole(char* base, Dtype dtype, int64_t at,
                                            const float (&v)[kGroup]) {
  if (dtype == Dtype::f32) {
    float4* p = reinterpret_cast<float4*>(base + at * 4);
    p[0] = make_float4(v[0], v[1], v[2], v[3]);
    p[1] = make_float4(v[4], v[5], v[6], v[7]);
    return;
  }
  uint32_t pairs[4];
  const bool half = dtype == Dtype::f16;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pairs[i] = half ? pack_f16(v[2 * i], v[2 * i + 1]) : pack_bf16(v[2 * i], v[2 * i + 1]);
  *reinterpret_cast<uint4*>(base + at * 2) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

__device__ __forceinline__ float load_one(const Stage& t, int64_t index) {
  return read_one(t.base, t.dtype, t.offset(index));
}

__device__ __forceinline__ void store_one(const Stage& t, int64_t index, float v) {
  write_one(t.base, t.dtype, t.offset(index), v);
}

// Whether elements [index, index + 8) can go in whole 16-byte words.
__device__ __forceinline__ bool whole(const Stage& t, int64_t index, int low, int high) {
  if (!t.dense || low != 0 || high != kGroup || t.dtype == Dtype::f64) return false;
  const int64_t bytes = t.dtype == Dtype::f32 ? 4 : 2;
  return ((reinterpret_cast<uintptr_t>(t.base) + static_cast<uintptr_t>(index * bytes)) & 15) == 0;
}

// Elements [index + low, index + high) of the group at logical index `index`; zero elsewhere.
__device__ __forceinline__ void load(const Stage& t, int64_t index, int low, int high,
                                     float (&v)[kGroup]) {
  if (whole(t, index, low, high)) return read_whole(t.base, t.dtype, index, v);
  // Rare: edges, strides, misaligned memory. One copy of the code, a select keeps v in registers.
#pragma unroll
  for (int i = 0; i < kGroup; ++i) v[i] = 0.0f;
#pragma unroll 1
  for (int at = low; at < high; ++at) {
    const float x = load_one(t, index + at);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) v[i] = i == at ? x : v[i];
  }
}

__device__ __forceinline__ void store(const Stage& t, int64_t index, int low, int high,
                                      const float (&v)[kGroup]) {
  if (whole(t, index, low, high)) return write_whole(t.base, t.dtype, index, v);
#pragma unroll 1
  for (int at = low; at < high; ++at) {
    float x = v[0];
#pragma unroll
    for (int i = 1; i < kGroup; ++i) x = i == at ? v[i] : x;
    store_one(t, index + at, x);
  }
}

}  // namespace genfast::cuda
