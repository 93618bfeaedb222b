// Every normalization kernel of one ISA level on drawn cases (shapes, dtypes, memory orders,
// options), against plain double loops; and the same bits from one thread and from three.
#include "harness.h"

#include "math/normalization.h"

namespace {

using namespace genfast;
using namespace genfast::test;
using Shape = std::vector<int64_t>;

const cpu::Kernels& kernels() { return cpu::GENFAST_ISA::table(); }

Dtype any_float(Pick& pick) { return pick.of({Dtype::f32, Dtype::f32, Dtype::f16, Dtype::bf16}); }

double value_of(NormActivation act, double z) {
  double y = 0;
  with_activation(act, [&](auto a) { y = decltype(a)::value(static_cast<float>(z)); });
  return y;
}
double slope_of(NormActivation act, double z) {
  double y = 0;
  with_activation(act, [&](auto a) { y = decltype(a)::slope(static_cast<float>(z)); });
  return y;
}

// groups = 0: x as [outer][inner][channels] with a group a row; else [outer][channels][inner] or,
// channels_inner, [outer][inner][channels].
void norms(Pick& pick, int64_t outer, int64_t channels, int64_t inner, int64_t groups) {
  NormalizeParams p;
  p.planes = {outer, channels, inner, groups == 0 || pick.one_in(2)};
  p.groups = groups, p.rms = groups == 0 && pick.one_in(2);
  const bool last = p.planes.channels_inner;
  const Shape shape = last ? Shape{outer, inner, channels} : Shape{outer, channels, inner};
  const Dtype dtype = any_float(pick);
  Tensor x(shape, dtype), y(shape, dtype), grad(shape, dtype), dx(shape, dtype);
  Tensor w({channels}, any_float(pick)), b({channels}, any_float(pick));
  // Slices of a wider tensor: rows three elements apart.
  Tensor scale({outer, channels}, any_float(pick), Layout::padded);
  Tensor shift({outer, channels}, any_float(pick), Layout::padded);
  for (Tensor* t : {&x, &grad, &w, &b, &scale, &shift}) pick.fill(*t);
  const int64_t count = p.group_count();
  Tensor statistics({(p.rms ? 1 : 2) * count}, Dtype::f32);
  Tensor dw({channels}, Dtype::f32), db({channels}, Dtype::f32);
  Tensor d_scale({outer, channels}, Dtype::f32), d_shift({outer, channels}, Dtype::f32);
  const bool scaled = pick.one_in(2), shifted = pick.one_in(2), weighted = pick.one_in(2),
             biased = pick.one_in(2);
  p.x = x, p.y = y, p.statistics = statistics;
  if (weighted) p.w = w;
  if (biased) p.b = b;
  if (scaled) p.scale = scale;
  if (shifted) p.shift = shift;
  p.act = static_cast<NormActivation>(pick.below(4));
  p.eps = 0.1f;

  same_bits({&y, &statistics}, [&](int threads) {
    p.threads = threads;
    kernels().normalize(p);
  });
  CHECK(y.written() == y.numel && (x.numel == 0 || statistics.written() == statistics.numel));
  NormalizeBackwardParams q;
  q.forward = p, q.grad = grad, q.dx = dx;
  std::vector<Tensor*> outputs = {&dx};
  const auto wants = [&](bool wanted, TensorView& to, Tensor& t) {
    if (wanted) to = t, outputs.push_back(&t);
  };
  wants(weighted, q.dw, dw), wants(biased, q.db, db);
  wants(scaled, q.d_scale, d_scale), wants(shifted, q.d_shift, d_shift);
  same_bits(outputs, [&](int threads) {
    q.forward.threads = threads;
    kernels().normalize_backward(q);
  });
  for (Tensor* t : outputs) CHECK(t->written() == t->numel);

  const auto xs = values(x), ys = values(y), gs = values(grad), ds = values(dx);
  const auto ws = values(w), bs = values(b), scales = values(scale), shifts = values(shift);
  const int64_t G = groups == 0 ? 1 : groups, width = channels / G;
  std::vector<double> want_dw(channels), want_db(channels), want_scale(outer * channels),
      want_shift(outer * channels);
  const auto at = [&](int64_t o, int64_t c, int64_t i) {
    return last ? (o * inner + i) * channels + c : (o * channels + c) * inner + i;
  };
  // One group: channels [first, first + width) at places [begin, end) of sample o.
  const auto group = [&](int64_t o, int64_t first, int64_t begin, int64_t end, int64_t index) {
    const double n = static_cast<double>(width) * static_cast<double>(end - begin);
    if (n == 0) return;
    double mean = 0, variance = 0, of_dz = 0, of_dzh = 0;
    const auto each = [&](auto&& body) {
      for (int64_t c = first; c < first + width; ++c)
        for (int64_t i = begin; i < end; ++i) body(c, at(o, c, i));
    };
    if (!p.rms) each([&](int64_t, int64_t k) { mean += xs[k] / n; });
    each([&](int64_t, int64_t k) { variance += (xs[k] - mean) * (xs[k] - mean) / n; });
    const double rstd = 1 / std::sqrt(variance + p.eps);
    CHECK(close(statistics.as<float>()[(p.rms ? 0 : count) + index], rstd, Dtype::f32));
    const auto a_of = [&](int64_t c) {
      return (weighted ? ws[c] : 1.0) * (1.0 + (scaled ? scales[o * channels + c] : 0.0));
    };
    const auto z_of = [&](int64_t c, double h) {
      return h * a_of(c) +
             (biased ? bs[c] : 0.0) * (1.0 + (scaled ? scales[o * channels + c] : 0.0)) +
             (shifted ? shifts[o * channels + c] : 0.0);
    };
    each([&](int64_t c, int64_t k) {
      const double h = (xs[k] - mean) * rstd, z = z_of(c, h);
      CHECK(close(ys[k], value_of(p.act, z), dtype));
      const double dz = gs[k] * slope_of(p.act, z), s = scaled ? scales[o * channels + c] : 0.0;
      of_dz += a_of(c) * dz / n, of_dzh += a_of(c) * dz * h / n;
      want_dw[c] += (1 + s) * dz * h, want_db[c] += (1 + s) * dz;
      want_shift[o * channels + c] += dz;
      want_scale[o * channels + c] += dz * (h * (weighted ? ws[c] : 1.0) + (biased ? bs[c] : 0.0));
    });
    each([&](int64_t c, int64_t k) {
      const double h = (xs[k] - mean) * rstd, dz = gs[k] * slope_of(p.act, z_of(c, h));
      const double want = rstd * (a_of(c) * dz - (p.rms ? 0.0 : of_dz) - h * of_dzh);
      CHECK(close(ds[k], want, dtype, 2e-5));
    });
  };
  for (int64_t o = 0; o < outer; ++o)
    if (groups == 0)
      for (int64_t i = 0; i < inner; ++i) group(o, 0, i, i + 1, o * inner + i);
    else
      for (int64_t g = 0; g < G; ++g) group(o, g * width, 0, inner, o * G + g);
  const double terms = static_cast<double>(outer * inner);
  const auto sums = [&](bool wanted, const Tensor& got, const std::vector<double>& want) {
    for (size_t i = 0; wanted && i < want.size(); ++i)
      CHECK(std::fabs(got.as<float>()[i] - want[i]) <= 1e-5 * (10 + std::sqrt(terms) * 10));
  };
  sums(weighted, dw, want_dw), sums(biased, db, want_db);
  sums(scaled, d_scale, want_scale), sums(shifted, d_shift, want_shift);
}

}  // namespace

void genfast::test::run(bool quick) {
  // From 32768 elements on, several threads work; one sample of them is cut into parts.
  cases(quick ? 4 : 12, [](Pick& pick) {
    norms(pick, 3, 12, 2100, pick.of({3, 4, 12}));
    norms(pick, 1, 24, 6000, 6);
    norms(pick, 4, 130, 100, 0);
    norms(pick, 1, 33, 4200, 0);
  });
  if (!quick)
    cases(300, [](Pick& pick) {
      const int64_t inner[] = {0, 1, 1, 4, 16, 49, 784, 1030};
      const int64_t outer = pick.of({0, 1, 2, 3}), groups = pick.of({1, 2, 5});
      norms(pick, outer, groups * pick.of({1, 2, 3, 16}), inner[pick.below(8)], groups);
      norms(pick, outer, pick.of({1, 2, 15, 16, 31, 100, 4500}), pick.of({0, 1, 2, 7, 40}), 0);
    });
}
