// Tiles of 16-bit rows in shared memory and the two products on them, by mma.m16n8k16: what the
// forward and both backward kernels are made of. A warp owns 16 rows of a product, or 32 where the
// registers allow it: shared memory, not the tensor cores, is what such kernels wait for.
#pragma once
#include "cuda/attention/score.cuh"

namespace genfast::cuda {
namespace {

constexpr int kWarps = 4, kMmaThreads = 32 * kWarps, kMmaRows = 16 * kWarps;

struct F16 {
  static constexpr bool kBf16 = false;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return pack_f16(low, high);
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    mma_f16(c, a, b0, b1);
  }
};
struct Bf16 {
  static constexpr bool kBf16 = true;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return pack_bf16(low, high);
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    mma_bf16(c, a, b0, b1);
  }
};

// Rows of kDim elements whose 16-byte chunks are permuted by the row's number: the eight rows that
// an ldmatrix reads lie in eight different groups of banks. kHeight: in panels of 64 columns and so
// many rows, as a warpgroup reads them; 0: whole rows.
template <int kDim, int kHeight = 0>
struct Rows16 {
  uint16_t* base;

  __device__ __forceinline__ uint16_t* at(int row, int chunk) const {
    if (kHeight > 0 && kDim > 64)
      return base + (chunk / 8 * kHeight + row) * 64 + (((chunk ^ row) & 7) * 8);
    return base + row * kDim + ((chunk ^ (row & 7)) * 8);
  }
  // For instructions; rows start at multiples of their length, so the address of chunk ^ c is this
  // one ^ 16 c: one operation for each of a thread's fragments.
  __device__ __forceinline__ SharedAddress address(int row, int chunk) const {
    return shared_address(at(row, chunk));
  }
  // Fills kRows rows by kThreads threads, of which this is number `thread`; from(row) is a row in
  // global memory, or null for zeros. `whole`: rows start at multiples of 16 bytes and dim is a
  // multiple of 8.
  template <int kRows, int kThreads = kMmaThreads, class From>
  __device__ __forceinline__ void fill(int dim, bool whole, int thread, From&& from) const {
    constexpr int kChunks = kDim / 8;
    [[maybe_unused]] constexpr int kUnroll = kDim <= 128 && kThreads >= kMmaThreads ? 4 : 1;
#pragma unroll kUnroll
    for (int c = thread; c < kRows * kChunks; c += kThreads) {
      const int row = c / kChunks, chunk = c % kChunks;
      const auto* source = reinterpret_cast<const uint16_t*>(from(row));
      const int left = source == nullptr ? 0 : dim - chunk * 8;
      uint16_t* to = at(row, chunk);
      if (left <= 0) {
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
      } else if (whole) {
        copy_async_16(shared_address(to), source + chunk * 8, 16);
      } else {
#pragma unroll 1
        for (int e = 0; e < 8; ++e) to[e] = e < left ? source[chunk * 8 + e] : uint16_t{0};
      }
    }
  }
  // The same of whole rows at equal distances of `step` bytes, of which `count` exist: a copy costs
  // an addition. A source of 0 bytes is not read.
  template <int kRows, int kThreads = kMmaThreads>
  __device__ __forceinline__ void fill_even(const char* source, int64_t step, int count, int dim,
                                            int thread) const {
    constexpr int kChunks = kDim / 8, kStep = kThreads / kChunks;
    static_assert(kThreads % kChunks == 0, "a thread keeps its chunk");
    const int chunk = thread % kChunks, first = thread / kChunks;
    if (chunk * 8 >= dim) count = 0;
    source += first * step + chunk * 16;
#pragma unroll
    for (int row = 0; row < kRows; row += kStep) {
      if (kRows % kStep != 0 && first + row >= kRows) break;
      copy_async_16(address(first + row, chunk), source, first + row < count ? 16 : 0);
      source += kStep * step;
    }
  }
};

// Blocks of kRows keys (or values) of one head of a sequence, for kThreads threads to load. kEven:
// all rows are whole and lie at equal distances, also in a page; else `even` says so at run time.
template <int kDim, int kRows, int kThreads, bool kEven>
struct KeyLoader {
  const AttentionParams& p;
  const AttentionRows& rows;
  const Sequence& s;
  const char* head;  // the sequence's first row, or that of page 0
  int kv_head, dim, thread;
  bool whole, even;

  __device__ __forceinline__ KeyLoader(const AttentionParams& params, const AttentionRows& operand,
                                       const Sequence& sequence, int of_head, int64_t columns,
                                       bool whole_rows, bool even_rows, int rank)
      : p(params),
        rows(operand),
        s(sequence),
        head(row_at(operand, 2, params.block_table == nullptr ? sequence.entry : 0, of_head,
                    params.block_table == nullptr ? sequence.k_row : 0)),
        kv_head(of_head),
        dim(static_cast<int>(columns)),
        thread(rank),
        whole(whole_rows),
        even(whole_rows && even_rows) {}

  template <class To>
  __device__ __forceinline__ void operator()(const To& to, int block) const {
    if (kEven || even) {
      int64_t offset = block * rows.s_stride;
      if (p.block_table != nullptr) {
        const Page page = page_of(p, s, block);
        offset = page.entry * rows.b_stride + page.row * rows.s_stride;
      }
      to.template fill_even<kRows, kThreads>(head + 2 * offset, rows.s_stride * 2,
                                             static_cast<int>(s.Sk) - block, dim, thread);
    } else {
      to.template fill<kRows, kThreads>(dim, whole, thread, [&](int j) -> const char* {
        return block + j < s.Sk ? key_row(p, rows, 2, s, kv_head, block + j) : nullptr;
      });
    }
  }
};

// Where this lane finds its row of fragment 0 of a left operand (rows [row, row + 16)), of a right
// one, and of a right one that is read transposed.
template <int kDim>
__device__ __forceinline__ SharedAddress left_of(const Rows16<kDim>& a, int row) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return a.address(row + lane % 16, lane / 16);
}
template <int kDim>
__device__ __forceinline__ SharedAddress right_of(const Rows16<kDim>& b) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return b.address(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}
template <int kDim>
__device__ __forceinline__ SharedAddress transposed_of(const Rows16<kDim>& b) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return b.address(lane % 16, lane / 16);
}

// c[i] += fragment k (columns [16 k, 16 k + 16)) of 16 rows each times the transpose of that of 8
// kN rows at `right`: a fragment, once read, serves kTiles tiles.
template <class T, int kDim, int kTiles, int kN>
__device__ __forceinline__ void multiply_columns(const uint32_t (&fa)[kTiles][4],
                                                 SharedAddress right, int k,
                                                 float (&c)[kTiles][kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    uint32_t fb[4];
    load_matrix(fb, (right ^ (32 * k)) + 16 * kDim * n);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      T::mma(c[i][n], fa[i], fb[0], fb[1]);
      T::mma(c[i][n + 1], fa[i], fb[2], fb[3]);
    }
  }
}

template <int kTiles, int kN>
__device__ __forceinline__ void clear(float (&c)[kTiles][kN][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int n = 0; n < kN; ++n) c[i][n][0] = c[i][n][1] = c[i][n][2] = c[i][n][3] = 0.0f;
}

// c[i] (16 x 8 kN) = rows [row + 16 i, + 16) of a times the transpose of the first 8 kN rows of b.
template <class T, int kDim, int kTiles, int kN>
__device__ __forceinline__ void multiply_rows(const Rows16<kDim>& a, int row, const Rows16<kDim>& b,
                                              float (&c)[kTiles][kN][4]) {
  const SharedAddress left = left_of(a, row), right = right_of(b);
  clear(c);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t fa[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) load_matrix(fa[i], (left ^ (32 * k)) + 32 * kDim * i);
    multiply_columns<T, kDim>(fa, right, k, c);
  }
}

// The same of one tile whose fragments wait in registers.
template <class T, int kDim, int kN>
__device__ __forceinline__ void multiply_held(const uint32_t (&fa)[kDim / 16][1][4],
                                              const Rows16<kDim>& b, float (&c)[1][kN][4]) {
  const SharedAddress right = right_of(b);
  clear(c);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) multiply_columns<T, kDim>(fa[k], right, k, c);
}

// c[i] (16 x kDim) += w[i] (16 x 8 kN, as the product above left it) times the first 8 kN rows of
// b.
template <class T, int kDim, int kTiles, int kN>
__device__ __forceinline__ void add_weighted(const float (&w)[kTiles][kN][4], const Rows16<kDim>& b,
                                             float (&c)[kTiles][kDim / 8][4]) {
  const SharedAddress right = transposed_of(b);
#pragma unroll
  for (int k = 0; k < kN / 2; ++k) {
    uint32_t fa[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int f = 0; f < 4; ++f)
        fa[i][f] = T::pack(w[i][2 * k + f / 2][f % 2 * 2], w[i][2 * k + f / 2][f % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 2) {
      uint32_t fb[4];
      load_matrix_transposed(fb, (right ^ (16 * n)) + 32 * kDim * k);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        T::mma(c[i][n], fa[i], fb[0], fb[1]);
        T::mma(c[i][n + 1], fa[i], fb[2], fb[3]);
      }
    }
  }
}

// Stores rows of a 16 x kDim product: element (r, c) to to(r) + c, scaled by factor(r). The warp's
// own rows of `stage` are free to be written.
template <class T, int kDim, class Stage, class To>
__device__ __forceinline__ void store_rows(const float (&c)[kDim / 8][4], const float (&factor)[2],
                                           const Stage& stage, int row, int dim, Dtype dtype,
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
