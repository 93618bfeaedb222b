// Tiles of 16-bit rows in shared memory and the two products on them, by mma.m16n8k16: what the
// forward and both backward kernels are made of. A warp owns 16 rows of a product.
#pragma once
#include "cuda/attention/score.cuh"

namespace genfast::cuda {
namespace {

constexpr int kWarps = 4, kMmaThreads = 32 * kWarps, kMmaRows = 16 * kWarps;

struct F16 {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return pack_f16(low, high);
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    mma_f16(c, a, b0, b1);
  }
};
struct Bf16 {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return pack_bf16(low, high);
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    mma_bf16(c, a, b0, b1);
  }
};

// Rows of kDim elements whose 16-byte chunks are permuted by the row's number: the eight rows that
// an ldmatrix reads lie in eight different groups of banks.
template <int kDim>
struct Rows16 {
  uint16_t* base;

  __device__ __forceinline__ uint16_t* at(int row, int chunk) const {
    return base + row * kDim + ((chunk ^ (row & 7)) * 8);
  }
  // Fills kRows rows; from(row) is a row in global memory, or null for zeros. `whole`: rows start
  // at multiples of 16 bytes and dim is a multiple of 8.
  template <int kRows, class From>
  __device__ __forceinline__ void fill(int dim, bool whole, From&& from) const {
    constexpr int kChunks = kDim / 8, kUnroll = kDim <= 128 ? 4 : 1;
#pragma unroll kUnroll
    for (int c = static_cast<int>(threadIdx.x); c < kRows * kChunks; c += kMmaThreads) {
      const int row = c / kChunks, chunk = c % kChunks;
      const auto* source = reinterpret_cast<const uint16_t*>(from(row));
      const int left = source == nullptr ? 0 : dim - chunk * 8;
      uint16_t* to = at(row, chunk);
      if (left <= 0) {
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
      } else if (whole) {
        copy_async_16(to, source + chunk * 8, 16);
      } else {
#pragma unroll 1
        for (int e = 0; e < 8; ++e) to[e] = e < left ? source[chunk * 8 + e] : uint16_t{0};
      }
    }
  }
};

// c (16 x 8 kN) = rows [row, row + 16) of a times the transpose of the first 8 kN rows of b.
template <class T, int kDim, int kN>
__device__ __forceinline__ void multiply_rows(const Rows16<kDim>& a, int row, const Rows16<kDim>& b,
                                              float (&c)[kN][4]) {
  const int lane = static_cast<int>(threadIdx.x % 32), in = lane % 8, matrix = lane / 8;
#pragma unroll
  for (int n = 0; n < kN; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t fa[4];
    load_matrix(fa, a.at(row + (matrix & 1) * 8 + in, 2 * k + (matrix >> 1)));
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t fb[4];
      load_matrix(fb, b.at(8 * n + (matrix >> 1) * 8 + in, 2 * k + (matrix & 1)));
      T::mma(c[n], fa, fb[0], fb[1]);
      T::mma(c[n + 1], fa, fb[2], fb[3]);
    }
  }
}

// c (16 x kDim) += w (16 x 8 kN, as the product above left it) times the first 8 kN rows of b.
template <class T, int kDim, int kN>
__device__ __forceinline__ void add_weighted(const float (&w)[kN][4], const Rows16<kDim>& b,
                                             float (&c)[kDim / 8][4]) {
  const int lane = static_cast<int>(threadIdx.x % 32), in = lane % 8, matrix = lane / 8;
#pragma unroll
  for (int k = 0; k < kN / 2; ++k) {
    const uint32_t fa[4] = {T::pack(w[2 * k][0], w[2 * k][1]), T::pack(w[2 * k][2], w[2 * k][3]),
                            T::pack(w[2 * k + 1][0], w[2 * k + 1][1]),
                            T::pack(w[2 * k + 1][2], w[2 * k + 1][3])};
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 2) {
      uint32_t fb[4];
      load_matrix_transposed(fb, b.at(16 * k + (matrix & 1) * 8 + in, n + (matrix >> 1)));
      T::mma(c[n], fa, fb[0], fb[1]);
      T::mma(c[n + 1], fa, fb[2], fb[3]);
    }
  }
}

// Stores rows of a 16 x kDim product: element (r, c) to to(r) + c, scaled by factor(r). The warp's
// own rows of `stage` are free to be written.
template <class T, int kDim, class To>
__device__ __forceinline__ void store_rows(const float (&c)[kDim / 8][4], const float (&factor)[2],
                                           const Rows16<kDim>& stage, int row, int dim, Dtype dtype,
                                           bool whole, To&& to) {
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  if (dtype == Dtype::f32) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      auto* out = reinterpret_cast<float*>(to(g + 8 * half));
      if (out == nullptr) continue;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * n + 2 * t + e < dim) out[8 * n + 2 * t + e] = c[n][2 * half + e] * factor[half];
    }
    return;
  }
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<uint32_t*>(stage.at(row + g + 8 * half, n) + 2 * t) =
          T::pack(c[n][2 * half] * factor[half], c[n][2 * half + 1] * factor[half]);
  __syncwarp();
  constexpr int kChunks = kDim / 8;
#pragma unroll 1
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int r = i / kChunks, chunk = i % kChunks, left = dim - chunk * 8;
    auto* out = reinterpret_cast<uint16_t*>(to(r));
    if (out == nullptr || left <= 0) continue;
    const uint16_t* from = stage.at(row + r, chunk);
    if (whole) {
      *reinterpret_cast<uint4*>(out + chunk * 8) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int e = 0; e < 8 && e < left; ++e) out[chunk * 8 + e] = from[e];
    }
  }
}

}  // namespace
}  // namespace genfast::cuda
