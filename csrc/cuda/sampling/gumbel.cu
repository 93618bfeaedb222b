// The Gumbel family on CUDA. A row belongs to a warp (up to 1024 columns) or to a block; its
// perturbed logits wait in shared memory where they fit, else they are drawn again.
#include "api/sampling.h"
#include "cuda/rows.cuh"

namespace genfast::cuda {
namespace {

// y = softmax((logits + g) / tau), or the one-hot argmax.
struct GumbelSoftmax {
  Perturbed x;
  Stage y;
  bool hard;

  template <class Team>
  __device__ __forceinline__ void operator()(const Team& team, int64_t row, float* cache) const {
    const float inv_tau = x.tau.inverse();
    const Best best = x.best(team, row, inv_tau, cache);
    if (hard) {
      const int64_t at = finite(best.value) ? best.index : -1;
      for_groups(team, x.groups, row, [&](const Group& g, int64_t) {
        float v[kGroup];
        const int64_t first = g.index - row * x.groups.cols;
#pragma unroll
        for (int i = 0; i < kGroup; ++i)
          v[i] = at < 0 ? not_a_number() : first + i == at ? 1.0f : 0.0f;
        store(y, g.index, g.low, g.high, v);
      });
      return;
    }
    const double total = x.total(team, row, inv_tau, best.value, cache);
    const float scale = static_cast<float>(1.0 / total);
    for_groups(team, x.groups, row, [&](const Group& g, int64_t slot) {
      float v[kGroup];
      x.exponentials(g, slot, inv_tau, best.value, cache, v);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) v[i] *= scale;
      store(y, g.index, g.low, g.high, v);
    });
  }
};

// d_logits = y (grad - <grad, y>) / tau.
struct GumbelSoftmaxBackward {
  Perturbed x;  // its logits are unused where y is given
  Stage grad, y, d_logits;
  bool have_y;

  template <class Team>
  __device__ __forceinline__ void operator()(const Team& team, int64_t row, float* cache) const {
    const float inv_tau = x.tau.inverse();
    float top = 0.0f, scale = 1.0f;
    if (!have_y) {
      top = x.best(team, row, inv_tau, cache).value;
      scale = static_cast<float>(1.0 / x.total(team, row, inv_tau, top, cache));
    }
    const auto soft = [&](const Group& g, int64_t slot, float (&v)[kGroup]) {
      if (have_y) return load(y, g.index, g.low, g.high, v);
      x.exponentials(g, slot, inv_tau, top, cache, v);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) v[i] *= scale;
    };
    double dot = 0;
    for_groups(team, x.groups, row, [&](const Group& g, int64_t slot) {
      float v[kGroup], d[kGroup], sum = 0.0f;
      soft(g, slot, v);
      load(grad, g.index, g.low, g.high, d);
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        if (i >= g.low && i < g.high) sum += d[i] * v[i];
      dot += sum;
    });
    const float mean = static_cast<float>(team.reduce(dot, Add()));
    for_groups(team, x.groups, row, [&](const Group& g, int64_t slot) {
      float v[kGroup], d[kGroup];
      soft(g, slot, v);
      load(grad, g.index, g.low, g.high, d);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) v[i] = (v[i] * (d[i] - mean)) * inv_tau;
      store(d_logits, g.index, g.low, g.high, v);
    });
  }
};

// sigmoid((logits + logistic) / tau), its one-bit form, or its gradient.
struct RelaxedBernoulli {
  Groups groups;
  Stage logits, y, grad;
  Tau tau;
  Noise noise;
  bool hard, backward;

  __device__ __forceinline__ void operator()(const Group& g) const {
    const float inv_tau = tau.inverse();
    float l[kGroup], e[kGroup], d[kGroup];
    load(logits, g.index, g.low, g.high, l);
    noise_of<LogisticMap>(noise, g, e);
    if (backward) load(grad, g.index, g.low, g.high, d);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float x = (l[i] + e[i]) * inv_tau;
      float v = sigmoid_of<float>(x);
      if (backward)
        v = (d[i] * (v * sigmoid_of<float>(-x))) * inv_tau;
      else if (hard)
        v = x > 0.0f ? 1.0f : x == x ? 0.0f : x;
      l[i] = v;
    }
    store(y, g.index, g.low, g.high, l);
  }
};

// index = argmax(logits + g).
struct Categorical {
  Perturbed x;
  int64_t* index;

  template <class Team>
  __device__ __forceinline__ void operator()(const Team& team, int64_t row, float*) const {
    const Best best = x.best(team, row, 1.0f, nullptr);
    if (team.rank() == 0) index[row] = finite(best.value) ? best.index : -1;
  }
};

}  // namespace

const char* gumbel_softmax(const GumbelSoftmaxParams& p) {
  const GumbelSoftmax op{Perturbed(p.logits, p.noise, p.tau), Stage(p.y), p.hard};
  return launch_rows(op, op.x.groups, !p.hard, p.logits);
}

const char* gumbel_softmax_backward(const GumbelSoftmaxBackwardParams& p) {
  const bool have_y = p.y.defined();
  const GumbelSoftmaxBackward op{Perturbed(have_y ? p.y : p.logits, p.noise, p.tau), Stage(p.grad),
                                 Stage(p.y), Stage(p.d_logits), have_y};
  return launch_rows(op, op.x.groups, !have_y, p.grad);
}

const char* relaxed_bernoulli(const RelaxedBernoulliParams& p) {
  const Groups groups(p.logits.numel, noise_rows(p.noise, p.logits), p.noise);
  return launch_groups(RelaxedBernoulli{groups, Stage(p.logits), Stage(p.y), Stage(p.grad),
                                        Tau(p.tau), p.noise, p.hard, p.backward},
                       p.logits);
}

const char* categorical_plain(const CategoricalParams& p) {
  const Categorical op{Perturbed(p.logits, p.noise, TensorView()),
                       static_cast<int64_t*>(p.index.data)};
  return launch_rows(op, op.x.groups, false, p.logits);
}

}  // namespace genfast::cuda
