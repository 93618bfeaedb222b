// The forward process on CUDA: two-term mixes (add_noise, velocity, scaling) and the training loss,
// which draws eps again instead of reading it. The loss sums in double, in an order of its own: its
// fp32 value is the CPU's but for the rare sum that lies on the edge of a rounding.
#include "cuda/diffusion/terms.cuh"

namespace genfast::cuda {
namespace {

struct Mix {
  Groups groups;
  Stage out, p, q;
  Noise noise;
  Values a, b;
  int64_t per_group;  // rows of the walk that share a coefficient
  float a_sign, b_sign;
  bool a_is_one_minus_b, draws, second;

  __device__ __forceinline__ void operator()(const Group& g) const {
    const int64_t group = per_group == 1 ? g.row : g.row / per_group;
    const double vb = b(group), va = a_is_one_minus_b ? 1.0 - vb : a(group);
    const float ca = static_cast<float>(va) * a_sign, cb = static_cast<float>(vb) * b_sign;
    Terms sum;
    float v[kGroup];
    if (ca != 0.0f) {
      load(p, g.index, g.low, g.high, v);
      sum.add(v, ca);
    }
    if (second && cb != 0.0f) {
      if (draws)
        noise_of<NormalMap>(noise, g, v);
      else
        load(q, g.index, g.low, g.high, v);
      sum.add(v, cb);
    }
    store(out, g.index, g.low, g.high, sum.v);
  }
};

struct Loss {
  Groups groups;
  Stage output, clean, z, d_output;
  Noise noise;
  Values alpha, sigma, weight;
  const float* grad;  // null: 1
  float* per_sample;  // null: the gradient alone
  double* losses;     // [samples, parts]: finish leaves a sample's loss in its first place
  int64_t parts;
  double gamma, k, total_scale;
  Prediction prediction;
  Weighting weighting;
  bool flow_alpha, draws, backward, grad_per_sample;

  using Sum = double;
  struct Prepared {
    float alpha, sigma, scale;  // scale: of the gradient
  };

  __device__ double weight_of(int64_t b) const {
    if (weighting == Weighting::given) return weight(b);
    const double s = sigma(b), a = flow_alpha ? 1.0 - s : alpha(b);
    return loss_weight(weighting, prediction, a, s, gamma, k);
  }
  __device__ Prepared prepare(int64_t b) const {
    const double s = sigma(b), g = grad == nullptr ? 1.0 : grad[grad_per_sample ? b : 0];
    float scale = 1.0f;
    if (backward)
      scale = static_cast<float>(2.0 * g * weight_of(b) * total_scale /
                                 static_cast<double>(groups.cols));
    return {static_cast<float>(flow_alpha ? 1.0 - s : alpha(b)), static_cast<float>(s), scale};
  }
  __device__ __forceinline__ double sum(const Group& g, int64_t, const Prepared& at) const {
    float o[kGroup], x[kGroup] = {}, e[kGroup] = {};
    load(output, g.index, g.low, g.high, o);
    if (prediction != Prediction::epsilon) load(clean, g.index, g.low, g.high, x);
    if (prediction != Prediction::sample) {
      if (draws)
        noise_of<NormalMap>(noise, g, e);
      else
        load(z, g.index, g.low, g.high, e);
    }
    double squares = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float d = o[i] - loss_target<float>(prediction, x[i], e[i], at.alpha, at.sigma);
      if (per_sample != nullptr && i >= g.low && i < g.high) squares += static_cast<double>(d) * d;
      o[i] = d * at.scale;
    }
    if (backward) store(d_output, g.index, g.low, g.high, o);
    return squares;
  }
  __device__ void finish(int64_t b, double squares) const {
    if (per_sample == nullptr) return;
    const double loss = squares / static_cast<double>(groups.cols) * weight_of(b);
    per_sample[b] = static_cast<float>(loss);
    if (losses != nullptr) losses[b * parts] = loss;
  }
};

__global__ void __launch_bounds__(kThreads, 3)
    loss_total(const double* losses, int64_t samples, int64_t parts, double scale, float* total) {
  double sum = 0;
  for (int64_t b = threadIdx.x; b < samples; b += kThreads) sum += losses[b * parts];
  sum = BlockTeam().reduce(sum, Add());
  if (threadIdx.x == 0) *total = static_cast<float>(sum * scale);
}

}  // namespace

const char* diffusion_mix(const MixParams& p) {
  const int64_t rows = larger(p.groups, noise_rows(p.noise, p.p));
  Mix m{};
  m.groups = Groups(p.p.numel, rows, p.draws ? p.noise : Noise());
  m.out = Stage(p.out), m.p = Stage(p.p), m.q = Stage(p.q), m.noise = p.noise;
  m.a = Values(p.a), m.b = Values(p.b), m.per_group = p.groups > 0 ? rows / p.groups : 1;
  m.a_sign = p.a_sign, m.b_sign = p.b_sign, m.a_is_one_minus_b = p.a_is_one_minus_b;
  m.draws = p.draws, m.second = p.draws || p.q.defined();
  return launch_groups(m, p.p);
}

const char* denoising_loss(const LossParams& p) {
  const int64_t batch = batch_of(p.output), cols = batch > 0 ? p.output.numel / batch : 0;
  const bool forward = p.per_sample.defined(), given = p.z.defined();
  Loss l{};
  l.groups = Groups(p.output.numel, batch, given ? Noise() : p.noise);
  l.output = Stage(p.output), l.clean = Stage(p.x0), l.z = Stage(p.z);
  l.d_output = Stage(p.d_output), l.noise = p.noise;
  l.alpha = Values(p.alpha), l.sigma = Values(p.sigma), l.weight = Values(p.weight);
  l.grad = static_cast<const float*>(p.grad.data);
  l.per_sample = static_cast<float*>(p.per_sample.data);
  l.losses = static_cast<double*>(p.scratch.data);
  l.parts = p.scratch.defined() && batch > 0 ? p.scratch.numel / batch : 1;
  l.gamma = p.gamma, l.k = p.k, l.total_scale = p.total_scale;
  l.prediction = p.prediction, l.weighting = p.weighting;
  l.flow_alpha = p.flow_alpha, l.draws = !given, l.backward = p.d_output.defined();
  l.grad_per_sample = p.grad.numel > 1;
  if (!forward) return launch_samples(l, {nullptr, batch, cols / 8192 + 1, 1}, p.output);
  const char* error = launch_sums(l, batch, p.scratch, p.output);
  if (error != nullptr || !p.total.defined()) return error;
  return launch(loss_total, dim3(1), dim3(kThreads), 0, p.output, l.losses, batch, l.parts,
                p.total_scale, static_cast<float*>(p.total.data));
}

}  // namespace genfast::cuda
