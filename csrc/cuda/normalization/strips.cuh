// Group norms whose groups are too long for a block, or scattered through memory: each block walks
// its part of a channel's places, or of whole rows of channels, whatever group they belong to, and
// leaves two numbers a channel; a second kernel adds those of each group, a third makes the result.
// Memory is read twice, by as many blocks as fill the GPU.
#pragma once
#include "cuda/normalization/common.cuh"

namespace genfast::cuda {

constexpr int kStrip = 256;              // threads of a block
constexpr int kSteps = 4;                // loads of a thread that are under way at once
constexpr int64_t kScattered = 1 << 18;  // elements from which 3 launches are worth it
constexpr int64_t kRun = 1024;           // places of a channel that are worth a block

// What a walk over elements left behind: of `n` of them, two numbers.
struct Two {
  float n, a, b;
};
__device__ __forceinline__ Two shuffle_xor(Two v, int bits) {
  return {shuffle_xor(v.n, bits), shuffle_xor(v.a, bits), shuffle_xor(v.b, bits)};
}

// a: mean, b: sum of squares around it. Chan et al., "Updating formulae and a pairwise algorithm
// for computing sample variances", 1979.
struct JoinMoments {
  __device__ __forceinline__ Two operator()(Two x, Two y) const {
    if (x.n == 0.0f) return y;  // of a large mean d d would be inf, which times 0 is NaN
    if (y.n == 0.0f) return x;
    const float n = x.n + y.n, share = y.n / n, d = y.a - x.a;
    return {n, x.a + d * share, x.b + y.b + d * d * x.n * share};
  }
};
struct JoinSums {
  __device__ __forceinline__ Two operator()(Two x, Two y) const {
    return {x.n + y.n, x.a + y.a, x.b + y.b};
  }
};

// Two numbers of each channel of each part of a sample: [samples * parts][3][channels], as the
// sums of backward.cu.
struct Strips {
  Layout layout;
  float* sums;
  int64_t parts, per_part;  // of a sample's places
  int64_t tiles;            // of channels; runs: one a channel
  int lanes;                // columns: threads side by side

  Strips(const Layout& of, float* sums_, int64_t parts_, int W) : layout(of), sums(sums_) {
    per_part = (of.inner + parts_ - 1) / parts_;
    if (of.order == Order::runs) per_part = (per_part + W - 1) / W * W;
    parts = (of.inner + per_part - 1) / per_part;
    const int64_t pieces = (of.channels + W - 1) / W;
    tiles = of.order == Order::runs ? of.channels : (pieces + 63) / 64;
    lanes = static_cast<int>((pieces + tiles - 1) / tiles);
  }
  int64_t units() const { return layout.samples * parts; }
  dim3 blocks() const { return dim3(static_cast<unsigned>(units() * tiles)); }

  __device__ __forceinline__ float* of(int64_t unit, int sum) const {
    return sums + (unit * 3 + sum) * layout.channels;
  }
  __device__ __forceinline__ int64_t places_of(int64_t part) const {
    const int64_t left = layout.inner - part * per_part;
    return left < per_part ? left : per_part;
  }
};

// Joins what the `rows` threads of a column of the block have, `lanes` apart, in the first of them.
template <int W, class Join>
__device__ __forceinline__ void fold_rows(int row, int rows, int lanes, float n, float (&a)[W],
                                          float (&b)[W], Join join) {
  GENFAST_SHARED(float[2 * W + 1][kStrip], shared);
  const int t = static_cast<int>(threadIdx.x);
  const auto put = [&] {
    shared[2 * W][t] = n;
#pragma unroll
    for (int i = 0; i < W; ++i) shared[i][t] = a[i], shared[W + i][t] = b[i];
  };
  int half = 1;
  while (half < rows) half *= 2;
  __syncthreads();  // the last ones have been read
  put();
  for (half /= 2; half > 0; half /= 2) {
    __syncthreads();
    if (row >= half || row + half >= rows) continue;
    const int other = t + half * lanes;
    const float m = shared[2 * W][other];
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const Two all = join(Two{n, a[i], b[i]}, Two{m, shared[i][other], shared[W + i][other]});
      a[i] = all.a, b[i] = all.b;
    }
    n += m;
    put();
  }
}

// The elements of one thread: W channels, or W places of one, `steps` times.
template <int W>
struct Strip {
  const Layout& of;
  int64_t unit, sample, channel, first, step;
  int steps, row, rows;  // columns: this thread's row of those a block has at once

  __device__ __forceinline__ explicit Strip(const Strips& s) : of(s.layout), steps(0) {
    const int64_t block = blockIdx.x, t = threadIdx.x;
    unit = block / s.tiles;
    const int64_t tile = block - unit * s.tiles;
    sample = unit / s.parts;
    const int64_t part = unit - sample * s.parts, begin = part * s.per_part;
    const int64_t places = s.places_of(part);
    if (of.order == Order::runs) {
      row = 0, rows = 1, channel = tile, step = kStrip * W;
      first = (sample * of.channels + channel) * of.inner + begin + t * W;
      if (t * W < places)
        steps = static_cast<int>((places - t * W + kStrip * W - 1) / (kStrip * W));
      return;
    }
    row = static_cast<int>(t) / s.lanes, rows = kStrip / s.lanes;
    channel = (tile * s.lanes + (t - row * s.lanes)) * W, step = rows * of.channels;
    first = (sample * of.inner + begin + row) * of.channels + channel;
    if (row < rows && row < places && channel < of.channels)
      steps = static_cast<int>((places - row + rows - 1) / rows);
  }
  __device__ __forceinline__ bool runs() const { return of.order == Order::runs; }
  // The group of the i-th channel.
  __device__ __forceinline__ int64_t group(int i) const {
    return sample * of.groups + quotient(channel + (runs() ? 0 : i), of.width);
  }
  // What the block's threads found of each channel, n elements each, to the unit's numbers.
  template <class Join>
  __device__ __forceinline__ void leave(const Strips& s, float n, float (&a)[W], float (&b)[W],
                                        Join join) const {
    if (runs()) {
      Two all{n, a[0], b[0]};
#pragma unroll
      for (int i = 1; i < W; ++i) all = join(all, Two{n, a[i], b[i]});
      all = BlockTeam().reduce(all, join);
      if (threadIdx.x == 0) s.of(unit, 0)[channel] = all.a, s.of(unit, 1)[channel] = all.b;
      return;
    }
    fold_rows(row, rows, s.lanes, n, a, b, join);
    if (row > 0 || channel >= of.channels) return;
#pragma unroll
    for (int i = 0; i < W; ++i)
      s.of(unit, 0)[channel + i] = a[i], s.of(unit, 1)[channel + i] = b[i];
  }
};

// Of all parts and channels of a group, a block: fn(unit, channel, places) -> Two of each.
template <class Join, class Fn>
__device__ __forceinline__ Two of_group(const Strips& s, int64_t group, Join join, Fn&& fn) {
  const Layout& of = s.layout;
  const int64_t sample = group / of.groups, first = (group - sample * of.groups) * of.width;
  Two all{};
  for (int64_t e = threadIdx.x; e < of.width * s.parts; e += blockDim.x) {
    const int64_t part = quotient(e, of.width), unit = sample * s.parts + part;
    all = join(all, fn(unit, first + e - part * of.width, s.places_of(part)));
  }
  return BlockTeam().reduce(all, join);
}

// Whether a call's groups are walked so.
inline bool in_strips(const Layout& of) {
  if (of.order == Order::runs) return of.count > kCachedColumns && of.inner >= kRun;
  return of.order == Order::columns && of.inner > 1 &&
         (of.count > kCachedColumns || of.samples * of.channels * of.inner >= kScattered);
}

}  // namespace genfast::cuda
