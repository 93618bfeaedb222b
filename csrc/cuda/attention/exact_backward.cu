// Backward in fp32: gradients of what the tensor-core kernels do not take, of the mask and of the
// sinks; and the row statistics that all of them read.
#include "cuda/attention/exact.cuh"
#include "cuda/attention/gradient.cuh"

namespace genfast::cuda {
namespace {

// A warp owns a row: delta = sum(out dout) - dlse.
__global__ void __launch_bounds__(256) row_stats(const __grid_constant__ GradientPlan plan) {
  const AttentionParams& p = plan.g.p;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (row >= p.B * p.Hq * p.Sq) return;
  const int64_t i = row % p.Sq, head = row / p.Sq % p.Hq, b = row / p.Sq / p.Hq;
  const Sequence s = device_sequence(p, b);
  if (i >= s.Sq) return;
  const int bytes = bytes_of(p.out_dtype);
  const char* out = row_at(p.out, bytes, b, head, s.q_row + i);
  const char* dout = row_at(plan.g.dout, bytes, b, head, s.q_row + i);
  float sum = 0.0f;
  for (int64_t d = threadIdx.x % 32; d < p.Dv; d += 32)
    sum = fused_multiply_add(load_any(out, p.out_dtype, d), load_any(dout, p.out_dtype, d), sum);
  sum = reduce_warp(sum, Add());
  if (threadIdx.x % 32 != 0) return;
  const float lse = stat_at(p.lse, b, head, s.q_row + i);
  plan.stats.lse2[row] = lse == -infinite() ? infinite() : lse * kLog2e;
  if (plan.g.dlse.data != nullptr) sum -= stat_at(plan.g.dlse, b, head, s.q_row + i);
  plan.stats.delta[row] = sum;
}

// What the fp32 kernels read of a query.
struct ExactQuery {
  Query query;
  float lse2, delta;

  ExactQuery() = default;
  __device__ __forceinline__ ExactQuery(const GradientPlan& plan, const Sequence& s, const Query& q)
      : query(q), lse2(infinite()), delta(0.0f) {
    if (q.position < 0) return;
    const int64_t at = RowStats::index(plan.g.p, s.b, q);
    lse2 = plan.stats.lse2[at], delta = plan.stats.delta[at];
  }
};

// kKeys: a block owns keys, queries pass by, dK and dV come out; else the other way round, and dQ.
template <int kColumns, bool kKeys>
__global__ void __launch_bounds__(kExactThreads, 1)
    exact_backward(const __grid_constant__ GradientPlan plan) {
  using E = Exact<kColumns>;
  constexpr int kOwn = E::kOwn;
  GENFAST_DYNAMIC_SHARED(memory);
  const AttentionParams& p = plan.g.p;
  float* own = reinterpret_cast<float*>(memory);  // q or k
  float* own_v = own + E::kRows * E::kWide;       // dout or v
  float* passing = own_v + E::kRows * E::kWide;
  const int64_t group = group_of(p), rows = kKeys ? p.Sk : p.Sq * group;
  const int64_t tiles = (rows + E::kRows - 1) / E::kRows, at = blockIdx.x / tiles;
  const int kv_head = static_cast<int>(at % p.Hkv);
  const Sequence s = device_sequence(p, at / p.Hkv);
  const int first = static_cast<int>((blockIdx.x - at * tiles) * E::kRows);
  if (first >= (kKeys ? s.Sk : s.Sq * group)) return;
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int bytes = bytes_of(p.dtype), out_bytes = bytes_of(p.out_dtype);

  const auto key_at = [&](const AttentionRows& t, int j) -> char* {
    return j < s.Sk ? key_row(p, t, bytes, s, kv_head, j) : nullptr;
  };
  const auto query_at = [&](const AttentionRows& t, int size, int r) -> char* {
    const Query q = query_of(p, s, kv_head, r);
    return q.position < 0 ? nullptr : row_at(t, size, s.b, q.head, s.q_row + q.position);
  };
  const auto load = [&](auto count, float* to, int pitch, bool keys, bool values, int from) {
    const int dim = values ? Dv : D;
    E::template fill<decltype(count)::value>(
        to, pitch, dim, values && !keys ? p.out_dtype : p.dtype, [&](int r) -> const char* {
          if (keys) return key_at(values ? p.v : p.k, from + r);
          return values ? query_at(plan.g.dout, out_bytes, from + r)
                        : query_at(p.q, bytes, from + r);
        });
  };
  const auto pass = [&](bool values, int from) {
    __syncthreads();
    load(std::integral_constant<int, kPassing>{}, passing, E::kPitch, !kKeys, values, from);
    __syncthreads();
  };
  using OwnRows = std::integral_constant<int, E::kRows>;
  load(OwnRows{}, own, E::kWide, kKeys, false, first);
  load(OwnRows{}, own_v, E::kWide, kKeys, true, first);

  ExactQuery mine[kOwn];
  int begin = 0, end = static_cast<int>(s.Sq * group);
  if (!kKeys) {
    begin = static_cast<int>(s.Sk), end = 0;
    for (int r = 0; r < E::kRows; ++r) {
      const Query q = query_of(p, s, kv_head, first + r);
      if (q.lo < q.hi) begin = q.lo < begin ? q.lo : begin, end = q.hi > end ? q.hi : end;
    }
#pragma unroll
    for (int r = 0; r < kOwn; ++r)
      mine[r] = ExactQuery(plan, s, query_of(p, s, kv_head, first + warp * kOwn + r));
  }
  float d_own[kOwn][kColumns] = {}, d_own_v[kKeys ? kOwn : 1][kColumns] = {};
  for (int block = begin / kPassing * kPassing; block < end; block += kPassing) {
    ExactQuery theirs;
    if (kKeys) {
      theirs = ExactQuery(plan, s, query_of(p, s, kv_head, block + lane));
      const Query& q = theirs.query;
      if (!__any_sync(kAllLanes, q.lo < first + E::kRows && q.hi > first && q.lo < q.hi)) continue;
    }
    const int count = end - block < kPassing ? end - block : kPassing;
    float w[kOwn], d[kOwn];
    pass(false, block);
    E::dot(own + warp * kOwn * E::kWide, passing, D, w);
    pass(true, block);
    E::dot(own_v + warp * kOwn * E::kWide, passing, Dv, d);
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const ExactQuery& q = kKeys ? theirs : mine[r];
      const int j = kKeys ? first + warp * kOwn + r : block + lane;
      gradient_of<true, true>(p, s, q.query, q.lse2, q.delta, j, false, w[r], d[r]);
    }
    if constexpr (kKeys)
      E::weigh(w, passing, count, Dv, [&](int r, int c, float sum) { d_own_v[r][c] += sum; });
    pass(false, block);
    E::weigh(d, passing, count, D, [&](int r, int c, float sum) { d_own[r][c] += sum; });
  }
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const int row = first + warp * kOwn + r;
    char* to = kKeys ? key_at(plan.g.dk, row) : query_at(plan.g.dq, bytes, row);
    if (to == nullptr) continue;
    char* to_v = kKeys ? key_at(plan.g.dv, row) : nullptr;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = lane + 32 * c;
      if (column < D) store_any(to, p.dtype, column, d_own[r][c] * p.scale);
      if constexpr (kKeys)
        if (column < Dv) store_any(to_v, p.dtype, column, d_own_v[r][c]);
    }
  }
}

// Gradient of an additive mask: a block owns the elements it writes and adds what is broadcast over
// them in a fixed order. Rows: 16 or 8 queries of one head (or all of them), 32 keys (or all).
template <int kColumns>
__global__ void __launch_bounds__(kExactThreads, 1)
    mask_gradient(const __grid_constant__ GradientPlan plan) {
  using E = Exact<kColumns>;
  constexpr int kOwn = E::kOwn;
  GENFAST_DYNAMIC_SHARED(memory);
  GENFAST_SHARED(double[4][32], of_warp);
  const AttentionParams& p = plan.g.p;
  const AttentionMask& m = plan.g.dmask;
  float* own = reinterpret_cast<float*>(memory);
  float* own_v = own + E::kRows * E::kWide;
  float* passing = own_v + E::kRows * E::kWide;
  const bool every_i = m.i_stride == 0, every_j = m.j_stride == 0;
  const int64_t i_tiles = (p.Sq + E::kRows - 1) / E::kRows;
  const int64_t j_tiles = (p.Sk + kPassing - 1) / kPassing;
  int64_t at = blockIdx.x;
  const auto take = [&](int64_t count, bool all, int64_t& from, int64_t& to) {
    from = all ? 0 : at % count, to = all ? count : from + 1;
    if (!all) at /= count;
  };
  int64_t j0, j1, i0, i1, h0, h1, b0, b1;
  take(j_tiles, every_j, j0, j1);
  take(i_tiles, every_i, i0, i1);
  take(p.Hq, m.h_stride == 0, h0, h1);
  take(p.B, m.b_stride == 0, b0, b1);
  const int D = static_cast<int>(p.D), Dv = static_cast<int>(p.Dv);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int bytes = bytes_of(p.dtype), out_bytes = bytes_of(p.out_dtype);

  double sum[kOwn] = {};  // over up to B Hq Sq Sk elements that cancel
  for (int64_t b = b0; b < b1; ++b) {
    const Sequence s = device_sequence(p, b);
    for (int64_t head = h0; head < h1; ++head) {
      const auto query_at = [&](int64_t i) -> Query {
        if (i >= s.Sq) return {0, -1, 0, 0};
        const KeyRange keys = visible_keys(p, s, i);
        return {static_cast<int>(head), static_cast<int>(i), static_cast<int>(keys.lo),
                static_cast<int>(keys.hi)};
      };
      const auto row = [&](const AttentionRows& t, int size, int64_t i) -> const char* {
        return i < s.Sq ? row_at(t, size, b, head, s.q_row + i) : nullptr;
      };
      for (int64_t i = i0; i < i1; ++i) {
        const int64_t first = i * E::kRows;
        __syncthreads();
        E::template fill<E::kRows>(own, E::kWide, D, p.dtype,
                                   [&](int r) { return row(p.q, bytes, first + r); });
        E::template fill<E::kRows>(own_v, E::kWide, Dv, p.out_dtype,
                                   [&](int r) { return row(plan.g.dout, out_bytes, first + r); });
        for (int64_t jt = j0; jt < j1; ++jt) {
          const int block = static_cast<int>(jt * kPassing);
          const auto pass = [&](const AttentionRows& t, int dim) {
            __syncthreads();
            E::template fill<kPassing>(passing, E::kPitch, dim, p.dtype, [&](int j) -> const char* {
              return block + j < s.Sk ? key_row(p, t, bytes, s, head / group_of(p), block + j)
                                      : nullptr;
            });
            __syncthreads();
          };
          float w[kOwn], d[kOwn];
          pass(p.k, D);
          E::dot(own + warp * kOwn * E::kWide, passing, D, w);
          pass(p.v, Dv);
          E::dot(own_v + warp * kOwn * E::kWide, passing, Dv, d);
#pragma unroll
          for (int r = 0; r < kOwn; ++r) {
            const ExactQuery q(plan, s, query_at(first + warp * kOwn + r));
            gradient_of<true, true>(p, s, q.query, q.lse2, q.delta, block + lane, false, w[r], d[r],
                                    true);
            sum[r] += d[r];
          }
        }
      }
    }
  }
  const auto write = [&](int64_t i, int64_t j, double v) {
    if ((every_i || i < p.Sq) && (every_j || j < p.Sk))
      store_any(m.data, m.dtype,
                b0 * m.b_stride + h0 * m.h_stride + i * m.i_stride + j * m.j_stride,
                static_cast<float>(v));
  };
#pragma unroll
  for (int r = 0; r < kOwn; ++r)
    if (every_j) sum[r] = reduce_warp(sum[r], Add());
  if (!every_i) {
#pragma unroll
    for (int r = 0; r < kOwn; ++r)
      if (!every_j || lane == 0)
        write(i0 * E::kRows + warp * kOwn + r, j0 * kPassing + lane, sum[r]);
    return;
  }
  double total = sum[0];
#pragma unroll
  for (int r = 1; r < kOwn; ++r) total += sum[r];
  of_warp[warp][lane] = total;
  __syncthreads();
  if (warp == 0 && (!every_j || lane == 0))
    write(0, j0 * kPassing + lane,
          of_warp[0][lane] + of_warp[1][lane] + of_warp[2][lane] + of_warp[3][lane]);
}

// A block owns a head: dsink = -sum P_sink delta.
__global__ void __launch_bounds__(256) sink_gradient(const __grid_constant__ GradientPlan plan) {
  const AttentionParams& p = plan.g.p;
  const int head = static_cast<int>(blockIdx.x);
  double sum = 0.0;
  for (int64_t t = threadIdx.x; t < p.B * p.Sq; t += blockDim.x) {
    const int64_t b = t / p.Sq, i = t - b * p.Sq;
    if (i >= device_sequence(p, b).Sq) continue;
    const int64_t at = (b * p.Hq + head) * p.Sq + i;
    sum -= static_cast<double>(exp2f(p.sinks[head] * kLog2e - plan.stats.lse2[at])) *
           plan.stats.delta[at];
  }
  sum = BlockTeam().reduce(sum, Add());
  if (threadIdx.x == 0) plan.g.dsinks[head] = static_cast<float>(sum);
}

template <int kColumns, bool kKeys>
const char* launch_exact(const GradientPlan& plan) {
  const AttentionParams& p = plan.g.p;
  const int64_t rows = kKeys ? p.Sk : p.Sq * group_of(p);
  const int64_t tiles = (rows + Exact<kColumns>::kRows - 1) / Exact<kColumns>::kRows;
  if (p.B * p.Hkv * tiles == 0) return nullptr;
  return launch(exact_backward<kColumns, kKeys>, dim3(static_cast<unsigned>(p.B * p.Hkv * tiles)),
                dim3(kExactThreads), Exact<kColumns>::shared(2), on(p.place), plan);
}

template <int kColumns>
const char* launch_mask(const GradientPlan& plan) {
  const AttentionParams& p = plan.g.p;
  const AttentionMask& m = plan.g.dmask;
  const int64_t rows = Exact<kColumns>::kRows;
  const int64_t blocks = (m.b_stride != 0 ? p.B : 1) * (m.h_stride != 0 ? p.Hq : 1) *
                         (m.i_stride != 0 ? (p.Sq + rows - 1) / rows : 1) *
                         (m.j_stride != 0 ? (p.Sk + kPassing - 1) / kPassing : 1);
  if (blocks == 0) return nullptr;
  return launch(mask_gradient<kColumns>, dim3(static_cast<unsigned>(blocks)), dim3(kExactThreads),
                Exact<kColumns>::shared(2), on(p.place), plan);
}

}  // namespace

const char* attention_row_stats(const AttentionGradParams& g) {
  const AttentionParams& p = g.p;
  if (p.B * p.Hq * p.Sq == 0) return nullptr;
  return launch(row_stats, blocks_for(p.B * p.Hq * p.Sq, 8), dim3(256), 0, on(p.place),
                GradientPlan(g, false));
}

const char* exact_backward_any(const AttentionGradParams& g) {
  const GradientPlan plan(g, false);
  const bool narrow = g.p.D <= 128 && g.p.Dv <= 128;
  const char* error = narrow ? launch_exact<4, false>(plan) : launch_exact<16, false>(plan);
  if (error != nullptr) return error;
  return narrow ? launch_exact<4, true>(plan) : launch_exact<16, true>(plan);
}

const char* exact_backward_rest(const AttentionGradParams& g) {
  const GradientPlan plan(g, false);
  const bool narrow = g.p.D <= 128 && g.p.Dv <= 128;
  const char* error = nullptr;
  if (g.dmask.data != nullptr) error = narrow ? launch_mask<4>(plan) : launch_mask<16>(plan);
  if (error != nullptr || g.dsinks == nullptr || g.p.Hq == 0) return error;
  return launch(sink_gradient, dim3(static_cast<unsigned>(g.p.Hq)), dim3(256), 0, on(g.p.place),
                plan);
}

}  // namespace genfast::cuda
