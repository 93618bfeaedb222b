// What both kinds of backward kernels do to a score. Math and names: cpu/attention/backward.h.
// There are two passes, one owning keys (dK, dV) and one owning queries (dQ): seven products
// instead of five, but no atomics and no partial sums, so gradients are the same bits every time.
#pragma once
#include "cuda/attention/score.cuh"

namespace genfast::cuda {
namespace {

// Per row of a head: LSE in units of log2 (+inf where it sees nothing, so that P = 0) and delta.
struct RowStats {
  float *lse2, *delta;  // [B][Hq][Sq]

  explicit RowStats(const AttentionParams& p)
      : lse2(p.place.scratch), delta(p.place.scratch + p.B * p.Hq * p.Sq) {}
  static __device__ __forceinline__ int64_t index(const AttentionParams& p, int64_t b,
                                                  const Query& q) {
    return (b * p.Hq + q.head) * p.Sq + q.position;
  }
};

// Room for sums of dQ (hopper_backward.cuh) behind the row statistics: [B][Hkv][tiles] tiles of 64
// rows and 64 columns, each as the sums of a warpgroup's product lie in its registers.
struct QuerySums {
  float* data;

  explicit QuerySums(const AttentionParams& p) : data(p.place.scratch + offset(p)) {}
  static int64_t offset(const AttentionParams& p) { return (2 * p.B * p.Hq * p.Sq + 3) / 4 * 4; }
  static __host__ __device__ int64_t tiles(const AttentionParams& p, int dim) {
    return (p.Sq * group_of(p) + 127) / 128 * 2 * (dim / 64);
  }
  static int64_t room(const AttentionParams& p, int dim) {
    return p.B * p.Hkv * tiles(p, dim) * 4096;
  }
  static bool fit(const AttentionParams& p) {
    return p.place.scratch_size >= offset(p) + room(p, p.D <= 64 && p.Dv <= 64 ? 64 : 128);
  }
  __device__ __forceinline__ float* tile(const AttentionParams& p, int64_t b, int kv_head,
                                         int64_t n, int dim) const {
    return data + ((b * p.Hkv + kv_head) * tiles(p, dim) + n) * 4096;
  }
};

struct GradientPlan {
  AttentionGradParams g;
  RowStats stats;
  QuerySums sums;
  bool whole;  // every operand's rows start at multiples of 16 bytes

  GradientPlan(const AttentionGradParams& params, bool whole_rows)
      : g(params), stats(params.p), sums(params.p), whole(whole_rows) {}
};

// Rows [block, block + kPass) of the queries of all heads of a group: the keys that some of them
// see and that all of them see. Both ends move forward with a row's position, so the first and the
// last row tell; rows of several heads count as all positions.
template <int kPass>
__device__ __forceinline__ Seen seen_of_rows(const AttentionParams& p, const Sequence& s, int block,
                                             int rows) {
  const int i = block % static_cast<int>(s.Sq), last = i + kPass - 1;
  const bool one_head = last < s.Sq && block + kPass <= rows;
  const KeyRange a = visible_keys(p, s, one_head ? i : 0);
  const KeyRange b = visible_keys(p, s, one_head ? last : s.Sq - 1);
  return {static_cast<int>(a.lo), static_cast<int>(b.hi),
          one_head ? static_cast<int>(b.lo) : 0x7FFFFFFF, one_head ? static_cast<int>(a.hi) : 0};
}

// The first block of kPass rows, from row `block` on, that sees some of keys [low, high).
template <int kPass>
__device__ __forceinline__ int next_seeing(const AttentionParams& p, const Sequence& s, int block,
                                           int rows, int low, int high) {
  for (; block < rows; block += kPass) {
    const Seen seen = seen_of_rows<kPass>(p, s, block, rows);
    if (seen.any_lo < high && seen.any_hi > low) break;
  }
  return block;
}

// The queries that pass by a block of keys, in shared memory: of this block of rows, the next and
// the one after it.
template <int kPass, bool kMasks = false>
struct PassingQueries {
  Query queries[3][kPass];
  alignas(16) float stats[3][2][kPass];      // LSE and delta of RowStats
  const char* masks[3][kMasks ? kPass : 1];  // their rows of a mask

  // Rows [block, block + kPass) of a group's queries, by the first kPass threads.
  __device__ __forceinline__ void describe(const GradientPlan& plan, const Sequence& s, int kv_head,
                                           int slot, int block) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= kPass) return;
    const Query query = query_of(plan.g.p, s, kv_head, block + thread);
    queries[slot][thread] = query;
    const bool real = query.position >= 0;
    const int64_t i = real ? RowStats::index(plan.g.p, s.b, query) : 0;
    stats[slot][0][thread] = real ? plan.stats.lse2[i] : infinite();
    stats[slot][1][thread] = real ? plan.stats.delta[i] : 0.0f;
    if constexpr (kMasks) masks[slot][thread] = mask_row(plan.g.p, s, query);
  }
  // Row r of an operand in 16 bit; null where there is none.
  __device__ __forceinline__ const char* row(const AttentionRows& operand, const Sequence& s,
                                             int slot, int r) const {
    return query_row(operand, 2, s, queries[slot][r]);
  }
};

// One score of a query and key j. w: score -> P (times dropout's factor, which dV wants);
// d: dP -> dS, before the softcap unless `after_softcap`.
template <bool kOptions, bool kExact>
__device__ __forceinline__ void gradient_of(const AttentionParams& p, const Sequence& s,
                                            const Query& q, float lse2, float delta, int j,
                                            bool full, float& w, float& d,
                                            bool after_softcap = false) {
  float x = w * (p.scale * kLog2e), slope = 1.0f;
  if (kOptions || !full) {
    if (j < q.lo || j >= q.hi) {
      w = d = 0.0f;
      return;
    }
    if (kOptions) x = with_options(p, s, q, j, x, slope);
  }
  const float P = kExact ? exp2_nonpositive<float>(x - lse2) : exp2_approx(x - lse2);
  w = P;
  if (kOptions && p.dropout) {
    const float factor = kept(p, s, q, j) ? p.dropout_scale : 0.0f;
    w *= factor, d *= factor;
  }
  d = P * (d - delta);
  if (kOptions && !after_softcap) d *= slope;
}

}  // namespace
}  // namespace genfast::cuda
