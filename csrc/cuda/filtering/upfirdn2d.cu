// Up-sampling, filtering and down-sampling on CUDA in one pass: every output element adds up the
// taps that meet real samples, which are `up` apart in the filter and begin where its phase does.
//
// A filter [n] of both axes runs as the outer product, n^2 / up^2 taps an element at about 8
// instructions each. Two passes would take 2 n / up taps, but write and read a plane between them:
// worth it from n = 12 or so on, not for the n = 4 of most calls.
#include "api/filtering.h"
#include "cuda/stage.cuh"
#include "math/lane.h"

namespace genfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kFilter = 6144;  // floats of a filter in shared memory: 24 KiB, 78 x 78

__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) { return b == 1 ? a : a / b; }

struct Axis {
  int64_t in, out, up, down, before, taps;

  // The first tap that meets a sample, and which; the next is `up` taps and one sample on.
  __device__ __forceinline__ void first(int64_t o, int64_t& tap, int64_t& sample) const {
    const int64_t at = o * down - before;  // where tap 0 falls, among samples `up` apart
    sample = at > 0 ? quotient(at + up - 1, up) : 0;
    tap = sample * up - at;
  }
};

// Memory is planes of [H][W][pixel]: pixel is 1, or the channels where they are inside. A thread
// makes eight values that share their taps: eight channels side by side where it can, else one
// element of each of eight planes; neighbouring threads make neighbouring elements.
struct Upfirdn {
  const char* x;
  char* y;
  const float* f;
  Dtype dtype_x, dtype_y;
  int64_t planes, pixel;
  Axis h, w;
  double gain;
  bool outer_product, flip, in_shared, vectors;

  // The filter as a correlation, with its gain.
  __device__ __forceinline__ float weight(int64_t i, int64_t j) const {
    if (!flip) i = h.taps - 1 - i, j = w.taps - 1 - j;
    const double v = outer_product ? static_cast<double>(f[i]) * f[j] : f[i * w.taps + j];
    return static_cast<float>(v * gain);
  }
};

// v[j] = element at + j step, for j < count; zero past it.
template <class T>
__device__ __forceinline__ void read_planes(const char* base, int64_t at, int64_t step, int count,
                                            T (&v)[kGroup]) {
  const T* from = reinterpret_cast<const T*>(base) + at;
  if (count == kGroup) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j, from += step) v[j] = *from;
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) v[j] = j < count ? from[j * step] : T{0};
  }
}

__device__ __forceinline__ void read(const Upfirdn& p, int64_t at, int64_t step, int count,
                                     float (&v)[kGroup]) {
  if (p.vectors) return read_whole(p.x, p.dtype_x, at, v);
  if (p.dtype_x == Dtype::f32) return read_planes(p.x, at, step, count, v);
  uint16_t h[kGroup];  // all on their way before the first is converted
  read_planes(p.x, at, step, count, h);
#pragma unroll
  for (int j = 0; j < kGroup; ++j)
    v[j] = p.dtype_x == Dtype::f16 ? f32_of_f16(h[j]) : f32_of_bf16(h[j]);
}

__global__ void __launch_bounds__(kThreads, 3) upfirdn(const __grid_constant__ Upfirdn p) {
  GENFAST_DYNAMIC_SHARED(memory);
  auto* filter = reinterpret_cast<float*>(memory);
  if (p.in_shared) {
    const int wide = static_cast<int>(p.w.taps), all = static_cast<int>(p.h.taps) * wide;
    for (int t = static_cast<int>(threadIdx.x); t < all; t += kThreads)
      filter[t] = p.weight(t / wide, t % wide);
    __syncthreads();
  }
  const int64_t wide = p.vectors ? kGroup : 1, each = p.vectors ? 1 : kGroup;
  const int64_t pixel = p.pixel / wide, row = p.w.out * pixel, plane = p.h.out * row;
  const int64_t work = (p.planes + each - 1) / each * plane;
  const int64_t step_x = p.h.in * p.w.in * p.pixel, step_y = p.h.out * p.w.out * p.pixel;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; t < work;
       t += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t group = t / plane, e = t - group * plane, first = group * each;
    const int64_t oy = e / row, r = e - oy * row, ox = quotient(r, pixel);
    const int count = p.planes - first < each ? static_cast<int>(p.planes - first) : kGroup;
    int64_t i0, j0, y0, x0;
    p.h.first(oy, i0, y0);
    p.w.first(ox, j0, x0);
    const int64_t origin = first * step_x + (r - ox * pixel) * wide;
    float sums[kGroup] = {}, v[kGroup];
    for (int64_t i = i0, y = y0; i < p.h.taps && y < p.h.in; i += p.h.up, ++y) {
      int64_t at = origin + (y * p.w.in + x0) * p.pixel;
#pragma unroll 1
      for (int64_t j = j0, x = x0; j < p.w.taps && x < p.w.in; j += p.w.up, ++x, at += p.pixel) {
        const float k = p.in_shared ? filter[static_cast<int>(i * p.w.taps + j)] : p.weight(i, j);
        read(p, at, step_x, count, v);
#pragma unroll
        for (int n = 0; n < kGroup; ++n) sums[n] = fused_multiply_add(k, v[n], sums[n]);
      }
    }
    const int64_t to = first * step_y + e * wide;
    if (p.vectors) {
      write_whole(p.y, p.dtype_y, to, sums);
    } else {
#pragma unroll
      for (int n = 0; n < kGroup; ++n)
        if (n < count) write_one(p.y, p.dtype_y, to + n * step_y, sums[n]);
    }
  }
}

bool on_16_bytes(const TensorView& t) { return reinterpret_cast<uintptr_t>(t.data) % 16 == 0; }

}  // namespace

const char* upfirdn2d(const UpfirdnParams& p) {
  if (p.y.numel == 0) return nullptr;
  const int64_t fh = p.f.shape[0], fw = p.f.shape[p.f.ndim - 1];
  Upfirdn op{};
  op.x = static_cast<const char*>(p.x.data), op.y = static_cast<char*>(p.y.data);
  op.f = static_cast<const float*>(p.f.data);
  op.dtype_x = p.x.dtype, op.dtype_y = p.y.dtype;
  op.pixel = p.channels_inner ? p.x.shape[1] : 1;
  op.planes = p.channels_inner ? p.x.shape[0] : p.x.shape[0] * p.x.shape[1];
  op.h = {p.x.shape[2], p.y.shape[2], p.up[0], p.down[0], p.before[0], fh};
  op.w = {p.x.shape[3], p.y.shape[3], p.up[1], p.down[1], p.before[1], fw};
  op.gain = p.gain, op.outer_product = p.f.ndim == 1, op.flip = p.flip;
  op.in_shared = fh * fw <= kFilter;
  op.vectors = op.pixel % kGroup == 0 && on_16_bytes(p.x) && on_16_bytes(p.y);
  const int64_t each = op.vectors ? 1 : kGroup, wide = op.vectors ? kGroup : 1;
  const int64_t work =
      (op.planes + each - 1) / each * (p.y.shape[2] * p.y.shape[3]) * (op.pixel / wide);
  return launch(upfirdn, blocks_for(work, kThreads), dim3(kThreads),
                op.in_shared ? static_cast<size_t>(fh * fw) * 4 : 0, p.y, op);
}

}  // namespace genfast::cuda
