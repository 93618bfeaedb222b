// limits: what this machine can do at most, for the benchmarks to be compared with.
#pragma once
#include "api/tensor.h"

namespace genfast {

struct LimitParams {
  TensorView data;     // any shape, contiguous: what `read` reads once
  int64_t rounds = 0;  // of `fma`
  int threads = 1;
};

}  // namespace genfast
