#include "cuda/attention/hopper_backward.cuh"

namespace genfast::cuda {
const char* hopper_backward_f16(const AttentionGradParams& g) {
  return launch_hopper_backward<F16>(GradientPlan(g, true));
}
}  // namespace genfast::cuda
