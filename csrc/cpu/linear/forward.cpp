// y = x weight^T + bias of few rows, as in a transformer's decoding: the weight is read once, and
// its speed is memory's. A row's sums do not depend on the other rows, nor on the threads.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "math/lane.h"

namespace genfast::cpu {
namespace {

constexpr int kRows = 4;     // of x at a time
constexpr int kOutputs = 4;  // 4 x 4 chains of sums

// R outputs of M rows: columns in lanes, summed up at the end.
template <int M, int R>
void block(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t K, const float* bias,
           float* y, int64_t ldy) {
  f32v sums[M][R] = {};
  for (int64_t k = 0; k < K; k += W) {
    f32v v[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) v[r] = load(w + r * ldw + k);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const f32v a = load(x + m * ldx + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[m][r] = fused_multiply_add(a, v[r], sums[m][r]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r)
      y[m * ldy + r] = horizontal_sum(sums[m][r]) + (bias == nullptr ? 0.0f : bias[r]);
}

// The first m rows, at most M.
template <int M, int R, class... Rest>
void rows(int64_t m, Rest... rest) {
  if (m >= M)
    block<M, R>(rest...);
  else if constexpr (M > 1)
    rows<M - 1, R>(m, rest...);
}

}  // namespace

namespace GENFAST_ISA {

void linear(const LinearParams& p) {
  const int64_t M = p.x.shape[0], K = p.x.shape[1], N = p.weight.shape[0];
  const int64_t ldx = p.x.strides[0], ldw = p.weight.strides[0];
  const float* x = static_cast<const float*>(p.x.data);
  const float* w = static_cast<const float*>(p.weight.data);
  const float* bias = static_cast<const float*>(p.bias.data);
  float* y = static_cast<float*>(p.y.data);
  // A second thread costs 2 us, in which one reads 60 KB.
  const int threads = N * K < 1 << 15 ? 1 : p.threads;
  const int64_t parts = workers(threads, (N + 15) / 16);
  parallel_for(parts, threads, [&](int64_t part) {
    const auto begin_of = [&](int64_t i) { return std::min(N, (N * i / parts + 15) / 16 * 16); };
    const int64_t end = begin_of(part + 1);
    for (int64_t o = begin_of(part); o < end; o += kOutputs) {
      const float* shift = bias == nullptr ? nullptr : bias + o;
      for (int64_t m = 0; m < M; m += kRows) {
        const float* a = x + m * ldx;
        float* to = y + m * N + o;
        if (end - o >= kOutputs)
          rows<kRows, kOutputs>(M - m, a, ldx, w + o * ldw, ldw, K, shift, to, N);
        else
          for (int64_t r = 0; r < end - o; ++r)
            rows<kRows, 1>(M - m, a, ldx, w + (o + r) * ldw, ldw, K,
                           shift == nullptr ? nullptr : shift + r, to + r, N);
      }
    }
  });
}

}  // namespace GENFAST_ISA
}  // namespace genfast::cpu
