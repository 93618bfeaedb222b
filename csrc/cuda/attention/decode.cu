#include "cuda/attention/decode.cuh"

namespace genfast::cuda {
const char* mma_decode_any(const AttentionParams& p) {
  return p.dtype == Dtype::f16 ? launch_mma_decode<F16>(p) : launch_mma_decode<Bf16>(p);
}
}  // namespace genfast::cuda
