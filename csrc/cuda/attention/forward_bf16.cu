#include "cuda/attention/forward.cuh"

namespace genfast::cuda {
const char* mma_forward_bf16(const AttentionParams& p) { return launch_mma_forward<Bf16>(p); }
}  // namespace genfast::cuda
