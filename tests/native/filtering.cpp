// Every filtering kernel of one ISA level on drawn cases (shapes, dtypes, memory orders, options),
// against plain double loops; and the same bits from one thread and from three.
#include "harness.h"

#include "math/filtering.h"

namespace {

using namespace genfast;
using namespace genfast::test;
using Shape = std::vector<int64_t>;

const cpu::Kernels& kernels() { return cpu::GENFAST_ISA::table(); }

Dtype any_float(Pick& pick) { return pick.of({Dtype::f32, Dtype::f32, Dtype::f16, Dtype::bf16}); }

double value_of(Activation act, double z, double alpha) {
  double y = 0;
  with_activation(act, [&](auto a) {
    y = decltype(a)::value(static_cast<float>(z), static_cast<float>(alpha));
  });
  return y;
}
double slope_of(Activation act, double z, double alpha) {
  double y = 0;
  with_activation(act, [&](auto a) {
    y = decltype(a)::slope(static_cast<float>(z), static_cast<float>(alpha));
  });
  return y;
}

// x as memory [outer][channels][inner] or, channels_inner, [outer][inner][channels].
void bias_acts(Pick& pick, int64_t outer, int64_t channels, int64_t inner) {
  BiasActParams p;
  p.planes = {outer, channels, inner, pick.one_in(2)};
  const Shape shape =
      p.planes.channels_inner ? Shape{outer, inner, channels} : Shape{outer, channels, inner};
  const Dtype dtype = any_float(pick);
  Tensor x(shape, dtype), y(shape, dtype), grad(shape, dtype), dz(shape, dtype);
  Tensor b({channels}, any_float(pick)), strength({1}, Dtype::f32), db({channels}, Dtype::f32);
  Tensor d_strength({1}, Dtype::f32);
  const bool shared = pick.one_in(2);
  Tensor noise(shared ? Shape{inner} : Shape{outer, inner}, any_float(pick));
  for (Tensor* t : {&x, &grad, &b, &strength, &noise}) pick.fill(*t);
  p.x = x, p.y = y;
  const bool biased = pick.one_in(2);
  if (biased) p.b = b;
  const int noisy = static_cast<int>(pick.below(3));  // none, given, drawn
  Tensor seeds({outer}, Dtype::i64), z({outer, inner}, Dtype::f32);
  for (int64_t i = 0; i < outer; ++i) seeds.set(i, pick.below(1000));
  p.drawn.seeds = seeds.as<int64_t>(), p.drawn.n_seeds = outer, p.drawn.stream = 7;
  p.drawn_rows = outer;
  if (noisy == 2) {
    RandomParams r;
    r.out = z, r.noise = p.drawn, r.distribution = Distribution::normal;
    kernels().random(r);
  }
  if (noisy) p.strength = strength;
  if (noisy == 1) p.noise = noise;
  p.draws = noisy == 2;
  p.act = static_cast<Activation>(pick.below(11));
  p.alpha = 0.25f, p.gain = pick.of({1.0f, 1.5f}), p.clamp = pick.of({-1.0f, 0.6f});

  same_bits({&y}, [&](int threads) {
    p.threads = threads;
    kernels().bias_act(p);
  });
  CHECK(y.written() == y.numel);
  BiasActBackwardParams q;
  q.forward = p, q.grad = grad, q.dz = dz, q.db = db;
  q.from_y = p.act <= Activation::lrelu && dtype == Dtype::f32 && pick.one_in(2);
  if (q.from_y) q.forward.x = y;
  if (noisy) q.d_strength = d_strength;
  std::vector<Tensor*> outputs = {&dz, &db};
  if (noisy) outputs.push_back(&d_strength);
  same_bits(outputs, [&](int threads) {
    q.forward.threads = threads;
    kernels().bias_act_backward(q);
  });
  CHECK(dz.written() == dz.numel);

  const auto xs = values(x), ys = values(y), gs = values(grad), ds = values(dz), bs = values(b);
  const auto ns = values(noisy == 2 ? z : noise);
  std::vector<double> sums(channels, 0.0), sizes(channels, 0.0);
  double total = 0, size = 0;
  const double s = strength.as<float>()[0];
  for (int64_t o = 0; o < outer; ++o)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < inner; ++i) {
        const int64_t at = p.planes.channels_inner ? (o * inner + i) * channels + c
                                                   : (o * channels + c) * inner + i;
        const double n = noisy ? ns[noisy == 1 && shared ? i : o * inner + i] : 0.0;
        const float v = static_cast<float>(static_cast<float>(xs[at]) +
                                           static_cast<float>(s) * static_cast<float>(n) +
                                           static_cast<float>(biased ? bs[c] : 0.0));
        double want = value_of(p.act, v, p.alpha) * p.gain;
        const bool inside = p.clamp < 0 || std::fabs(want) < p.clamp;
        if (p.clamp >= 0) want = std::fmin(std::fmax(want, -p.clamp), p.clamp);
        CHECK(close(ys[at], want, dtype));
        const double d = inside ? gs[at] * slope_of(p.act, v, p.alpha) * p.gain : 0.0;
        const bool edge = p.clamp >= 0 && std::fabs(std::fabs(want) - p.clamp) < 1e-5;
        if (!edge && std::fabs(v) > 1e-6) CHECK(close(ds[at], d, dtype));
        // sums are of what the kernel made, before its rounding
        const double kept = dtype == Dtype::f32 ? ds[at] : d;
        sums[c] += kept, sizes[c] += std::fabs(d), total += kept * n, size += std::fabs(d * n);
      }
  const double slack = dtype == Dtype::f32 ? 1e-5 : 3e-2;  // an edge may fall otherwise
  for (int64_t c = 0; c < channels; ++c)
    CHECK(std::fabs(db.as<float>()[c] - sums[c]) <= slack * (sizes[c] + 1.0));
  if (noisy) CHECK(std::fabs(d_strength.as<float>()[0] - total) <= slack * (size + 1.0));
}

// Rows of two halves: act(gate) up, and the gradients of both.
void gates(Pick& pick, int64_t rows, int64_t half) {
  GatedActParams p;
  const Dtype dtype = any_float(pick);
  Tensor x({rows, 2 * half}, dtype), y({rows, half}, dtype);
  Tensor grad({rows, half}, dtype), dx({rows, 2 * half}, dtype);
  for (Tensor* t : {&x, &grad}) pick.fill(*t);
  p.x = x, p.y = y, p.rows = rows, p.half = half;
  p.act = static_cast<Activation>(pick.below(11));
  same_bits({&y}, [&](int threads) {
    p.threads = threads;
    kernels().gated_act(p);
  });
  GatedActBackwardParams q;
  q.forward = p, q.grad = grad, q.dx = dx;
  same_bits({&dx}, [&](int threads) {
    q.forward.threads = threads;
    kernels().gated_act_backward(q);
  });
  CHECK(y.written() == y.numel && dx.written() == dx.numel);
  const auto xs = values(x), ys = values(y), gs = values(grad), ds = values(dx);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < half; ++i) {
      const int64_t at = 2 * r * half + i;
      const double gate = xs[at], up = xs[at + half], g = gs[r * half + i];
      const double value = value_of(p.act, gate, 0.0);
      CHECK(close(ys[r * half + i], value * up, dtype));
      CHECK(close(ds[at + half], g * value, dtype));
      if (std::fabs(gate) > 1e-6) CHECK(close(ds[at], g * up * slope_of(p.act, gate, 0.0), dtype));
    }
}

void filters(Pick& pick, int64_t N, int64_t C, int64_t H, int64_t W_) {
  UpfirdnParams p;
  p.channels_inner = pick.one_in(3) && C > 1;
  const Dtype dtype = any_float(pick);
  const int64_t fh = 1 + pick.below(6), fw = 1 + pick.below(6);
  const bool along_both = pick.one_in(3), rank_one = pick.one_in(2);
  Tensor f(along_both ? Shape{fh} : Shape{fh, fw}, Dtype::f32);
  pick.fill(f);
  const int64_t width = along_both ? fh : fw;
  if (!along_both && rank_one)
    for (int64_t i = 0; i < fh; ++i)
      for (int64_t j = 0; j < fw; ++j) f.set(i * fw + j, 0.25 * (1.0 + i % 3) * (1.0 + j % 2));
  int64_t after[2], out[2];
  const int64_t in[2] = {H, W_}, taps[2] = {fh, width};
  for (int a = 0; a < 2; ++a) {
    p.up[a] = 1 + pick.below(3), p.down[a] = 1 + pick.below(3);
    p.before[a] = static_cast<int64_t>(pick.below(9)) - 3;
    after[a] = static_cast<int64_t>(pick.below(9)) - 3;
    while (in[a] * p.up[a] + p.before[a] + after[a] < taps[a]) ++after[a];
    out[a] = (in[a] * p.up[a] + p.before[a] + after[a] - taps[a]) / p.down[a] + 1;
  }
  p.flip = pick.one_in(2), p.gain = pick.of({1.0, 4.0, -2.0});
  const bool last = p.channels_inner;
  Tensor x(last ? Shape{N, H, W_, C} : Shape{N, C, H, W_}, dtype);
  Tensor y(last ? Shape{N, out[0], out[1], C} : Shape{N, C, out[0], out[1]}, dtype);
  pick.fill(x);
  const auto logical = [&](const Tensor& t, int64_t h, int64_t w) {
    TensorView v = t;
    v.shape[1] = C, v.shape[2] = h, v.shape[3] = w;
    return v;
  };
  p.x = logical(x, H, W_), p.y = logical(y, out[0], out[1]), p.f = f;
  same_bits({&y}, [&](int threads) {
    p.threads = threads;
    kernels().upfirdn2d(p);
  });
  CHECK(y.written() == y.numel);

  const auto xs = values(x), ys = values(y), fs = values(f);
  const auto tap = [&](int64_t i, int64_t j) {
    if (!p.flip) i = fh - 1 - i, j = width - 1 - j;
    return along_both ? fs[i] * fs[j] : fs[i * fw + j];
  };
  for (int64_t n = 0; n < N; ++n)
    for (int64_t c = 0; c < C; ++c)
      for (int64_t oy = 0; oy < out[0]; ++oy)
        for (int64_t ox = 0; ox < out[1]; ++ox) {
          double want = 0;
          for (int64_t i = 0; i < fh; ++i)
            for (int64_t j = 0; j < width; ++j) {
              const int64_t u = oy * p.down[0] + i - p.before[0];
              const int64_t v = ox * p.down[1] + j - p.before[1];
              if (u < 0 || v < 0 || u % p.up[0] || v % p.up[1]) continue;
              const int64_t iy = u / p.up[0], ix = v / p.up[1];
              if (iy >= H || ix >= W_) continue;
              want +=
                  tap(i, j) *
                  xs[last ? ((n * H + iy) * W_ + ix) * C + c : ((n * C + c) * H + iy) * W_ + ix];
            }
          const double got = ys[last ? ((n * out[0] + oy) * out[1] + ox) * C + c
                                     : ((n * C + c) * out[0] + oy) * out[1] + ox];
          CHECK(close(got, want * p.gain, dtype, 1e-4));
        }
}

}  // namespace

void genfast::test::run(bool quick) {
  // From 65536 and 32768 elements on, several threads work.
  cases(quick ? 4 : 24, [](Pick& pick) {
    bias_acts(pick, 3, 11, 2100);
    gates(pick, 70, 1030);
    filters(pick, 2, 3, 80, 77);
  });
  if (!quick)
    cases(400, [](Pick& pick) {
      const int64_t sizes[] = {1, 2, 3, 7, 16, 33};
      const int64_t inner[] = {0, 1, 1, 4, 16, 49, 784, 1030};
      bias_acts(pick, sizes[pick.below(4)], sizes[pick.below(6)], inner[pick.below(8)]);
      bias_acts(pick, sizes[pick.below(6)], pick.of({1, 2, 700, 1500}), 1);
      gates(pick, sizes[pick.below(6)], inner[pick.below(8)]);
      filters(pick, 1 + pick.below(2), sizes[pick.below(6)], sizes[pick.below(6)],
              1 + pick.below(40));
    });
}
