// Reductions of the diffusion family on CUDA: guidance weights from five sums per sample, and the
// exact quantile of |x0| by radix selection. Sums are in double and in a fixed order, counts in
// integers.
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

// ---- the quantile of |x0|: magnitudes order as their bits do -----------------------------------

// A pass counts one digit of the keys that begin like the wanted one; the last also looks for the
// key that follows. Of 16-bit inputs the third digit is zero.

// What the blocks of a sample share from launch to launch; zero before the first.
struct Ledger {
  unsigned long long bins[kBins];
  unsigned arrived;  // blocks of this launch that have added theirs
  uint32_t above;    // ~ the least key above those counted
  uint32_t nan;
  uint32_t key;  // of Selected
  uint64_t remaining;
  uint64_t padding[13];  // whole lines of 128 bytes
};
static_assert(sizeof(Ledger) == kThresholdRoom * sizeof(double), "what Python allocates");

struct Threshold {
  Stage x, m;
  Rows rows;
  float* s;
  Ledger* ledgers;
  int64_t cols;
  unsigned parts;
  int passes;
  double ratio, max;
  bool convert;

  struct Seen {
    uint32_t above = ~0u;  // the least key that is larger than those counted
    bool nan = false;
  };
  struct Lesser {
    __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t c) const {
      return a < c ? a : c;
    }
  };

  __device__ __forceinline__ int64_t rank() const {
    return static_cast<int64_t>(ratio * static_cast<double>(cols - 1));
  }
  __device__ __forceinline__ Selected start() const {
    return {0, static_cast<uint64_t>(cols - rank()), 0};
  }

  // Every `parts`-th block of groups, from `part` on.
  __device__ __forceinline__ Seen count(int64_t b, unsigned part, const Digit& digit,
                                        uint32_t found, Histogram& bins) const {
    float dx = 1.0f, dm = 0.0f;
    if (convert) dx = rows(b)[0], dm = rows(b)[1];
    bins.clear();
    __syncthreads();
    Seen seen;
    const int64_t step = static_cast<int64_t>(parts) * blockDim.x * kGroup;
    for (int64_t first = (static_cast<int64_t>(part) * blockDim.x + threadIdx.x) * kGroup;
         first < cols; first += step) {
      const int high = cols - first < kGroup ? static_cast<int>(cols - first) : kGroup;
      float v[kGroup];
      load(x, b * cols + first, 0, high, v);
      if (convert) {
        float u[kGroup];
        load(m, b * cols + first, 0, high, u);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) v[i] = v[i] * dx + u[i] * dm;
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (i >= high) continue;
        const uint32_t key = bits(v[i]) & 0x7FFFFFFFu, begin = key & digit.known;
        if (begin == found) bins.add(digit.bin(key));
        if (begin > found && key < seen.above) seen.above = key;
        seen.nan |= key > 0x7F800000u;
      }
    }
    seen.nan = __syncthreads_or(seen.nan) != 0;
    return seen;
  }

  // found: all digits but the last, of the histogram. seen: by all blocks.
  __device__ __forceinline__ void finish(int64_t b, const Selected& found, const Digit& digit,
                                         const Histogram& bins, Seen seen) const {
    const Selected last = pick(bins, found, digit.shift);
    uint32_t next = seen.above;
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += static_cast<int>(blockDim.x)) {
      const uint32_t key = found.key | static_cast<uint32_t>(i) << digit.shift;
      if (key > last.key && key < next && bins[i] != 0) next = key;
    }
    next = BlockTeam().reduce(next, Lesser());
    if (threadIdx.x != 0) return;
    if (seen.nan) {
      s[b] = from_bits(0x7FC00000u);
      return;
    }
    // `remaining` of the equal keys lie at and above the rank
    const int64_t low = rank();
    const double lower = from_bits(last.key);
    const double upper = low + 1 < cols && last.remaining == 1 ? from_bits(next) : lower;
    const double weight = ratio * static_cast<double>(cols - 1) - static_cast<double>(low);
    // inf - inf is avoided
    const double q = upper == lower || weight == 0 ? lower : lower + weight * (upper - lower);
    const double least = q > 1.0 ? q : 1.0;
    s[b] = static_cast<float>(least < max ? least : max);
  }
};

constexpr int kThresholdThreads = 512;
constexpr int64_t kPerBlock = int64_t{kThresholdThreads} * kGroup;  // one group per thread
constexpr int64_t kMostBlocks = 1024;  // four rounds of two on 132 multiprocessors

// A whole sample in a block, fewer than 2^32 elements.
__global__ void __launch_bounds__(kThresholdThreads, 1)
    threshold_of(const __grid_constant__ Threshold op) {
  GENFAST_SHARED(Histogram, bins);
  const int64_t b = blockIdx.x;
  Selected found = op.start();
#pragma unroll 1
  for (int pass = 0;; ++pass) {
    const Digit digit(pass);
    Threshold::Seen seen = op.count(b, 0, digit, found.key, bins);
    if (pass == op.passes - 1) {
      op.finish(b, found, digit, bins, seen);
      return;
    }
    found = pick(bins, found, digit.shift);
  }
}

// One pass of many blocks over a sample: the last to arrive finds the digit. Nobody waits.
__global__ void __launch_bounds__(kThresholdThreads, 2)
    threshold_pass(const __grid_constant__ Threshold op, int pass) {
  GENFAST_SHARED(Histogram, bins);
  const int64_t b = blockIdx.x / op.parts;
  const unsigned part = blockIdx.x % op.parts;
  Ledger& ledger = op.ledgers[b];
  const Digit digit(pass);
  const bool last_pass = pass == op.passes - 1;
  Threshold::Seen seen = op.count(b, part, digit, ledger.key, bins);
  if (last_pass) {
    seen.above = BlockTeam().reduce(seen.above, Threshold::Lesser());
    if (threadIdx.x == 0) {
      atomicMax(&ledger.above, ~seen.above);
      if (seen.nan) atomicOr(&ledger.nan, 1u);
    }
  }
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThresholdThreads)
    if (bins.low[i] != 0) atomicAdd(&ledger.bins[i], static_cast<unsigned long long>(bins.low[i]));
  __threadfence();
  __syncthreads();
  const bool last = threadIdx.x == 0 && atomicAdd(&ledger.arrived, 1u) == op.parts - 1;
  if (!__syncthreads_or(last)) return;
  __threadfence();
  // Atomics read what others added, not an old line of L1; and leave zeros for the next pass.
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThresholdThreads)
    bins.set(i, atomicExch(&ledger.bins[i], 0ull));
  if (last_pass) {
    seen.above = ~atomicMax(&ledger.above, 0u);
    seen.nan = atomicOr(&ledger.nan, 0u) != 0;
  }
  __syncthreads();
  Selected found = op.start();
  if (pass > 0) found.key = ledger.key, found.remaining = ledger.remaining;
  if (last_pass) {
    op.finish(b, found, digit, bins, seen);
    return;
  }
  found = pick(bins, found, digit.shift);
  if (threadIdx.x == 0)
    ledger.key = found.key, ledger.remaining = found.remaining, ledger.arrived = 0;
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
  const bool narrow = (p.x.dtype == Dtype::f16 || p.x.dtype == Dtype::bf16) && !t.convert;
  t.passes = narrow ? kDigits - 1 : kDigits;
  t.parts = 1;
  if (!p.scratch.defined())
    return launch(threshold_of, blocks_for(batch, 1), dim3(kThresholdThreads), 0, p.x, t);
  const int64_t enough = (t.cols + kPerBlock - 1) / kPerBlock;
  const int64_t most = (kMostBlocks + batch - 1) / batch;
  t.parts = static_cast<unsigned>(enough < most ? enough : most);
  t.ledgers = static_cast<Ledger*>(p.scratch.data);
  const size_t bytes = sizeof(Ledger) * static_cast<size_t>(batch);
  const char* error = clear_memory(t.ledgers, bytes, p.x);
  for (int pass = 0; error == nullptr && pass < t.passes; ++pass)
    error = launch(threshold_pass, blocks_for(batch * t.parts, 1), dim3(kThresholdThreads), 0, p.x,
                   t, pass);
  return error;
}

}  // namespace cuda
}  // namespace genfast
