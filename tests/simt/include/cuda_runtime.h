// What the .cu files use of CUDA C++ and of its runtime, on the host's SIMT machine. This folder
// comes before the toolkit's headers (which are not needed) when they are compiled as C++.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>

#include "../simt.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define threadIdx (simt::self->index)

// Shared arrays: csrc/cuda/launch.cuh defines both for a GPU.
#define GENFAST_SHARED(type, name) \
  static char name##_key;          \
  using name##_type = type;        \
  name##_type& name =              \
      *static_cast<name##_type*>(simt::shared_array(&name##_key, sizeof(name##_type)))
#define GENFAST_DYNAMIC_SHARED(name) \
  unsigned char* name = static_cast<unsigned char*>(simt::dynamic_shared())

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

// ---- threads ----------------------------------------------------------------------------------

inline void __syncthreads(simt::Site site = simt::Site::here()) { simt::barrier(0, 0, 0, site); }
inline int __syncthreads_or(int p, simt::Site site = simt::Site::here()) {
  return simt::barrier(0, 0, p != 0, site).any != 0;
}
inline int __syncthreads_count(int p, simt::Site site = simt::Site::here()) {
  return static_cast<int>(simt::barrier(0, 0, p != 0, site).count);
}
inline int __syncthreads_and(int p, simt::Site site = simt::Site::here()) {
  const simt::Votes v = simt::barrier(0, 0, p != 0, site);
  return v.count == v.threads;
}
inline void __syncwarp(uint32_t mask = ~0u, simt::Site site = simt::Site::here()) {
  simt::ballot(mask, true, site);
}
inline uint32_t __ballot_sync(uint32_t mask, int p, simt::Site site = simt::Site::here()) {
  return simt::ballot(mask, p != 0, site);
}
inline int __any_sync(uint32_t mask, int p, simt::Site site = simt::Site::here()) {
  return simt::ballot(mask, p != 0, site) != 0;
}
inline int __all_sync(uint32_t mask, int p, simt::Site site = simt::Site::here()) {
  return simt::ballot(mask, p != 0, site) == mask;
}
template <class T>
T __shfl_sync(uint32_t mask, T v, int lane, int width = 32, simt::Site site = simt::Site::here()) {
  return simt::shuffle(
      mask, v, [](int me, int s, int w) { return (me & ~(w - 1)) | (s & (w - 1)); }, lane, width,
      site);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T v, int bits, int width = 32,
                  simt::Site site = simt::Site::here()) {
  return simt::shuffle(
      mask, v, [](int me, int s, int w) { return (me ^ s) > (me | (w - 1)) ? me : me ^ s; }, bits,
      width, site);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T v, unsigned by, int width = 32,
                   simt::Site site = simt::Site::here()) {
  return simt::shuffle(
      mask, v, [](int me, int s, int w) { return me + s > (me | (w - 1)) ? me : me + s; },
      static_cast<int>(by), width, site);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T v, unsigned by, int width = 32,
                 simt::Site site = simt::Site::here()) {
  return simt::shuffle(
      mask, v, [](int me, int s, int w) { return me - s < (me & ~(w - 1)) ? me : me - s; },
      static_cast<int>(by), width, site);
}
inline int __reduce_min_sync(uint32_t mask, int v, simt::Site site = simt::Site::here()) {
  for (int bits = 16; bits > 0; bits >>= 1) {
    const int other = __shfl_xor_sync(mask, v, bits, 32, site);
    v = other < v ? other : v;
  }
  return v;
}
inline int __reduce_max_sync(uint32_t mask, int v, simt::Site site = simt::Site::here()) {
  return -__reduce_min_sync(mask, -v, site);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = old + v;
  return old;
}
template <class T>
T atomicMax(T* p, T v) {
  const T old = *p;
  if (v > old) *p = v;
  return old;
}
template <class T>
T atomicMin(T* p, T v) {
  const T old = *p;
  if (v < old) *p = v;
  return old;
}
template <class T>
T atomicOr(T* p, T v) {
  const T old = *p;
  *p = old | v;
  return old;
}
template <class T>
T atomicCAS(T* p, T compare, T v) {
  const T old = *p;
  if (old == compare) *p = v;
  return old;
}
template <class T>
T atomicExch(T* p, T v) {
  const T old = *p;
  *p = v;
  return old;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __float_as_uint(float x) {
  unsigned u;
  memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

// ---- runtime ----------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81
};

namespace simt {
inline const char* g_error = nullptr;  // of the last launch
// Shared memory that a kernel may have: 48 KiB, more when it was asked for, at most what a 9.0
// grants or, of any other device, the least of the architectures (8.6, 8.9, 12.0).
inline std::map<const void*, size_t> g_shared;
inline size_t most_shared() { return (options.generation == 9 ? 227 : 99) * 1024; }
inline size_t shared_limit(const void* kernel) {
  const auto found = g_shared.find(kernel);
  return found == g_shared.end() ? 48 * 1024 : found->second;
}
}  // namespace simt
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorLaunchFailure && simt::g_error != nullptr ? simt::g_error
         : e == cudaSuccess                                      ? "no error"
                                                                 : "invalid argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* d) {
  *d = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
// Three multiprocessors: small grids already wrap around, and it divides nothing evenly.
inline cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  *v = a == cudaDevAttrMultiProcessorCount                ? 3
       : a == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? simt::options.multiprocessor_kib << 10
       : a == cudaDevAttrComputeCapabilityMajor           ? simt::options.generation
                                                          : 0;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  return cudaSuccess;
}
template <class F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > static_cast<int>(simt::most_shared())) return cudaErrorInvalidValue;
  simt::g_shared[reinterpret_cast<const void*>(kernel)] = simt::most_shared();
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), A... args) {
  auto call = [&] { kernel(static_cast<P>(args)...); };
  simt::g_error = simt::run(
      c->gridDim, c->blockDim, c->dynamicSmemBytes,
      simt::shared_limit(reinterpret_cast<const void*>(kernel)),
      [](const void* f) { (*static_cast<const decltype(call)*>(f))(); }, &call);
  return simt::g_error == nullptr ? cudaSuccess : cudaErrorLaunchFailure;
}
