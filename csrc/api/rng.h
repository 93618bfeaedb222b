// rng: values of the noise contract written into a tensor.
#pragma once
#include "api/tensor.h"

namespace genfast {

// Where noise comes from. Element e of a sample is word (offset + e) % 4 of Philox block
// (offset + e) / 4 under key `seed` and counter high half `stream`.
struct Noise {
  uint64_t seed = 0;
  const int64_t* seeds = nullptr;  // [n_seeds] on the kernel's device; replaces `seed` when given
  int64_t n_seeds = 0;             // 1: one seed for the tensor; B: row b of dim 0 uses seeds[b],
                                   // and e counts within the row
  uint64_t stream = 0;
  int64_t offset = 0;  // >= 0
};

enum class Distribution : uint8_t { uniform, normal, exponential, gumbel, logistic, integer, bits };

struct RandomParams {
  TensorView out;  // any shape and strides; f32/f16/bf16/f64; i64/i32 for integer; i32 for bits
  Noise noise;
  Distribution distribution = Distribution::normal;
  int64_t low = 0;     // integer: low + floor(word * range / 2^32)
  uint64_t range = 0;  // 1 … 2^32
  int threads = 1;
};

namespace cuda {
const char* random(const RandomParams& p);  // returns an error text, or null
}

}  // namespace genfast
