// What the forward kernels on tensor cores do between their two products: the scores of a block
// masked, and the online softmax over them.
#pragma once
#include <type_traits>

#include "cuda/attention/mma.cuh"

namespace genfast::cuda {
namespace {

struct ForwardPlan {
  AttentionParams p;
  Walk walk;
  bool whole_q, whole_k, whole_v, whole_out;
  bool even;  // blocks of 64 keys, and so of 16 and 32, lie at equal distances

  ForwardPlan(const AttentionParams& params, const Walk& w)
      : p(params),
        walk(w),
        whole_q(whole_rows(p.q, p.D)),
        whole_k(whole_rows(p.k, p.D)),
        whole_v(whole_rows(p.v, p.Dv)),
        whole_out(whole_rows(p.out, p.Dv)),
        even(even_keys(p, 64)) {}
};

// Keys that a block of threads visits: those its queries see, of its split, from a whole block on.
struct Span {
  int begin, end;

  __device__ __forceinline__ Span(const Walk& walk, const Task& task, const Seen& seen, int keys)
      : begin(seen.any_lo), end(seen.any_hi) {
    if (walk.splits > 1) {
      const int low = static_cast<int>(task.split * walk.split_keys);
      const int high = static_cast<int>(low + walk.split_keys);
      begin = begin > low ? begin : low, end = end < high ? end : high;
    }
    begin = begin < end ? begin / keys * keys : end;  // a query that sees nothing has a huge begin
  }
};

// The rows of a mask that a lane's two queries have: their addresses are made once a tile, and two
// neighbouring keys take one read where they lie side by side. (Made anew for each score they were
// two thirds of the time of a masked forward.)
struct MaskRows {
  const char* row[2];  // of queries g and g + 8
  int step;            // bytes from key to key
  bool pairs, same;    // same: one row serves both, as of a mask of keys

  __device__ __forceinline__ MaskRows(const AttentionParams& p, const Sequence& s,
                                      const Query* queries) {
    const AttentionMask& m = p.mask;
    const int bytes = mask_bytes(m);
    const int g = static_cast<int>(threadIdx.x % 32 / 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) row[half] = mask_row(p, s, queries[g + 8 * half]);
    step = static_cast<int>(m.j_stride) * bytes;
    pairs = m.j_stride == 1 && ((m.b_stride | m.h_stride | m.i_stride) & 1) == 0 &&
            reinterpret_cast<uintptr_t>(m.data) % (2 * bytes) == 0;
    same = m.h_stride == 0 && m.i_stride == 0;
  }
};

// Two values of a mask.
template <class E>
struct alignas(2 * sizeof(E)) Two {
  E value[2];
};

// Scores under a mask whose values are of type E: apply(score, value). kWhole: every query sees
// every key, and pairs of values lie side by side.
template <class E, bool kWhole, int kN, class Apply>
__device__ __forceinline__ void apply_mask(const MaskRows& mask, const Query (&mine)[2], int first,
                                           float (&w)[kN][4], Apply&& apply) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const int j = first + 8 * n;
    Two<E> two[2]{};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto* from = reinterpret_cast<const E*>(mask.row[half] + int64_t{j} * mask.step);
      const auto sees = [&](int at) { return at >= mine[half].lo && at < mine[half].hi; };
      if (kWhole) {
        if (half == 0 || !mask.same)
          two[half] = *reinterpret_cast<const Two<E>*>(from);
        else
          two[1] = two[0];
      } else {
        if (sees(j)) two[half].value[0] = *from;
        if (sees(j + 1))
          two[half].value[1] =
              *reinterpret_cast<const E*>(reinterpret_cast<const char*>(from) + mask.step);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = w[n][2 * half + e];
        x = kWhole || sees(j + e) ? apply(x, two[half].value[e]) : -infinite();
      }
    }
  }
}

// What scores are to be multiplied by to be in units of log2, behind mask_scores.
template <Extras kExtras>
__device__ __forceinline__ float unit_of(const AttentionParams& p) {
  const bool there = kExtras == Extras::all || p.mask.kind == MaskKind::additive;
  return there ? 1.0f : p.scale * kLog2e;
}

// Scores of rows g and g + 8 of `queries` and keys from `block` on: -inf where a query does not see
// a key; in units of unit_of. `full`: all is seen.
template <Extras kExtras, int kN>
__device__ __forceinline__ void mask_scores(const AttentionParams& p, const Sequence& s,
                                            const Query* queries, const MaskRows& mask, int block,
                                            bool full, float (&w)[kN][4]) {
  if (full && kExtras == Extras::none) return;
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const Query mine[2] = {queries[g], queries[g + 8]};
  if constexpr (kExtras == Extras::mask) {
    const int first = block + 2 * t;
    const auto apply = [&](auto whole) {
      by_mask_type(p, [&](auto type, auto&& under) {
        apply_mask<decltype(type), decltype(whole)::value>(mask, mine, first, w, under);
      });
    };
    if (full && mask.pairs)
      apply(std::true_type());
    else
      apply(std::false_type());
  } else {
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Query& at = mine[e / 2];
        const int j = block + 8 * n + 2 * t + e % 2;
        if (j < at.lo || j >= at.hi) {
          w[n][e] = -infinite();
        } else if (kExtras == Extras::all) {
          float slope;
          w[n][e] = with_options(p, s, at, j, w[n][e] * (p.scale * kLog2e), slope);
        }
      }
  }
}

template <int kN>
__device__ __forceinline__ void drop_scores(const AttentionParams& p, const Sequence& s,
                                            const Query* queries, int block, float (&w)[kN][4]) {
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const Query mine[2] = {queries[g], queries[g + 8]};
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (!kept(p, s, mine[e / 2], block + 8 * n + 2 * t + e % 2)) w[n][e] = 0.0f;
}

// Scores of a block to weights, two rows a thread. A score times `unit` (positive) is in units of
// log2: the product and the difference to the maximum are one instruction. m: the maximum so far,
// not yet times unit; l: this lane's part of the denominator; down: what the sums so far are to be
// multiplied by.
template <int kN>
__device__ __forceinline__ void soften(float unit, float (&w)[kN][4], float (&m)[2], float (&l)[2],
                                       float (&down)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = -infinite();
#pragma unroll
    for (int n = 0; n < kN; ++n) most = fmaxf(most, fmaxf(w[n][2 * half], w[n][2 * half + 1]));
    most = fmaxf(most, shuffle_xor(most, 1));
    most = fmaxf(most, shuffle_xor(most, 2));
    const float top = fmaxf(m[half], most), base = top == -infinite() ? 0.0f : top * unit;
    down[half] = exp2_approx(m[half] * unit - base);
    m[half] = top;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        w[n][e] = exp2_approx(w[n][e] * unit - base);
        sum += w[n][e];
      }
    l[half] = l[half] * down[half] + sum;
  }
}

template <int kColumns>
__device__ __forceinline__ void scale_rows(const float (&by)[2], float (&o)[kColumns][4]) {
#pragma unroll
  for (int n = 0; n < kColumns; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) o[n][e] *= by[e / 2];
}

// What a finished row is multiplied by; its log-sum-exp goes out. m in units of log2; l summed.
__device__ __forceinline__ float finish_row(const AttentionParams& p, const Sequence& s,
                                            const Query& at, float m, float l) {
  const Finish f = finish(p, at.head, m, l);
  if (p.lse.data != nullptr && threadIdx.x % 4 == 0 && at.position >= 0)
    stat_at(p.lse, s.b, at.head, s.q_row + at.position) = f.lse;
  return f.factor;
}

}  // namespace
}  // namespace genfast::cuda
