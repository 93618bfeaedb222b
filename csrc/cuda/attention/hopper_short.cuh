// Forward on warpgroups for up to 64 columns where blocks of threads are many and their rows of
// keys short, or masked: two or three blocks share a multiprocessor, and one's products run while
// another loads, makes its softmax or stores. On an H200 8 x 12 heads of 256 take 11.3 us and 14.9
// by hopper_forward, which is ahead from 1,024 keys on.
#pragma once
#include "cuda/attention/hopper.cuh"

namespace genfast::cuda {
namespace {

template <Extras kExtras>
struct HopperShort {
  static constexpr int kDim = 64, kKeys = 64;
  static constexpr int kGroups = kExtras == Extras::none ? 2 : 1;
  static constexpr int kThreads = kGroups * kGroupThreads, kRows = kGroups * kGroupRows;
  static constexpr int kBlocks = kExtras == Extras::none ? 2 : 3;  // 128 registers, 168
  static constexpr size_t kShared = size_t{2} * kDim * (kRows + 4 * kKeys);
};

template <class T, Extras kExtras>
__global__ void __launch_bounds__(HopperShort<kExtras>::kThreads, HopperShort<kExtras>::kBlocks)
    hopper_short(const __grid_constant__ ForwardPlan plan) {
  if constexpr (kWarpgroups) {
    using H = HopperShort<kExtras>;
    constexpr int kDim = H::kDim, kRows = H::kRows, kKeys = H::kKeys, kN = kKeys / 8;
    GENFAST_DYNAMIC_SHARED(memory);
    GENFAST_SHARED(Query[kRows], queries);
    const AttentionParams& p = plan.p;
    const Rows16<kDim, kRows> q{reinterpret_cast<uint16_t*>(memory)};
    const auto stage_of = [&](int stage, int values) {
      return Rows16<kDim, kKeys>{q.base + (kRows + (2 * stage + values) * kKeys) * kDim};
    };
    const Task task = task_of(p, plan.walk);
    const Sequence s = device_sequence(p, task.b);
    const int64_t first = task.tile * kRows;
    if (first >= s.Sq * group_of(p)) return;
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kRows) queries[thread] = query_of(p, s, task.kv_head, first + thread);
    __syncthreads();
    const Seen seen = seen_by<kRows>(queries);
    const Span span(plan.walk, task, seen, kKeys);
    const int blocks = span.begin < span.end ? (span.end - span.begin + kKeys - 1) / kKeys : 0;

    const auto row_of = [&](const AttentionRows& rows, int bytes, int r) -> char* {
      return query_row(rows, bytes, s, queries[r]);
    };
    using Loader = KeyLoader<kDim, kKeys, H::kThreads, true>;
    const Loader keys(p, p.k, s, task.kv_head, p.D, true, true, thread);
    const Loader values(p, p.v, s, task.kv_head, p.Dv, true, true, thread);
    q.template fill<kRows, H::kThreads>(static_cast<int>(p.D), true, thread,
                                        [&](int r) -> const char* { return row_of(p.q, 2, r); });
    if (blocks > 0) keys(stage_of(0, 0), span.begin);
    copy_commit();
    const auto arrived = [&] {  // of all threads; nobody reads what the next copies overwrite
      copy_wait<0>();
      share();
      __syncthreads();
    };

    const int group = thread / kGroupThreads * kGroupRows, row = thread / 32 * 16;
    const float unit = unit_of<kExtras>(p);
    const MaskRows mask(p, s, queries + row);
    float o[kDim / 8][4] = {}, w[kN][4], m[2] = {-infinite(), -infinite()}, l[2] = {}, down[2];
    uint32_t weights[kN / 2][4];
    const auto soften_block = [&](int block) {
      const bool full = seen.every_lo <= block && seen.every_hi >= block + kKeys;
      mask_scores<kExtras>(p, s, queries + row, mask, block, full, w);
      soften(unit, w, m, l, down);
    };
    // Before block n's scores: asks for the keys of the block after it and the values of its own.
    const auto load = [&](int n) {
      if (n + 1 < blocks) keys(stage_of((n + 1) & 1, 0), span.begin + (n + 1) * kKeys);
      if (n < blocks) values(stage_of(n & 1, 1), span.begin + n * kKeys);
      copy_commit();
    };
    arrived();
    if (blocks > 0) {
      load(0);
      warpgroup_begin();
      group_rows<T>(q, group, stage_of(0, 0), 0, w);
      warpgroup_commit();
      warpgroup_wait<0>();
      hold(w);
      soften_block(span.begin);
      pack_rows<T>(w, weights);
#pragma unroll 1
      for (int n = 1; n < blocks; ++n) {
        arrived();
        load(n);
        warpgroup_begin();
        group_rows<T>(q, group, stage_of(n & 1, 0), 0, w);
        warpgroup_commit();
        group_add<T, kDim>(weights, stage_of((n + 1) & 1, 1), 0, o);
        warpgroup_commit();
        warpgroup_wait<1>();
        hold(w);
        soften_block(span.begin + n * kKeys);
        warpgroup_wait<0>();
        hold(o);
        scale_rows(down, o);
        pack_rows<T>(w, weights);
      }
      arrived();
      warpgroup_begin();
      group_add<T, kDim>(weights, stage_of((blocks + 1) & 1, 1), 0, o);
      warpgroup_commit();
      warpgroup_wait<0>();
      hold(o);
    }
    finish_rows<T, kDim>(plan, s, queries, row, q, unit, m, l, o, row_of);
  }
}

template <class T, Extras kExtras>
const char* launch_hopper_short(const AttentionParams& p) {
  using H = HopperShort<kExtras>;
  const ForwardPlan plan(p, Walk(p, H::kRows, H::kKeys));
  return launch(hopper_short<T, kExtras>, dim3(static_cast<unsigned>(plan.walk.blocks(p))),
                dim3(H::kThreads), H::kShared, on(p.place), plan);
}

}  // namespace
}  // namespace genfast::cuda
