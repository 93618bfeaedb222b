// rng on CUDA: one thread per Philox block, four values a store. Same maths header as the CPU and
// compiled with -fmad=false, so the bits are the same.
#include "api/rng.h"
#include "cuda/launch.cuh"
#include "math/rng.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace genfast::cuda {
namespace {

struct Shape {  // logical index -> element offset for any strides
  int ndim;
  int64_t size[kMaxDims], stride[kMaxDims];
  __device__ int64_t offset(int64_t index) const {
    int64_t at = 0;
    for (int d = ndim - 1; d >= 0; --d) {
      at += index % size[d] * stride[d];
      index /= size[d];
    }
    return at;
  }
};

__device__ void put(void* out, Dtype dtype, int64_t at, float v, Distribution kind) {
  const bool down = kind == Distribution::uniform;  // [0, 1) in every dtype
  switch (dtype) {
    case Dtype::f32:
      static_cast<float*>(out)[at] = v;
      break;
    case Dtype::f64:
      static_cast<double*>(out)[at] = v;
      break;
    case Dtype::f16:
      static_cast<__half*>(out)[at] = down ? __float2half_rz(v) : __float2half_rn(v);
      break;
    default:
      static_cast<__nv_bfloat16*>(out)[at] = down ? __float2bfloat16_rz(v) : __float2bfloat16_rn(v);
  }
}

__device__ void values(Distribution kind, const Words<uint32_t>& w, float* v) {
  const uint32_t word[4] = {w.w0, w.w1, w.w2, w.w3};
  if (kind == Distribution::normal) {
    box_muller<float>(w.w0, w.w1, v[0], v[1]);
    box_muller<float>(w.w2, w.w3, v[2], v[3]);
    return;
  }
  for (int i = 0; i < 4; ++i)
    v[i] = kind == Distribution::uniform       ? uniform<float>(word[i])
           : kind == Distribution::exponential ? exponential_noise<float>(word[i])
           : kind == Distribution::gumbel      ? gumbel_noise<float>(word[i])
                                               : logistic_noise<float>(word[i]);
}

__global__ void random_kernel(void* out, Dtype dtype, Shape shape, bool dense, int64_t rows,
                              int64_t cols, Noise noise, Distribution kind, int64_t low,
                              uint64_t range) {
  const int64_t skip = noise.offset & 3;
  const int64_t blocks_per_row = (cols + skip + 3) / 4 + 1;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       t < rows * blocks_per_row; t += step) {
    const int64_t row = t / blocks_per_row, b = t - row * blocks_per_row;
    const uint64_t seed = noise.seeds == nullptr
                              ? noise.seed
                              : static_cast<uint64_t>(noise.seeds[noise.n_seeds > 1 ? row : 0]);
    const uint64_t block = static_cast<uint64_t>(noise.offset >> 2) + static_cast<uint64_t>(b);
    const Words<uint32_t> w = philox4x32_10<uint32_t>(
        static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
        static_cast<uint32_t>(noise.stream), static_cast<uint32_t>(noise.stream >> 32),
        static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    const uint32_t word[4] = {w.w0, w.w1, w.w2, w.w3};
    const bool integers = kind >= Distribution::integer;
    float v[4];
    if (!integers) values(kind, w, v);
    const int64_t first = b * 4 - skip;
    if (!integers && dense && dtype == Dtype::f32 && first >= 0 && first + 4 <= cols &&
        ((row * cols + first) & 3) == 0) {
      float4* to = reinterpret_cast<float4*>(static_cast<float*>(out) + row * cols + first);
      *to = make_float4(v[0], v[1], v[2], v[3]);
      continue;
    }
    for (int i = 0; i < 4; ++i) {
      if (first + i < 0 || first + i >= cols) continue;
      const int64_t index = row * cols + first + i;
      const int64_t at = dense ? index : shape.offset(index);
      if (!integers) {
        put(out, dtype, at, v[i], kind);
        continue;
      }
      const int64_t value =
          kind == Distribution::bits
              ? static_cast<int64_t>(word[i])
              : low + static_cast<int64_t>(range == (uint64_t{1} << 32)
                                               ? word[i]
                                               : static_cast<uint64_t>(word[i]) * range >> 32);
      if (dtype == Dtype::i64)
        static_cast<int64_t*>(out)[at] = value;
      else
        static_cast<int32_t*>(out)[at] = static_cast<int32_t>(value);
    }
  }
}

}  // namespace

const char* random(const RandomParams& p) {
  if (p.out.numel == 0) return nullptr;
  Shape shape{p.out.ndim, {}, {}};
  for (int d = 0; d < p.out.ndim; ++d) {
    shape.size[d] = p.out.shape[d];
    shape.stride[d] = p.out.strides[d];
  }
  const bool dense = is_contiguous(p.out) && (reinterpret_cast<uintptr_t>(p.out.data) & 15) == 0;
  const int64_t rows = p.noise.n_seeds > 1 && p.out.ndim > 0 ? p.out.shape[0] : 1;
  const int64_t cols = p.out.numel / rows;
  const int64_t threads = rows * ((cols + 3) / 4 + 2);
  const int64_t blocks = (threads + 255) / 256;
  const unsigned grid = static_cast<unsigned>(blocks < 132 * 16 ? blocks : 132 * 16);
  return launch(random_kernel, dim3(grid), dim3(256), 0, p.out, p.out.data, p.out.dtype, shape,
                dense, rows, cols, p.noise, p.distribution, p.low, p.range);
}

}  // namespace genfast::cuda
