// Reparameterized Gaussian draws on CUDA: one pass, noise drawn in registers beside the elements it
// meets. Side sums run in two stages of a fixed order (no atomics), in double like the CPU's.
#include "api/sampling.h"
#include "cuda/sums.cuh"
#include "math/sampling.h"

namespace genfast::cuda {
namespace {

// Rows so that no group crosses a side row or a seed row.
int64_t split_rows(int64_t rows, const Noise& noise, const TensorView& t) {
  const int64_t seeds = noise_rows(noise, t);
  return rows > seeds ? rows : seeds;
}

template <class T>
struct Forward {
  Groups groups;
  Stage mu, logvar, y;
  Noise noise;
  bool want_y;
  Side side_kind;
  float* side;  // [samples]
  float side_scale;

  using Sum = double;
  using Prepared = Nothing;
  __device__ __forceinline__ Nothing prepare(int64_t) const { return {}; }
  __device__ __forceinline__ void finish(int64_t sample, double total) const {
    side[sample] = static_cast<float>(total * side_scale);
  }
  // Draws, writes y and returns the sum of the side terms.
  __device__ __forceinline__ double sum(const Group& g, int64_t, Nothing) const {
    float m[kGroup], l[kGroup], e[kGroup], out[kGroup];
    load(mu, g.index, g.low, g.high, m);
    load(logvar, g.index, g.low, g.high, l);
    if (want_y || side_kind == Side::log_prob) {
      noise_of<NormalMap>(noise, g, e);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) e[i] = 0.0f;
    }
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const Draw<float> d = draw(m[i], l[i], e[i]);
      out[i] = T::template value<float>(d.z);
      float term = 0.0f;
      if (side_kind == Side::kl) term = gaussian_kl(m[i], l[i], d.sigma);
      if (side_kind == Side::log_prob)
        term = log_density(e[i], l[i], T::template log_slope<float>(d.z, out[i]));
      if (i >= g.low && i < g.high) total += term;
    }
    if (want_y) store(y, g.index, g.low, g.high, out);
    return total;
  }
  __device__ __forceinline__ void operator()(const Group& g) const { sum(g, 0, {}); }
};

template <class T>
const char* forward(const ReparameterizeParams& p) {
  const int64_t rows = split_rows(p.rows, p.noise, p.mu);
  const Forward<T> op{Groups(p.mu.numel, rows, p.noise),
                      Stage(p.mu),
                      Stage(p.logvar),
                      Stage(p.y),
                      p.noise,
                      p.y.defined(),
                      p.side_kind,
                      static_cast<float*>(p.side.data),
                      p.side_scale};
  if (p.side_kind == Side::none) return launch_groups(op, p.mu);
  return launch_sums(op, p.rows, p.scratch, p.mu);
}

template <class T>
struct Backward {
  Groups groups;
  Stage grad_y, mu, logvar, d_mu, d_logvar;
  const float* grad_side;
  int64_t rows_per_side;
  float side_scale;
  Noise noise;
  bool have_y, have_side, is_kl;

  __device__ __forceinline__ void operator()(const Group& g) const {
    const bool is_log_prob = have_side && !is_kl;
    float m[kGroup], l[kGroup], e[kGroup], gy[kGroup];
    load(mu, g.index, g.low, g.high, m);
    load(logvar, g.index, g.low, g.high, l);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) e[i] = gy[i] = 0.0f;
    if (have_y) load(grad_y, g.index, g.low, g.high, gy);
    if (have_y || is_log_prob) noise_of<NormalMap>(noise, g, e);
    const float gs =
        have_side ? grad_side[rows_per_side == 1 ? g.row : g.row / rows_per_side] * side_scale
                  : 0.0f;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {  // the same operations in the same order as on the CPU
      const Draw<float> d = draw(m[i], l[i], e[i]);
      float gz = 0.0f, g_logvar = 0.0f;
      if (have_y || is_log_prob) {
        const float yi = T::template value<float>(d.z);
        if (have_y) gz = gy[i] * T::template slope<float>(yi);
        if (is_log_prob) {
          gz -= T::template log_slope_gradient<float>(yi) * gs;
          g_logvar = gs * -0.5f;
        }
        g_logvar += (gz * (d.sigma * e[i])) * 0.5f;
      }
      if (have_side && is_kl) {
        gz += m[i] * gs;
        g_logvar += (d.sigma * d.sigma - 1.0f) * (0.5f * gs);
      }
      m[i] = gz;
      l[i] = g_logvar;
    }
    store(d_mu, g.index, g.low, g.high, m);
    store(d_logvar, g.index, g.low, g.high, l);
  }
};

template <class T>
const char* backward(const ReparameterizeBackwardParams& p) {
  const int64_t rows = split_rows(p.rows, p.noise, p.mu);
  return launch_groups(
      Backward<T>{Groups(p.mu.numel, rows, p.noise), Stage(p.grad_y), Stage(p.mu), Stage(p.logvar),
                  Stage(p.d_mu), Stage(p.d_logvar), static_cast<const float*>(p.grad_side.data),
                  p.rows > 0 ? rows / p.rows : 1, p.side_scale, p.noise, p.grad_y.defined(),
                  p.grad_side.defined(), p.side_kind == Side::kl},
      p.mu);
}

}  // namespace

const char* reparameterize(const ReparameterizeParams& p) {
  switch (p.transform) {
    case Transform::tanh:
      return forward<TanhTransform>(p);
    case Transform::exp:
      return forward<ExpTransform>(p);
    default:
      return forward<NoneTransform>(p);
  }
}

const char* reparameterize_backward(const ReparameterizeBackwardParams& p) {
  switch (p.transform) {
    case Transform::tanh:
      return backward<TanhTransform>(p);
    case Transform::exp:
      return backward<ExpTransform>(p);
    default:
      return backward<NoneTransform>(p);
  }
}

}  // namespace genfast::cuda
