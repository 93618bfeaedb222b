// The one way to start a kernel: grid, block, shared memory, stream and the error text.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "api/tensor.h"

namespace genfast::cuda {

// Selects the tensor's device for the scope of a launch.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cudaGetDevice(&previous_);
    if (device != previous_) cudaSetDevice(device);
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
};

template <class... Args>
const char* launch(void (*kernel)(Args...), dim3 grid, dim3 block, size_t shared,
                   const TensorView& on, Args... args) {
  DeviceGuard guard(on.device);
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(on.stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace genfast::cuda
