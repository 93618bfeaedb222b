// Forward on warpgroups, each with a part of its own (Shah et al. 2024, FlashAttention-3): one only
// asks for keys and values, the others own 64 query rows each. These take turns: while one makes
// the softmax of a block of keys, the products of another run, its scores of the next block and the
// last block's weights with its values.
#pragma once
#include "cuda/attention/hopper_short.cuh"

namespace genfast::cuda {
namespace {

template <int kDim, Extras kExtras>
struct HopperForward {
  static constexpr int kGroups = 2, kRows = kGroups * kGroupRows;
  static constexpr int kThreads = (1 + kGroups) * kGroupThreads;
  // Registers of a thread that loads and of one that owns rows: 504 of one and two of them.
  static constexpr int kLoads = kDim <= 128 ? 72 : 56, kOwns = kDim <= 128 ? 216 : 224;
  // Keys of a block. Sums, scores and weights take 160 registers with 128 columns and 128 keys, 176
  // with 256 and 64; a mask takes some more.
  static constexpr int kKeys = kDim <= 128 && kExtras == Extras::none ? 128 : 64;
  static constexpr int kStages = 2;
  static constexpr size_t kShared = size_t{2} * kDim * (kRows + 2 * kStages * kKeys);
};

// What the warpgroups tell each other.
template <int kGroups, int kStages>
struct HopperSignals {
  struct Side {  // keys, or values
    Signal here[kStages], free[kStages];
  };
  Side keys, values;
  Signal turn[kGroups];

  __device__ __forceinline__ void init() {
    for (int i = 0; i < kStages; ++i)
      for (Side* side : {&keys, &values})
        side->here[i].init(kGroupThreads), side->free[i].init(kGroups * kGroupThreads / 32);
    for (int i = 0; i < kGroups; ++i) turn[i].init(kGroupThreads / 32);
  }
};

template <class T, int kDim, Extras kExtras>
__global__ void __launch_bounds__(HopperForward<kDim, kExtras>::kThreads, 1)
    hopper_forward(const __grid_constant__ ForwardPlan plan) {
  if constexpr (kWarpgroups) {
    using H = HopperForward<kDim, kExtras>;
    constexpr int kRows = H::kRows, kKeys = H::kKeys, kN = kKeys / 8, kStages = H::kStages;
    using Signals = HopperSignals<H::kGroups, kStages>;
    GENFAST_DYNAMIC_SHARED(memory);
    GENFAST_SHARED(Query[kRows], queries);
    GENFAST_SHARED(Signals, signals);
    const AttentionParams& p = plan.p;
    const Rows16<kDim, kRows> q{reinterpret_cast<uint16_t*>(memory)};
    const auto stage_of = [&](int stage, int values) {
      return Rows16<kDim, kKeys>{q.base + (kRows + (2 * stage + values) * kKeys) * kDim};
    };
    const Task task = task_of(p, plan.walk);
    const Sequence s = device_sequence(p, task.b);
    const int64_t first = task.tile * kRows;
    if (first >= s.Sq * group_of(p)) return;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    if (thread < kRows) queries[thread] = query_of(p, s, task.kv_head, first + thread);
    if (thread == kRows) signals.init();
    __syncthreads();
    const Seen seen = seen_by<kRows>(queries);
    const Span span(plan.walk, task, seen, kKeys);
    const int blocks = span.begin < span.end ? (span.end - span.begin + kKeys - 1) / kKeys : 0;

    if (thread < kGroupThreads) {
      give_registers<H::kLoads>();
      using Loader = KeyLoader<kDim, kKeys, kGroupThreads, true>;
      const Loader keys(p, p.k, s, task.kv_head, p.D, true, true, thread);
      const Loader values(p, p.v, s, task.kv_head, p.Dv, true, true, thread);
#pragma unroll 1
      for (int n = 0; n < blocks; ++n) {
        const int stage = n % kStages, parity = n / kStages & 1, block = span.begin + n * kKeys;
        signals.keys.free[stage].wait(parity ^ 1);
        keys(stage_of(stage, 0), block);
        signals.keys.here[stage].arrive_after_copies();
        signals.values.free[stage].wait(parity ^ 1);
        values(stage_of(stage, 1), block);
        signals.values.here[stage].arrive_after_copies();
      }
      copy_commit();
      copy_wait<0>();
    } else {
      take_registers<H::kOwns>();
      const int owner = thread - kGroupThreads, group = owner / kGroupThreads;
      const int own = group * kGroupRows, row = owner / 32 * 16;
      const auto row_of = [&](const AttentionRows& rows, int bytes, int r) -> char* {
        return query_row(rows, bytes, s, queries[r]);
      };
      q.template fill<kRows, H::kGroups * kGroupThreads>(
          static_cast<int>(p.D), true, owner,
          [&](int r) -> const char* { return row_of(p.q, 2, r); });
      copy_commit();
      copy_wait<0>();
      share();
      barrier_sync(1, H::kGroups * kGroupThreads);

      const float unit = unit_of<kExtras>(p);
      const MaskRows mask(p, s, queries + row);
      float o[kDim / 8][4] = {}, w[kN][4], m[2] = {-infinite(), -infinite()}, l[2] = {}, down[2];
      uint32_t weights[kN / 2][4];
      const auto soften_block = [&](int block) {
        const bool full = seen.every_lo <= block && seen.every_hi >= block + kKeys;
        mask_scores<kExtras>(p, s, queries + row, mask, block, full, w);
        soften(unit, w, m, l, down);
      };
      const auto signal = [&](Signal& to) {  // by each warp
        if (lane == 0) to.arrive();
      };
      // The products of block n's scores and of block n - 1's sums, when it is this warpgroup's
      // turn.
      const auto multiply = [&](int n, bool scores, bool sums) {
        const int stage = n % kStages, last = (n + kStages - 1) % kStages;
        if (scores) signals.keys.here[stage].wait(n / kStages & 1);
        if (sums) signals.values.here[last].wait((n - 1) / kStages & 1);
        signals.turn[group].wait((n & 1) ^ (group == 0));
        warpgroup_begin();
        if (scores) {
          group_rows<T>(q, own, stage_of(stage, 0), 0, w);
          warpgroup_commit();
        }
        if (sums) {
          group_add<T, kDim>(weights, stage_of(last, 1), 0, o);
          warpgroup_commit();
        }
        signal(signals.turn[group + 1 == H::kGroups ? 0 : group + 1]);
      };
      if (blocks > 0) {
        multiply(0, true, false);
        warpgroup_wait<0>();
        hold(w);
        signal(signals.keys.free[0]);
        soften_block(span.begin);
        pack_rows<T>(w, weights);
#pragma unroll 1
        for (int n = 1; n < blocks; ++n) {
          multiply(n, true, true);
          warpgroup_wait<1>();
          hold(w);
          signal(signals.keys.free[n % kStages]);
          soften_block(span.begin + n * kKeys);
          warpgroup_wait<0>();
          hold(o);
          signal(signals.values.free[(n - 1) % kStages]);
          scale_rows(down, o);
          pack_rows<T>(w, weights);
        }
        multiply(blocks, false, true);
        warpgroup_wait<0>();
        hold(o);
      }
      finish_rows<T, kDim>(plan, s, queries, row, q, unit, m, l, o, row_of);
    }
  }
}

template <class T, int kDim, Extras kExtras>
const char* launch_hopper_forward(const AttentionParams& p) {
  using H = HopperForward<kDim, kExtras>;
  const ForwardPlan plan(p, Walk(p, H::kRows, H::kKeys));
  return launch(hopper_forward<T, kDim, kExtras>, dim3(static_cast<unsigned>(plan.walk.blocks(p))),
                dim3(H::kThreads), H::kShared, on(p.place), plan);
}

// D and Dv at most 256 without extras, at most 128 with a mask.
template <class T>
const char* launch_hopper_forward(const AttentionParams& p) {
  const bool masked = extras_of(p) == Extras::mask;
  const int64_t dim = p.D > p.Dv ? p.D : p.Dv;
  if (dim <= 64 && masked) return launch_hopper_short<T, Extras::mask>(p);
  if (dim <= 64)
    return p.Sk < 1024 ? launch_hopper_short<T, Extras::none>(p)
                       : launch_hopper_forward<T, 64, Extras::none>(p);
  if (dim <= 128)
    return masked ? launch_hopper_forward<T, 128, Extras::mask>(p)
                  : launch_hopper_forward<T, 128, Extras::none>(p);
  return launch_hopper_forward<T, 256, Extras::none>(p);
}

}  // namespace
}  // namespace genfast::cuda
