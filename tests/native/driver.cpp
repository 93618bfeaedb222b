// Every rng and sampling kernel of one ISA level, over odd shapes, dtypes, strides, seeds, threads.
#include "harness.h"

#include "math/rng.h"

namespace {

using namespace genfast;
using genfast::test::close;
using genfast::test::kFloats;
using genfast::test::kLayouts;
using genfast::test::Layout;
using genfast::test::same_bits;
using genfast::test::Tensor;
using genfast::test::values;

const cpu::Kernels& kernels() { return cpu::GENFAST_ISA::table(); }

// Random123's kat_vectors for philox4x32 with 10 rounds: the lane code itself, all three.
void known_answers() {
  const uint32_t cases[3][10] = {
      {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
      {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
      {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09,
       0x94fdcceb, 0x5001e420, 0x24126ea1}};
  for (const auto& c : cases) {
    const auto v =
        philox4x32_10<u32v>(splat(c[0]), splat(c[1]), splat(c[2]), splat(c[3]), c[4], c[5]);
    const auto s = philox4x32_10<uint32_t>(c[0], c[1], c[2], c[3], c[4], c[5]);
    const uint32_t scalar[] = {s.w0, s.w1, s.w2, s.w3};
    const u32v vector[] = {v.w0, v.w1, v.w2, v.w3};
    for (int i = 0; i < 4; ++i) {
      CHECK(scalar[i] == c[6 + i]);
      for (int j = 0; j < W; ++j) CHECK(vector[i][j] == c[6 + i]);
    }
  }
}

// Vector and scalar lanes give the same bits, at the extreme words too.
void lanes_agree() {
  uint32_t word = 12345;
  for (int turn = 0; turn < 20000; ++turn) {
    u32v a, b;
    for (int j = 0; j < W; ++j) {
      const uint32_t edge[] = {0, ~0u, 0xFFFFFF80u, 0xFFFFFF7Fu, 0x20000000u, 0x1FFFFFFFu};
      word = word * 1664525u + 1013904223u;
      a[j] = turn < 6 ? edge[turn] : word;
      word = word * 1664525u + 1013904223u;
      b[j] = turn < 36 ? edge[turn / 6] : word;
    }
    f32v v0, v1;
    box_muller<f32v>(a, b, v0, v1);
    const f32v g = gumbel_noise<f32v>(a), l = logistic_noise<f32v>(a),
               e = exponential_noise<f32v>(a);
    for (int j = 0; j < W; ++j) {
      float s0, s1;
      box_muller<float>(a[j], b[j], s0, s1);
      CHECK(bits(s0) == bits(v0[j]) && bits(s1) == bits(v1[j]) && std::isfinite(s0));
      CHECK(bits(gumbel_noise<float>(a[j])) == bits(g[j]));
      CHECK(bits(logistic_noise<float>(a[j])) == bits(l[j]));
      CHECK(bits(exponential_noise<float>(a[j])) == bits(e[j]));
    }
  }
}

// Half precision: all 65536 values come back, and rounding is to nearest even (against the
// compiler's own conversion), through the dense road (hardware at v3) and the strided one.
void conversions() {
  for (Dtype dtype : {Dtype::f16, Dtype::bf16}) {
    std::vector<uint16_t> in(65536), dense(65536), strided(65536);
    std::vector<float> wide(65536), wide_strided(65536);
    for (int i = 0; i < 65536; ++i) in[i] = static_cast<uint16_t>(i);
    const char* from = reinterpret_cast<const char*>(in.data());
    cpu::to_f32(from, dtype, 65536, wide.data());
    cpu::gather_f32(from, dtype, 1, 65536, wide_strided.data());
    cpu::from_f32(wide.data(), 65536, reinterpret_cast<char*>(dense.data()), dtype);
    cpu::scatter_f32(wide.data(), 65536, reinterpret_cast<char*>(strided.data()), dtype, 1);
    for (int i = 0; i < 65536; ++i) {
      if (std::isnan(wide[i])) {
        CHECK(std::isnan(wide_strided[i]));
        continue;
      }
      CHECK(bits(wide[i]) == bits(wide_strided[i]) && dense[i] == in[i] && strided[i] == in[i]);
    }
  }
// (GCC 12 has the macro on Arm and the type not.)
#if defined(__FLT16_MANT_DIG__) && !(defined(__aarch64__) && __GNUC__ < 13)
  uint32_t u = 0;
  for (int i = 0; i < 2000000; ++i) {
    u = u * 1664525u + 1013904223u;
    float x =
        from_bits(i % 2 ? u : (u & 0x8FFFFFFFu) | 0x30000000u);  // half of them near 1e-9 … 1e9
    if (x != x) continue;
    const _Float16 h = static_cast<_Float16>(x);
    uint16_t exact, dense, strided;
    std::memcpy(&exact, &h, 2);
    cpu::from_f32(&x, 1, reinterpret_cast<char*>(&dense), Dtype::f16);
    cpu::scatter_f32(&x, 1, reinterpret_cast<char*>(&strided), Dtype::f16, 1);
    CHECK(dense == exact && strided == exact);
  }
#endif
}

std::vector<std::pair<Noise, Tensor>> noises(const std::vector<int64_t>& shape) {
  std::vector<std::pair<Noise, Tensor>> all;
  Noise plain;
  plain.seed = ~uint64_t{0};
  plain.stream = uint64_t{1} << 63;
  plain.offset = (int64_t{1} << 34) - 3;
  all.emplace_back(plain, Tensor({0}, Dtype::i64));
  for (int64_t n : {int64_t{1}, shape.empty() ? int64_t{1} : shape[0]}) {
    Noise with = plain;
    with.offset = (int64_t{1} << 62) - 3;
    Tensor seeds({n}, Dtype::i64);
    with.seeds = seeds.as<int64_t>();
    with.n_seeds = n;
    all.emplace_back(with, std::move(seeds));
  }
  return all;
}

void random_kernels(const std::vector<int64_t>& shape) {
  for (auto& [noise, keep] : noises(shape))
    for (int d = 0; d <= static_cast<int>(Distribution::bits); ++d)
      for (Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::f64, Dtype::i64, Dtype::i32})
        for (Layout layout : kLayouts) {
          const bool integers = d >= static_cast<int>(Distribution::integer);
          if (integers != (dtype == Dtype::i64 || dtype == Dtype::i32)) continue;
          if (integers && layout != Layout::dense) continue;
          const Tensor out(shape, dtype, layout);
          RandomParams p;
          p.out = out;
          p.noise = noise;
          p.distribution = static_cast<Distribution>(d);
          p.low = -5;
          p.range = dtype == Dtype::i64 ? uint64_t{1} << 32 : 11;
          p.threads = 3;
          kernels().random(p);
        }
}

void gaussian_kernels(const std::vector<int64_t>& shape) {
  for (auto& [noise, keep] : noises(shape))
    for (Dtype dtype : kFloats)
      for (Layout layout : kLayouts)
        for (int transform = 0; transform < 3; ++transform)
          for (int side = 0; side < 3; ++side)
            for (int64_t rows : {int64_t{1}, shape.empty() ? int64_t{1} : shape[0]}) {
              const Tensor mu(shape, dtype, layout), logvar(shape, Dtype::f32), y(shape, dtype);
              const Tensor sum({rows}, Dtype::f32), d_mu(shape, dtype, layout);
              const Tensor d_logvar(shape, Dtype::bf16, Layout::gaps);
              ReparameterizeParams p;
              p.mu = mu, p.logvar = logvar, p.noise = noise, p.rows = rows, p.threads = 2;
              if (rows == 1 || side == 0) p.y = y;
              p.transform = static_cast<Transform>(transform);
              p.side_kind = static_cast<Side>(side);
              if (side != 0) p.side = sum;
              kernels().reparameterize(p);
              for (int64_t i = 0; i < rows && side != 0; ++i)
                CHECK(std::isfinite(sum.as<float>()[i]));
              ReparameterizeBackwardParams b;
              b.mu = mu, b.logvar = logvar, b.d_mu = d_mu, b.d_logvar = d_logvar, b.noise = noise;
              b.transform = p.transform, b.side_kind = p.side_kind, b.rows = rows, b.threads = 2;
              if (side != 2) b.grad_y = y;
              if (side != 0) b.grad_side = sum;
              if (rows == 1 || side != 0) kernels().reparameterize_backward(b);
            }
}

void relaxed_kernels(const std::vector<int64_t>& shape) {
  Tensor tau({}, Dtype::f32);
  tau.set(0, 0.5);
  for (auto& [noise, keep] : noises(shape))
    for (Dtype dtype : kFloats)
      for (Layout layout : kLayouts)
        for (bool hard : {false, true}) {
          const Tensor logits(shape, dtype, layout), y(shape, dtype), grad(shape, dtype, layout);
          RelaxedBernoulliParams r;
          r.logits = logits, r.y = y, r.tau = tau, r.noise = noise, r.hard = hard, r.threads = 2;
          kernels().relaxed_bernoulli(r);
          r.grad = grad, r.backward = true;
          kernels().relaxed_bernoulli(r);
          if (shape.empty() || (shape.size() == 1 && noise.n_seeds > 1)) continue;
          GumbelSoftmaxParams p;
          p.logits = logits, p.y = y, p.tau = tau, p.noise = noise, p.hard = hard, p.threads = 2;
          kernels().gumbel_softmax(p);
          GumbelSoftmaxBackwardParams b;
          const Tensor d_logits(shape, dtype, layout);
          b.grad = grad, b.logits = logits, b.d_logits = d_logits, b.tau = tau, b.noise = noise;
          b.threads = 2;
          if (!hard) b.y = y;
          kernels().gumbel_softmax_backward(b);
        }
}

// Against sums of doubles, row by row.
void likelihood_kernels(const std::vector<int64_t>& shape) {
  if (shape.empty()) return;
  for (Dtype dtype : kFloats)
    for (Layout layout : kLayouts) {
      const Tensor logits(shape, dtype, layout), x(shape, Dtype::f32);
      Tensor nll({shape[0]}, Dtype::f32), grad({shape[0]}, Dtype::f32);
      Tensor d_logits(shape, dtype, layout), d_x(shape, Dtype::f32);
      BernoulliNllParams p;
      p.logits = logits, p.x = x, p.nll = nll;
      same_bits({&nll}, [&](int threads) {
        p.threads = threads;
        kernels().bernoulli_nll(p);
      });
      p.grad = grad, p.d_logits = d_logits, p.d_x = d_x;
      same_bits({&d_logits, &d_x}, [&](int threads) {
        p.threads = threads;
        kernels().bernoulli_nll_backward(p);
      });
      CHECK(nll.written() == nll.numel && d_logits.written() == d_logits.numel);
      CHECK(d_x.written() == d_x.numel);
      const auto l = values(logits), t = values(x), d = values(d_logits), dx = values(d_x);
      const int64_t n = shape[0] > 0 ? logits.numel / shape[0] : 0;
      for (int64_t row = 0; row < shape[0]; ++row) {
        double want = 0;
        for (int64_t i = row * n; i < (row + 1) * n; ++i) {
          want += std::log1p(std::exp(l[i])) - t[i] * l[i];
          const double slope = 1 / (1 + std::exp(-l[i])) - t[i];
          CHECK(close(d[i], grad.as<float>()[row] * slope, dtype));
          CHECK(dx[i] == -grad.as<float>()[row] * static_cast<float>(l[i]));
        }
        CHECK(close(nll.as<float>()[row], want, Dtype::f32));
      }
    }
}

void categorical_kernels(const std::vector<int64_t>& shape) {
  if (shape.empty() || shape.back() == 0) return;
  const std::vector<int64_t> lead(shape.begin(), shape.end() - 1);
  for (auto& [noise, keep] : noises(shape))
    for (Dtype dtype : kFloats)
      for (int mask = 0; mask < 32; ++mask) {
        if (shape.size() == 1 && noise.n_seeds > 1) continue;
        const Tensor logits(shape, dtype, Layout::reversed), index(lead, Dtype::i64);
        const bool per_row = mask & 16;
        const std::vector<int64_t> settings = {per_row ? index.numel : 1};
        Tensor t(settings, Dtype::f32), k(settings, Dtype::i64), top(settings, Dtype::f32),
            min(settings, Dtype::f32);
        for (int64_t i = 0; i < settings[0]; ++i) {
          t.set(i, i % 3 ? 0.5 : 0.0), k.set(i, static_cast<double>(i % 40));
          top.set(i, 0.25 * static_cast<double>(i % 5)), min.set(i, i % 2 ? 0.1 : 0.0);
        }
        CategoricalParams p;
        p.logits = logits, p.index = index, p.noise = noise, p.threads = 2;
        if (mask & 1) p.temperature = t;
        if (mask & 2) p.top_k = k;
        if (mask & 4) p.top_p = top;
        if (mask & 8) p.min_p = min;
        CHECK(kernels().categorical(p) == 0);
        for (int64_t r = 0; r < index.numel; ++r)
          CHECK(index.as<int64_t>()[r] >= 0 && index.as<int64_t>()[r] < shape.back());
      }
}

// Special values reach every branch without undefined behaviour, and are reported.
void special_values() {
  Tensor logits({4, 37}, Dtype::f32), index({4}, Dtype::i64), half({4, 37}, Dtype::f16);
  for (int64_t i = 0; i < 37; ++i) {
    logits.set(i, i == 3 ? NAN : 0.5);
    logits.set(37 + i, -INFINITY);
    logits.set(74 + i, i == 36 ? INFINITY : 3e38);
    logits.set(111 + i, i == 5 ? 3e38 : -3e38);
  }
  Tensor t({1}, Dtype::f32);
  for (double temperature : {1.0, 0.0, 1e-42, 1e-30, 3e38}) {
    t.set(0, temperature);
    CategoricalParams p;
    p.logits = logits, p.index = index, p.temperature = t, p.threads = 1;
    CHECK(kernels().categorical(p) == 3);
    CHECK(temperature > 1 || index.as<int64_t>()[3] == 5);
  }
  ReparameterizeParams p;
  Tensor sum({1}, Dtype::f32);
  p.mu = logits, p.logvar = logits, p.y = half, p.side = sum, p.side_kind = Side::log_prob;
  for (int transform = 0; transform < 3; ++transform) {
    p.transform = static_cast<Transform>(transform);
    kernels().reparameterize(p);
  }
}

}  // namespace

void genfast::test::run(bool quick) {
  known_answers();
  lanes_agree();
  conversions();
  special_values();
  for (int64_t cols : {3, 20, 252}) random_kernels({130, cols}), gaussian_kernels({130, cols});
  for (const auto& shape : genfast::test::odd_shapes()) {
    if (quick && shape != std::vector<int64_t>{5, 2051}) continue;
    random_kernels(shape);
    gaussian_kernels(shape);
    relaxed_kernels(shape);
    likelihood_kernels(shape);
    categorical_kernels(shape);
  }
}
