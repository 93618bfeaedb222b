// Kernels over rows of the last dimension: who owns a row, and the perturbed logits of a row.
#pragma once
#include "cuda/noise.cuh"
#include "cuda/team.cuh"
#include "math/sampling.h"

namespace genfast::cuda {

constexpr int64_t kWarpColumns = 1024;     // a warp's row: 4 KiB of shared memory, 8 rows a block
constexpr int64_t kCachedColumns = 24576;  // a block's row: 96 KiB, two blocks a multiprocessor
constexpr int kWarpsPerBlock = 8;

__device__ __forceinline__ float infinity() { return from_bits(0x7F800000u); }
__device__ __forceinline__ float not_a_number() { return from_bits(0x7FC00000u); }
__device__ __forceinline__ bool finite(float x) { return x > -infinity() && x < infinity(); }

// Rows over the last dimension; one seed per sample of dim 0 covers that sample's rows.
inline Groups row_groups(const TensorView& t, const Noise& noise) {
  const int64_t cols = t.ndim > 0 ? t.shape[t.ndim - 1] : 1;
  return Groups(t.numel, cols > 0 ? t.numel / cols : 0, noise);
}

// Calls fn(group, slot) for this thread's groups of a row; slot is the group's place in a cache of
// 8 per_row floats, which only this thread touches.
template <class Team, class Fn>
__device__ __forceinline__ void for_groups(const Team& team, const Groups& groups, int64_t row,
                                           Fn&& fn) {
  for (int64_t i = team.rank(); i < groups.per_row; i += team.size()) {
    const Group g(groups, row, i);
    if (!g.empty()) fn(g, i * kGroup);
  }
}

// A number that is read on the device, or was on the host.
struct Tau {
  const float* data = nullptr;
  float value = 1.0f;

  explicit Tau(const TensorView& t) {
    if (!t.defined()) return;
    const auto* from = static_cast<const float*>(t.data);
    if (t.is_cpu())
      value = *from;
    else
      data = from;
  }
  __device__ __forceinline__ float inverse() const {
    return 1.0f / (data != nullptr ? *data : value);
  }
};

// (logits + g) / tau of a row.
struct Perturbed {
  Groups groups;
  Stage logits;
  Tau tau;
  Noise noise;

  Perturbed(const TensorView& t, const Noise& n, const TensorView& tau_)
      : groups(row_groups(t, n)), logits(t), tau(tau_), noise(n) {}

  __device__ __forceinline__ void values(const Group& g, float inv_tau, float (&v)[kGroup]) const {
    float e[kGroup];
    load(logits, g.index, g.low, g.high, v);
    noise_of<GumbelMap>(noise, g, e);
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      v[i] = i >= g.low && i < g.high ? (v[i] + e[i]) * inv_tau : -infinity();
  }

  // The largest value and its first column; +inf when the row holds a NaN. Fills the cache.
  template <class Team>
  __device__ __forceinline__ Best best(const Team& team, int64_t row, float inv_tau,
                                       float* cache) const {
    Best found{-infinity(), INT64_MAX};
    for_groups(team, groups, row, [&](const Group& g, int64_t slot) {
      float v[kGroup];
      values(g, inv_tau, v);
      const int64_t first = g.index - row * groups.cols;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (cache != nullptr) cache[slot + i] = v[i];
        if (v[i] > found.value) found = {v[i], first + i};
        if (v[i] != v[i]) found = {infinity(), first + i};
      }
    });
    return team.reduce(found, Better());
  }

  // e^(value - top); the cache is left holding them.
  __device__ __forceinline__ void exponentials(const Group& g, int64_t slot, float inv_tau,
                                               float top, const float* cache,
                                               float (&v)[kGroup]) const {
    if (cache != nullptr) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) v[i] = cache[slot + i];
      return;
    }
    values(g, inv_tau, v);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) v[i] = exp_of<float>(v[i] - top);
  }
  template <class Team>
  __device__ __forceinline__ double total(const Team& team, int64_t row, float inv_tau, float top,
                                          float* cache) const {
    double sum = 0;
    for_groups(team, groups, row, [&](const Group& g, int64_t slot) {
      float v[kGroup], part = 0.0f;
      if (cache != nullptr) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) cache[slot + i] = exp_of<float>(cache[slot + i] - top);
      }
      exponentials(g, slot, inv_tau, top, cache, v);
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        if (i >= g.low && i < g.high) part += v[i];
      sum += part;
    });
    return team.reduce(sum, Add());
  }
};

// op(team, row, cache): cache is null when the row does not fit.
template <class Team, class Op>
__global__ void __launch_bounds__(512, 1)
    each_row(const __grid_constant__ Op op, int64_t rows, int64_t cache_floats) {
  GENFAST_DYNAMIC_SHARED(memory);
  const int64_t warp = Team::kIsWarp ? threadIdx.x / 32 : 0;
  const int64_t row = Team::kIsWarp ? blockIdx.x * static_cast<int64_t>(kWarpsPerBlock) + warp
                                    : static_cast<int64_t>(blockIdx.x);
  if (row >= rows) return;
  float* cache =
      cache_floats > 0 ? reinterpret_cast<float*>(memory) + warp * cache_floats : nullptr;
  op(Team(), row, cache);
}

template <class Op>
const char* launch_rows(const Op& op, const Groups& groups, bool wants_cache,
                        const TensorView& on) {
  const int64_t rows = groups.rows, floats = groups.per_row * kGroup;
  if (rows * groups.cols == 0) return nullptr;
  if (groups.cols <= kWarpColumns) {
    const int64_t cache = wants_cache ? floats : 0;
    return launch(each_row<WarpTeam, Op>, blocks_for(rows, kWarpsPerBlock),
                  dim3(32 * kWarpsPerBlock), static_cast<size_t>(cache * kWarpsPerBlock * 4), on,
                  op, rows, cache);
  }
  const int64_t cache = wants_cache && groups.cols <= kCachedColumns ? floats : 0;
  const int threads = groups.cols <= 8192 ? 256 : 512;
  return launch(each_row<BlockTeam, Op>, blocks_for(rows, 1), dim3(threads),
                static_cast<size_t>(cache * 4), on, op, rows, cache);
}

}  // namespace genfast::cuda
