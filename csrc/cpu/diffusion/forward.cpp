// The forward process on the CPU: two-term mixes (add_noise, velocity, scaling) and the training
// loss, which draws eps again instead of reading it.
#include "cpu/diffusion/chunks.h"

namespace genfast::cpu::GENFAST_ISA {

void diffusion_mix(const MixParams& p) {
  const Stage out(p.out), from(p.p), other(p.q);
  advise(p.out);
  const int64_t rows = std::max(p.groups, noise_rows(p.noise, p.p));
  const int64_t cols = rows > 0 ? p.p.numel / rows : 0;
  const NoiseAt noise(p.noise, p.p);
  const bool second = p.draws || p.q.defined();
  const int threads = threads_for(p.p, p.draws, p.threads);
  for_chunks(rows, cols, threads, [&](int64_t, int64_t r, int64_t first, int n) {
    const int64_t at = r * cols + first, group = r * p.groups / rows;
    const double b = value_of(p.b, group);
    const double a = p.a_is_one_minus_b ? 1.0 - b : value_of(p.a, group);
    Chunk pb, qb, staged;
    NoiseChunk noise_buffer;
    const float ca = static_cast<float>(a) * p.a_sign, cb = static_cast<float>(b) * p.b_sign;
    Terms terms;
    if (ca != 0.0f) terms.add(from.load(at, n, pb), ca);
    if (second && cb != 0.0f)
      terms.add(p.draws ? noise.values<NormalMap>(at, n, noise_buffer) : other.load(at, n, qb), cb);
    float* to = out.target(at, n, staged);
    terms.sum(n, to);
    out.store(at, n, to);
  });
}

void denoising_loss(const LossParams& p) {
  const bool backward = p.d_output.defined(), forward = p.per_sample.defined();
  const Stage output(p.output), clean(p.x0), z(p.z), d_output(p.d_output);
  if (backward) advise(p.d_output);
  const int64_t batch = batch_of(p.output), noisy = noise_rows(p.noise, p.output);
  const int64_t rows = std::max(batch, noisy), cols = rows > 0 ? p.output.numel / rows : 0;
  const NoiseAt noise(p.noise, p.output);
  const bool needs_noise = p.prediction != Prediction::sample;
  const bool needs_x0 = p.prediction != Prediction::epsilon;
  const int64_t per_row = (cols + kChunk - 1) / kChunk;
  std::unique_ptr<double[]> partial;
  if (forward) partial.reset(new double[rows * per_row + 1]);

  const auto weight_of = [&](int64_t b) {
    if (p.weighting == Weighting::given) return value_of(p.weight, b);
    const double sigma = value_of(p.sigma, b);
    const double alpha = p.flow_alpha ? 1.0 - sigma : value_of(p.alpha, b);
    return loss_weight(p.weighting, p.prediction, alpha, sigma, p.gamma, p.k);
  };
  const float* grad = static_cast<const float*>(p.grad.data);
  const int threads = threads_for(p.output, needs_noise && !p.z.defined(), p.threads);

  for_chunks(rows, cols, threads, [&](int64_t c, int64_t b, int64_t first, int n) {
    const int64_t at = b * cols + first;
    Chunk ob, xb, zb, staged;
    NoiseChunk noise_buffer;
    const float* o = output.load(at, n, ob);
    const float* x = needs_x0 ? clean.load(at, n, xb) : o;
    const float* e = !needs_noise    ? o
                     : p.z.defined() ? z.load(at, n, zb)
                                     : noise.values<NormalMap>(at, n, noise_buffer);
    const double s = value_of(p.sigma, b);
    const f32v sigma = splat(static_cast<float>(s));
    const f32v alpha = splat(static_cast<float>(p.flow_alpha ? 1.0 - s : value_of(p.alpha, b)));
    const auto differences = [&](auto prediction, float scale, float* to) {
      for (int i = 0; i < n; i += W) {
        const f32v target =
            loss_target<f32v>(decltype(prediction)::value, load(x + i), load(e + i), alpha, sigma);
        store(to + i, (load(o + i) - target) * scale);
      }
    };
    const auto run = [&](float scale, float* to) {
      switch (p.prediction) {
        case Prediction::epsilon:
          return differences(std::integral_constant<Prediction, Prediction::epsilon>{}, scale, to);
        case Prediction::sample:
          return differences(std::integral_constant<Prediction, Prediction::sample>{}, scale, to);
        case Prediction::v:
          return differences(std::integral_constant<Prediction, Prediction::v>{}, scale, to);
        case Prediction::flow:
          return differences(std::integral_constant<Prediction, Prediction::flow>{}, scale, to);
      }
    };
    float* to = forward || !backward ? staged.data : d_output.target(at, n, staged);
    float scale = 1.0f;
    if (backward) {
      const double g = !p.grad.defined() ? 1.0 : p.grad.numel > 1 ? grad[b] : grad[0];
      scale =
          static_cast<float>(2.0 * g * weight_of(b) * p.total_scale / static_cast<double>(cols));
    }
    run(forward ? 1.0f : scale, to);
    if (forward) {
      for (int i = n; i < ((n + 7) & ~7); ++i) to[i] = 0.0f;
      f64x8 sum{};
      for (int i = 0; i < n; i += 8) {
        const f64x8 d = widen(to + i);
        sum += d * d;
      }
      partial[c] = total(sum);
      if (backward) {  // the same rounding as in a pass of its own
        float* home = d_output.target(at, n, staged);
        for (int i = 0; i < n; i += W) store(home + i, load(to + i) * scale);
        to = home;
      }
    }
    if (backward) d_output.store(at, n, to);
  });

  if (!forward) return;
  float* per_sample = static_cast<float*>(p.per_sample.data);
  double all = 0;
  for (int64_t b = 0; b < rows; ++b) {
    double sum = 0;
    for (int64_t c = b * per_row; c < (b + 1) * per_row; ++c) sum += partial[c];
    const double loss = sum / static_cast<double>(cols) * weight_of(b);
    per_sample[b] = static_cast<float>(loss);
    all += loss;
  }
  if (p.total.defined())
    *static_cast<float*>(p.total.data) = static_cast<float>(all * p.total_scale);
}

}  // namespace genfast::cpu::GENFAST_ISA
