// Reparameterized draws of diagonal Gaussians with their KL or log-density, and the gradients.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/sampling/sums.h"
#include "math/sampling.h"

namespace genfast::cpu::GENFAST_ISA {
namespace {

// Calls fn with a tag object per transform: the loops below are compiled once for each.
template <class Fn>
void with_transform(Transform t, Fn&& fn) {
  switch (t) {
    case Transform::none:
      return fn(NoneTransform{});
    case Transform::tanh:
      return fn(TanhTransform{});
    case Transform::exp:
      return fn(ExpTransform{});
  }
}

// Rows so that no chunk crosses a side row or a seed row.
inline int64_t split_rows(int64_t rows, const Noise& noise, const TensorView& t) {
  return std::max(rows, noise_rows(noise, t));
}

}  // namespace

void reparameterize(const ReparameterizeParams& p) {
  const Stage mu(p.mu), logvar(p.logvar), y(p.y);
  const bool want_y = p.y.defined();
  if (want_y) advise_huge_pages(p.y.data, p.y.numel * dtype_bytes(p.y.dtype));
  const int64_t rows = split_rows(p.rows, p.noise, p.mu), cols = rows ? p.mu.numel / rows : 0;
  const NoiseAt noise(p.noise, p.mu);
  const int64_t most = noise.height(cols);
  const int64_t per_row = (cols + kChunk - 1) / kChunk;
  const bool want_side = p.side_kind != Side::none;
  const Held<double> sums(want_side ? rows * per_row : 0);
  double* partial = sums;  // one per chunk, added in chunk order: no thread matters

  with_transform(p.transform, [&](auto transform) {
    using T = decltype(transform);
    for_spans(rows, cols, most, p.threads, [&](int64_t row, int64_t first, int n, int height) {
      Chunk a, b, staged;
      NoiseChunk noise_buffer, terms;
      const int64_t at = row * cols + first;
      const bool need_noise = want_y || p.side_kind == Side::log_prob;
      mu.prefetch(at, n), logvar.prefetch(at, n);
      const float* e =
          need_noise ? noise.values<NormalMap>(at, n, noise_buffer) : noise_buffer.data;
      const float* m = mu.load(at, n, a);
      const float* l = logvar.load(at, n, b);
      float* to = want_y ? y.target(at, n, staged) : staged.data;
      Sum sum;
      const auto add = [&](int i, f32p term) {
        height == 1 ? sum.add(term, n - i) : store(terms.data + i, term);
      };
      for (int i = 0; i < n; i += kStep) {
        const f32p mi = load_pair(m + i), li = load_pair(l + i), ei = load_pair(e + i);
        const Draw<f32p> d = draw(mi, li, ei);
        const f32p yi = T::template value<f32p>(d.z);
        store(to + i, yi);
        if (p.side_kind == Side::kl) add(i, gaussian_kl(mi, li, d.sigma));
        if (p.side_kind == Side::log_prob)
          add(i, log_density(ei, li, T::template log_slope<f32p>(d.z, yi)));
      }
      if (want_y) y.store(at, n, to);
      if (!want_side) return;
      if (height == 1)
        partial[row * per_row + first / kChunk] = sum.total();
      else
        sums_of_rows(terms.data, height, static_cast<int>(cols), partial + row);
    });
  });

  if (!want_side) return;
  float* side = static_cast<float*>(p.side.data);
  const int64_t chunks = rows * per_row / std::max<int64_t>(p.rows, 1);
  if (chunks == 1) {  // in vectors
    for (int64_t r = 0; r < p.rows; ++r) side[r] = static_cast<float>(partial[r] * p.side_scale);
    return;
  }
  for (int64_t r = 0; r < p.rows; ++r) {
    double s = 0;
    for (int64_t c = r * chunks; c < (r + 1) * chunks; ++c) s += partial[c];
    side[r] = static_cast<float>(s * p.side_scale);
  }
}

void reparameterize_backward(const ReparameterizeBackwardParams& p) {
  const Stage mu(p.mu), logvar(p.logvar), grad_y(p.grad_y), d_mu(p.d_mu), d_logvar(p.d_logvar);
  for (const TensorView* t : {&p.d_mu, &p.d_logvar})
    advise_huge_pages(t->data, t->numel * dtype_bytes(t->dtype));
  const bool have_y = p.grad_y.defined(), have_side = p.grad_side.defined();
  const bool is_kl = p.side_kind == Side::kl, is_log_prob = have_side && !is_kl;
  const float* grad_side = static_cast<const float*>(p.grad_side.data);
  const int64_t rows = split_rows(p.rows, p.noise, p.mu), cols = rows ? p.mu.numel / rows : 0;
  const int64_t split = p.rows ? rows / p.rows : 1;  // seed rows per side row
  const NoiseAt noise(p.noise, p.mu);
  const int64_t most = noise.height(cols);

  with_transform(p.transform, [&](auto transform) {
    using T = decltype(transform);
    for_spans(rows, cols, most, p.threads, [&](int64_t row, int64_t first, int n, int height) {
      Chunk a, b, g, staged_mu, staged_logvar;
      NoiseChunk noise_buffer, scales;
      const int64_t at = row * cols + first;
      mu.prefetch(at, n), logvar.prefetch(at, n);
      if (have_y) grad_y.prefetch(at, n);
      const float* e =
          have_y || is_log_prob ? noise.values<NormalMap>(at, n, noise_buffer) : noise_buffer.data;
      const float* m = mu.load(at, n, a);
      const float* l = logvar.load(at, n, b);
      const float* gy = have_y ? grad_y.load(at, n, g) : nullptr;
      const auto side = [&](int64_t r) { return grad_side[r / split] * p.side_scale; };
      const f32v one = splat(have_side && height == 1 ? side(row) : 0.0f);
      if (have_side && height > 1) {
        float values[kChunk];
        for (int r = 0; r < height; ++r) values[r] = side(row + r);
        spread(values, height, cols, scales);
      }
      float* to_mu = d_mu.target(at, n, staged_mu);
      float* to_logvar = d_logvar.target(at, n, staged_logvar);
      for (int i = 0; i < n; i += kStep) {
        const f32p mi = load_pair(m + i), li = load_pair(l + i), ei = load_pair(e + i);
        const Draw<f32p> d = draw(mi, li, ei);
        const f32p gs = height == 1 ? f32p{one, one} : load_pair(scales.data + i);
        f32p gz{}, g_logvar{};
        if (have_y || is_log_prob) {
          const f32p yi = T::template value<f32p>(d.z);
          if (have_y) gz = load_pair(gy + i) * T::template slope<f32p>(yi);
          if (is_log_prob) {
            gz -= T::template log_slope_gradient<f32p>(yi) * gs;
            g_logvar = f32p{} + gs * -0.5f;
          }
          g_logvar += (gz * (d.sigma * ei)) * 0.5f;
        }
        if (have_side && is_kl) {
          gz += mi * gs;
          g_logvar += (d.sigma * d.sigma - 1.0f) * (gs * 0.5f);
        }
        store(to_mu + i, gz);
        store(to_logvar + i, g_logvar);
      }
      d_mu.store(at, n, to_mu);
      d_logvar.store(at, n, to_logvar);
    });
  });
}

}  // namespace genfast::cpu::GENFAST_ISA
