// Group, layer and RMS norm on CUDA: a group by a warp or a block, which keeps its values in
// registers between the statistics and the result (up to 16,384; larger ones are read again, from
// the second-level cache where they fit it). Group norms of long or scattered groups: strips.cuh.
#include "cuda/normalization/strips.cuh"

namespace genfast::cuda {
namespace {

template <int W>
struct Normalize {
  Layout layout;
  Affine affine;
  Line x, y, add, gate, sum;
  float* mean;  // [groups], null with rms or where nobody wants them; rstd so too
  float* rstd;
  NormActivation act;
  bool rms;
  float eps;

  explicit Normalize(const NormalizeParams& p, const Layout& of)
      : layout(of),
        affine(p, of),
        x(p.x),
        y(p.y),
        add(p.add),
        gate(p.gate),
        sum(p.sum),
        mean(p.statistics.defined() ? p.mean() : nullptr),
        rstd(p.statistics.defined() ? p.rstd() : nullptr),
        act(p.act),
        rms(p.rms),
        eps(p.eps) {}

  // x becomes x + gate add rounded to the dtype of `sum`, which is written.
  __device__ __forceinline__ void join(int64_t sample, int64_t at, int64_t c, float (&v)[W]) const {
    float h[W];
    read(add, at, h);
    if (gate.defined()) {
      float g[W];
      read(gate, sample * gate.step + c, g);
#pragma unroll
      for (int i = 0; i < W; ++i) h[i] *= g[i];
    }
#pragma unroll
    for (int i = 0; i < W; ++i) v[i] += h[i];
    write(sum, at, v);
    if (sum.dtype != Dtype::f32) read(sum, at, v);
  }

  template <class Team>
  __device__ __forceinline__ void operator()(const Team& team, int64_t group, float*) const {
    const GroupPlace place(layout, group);
    const int64_t chunk = static_cast<int64_t>(team.size()) * kPieces<W> * W;
    const bool held = layout.count <= chunk;
    float v[kPieces<W>][W];
    // In fp32 over a chunk, up to 32 terms, then in double, whose additions are a 64th of the speed
    // on small GPUs.
    const auto mean_of = [&](bool first, float around, bool squares) {
      double total = 0;
      for (int64_t base = 0; base < layout.count; base += chunk) {
        const Pieces<W, Team> pieces(place, team, base);
        if (first || !held) pieces.load(first || !add.defined() ? x : sum, v);
        if (first && add.defined())
          pieces.each([&](int64_t at, int64_t c) { join(place.sample, at, c, v[0]); }, v);
        float part = 0.0f;
#pragma unroll
        for (int u = 0; u < kPieces<W>; ++u) {
          if (pieces.begin + u * pieces.step >= layout.count) continue;
#pragma unroll
          for (int i = 0; i < W; ++i) {
            const float t = v[u][i] - around;
            part += squares ? t * t : t;
          }
        }
        total += part;
      }
      return layout.mean_of(team.reduce(total, Add()));
    };
    const float m = rms ? 0.0f : mean_of(true, 0.0f, false);
    const float r = 1.0f / sqrtf(mean_of(rms, m, true) + eps);
    if (team.rank() == 0) {
      if (mean != nullptr) mean[group] = m;
      if (rstd != nullptr) rstd[group] = r;
    }
    for (int64_t base = 0; base < layout.count; base += chunk) {
      const Pieces<W, Team> pieces(place, team, base);
      if (!held) pieces.load(add.defined() ? sum : x, v);
      pieces.each(
          [&](int64_t at, int64_t c) {
            float a[W], k[W];
            affine.at(place.sample, c, a, k);
            with_activation(act, [&](auto of) {
              using Act = decltype(of);
#pragma unroll
              for (int i = 0; i < W; ++i) v[0][i] = Act::value((v[0][i] - m) * r * a[i] + k[i]);
            });
            write(y, at, v[0]);
          },
          v);
    }
  }
};

// Moments of each channel of each part.
template <int W>
__global__ void __launch_bounds__(kStrip, 2)
    strip_moments(const __grid_constant__ Strips strips, const __grid_constant__ Line x) {
  const Strip<W> strip(strips);
  float mean[W] = {}, squares[W] = {};
#pragma unroll 1
  for (int i = 0; i < strip.steps; i += kSteps) {
    const int n = strip.steps - i < kSteps ? strip.steps - i : kSteps;
    float v[kSteps][W];
#pragma unroll
    for (int u = 0; u < kSteps; ++u)
      if (u < n) read(x, strip.first + (i + u) * strip.step, v[u]);
    const float inverse = 1.0f / n;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      Two of_these{static_cast<float>(n), 0.0f, 0.0f};
#pragma unroll
      for (int u = 0; u < kSteps; ++u) of_these.a += u < n ? v[u][j] : 0.0f;
      of_these.a *= inverse;
#pragma unroll
      for (int u = 0; u < kSteps; ++u) {
        const float d = u < n ? v[u][j] - of_these.a : 0.0f;
        of_these.b += d * d;
      }
      const Two all = JoinMoments()({static_cast<float>(i), mean[j], squares[j]}, of_these);
      mean[j] = all.a, squares[j] = all.b;
    }
  }
  strip.leave(strips, static_cast<float>(strip.steps), mean, squares, JoinMoments());
}

// A block adds the moments of a group.
__global__ void __launch_bounds__(kStrip, 4)
    group_statistics(const __grid_constant__ Strips strips, float* mean, float* rstd, float eps) {
  const int64_t group = blockIdx.x;
  const Two all = of_group(strips, group, JoinMoments(), [&](int64_t unit, int64_t c, int64_t n) {
    return Two{static_cast<float>(n), strips.of(unit, 0)[c], strips.of(unit, 1)[c]};
  });
  if (threadIdx.x != 0) return;
  mean[group] = all.a;
  rstd[group] =
      static_cast<float>(1.0 / sqrt(static_cast<double>(all.b) / strips.layout.count + eps));
}

template <int W>
__global__ void __launch_bounds__(kStrip, 2)
    strip_normalize(const __grid_constant__ Strips strips, const __grid_constant__ Affine affine,
                    const __grid_constant__ Line x, const __grid_constant__ Line y,
                    const float* mean, const float* rstd, NormActivation act) {
  const Strip<W> strip(strips);
  if (strip.steps == 0) return;
  float m[W], r[W], a[W], k[W];
  affine.at(strip.sample, strip.channel, a, k);
#pragma unroll
  for (int j = 0; j < W; ++j) {
    const int64_t group = strip.group(j);
    m[j] = mean[group], r[j] = rstd[group];
  }
#pragma unroll 1
  for (int i = 0; i < strip.steps; i += kSteps) {
    float v[kSteps][W];
#pragma unroll
    for (int u = 0; u < kSteps; ++u)
      if (i + u < strip.steps) read(x, strip.first + (i + u) * strip.step, v[u]);
#pragma unroll 1
    for (int u = i; u < i + kSteps && u < strip.steps; ++u) {
      with_activation(act, [&](auto of) {
        using Act = decltype(of);
#pragma unroll
        for (int j = 0; j < W; ++j) v[0][j] = Act::value((v[0][j] - m[j]) * r[j] * a[j] + k[j]);
      });
      write(y, strip.first + u * strip.step, v[0]);
      turn(v);
    }
  }
}

template <int W>
const char* normalize_in_strips(const NormalizeParams& p, const Layout& layout) {
  const int64_t groups = p.group_count();
  const Strips strips(layout, static_cast<float*>(p.scratch.data), p.parts(), W);
  float* mean = p.mean();
  float* rstd = p.rstd();
  if (!p.statistics.defined()) {
    mean = static_cast<float*>(p.scratch.data) + p.scratch.numel - 2 * groups;
    rstd = mean + groups;
  }
  const char* error =
      launch(strip_moments<W>, strips.blocks(), dim3(kStrip), 0, p.x, strips, Line(p.x));
  if (error == nullptr)
    error = launch(group_statistics, dim3(static_cast<unsigned>(groups)), dim3(kStrip), 0, p.x,
                   strips, mean, rstd, p.eps);
  if (error != nullptr) return error;
  return launch(strip_normalize<W>, strips.blocks(), dim3(kStrip), 0, p.x, strips,
                Affine(p, layout), Line(p.x), Line(p.y), mean, rstd, p.act);
}

}  // namespace

const char* normalize(const NormalizeParams& p) {
  if (p.x.numel == 0) return nullptr;
  const Layout layout(p);
  const int64_t groups = p.group_count();
  if (in_strips(layout) && p.parts() > 0) {
    if (layout.whole(p, {&p.y}, layout.side_by_side()))
      return normalize_in_strips<kGroup>(p, layout);
    return normalize_in_strips<1>(p, layout);
  }
  if (layout.whole(p, {&p.y, &p.sum}, layout.line))
    return launch_each<kGroup>(Normalize<kGroup>(p, layout), groups, layout.count, p.x);
  return launch_each<1>(Normalize<1>(p, layout), groups, layout.count, p.x);
}

}  // namespace genfast::cuda
