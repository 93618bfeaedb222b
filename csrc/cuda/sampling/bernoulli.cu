// The Bernoulli likelihood of logits on CUDA: one pass each way. Sums run in two stages of a fixed
// order, in double; what a term is made of need not be the CPU's bits (math/sampling.h).
#include "api/sampling.h"
#include "cuda/sums.cuh"
#include "math/sampling.h"

namespace genfast::cuda {
namespace {

struct Likelihood {
  Groups groups;
  Stage logits, x;
  float* nll;  // [samples]

  using Sum = double;
  using Prepared = Nothing;
  __device__ __forceinline__ Nothing prepare(int64_t) const { return {}; }
  __device__ __forceinline__ void finish(int64_t sample, double total) const {
    nll[sample] = static_cast<float>(total);
  }
  __device__ __forceinline__ double sum(const Group& g, int64_t, Nothing) const {
    float l[kGroup], t[kGroup], total = 0.0f;
    load(logits, g.index, g.low, g.high, l);
    load(x, g.index, g.low, g.high, t);
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (i >= g.low && i < g.high) total += genfast::bernoulli_nll<float>(l[i], t[i]);
    return total;
  }
};

struct Gradient {
  Groups groups;
  Stage logits, x, d_logits, d_x;
  const float* grad;  // [samples]
  bool of_logits, of_x;

  __device__ __forceinline__ void operator()(const Group& g) const {
    float l[kGroup], t[kGroup], out[kGroup];
    const float scale = grad[g.row];
    load(logits, g.index, g.low, g.high, l);
    if (of_logits) {
      load(x, g.index, g.low, g.high, t);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) out[i] = (logistic<float>(l[i]).s - t[i]) * scale;
      store(d_logits, g.index, g.low, g.high, out);
    }
    if (of_x) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) out[i] = -l[i] * scale;
      store(d_x, g.index, g.low, g.high, out);
    }
  }
};

}  // namespace

const char* bernoulli_nll(const BernoulliNllParams& p) {
  const int64_t batch = p.logits.shape[0];
  const Likelihood op{Groups(p.logits.numel, batch, Noise()), Stage(p.logits), Stage(p.x),
                      static_cast<float*>(p.nll.data)};
  return launch_sums(op, batch, p.scratch, p.logits);
}

const char* bernoulli_nll_backward(const BernoulliNllParams& p) {
  return launch_groups(
      Gradient{Groups(p.logits.numel, p.logits.shape[0], Noise()), Stage(p.logits), Stage(p.x),
               Stage(p.d_logits), Stage(p.d_x), static_cast<const float*>(p.grad.data),
               p.d_logits.defined(), p.d_x.defined()},
      p.logits);
}

}  // namespace genfast::cuda
