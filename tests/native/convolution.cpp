// Every convolution kernel of one ISA level on drawn cases (shapes, strides, options), against
// plain double loops; and the same bits from one thread and from three.
#include "harness.h"

namespace {

using namespace genfast;
using namespace genfast::test;

const cpu::Kernels& kernels() { return cpu::GENFAST_ISA::table(); }

// (B, channels, height, width) with the channels inside: exactly its bytes.
Tensor image(int64_t B, int64_t channels, int64_t height, int64_t width) {
  Tensor t({B, height, width, channels}, Dtype::f32);
  const int64_t shape[] = {B, channels, height, width};
  const int64_t strides[] = {height * width * channels, 1, width * channels, channels};
  for (int d = 0; d < 4; ++d) t.shape[d] = shape[d], t.strides[d] = strides[d];
  return t;
}

double at(const Tensor& t, int64_t b, int64_t c, int64_t i, int64_t j) {
  if (i < 0 || j < 0 || i >= t.shape[2] || j >= t.shape[3]) return 0.0;
  return t.as<float>()[b * t.strides[0] + c * t.strides[1] + i * t.strides[2] + j * t.strides[3]];
}

// fn(b, c, i, j) for every element.
template <class Fn>
void each(const Tensor& t, Fn&& fn) {
  for (int64_t b = 0; b < t.shape[0]; ++b)
    for (int64_t c = 0; c < t.shape[1]; ++c)
      for (int64_t i = 0; i < t.shape[2]; ++i)
        for (int64_t j = 0; j < t.shape[3]; ++j) fn(b, c, i, j);
}

// Sums of n products of numbers up to 1.5, to fp32.
bool near(double got, double want, double n) {
  return std::fabs(got - want) <= 2e-6 * (4 + 4 * std::sqrt(n)) + 1e-6 * std::fabs(want);
}

void convolutions(Pick& pick, int64_t B, int64_t I, int64_t O, int64_t height, int64_t width) {
  const bool narrow = std::min(I, O) <= 4;
  const bool enlarged = !narrow && pick.one_in(2);
  const int64_t times = enlarged ? 2 : 1;
  Tensor x = image(B, I, height, width), y = image(B, O, times * height, times * width);
  Tensor grad = image(B, O, times * height, times * width), dx = image(B, I, height, width);
  const Layout layout = pick.of({Layout::dense, Layout::reversed, Layout::gaps});
  Tensor w({O, I, 3, 3}, Dtype::f32, layout), dw({O, I, 3, 3}, Dtype::f32, layout);
  Tensor bias({O}, Dtype::f32), dbias({O}, Dtype::f32);
  const int64_t C = pick.of({1, 7, 16, 33});
  Tensor like_y = image(B, O, times * height, times * width);
  Tensor wide = image(B, C, times * height, times * width);
  Tensor projection({O, C}, Dtype::f32, pick.of({Layout::dense, Layout::reversed}));
  for (Tensor* t : {&x, &grad, &w, &bias, &like_y, &wide, &projection}) pick.fill(*t);
  const bool biased = pick.one_in(2), projected = !narrow && pick.one_in(3);
  const bool plus = !narrow && !projected && pick.one_in(2);

  ConvolutionParams p;
  p.x = x, p.y = y, p.weight = w, p.enlarged = enlarged;
  if (biased) p.bias = bias;
  if (plus) p.term = like_y;
  if (projected) p.term = wide, p.projection = projection;
  same_bits({&y}, [&](int threads) {
    p.threads = threads;
    kernels().convolution(p);
  });
  CHECK(y.written() == y.numel);
  const auto from = [&](int64_t i) { return enlarged ? (i < 0 ? -1 : i / 2) : i; };
  const auto tap = [&](int64_t o, int64_t c, int64_t r, int64_t s) {
    return static_cast<double>(
        w.as<float>()[o * w.strides[0] + c * w.strides[1] + r * w.strides[2] + s * w.strides[3]]);
  };
  each(y, [&](int64_t b, int64_t o, int64_t i, int64_t j) {
    double want = biased ? bias.as<float>()[o] : 0.0;
    if (plus) want += at(like_y, b, o, i, j);
    for (int64_t c = 0; projected && c < C; ++c)
      want += at(wide, b, c, i, j) *
              projection.as<float>()[o * projection.strides[0] + c * projection.strides[1]];
    for (int64_t c = 0; c < I; ++c)
      for (int64_t r = 0; r < 3; ++r)
        for (int64_t s = 0; s < 3; ++s)
          want += at(x, b, c, from(i - 1 + r), from(j - 1 + s)) * tap(o, c, r, s);
    CHECK(near(at(y, b, o, i, j), want, 9.0 * I));
  });
  if (plus) {  // into the term's own memory
    Tensor own = image(B, O, times * height, times * width);
    if (own.numel > 0) std::memcpy(own.data, like_y.data, own.bytes());
    p.y = own, p.term = own;
    kernels().convolution(p);
    CHECK(own.same_bytes(y));
  }

  ConvolutionParams q;
  q.x = grad, q.y = dx, q.weight = w, q.enlarged = enlarged, q.transposed = true;
  same_bits({&dx}, [&](int threads) {
    q.threads = threads;
    kernels().convolution(q);
  });
  CHECK(dx.written() == dx.numel);
  ConvolutionWeightParams g;
  g.x = x, g.grad = grad, g.dweight = dw, g.enlarged = enlarged;
  if (biased) g.dbias = dbias;
  std::vector<Tensor*> outputs = {&dw};
  if (biased) outputs.push_back(&dbias);
  same_bits(outputs, [&](int threads) {
    g.threads = threads;
    kernels().convolution_weight(g);
  });
  for (Tensor* t : outputs) CHECK(t->written() == t->numel);

  std::vector<double> want_dx(dx.numel), want_dw(O * I * 9), want_db(O);
  each(grad, [&](int64_t b, int64_t o, int64_t i, int64_t j) {
    const double value = at(grad, b, o, i, j);
    want_db[o] += value;
    for (int64_t c = 0; c < I; ++c)
      for (int64_t r = 0; r < 3; ++r)
        for (int64_t s = 0; s < 3; ++s) {
          const int64_t u = from(i - 1 + r), v = from(j - 1 + s);
          if (u < 0 || v < 0 || u >= height || v >= width) continue;
          want_dx[((b * I + c) * height + u) * width + v] += value * tap(o, c, r, s);
          want_dw[((o * I + c) * 3 + r) * 3 + s] += value * at(x, b, c, u, v);
        }
  });
  const double places = static_cast<double>(B * height * width * times * times);
  each(dx, [&](int64_t b, int64_t c, int64_t i, int64_t j) {
    CHECK(near(at(dx, b, c, i, j), want_dx[((b * I + c) * height + i) * width + j],
               9.0 * O * times * times));
  });
  each(dw, [&](int64_t o, int64_t c, int64_t r, int64_t s) {
    const float got = dw.as<float>()[o * dw.strides[0] + c * dw.strides[1] + r * dw.strides[2] +
                                     s * dw.strides[3]];
    CHECK(near(got, want_dw[((o * I + c) * 3 + r) * 3 + s], places));
  });
  for (int64_t o = 0; biased && o < O; ++o) CHECK(near(dbias.as<float>()[o], want_db[o], places));
}

}  // namespace

void genfast::test::run(bool quick) {
  // Several blocks of tiles, several slabs.
  cases(quick ? 3 : 4, [](Pick& pick) { convolutions(pick, 5, 16, 32, 13, 18); });
  cases(quick ? 2 : 4, [](Pick& pick) { convolutions(pick, 3, 3, 48, 37, 29); });
  cases(quick ? 2 : 4, [](Pick& pick) { convolutions(pick, 3, 32, 2, 37, 29); });
  if (!quick)
    cases(120, [](Pick& pick) {
      const int64_t few = pick.of({1, 2, 3, 4}), many = pick.of({16, 32, 48});
      const bool entering = pick.one_in(2);
      convolutions(pick, pick.of({0, 1, 2, 3}), entering ? few : many, entering ? many : few,
                   pick.of({0, 1, 2, 5, 9}), pick.of({1, 2, 3, 7, 17}));
    });
  if (!quick)
    cases(60, [](Pick& pick) {
      convolutions(pick, pick.of({0, 1, 2, 3}), pick.of({16, 32, 48}), pick.of({16, 32, 64}),
                   pick.of({0, 1, 2, 5, 8}), pick.of({1, 2, 3, 7}));
    });
}
