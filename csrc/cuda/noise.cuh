// Contract noise for the kernels of every family, and the walk of groups that meets it.
#pragma once
#include "api/rng.h"
#include "cuda/stage.cuh"
#include "math/rng.h"

namespace genfast::cuda {

// How the four words of a block become four values.
struct UniformMap {
  static __device__ __forceinline__ void map(const Words<uint32_t>& w, float* v) {
    v[0] = uniform<float>(w.w0), v[1] = uniform<float>(w.w1);
    v[2] = uniform<float>(w.w2), v[3] = uniform<float>(w.w3);
  }
};
struct NormalMap {
  static __device__ __forceinline__ void map(const Words<uint32_t>& w, float* v) {
    box_muller<float>(w.w0, w.w1, v[0], v[1]);
    box_muller<float>(w.w2, w.w3, v[2], v[3]);
  }
};
struct ExponentialMap {
  static __device__ __forceinline__ void map(const Words<uint32_t>& w, float* v) {
    v[0] = exponential_noise<float>(w.w0), v[1] = exponential_noise<float>(w.w1);
    v[2] = exponential_noise<float>(w.w2), v[3] = exponential_noise<float>(w.w3);
  }
};
struct GumbelMap {
  static __device__ __forceinline__ void map(const Words<uint32_t>& w, float* v) {
    v[0] = gumbel_noise<float>(w.w0), v[1] = gumbel_noise<float>(w.w1);
    v[2] = gumbel_noise<float>(w.w2), v[3] = gumbel_noise<float>(w.w3);
  }
};
struct LogisticMap {
  static __device__ __forceinline__ void map(const Words<uint32_t>& w, float* v) {
    v[0] = logistic_noise<float>(w.w0), v[1] = logistic_noise<float>(w.w1);
    v[2] = logistic_noise<float>(w.w2), v[3] = logistic_noise<float>(w.w3);
  }
};

__device__ __forceinline__ uint64_t seed_of_row(const Noise& noise, int64_t row) {
  if (noise.seeds == nullptr) return noise.seed;
  return static_cast<uint64_t>(noise.seeds[noise.n_seeds > 1 ? row : 0]);
}

__device__ __forceinline__ Words<uint32_t> philox(uint64_t seed, uint64_t stream, uint64_t block) {
  return philox4x32_10<uint32_t>(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                                 static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32),
                                 static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// Rows x columns cut into groups of 8 that start at a Philox block: group g of a row whose first
// element is word `skip` of its block covers columns [8 g - skip, 8 g - skip + 8).
struct Groups {
  int64_t rows = 1, cols = 0, per_row = 0;
  int64_t rows_per_seed = 1;  // rows that continue each other's elements under one seed
  int64_t offset = 0;

  Groups() = default;
  // rows: of the kernel's choice, a multiple of the number of seeds when that is not one.
  Groups(int64_t numel, int64_t rows_, const Noise& noise) : rows(rows_), offset(noise.offset) {
    cols = rows > 0 ? numel / rows : 0;
    const int64_t seeds = noise.n_seeds > 1 ? noise.n_seeds : 1;
    rows_per_seed = rows / seeds > 0 ? rows / seeds : 1;
    const bool aligned = (offset & 3) == 0 && (rows_per_seed == 1 || (cols & 3) == 0);
    per_row = (cols + (aligned ? 0 : 3) + kGroup - 1) / kGroup;
  }
};

struct Group {
  int64_t row, index;  // logical index of the group's first element (may lie before the row)
  int64_t seed_row;
  uint64_t block;  // first of the two Philox blocks
  int low, high;   // elements [low, high) of the 8 belong to the row

  __device__ __forceinline__ Group(const Groups& all, int64_t row_, int64_t group) : row(row_) {
    seed_row = all.rows_per_seed == 1 ? row : row / all.rows_per_seed;
    const int64_t element = all.offset + (row - seed_row * all.rows_per_seed) * all.cols;
    const int64_t first = group * kGroup - (element & 3);
    block = static_cast<uint64_t>(element >> 2) + static_cast<uint64_t>(group) * 2;
    index = row * all.cols + first;
    low = first < 0 ? static_cast<int>(-first) : 0;
    const int64_t left = all.cols - first;
    high = left < kGroup ? static_cast<int>(left) : kGroup;
  }
  __device__ __forceinline__ bool empty() const { return high <= low; }
};

template <class Map>
__device__ __forceinline__ void noise_of(const Noise& noise, const Group& g, float (&v)[kGroup]) {
  const uint64_t seed = seed_of_row(noise, g.seed_row);
  Map::map(philox(seed, noise.stream, g.block), v);
  Map::map(philox(seed, noise.stream, g.block + 1), v + 4);
}

inline int64_t noise_rows(const Noise& noise, const TensorView& t) {
  return noise.seeds != nullptr && noise.n_seeds > 1 && t.ndim > 0 ? t.shape[0] : 1;
}

// One group per thread: op(group) for every group. kBlocks on a multiprocessor: 3 leave 80
// registers to a thread, 2 leave 128.
constexpr int kThreads = 256;

template <class Op, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) each_group(const __grid_constant__ Op op) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       t < op.groups.rows * op.groups.per_row; t += step) {
    const int64_t row = op.groups.rows == 1 ? 0 : t / op.groups.per_row;
    const Group g(op.groups, row, t - row * op.groups.per_row);
    if (!g.empty()) op(g);
  }
}

template <int kBlocks = 3, class Op>
const char* launch_groups(const Op& op, const TensorView& on) {
  if (op.groups.rows * op.groups.per_row == 0) return nullptr;
  return launch(each_group<Op, kBlocks>, blocks_for(op.groups.rows * op.groups.per_row, kThreads),
                dim3(kThreads), 0, on, op);
}

}  // namespace genfast::cuda
