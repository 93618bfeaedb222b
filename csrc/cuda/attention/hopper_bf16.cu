#include "cuda/attention/hopper_backward.cuh"
#include "cuda/attention/hopper_forward.cuh"

namespace genfast::cuda {
const char* hopper_forward_bf16(const AttentionParams& p) { return launch_hopper_forward<Bf16>(p); }
const char* hopper_backward_bf16(const AttentionGradParams& g) {
  return launch_hopper_backward<Bf16>(GradientPlan(g, true));
}
}  // namespace genfast::cuda
