// Decoding in fp32 on the ordinary units: at most 16 query rows of a key/value head, so that
// reading keys and values is all that should take time. Eight lanes are a team: a lane has every
// eighth 16-byte chunk of a row, in registers, and a score takes three shuffles. The teams of a
// block walk keys of their own, with maximum and denominator of their own, and meet at the end.
#pragma once
#include "cuda/attention/decode.cuh"

namespace genfast::cuda {
namespace {

constexpr int kTeamLanes = 8, kTeams = 32 / kTeamLanes;

struct ExactDecodePlan {
  AttentionParams p;
  Walk walk;
  int tiles;  // of kRows query rows, each by warps of its own that share the keys: 1, 2 or 4
};

// kRows: query rows of a warp. Keys at a time: 8 chunks of keys and 8 of values on their way to a
// lane, 8 KiB to a warp.
template <int kDim, int kRows>
__global__ void __launch_bounds__(kMmaThreads, kRows == 1 ? 3 : 2)
    exact_decode(const __grid_constant__ ExactDecodePlan plan) {
  constexpr int kChunks = kDim / 4 / kTeamLanes, kKeys = 8 / kChunks;
  constexpr int kMost = kWarps * kRows, kPitch = kDim + 2;
  GENFAST_SHARED(Query[kMost], queries);
  GENFAST_SHARED(float4[kMost * kDim / 4], own);
  GENFAST_SHARED(float[kMost * kPitch], sums);  // [warp][row][column, then maximum, denominator]
  const AttentionParams& p = plan.p;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int team = lane / kTeamLanes, rank = lane % kTeamLanes;
  const int here = kRows * plan.tiles, D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const Task task = task_of(p, plan.walk);
  const Sequence s = device_sequence(p, task.b);
  const int64_t first = task.tile * here, rows = s.Sq * group_of(p);
  if (first >= rows) return;
  if (thread < kMost)
    queries[thread] = query_of(p, s, task.kv_head, thread < here ? first + thread : rows);
  __syncthreads();
  const Span span(plan.walk, task, seen_by<kMost>(queries), 1);
  const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int i = thread; i < kMost * kDim / 4; i += kMmaThreads) {
    const Query at = queries[i / (kDim / 4)];
    const int chunk = i % (kDim / 4);
    own[i] = at.position < 0 || 4 * chunk >= D
                 ? zero
                 : reinterpret_cast<const float4*>(
                       row_at(p.q, 4, s.b, at.head, s.q_row + at.position))[chunk];
  }
  __syncthreads();

  const bool paged = p.block_table != nullptr;
  const auto head = [&](const AttentionRows& t) {
    return paged ? nullptr : row_at(t, 4, s.entry, task.kv_head, s.k_row);
  };
  const char *keys = head(p.k), *values = head(p.v);
  const auto load = [&](const AttentionRows& t, const char* base, int j, int dim,
                        float4(&to)[kChunks]) {
    const char* row = paged ? key_row(p, t, 4, s, task.kv_head, j) : base + j * t.s_stride * 4;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = rank + kTeamLanes * c;
      to[c] = 4 * chunk < dim ? reinterpret_cast<const float4*>(row)[chunk] : zero;
    }
  };

  const int tile = warp % plan.tiles, shares = kWarps / plan.tiles;
  const Query* mine = queries + tile * kRows;
  const float4* q = own + tile * kRows * kDim / 4 + rank;
  const float to_log2 = p.scale * kLog2e;
  float o[kRows][kChunks][4] = {}, m[kRows], l[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) m[r] = -infinite();
  constexpr int kStep = kTeams * kKeys;
#pragma unroll 1
  for (int block = span.begin + warp / plan.tiles * kStep; block < span.end;
       block += shares * kStep) {
    float4 k[kKeys][kChunks], v[kKeys][kChunks];
    int at[kKeys];  // beyond the end, the last key once more: no score of it counts
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      at[i] = block + kTeams * i + team;
      load(p.k, keys, at[i] < span.end ? at[i] : span.end - 1, D, k[i]);
    }
#pragma unroll
    for (int i = 0; i < kKeys; ++i)
      load(p.v, values, at[i] < span.end ? at[i] : span.end - 1, Dv, v[i]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float w[kKeys] = {}, top = m[r];
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const float4 x = q[r * kDim / 4 + kTeamLanes * c];
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
          w[i] = fused_multiply_add(x.x, k[i][c].x, w[i]);
          w[i] = fused_multiply_add(x.y, k[i][c].y, w[i]);
          w[i] = fused_multiply_add(x.z, k[i][c].z, w[i]);
          w[i] = fused_multiply_add(x.w, k[i][c].w, w[i]);
        }
      }
      bool sees[kKeys];
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
#pragma unroll
        for (int step = 1; step < kTeamLanes; step *= 2) w[i] += shuffle_xor(w[i], step);
        sees[i] = at[i] < span.end && at[i] >= mine[r].lo && at[i] < mine[r].hi;
        float slope;
        w[i] = sees[i] ? with_options(p, s, mine[r], at[i], w[i] * to_log2, slope) : -infinite();
        top = fmaxf(top, w[i]);
      }
      const float base = top == -infinite() ? 0.0f : top, down = exp2_approx(m[r] - base);
      m[r] = top;
      l[r] *= down;
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        w[i] = exp2_approx(w[i] - base);
        l[r] += w[i];
        if (p.dropout && sees[i] && !kept(p, s, mine[r], at[i])) w[i] = 0.0f;
      }
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[r][c][e] *= down;
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
          o[r][c][0] = fused_multiply_add(w[i], v[i][c].x, o[r][c][0]);
          o[r][c][1] = fused_multiply_add(w[i], v[i][c].y, o[r][c][1]);
          o[r][c][2] = fused_multiply_add(w[i], v[i][c].z, o[r][c][2]);
          o[r][c][3] = fused_multiply_add(w[i], v[i][c].w, o[r][c][3]);
        }
      }
    }
  }

  const auto over_teams = [](float x) {  // in the same order for every team
    x += shuffle_xor(x, kTeamLanes);
    return x + shuffle_xor(x, 2 * kTeamLanes);
  };
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float top = fmaxf(m[r], shuffle_xor(m[r], kTeamLanes));
    top = fmaxf(top, shuffle_xor(top, 2 * kTeamLanes));
    const float down = exp2_approx(m[r] - (top == -infinite() ? 0.0f : top));
    const float total = over_teams(l[r] * down);
    float* to = sums + (warp * kRows + r) * kPitch;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float sum = over_teams(o[r][c][e] * down);
        if (team == 0) to[4 * (rank + kTeamLanes * c) + e] = sum;
      }
    if (lane == 0) to[kDim] = top, to[kDim + 1] = total;
  }
  __syncthreads();
#pragma unroll 1
  for (int r = warp; r < here; r += kWarps)
    merge_row(p, plan.walk, task, s, queries[r], sums + r * kPitch, kDim, here * kPitch, shares);
}

template <int kDim, int kRows>
const char* launch_exact_decode(const AttentionParams& p) {
  int tiles = 1;
  while (tiles < kWarps && tiles * kRows < p.Sq * group_of(p)) tiles *= 2;
  const ExactDecodePlan plan{p, Walk(p, kRows * tiles, 32), tiles};
  return launch(exact_decode<kDim, kRows>, dim3(static_cast<unsigned>(plan.walk.blocks(p))),
                dim3(kMmaThreads), 0, on(p.place), plan);
}

// fp32, D and Dv at most 256, whole rows; any number of query rows, but made for at most 16.
inline const char* launch_exact_decode(const AttentionParams& p) {
  const int64_t dim = p.D > p.Dv ? p.D : p.Dv;
  const bool one = p.Sq * group_of(p) == 1;
  if (dim > 128) return launch_exact_decode<256, 2>(p);
  if (dim > 64) return one ? launch_exact_decode<128, 1>(p) : launch_exact_decode<128, 4>(p);
  return one ? launch_exact_decode<64, 1>(p) : launch_exact_decode<64, 4>(p);
}

}  // namespace
}  // namespace genfast::cuda
