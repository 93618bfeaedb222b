// Attention by the products of warpgroups: sm_90a, calls without options whose rows are whole.
// Operands lie in panels (cuda/warpgroup.cuh); a warpgroup owns 64 rows of a product, and a warp's
// 16 of them have the layout of mma.m16n8k16, so masks and softmax are those of the other kernels.
#pragma once
#include "cuda/attention/softmax.cuh"
#include "cuda/warpgroup.cuh"

namespace genfast::cuda {
namespace {

constexpr int kGroupRows = 64, kGroupThreads = 128;

template <int kDim, int kHeight>
__device__ __forceinline__ Operand operand_of(const Rows16<kDim, kHeight>& rows) {
  return Operand(rows.base, kHeight);
}
// Bytes to columns [16 k, 16 k + 16) of panels of kHeight rows.
template <int kHeight>
__host__ __device__ constexpr int columns_at(int k) {
  return k / 4 * kHeight * 128 + k % 4 * 32;
}

// c (64 x 8 kN) = rows [row, row + 64) of a times the transpose of rows [of_b, of_b + 8 kN) of b:
// both along.
template <class T, int kDim, int kA, int kB, int kN>
__device__ __forceinline__ void group_rows(const Rows16<kDim, kA>& a, int row,
                                           const Rows16<kDim, kB>& b, int of_b, float (&c)[kN][4]) {
  const Operand left = operand_of(a) + row * 128, right = operand_of(b) + of_b * 128;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k)
    product<T::kBf16, false, false, kN>(c, left + columns_at<kA>(k), right + columns_at<kB>(k),
                                        k > 0);
}

// c (64 x kDim) += w (64 x 16 kSteps, fragments) times rows [row, row + 16 kSteps) of b.
template <class T, int kDim, int kB, int kSteps>
__device__ __forceinline__ void group_add(const uint32_t (&w)[kSteps][4], const Rows16<kDim, kB>& b,
                                          int row, float (&c)[kDim / 8][4]) {
  constexpr int kN = kDim <= 128 ? kDim / 8 : 16;
  const Operand right = operand_of(b);
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int n = 0; n < kDim / 8; n += kN)
      product<T::kBf16, true, kN>(c + n, w[k], right + (n / 8 * kB + row + 16 * k) * 128, true);
}

// The end of a forward: sums to rows of the output (row_of), through the warp's own rows of
// `stage`.
template <class T, int kDim, class Stage, class RowOf>
__device__ __forceinline__ void finish_rows(const ForwardPlan& plan, const Sequence& s,
                                            const Query* queries, int row, const Stage& stage,
                                            float unit, const float (&m)[2], float (&l)[2],
                                            const float (&o)[kDim / 8][4], RowOf&& row_of) {
  const AttentionParams& p = plan.p;
  const int g = static_cast<int>(threadIdx.x % 32 / 4);
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    l[half] += shuffle_xor(l[half], 1);
    l[half] += shuffle_xor(l[half], 2);
    factor[half] = finish_row(p, s, queries[row + g + 8 * half], m[half] * unit, l[half]);
  }
  store_rows<T, kDim>(
      o, factor, stage, row, static_cast<int>(p.Dv), p.out_dtype, plan.whole_out,
      [&](int r) -> char* { return row_of(p.out, bytes_of(p.out_dtype), row + r); });
}

// Fragments of a left operand from a product's sums.
template <class T, int kN>
__device__ __forceinline__ void pack_rows(const float (&c)[kN][4], uint32_t (&w)[kN / 2][4]) {
#pragma unroll
  for (int k = 0; k < kN / 2; ++k)
#pragma unroll
    for (int f = 0; f < 4; ++f)
      w[k][f] = T::pack(c[2 * k + f / 2][f % 2 * 2], c[2 * k + f / 2][f % 2 * 2 + 1]);
}

}  // namespace
}  // namespace genfast::cuda
