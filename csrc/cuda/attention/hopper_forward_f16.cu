#include "cuda/attention/hopper_forward.cuh"

namespace genfast::cuda {
const char* hopper_forward_f16(const AttentionParams& p) { return launch_hopper_forward<F16>(p); }
}  // namespace genfast::cuda
