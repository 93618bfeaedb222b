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

struct GradientPlan {
  AttentionGradParams g;
  RowStats stats;
  bool whole;  // every operand's rows start at multiples of 16 bytes
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
