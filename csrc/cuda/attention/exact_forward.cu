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
  if (first >= s.Sq * (p.Hq / p.Hkv)) return;
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

// A warp owns a query row; the splits are added in their order.
__global__ void __launch_bounds__(256) merge_splits(const __grid_constant__ ExactPlan plan) {
  const AttentionParams& p = plan.p;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (row >= p.B * p.Hq * p.Sq) return;
  const int64_t i = row % p.Sq, head = row / p.Sq % p.Hq, b = row / p.Sq / p.Hq;
  const Sequence s = device_sequence(p, b);
  if (i >= s.Sq) return;
  const auto part = [&](int64_t k) { return plan.walk.part_of(p, k, b, head, i); };
  float m = -infinite(), l = 0.0f;
  for (int64_t k = 0; k < plan.walk.splits; ++k) m = fmaxf(m, part(k)[p.Dv]);
  const float base = m == -infinite() ? 0.0f : m;
  for (int64_t k = 0; k < plan.walk.splits; ++k)
    l += part(k)[p.Dv + 1] * exp2f(part(k)[p.Dv] - base);
  const Finish f = finish(p, static_cast<int>(head), m, l);
  char* out = row_at(p.out, bytes_of(p.out_dtype), b, head, s.q_row + i);
  for (int64_t d = threadIdx.x % 32; d < p.Dv; d += 32) {
    float sum = 0.0f;
    for (int64_t k = 0; k < plan.walk.splits; ++k) sum += part(k)[d] * exp2f(part(k)[p.Dv] - base);
    store_any(out, p.out_dtype, d, sum * f.factor);
  }
  if (p.lse.data != nullptr && threadIdx.x % 32 == 0) stat_at(p.lse, b, head, s.q_row + i) = f.lse;
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
  return launch(merge_splits, blocks_for(p.B * p.Hq * p.Sq, 8), dim3(256), 0, on(p.place), plan);
}

}  // namespace genfast::cuda
