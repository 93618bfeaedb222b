// Token sampling on CUDA: temperature, top-k, top-p, min-p, then Gumbel-max, without a sort. A row
// belongs to a block; every filter is a threshold found by radix selection (select.cuh).
#include <math.h>

#include "api/sampling.h"
#include "cuda/rows.cuh"
#include "cuda/select.cuh"

namespace genfast::cuda {

const char* categorical_plain(const CategoricalParams& p);  // gumbel.cu

namespace {

template <class T>
struct PerRow {  // one value, or one per row
  const T* data;
  int64_t stride;
  T otherwise;

  PerRow(const TensorView& t, T o)
      : data(static_cast<const T*>(t.data)),
        stride(t.numel > 1 ? t.strides[t.ndim - 1] : 0),
        otherwise(o) {
    if (!t.defined()) data = nullptr;
  }
  __device__ __forceinline__ T operator()(int64_t row) const {
    return data == nullptr ? otherwise : data[row * stride];
  }
};

// Probability relative to the largest, in units of 2^-40: 2^23 tokens fit 64 bits.
__device__ __forceinline__ uint64_t mass_of(float x, float top) {
  return static_cast<uint64_t>(exp(static_cast<double>(x) - top) * 0x1p40);
}

// v[j] = t[at + j step], j < n. The dtype is asked once, so that all loads are under way together.
constexpr int kAhead = 8;
__device__ __forceinline__ void load_apart(const Stage& t, int64_t at, int64_t step, int n,
                                           float (&v)[kAhead]) {
  if (t.dense && t.dtype == Dtype::f32) {
    const float* p = reinterpret_cast<const float*>(t.base) + at;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) v[j] = j < n ? p[j * step] : 0.0f;
    return;
  }
  if (t.dense && t.dtype != Dtype::f64) {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(t.base) + at;
    const bool half = t.dtype == Dtype::f16;
    uint16_t u[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) u[j] = j < n ? p[j * step] : uint16_t{0};
#pragma unroll
    for (int j = 0; j < kAhead; ++j) v[j] = half ? f32_of_f16(u[j]) : f32_of_bf16(u[j]);
    return;
  }
#pragma unroll
  for (int j = 0; j < kAhead; ++j) v[j] = 0.0f;
#pragma unroll 1
  for (int at_j = 0; at_j < n; ++at_j) {  // strided: one copy of the code
    const float x = load_one(t, at + at_j * step);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) v[j] = j == at_j ? x : v[j];
  }
}

struct Filtered {
  Groups groups;
  Stage logits;
  Noise noise;
  PerRow<float> temperature;
  PerRow<int64_t> top_k;
  PerRow<float> top_p, min_p;
  int64_t* index;

  __device__ __forceinline__ void operator()(const BlockTeam& team, int64_t row, float*) const {
    GENFAST_SHARED(Histogram, bins);
    const int64_t cols = groups.cols, at = row * cols;
    const auto each = [&](auto&& fn) {
      const int64_t size = team.size();
#pragma unroll 1
      for (int64_t i = team.rank(); i < cols; i += size * kAhead) {
        int n = 0;  // counted: a 64-bit division is a call
#pragma unroll
        for (int j = 0; j < kAhead; ++j) n += i + j * size < cols;
        float v[kAhead];
        load_apart(logits, at + i, size, n, v);
#pragma unroll
        for (int j = 0; j < kAhead; ++j)
          if (j < n) fn(i + j * size, v[j]);
      }
    };
    Best best{-infinity(), INT64_MAX};
    each([&](int64_t i, float x) {
      if (x > best.value) best = {x, i};
      if (x != x) best = {infinity(), i};
    });
    best = team.reduce(best, Better());
    const float t = temperature(row), inverse_t = 1.0f / t, top = best.value * inverse_t;
    // Nothing to draw from, or greedy: no temperature, or one so small that the logits overflow.
    if (!finite(best.value) || !(t > 0.0f) || !finite(top)) {
      if (team.rank() == 0) index[row] = finite(best.value) ? best.index : -1;
      return;
    }
    const auto scaled = [&](auto&& fn) { each([&](int64_t i, float x) { fn(i, x * inverse_t); }); };

    float floor = -infinity();  // kept: value >= floor
    const int64_t k = top_k(row);
    if (k > 0 && k < cols) {
      const Selected s = select_key(static_cast<uint64_t>(k), bins, [&](auto&& add) {
        scaled([&](int64_t, float x) { add(ordered_key(x)); });
      });
      floor = value_of_key(s.key);
    }
    uint32_t nucleus = 0;  // kept: key > nucleus, or equal with column <= last
    int64_t last = INT64_MAX;
    const float p = top_p(row);
    if (p < 1.0f) {
      unsigned long long total = 0;
      scaled([&](int64_t, float x) {
        if (x >= floor) total += mass_of(x, top);
      });
      total = team.reduce(total, Add());
      const double wanted = ceil(static_cast<double>(p) * static_cast<double>(total));
      uint64_t target = wanted >= 1.0 ? static_cast<uint64_t>(wanted) : 1;
      if (target > total) target = total;
      const Selected s = select_key(target, bins, [&](auto&& add) {
        scaled([&](int64_t, float x) {
          if (!(x >= floor)) return;
          const uint64_t mass = mass_of(x, top);
          if (mass != 0) add(ordered_key(x), mass);
        });
      });
      nucleus = s.key;
      const uint64_t one = mass_of(value_of_key(s.key), top);
      const uint64_t ties = s.weight / one, keep = (s.remaining + one - 1) / one;
      if (keep < ties) {  // equal logits: the lower columns first
        const Selected c = select_key(keep, bins, [&](auto&& add) {
          scaled([&](int64_t i, float x) {
            if (ordered_key(x) == nucleus) add(~static_cast<uint32_t>(i));
          });
        });
        last = static_cast<int64_t>(~c.key);
      }
    }
    const float m = min_p(row);
    if (m > 0.0f) {
      const float lowest = top + static_cast<float>(log(static_cast<double>(m)));
      floor = floor > lowest ? floor : lowest;
    }
    best = {-infinity(), INT64_MAX};
    for_groups(team, groups, row, [&](const Group& g, int64_t) {
      float v[kGroup], e[kGroup];
      load(logits, g.index, g.low, g.high, v);
      unsigned kept = 0;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        v[i] *= inverse_t;
        const uint32_t key = ordered_key(v[i]);
        if (i >= g.low && i < g.high && v[i] >= floor &&
            (key > nucleus || (key == nucleus && g.index - at + i <= last)))
          kept |= 1u << i;
      }
      if (kept == 0) return;  // of most groups: their noise costs more than all passes before
      noise_of<GumbelMap>(noise, g, e);
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        if ((kept >> i & 1) && v[i] + e[i] > best.value) best = {v[i] + e[i], g.index - at + i};
    });
    best = team.reduce(best, Better());
    if (team.rank() == 0) index[row] = finite(best.value) ? best.index : -1;
  }
};

__global__ void __launch_bounds__(512, 1) filtered_rows(const __grid_constant__ Filtered op) {
  op(BlockTeam(), static_cast<int64_t>(blockIdx.x), nullptr);
}

}  // namespace

const char* categorical(const CategoricalParams& p) {
  if (!p.temperature.defined() && !p.top_k.defined() && !p.top_p.defined() && !p.min_p.defined())
    return categorical_plain(p);
  const Groups groups = row_groups(p.logits, p.noise);
  if (groups.rows * groups.cols == 0) return nullptr;
  const Filtered op{groups,
                    Stage(p.logits),
                    p.noise,
                    PerRow<float>(p.temperature, 1.0f),
                    PerRow<int64_t>(p.top_k, 0),
                    PerRow<float>(p.top_p, 1.0f),
                    PerRow<float>(p.min_p, 0.0f),
                    static_cast<int64_t*>(p.index.data)};
  const int threads = groups.cols <= 2048 ? 128 : 512;
  return launch(filtered_rows, blocks_for(groups.rows, 1), dim3(threads), 0, p.logits, op);
}

}  // namespace genfast::cuda
