// The one way to start a kernel: grid, block, shared memory, stream and the error text. Nothing
// here needs nvcc's <<<>>>, so tests/simt can compile the same files as C++ and run them.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <mutex>

#include "api/tensor.h"

// Shared memory by name: a fixed array type, or what the launch asked for.
#if !defined(GENFAST_SHARED)
#define GENFAST_SHARED(type, name) \
  using name##_type = type;        \
  __shared__ name##_type name
#define GENFAST_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

namespace genfast::cuda {

// Selects the tensor's device for the scope of a launch.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cudaGetDevice(&previous_);
    changed_ = device != previous_ && cudaSetDevice(device) == cudaSuccess;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// A text for Python; static or per thread.
inline const char* error_text(cudaError_t error, int device) {
  if (error == cudaSuccess) return nullptr;
  if (error != cudaErrorNoKernelImageForDevice) return cudaGetErrorString(error);
  static thread_local char text[256];
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  std::snprintf(
      text, sizeof text,
      "genfast was built without code for this GPU (sm_%d%d); rebuild with the "
      "GENFAST_CUDA_ARCHS that `genfast info` names, or use genfast.set_backend(\"auto\"), "
      "which takes the Triton kernels or PyTorch here",
      major, minor);
  return text;
}

inline int shared_of_multiprocessor(int device) {  // bytes
  int n = 0;
  cudaDeviceGetAttribute(&n, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  return n;
}

inline int generation(int device) {  // 9 of sm_90
  int n = 0;
  cudaDeviceGetAttribute(&n, cudaDevAttrComputeCapabilityMajor, device);
  return n;
}

inline std::mutex& shared_sizes() {
  static std::mutex mutex;
  return mutex;
}

// Returns null or an error text. `on` gives device and stream; no synchronisation.
template <class... P, class... A>
const char* launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, const TensorView& on,
                   A... args) {
  DeviceGuard guard(on.device);
  cudaError_t error = cudaSuccess;
  // More than 48 KiB with the kernel's static arrays (at most 24 KiB) needs a word per kernel and
  // device; it is cheap. The word is the kernel's, not the launch's: until it is launched no other
  // thread says another size.
  std::unique_lock<std::mutex> alone;
  if (shared > 24 * 1024) {
    alone = std::unique_lock<std::mutex>(shared_sizes());
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared));
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(on.stream);
    error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
  }
  if (error != cudaSuccess) cudaGetLastError();  // ours is reported: leave none behind for torch
  return error_text(error, on.device);
}

inline const char* clear_memory(void* data, size_t bytes, const TensorView& on) {
  DeviceGuard guard(on.device);
  const cudaError_t error = cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(on.stream));
  if (error != cudaSuccess) cudaGetLastError();
  return error_text(error, on.device);
}

// Blocks that cover n threads; the grid's x is good for 2^31 - 1 blocks.
inline dim3 blocks_for(int64_t n, int threads) {
  const int64_t blocks = (n + threads - 1) / threads;
  return dim3(static_cast<unsigned>(blocks < 0x7FFFFFFF ? blocks : 0x7FFFFFFF));
}

}  // namespace genfast::cuda
