// Gumbel-softmax and relaxed Bernoulli draws, and their gradients.
#include "cpu/kernels.h"
#include "cpu/sampling/rows.h"

namespace genfast::cpu::GENFAST_ISA {
namespace {

// Row of softmax((logits + g) / tau), in place of scratch.
void soft_row(const Stage& logits, GumbelRows& noise, const RowShape& s, int64_t row, float inv_tau,
              float* y) {
  const float m = perturb(logits, row * s.cols, row, s.cols, noise, inv_tau, y);
  double total = 0;
  for (int64_t c = 0; c < s.cols; c += kChunk) {
    f32p sum{};
    const int64_t end = std::min<int64_t>(s.cols, c + kChunk);
    for (int64_t i = c; i < end; i += kStep) {
      const f32p e = exp_of<f32p>(load_pair(y + i) - m);
      store(y + i, e);
      sum += e;
    }
    total += lane_sum(sum);
  }
  const float scale = static_cast<float>(1.0 / total);
  for (int64_t i = 0; i < s.cols; i += kStep) store(y + i, load_pair(y + i) * scale);
}

void store_row(const Stage& out, int64_t row, int64_t cols, const float* from) {
  for (int64_t c = 0; c < cols; c += kChunk) {
    const int n = static_cast<int>(std::min<int64_t>(kChunk, cols - c));
    Chunk staged;
    float* to = out.target(row * cols + c, n, staged);
    __builtin_memcpy(to, from + c, n * sizeof(float));
    out.store(row * cols + c, n, to);
  }
}

float inverse(const TensorView& tau) { return 1.0f / *static_cast<const float*>(tau.data); }

}  // namespace

void gumbel_softmax(const GumbelSoftmaxParams& p) {
  const Stage logits(p.logits), y(p.y);
  advise_huge_pages(p.y.data, p.y.numel * dtype_bytes(p.y.dtype));
  const RowShape s(p.logits, p.noise);
  const float inv_tau = inverse(p.tau);
  const auto harden = [&](float* x, float top) {
    const int64_t best = argmax(x, s.cols, top);
    for (int64_t i = 0; i < s.cols; ++i) x[i] = best < 0 ? NAN : i == best;
  };
  if (s.cols <= kNarrow) {
    const NarrowRows narrow(logits, s, inv_tau);
    return for_narrow_rows(s, p.noise, p.threads, [&](int64_t row, int height, const float* g) {
      Chunk x;
      float top[kChunk];
      narrow.perturb(row, height, g, x, top);
      if (p.hard)
        for (int r = 0; r < height; ++r) harden(x.data + r * s.cols, top[r]);
      else
        narrow.soften(height, top, x);
      y.put(row * s.cols, static_cast<int>(height * s.cols), x);
    });
  }
  for_rows(s, p.noise, p.threads, [&](int64_t row, float* scratch, GumbelRows& noise) {
    if (p.hard)
      harden(scratch, perturb(logits, row * s.cols, row, s.cols, noise, inv_tau, scratch));
    else
      soft_row(logits, noise, s, row, inv_tau, scratch);
    store_row(y, row, s.cols, scratch);
  });
}

void gumbel_softmax_backward(const GumbelSoftmaxBackwardParams& p) {
  const bool have_y = p.y.defined();
  const Stage grad(p.grad), soft(have_y ? p.y : p.logits), d_logits(p.d_logits);
  advise_huge_pages(p.d_logits.data, p.d_logits.numel * dtype_bytes(p.d_logits.dtype));
  const RowShape s(p.grad, p.noise);
  const float inv_tau = inverse(p.tau);
  if (s.cols <= kNarrow) {
    const NarrowRows narrow(soft, s, inv_tau);
    const auto run = [&](int64_t row, int height, const float* y, Chunk& to) {
      const int cols = static_cast<int>(s.cols), n = height * cols;
      Chunk held;
      NoiseChunk each;
      float dot[kChunk];
      const float* g = grad.load(row * cols, n, held);
      for (int r = 0; r < height; ++r) {
        double sum = 0.0;
        for (int i = r * cols; i < (r + 1) * cols; ++i) sum += static_cast<double>(g[i]) * y[i];
        dot[r] = static_cast<float>(sum);
      }
      spread(dot, height, cols, each);
      for (int i = 0; i < n; i += kStep)
        store(to.data + i,
              (load_pair(y + i) * (load_pair(g + i) - load_pair(each.data + i))) * inv_tau);
      d_logits.put(row * cols, n, to);
    };
    if (have_y)
      return for_spans(s.rows, s.cols, rows_of_chunk(s.cols, false), p.threads,
                       [&](int64_t row, int64_t, int n, int height) {
                         Chunk y, to;
                         run(row, height, soft.load(row * s.cols, n, y), to);
                       });
    return for_narrow_rows(s, p.noise, p.threads, [&](int64_t row, int height, const float* g) {
      Chunk y;
      float top[kChunk];
      narrow.perturb(row, height, g, y, top);
      narrow.soften(height, top, y);
      run(row, height, y.data, y);
    });
  }
  for_rows(s, p.noise, p.threads, [&](int64_t row, float* y, GumbelRows& noise) {
    if (!have_y) soft_row(soft, noise, s, row, inv_tau, y);
    double dot = 0;
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t c = 0; c < s.cols; c += kChunk) {
        Chunk a, b, staged;
        const int64_t at = row * s.cols + c;
        const int n = static_cast<int>(std::min<int64_t>(kChunk, s.cols - c));
        const float* g = grad.load(at, n, a);
        const float* yc = have_y ? soft.load(at, n, b) : y + c;
        if (pass == 0) {
          Sum sum;
          for (int i = 0; i < n; i += kStep) sum.add(load_pair(g + i) * load_pair(yc + i), n - i);
          dot += sum.total();
        } else {
          float* to = d_logits.target(at, n, staged);
          const float d = static_cast<float>(dot);
          for (int i = 0; i < n; i += kStep)
            store(to + i, (load_pair(yc + i) * (load_pair(g + i) - d)) * inv_tau);
          d_logits.store(at, n, to);
        }
      }
  });
}

void relaxed_bernoulli(const RelaxedBernoulliParams& p) {
  const Stage logits(p.logits), y(p.y), grad(p.grad);
  advise_huge_pages(p.y.data, p.y.numel * dtype_bytes(p.y.dtype));
  const float inv_tau = inverse(p.tau);
  const int64_t rows = noise_rows(p.noise, p.logits), cols = rows ? p.logits.numel / rows : 0;
  const NoiseAt noise(p.noise, p.logits);
  const int64_t most = noise.height(cols);
  for_spans(rows, cols, most, p.threads, [&](int64_t row, int64_t first, int n, int) {
    Chunk a, g, staged;
    NoiseChunk noise_buffer;
    const int64_t at = row * cols + first;
    const float* l = logits.load(at, n, a);
    const float* e = noise.values<LogisticMap>(at, n, noise_buffer);
    const float* gy = p.backward ? grad.load(at, n, g) : nullptr;
    float* to = y.target(at, n, staged);
    for (int i = 0; i < n; i += kStep) {
      const f32p x = (load_pair(l + i) + load_pair(e + i)) * inv_tau;
      f32p v = sigmoid_of<f32p>(x);
      if (p.backward)
        v = (load_pair(gy + i) * (v * sigmoid_of<f32p>(-x))) * inv_tau;
      else if (p.hard)
        v = select(x > 0.0f, f32p{} + 1.0f, select(x == x, f32p{}, x));
      store(to + i, v);
    }
    y.store(at, n, to);
  });
}

}  // namespace genfast::cpu::GENFAST_ISA
