#include "cuda/attention/backward.cuh"

namespace genfast::cuda {
const char* mma_backward_bf16(const AttentionGradParams& g, bool whole, bool options) {
  return launch_mma_backward<Bf16>(GradientPlan(g, whole), options);
}
}  // namespace genfast::cuda
