// Forward on tensor cores: online softmax over blocks of keys (math in cpu/attention/forward.h).
// Keys and values of a block come by cp.async, the values while the scores are made, the next keys
// while the values are used. Options other than lengths, window and sinks are one boolean.
#pragma once
#include "cuda/attention/mma.cuh"

namespace genfast::cuda {
namespace {

// Keys of a block: 64, or 32 where the sums of 256 columns already take 128 registers.
template <int kDim>
constexpr int kForwardKeys = kDim <= 128 ? 64 : 32;

struct ForwardPlan {
  AttentionParams p;
  Walk walk;
  bool whole_q, whole_k, whole_v, whole_out;
};

template <class T, int kDim, bool kOptions>
__global__ void __launch_bounds__(kMmaThreads, kDim <= 128 ? 2 : 1)
    mma_forward(const __grid_constant__ ForwardPlan plan) {
  constexpr int kKeys = kForwardKeys<kDim>, kN = kKeys / 8;
  GENFAST_DYNAMIC_SHARED(memory);
  GENFAST_SHARED(Query[kMmaRows], queries);
  const AttentionParams& p = plan.p;
  const Rows16<kDim> q{reinterpret_cast<uint16_t*>(memory)};
  const Rows16<kDim> k{q.base + kMmaRows * kDim}, v{k.base + kKeys * kDim};
  const Task task = task_of(p, plan.walk);
  const Sequence s = device_sequence(p, task.b);
  const int64_t first = task.tile * kMmaRows;
  if (first >= s.Sq * (p.Hq / p.Hkv)) return;

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  if (thread < kMmaRows) queries[thread] = query_of(p, s, task.kv_head, first + thread);
  __syncthreads();
  const Seen seen = seen_by<kMmaRows>(queries);
  int begin = seen.any_lo, end = seen.any_hi;
  if (plan.walk.splits > 1) {
    const int low = static_cast<int>(task.split * plan.walk.split_keys);
    const int high = static_cast<int>(low + plan.walk.split_keys);
    begin = begin > low ? begin : low, end = end < high ? end : high;
  }
  begin = begin / kKeys * kKeys;

  const auto row_of = [&](const AttentionRows& rows, int r) -> char* {
    const Query at = queries[r];
    return at.position < 0 ? nullptr : row_at(rows, 2, s.b, at.head, s.q_row + at.position);
  };
  const auto load_keys = [&](const Rows16<kDim>& to, const AttentionRows& rows, int64_t dim,
                             bool whole, int block) {
    to.template fill<kKeys>(static_cast<int>(dim), whole, [&](int j) -> const char* {
      return block + j < s.Sk ? key_row(p, rows, 2, s, task.kv_head, block + j) : nullptr;
    });
  };
  q.template fill<kMmaRows>(static_cast<int>(p.D), plan.whole_q,
                            [&](int r) -> const char* { return row_of(p.q, r); });
  if (begin < end) load_keys(k, p.k, p.D, plan.whole_k, begin);
  copy_commit();

  const int row = thread / 32 * 16, g = lane / 4, t = lane % 4;
  const Query mine[2] = {queries[row + g], queries[row + g + 8]};
  const float to_log2 = p.scale * kLog2e;
  float o[kDim / 8][4] = {}, m[2] = {-infinite(), -infinite()}, l[2] = {};
  for (int block = begin; block < end; block += kKeys) {
    copy_wait<0>();
    __syncthreads();  // the keys are here; nobody reads the values of the last block any more
    load_keys(v, p.v, p.Dv, plan.whole_v, block);
    copy_commit();
    float w[kN][4];
    multiply_rows<T, kDim, kN>(q, row, k, w);
    const bool full = seen.every_lo <= block && seen.every_hi >= block + kKeys;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& x = w[n][e];
        x *= to_log2;
        if (full && !kOptions) continue;
        const Query& at = mine[e / 2];
        const int j = block + 8 * n + 2 * t + e % 2;
        if (j < at.lo || j >= at.hi) {
          x = -infinite();
        } else if (kOptions) {
          float slope;
          x = with_options(p, s, at, j, x, slope);
        }
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = -infinite();
#pragma unroll
      for (int n = 0; n < kN; ++n) most = fmaxf(most, fmaxf(w[n][2 * half], w[n][2 * half + 1]));
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(most, shuffle_xor(most, 2));
      const float top = fmaxf(m[half], most), base = top == -infinite() ? 0.0f : top;
      const float down = exp2_approx(m[half] - base);
      m[half] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          w[n][e] = exp2_approx(w[n][e] - base);
          sum += w[n][e];
        }
      l[half] = l[half] * down + sum;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) o[n][2 * half] *= down, o[n][2 * half + 1] *= down;
    }
    if constexpr (kOptions) {
      if (p.dropout) {
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (!kept(p, s, mine[e / 2], block + 8 * n + 2 * t + e % 2)) w[n][e] = 0.0f;
      }
    }
    copy_wait<0>();
    __syncthreads();  // the values are here; nobody reads the keys any more
    if (block + kKeys < end) load_keys(k, p.k, p.D, plan.whole_k, block + kKeys);
    copy_commit();
    add_weighted<T, kDim, kN>(w, v, o);
  }
  copy_wait<0>();
  __syncthreads();  // of a tile that sees no keys, queries may still be arriving
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    l[half] += shuffle_xor(l[half], 1);
    l[half] += shuffle_xor(l[half], 2);
  }
  if (plan.walk.splits > 1) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Query& at = mine[half];
      if (at.position < 0) continue;
      float* part = plan.walk.part_of(p, task.split, s.b, at.head, at.position);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * n + 2 * t + e < p.Dv) part[8 * n + 2 * t + e] = o[n][2 * half + e];
      if (t == 0) part[p.Dv] = m[half], part[p.Dv + 1] = l[half];
    }
    return;
  }
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Query& at = mine[half];
    const Finish f = finish(p, at.head, m[half], l[half]);
    factor[half] = f.factor;
    if (p.lse.data != nullptr && t == 0 && at.position >= 0)
      stat_at(p.lse, s.b, at.head, s.q_row + at.position) = f.lse;
  }
  store_rows<T, kDim>(
      o, factor, q, row, static_cast<int>(p.Dv), p.out_dtype, plan.whole_out, [&](int r) -> char* {
        const Query at = queries[row + r];
        return at.position < 0
                   ? nullptr
                   : row_at(p.out, bytes_of(p.out_dtype), s.b, at.head, s.q_row + at.position);
      });
}

template <class T, int kDim>
const char* launch_mma_forward(const AttentionParams& p, bool options) {
  constexpr int kKeys = kForwardKeys<kDim>;
  const ForwardPlan plan{p,
                         Walk(p, kMmaRows, kKeys),
                         whole_rows(p.q, p.D),
                         whole_rows(p.k, p.D),
                         whole_rows(p.v, p.Dv),
                         whole_rows(p.out, p.Dv)};
  const size_t shared = size_t{2} * kDim * (kMmaRows + 2 * kKeys);
  const dim3 grid(static_cast<unsigned>(plan.walk.blocks(p)));
  if (options)
    return launch(mma_forward<T, kDim, true>, grid, dim3(kMmaThreads), shared, on(p.place), plan);
  return launch(mma_forward<T, kDim, false>, grid, dim3(kMmaThreads), shared, on(p.place), plan);
}

// D and Dv at most 256.
template <class T>
const char* launch_mma_forward(const AttentionParams& p, bool options) {
  const int64_t dim = p.D > p.Dv ? p.D : p.Dv;
  if (dim <= 64) return launch_mma_forward<T, 64>(p, options);
  if (dim <= 128) return launch_mma_forward<T, 128>(p, options);
  return launch_mma_forward<T, 256>(p, options);
}

}  // namespace
}  // namespace genfast::cuda
