// Kernels that are wrong on purpose, and a few that are right, to prove that the SIMT machine sees
// the one and computes the other. Only tests/cuda/test_simt.py runs them.
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/team.cuh"

namespace genfast::cuda {
namespace {

enum Fault : int {
  kNone,
  kRace,
  kUninitialised,
  kDivergentPlaces,
  kMissingThreads,
  kExitedLane,
  kDivergentShuffle,
  kNoCopyWait,
  kSharedOverrun,
  kGlobalOverrun,
  kNamedBarriers,
  kSubWarps,
  kSharedLimit,
  kEarlyCopy,
};

// Static and dynamic shared memory count together: 40 + 16 KiB are more than a kernel may have that
// did not ask.
__global__ void __launch_bounds__(32) greedy(float* out) {
  GENFAST_SHARED(float[10 * 1024], large);
  large[threadIdx.x] = 1.0f;
  out[threadIdx.x] = large[threadIdx.x];
}

// out[i] = in[i] + in[63 - i] through shared memory, in blocks of 64.
__global__ void __launch_bounds__(64) mirror(const float* in, float* out, int n, int fault) {
  GENFAST_SHARED(float[64], tile);
  GENFAST_DYNAMIC_SHARED(dynamic);
  const int t = static_cast<int>(threadIdx.x), at = static_cast<int>(blockIdx.x) * 64 + t;
  if (fault == kEarlyCopy) {  // the next values come over those that others have not read yet
    float* staged = reinterpret_cast<float*>(dynamic);
    staged[t] = in[at];
    __syncthreads();
    if (t < 16)
      copy_async_16(shared_address(staged + 4 * t), in + (at / 64 + 1) % (n / 64) * 64 + 4 * t, 16);
    copy_commit();
    out[at] = staged[t] + staged[63 - t];
    __syncthreads();
    copy_wait<0>();
    return;
  }
  if (fault == kNoCopyWait || fault == kSharedOverrun) {
    float* staged = reinterpret_cast<float*>(dynamic);
    if (t < 16) copy_async_16(shared_address(staged + 4 * t), in + blockIdx.x * 64 + 4 * t, 16);
    copy_commit();
    if (fault == kSharedOverrun) {
      copy_wait<0>();
      if (t == 5) staged[64] = 1.0f;
    }
    __syncthreads();
    out[at] = staged[t] + staged[63 - t];
    __syncthreads();
    copy_wait<0>();
    return;
  }
  if (fault != kUninitialised || t != 3) tile[t] = in[at];
  if (fault == kDivergentPlaces && t < 32)
    __syncthreads();
  else if (fault == kMissingThreads && t == 9)
    __syncwarp(1u << 10);
  else if (fault != kRace)
    __syncthreads();
  if (fault == kExitedLane && t == 1) return;
  if (fault == kExitedLane) __syncwarp();
  float v = tile[t] + tile[63 - t];
  if (fault == kDivergentShuffle) {
    if (t % 2 == 0)
      v = __shfl_xor_sync(kAllLanes, v, 1);
    else
      v = __shfl_xor_sync(kAllLanes, v, 1);
  }
  if (fault == kNamedBarriers) {  // each warp at its own barrier, twice, in a different rhythm
    for (int i = 0; i < 2 + t / 32; ++i) barrier_sync(1 + t / 32, 32);
    barrier_sync(3, 64);
  }
  if (fault == kSubWarps) {  // halves of a warp on different roads
    const uint32_t half = t % 32 < 16 ? 0x0000FFFFu : 0xFFFF0000u;
    if (t % 32 < 16)
      v += __shfl_sync(half, v, t % 32) * 0.0f;
    else
      v += __shfl_sync(half, v, 16 + t % 16) * 0.0f;
  }
  out[fault == kGlobalOverrun ? n + 8 : at] = v;
}

// C (16 x 8) = A (16 x 16) B (16 x 8), all row-major in global memory; 16-bit inputs.
__global__ void __launch_bounds__(32)
    product(const uint16_t* a, const uint16_t* b, float* c, bool bf16) {
  GENFAST_SHARED(uint16_t[16 * 16 + 16 * 8], tiles);
  for (int i = static_cast<int>(threadIdx.x); i < 48; i += 32)
    copy_async_16(shared_address(tiles + 8 * i), i < 32 ? a + 8 * i : b + 8 * (i - 32), 16);
  copy_commit();
  copy_wait<0>();
  __syncwarp();
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  uint32_t fa[4], fb[4];
  load_matrix(fa, shared_address(tiles + (lane % 16) * 16 + (lane / 16) * 8));
  load_matrix_transposed(
      fb, shared_address(tiles + 256 + (lane % 16) * 8));  // the last two matrices repeat
  float r[4] = {0, 0, 0, 0};
  if (bf16)
    mma_bf16(r, fa, fb[0], fb[1]);
  else
    mma_f16(r, fa, fb[0], fb[1]);
  c[g * 8 + 2 * t] = r[0], c[g * 8 + 2 * t + 1] = r[1];
  c[(g + 8) * 8 + 2 * t] = r[2], c[(g + 8) * 8 + 2 * t + 1] = r[3];
}

}  // namespace
}  // namespace genfast::cuda

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

SIMT_EXPORT const char* simt_mirror(const float* in, float* out, int n, int fault) {
  using namespace genfast;
  TensorView on;
  on.device_type = 2;
  if (fault == cuda::kSharedLimit)
    return cuda::launch(cuda::greedy, dim3(1), dim3(32), 16 * 1024, on, out);
  return cuda::launch(cuda::mirror, dim3(static_cast<unsigned>(n / 64)), dim3(64), 64 * 4, on, in,
                      out, n, fault);
}
SIMT_EXPORT const char* simt_product(const uint16_t* a, const uint16_t* b, float* c, int bf16) {
  using namespace genfast;
  TensorView on;
  on.device_type = 2;
  return cuda::launch(cuda::product, dim3(1), dim3(32), 0, on, a, b, c, bf16 != 0);
}
SIMT_EXPORT const char* simt_error_text(int error) {
  return genfast::cuda::error_text(static_cast<cudaError_t>(error), 0);
}
