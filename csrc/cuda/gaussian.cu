// Reparameterized Gaussian draws on CUDA: one pass, noise drawn in registers beside the elements it
// meets. Side sums run in two stages of a fixed order (no atomics), in double like the CPU's.
#include "api/sampling.h"
#include "cuda/noise.cuh"
#include "cuda/team.cuh"
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

  // Draws, writes y and returns the sum of the side terms.
  __device__ __forceinline__ double sum(const Group& g) const {
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
  __device__ __forceinline__ void operator()(const Group& g) const { sum(g); }
};

// Block b sums part b % parts of side row b / parts.
struct SidePlan {
  double* partial;  // [rows, parts]; unused when parts == 1
  float* side;      // [rows]
  int64_t rows, parts;
  int64_t rows_per_side;  // rows of the walk in one side row
  float scale;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    side_sums(const __grid_constant__ Forward<T> op, const __grid_constant__ SidePlan plan) {
  const int64_t side_row = blockIdx.x / plan.parts, part = blockIdx.x - side_row * plan.parts;
  const int64_t groups = plan.rows_per_side * op.groups.per_row;
  double total = 0;
  for (int64_t t = part * kThreads + threadIdx.x; t < groups; t += plan.parts * kThreads) {
    const int64_t inner = plan.rows_per_side == 1 ? 0 : t / op.groups.per_row;
    const Group g(op.groups, side_row * plan.rows_per_side + inner, t - inner * op.groups.per_row);
    if (!g.empty()) total += op.sum(g);
  }
  total = BlockTeam().reduce(total, Add());
  if (threadIdx.x != 0) return;
  if (plan.parts == 1)
    plan.side[side_row] = static_cast<float>(total * plan.scale);
  else
    plan.partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads, 3) finish_side(const __grid_constant__ SidePlan plan) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= plan.rows) return;  // a whole warp
  double total = 0;
  for (int64_t i = threadIdx.x % 32; i < plan.parts; i += 32)
    total += plan.partial[row * plan.parts + i];
  total = reduce_warp(total, Add());
  if (threadIdx.x % 32 == 0) plan.side[row] = static_cast<float>(total * plan.scale);
}

template <class T>
const char* forward(const ReparameterizeParams& p) {
  const int64_t rows = split_rows(p.rows, p.noise, p.mu);
  const Forward<T> op{Groups(p.mu.numel, rows, p.noise),
                      Stage(p.mu),
                      Stage(p.logvar),
                      Stage(p.y),
                      p.noise,
                      p.y.defined(),
                      p.side_kind};
  if (p.side_kind == Side::none) return launch_groups(op, p.mu);
  const int64_t parts = p.scratch.defined() && p.rows > 0 ? p.scratch.numel / p.rows : 1;
  const SidePlan plan{static_cast<double*>(p.scratch.data),
                      static_cast<float*>(p.side.data),
                      p.rows,
                      parts > 0 ? parts : 1,
                      p.rows > 0 ? rows / p.rows : 1,
                      p.side_scale};
  if (p.rows == 0) return nullptr;
  const char* error = launch(side_sums<T>, dim3(static_cast<unsigned>(plan.rows * plan.parts)),
                             dim3(kThreads), 0, p.mu, op, plan);
  if (error != nullptr || plan.parts == 1) return error;
  return launch(finish_side, blocks_for(plan.rows, kThreads / 32), dim3(kThreads), 0, p.mu, plan);
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
