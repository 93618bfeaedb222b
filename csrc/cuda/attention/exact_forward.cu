// Forward in fp32, and the merge of keys that were split over blocks.
#include "cuda/attention/exact.cuh"

namespace genfast::cuda {
namespace {

struct ExactPlan {
  AttentionParams p;
  Walk walk;
};

template <int kColumns>
__global__ void __launch_bounds__(kExactThreads, 1)
    exact_forward(const __grid_constant__ ExactPlan plan) {
  using E = Exact<kColumns>;
  constexpr int kOwn = E::kOwn;
  GENFAST_DYNAMIC_SHARED(memory);
  GENFAST_SHARED(Query[E::kRows], queries);
  const AttentionParams& p = plan.p;
  float* own = reinterpret_cast<float*>(memory);
  float* passing = own + E::kRows * E::kWide;
  const Task task = task_of(p, plan.walk);
  const Sequence s = device_sequence(p, task.b);
  const int64_t first = task.tile * E::kRows;
  if (first >= s.Sq * group_of(p)) return;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  if (thread < E::kRows) queries[thread] = query_of(p, s, task.kv_head, first + thread);
  __syncthreads();
  const Seen seen = seen_by<E::kRows>(queries);
  int begin = seen.any_lo, end = seen.any_hi;
  if (plan.walk.splits > 1) {
    const int low = static_cast<int>(task.split * plan.walk.split_keys);
    const int high = static_cast<int>(low + plan.walk.split_keys);
    begin = begin > low ? begin : low, end = end < high ? end : high;
  }
  begin = begin / kPassing * kPassing;
  const int bytes = bytes_of(p.dtype), D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  E::template fill<E::kRows>(own, E::kWide, D, p.dtype, [&](int r) -> const char* {
    const Query at = queries[r];
    return at.position < 0 ? nullptr : row_at(p.q, bytes, s.b, at.head, s.q_row + at.position);
  });
  const auto pass = [&](const AttentionRows& rows, int dim, int block) {
    __syncthreads();
    E::template fill<kPassing>(passing, E::kPitch, dim, p.dtype, [&](int j) -> const char* {
      return block + j < s.Sk ? key_row(p, rows, bytes, s, task.kv_head, block + j) : nullptr;
    });
    __syncthreads();
  };

  Query mine[kOwn];
  float o[kOwn][kColumns] = {}, m[kOwn], l[kOwn], down[kOwn];
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    mine[r] = queries[warp * kOwn + r];
    m[r] = -infinite(), l[r] = 0.0f;
  }
  const float to_log2 = p.scale * kLog2e;
  for (int block = begin; block < end; block += kPassing) {
    float w[kOwn];
    pass(p.k, D, block);
    E::dot(own + warp * kOwn * E::kWide, passing, D, w);
    const int j = block + lane;
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      float slope;
      const bool sees = j >= mine[r].lo && j < mine[r].hi;
      w[r] = sees ? with_options(p, s, mine[r], j, w[r] * to_log2, slope) : -infinite();
      const float top = fmaxf(m[r], reduce_warp(w[r], Larger()));
      const float base = top == -infinite() ? 0.0f : top;
      down[r] = exp2_nonpositive<float>(m[r] - base);
      w[r] = exp2_nonpositive<float>(w[r] - base);
      m[r] = top;
      l[r] = l[r] * down[r] + reduce_warp(w[r], Add());
      if (p.dropout && sees && !kept(p, s, mine[r], j)) w[r] = 0.0f;
    }
    pass(p.v, Dv, block);
    const int count = end - block < kPassing ? end - block : kPassing;
    E::weigh(w, passing, count, Dv,
             [&](int r, int c, float sum) { o[r][c] = fused_multiply_add(o[r][c], down[r], sum); });
  }
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const Query at = mine[r];
    if (at.position < 0) continue;
    if (plan.walk.splits > 1) {
      float* part = plan.walk.part_of(p, task.split, s.b, at.head, at.position);
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (lane + 32 * c < Dv) part[lane + 32 * c] = o[r][c];
      if (lane == 0) part[Dv] = m[r], part[Dv + 1] = l[r];
      continue;
    }
    const Finish f = finish(p, at.head, m[r], l[r]);
    char* out = row_at(p.out, bytes_of(p.out_dtype), s.b, at.head, s.q_row + at.position);
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (lane + 32 * c < Dv) store_any(out, p.out_dtype, lane + 32 * c, o[r][c] * f.factor);
    if (p.lse.data != nullptr && lane == 0)
      stat_at(p.lse, s.b, at.head, s.q_row + at.position) = f.lse;
  }
}

// 2^shift warps, up to kMergeWarps, share a query row, each with every so many-th split, so that
// the reads of a row are under way together: one warp that took 32 splits in turn was half of a
// decode step on an H200. The warps' sums are added in their order. kColumns: 32 Dv at most.
constexpr int kMergeWarps = 8;

template <int kColumns>
__global__ void __launch_bounds__(32 * kMergeWarps)
    merge_splits(const __grid_constant__ ExactPlan plan, int shift) {
  constexpr int kPitch = 32 * kColumns + 1;  // sums of a warp, then its part of the denominator
  GENFAST_SHARED(float[kMergeWarps * kPitch], sums);
  const AttentionParams& p = plan.p;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int warps = 1 << shift, share = warp & (warps - 1), Dv = static_cast<int>(p.Dv);
  const int splits = static_cast<int>(plan.walk.splits);
  const auto length = static_cast<uint32_t>(p.Sq), heads = static_cast<uint32_t>(p.Hq);
  const uint32_t row = blockIdx.x * static_cast<uint32_t>(kMergeWarps >> shift) + (warp >> shift);
  const int64_t i = row % length, head = row / length % heads, b = row / length / heads;
  const Sequence s = device_sequence(p, b < p.B ? b : 0);
  const bool exists = b < p.B && i < s.Sq;
  const auto part = [&](int k) { return plan.walk.part_of(p, k, b, head, i); };
  float top = -infinite();
  for (int k = lane; k < splits && exists; k += 32) top = fmaxf(top, part(k)[Dv]);
  top = reduce_warp(top, Larger());
  const float base = top == -infinite() ? 0.0f : top;
  float own[kColumns] = {}, total = 0.0f;
  const int steps = exists ? (splits - share + warps - 1) >> shift : 0;
#pragma unroll 4
  for (int step = 0; step < steps; ++step) {
    const float* from = part(share + (step << shift));
    const float factor = exp2f(from[Dv] - base);
    total += from[Dv + 1] * factor;
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (lane + 32 * c < Dv) own[c] += from[lane + 32 * c] * factor;
  }
  float* to = sums + warp * kPitch;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) to[lane + 32 * c] = own[c];
  if (lane == 0) to[kPitch - 1] = total;
  __syncthreads();
  if (!exists) return;
  const float* all = sums + (warp >> shift << shift) * kPitch;
  const auto sum_of = [&](int column) {
    float sum = all[column];
    for (int w = 1; w < warps; ++w) sum += all[w * kPitch + column];
    return sum;
  };
  const Finish f = finish(p, static_cast<int>(head), top, sum_of(kPitch - 1));
  char* out = row_at(p.out, bytes_of(p.out_dtype), b, head, s.q_row + i);
  for (int d = share * 32 + lane; d < Dv; d += warps * 32)
    store_any(out, p.out_dtype, d, sum_of(d) * f.factor);
  if (p.lse.data != nullptr && share == 0 && lane == 0)
    stat_at(p.lse, b, head, s.q_row + i) = f.lse;
}

template <int kColumns>
const char* launch_exact(const AttentionParams& p) {
  const ExactPlan plan{p, Walk(p, Exact<kColumns>::kRows, kPassing)};
  return launch(exact_forward<kColumns>, dim3(static_cast<unsigned>(plan.walk.blocks(p))),
                dim3(kExactThreads), Exact<kColumns>::shared(1), on(p.place), plan);
}

}  // namespace

const char* exact_forward_any(const AttentionParams& p) {
  return p.D <= 128 && p.Dv <= 128 ? launch_exact<4>(p) : launch_exact<16>(p);
}

const char* attention_merge(const AttentionParams& p) {
  const ExactPlan plan{p, Walk(p, 1, 1)};
  int shift = 0;
  while (1 << shift < kMergeWarps && 2 << shift <= plan.walk.splits) ++shift;
  return launch(p.Dv <= 128 ? merge_splits<4> : merge_splits<16>,
                blocks_for(p.B * p.Hq * p.Sq, kMergeWarps >> shift), dim3(32 * kMergeWarps), 0,
                on(p.place), plan, shift);
}

}  // namespace genfast::cuda
