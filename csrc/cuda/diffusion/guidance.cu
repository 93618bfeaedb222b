// Reductions of the diffusion family on CUDA: guidance weights from five sums per sample, and the
// exact quantile of |x0| by radix selection. Sums are in double and in a fixed order.
#include <math.h>

#include "cuda/diffusion/terms.cuh"
#include "cuda/select.cuh"

namespace genfast {

__device__ __forceinline__ GuidanceSums operator+(GuidanceSums a, const GuidanceSums& b) {
  a.c += b.c, a.u += b.u, a.cc += b.cc, a.uu += b.uu, a.cu += b.cu;
  return a;
}
__device__ __forceinline__ GuidanceSums& operator+=(GuidanceSums& a, const GuidanceSums& b) {
  return a = a + b;
}

// Here, where argument-dependent look-up finds it.
__device__ __forceinline__ GuidanceSums shuffle_xor(GuidanceSums v, int bits) {
  v.c = cuda::shuffle_xor(v.c, bits), v.u = cuda::shuffle_xor(v.u, bits);
  v.cc = cuda::shuffle_xor(v.cc, bits), v.uu = cuda::shuffle_xor(v.uu, bits);
  v.cu = cuda::shuffle_xor(v.cu, bits);
  return v;
}

namespace cuda {
namespace {

struct Weights {
  Groups groups;
  Stage cond, other;
  const float* scale;
  float* weights;
  double option[2];
  Guidance method;
  bool original, average, scale_per_sample;

  using Sum = GuidanceSums;
  using Prepared = Nothing;
  __device__ __forceinline__ Nothing prepare(int64_t) const { return {}; }
  __device__ __forceinline__ Sum sum(const Group& g, int64_t, Nothing) const {
    float c[kGroup], u[kGroup];
    load(cond, g.index, g.low, g.high, c);
    load(other, g.index, g.low, g.high, u);
    Sum s;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < g.low || i >= g.high) continue;
      const double ci = c[i], ui = u[i];  // products of two floats are exact in double
      s.c += ci, s.u += ui, s.cc += ci * ci, s.uu += ui * ui, s.cu += ci * ui;
    }
    return s;
  }
  __device__ void finish(int64_t b, const Sum& s) const {
    double w[3];
    guidance_weights(method, s, static_cast<double>(groups.cols), scale[scale_per_sample ? b : 0],
                     original, option, average, w);
    const int width = average ? 3 : 2;
    for (int j = 0; j < width; ++j) weights[b * width + j] = static_cast<float>(w[j]);
  }
};

__global__ void __launch_bounds__(kThreads, 3)
    plain_weights(const __grid_constant__ Weights op, int64_t batch) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b < batch) op.finish(b, GuidanceSums());
}

// A block owns a sample, which it reads six times from L2: as many threads as leave each the 68
// registers it wants, 80. Magnitudes order as their bits do.
constexpr int kThresholdThreads = 768;

struct Threshold {
  Stage x, m;
  Rows rows;
  float* s;
  int64_t cols;
  double ratio, max;
  bool convert;

  template <class Fn>
  __device__ __forceinline__ void each(int64_t b, Fn&& fn) const {
    const float* row = convert ? rows(b) : nullptr;
    for (int64_t first = static_cast<int64_t>(threadIdx.x) * kGroup; first < cols;
         first += static_cast<int64_t>(blockDim.x) * kGroup) {
      const int high = cols - first < kGroup ? static_cast<int>(cols - first) : kGroup;
      float v[kGroup], u[kGroup];
      load(x, b * cols + first, 0, high, v);
      if (convert) load(m, b * cols + first, 0, high, u);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (i >= high) continue;
        const float at = convert ? v[i] * row[0] + u[i] * row[1] : v[i];
        fn(bits(at) & 0x7FFFFFFFu);
      }
    }
  }

  __device__ __forceinline__ void operator()(int64_t b) const {
    GENFAST_SHARED(Histogram<unsigned>, bins);
    const double rank = ratio * static_cast<double>(cols - 1);
    const int64_t low = static_cast<int64_t>(rank), high = low + 1 < cols ? low + 1 : cols - 1;
    uint32_t largest = 0;
    each(b, [&](uint32_t key) { largest = key > largest ? key : largest; });
    const BlockTeam team;
    largest = team.reduce(largest, [](uint32_t a, uint32_t c) { return a > c ? a : c; });
    const Selected found = select_key(static_cast<uint64_t>(cols - low), bins, [&](auto&& add) {
      each(b, [&](uint32_t key) { add(key, uint64_t{1}); });
    });
    uint32_t next = largest;  // the smallest key above
    each(b, [&](uint32_t key) { next = key > found.key && key < next ? key : next; });
    next = team.reduce(next, [](uint32_t a, uint32_t c) { return a < c ? a : c; });
    if (threadIdx.x != 0) return;
    if (largest > 0x7F800000u) {
      s[b] = from_bits(0x7FC00000u);
      return;
    }
    // `remaining` of the equal keys lie at and above rank `low`
    const double lower = from_bits(found.key);
    const double upper = high > low && found.remaining == 1 ? from_bits(next) : lower;
    const double weight = rank - static_cast<double>(low);  // inf - inf is avoided
    const double q = upper == lower || weight == 0 ? lower : lower + weight * (upper - lower);
    const double least = q > 1.0 ? q : 1.0;
    s[b] = static_cast<float>(least < max ? least : max);
  }
};

__global__ void __launch_bounds__(kThresholdThreads, 1)
    threshold_of(const __grid_constant__ Threshold op) {
  op(static_cast<int64_t>(blockIdx.x));
}

}  // namespace

const char* guidance_weights(const GuidanceParams& p) {
  const bool average = p.average.defined();
  const int64_t batch = batch_of(p.cond);
  if (batch == 0) return nullptr;
  Weights w{};
  w.groups = Groups(p.cond.numel, batch, Noise());
  w.cond = Stage(p.cond), w.other = Stage(average ? p.average : p.uncond);
  w.scale = static_cast<const float*>(p.scale.data), w.scale_per_sample = p.scale.numel > 1;
  w.weights = static_cast<float*>(p.weights.data);
  w.option[0] = p.option[0], w.option[1] = p.option[1];
  w.method = p.method, w.original = p.original, w.average = average;
  if (p.method == Guidance::cfg)
    return launch(plain_weights, blocks_for(batch, kThreads), dim3(kThreads), 0, p.cond, w, batch);
  return launch_sums(w, batch, p.scratch, p.cond);
}

const char* dynamic_threshold(const ThresholdParams& p) {
  const int64_t batch = batch_of(p.x);
  Threshold t{};
  t.x = Stage(p.x), t.m = Stage(p.m), t.convert = p.m.defined();
  t.rows = Rows(p.table, p.index, p.row, batch, batch);
  t.s = static_cast<float*>(p.s.data);
  t.cols = batch > 0 ? p.x.numel / batch : 0;
  t.ratio = p.ratio, t.max = p.max;
  if (t.cols == 0) return nullptr;
  return launch(threshold_of, blocks_for(batch, 1), dim3(kThresholdThreads), 0, p.x, t);
}

}  // namespace cuda
}  // namespace genfast
