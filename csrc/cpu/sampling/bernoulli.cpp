// The negative log-likelihood of Bernoulli pixels by sample, and its gradients.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/sampling/sums.h"
#include "math/sampling.h"

namespace genfast::cpu::GENFAST_ISA {
namespace {

// Calls run(row, first, count, rows) for [B, n] in logical order: a chunk of a row, or several
// short rows; a task has whole rows.
template <class Run>
void for_row_chunks(const BernoulliNllParams& p, Run&& run) {
  const int64_t B = p.logits.shape[0], n = B > 0 ? p.logits.numel / B : 0;
  const int64_t height = std::max<int64_t>(1, rows_of_chunk(n, false));
  const int64_t per_task = std::max<int64_t>(1, 16 * kChunk / std::max<int64_t>(1, n));
  parallel_for((B + per_task - 1) / per_task, p.threads, [&](int64_t task) {
    const int64_t end = std::min(B, (task + 1) * per_task);
    for (int64_t b = task * per_task; b < end; b += height) {
      const int64_t rows = std::min(height, end - b);
      for (int64_t i = 0; i < n; i += kChunk)
        run(b, b * n + i, static_cast<int>(std::min<int64_t>(kChunk, rows * n - i)),
            static_cast<int>(rows));
    }
  });
}

}  // namespace

void bernoulli_nll(const BernoulliNllParams& p) {
  const Stage logits(p.logits), x(p.x);
  // In fp32 a sum of 2^24 equal terms was 2e-4 off: each chunk's rounds the same way.
  const Held<double> held(p.nll.numel);
  double* sums = held;
  std::fill_n(sums, p.nll.numel, 0.0);
  const auto sum_of = [](int n, auto&& term) {
    f32v s0{}, s1{};
    for (int i = 0; i < n; i += kStep) s0 += term(i), s1 += term(i + W);
    return horizontal_sum(s0 + s1);
  };
  for_row_chunks(p, [&](int64_t row, int64_t first, int n, int rows) {
    Chunk l_buffer, x_buffer;
    const float *l = logits.load(first, n, l_buffer), *t = x.load(first, n, x_buffer);
    for (int i = n; i < ((n + kStep - 1) & -kStep); ++i) l_buffer.data[i] = -1e30f;  // adds 0
    const auto term = [=](int i) { return genfast::bernoulli_nll<f32v>(load(l + i), load(t + i)); };
    if (rows == 1) {
      sums[row] += sum_of(n, term);
      return;
    }
    Chunk terms;
    for (int i = 0; i < n; i += W) store(terms.data + i, term(i));
    const int cols = n / rows;
    if (cols <= 2) {  // 12 ns a row by vectors
      for (int r = 0; r < rows; ++r)
        sums[row + r] = terms.data[r * cols] + (cols > 1 ? terms.data[r * cols + 1] : 0.0f);
      return;
    }
    for (int r = 0; r < rows; ++r)
      sums[row + r] = sum_of(cols, [own = terms.data + r * cols, cols](int i) {
        alignas(64) float last[W] = {};
        if (i + W <= cols) return load(own + i);
        for (int j = 0; i + j < cols; ++j) last[j] = own[i + j];
        return load(last);
      });
  });
  std::copy_n(sums, p.nll.numel, static_cast<float*>(p.nll.data));
}

void bernoulli_nll_backward(const BernoulliNllParams& p) {
  const Stage logits(p.logits), x(p.x), d_logits(p.d_logits), d_x(p.d_x);
  const float* grad = static_cast<const float*>(p.grad.data);
  for_row_chunks(p, [&](int64_t row, int64_t first, int n, int rows) {
    Chunk l_buffer, x_buffer, d_buffer;
    NoiseChunk scales;
    const float *l = logits.load(first, n, l_buffer), *t = x.load(first, n, x_buffer);
    const auto write = [&](const Stage& out, auto&& value, auto scale) {
      float* d = out.target(first, n, d_buffer);
      for (int i = 0; i < n; i += W) store(d + i, value(i) * scale(i));
      out.store(first, n, d);
    };
    const auto run = [&](auto scale) {
      if (p.d_logits.defined())
        write(d_logits, [=](int i) { return logistic<f32v>(load(l + i)).s - load(t + i); }, scale);
      if (p.d_x.defined()) write(d_x, [=](int i) { return -load(l + i); }, scale);
    };
    if (rows == 1) return run(Same(grad[row]));
    spread(grad + row, rows, n / rows, scales);
    run(Each{scales.data});
  });
}

}  // namespace genfast::cpu::GENFAST_ISA
