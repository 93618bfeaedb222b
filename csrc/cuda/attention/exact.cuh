// Attention on the ordinary units, in fp32: for fp32 operands, heads wider than the tensor-core
// kernels take, and whatever else they refuse. A warp owns kOwn rows; the other operand passes by
// in blocks of 32 rows, one to a lane for scores, and again one after another for weighted sums.
#pragma once
#include <type_traits>

#include "cuda/attention/score.cuh"

namespace genfast::cuda {
namespace {

constexpr int kExactThreads = 128, kPassing = 32;

// kColumns * 32 is the widest head. Own rows: 16 of a narrow head, 8 of a wide one, so that two
// operands of 512 columns and a passing block stay under the 99 KiB of an sm_86.
template <int kColumns>
struct Exact {
  static constexpr int kWide = 32 * kColumns, kOwn = kColumns <= 4 ? 4 : 2, kRows = 4 * kOwn;
  static constexpr int kPitch = kWide + 1;  // lanes read their own rows: odd, so no bank twice

  static size_t shared(int operands) {
    return sizeof(float) * (operands * kRows * kWide + kPassing * kPitch);
  }

  // kCount rows of `dim` elements as fp32, zeros where from(row) is null.
  template <int kCount, class From>
  static __device__ __forceinline__ void fill(float* to, int pitch, int dim, Dtype dtype,
                                              From&& from) {
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int r = thread / 32; r < kCount; r += kExactThreads / 32) {
      const char* row = from(r);
#pragma unroll 1
      for (int d = thread % 32; d < dim; d += 32)
        to[r * pitch + d] = row == nullptr ? 0.0f : load_any(row, dtype, d);
    }
  }

  // score[r] = own row r times this lane's passing row.
  static __device__ __forceinline__ void dot(const float* own, const float* passing, int dim,
                                             float (&score)[kOwn]) {
    const float* mine = passing + threadIdx.x % 32 * kPitch;
#pragma unroll
    for (int r = 0; r < kOwn; ++r) score[r] = 0.0f;
#pragma unroll 4
    for (int d = 0; d < dim; ++d) {
      const float x = mine[d];
#pragma unroll
      for (int r = 0; r < kOwn; ++r) score[r] = fused_multiply_add(own[r * kWide + d], x, score[r]);
    }
  }

  // sum[r] += weight[r] of every lane times its passing row; lane l has columns l, l + 32, ...
  static __device__ __forceinline__ void weigh(const float (&weight)[kOwn], const float* passing,
                                               int count, int dim, float (&sum)[kOwn][kColumns]) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      float w[kOwn];
#pragma unroll
      for (int r = 0; r < kOwn; ++r) w[r] = __shfl_sync(kAllLanes, weight[r], j);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int d = lane + 32 * c;
        const float x = d < dim ? passing[j * kPitch + d] : 0.0f;
#pragma unroll
        for (int r = 0; r < kOwn; ++r) sum[r][c] = fused_multiply_add(w[r], x, sum[r][c]);
      }
    }
  }
};

}  // namespace
}  // namespace genfast::cuda
