// Attention on the ordinary units, in fp32: for fp32 operands, heads wider than the tensor-core
// kernels take, and whatever else they refuse. A warp owns kOwn rows; the other operand passes by
// in blocks of 32 rows, one to a lane for scores, and again one after another for weighted sums.
#pragma once
#include <type_traits>

#include "cuda/attention/score.cuh"

namespace genfast::cuda {
namespace {

constexpr int kExactThreads = 128, kPassing = 32;
// One chain of products over a head of 256 leaves an output 1.1e-6 from fp64, chains of 64 added up
// 2.6e-7: the depth that the CPU has.
constexpr int kDepth = 64;

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
    if (dtype == Dtype::f32)
      fill_by<kCount>(to, pitch, dim, from, [](const char* row, int d) {
        return reinterpret_cast<const float*>(row)[d];
      });
    else
      fill_by<kCount>(to, pitch, dim, from,
                      [dtype](const char* row, int d) { return load_any(row, dtype, d); });
  }

  // A warp's rows are on their way together: one after another, waiting for them took longer than
  // all else.
  template <int kCount, class From, class Load>
  static __device__ __forceinline__ void fill_by(float* to, int pitch, int dim, From&& from,
                                                 Load&& load) {
    constexpr int kMine = kCount / (kExactThreads / 32);
    const int first = static_cast<int>(threadIdx.x) / 32 * kMine;
    const char* rows[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) rows[i] = from(first + i);
#pragma unroll 1
    for (int d = static_cast<int>(threadIdx.x) % 32; d < dim; d += 32) {
      float x[kMine];
#pragma unroll
      for (int i = 0; i < kMine; ++i) x[i] = rows[i] == nullptr ? 0.0f : load(rows[i], d);
#pragma unroll
      for (int i = 0; i < kMine; ++i) to[(first + i) * pitch + d] = x[i];
    }
  }

  // score[r] = own row r times this lane's passing row, as the sum of sums over kDepth. Own rows
  // are read by 16 bytes, the same for every lane: 8 accesses for 16 products instead of 20.
  static __device__ __forceinline__ void dot(const float* own, const float* passing, int dim,
                                             float (&score)[kOwn]) {
    const float* mine = passing + threadIdx.x % 32 * kPitch;
#pragma unroll
    for (int r = 0; r < kOwn; ++r) score[r] = 0.0f;
#pragma unroll 1
    for (int d = 0; d < dim; d += kDepth) {
      float part[kOwn];
      dot_part(own + d, mine + d, dim - d < kDepth ? dim - d : kDepth, part);
#pragma unroll
      for (int r = 0; r < kOwn; ++r) score[r] += part[r];
    }
  }
  static __device__ __forceinline__ void dot_part(const float* own, const float* mine, int dim,
                                                  float (&part)[kOwn]) {
#pragma unroll
    for (int r = 0; r < kOwn; ++r) part[r] = 0.0f;
    int d = 0;
#pragma unroll 2
    for (; d + 4 <= dim; d += 4) {
      const float x[4] = {mine[d], mine[d + 1], mine[d + 2], mine[d + 3]};
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        const float4 a = *reinterpret_cast<const float4*>(own + r * kWide + d);
        part[r] = fused_multiply_add(a.x, x[0], part[r]);
        part[r] = fused_multiply_add(a.y, x[1], part[r]);
        part[r] = fused_multiply_add(a.z, x[2], part[r]);
        part[r] = fused_multiply_add(a.w, x[3], part[r]);
      }
    }
#pragma unroll 1
    for (; d < dim; ++d)
#pragma unroll
      for (int r = 0; r < kOwn; ++r)
        part[r] = fused_multiply_add(own[r * kWide + d], mine[d], part[r]);
  }

  // add(r, c, sum of weight[r] of every lane times its passing row); lane l has columns l, l + 32,
  // ... A sum of its own for each block of rows: one chain over all of them rounds 32 times as
  // often.
  template <class Sink>
  static __device__ __forceinline__ void weigh(const float (&weight)[kOwn], const float* passing,
                                               int count, int dim, Sink&& add) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    float part[kOwn][kColumns] = {};
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
        for (int r = 0; r < kOwn; ++r) part[r][c] = fused_multiply_add(w[r], x, part[r][c]);
      }
    }
#pragma unroll
    for (int r = 0; r < kOwn; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) add(r, c, part[r][c]);
  }
};

}  // namespace
}  // namespace genfast::cuda
