#include "cuda/attention/forward.cuh"

namespace genfast::cuda {
const char* mma_forward_f16(const AttentionParams& p) { return launch_mma_forward<F16>(p); }
}  // namespace genfast::cuda
