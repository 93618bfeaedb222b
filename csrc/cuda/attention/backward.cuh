// Backward on tensor cores, heads of up to 128 columns: what a block owns lies in shared memory for
// good, the other side passes by. Products and layouts are those of the forward kernel.
#pragma once
#include "cuda/attention/gradient.cuh"
#include "cuda/attention/mma.cuh"

namespace genfast::cuda {
namespace {

// Passing rows of a block: with 128 columns dK and dV already take 128 registers.
template <int kDim>
constexpr int kBackwardRows = kDim <= 64 ? 64 : 32;

template <int kDim>
constexpr size_t kBackwardShared = size_t{2} * 2 * kDim * (kMmaRows + kBackwardRows<kDim>);

// dQ: a block owns 64 query rows; keys pass by.
template <class T, int kDim, bool kOptions>
__global__ void __launch_bounds__(kMmaThreads, 2)
    mma_backward_q(const __grid_constant__ GradientPlan plan) {
  constexpr int kKeys = kBackwardRows<kDim>, kN = kKeys / 8;
  GENFAST_DYNAMIC_SHARED(memory);
  GENFAST_SHARED(Query[kMmaRows], queries);
  const AttentionParams& p = plan.g.p;
  const Rows16<kDim> q{reinterpret_cast<uint16_t*>(memory)}, dout{q.base + kMmaRows * kDim};
  const Rows16<kDim> k{dout.base + kMmaRows * kDim}, v{k.base + kKeys * kDim};
  const Task task = task_of(p, Walk(p, kMmaRows));
  const Sequence s = device_sequence(p, task.b);
  const int64_t first = task.tile * kMmaRows;
  if (first >= s.Sq * (p.Hq / p.Hkv)) return;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  if (thread < kMmaRows) queries[thread] = query_of(p, s, task.kv_head, first + thread);
  __syncthreads();
  const Seen seen = seen_by<kMmaRows>(queries);
  const auto row_of = [&](const AttentionRows& rows, int r) -> char* {
    const Query at = queries[r];
    return at.position < 0 ? nullptr : row_at(rows, 2, s.b, at.head, s.q_row + at.position);
  };
  q.template fill<kMmaRows>(static_cast<int>(p.D), plan.whole,
                            [&](int r) -> const char* { return row_of(p.q, r); });
  dout.template fill<kMmaRows>(static_cast<int>(p.Dv), plan.whole,
                               [&](int r) -> const char* { return row_of(plan.g.dout, r); });
  copy_commit();

  const int row = thread / 32 * 16, g = lane / 4, t = lane % 4;
  const Query mine[2] = {queries[row + g], queries[row + g + 8]};
  float lse2[2], delta[2], dq[kDim / 8][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    lse2[half] = infinite(), delta[half] = 0.0f;
    if (mine[half].position < 0) continue;
    const int64_t at = RowStats::index(p, s.b, mine[half]);
    lse2[half] = plan.stats.lse2[at], delta[half] = plan.stats.delta[at];
  }
  for (int block = seen.any_lo / kKeys * kKeys; block < seen.any_hi; block += kKeys) {
    const auto load_keys = [&](const Rows16<kDim>& to, const AttentionRows& rows, int64_t dim) {
      to.template fill<kKeys>(static_cast<int>(dim), plan.whole, [&](int j) -> const char* {
        return block + j < s.Sk ? key_row(p, rows, 2, s, task.kv_head, block + j) : nullptr;
      });
    };
    __syncthreads();  // nobody reads the last block any more
    load_keys(k, p.k, p.D);
    load_keys(v, p.v, p.Dv);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    float w[kN][4], d[kN][4];
    multiply_rows<T, kDim, kN>(q, row, k, w);
    multiply_rows<T, kDim, kN>(dout, row, v, d);
    const bool full = seen.every_lo <= block && seen.every_hi >= block + kKeys;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        gradient_of<kOptions, false>(p, s, mine[e / 2], lse2[e / 2], delta[e / 2],
                                     block + 8 * n + 2 * t + e % 2, full, w[n][e], d[n][e]);
    add_weighted<T, kDim, kN>(d, k, dq);
  }
  copy_wait<0>();
  __syncthreads();  // of a tile that sees no keys, queries may still be arriving
  const float factor[2] = {p.scale, p.scale};
  store_rows<T, kDim>(dq, factor, q, row, static_cast<int>(p.D), p.dtype, plan.whole,
                      [&](int r) -> char* { return row_of(plan.g.dq, row + r); });
}

// dK and dV: a block owns 64 keys; the queries of all heads of the group pass by.
template <class T, int kDim, bool kOptions>
__global__ void __launch_bounds__(kMmaThreads, kDim <= 64 ? 2 : 1)
    mma_backward_k(const __grid_constant__ GradientPlan plan) {
  constexpr int kPass = kBackwardRows<kDim>, kN = kPass / 8;
  GENFAST_DYNAMIC_SHARED(memory);
  GENFAST_SHARED(Query[kPass], queries);
  GENFAST_SHARED(float[2][kPass], stats);
  const AttentionParams& p = plan.g.p;
  const Rows16<kDim> k{reinterpret_cast<uint16_t*>(memory)}, v{k.base + kMmaRows * kDim};
  const Rows16<kDim> q{v.base + kMmaRows * kDim}, dout{q.base + kPass * kDim};
  const int64_t tiles = (p.Sk + kMmaRows - 1) / kMmaRows, at = blockIdx.x / tiles;
  const int first = static_cast<int>((blockIdx.x - at * tiles) * kMmaRows);
  const int kv_head = static_cast<int>(at % p.Hkv);
  const Sequence s = device_sequence(p, at / p.Hkv);
  if (first >= s.Sk) return;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const auto key_of = [&](const AttentionRows& rows, int j) -> char* {
    return first + j < s.Sk ? key_row(p, rows, 2, s, kv_head, first + j) : nullptr;
  };
  k.template fill<kMmaRows>(static_cast<int>(p.D), plan.whole,
                            [&](int j) -> const char* { return key_of(p.k, j); });
  v.template fill<kMmaRows>(static_cast<int>(p.Dv), plan.whole,
                            [&](int j) -> const char* { return key_of(p.v, j); });
  copy_commit();
  const int row = thread / 32 * 16, g = lane / 4, t = lane % 4;
  float dk[kDim / 8][4] = {}, dv[kDim / 8][4] = {};
  const int64_t rows = s.Sq * (p.Hq / p.Hkv);
  for (int64_t block = 0; block < rows; block += kPass) {
    __syncthreads();  // nobody reads the last block any more
    if (thread < kPass) {
      const Query query = query_of(p, s, kv_head, block + thread);
      queries[thread] = query;
      const bool real = query.position >= 0;
      const int64_t i = real ? RowStats::index(p, s.b, query) : 0;
      stats[0][thread] = real ? plan.stats.lse2[i] : infinite();
      stats[1][thread] = real ? plan.stats.delta[i] : 0.0f;
    }
    __syncthreads();
    const Seen seen = seen_by<kPass>(queries);
    if (seen.any_lo >= first + kMmaRows || seen.any_hi <= first) continue;
    const auto load_queries = [&](const Rows16<kDim>& to, const AttentionRows& from, int64_t dim) {
      to.template fill<kPass>(static_cast<int>(dim), plan.whole, [&](int r) -> const char* {
        const Query query = queries[r];
        return query.position < 0 ? nullptr
                                  : row_at(from, 2, s.b, query.head, s.q_row + query.position);
      });
    };
    load_queries(q, p.q, p.D);
    load_queries(dout, plan.g.dout, p.Dv);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    float w[kN][4], d[kN][4];
    multiply_rows<T, kDim, kN>(k, row, q, w);
    multiply_rows<T, kDim, kN>(v, row, dout, d);
    const bool full = seen.every_lo <= first && seen.every_hi >= first + kMmaRows;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = 8 * n + 2 * t + e % 2;
        gradient_of<kOptions, false>(p, s, queries[r], stats[0][r], stats[1][r],
                                     first + row + g + 8 * (e / 2), full, w[n][e], d[n][e]);
      }
    add_weighted<T, kDim, kN>(w, dout, dv);
    add_weighted<T, kDim, kN>(d, q, dk);
  }
  copy_wait<0>();
  __syncthreads();
  const float one[2] = {1.0f, 1.0f}, scale[2] = {p.scale, p.scale};
  store_rows<T, kDim>(dk, scale, k, row, static_cast<int>(p.D), p.dtype, plan.whole,
                      [&](int j) -> char* { return key_of(plan.g.dk, row + j); });
  store_rows<T, kDim>(dv, one, v, row, static_cast<int>(p.Dv), p.dtype, plan.whole,
                      [&](int j) -> char* { return key_of(plan.g.dv, row + j); });
}

template <class T, int kDim, bool kOptions>
const char* launch_mma_backward(const GradientPlan& plan) {
  const AttentionParams& p = plan.g.p;
  const int64_t tiles = (p.Sk + kMmaRows - 1) / kMmaRows;
  const char* error = nullptr;
  if (p.Sq > 0)
    error = launch(mma_backward_q<T, kDim, kOptions>,
                   dim3(static_cast<unsigned>(Walk(p, kMmaRows).blocks(p))), dim3(kMmaThreads),
                   kBackwardShared<kDim>, on(p.place), plan);
  if (error != nullptr || p.Sk == 0) return error;
  return launch(mma_backward_k<T, kDim, kOptions>, dim3(static_cast<unsigned>(p.B * p.Hkv * tiles)),
                dim3(kMmaThreads), kBackwardShared<kDim>, on(p.place), plan);
}

// D and Dv at most 128.
template <class T>
const char* launch_mma_backward(const GradientPlan& plan, bool options) {
  const bool narrow = plan.g.p.D <= 64 && plan.g.p.Dv <= 64;
  if (narrow)
    return options ? launch_mma_backward<T, 64, true>(plan)
                   : launch_mma_backward<T, 64, false>(plan);
  return options ? launch_mma_backward<T, 128, true>(plan)
                 : launch_mma_backward<T, 128, false>(plan);
}

}  // namespace
}  // namespace genfast::cuda
