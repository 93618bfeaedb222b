// Teams that own a row: one warp, or one whole block. Reductions run in an order that the team's
// size alone decides, so a row's result never depends on the grid.
#pragma once
#include "cuda/launch.cuh"

namespace genfast::cuda {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Larger {  // a NaN in a is dropped, as in math/lane.h
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b ? a : b; }
};

struct Best {  // argmax: the larger value, then the lower index
  float value;
  int64_t index;
};
struct Better {
  __device__ __forceinline__ Best operator()(const Best& a, const Best& b) const {
    return a.value > b.value || (a.value == b.value && a.index < b.index) ? a : b;
  }
};

template <class T>
__device__ __forceinline__ T shuffle_xor(T v, int bits) {
  return __shfl_xor_sync(kAllLanes, v, bits);
}
__device__ __forceinline__ Best shuffle_xor(Best v, int bits) {
  return {__shfl_xor_sync(kAllLanes, v.value, bits), __shfl_xor_sync(kAllLanes, v.index, bits)};
}

// Every lane leaves with the same bits: the pairs of a butterfly are the same on both sides.
template <class T, class Op>
__device__ __forceinline__ T reduce_warp(T v, Op op) {
#pragma unroll
  for (int bits = 16; bits > 0; bits >>= 1) v = op(v, shuffle_xor(v, bits));
  return v;
}

// Of the warp's whole numbers; one instruction each.
__device__ __forceinline__ int least_of_warp(int v) { return __reduce_min_sync(kAllLanes, v); }
__device__ __forceinline__ int most_of_warp(int v) { return __reduce_max_sync(kAllLanes, v); }

struct WarpTeam {
  static constexpr bool kIsWarp = true;
  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x % 32); }
  __device__ __forceinline__ int size() const { return 32; }
  __device__ __forceinline__ void sync() const { __syncwarp(); }
  template <class T, class Op>
  __device__ __forceinline__ T reduce(T v, Op op) const {
    return reduce_warp(v, op);
  }
};

struct BlockTeam {  // blockDim.x a multiple of 32
  static constexpr bool kIsWarp = false;
  __device__ __forceinline__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  template <class T, class Op>
  __device__ __forceinline__ T reduce(T v, Op op) const {
    GENFAST_SHARED(T[32], of_warp);
    v = reduce_warp(v, op);
    const int warps = size() / 32;
    __syncthreads();  // the previous reduction has been read
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
    __syncthreads();
    T all = of_warp[0];
    for (int w = 1; w < warps; ++w) all = op(all, of_warp[w]);
    return all;
  }
};

}  // namespace genfast::cuda
