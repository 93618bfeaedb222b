#include "cuda/attention/forward.cuh"

namespace genfast::cuda {
const char* mma_forward_bf16(const AttentionParams& p, bool options) {
  return launch_mma_forward<Bf16>(p, options);
}
}  // namespace genfast::cuda
