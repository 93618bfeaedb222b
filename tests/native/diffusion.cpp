// Every diffusion kernel of one ISA level on drawn cases (shapes, dtypes, strides, options),
// against plain double loops; and the same bits from one thread and from three.
#include "harness.h"

#include <algorithm>
#include <functional>
#include <numeric>

#include "math/diffusion.h"

namespace {

using namespace genfast;
using namespace genfast::test;
using Shape = std::vector<int64_t>;

const cpu::Kernels& kernels() { return cpu::GENFAST_ISA::table(); }

Dtype any_float(Pick& pick) { return pick.of({Dtype::f32, Dtype::f32, Dtype::f16, Dtype::bf16}); }

// A tensor like the others of its case: usually of their dtype and dense, at times of its own.
struct Maker {
  Pick& pick;
  const Shape& shape;
  Dtype dtype = any_float(pick);

  Tensor operator()() const {
    const Layout layout =
        pick.one_in(2) ? Layout::dense
                       : pick.of({Layout::reversed, Layout::gaps, Layout::padded, Layout::swapped});
    Tensor t(shape, pick.one_in(4) ? any_float(pick) : dtype, layout);
    pick.fill(t);
    return t;
  }
};

// One number, or one per leading group of a prefix of the shape.
struct Groups {
  int64_t count = 1;
  Shape sizes;

  Groups(Pick& pick, const Shape& shape, int most) {
    const int n =
        static_cast<int>(pick.below(std::min<int>(most, static_cast<int>(shape.size())) + 1));
    sizes.assign(shape.begin(), shape.begin() + n);
    for (int64_t s : sizes) count *= s;
  }
  int64_t of(int64_t element, int64_t numel) const { return element / (numel / count); }
};

struct Seeds {
  Noise noise;
  Tensor seeds;

  Seeds(Pick& pick, const Shape& shape)
      : seeds({pick.one_in(2) || shape.empty() ? int64_t{1} : shape[0]}, Dtype::i64) {
    noise.seed = pick.below(~0u), noise.stream = uint64_t{1} << 40, noise.offset = pick.below(9);
    for (int64_t i = 0; i < seeds.elements; ++i) seeds.set(i, pick.below(1000));
    if (pick.one_in(2)) return;
    noise.seeds = seeds.as<int64_t>(), noise.n_seeds = seeds.numel;
  }
  // The same noise as a tensor: the contract says that where it is drawn does not matter.
  Tensor drawn(const Shape& shape) const {
    Tensor z(shape, Dtype::f32);
    RandomParams p;
    p.out = z, p.noise = noise, p.distribution = Distribution::normal;
    kernels().random(p);
    return z;
  }
};

// Same bits whatever the threads, every element written and none beside them.
template <class Params>
void run(void (*kernel)(const Params&), Params p, const std::vector<Tensor*>& outputs) {
  same_bits(outputs, [&](int threads) {
    p.threads = threads;
    kernel(p);
  });
  for (const Tensor* t : outputs) CHECK(t->written() == t->numel);
}

// ---- the step ---------------------------------------------------------------------------------

// Four rows of quarters; sources that are not there have the coefficient 0.
Tensor make_table(Pick& pick, const bool* there, bool noisy_first) {
  Tensor table({4, kRowColumns}, Dtype::f32);
  pick.fill(table);
  float* t = table.as<float>();
  for (int r = 0; r < 4; ++r, t += kRowColumns) {
    t[2] = pick.one_in(2) ? INFINITY : 1.0f;
    t[4] = -2.0f, t[5] = -0.5f;
    for (int o = 0; o < kOutputs; ++o)
      for (int s = 0; s < kSources; ++s) {
        float& c = t[kRowCoefficients + o * kSources + s];
        if (!there[s] || pick.one_in(3)) c = 0.0f;
      }
    if (noisy_first) t[kRowCoefficients + kZ] = 0.75f;
  }
  return table;
}

struct StepCase {
  Pick& pick;
  const Shape& shape;
  Maker make{pick, shape};
  Tensor x = make(), empty{{0}, Dtype::f32};
  int models, outputs = 1 + static_cast<int>(pick.below(kOutputs));
  bool learned, judge, blend, dynamic, weighted, batched_weights = pick.one_in(2);
  std::vector<Tensor> m, history, out;
  bool has_history[kHistory];
  int64_t batch = shape.empty() ? 1 : shape[0];
  Groups groups{pick, shape, 2};
  Tensor index{groups.sizes, Dtype::i64}, table{{0}, Dtype::f32}, weights{{0}, Dtype::f32};
  Tensor threshold{{pick.one_in(2) ? int64_t{1} : batch}, Dtype::f32};
  bool indexed = pick.one_in(2);
  int64_t row = pick.below(4);

  explicit StepCase(Pick& p, const Shape& s, bool backward) : pick(p), shape(s) {
    learned = !backward && shape.size() > 1 && pick.one_in(4);
    judge = !backward && !learned && pick.one_in(4);
    blend = !judge && pick.one_in(4);
    dynamic = pick.one_in(4);
    models = learned ? 1 : 1 + static_cast<int>(pick.below(kModels));
    weighted = models > 1 || pick.one_in(3);
    for (int i = 0; i < models; ++i) {
      Shape full = shape;
      if (learned) full[1] *= 2;  // the second half of the channels is the variance
      m.push_back(Maker{pick, full}());
    }
    if (learned) weighted = false;
    for (int h = 0; h < kHistory; ++h) {
      history.push_back(make());
      has_history[h] = pick.one_in(3);
    }
    for (int o = 0; o < kOutputs; ++o) out.push_back(make());
    for (int64_t i = 0; i < index.elements; ++i) index.set(i, pick.below(4));
    weights = Tensor({batched_weights ? batch * models : models}, Dtype::f32);
    pick.fill(weights);
    for (int64_t i = 0; i < threshold.elements; ++i) threshold.set(i, pick.of({1.0, 2.0}));
  }
  TensorView model(int i) const {
    TensorView v = m[i];
    if (!learned) return v;
    v.shape[1] = shape[1], v.numel /= 2;
    return v;
  }
  TensorView log_variance() const {
    TensorView v = model(0);
    if (v.numel > 0) v.data = m[0].as<char>() + shape[1] * v.strides[1] * cpu::dtype_bytes(v.dtype);
    return v;
  }
  template <class P>
  void common(P& p) const {
    p.x = x, p.table = table, p.row = row;
    if (indexed) p.index = index;
    for (int i = 0; i < models; ++i) p.models[i] = model(i);
    if (weighted) p.weights = weights;
    if (dynamic) p.threshold = threshold;
  }
  const float* coefficients(int64_t e) const {
    const int64_t r = indexed ? index.as<int64_t>()[groups.of(e, x.numel)] : row;
    return table.as<float>() + r * kRowColumns;
  }
  int64_t sample(int64_t e) const { return e / (x.numel / batch); }
  double weight(int64_t e, int j) const {
    return weighted ? weights.as<float>()[(batched_weights ? sample(e) * models : 0) + j] : 1.0;
  }
  double bound(int64_t e) const {
    return threshold.as<float>()[threshold.numel > 1 ? sample(e) : 0];
  }
};

double clamped(double v, double bound) { return std::min(std::max(v, -bound), bound); }

void steps(Pick& pick, const Shape& shape) {
  StepCase c(pick, shape, false);
  const Seeds seeds(pick, shape);
  const Tensor z = c.make(), drawn = seeds.drawn(shape), mask = c.make(), known = c.make();
  const Tensor known_z = c.make(), sample = c.make();
  const bool draws = pick.one_in(2), given = !draws && (c.judge || pick.one_in(2));
  const bool judges_given = c.judge && pick.one_in(2), known_given = pick.one_in(2) || !draws;
  bool there[kSources] = {true, true, true};
  for (int h = 0; h < kHistory; ++h) there[kH1 + h] = c.has_history[h];
  there[kZ] = draws || given;
  c.table = make_table(pick, there, c.judge);
  Tensor level({pick.one_in(2) ? int64_t{2} : 2 * c.batch}, Dtype::f32);
  Tensor log_prob({c.batch}, Dtype::f32);
  pick.fill(level);

  StepParams p;
  c.common(p);
  for (int h = 0; h < kHistory; ++h)
    if (c.has_history[h]) p.history[h] = c.history[h];
  for (int o = 0; o < c.outputs; ++o) p.out[o] = c.out[o];
  if (given) p.z = z;
  p.noise = seeds.noise, p.draws = draws;
  if (c.learned) {
    p.variance = pick.of({Variance::learned, Variance::learned_range});
    p.log_variance = c.log_variance();
  }
  if (c.blend) {
    p.mask = mask, p.known = known, p.level = level;
    if (known_given) p.known_z = known_z;
  }
  if (c.judge) p.log_prob = log_prob;
  if (judges_given) p.sample = sample;
  std::vector<Tensor*> outputs;
  for (int o = 0; o < c.outputs; ++o) outputs.push_back(&c.out[o]);
  run(kernels().diffusion_step, p, outputs);

  const auto xs = values(c.x), zs = values(given ? z : drawn), ws = values(mask);
  const auto ks = values(known), es = values(known_given ? known_z : drawn), ss = values(sample);
  std::vector<std::vector<double>> ms, hs, got;
  for (int i = 0; i < c.models; ++i) ms.push_back(values(c.model(i)));
  for (const Tensor& h : c.history) hs.push_back(values(h));
  for (const Tensor& o : c.out) got.push_back(values(o));
  const auto vs = c.learned ? values(c.log_variance()) : xs;
  std::vector<double> probability(c.batch);
  for (int64_t e = 0; e < c.x.numel; ++e) {
    const float* row = c.coefficients(e);
    double source[kSources] = {xs[e]};
    for (int j = 0; j < c.models; ++j) source[kM] += c.weight(e, j) * ms[j][e];
    double x0 = clamped(row[0] * xs[e] + row[1] * source[kM], row[2]);
    if (c.dynamic) x0 = clamped(x0, c.bound(e)) / c.bound(e);
    source[kX0] = x0;
    for (int h = 0; h < kHistory; ++h) source[kH1 + h] = hs[h][e];
    source[kZ] = zs[e];
    if (p.variance == Variance::learned) source[kZ] *= std::sqrt(std::max(vs[e], 0.0));
    if (p.variance == Variance::learned_range) {
      const double f = 0.5 * (vs[e] + 1);
      source[kZ] *= std::exp(0.5 * (f * row[5] + (1 - f) * row[4]));
    }
    for (int o = 0; o < c.outputs; ++o) {
      const float* k = row + kRowCoefficients + o * kSources;
      double sum = 0, mean = 0;
      for (int s = 0; s < kSources; ++s) {
        if (k[s] == 0.0f) continue;
        sum += k[s] * source[s];
        if (s != kZ) mean += k[s] * source[s];
      }
      if (o == 0 && c.judge) {
        if (judges_given) sum = ss[e];
        const double d = (got[0][e] - mean) / k[kZ];
        if (judges_given) CHECK(close(got[0][e], ss[e], c.out[0].dtype));
        const double value = judges_given ? (ss[e] - mean) / k[kZ] : d;
        probability[c.sample(e)] -=
            0.5 * value * value + std::log(std::fabs(k[kZ])) + 0.91893853320467274;
      }
      if (o == 0 && c.blend) {
        const float* at = level.as<float>() + (level.numel > 2 ? 2 * c.sample(e) : 0);
        sum = ws[e] * sum + (1 - ws[e]) * (at[0] * ks[e] + at[1] * es[e]);
      }
      CHECK(close(got[o][e], sum, c.out[o].dtype));
    }
  }
  for (int64_t b = 0; b < c.batch && c.judge; ++b)
    CHECK(close(log_prob.as<float>()[b], probability[b], Dtype::f32, 1e-4));

  // In place: the sample over x, a new history entry over the old one. Same bits.
  if (c.judge || !same_layout(c.out[0], c.x)) return;
  p.out[0] = c.x;
  const bool slot = c.outputs > 1 && c.has_history[0] && same_layout(c.out[1], c.history[0]);
  if (slot) p.out[1] = c.history[0];
  kernels().diffusion_step(p);
  CHECK(values(c.x) == got[0]);
  CHECK(!slot || values(c.history[0]) == got[1]);
}

void step_gradients(Pick& pick, const Shape& shape) {
  StepCase c(pick, shape, true);
  bool there[kSources];
  std::fill(there, there + kSources, true);
  c.table = make_table(pick, there, false);
  const Tensor mask = c.make();
  std::vector<Tensor> grads, d;  // d: x, models, history, z
  StepBackwardParams p;
  c.common(p);
  if (c.blend) p.mask = mask;
  std::vector<std::vector<double>> gs;
  for (int o = 0; o < kOutputs; ++o) {
    grads.push_back(c.make());
    const bool wanted = o == 0 || pick.one_in(2);
    if (wanted) p.grad[o] = grads[o];
    gs.push_back(wanted ? values(grads[o]) : std::vector<double>(c.x.numel));
  }
  const int count = 2 + kModels + kHistory;
  for (int i = 0; i < count; ++i) d.push_back(c.make());
  TensorView* to[count] = {&p.d_x};
  for (int j = 0; j < kModels; ++j) to[1 + j] = &p.d_models[j];
  for (int h = 0; h < kHistory; ++h) to[1 + kModels + h] = &p.d_history[h];
  to[count - 1] = &p.d_z;
  bool wanted[count];
  for (int i = 0; i < count; ++i) {
    wanted[i] = !pick.one_in(3) && !(i >= 1 + c.models && i <= kModels);
    if (wanted[i]) *to[i] = d[i];
  }
  std::vector<Tensor*> outputs;
  for (int i = 0; i < count; ++i)
    if (wanted[i]) outputs.push_back(&d[i]);
  run(kernels().diffusion_step_backward, p, outputs);
  std::vector<std::vector<double>> got;
  for (const Tensor& t : d) got.push_back(values(t));
  const auto xs = values(c.x), ws = values(mask);
  std::vector<std::vector<double>> ms;
  for (int i = 0; i < c.models; ++i) ms.push_back(values(c.model(i)));
  for (int64_t e = 0; e < c.x.numel; ++e) {
    const float* row = c.coefficients(e);
    double of[kSources] = {};
    for (int o = 0; o < kOutputs; ++o)
      for (int s = 0; s < kSources; ++s)
        of[s] +=
            row[kRowCoefficients + o * kSources + s] * gs[o][e] * (o == 0 && c.blend ? ws[e] : 1.0);
    double raw = row[0] * xs[e], bound = row[2], x0 = of[kX0];
    for (int j = 0; j < c.models; ++j) raw += row[1] * c.weight(e, j) * ms[j][e];
    if (c.dynamic) bound = std::min(bound, c.bound(e)), x0 /= c.bound(e);
    if (std::fabs(raw) > bound) x0 = 0;
    double want[count] = {of[kX] + row[0] * x0};
    for (int j = 0; j < c.models; ++j) want[1 + j] = c.weight(e, j) * (of[kM] + row[1] * x0);
    for (int h = 0; h < kHistory; ++h) want[1 + kModels + h] = of[kH1 + h];
    want[count - 1] = of[kZ];
    for (int i = 0; i < count; ++i) CHECK(!wanted[i] || close(got[i][e], want[i], d[i].dtype));
  }
}

// ---- the forward process ----------------------------------------------------------------------

// A coefficient: a number, or float32 or float64 per group. Keeps its memory.
struct Factor : Coefficient {
  Tensor memory{{0}, Dtype::f32};
  Factor(Pick& pick, int64_t groups, double low) {
    value = low + 0.25 * pick.below(4);
    if (pick.one_in(3)) return;
    wide = pick.one_in(2);
    memory = Tensor({groups}, wide ? Dtype::f64 : Dtype::f32);
    for (int64_t i = 0; i < groups; ++i) memory.set(i, low + 0.25 * pick.below(4));
    data = memory.data;
  }
  double of(int64_t group) const {
    if (memory.numel == 0) return value;
    return wide ? memory.as<double>()[group] : memory.as<float>()[group];
  }
};

void mixes(Pick& pick, const Shape& shape) {
  const Maker make{pick, shape};
  const Tensor from = make(), other = make();
  Tensor out = make();
  const Seeds seeds(pick, shape);
  const Tensor drawn = seeds.drawn(shape);
  const Groups groups(pick, shape, 2);
  const Factor a(pick, groups.count, -0.5), b(pick, groups.count, 0.25);
  MixParams p;
  p.out = out, p.p = from, p.noise = seeds.noise, p.a = a, p.b = b;
  p.draws = pick.one_in(2);
  const bool second = p.draws || pick.one_in(2);
  if (second && !p.draws) p.q = other;
  p.groups = a.data != nullptr || b.data != nullptr ? groups.count : 1;
  p.a_is_one_minus_b = pick.one_in(4), p.a_sign = pick.of({1.0f, -1.0f}), p.b_sign = -1.0f;
  run(kernels().diffusion_mix, p, {&out});
  const auto ps = values(from), qs = values(p.draws ? drawn : other), got = values(out);
  for (int64_t e = 0; e < out.numel; ++e) {
    const int64_t g = groups.of(e, out.numel);
    const double vb = b.of(g), va = p.a_is_one_minus_b ? 1 - vb : a.of(g);
    CHECK(close(got[e], p.a_sign * va * ps[e] - (second ? vb * qs[e] : 0.0), out.dtype));
  }
}

void losses(Pick& pick, const Shape& shape) {
  if (shape.empty() ||
      std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>()) == 0)
    return;  // the op refuses both
  const Maker make{pick, shape};
  const Tensor output = make(), x0 = make(), z = make();
  Tensor d_output = make();
  const Seeds seeds(pick, shape);
  const Tensor drawn = seeds.drawn(shape);
  const int64_t batch = shape[0], cols = output.numel / batch;
  const Factor alpha(pick, batch, 0.25), sigma(pick, batch, 0.25), weight(pick, batch, 0.25);
  Tensor per_sample({batch}, Dtype::f32), total({1}, Dtype::f32);
  Tensor grad({pick.one_in(2) ? int64_t{1} : batch}, Dtype::f32);
  pick.fill(grad);
  LossParams p;
  p.output = output, p.x0 = x0, p.noise = seeds.noise;
  const bool given = pick.one_in(2), scaled = pick.one_in(2);
  if (given) p.z = z;
  p.alpha = alpha, p.sigma = sigma, p.weight = weight, p.flow_alpha = pick.one_in(4);
  p.prediction = static_cast<Prediction>(pick.below(4));
  p.weighting = static_cast<Weighting>(pick.below(8));
  p.total_scale = 1.0 / static_cast<double>(batch);
  if (scaled) p.grad = grad;

  // Loss alone, gradient alone, both in one pass: the same bits.
  LossParams forward = p, backward = p;
  forward.per_sample = per_sample, forward.total = total;
  backward.d_output = d_output;
  run(kernels().denoising_loss, forward, {&per_sample, &total});
  const std::vector<double> losses = values(per_sample), sum = values(total);
  run(kernels().denoising_loss, backward, {&d_output});
  const std::vector<double> gradient = values(d_output);
  backward.per_sample = per_sample, backward.total = total;
  run(kernels().denoising_loss, backward, {&per_sample, &total, &d_output});
  CHECK(values(per_sample) == losses && values(total) == sum && values(d_output) == gradient);

  const auto os = values(output), xs = values(x0), es = values(given ? z : drawn);
  double all = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const double s = sigma.of(b), a = p.flow_alpha ? 1 - s : alpha.of(b);
    const double w = p.weighting == Weighting::given
                         ? weight.of(b)
                         : loss_weight(p.weighting, p.prediction, a, s, p.gamma, p.k);
    const double g = scaled ? grad.as<float>()[grad.numel > 1 ? b : 0] : 1.0;
    double squares = 0;
    for (int64_t e = b * cols; e < (b + 1) * cols; ++e) {
      const double target[] = {es[e], xs[e], a * es[e] - s * xs[e], es[e] - xs[e]};
      const double d = os[e] - target[static_cast<int>(p.prediction)];
      squares += d * d;
      CHECK(close(gradient[e], 2 * g * w * p.total_scale * d / static_cast<double>(cols),
                  d_output.dtype));
    }
    CHECK(close(losses[b], w * squares / static_cast<double>(cols), Dtype::f32));
    all += w * squares / static_cast<double>(cols);
  }
  CHECK(close(sum[0], all * p.total_scale, Dtype::f32));
}

// ---- reductions -------------------------------------------------------------------------------

void guidance(Pick& pick, const Shape& shape) {
  if (shape.empty()) return;
  const Maker make{pick, shape};
  const Tensor cond = make(), uncond = make(), average = make();
  const int64_t batch = shape[0], cols = batch > 0 ? cond.numel / batch : 0;
  Tensor scale({pick.one_in(2) ? int64_t{1} : batch}, Dtype::f32);
  for (int64_t i = 0; i < scale.elements; ++i) scale.set(i, 1.5 + i);
  GuidanceParams p;
  p.cond = cond, p.uncond = uncond, p.scale = scale, p.original = pick.one_in(2);
  p.method = static_cast<Guidance>(pick.below(6));
  p.option[0] = 0.25, p.option[1] = pick.of({0.0, 2.0});
  const bool averaged = p.method == Guidance::apg && pick.one_in(2);
  if (averaged) p.average = average;
  const int width = averaged ? 3 : 2;
  Tensor weights({batch, width}, Dtype::f32);
  p.weights = weights;
  run(kernels().guidance_weights, p, {&weights});
  const auto cs = values(cond), us = values(averaged ? average : uncond);
  for (int64_t b = 0; b < batch && cols > 0; ++b) {
    GuidanceSums s;
    for (int64_t e = b * cols; e < (b + 1) * cols; ++e) {
      s.c += cs[e], s.u += us[e];
      s.cc += cs[e] * cs[e], s.uu += us[e] * us[e], s.cu += cs[e] * us[e];
    }
    double w[3];
    genfast::guidance_weights(p.method, s, static_cast<double>(cols),
                              scale.as<float>()[scale.numel > 1 ? b : 0], p.original, p.option,
                              averaged, w);
    for (int j = 0; j < width; ++j) {
      const float got = weights.as<float>()[b * width + j];  // quarters: the sums are exact
      CHECK(std::isfinite(w[j]) ? close(got, w[j], Dtype::f32) : !std::isfinite(got));
    }
  }
}

void thresholds(Pick& pick, const Shape& shape) {
  const Maker make{pick, shape};
  Tensor x = make();
  const Tensor m = make();
  if (shape.empty() || x.numel == 0) return;  // the op refuses both
  const int64_t batch = shape[0], n = x.numel / batch;
  bool there[kSources] = {};
  const Tensor table = make_table(pick, there, false);
  const Groups groups(pick, shape, 1);
  Tensor index(groups.sizes, Dtype::i64), s({batch}, Dtype::f32);
  for (int64_t i = 0; i < index.elements; ++i) index.set(i, pick.below(4));
  if (pick.one_in(4)) x.set(0, pick.of({double{INFINITY}, -double{INFINITY}, double{NAN}}));
  ThresholdParams p;
  p.x = x, p.s = s, p.row = pick.below(4);
  const bool convert = pick.one_in(2), indexed = pick.one_in(2);
  if (convert) p.m = m, p.table = table;
  if (convert && indexed) p.index = index;
  p.ratio = pick.of({0.0, 0.37, 0.5, 0.995, 1.0}), p.max = pick.of({1.0, 1.25, 100.0});
  run(kernels().dynamic_threshold, p, {&s});
  const auto xs = values(x), ms = values(m);
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<double> v(n);
    const int64_t at = indexed ? index.as<int64_t>()[groups.count > 1 ? b : 0] : p.row;
    const float* row = table.as<float>() + at * kRowColumns;
    bool nan = false;
    for (int64_t i = 0; i < n; ++i) {
      const double e = xs[b * n + i];
      v[i] = std::fabs(convert ? e * row[0] + ms[b * n + i] * row[1] : e);
      nan |= std::isnan(v[i]);
    }
    const float got = s.as<float>()[b];
    CHECK(std::isnan(got) == nan);
    if (nan) continue;
    std::sort(v.begin(), v.end());
    const double rank = p.ratio * static_cast<double>(n - 1);
    const int64_t low = static_cast<int64_t>(rank);
    const double f = rank - static_cast<double>(low);
    const double q = f > 0 && v[low + 1] != v[low] ? v[low] + f * (v[low + 1] - v[low]) : v[low];
    CHECK(close(got, std::min(std::max(q, 1.0), p.max), Dtype::f32));
  }
}

}  // namespace

void genfast::test::run(bool quick) {
  const auto every = [](Pick& pick, const Shape& shape) {
    for (const auto& family : {steps, step_gradients, mixes, losses, guidance, thresholds})
      family(pick, shape);
  };
  const auto cases = [&](const Shape& shape, int count) {
    for (int i = 0; i < count; ++i) {
      Pick pick(++g_case);
      every(pick, shape);
    }
  };
  // From 65536 elements on, several threads work without noise; 40000 columns: two histograms.
  for (const Shape& shape : {Shape{3, 11, 2100}, Shape{2, 40000}}) cases(shape, quick ? 2 : 10);
  for (const Shape& shape : odd_shapes()) {
    const int64_t numel =
        std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    if (!quick) cases(shape, numel > 5000 ? 12 : 60);
  }
}
