// Decoding on tensor cores: at most 16 query rows of a key/value head (a group's heads times a few
// positions), so that reading keys and values is all that takes time. Each warp of a block walks
// its own keys, 16 at a time through its own ring of shared memory, without a barrier in the loop;
// the sums of the warps are added in their order at the end.
#pragma once
#include "cuda/attention/softmax.cuh"

namespace genfast::cuda {
namespace {

constexpr int kDecodeRows = 16, kDecodeKeys = 16;
// Stages of a ring: with queries 68 to 72 KiB for a block, under the 99 KiB of an sm_86, of which
// 32 to 64 are on their way at any time.
template <int kDim>
constexpr int kDecodeStages = 256 / kDim;
template <int kDim>
constexpr size_t kDecodeShared =
    size_t{2} * kDim * (kDecodeRows + kWarps * kDecodeStages<kDim> * 2 * kDecodeKeys);

// One query row from `count` parts, `step` floats apart, in their order: [width] sums, then maximum
// and denominator. By a whole warp; to the output, or to the row's part of a split.
__device__ __forceinline__ void merge_row(const AttentionParams& p, const Walk& walk,
                                          const Task& task, const Sequence& s, const Query& at,
                                          const float* from, int width, int step, int count) {
  if (at.position < 0) return;
  float top = -infinite(), total = 0.0f, factor[kWarps];
#pragma unroll
  for (int i = 0; i < kWarps; ++i)
    if (i < count) top = fmaxf(top, from[i * step + width]);
  const float base = top == -infinite() ? 0.0f : top;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    factor[i] = i < count ? exp2_approx(from[i * step + width] - base) : 0.0f;
    if (i < count) total += factor[i] * from[i * step + width + 1];
  }
  const int lane = static_cast<int>(threadIdx.x % 32), Dv = static_cast<int>(p.Dv);
  const bool split = walk.splits > 1;
  float* part = split ? walk.part_of(p, task.split, s.b, at.head, at.position) : nullptr;
  const Finish f = finish(p, at.head, top, total);
  char* out = row_at(p.out, bytes_of(p.out_dtype), s.b, at.head, s.q_row + at.position);
  for (int d = lane; d < Dv; d += 32) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i)
      if (i < count) sum += factor[i] * from[i * step + d];
    if (split)
      part[d] = sum;
    else
      store_any(out, p.out_dtype, d, sum * f.factor);
  }
  if (lane != 0) return;
  if (split)
    part[Dv] = top, part[Dv + 1] = total;
  else if (p.lse.data != nullptr)
    stat_at(p.lse, s.b, at.head, s.q_row + at.position) = f.lse;
}

template <class T, int kDim, Extras kExtras>
__global__ void __launch_bounds__(kMmaThreads, kDim <= 128 ? 3 : 2)
    mma_decode(const __grid_constant__ ForwardPlan plan) {
  constexpr int kStages = kDecodeStages<kDim>, kN = kDecodeKeys / 8, kPitch = kDim + 2;
  static_assert(kDecodeShared<kDim> >= sizeof(float) * kWarps * kDecodeRows * kPitch,
                "the sums of the warps lie where the keys lay");
  GENFAST_DYNAMIC_SHARED(memory);
  GENFAST_SHARED(Query[kDecodeRows], queries);
  const AttentionParams& p = plan.p;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, t = lane % 4;
  const Rows16<kDim> q{reinterpret_cast<uint16_t*>(memory)};
  uint16_t* ring = q.base + kDim * (kDecodeRows + warp * kStages * 2 * kDecodeKeys);
  const auto stage_of = [&](int stage, int values) {
    return Rows16<kDim>{ring + (2 * stage + values) * kDecodeKeys * kDim};
  };
  const Task task = task_of(p, plan.walk);
  const Sequence s = device_sequence(p, task.b);
  if (task.tile * kDecodeRows >= s.Sq * group_of(p)) return;
  if (thread < kDecodeRows)
    queries[thread] = query_of(p, s, task.kv_head, task.tile * kDecodeRows + thread);
  __syncthreads();
  const Seen seen = seen_by<kDecodeRows>(queries);
  constexpr int kStep = kDecodeKeys * kWarps;
  const Span span(plan.walk, task, seen, kDecodeKeys);

  q.template fill<kDecodeRows>(
      static_cast<int>(p.D), plan.whole_q, thread, [&](int r) -> const char* {
        const Query at = queries[r];
        return at.position < 0 ? nullptr : row_at(p.q, 2, s.b, at.head, s.q_row + at.position);
      });
  copy_commit();
  using Loader = KeyLoader<kDim, kDecodeKeys, 32, false>;
  const Loader keys(p, p.k, s, task.kv_head, p.D, plan.whole_k, plan.even, lane);
  const Loader values(p, p.v, s, task.kv_head, p.Dv, plan.whole_v, plan.even, lane);
  const auto load = [&](const Loader& from, int stage, int which, int block) {
    if (block < span.end) from(stage_of(stage, which), block);
    copy_commit();  // also an empty group: the waits count them
  };
  const int mine = span.begin + warp * kDecodeKeys;
#pragma unroll
  for (int i = 0; i < kStages; ++i)
    load(keys, i, 0, mine + i * kStep), load(values, i, 1, mine + i * kStep);
  copy_wait<2 * kStages>();
  __syncthreads();  // the queries are here

  const float unit = unit_of<kExtras>(p);
  const MaskRows mask(p, s, queries);
  float o[1][kDim / 8][4] = {}, m[2] = {-infinite(), -infinite()}, l[2] = {};
  int stage = 0;
#pragma unroll 1
  for (int block = mine; block < span.end; block += kStep) {
    copy_wait<2 * kStages - 1>();
    __syncwarp();  // the keys are here
    float w[1][kN][4];
    multiply_rows<T, kDim>(q, 0, stage_of(stage, 0), w);
    __syncwarp();  // nobody reads them any more
    load(keys, stage, 0, block + kStages * kStep);
    const bool full = seen.every_lo <= block && seen.every_hi >= block + kDecodeKeys;
    mask_scores<kExtras>(p, s, queries, mask, block, full, w[0]);
    float down[2];
    soften(unit, w[0], m, l, down);
    scale_rows(down, o[0]);
    if constexpr (kExtras == Extras::all) {
      if (p.dropout) drop_scores(p, s, queries, block, w[0]);
    }
    copy_wait<2 * kStages - 1>();
    __syncwarp();
    add_weighted<T, kDim>(w, stage_of(stage, 1), o);
    __syncwarp();
    load(values, stage, 1, block + kStages * kStep);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  copy_wait<0>();
  __syncthreads();  // of all warps: the rings are free

  float* sums = reinterpret_cast<float*>(memory);  // [warp][row][column, then maximum, denominator]
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* to = sums + (warp * kDecodeRows + g + 8 * half) * kPitch;
    l[half] += shuffle_xor(l[half], 1);
    l[half] += shuffle_xor(l[half], 2);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
      to[8 * n + 2 * t] = o[0][n][2 * half], to[8 * n + 2 * t + 1] = o[0][n][2 * half + 1];
    if (t == 0) to[kDim] = m[half] * unit, to[kDim + 1] = l[half];
  }
  __syncthreads();
#pragma unroll 1
  for (int r = warp; r < kDecodeRows; r += kWarps)
    merge_row(plan.p, plan.walk, task, s, queries[r], sums + r * kPitch, kDim, kDecodeRows * kPitch,
              kWarps);
}

template <class T, int kDim, Extras kExtras>
const char* launch_mma_decode(const AttentionParams& p) {
  const ForwardPlan plan(p, Walk(p, kDecodeRows, kDecodeKeys * kWarps));
  return launch(mma_decode<T, kDim, kExtras>, dim3(static_cast<unsigned>(plan.walk.blocks(p))),
                dim3(kMmaThreads), kDecodeShared<kDim>, on(p.place), plan);
}

template <class T, Extras kExtras>
const char* launch_mma_decode(const AttentionParams& p) {
  const int64_t dim = p.D > p.Dv ? p.D : p.Dv;
  if (dim <= 64) return launch_mma_decode<T, 64, kExtras>(p);
  return dim <= 128 ? launch_mma_decode<T, 128, kExtras>(p) : launch_mma_decode<T, 256, kExtras>(p);
}

// D and Dv at most 256; any number of rows, but made for at most 16.
template <class T>
const char* launch_mma_decode(const AttentionParams& p) {
  return extras_of(p) == Extras::none ? launch_mma_decode<T, Extras::none>(p)
                                      : launch_mma_decode<T, Extras::all>(p);
}

}  // namespace
}  // namespace genfast::cuda
