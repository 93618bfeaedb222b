#include "cuda/attention/exact_decode.cuh"

namespace genfast::cuda {
const char* mma_decode_any(const AttentionParams& p) {
  return p.dtype == Dtype::f16 ? launch_mma_decode<F16>(p) : launch_mma_decode<Bf16>(p);
}
const char* exact_decode_any(const AttentionParams& p) { return launch_exact_decode(p); }
}  // namespace genfast::cuda
