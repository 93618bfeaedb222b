// A linear layer and its gradients, at one ISA level on drawn shapes,
// against plain double loops; and the same bits from one thread and from three.
#include "harness.h"

namespace {

using namespace genfast;
using namespace genfast::test;

const cpu::Kernels& kernels() { return cpu::GENFAST_ISA::table(); }

void gradients(Pick& pick, int64_t M, int64_t K, int64_t N) {
  const auto layout = [&] { return pick.of({Layout::dense, Layout::padded}); };
  Tensor x({M, K}, Dtype::f32, layout()), grad({M, N}, Dtype::f32, layout());
  Tensor dweight({N, K}, Dtype::f32), dbias({N}, Dtype::f32);
  pick.fill(x), pick.fill(grad);
  const bool biased = pick.one_in(2);
  LinearWeightParams p;
  p.x = x, p.grad = grad, p.dweight = dweight;
  if (biased) p.dbias = dbias;
  std::vector<Tensor*> outputs = {&dweight};
  if (biased) outputs.push_back(&dbias);
  same_bits(outputs, [&](int threads) {
    p.threads = threads;
    kernels().linear_weight(p);
  });
  for (Tensor* t : outputs) CHECK(t->written() == t->numel);
  const auto xs = values(x), gs = values(grad);
  const auto near = [&](double got, double want) {
    return std::fabs(got - want) <= 1e-6 * (4 + 4 * std::sqrt(static_cast<double>(M)));
  };
  for (int64_t n = 0; n < N; ++n) {
    double sum = 0;
    for (int64_t m = 0; m < M; ++m) sum += gs[m * N + n];
    if (biased) CHECK(near(dbias.as<float>()[n], sum));
    for (int64_t k = 0; k < K; ++k) {
      double want = 0;
      for (int64_t m = 0; m < M; ++m) want += gs[m * N + n] * xs[m * K + k];
      CHECK(near(dweight.as<float>()[n * K + k], want));
    }
  }
}

void outputs(Pick& pick, int64_t M, int64_t K, int64_t N) {
  Tensor x({M, K}, Dtype::f32, pick.of({Layout::dense, Layout::padded}));
  const bool transposed = pick.one_in(2);
  Tensor weight(transposed ? std::vector<int64_t>{K, N} : std::vector<int64_t>{N, K}, Dtype::f32,
                pick.of({Layout::dense, Layout::padded}));
  Tensor bias({N}, Dtype::f32), y({M, N}, Dtype::f32);
  for (Tensor* t : {&x, &weight, &bias}) pick.fill(*t);
  const bool biased = pick.one_in(2);
  LinearParams p;
  p.x = x, p.weight = weight, p.y = y, p.relu = pick.one_in(2);
  if (transposed) {
    std::swap(p.weight.shape[0], p.weight.shape[1]);
    std::swap(p.weight.strides[0], p.weight.strides[1]);
  }
  if (biased) p.bias = bias;
  same_bits({&y}, [&](int threads) {
    p.threads = threads;
    kernels().linear(p);
  });
  CHECK(y.written() == y.numel);
  const auto xs = values(x), ws = values(weight);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double want = biased ? bias.as<float>()[n] : 0.0;
      for (int64_t k = 0; k < K; ++k)
        want += xs[m * K + k] * (transposed ? ws[k * N + n] : ws[n * K + k]);
      if (p.relu) want = std::max(want, 0.0);
      CHECK(std::fabs(y.as<float>()[m * N + n] - want) <=
            1e-6 * (4 + 4 * std::sqrt(static_cast<double>(K))));
    }
}

}  // namespace

void genfast::test::run(bool quick) {
  cases(3, [](Pick& pick) { gradients(pick, 530, 270, 200); });
  cases(3, [](Pick& pick) { outputs(pick, 7, 512, 203); });
  cases(3, [](Pick& pick) { outputs(pick, 75, 300, 203); });
  cases(3, [](Pick& pick) { outputs(pick, 300, 512, 203); });  // rows that are copied apart
  if (!quick)  // a weight that is packed in two pieces
    cases(2, [](Pick& pick) { outputs(pick, 262, 1100, 1000); });
  if (!quick)
    cases(100, [](Pick& pick) {
      outputs(pick, pick.of({257, 264, 301}), pick.of({1, 21, 48, 260, 512}),
              pick.of({1, 3, 18, 33, 50, 130}));
    });
  if (!quick)
    cases(400, [](Pick& pick) {
      outputs(pick, pick.of({0, 1, 2, 3, 4, 5, 9, 17, 40}), pick.of({0, 1, 16, 21, 48, 128, 260}),
              pick.of({0, 1, 3, 4, 18, 33, 50}));
    });
  if (!quick)
    cases(200, [](Pick& pick) {
      gradients(pick, pick.of({0, 1, 3, 70, 260}), pick.of({0, 1, 15, 32, 47}),
                pick.of({0, 1, 12, 13, 50}));
    });
}
