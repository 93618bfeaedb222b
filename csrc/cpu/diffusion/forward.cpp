// The forward process on the CPU: two-term mixes (add_noise, velocity, scaling) and the training
// loss, which draws eps again instead of reading it.
#include "cpu/diffusion/chunks.h"
#include "cpu/scratch.h"

namespace genfast::cpu::GENFAST_ISA {

void diffusion_mix(const MixParams& given) {
  MixParams p = given;
  if (!p.draws && !is_contiguous(p.out) && (p.groups == 1 || p.groups == batch_of(p.p))) {
    MemoryOrder order(p.out);
    for (TensorView* t : {&p.out, &p.p, &p.q}) order.add(*t);
    order.apply();
  }
  const Stage out(p.out), from(p.p), other(p.q);
  advise(p.out);
  const int64_t rows = std::max(p.groups, noise_rows(p.noise, p.p));
  const int64_t cols = rows > 0 ? p.p.numel / rows : 0;
  const NoiseAt noise(p.noise, p.p);
  const bool second = p.draws || p.q.defined();
  const auto one = [&](int64_t r, int64_t first, int n) {
    const int64_t at = r * cols + first, group = r * p.groups / rows;
    Chunk pb, qb, staged;
    NoiseChunk drawn;
    const double b = value_of(p.b, group);
    const double a = p.a_is_one_minus_b ? 1.0 - b : value_of(p.a, group);
    const float ca = static_cast<float>(a) * p.a_sign, cb = static_cast<float>(b) * p.b_sign;
    Terms terms;
    if (ca != 0.0f) terms.add(from.load(at, n, pb), ca);
    if (second && cb != 0.0f)
      terms.add(p.draws ? noise.values<NormalMap>(at, n, drawn) : other.load(at, n, qb), cb);
    float* to = out.target(at, n, staged);
    terms.sum(n, to);
    out.store(at, n, to);
  };
  // Rows of a group each, or all of one, side by side.
  const bool same = p.groups == 1;
  const auto several = [&](int64_t r, int n, int height) {
    float a[kChunk], b[kChunk];
    const auto scaled = [](float sign) { return [=](double v) { return v * sign; }; };
    const auto rest = [sign = p.a_sign](double v) { return (1.0 - v) * sign; };
    if (p.a_is_one_minus_b)
      values_of(p.b, same, r, height, a, rest);
    else
      values_of(p.a, same, r, height, a, scaled(p.a_sign));
    int zeros = 0;
    for (int k = 0; k < height; ++k) zeros |= a[k] == 0.0f;
    if (second) {
      values_of(p.b, same, r, height, b, scaled(p.b_sign));
      for (int k = 0; k < height; ++k) zeros |= b[k] == 0.0f;
    }
    const int64_t at = r * cols;
    Chunk pb, qb, staged;
    NoiseChunk as, bs, drawn;
    spread(a, height, cols, as);
    const float *u = from.load(at, n, pb), *v = nullptr;
    float* to = zeros != 0 ? staged.data : out.target(at, n, staged);
    if (second) {
      spread(b, height, cols, bs);
      v = p.draws ? noise.values<NormalMap>(at, n, drawn) : other.load(at, n, qb);
      for (int i = 0; i < n; i += W)
        store(to + i, load(u + i) * load(as.data + i) + load(v + i) * load(bs.data + i));
    } else {
      for (int i = 0; i < n; i += W) store(to + i, load(u + i) * load(as.data + i));
    }
    if (zeros == 0) return out.store(at, n, to);
    for (int k = 0; k < height; ++k) {  // what 0 scales does not count, NaN included
      const bool with_u = a[k] != 0.0f, with_v = second && b[k] != 0.0f;
      if (with_u && (with_v || !second)) continue;
      for (int64_t i = k * cols; i < (k + 1) * cols; ++i)
        to[i] = with_u ? u[i] * a[k] : with_v ? v[i] * b[k] : 0.0f;
    }
    out.put(at, n, staged);
  };
  const int threads = threads_for(p.p, p.draws, p.threads);
  const int64_t most = same || p.groups == rows ? noise.height(cols) : 1;
  for_spans(rows, cols, most, threads, [&](int64_t r, int64_t first, int n, int height) {
    height == 1 ? one(r, first, n) : several(r, n, height);
  });
}

namespace {

template <class Fn>
void with_prediction(Prediction prediction, Fn&& fn) {
  switch (prediction) {
    case Prediction::epsilon:
      return fn(std::integral_constant<Prediction, Prediction::epsilon>{});
    case Prediction::sample:
      return fn(std::integral_constant<Prediction, Prediction::sample>{});
    case Prediction::v:
      return fn(std::integral_constant<Prediction, Prediction::v>{});
    case Prediction::flow:
      return fn(std::integral_constant<Prediction, Prediction::flow>{});
  }
}

}  // namespace

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
  // By row, and by chunk of rows that have several.
  const Held<double> of_rows(forward ? rows : 0), of_chunks(per_row != 1 ? rows * per_row : 0);
  double *losses = of_rows, *partial = of_chunks;

  const auto weight_of = [&](int64_t b) {
    if (p.weighting == Weighting::none) return 1.0;
    if (p.weighting == Weighting::given) return value_of(p.weight, b);
    const double sigma = value_of(p.sigma, b);
    const double alpha = p.flow_alpha ? 1.0 - sigma : value_of(p.alpha, b);
    return loss_weight(p.weighting, p.prediction, alpha, sigma, p.gamma, p.k);
  };
  const float* grad = static_cast<const float*>(p.grad.data);
  const int threads = threads_for(p.output, needs_noise && !p.z.defined(), p.threads);

  // Of `height` rows from b on, in vectors: each alone took 5 ns, and 100,000 rows of one number
  // 182 us for PyTorch's 103.
  const double count = static_cast<double>(cols);
  const auto weights_of = [&](int64_t b, int height, double* to) {
    if (p.weighting == Weighting::none) return void(std::fill_n(to, height, 1.0));
    for (int k = 0; k < height; ++k) to[k] = weight_of(b + k);
  };
  const auto scales_of = [&](int64_t b, int height, const double* weights, float* to) {
    const auto scale = [total = p.total_scale, count](double g, double weight) {
      return static_cast<float>(2.0 * g * weight * total / count);
    };
    if (p.grad.defined() && p.grad.numel > 1) {
      for (int k = 0; k < height; ++k) to[k] = scale(grad[b + k], weights[k]);
    } else {
      const double g = p.grad.defined() ? grad[0] : 1.0;
      for (int k = 0; k < height; ++k) to[k] = scale(g, weights[k]);
    }
  };
  float* per_sample = static_cast<float*>(p.per_sample.data);
  const auto conclude = [=](int64_t b, int height, const double* squares, const double* weights) {
    double* loss = losses + b;
    for (int k = 0; k < height; ++k) loss[k] = squares[k] / count * weights[k];
    for (int k = 0; k < height; ++k) per_sample[b + k] = static_cast<float>(loss[k]);
  };
  const auto alphas_of = [&](int64_t b, int n, float* to) {
    if (p.flow_alpha)
      values_of(p.sigma, false, b, n, to, [](double v) { return 1.0 - v; });
    else
      values_of(p.alpha, false, b, n, to, [](double v) { return v; });
  };
  const auto sigmas_of = [&](int64_t b, int n, float* to) {
    values_of(p.sigma, false, b, n, to, [](double v) { return v; });
  };

  const int64_t most = noise.height(cols);
  for_spans(rows, cols, most, threads, [&](int64_t b, int64_t first, int n, int height) {
    const int64_t at = b * cols + first;
    Chunk ob, xb, zb, home;
    NoiseChunk drawn, staged, alphas, sigmas, scales;
    const float* o = output.load(at, n, ob);
    const float* x = needs_x0 ? clean.load(at, n, xb) : o;
    const float* e = !needs_noise    ? o
                     : p.z.defined() ? z.load(at, n, zb)
                                     : noise.values<NormalMap>(at, n, drawn);
    float* to = forward || !backward ? staged.data : d_output.target(at, n, home);
    double weights[kChunk];
    weights_of(b, height, weights);
    const auto run = [&](auto alpha, auto sigma, auto scale) {
      const auto differences = [&](auto prediction, auto factor) {
        for (int i = 0; i < n; i += W) {
          const f32v target = loss_target<f32v>(decltype(prediction)::value, load(x + i),
                                                load(e + i), alpha(i), sigma(i));
          store(to + i, (load(o + i) - target) * factor(i));
        }
      };
      with_prediction(p.prediction, [&](auto prediction) {
        forward ? differences(prediction, Same(1.0f)) : differences(prediction, scale);
      });
      if (forward) {
        if (per_row > 1) {
          partial[b * per_row + first / kChunk] = square_sum(to, n);
        } else {
          double squares[kChunk];
          square_sums(to, height, static_cast<int>(cols), squares);
          conclude(b, height, squares, weights);
        }
        if (backward) {  // the same rounding as in a pass of its own
          float* gradient = d_output.target(at, n, home);
          for (int i = 0; i < n; i += W) store(gradient + i, load(to + i) * scale(i));
          to = gradient;
        }
      }
    };
    float alpha[kChunk], sigma[kChunk], scale[kChunk];
    alpha[0] = sigma[0] = scale[0] = 0.0f;
    const bool both = p.prediction == Prediction::v;  // the others read neither
    if (both) alphas_of(b, height, alpha), sigmas_of(b, height, sigma);
    if (backward) scales_of(b, height, weights, scale);
    if (height == 1) {
      run(Same(alpha[0]), Same(sigma[0]), Same(scale[0]));
    } else {
      if (both) spread(alpha, height, cols, alphas), spread(sigma, height, cols, sigmas);
      if (backward) spread(scale, height, cols, scales);
      run(Each{alphas.data}, Each{sigmas.data}, Each{scales.data});
    }
    if (backward) d_output.store(at, n, to);
  });

  if (!forward) return;
  for (int64_t b = 0; b < rows && per_row != 1; ++b) {
    double sum = 0;
    for (int64_t c = b * per_row; c < (b + 1) * per_row; ++c) sum += partial[c];
    const double weight = weight_of(b);
    conclude(b, 1, &sum, &weight);
  }
  if (p.total.defined())
    *static_cast<float*>(p.total.data) = static_cast<float>(total(losses, rows) * p.total_scale);
}

}  // namespace genfast::cpu::GENFAST_ISA
