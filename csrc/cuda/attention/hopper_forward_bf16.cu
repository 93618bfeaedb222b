#include "cuda/attention/hopper_forward.cuh"

namespace genfast::cuda {
const char* hopper_forward_bf16(const AttentionParams& p) { return launch_hopper_forward<Bf16>(p); }
}  // namespace genfast::cuda
