// Forward on tensor cores: online softmax over blocks of keys (math in cpu/attention/forward.h).
// Keys and values of a block come by cp.async, the values while the scores are made, the next keys
// while the values are used.
#pragma once
#include "cuda/attention/softmax.cuh"

namespace genfast::cuda {
namespace {

// Tiles of 16 rows that a warp owns. With two, shared memory is read 6 times for 16 products
// instead of 10 times, and keys come from L2 half as often; 128 columns then take 192 registers for
// sums and scores, which leaves none for options.
template <int kDim, Extras kExtras>
constexpr int kForwardTiles = kExtras == Extras::none && kDim <= 128 ? 2 : 1;
template <int kDim, Extras kExtras>
constexpr int kForwardRows = kMmaRows * kForwardTiles<kDim, kExtras>;

template <class T, int kDim, int kKeys, Extras kExtras>
__global__ void __launch_bounds__(kMmaThreads, kDim <= 128 ? 2 : 1)
    mma_forward(const __grid_constant__ ForwardPlan plan) {
  constexpr int kTiles = kForwardTiles<kDim, kExtras>, kRows = kForwardRows<kDim, kExtras>;
  constexpr bool kOptions = kExtras == Extras::all;
  constexpr int kN = kKeys / 8;
  GENFAST_DYNAMIC_SHARED(memory);
  GENFAST_SHARED(Query[kRows], queries);
  const AttentionParams& p = plan.p;
  const Rows16<kDim> q{reinterpret_cast<uint16_t*>(memory)};
  const Rows16<kDim> k{q.base + kRows * kDim}, v{k.base + kKeys * kDim};
  const Task task = task_of(p, plan.walk);
  const Sequence s = device_sequence(p, task.b);
  const int64_t first = task.tile * kRows, rows = s.Sq * group_of(p);
  if (first >= rows) return;

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  if (thread < kRows) queries[thread] = query_of(p, s, task.kv_head, first + thread);
  __syncthreads();
  const Seen seen = seen_by<kRows>(queries);
  const Span span(plan.walk, task, seen, kKeys);

  const auto row_of = [&](const AttentionRows& t, int bytes, int r) -> char* {
    return query_row(t, bytes, s, queries[r]);
  };
  using Loader = KeyLoader<kDim, kKeys, kMmaThreads, !kOptions>;
  const Loader keys(p, p.k, s, task.kv_head, p.D, plan.whole_k, plan.even, thread);
  const Loader values(p, p.v, s, task.kv_head, p.Dv, plan.whole_v, plan.even, thread);
  q.template fill<kRows>(static_cast<int>(p.D), !kOptions || plan.whole_q, thread,
                         [&](int r) -> const char* { return row_of(p.q, 2, r); });
  if (span.begin < span.end) keys(k, span.begin);
  copy_commit();

  const int row = thread / 32 * 16 * kTiles, g = lane / 4, t = lane % 4;
  // Few queries: the warps without one only load.
  const bool busy = row < (rows - first < kRows ? static_cast<int>(rows - first) : kRows);
  const float unit = unit_of<kExtras>(p);
  const MaskRows mask(p, s, queries + row);  // of one tile: with extras there is one
  float o[kTiles][kDim / 8][4] = {}, m[kTiles][2], l[kTiles][2] = {};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) m[i][0] = m[i][1] = -infinite();
  for (int block = span.begin; block < span.end; block += kKeys) {
    copy_wait<0>();
    __syncthreads();  // the keys are here; nobody reads the values of the last block any more
    values(v, block);
    copy_commit();
    float w[kTiles][kN][4];
    if (busy) {
      multiply_rows<T, kDim>(q, row, k, w);
      const bool full = seen.every_lo <= block && seen.every_hi >= block + kKeys;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        mask_scores<kExtras>(p, s, queries + row + 16 * i, mask, block, full, w[i]);
        float down[2];
        soften(unit, w[i], m[i], l[i], down);
        scale_rows(down, o[i]);
        if constexpr (kOptions) {
          if (p.dropout) drop_scores(p, s, queries + row + 16 * i, block, w[i]);
        }
      }
    }
    copy_wait<0>();
    __syncthreads();  // the values are here; nobody reads the keys any more
    if (block + kKeys < span.end) keys(k, block + kKeys);
    copy_commit();
    if (busy) add_weighted<T, kDim>(w, v, o);
  }
  copy_wait<0>();
  __syncthreads();  // of a tile that sees no keys, queries may still be arriving
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int own = row + 16 * i;
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      l[i][half] += shuffle_xor(l[i][half], 1);
      l[i][half] += shuffle_xor(l[i][half], 2);
      m[i][half] *= unit;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Query at = queries[own + g + 8 * half];
      if (plan.walk.splits > 1) {
        if (at.position < 0) continue;
        float* part = plan.walk.part_of(p, task.split, s.b, at.head, at.position);
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (8 * n + 2 * t + e < p.Dv) part[8 * n + 2 * t + e] = o[i][n][2 * half + e];
        if (t == 0) part[p.Dv] = m[i][half], part[p.Dv + 1] = l[i][half];
        continue;
      }
      factor[half] = finish_row(p, s, at, m[i][half], l[i][half]);
    }
    if (plan.walk.splits == 1)
      store_rows<T, kDim>(
          o[i], factor, q, own, static_cast<int>(p.Dv), p.out_dtype, plan.whole_out,
          [&](int r) -> char* { return row_of(p.out, bytes_of(p.out_dtype), own + r); });
  }
}

template <class T, int kDim, int kKeys, Extras kExtras>
const char* launch_mma_forward(const AttentionParams& p) {
  constexpr int kRows = kForwardRows<kDim, kExtras>;
  const ForwardPlan plan(p, Walk(p, kRows, kKeys));
  return launch(mma_forward<T, kDim, kKeys, kExtras>,
                dim3(static_cast<unsigned>(plan.walk.blocks(p))), dim3(kMmaThreads),
                size_t{2} * kDim * (kRows + 2 * kKeys), on(p.place), plan);
}

template <class T, Extras kExtras>
const char* launch_mma_forward(const AttentionParams& p) {
  const int64_t dim = p.D > p.Dv ? p.D : p.Dv;
  // 256 columns take 128 registers for the sums of one tile: 32 keys at a time.
  if (dim > 128) return launch_mma_forward<T, 256, 32, kExtras>(p);
  if (dim <= 64) return launch_mma_forward<T, 64, 64, kExtras>(p);
  // Two blocks of 64 KiB need a multiprocessor with 128 KiB; those of sm_86, 89 and 120 have 100.
  if constexpr (kForwardTiles<128, kExtras> == 2)
    if (shared_of_multiprocessor(p.place.device) < 128 * 1024)
      return launch_mma_forward<T, 128, 32, kExtras>(p);
  return launch_mma_forward<T, 128, 64, kExtras>(p);
}

// D and Dv at most 256.
template <class T>
const char* launch_mma_forward(const AttentionParams& p) {
  const Extras extras = plain_rows(p, 64) ? extras_of(p) : Extras::all;
  if (extras == Extras::none) return launch_mma_forward<T, Extras::none>(p);
  return extras == Extras::mask ? launch_mma_forward<T, Extras::mask>(p)
                                : launch_mma_forward<T, Extras::all>(p);
}

}  // namespace
}  // namespace genfast::cuda
