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

// Whether dQ's warps keep their fragments of Q and dO in registers; 128 columns with options have
// none left for them.
template <int kDim, bool kOptions>
constexpr bool kHold = kDim <= 64 || !kOptions;
template <int kDim, bool kOptions>
constexpr size_t kSharedOfQ =
    size_t{2} * 2 * kDim * (kMmaRows + (kHold<kDim, kOptions> ? 1 : 2) * kBackwardRows<kDim>);
template <int kDim>
constexpr size_t kSharedOfK = size_t{2} * 2 * kDim * (kMmaRows + 2 * kBackwardRows<kDim>);

// dQ: a block owns 64 query rows; keys pass by in two stages, of which the second lies where Q and
// dO lay when their fragments are in registers.
template <class T, int kDim, bool kOptions>
__global__ void __launch_bounds__(kMmaThreads, 2)
    mma_backward_q(const __grid_constant__ GradientPlan plan) {
  constexpr int kKeys = kBackwardRows<kDim>, kN = kKeys / 8;
  GENFAST_DYNAMIC_SHARED(memory);
  GENFAST_SHARED(Query[kMmaRows], queries);
  const AttentionParams& p = plan.g.p;
  const Rows16<kDim> q{reinterpret_cast<uint16_t*>(memory)}, dout{q.base + kMmaRows * kDim};
  const auto stage_of = [&](int stage, int values) {
    const int second = kHold<kDim, kOptions> ? 0 : 2 * (kMmaRows + kKeys);
    return Rows16<kDim>{q.base + ((stage == 0 ? 2 * kMmaRows : second) + values * kKeys) * kDim};
  };
  const Task task = task_of(p, Walk(p, kMmaRows));
  const Sequence s = device_sequence(p, task.b);
  const int64_t first = task.tile * kMmaRows;
  const bool whole = !kOptions || plan.whole;
  if (first >= s.Sq * group_of(p)) return;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  if (thread < kMmaRows) queries[thread] = query_of(p, s, task.kv_head, first + thread);
  __syncthreads();
  const Seen seen = seen_by<kMmaRows>(queries);
  const auto row_of = [&](const AttentionRows& rows, int r) -> char* {
    return query_row(rows, 2, s, queries[r]);
  };
  q.template fill<kMmaRows>(static_cast<int>(p.D), whole, thread,
                            [&](int r) -> const char* { return row_of(p.q, r); });
  dout.template fill<kMmaRows>(static_cast<int>(p.Dv), whole, thread,
                               [&](int r) -> const char* { return row_of(plan.g.dout, r); });
  copy_commit();

  const int row = thread / 32 * 16, g = lane / 4, t = lane % 4;
  const Query mine[2] = {queries[row + g], queries[row + g + 8]};
  float lse2[2], delta[2], dq[1][kDim / 8][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    lse2[half] = infinite(), delta[half] = 0.0f;
    if (mine[half].position < 0) continue;
    const int64_t at = RowStats::index(p, s.b, mine[half]);
    lse2[half] = plan.stats.lse2[at], delta[half] = plan.stats.delta[at];
  }
  copy_wait<0>();
  __syncthreads();
  uint32_t own_q[kDim / 16][1][4], own_dout[kDim / 16][1][4];
#pragma unroll
  for (int c = 0; c < kDim / 16 && kHold<kDim, kOptions>; ++c)
    load_matrix(own_q[c][0], left_of(q, row) ^ (32 * c)),
        load_matrix(own_dout[c][0], left_of(dout, row) ^ (32 * c));
  __syncthreads();  // the second stage may come

  using Loader = KeyLoader<kDim, kKeys, kMmaThreads, !kOptions>;
  const Loader keys(p, p.k, s, task.kv_head, p.D, whole, true, thread);
  const Loader values(p, p.v, s, task.kv_head, p.Dv, whole, true, thread);
  const auto load = [&](int stage, int block) {
    if (block < seen.any_hi) {
      keys(stage_of(stage, 0), block);
      values(stage_of(stage, 1), block);
    }
    copy_commit();
  };
  int stage = 0;
  load(0, seen.any_lo / kKeys * kKeys);
#pragma unroll 1
  for (int block = seen.any_lo / kKeys * kKeys; block < seen.any_hi; block += kKeys, stage ^= 1) {
    load(stage ^ 1, block + kKeys);
    copy_wait<1>();
    __syncthreads();  // this stage is here
    float w[1][kN][4], d[1][kN][4];
    if constexpr (kHold<kDim, kOptions>) {
      multiply_held<T, kDim>(own_q, stage_of(stage, 0), w);
      multiply_held<T, kDim>(own_dout, stage_of(stage, 1), d);
    } else {
      multiply_rows<T, kDim>(q, row, stage_of(stage, 0), w);
      multiply_rows<T, kDim>(dout, row, stage_of(stage, 1), d);
    }
    const bool full = seen.every_lo <= block && seen.every_hi >= block + kKeys;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        gradient_of<kOptions, false>(p, s, mine[e / 2], lse2[e / 2], delta[e / 2],
                                     block + 8 * n + 2 * t + e % 2, full, w[0][n][e], d[0][n][e]);
    add_weighted<T, kDim>(d, stage_of(stage, 0), dq);
    __syncthreads();  // nobody reads this stage any more
  }
  copy_wait<0>();
  const float factor[2] = {p.scale, p.scale};
  store_rows<T, kDim>(dq[0], factor, q, row, static_cast<int>(p.D), p.dtype, whole,
                      [&](int r) -> char* { return row_of(plan.g.dq, row + r); });
}

// dK and dV: a block owns 64 keys; the queries of all heads of the group pass by in two stages.
template <class T, int kDim, bool kOptions>
__global__ void __launch_bounds__(kMmaThreads, kDim <= 64 ? 2 : 1)
    mma_backward_k(const __grid_constant__ GradientPlan plan) {
  constexpr int kPass = kBackwardRows<kDim>, kN = kPass / 8;
  GENFAST_DYNAMIC_SHARED(memory);
  GENFAST_SHARED(PassingQueries<kPass>, passing);
  const AttentionParams& p = plan.g.p;
  const Rows16<kDim> k{reinterpret_cast<uint16_t*>(memory)}, v{k.base + kMmaRows * kDim};
  const auto stage_of = [&](int stage, int gradient) {
    return Rows16<kDim>{v.base + (kMmaRows + (2 * stage + gradient) * kPass) * kDim};
  };
  const int64_t tiles = (p.Sk + kMmaRows - 1) / kMmaRows, at = blockIdx.x / tiles;
  const int first = static_cast<int>((blockIdx.x - at * tiles) * kMmaRows);
  const int kv_head = static_cast<int>(at % p.Hkv);
  const Sequence s = device_sequence(p, at / p.Hkv);
  if (first >= s.Sk) return;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  using Loader = KeyLoader<kDim, kMmaRows, kMmaThreads, !kOptions>;
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const bool whole = !kOptions || plan.whole;
  Loader(p, p.k, s, kv_head, p.D, whole, true, thread)(k, first);
  Loader(p, p.v, s, kv_head, p.Dv, whole, true, thread)(v, first);
  const int row = thread / 32 * 16, g = lane / 4, t = lane % 4;
  float dk[1][kDim / 8][4] = {}, dv[1][kDim / 8][4] = {};
  const int rows = static_cast<int>(s.Sq * group_of(p));

  const auto seeing = [&](int block) {
    return next_seeing<kPass>(p, s, block, rows, first, first + kMmaRows);
  };
  const auto load = [&](int stage, int slot, int block) {
    const auto from = [&](const Rows16<kDim>& to, const AttentionRows& operand, int dim) {
      to.template fill<kPass>(dim, whole, thread,
                              [&](int r) { return passing.row(operand, s, slot, r); });
    };
    if (block < rows) {
      from(stage_of(stage, 0), p.q, D);
      from(stage_of(stage, 1), plan.g.dout, Dv);
    }
    copy_commit();
  };
  int block = seeing(0), next = seeing(block + kPass);
  passing.describe(plan, s, kv_head, 0, block);
  passing.describe(plan, s, kv_head, 1, next);
  __syncthreads();
  load(0, 0, block);
  int stage = 0, slot = 0;
#pragma unroll 1
  while (block < rows) {
    const int slot_of_next = slot == 2 ? 0 : slot + 1;
    load(stage ^ 1, slot_of_next, next);
    const int after = seeing(next + kPass);
    copy_wait<1>();
    __syncthreads();  // this stage is here
    passing.describe(plan, s, kv_head, slot == 0 ? 2 : slot - 1, after);
    float w[1][kN][4], d[1][kN][4];
    multiply_rows<T, kDim>(k, row, stage_of(stage, 0), w);
    multiply_rows<T, kDim>(v, row, stage_of(stage, 1), d);
    const Seen seen = seen_of_rows<kPass>(p, s, block, rows);
    const bool full = seen.every_lo <= first && seen.every_hi >= first + kMmaRows;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = 8 * n + 2 * t + e % 2;
        gradient_of<kOptions, false>(p, s, passing.queries[slot][r], passing.stats[slot][0][r],
                                     passing.stats[slot][1][r], first + row + g + 8 * (e / 2), full,
                                     w[0][n][e], d[0][n][e]);
      }
    add_weighted<T, kDim>(w, stage_of(stage, 1), dv);
    add_weighted<T, kDim>(d, stage_of(stage, 0), dk);
    __syncthreads();  // nobody reads this stage any more; the block after the next is described
    block = next, next = after, slot = slot_of_next, stage ^= 1;
  }
  copy_wait<0>();
  __syncthreads();  // of keys that nobody sees, some may still be arriving
  const auto key_of = [&](const AttentionRows& operand, int j) -> char* {
    return first + j < s.Sk ? key_row(p, operand, 2, s, kv_head, first + j) : nullptr;
  };
  const float one[2] = {1.0f, 1.0f}, scale[2] = {p.scale, p.scale};
  store_rows<T, kDim>(dk[0], scale, k, row, D, p.dtype, whole,
                      [&](int j) -> char* { return key_of(plan.g.dk, row + j); });
  store_rows<T, kDim>(dv[0], one, v, row, Dv, p.dtype, whole,
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
                   kSharedOfQ<kDim, kOptions>, on(p.place), plan);
  if (error != nullptr || p.Sk == 0) return error;
  return launch(mma_backward_k<T, kDim, kOptions>, dim3(static_cast<unsigned>(p.B * p.Hkv * tiles)),
                dim3(kMmaThreads), kSharedOfK<kDim>, on(p.place), plan);
}

// D and Dv at most 128.
template <class T>
const char* launch_mma_backward(const GradientPlan& plan, bool options) {
  options = options || !plan.whole;
  const bool narrow = plan.g.p.D <= 64 && plan.g.p.Dv <= 64;
  if (narrow)
    return options ? launch_mma_backward<T, 64, true>(plan)
                   : launch_mma_backward<T, 64, false>(plan);
  return options ? launch_mma_backward<T, 128, true>(plan)
                 : launch_mma_backward<T, 128, false>(plan);
}

}  // namespace
}  // namespace genfast::cuda
