// Backward on warpgroups: one pass, five products. A block owns 128 keys, 64 to a warpgroup, and
// its part of dQ is added to sums in global memory: the order of these additions, and with it the
// last bits of dQ, changes between runs. A call that wants the same bits gives no room for the sums
// and takes the two passes of backward.cuh.
#pragma once
#include "cuda/attention/gradient.cuh"
#include "cuda/attention/hopper.cuh"

namespace genfast::cuda {
namespace {

template <int kDim>
struct HopperBackward {
  static constexpr int kThreads = 2 * kGroupThreads, kKeys = 2 * kGroupRows;
  // Passing rows. Each warpgroup makes a tile of 64 x 64 of their dQ: of 128 columns the left or
  // the right half, of 128 rows the first or the last.
  static constexpr int kPass = kDim <= 64 ? 128 : 64;
  static constexpr size_t kShared = size_t{2} * (2 * kDim * (kKeys + 2 * kPass) + kKeys * kPass);
};

// A mask that is the same for all queries of a sequence has two values to a thread.
enum class BackwardMask { none, keys, rows };

// Scores, a row for each key, under a mask whose values are of type E: rows_of_mask are those of
// this lane's queries (8 n and 8 n + 1), keys its two keys. Without `full` those that are not seen
// are -inf by now, and may have no value.
template <class E, class Apply>
__device__ __forceinline__ void mask_columns(const char* const* rows_of_mask,
                                             const int64_t (&keys)[2], bool full, float (&w)[8][4],
                                             Apply&& apply) {
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (full || w[n][e] != -infinite())
        w[n][e] =
            apply(w[n][e], *reinterpret_cast<const E*>(rows_of_mask[8 * n + e % 2] + keys[e / 2]));
}

template <class T, int kDim, BackwardMask kMask>
__global__ void __launch_bounds__(HopperBackward<kDim>::kThreads, 1)
    hopper_backward(const __grid_constant__ GradientPlan plan) {
  if constexpr (kWarpgroups) {
    using H = HopperBackward<kDim>;
    constexpr int kKeys = H::kKeys, kPass = H::kPass, kThreads = H::kThreads;
    GENFAST_DYNAMIC_SHARED(memory);
    using Passing = PassingQueries<kPass, kMask == BackwardMask::rows>;
    GENFAST_SHARED(Passing, passing);
    const AttentionParams& p = plan.g.p;
    using Keys = Rows16<kDim, kKeys>;
    const Keys k{reinterpret_cast<uint16_t*>(memory)}, v{k.base + kKeys * kDim};
    const auto stage_of = [&](int stage, int gradient) {
      return Rows16<kDim, kPass>{v.base + (kKeys + (2 * stage + gradient) * kPass) * kDim};
    };
    const Rows16<kPass, kKeys> ds{v.base + (kKeys + 4 * kPass) * kDim};  // a row for each key
    const int64_t tiles = (p.Sk + kKeys - 1) / kKeys, at = blockIdx.x / tiles;
    const int first = static_cast<int>((blockIdx.x - at * tiles) * kKeys);
    const int kv_head = static_cast<int>(at % p.Hkv);
    const Sequence s = device_sequence(p, at / p.Hkv);
    if (first >= s.Sk) return;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
    using Loader = KeyLoader<kDim, kKeys, kThreads, true>;
    Loader(p, p.k, s, kv_head, p.D, true, true, thread)(k, first);
    Loader(p, p.v, s, kv_head, p.Dv, true, true, thread)(v, first);
    const int heads = group_of(p), rows = static_cast<int>(s.Sq) * heads;

    const auto seeing = [&](int block) {
      return next_seeing<kPass>(p, s, block, rows, first, first + kKeys);
    };
    const auto load = [&](int stage, int slot, int block) {
      const Query start = passing.queries[slot][0];
      // Rows of one head lie at equal distances; zeros follow the last one.
      const bool even = start.position + kPass <= s.Sq || start.head == (kv_head + 1) * heads - 1;
      const auto from = [&](const Rows16<kDim, kPass>& to, const AttentionRows& operand, int dim) {
        if (even) {
          to.template fill_even<kPass, kThreads>(
              row_at(operand, 2, s.b, start.head, s.q_row + start.position), operand.s_stride * 2,
              rows - block, dim, thread);
          return;
        }
        to.template fill<kPass, kThreads>(dim, true, thread,
                                          [&](int r) { return passing.row(operand, s, slot, r); });
      };
      if (block < rows) {
        from(stage_of(stage, 0), p.q, D);
        from(stage_of(stage, 1), plan.g.dout, Dv);
      }
      copy_commit();
    };

    const int group = thread / kGroupThreads, g = lane / 4, t = lane % 4;
    const int row = thread / 32 * 16;  // of this warp's keys
    const float unit = kMask == BackwardMask::rows ? unit_of<Extras::mask>(p) : p.scale * kLog2e;
    int64_t keys_of_mask[2];  // bytes from a row's start to the values of this thread's keys
#pragma unroll
    for (int half = 0; half < 2; ++half)
      keys_of_mask[half] = (first + row + g + 8 * half) * p.mask.j_stride * mask_bytes(p.mask);
    float bias[2] = {};  // of this thread's keys, in units of log2
    if constexpr (kMask == BackwardMask::keys) {
      const char* values = mask_row(p, s, {0, 0, 0, 0});
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (const int j = first + row + g + 8 * half; j < s.Sk)
          bias[half] = mask_value(p.mask, values, j);
    }
    float dk[kDim / 8][4] = {}, dv[kDim / 8][4] = {};
    int block = seeing(0), next = seeing(block + kPass);
    passing.describe(plan, s, kv_head, 0, block);
    passing.describe(plan, s, kv_head, 1, next);
    __syncthreads();
    load(0, 0, block);
    int stage = 0, slot = 0;
#pragma unroll 1
    while (block < rows) {
      const int after = seeing(next + kPass);
      copy_wait<0>();
      share();
      __syncthreads();  // this stage is here; nobody reads the other one, or dS, any more
      load(stage ^ 1, slot == 2 ? 0 : slot + 1, next);
      passing.describe(plan, s, kv_head, slot == 0 ? 2 : slot - 1, after);
      const Seen seen = seen_of_rows<kPass>(p, s, block, rows);
      const bool full = seen.every_lo <= first && seen.every_hi >= first + kKeys;
      const auto q = stage_of(stage, 0), dout = stage_of(stage, 1);
#pragma unroll 1
      for (int part = 0; part < kPass; part += kGroupRows) {
        float w[8][4], d[8][4];
        warpgroup_begin();
        group_rows<T>(k, group * kGroupRows, q, part, w);
        warpgroup_commit();
        group_rows<T>(v, group * kGroupRows, dout, part, d);
        warpgroup_commit();
        warpgroup_wait<1>();
        hold(w);
        const int mine = first + row + g;  // and the key 8 after it
        if (!full) {
#pragma unroll
          for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const Query& query = passing.queries[slot][part + 8 * n + 2 * t + e % 2];
              const int j = mine + 8 * (e / 2);
              w[n][e] = j >= query.lo & j < query.hi ? w[n][e] : -infinite();
            }
        }
        if constexpr (kMask == BackwardMask::rows) {
          const char* const* rows_of_mask = passing.masks[slot] + part + 2 * t;
          by_mask_type(p, [&](auto type, auto&& under) {
            mask_columns<decltype(type)>(rows_of_mask, keys_of_mask, full, w, under);
          });
        }
        const float *lse2 = passing.stats[slot][0] + part + 2 * t,
                    *delta = passing.stats[slot][1] + part + 2 * t;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const float2 pair = *reinterpret_cast<const float2*>(lse2 + 8 * n);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float less = e % 2 ? pair.y : pair.x;
            if constexpr (kMask == BackwardMask::keys) less -= bias[e / 2];
            w[n][e] = exp2_approx(w[n][e] * unit - less);
          }
        }
        uint32_t weights[4][4];
        pack_rows<T>(w, weights);
        warpgroup_wait<0>();
        hold(d);
        warpgroup_begin();
        group_add<T, kDim>(weights, dout, part, dv);
        warpgroup_commit();
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const float2 pair = *reinterpret_cast<const float2*>(delta + 8 * n);
#pragma unroll
          for (int e = 0; e < 4; ++e) w[n][e] *= d[n][e] - (e % 2 ? pair.y : pair.x);
        }
        uint32_t slopes[4][4];
        pack_rows<T>(w, slopes);
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            *reinterpret_cast<uint32_t*>(ds.at(row + g + 8 * half, part / 8 + n) + 2 * t) =
                slopes[n / 2][n % 2 * 2 + half];
        warpgroup_begin();
        group_add<T, kDim>(slopes, q, part, dk);
        warpgroup_commit();
      }
      share();
      __syncthreads();  // dS of both warpgroups is here
      warpgroup_begin();
      float dq[8][4];
      const Operand left = operand_of(ds) + (kPass > 64 ? group * kKeys * 128 : 0);
      const Operand right = operand_of(k) + (kPass > 64 ? 0 : group * kKeys * 128);
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j)
        product<T::kBf16, true, true, 8>(dq, left + 2048 * j, right + 2048 * j, j > 0);
      warpgroup_commit();
      warpgroup_wait<0>();
      hold(dv), hold(dk), hold(dq);
      float* sums = plan.sums.tile(p, s.b, kv_head, block / 64 * (kDim / 64) + group, kDim) +
                    thread % kGroupThreads * 4;
#pragma unroll
      for (int n = 0; n < 8; ++n) add_to(sums + n * kGroupThreads * 4, dq[n]);
      block = next, next = after, slot = slot == 2 ? 0 : slot + 1, stage ^= 1;
    }
    copy_wait<0>();
    __syncthreads();  // of keys that nobody sees, some may still be arriving
    const auto key_of = [&](const AttentionRows& operand, int j) -> char* {
      return first + j < s.Sk ? key_row(p, operand, 2, s, kv_head, first + j) : nullptr;
    };
    const float one[2] = {1.0f, 1.0f}, scale[2] = {p.scale, p.scale};
    store_rows<T, kDim>(dk, scale, k, row, D, p.dtype, true,
                        [&](int j) -> char* { return key_of(plan.g.dk, row + j); });
    store_rows<T, kDim>(dv, one, v, row, Dv, p.dtype, true,
                        [&](int j) -> char* { return key_of(plan.g.dv, row + j); });
  }
}

// dQ from its sums: a block has a tile of 64 rows and 64 columns.
template <class T>
__global__ void __launch_bounds__(kGroupThreads)
    hopper_dq(const __grid_constant__ GradientPlan plan, int dim) {
  GENFAST_SHARED(uint16_t[kGroupRows * 64], memory);
  GENFAST_SHARED(Query[kGroupRows], queries);
  const AttentionParams& p = plan.g.p;
  const int64_t tiles = QuerySums::tiles(p, dim), at = blockIdx.x / tiles;
  const int64_t tile = blockIdx.x - at * tiles;
  const int kv_head = static_cast<int>(at % p.Hkv), panels = dim / 64;
  const Sequence s = device_sequence(p, at / p.Hkv);
  const int64_t first = tile / panels * kGroupRows;
  const int column = static_cast<int>(tile % panels) * 64, thread = static_cast<int>(threadIdx.x);
  if (first >= s.Sq * group_of(p) || column >= p.D) return;
  if (thread < kGroupRows) queries[thread] = query_of(p, s, kv_head, first + thread);
  __syncthreads();
  const float* sums = plan.sums.tile(p, s.b, kv_head, tile, dim) + 4 * thread;
  float dq[8][4];
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float4 four = *reinterpret_cast<const float4*>(sums + n * kGroupThreads * 4);
    dq[n][0] = four.x, dq[n][1] = four.y, dq[n][2] = four.z, dq[n][3] = four.w;
  }
  const float scale[2] = {p.scale, p.scale};
  const int row = thread / 32 * 16;
  store_rows<T, 64>(dq, scale, Rows16<64>{memory}, row, static_cast<int>(p.D) - column, p.dtype,
                    true, [&](int r) -> char* {
                      const Query q = queries[row + r];
                      return q.position < 0
                                 ? nullptr
                                 : row_at(plan.g.dq, 2, s.b, q.head, s.q_row + q.position) +
                                       2 * column;
                    });
}

template <class T, int kDim, BackwardMask kMask>
const char* launch_hopper_backward(const GradientPlan& plan) {
  using H = HopperBackward<kDim>;
  const AttentionParams& p = plan.g.p;
  const int64_t tiles = (p.Sk + H::kKeys - 1) / H::kKeys, parts = QuerySums::tiles(p, kDim);
  const char* error =
      clear_memory(plan.sums.data, sizeof(float) * QuerySums::room(p, kDim), on(p.place));
  if (error == nullptr && p.Sk > 0)
    error =
        launch(hopper_backward<T, kDim, kMask>, dim3(static_cast<unsigned>(p.B * p.Hkv * tiles)),
               dim3(H::kThreads), H::kShared, on(p.place), plan);
  if (error != nullptr || p.Sq == 0) return error;
  return launch(hopper_dq<T>, dim3(static_cast<unsigned>(p.B * p.Hkv * parts)), dim3(kGroupThreads),
                0, on(p.place), plan, kDim);
}

template <class T, BackwardMask kMask>
const char* launch_hopper_backward(const GradientPlan& plan) {
  const bool narrow = plan.g.p.D <= 64 && plan.g.p.Dv <= 64;
  return narrow ? launch_hopper_backward<T, 64, kMask>(plan)
                : launch_hopper_backward<T, 128, kMask>(plan);
}

// D and Dv at most 128; no extras, or a mask.
template <class T>
const char* launch_hopper_backward(const GradientPlan& plan) {
  const AttentionMask& mask = plan.g.p.mask;
  if (mask.kind == MaskKind::none) return launch_hopper_backward<T, BackwardMask::none>(plan);
  return is_key_mask(mask) ? launch_hopper_backward<T, BackwardMask::keys>(plan)
                           : launch_hopper_backward<T, BackwardMask::rows>(plan);
}

}  // namespace
}  // namespace genfast::cuda
