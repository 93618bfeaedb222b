// The gradient of the norms on CUDA. dz = grad act'(z), h = (x - mean) rstd, and of a channel's
// places S1 = sum dz, S2 = sum dz h, S3 = sum d_sum add. First dx of every group, then, where
// gradients of parameters are wanted, the sums by parts of rows, and their total in a fixed order.
#include "cuda/normalization/common.cuh"

namespace genfast::cuda {
namespace {

constexpr int kSums = 3, kRowsOfBlock = 8;

template <int W>
struct Gradient {
  Layout layout;
  Affine affine;
  Line x, grad, dx, grad_sum, add, gate, d_add;
  const float* mean;
  const float* rstd;
  float* means;  // [groups][2] of a dz and a dz h, written for the sums of a gated call; or null
  NormActivation act;

  Gradient(const NormalizeBackwardParams& q, const Layout& of, float* means_)
      : layout(of),
        affine(q.forward, of),
        x(q.forward.x),
        grad(q.grad),
        dx(q.dx),
        grad_sum(q.grad_sum),
        add(q.forward.add),
        gate(q.forward.gate),
        d_add(q.d_add),
        mean(q.forward.mean()),
        rstd(q.forward.rstd()),
        means(means_),
        act(q.forward.act) {}

  // h and dz of W elements of one group and one sample.
  __device__ __forceinline__ void slopes(int64_t at, float m, float r, const float (&a)[W],
                                         const float (&k)[W], float (&h)[W], float (&d)[W]) const {
    read(x, at, h);
    read(grad, at, d);
#pragma unroll
    for (int i = 0; i < W; ++i) h[i] = (h[i] - m) * r;
    if (act == NormActivation::linear) return;
    with_activation(act, [&](auto of) {
      using Act = decltype(of);
#pragma unroll
      for (int i = 0; i < W; ++i) d[i] *= Act::slope(h[i] * a[i] + k[i]);
    });
  }
  // dz, in place, becomes the gradient of x, or of the sum in its place.
  __device__ __forceinline__ void finish(int64_t at, float r, float m1, float m2,
                                         const float (&a)[W], const float (&h)[W],
                                         float (&d)[W]) const {
#pragma unroll
    for (int i = 0; i < W; ++i) d[i] = (d[i] * a[i] - m1 - h[i] * m2) * r;
    if (!grad_sum.defined()) return;
    float g[W];
    read(grad_sum, at, g);
#pragma unroll
    for (int i = 0; i < W; ++i) d[i] += g[i];
  }

  template <class Team>
  __device__ __forceinline__ void operator()(const Team& team, int64_t group, float*) const {
    const GroupPlace place(layout, group);
    const float m = mean != nullptr ? mean[group] : 0.0f, r = rstd[group];
    LongSum s1, s2;
    float a[W], k[W], h[W], d[W];
    place.template each<W>(team, [&](int64_t, int64_t at, int64_t c) {
      affine.at(place.sample, c, a, k);
      slopes(at, m, r, a, k, h, d);
      float of_d = 0.0f, of_dh = 0.0f;
#pragma unroll
      for (int i = 0; i < W; ++i) of_d += d[i] * a[i], of_dh += d[i] * a[i] * h[i];
      s1.add(of_d), s2.add(of_dh);
    });
    const auto mean_of = [&](LongSum& s) { return static_cast<float>(s.of(team) / layout.count); };
    const float m2 = mean_of(s2), m1 = mean != nullptr ? mean_of(s1) : 0.0f;
    if (means != nullptr && team.rank() == 0) means[2 * group] = m1, means[2 * group + 1] = m2;
    // Read once more, from a cache: in registers they would be 48 floats of a row of 768.
    place.template each<W>(team, [&](int64_t, int64_t at, int64_t c) {
      affine.at(place.sample, c, a, k);
      slopes(at, m, r, a, k, h, d);
      finish(at, r, m1, m2, a, h, d);
      write(dx, at, d);
      if (!gate.defined()) return;
      read(gate, place.sample * gate.step + c, a);
#pragma unroll
      for (int i = 0; i < W; ++i) d[i] *= a[i];
      write(d_add, at, d);
    });
  }
};

// Where the sums of a part of a sample's rows go: [samples * parts][3][channels].
struct Partial {
  float* sums;
  int64_t parts, rows;  // of a sample
  bool gated;

  __device__ __forceinline__ float* of(int64_t unit, int sum, int64_t channels) const {
    return sums + (unit * kSums + sum) * channels;
  }
};

// Channels side by side in memory: a block takes 32 W channels of a unit's rows, eight at a time.
template <int W>
__global__ void __launch_bounds__(32 * kRowsOfBlock, 2)
    column_sums(const __grid_constant__ Gradient<W> of, const __grid_constant__ Partial partial) {
  GENFAST_SHARED(float[kRowsOfBlock][32 * W], shared);
  const Layout& layout = of.layout;
  const int64_t C = layout.channels, blocks = (C + 32 * W - 1) / (32 * W);
  const int64_t unit = blockIdx.x / blocks, tile = blockIdx.x - unit * blocks;
  const int64_t sample = unit / partial.parts, part = unit - sample * partial.parts;
  const int64_t per_part = (partial.rows + partial.parts - 1) / partial.parts;
  const int64_t last = (part + 1) * per_part < partial.rows ? (part + 1) * per_part : partial.rows;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t c = (tile * 32 + lane) * W;
  float s[kSums][W] = {}, a[W], k[W], h[W], d[W];
  if (c < C) {
    of.affine.at(sample, c, a, k);
    for (int64_t row = part * per_part + warp; row < last; row += kRowsOfBlock) {
      const int64_t place = sample * partial.rows + row, at = place * C + c;
      const int64_t group =
          layout.order == Order::rows ? place : sample * layout.groups + c / layout.width;
      const float r = of.rstd[group];
      of.slopes(at, of.mean != nullptr ? of.mean[group] : 0.0f, r, a, k, h, d);
#pragma unroll
      for (int i = 0; i < W; ++i) s[0][i] += d[i], s[1][i] += d[i] * h[i];
      if (!partial.gated) continue;
      of.finish(at, r, of.means[2 * group], of.means[2 * group + 1], a, h, d);
      read(of.add, at, h);
#pragma unroll
      for (int i = 0; i < W; ++i) s[2][i] += d[i] * h[i];
    }
  }
  for (int sum = 0; sum < (partial.gated ? kSums : kSums - 1); ++sum) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < W; ++i)
      shared[warp][i * 32 + lane] = sum == 0 ? s[0][i] : sum == 1 ? s[1][i] : s[2][i];
    __syncthreads();
    float* to = partial.of(unit, sum, C);
    for (int at = static_cast<int>(threadIdx.x); at < 32 * W; at += 32 * kRowsOfBlock) {
      const int64_t channel = (tile * 32 + at % 32) * W + at / 32;
      float total = 0.0f;
      for (int w = 0; w < kRowsOfBlock; ++w) total += shared[w][at];
      if (channel < C) to[channel] = total;
    }
  }
}

// Channels outside: the sums of one channel of a sample, a run of memory.
template <int W>
struct RunSums {
  Gradient<W> of;
  Partial partial;

  template <class Team>
  __device__ __forceinline__ void operator()(const Team& team, int64_t row, float*) const {
    const Layout& layout = of.layout;
    const int64_t sample = quotient(row, layout.channels), c = row - sample * layout.channels;
    const int64_t group = sample * layout.groups + c / layout.width;
    const float m = of.mean != nullptr ? of.mean[group] : 0.0f, r = of.rstd[group];
    float a[W], k[W], h[W], d[W];
    of.affine.at(sample, c, a, k);
    LongSum s1, s2;
    for (int64_t j = static_cast<int64_t>(team.rank()) * W; j < layout.inner;
         j += static_cast<int64_t>(team.size()) * W) {
      of.slopes(row * layout.inner + j, m, r, a, k, h, d);
      float of_d = 0.0f, of_dh = 0.0f;
#pragma unroll
      for (int i = 0; i < W; ++i) of_d += d[i], of_dh += d[i] * h[i];
      s1.add(of_d), s2.add(of_dh);
    }
    const auto total = static_cast<float>(s1.of(team));
    const auto total_h = static_cast<float>(s2.of(team));
    if (team.rank() != 0) return;
    partial.of(sample, 0, layout.channels)[c] = total;
    partial.of(sample, 1, layout.channels)[c] = total_h;
  }
};

// samples: those of the call, or the parts of one whose sums need not be told apart by sample.
struct Parameters {
  Line w, b, scale;
  float *dw, *db, *d_scale, *d_shift, *d_gate;
  int64_t samples, channels;
};

// A block takes 32 channels; its warps take samples in turns, and their sums are added in order.
__global__ void __launch_bounds__(32 * kRowsOfBlock, 2)
    finish_parameters(const __grid_constant__ Parameters p,
                      const __grid_constant__ Partial partial) {
  GENFAST_SHARED(double[2][kRowsOfBlock][32], shared);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t C = p.channels, c = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  double dw = 0, db = 0;
  if (c < C) {
    const float w = p.w.defined() ? read_one(p.w.base, p.w.dtype, c) : 1.0f;
    const float b = p.b.defined() ? read_one(p.b.base, p.b.dtype, c) : 0.0f;
    const auto put = [&](float* to, int64_t n, double value) {
      if (to != nullptr) to[n * C + c] = static_cast<float>(value);
    };
    for (int64_t n = warp; n < p.samples; n += kRowsOfBlock) {
      double s1 = 0, s2 = 0, s3 = 0;
      for (int64_t unit = n * partial.parts; unit < (n + 1) * partial.parts; ++unit) {
        s1 += partial.of(unit, 0, C)[c], s2 += partial.of(unit, 1, C)[c];
        if (partial.gated) s3 += partial.of(unit, 2, C)[c];
      }
      double by = 1.0;
      if (p.scale.defined()) by += read_one(p.scale.base, p.scale.dtype, n * p.scale.step + c);
      dw += by * s2, db += by * s1;
      put(p.d_shift, n, s1);
      put(p.d_scale, n, w * s2 + b * s1);
      put(p.d_gate, n, s3);
    }
  }
  shared[0][warp][lane] = dw, shared[1][warp][lane] = db;
  __syncthreads();
  if (warp > 1 || c >= C) return;
  double total = 0;
  for (int i = 0; i < kRowsOfBlock; ++i) total += shared[warp][i][lane];
  float* to = warp == 0 ? p.dw : p.db;
  if (to != nullptr) to[c] = static_cast<float>(total);
}

float* floats(const TensorView& t) { return static_cast<float*>(t.data); }

template <int W>
const char* gradients(const NormalizeBackwardParams& q, const Layout& layout) {
  const NormalizeParams& p = q.forward;
  const TensorView& on = p.x;
  const bool wanted = q.dw.defined() || q.db.defined() || q.d_scale.defined() ||
                      q.d_shift.defined() || q.d_gate.defined();
  const int64_t C = layout.channels, groups = p.group_count();
  Partial partial{floats(q.scratch), 1, layout.inner, p.gate.defined()};
  const int64_t samples = q.samples();
  if (samples == 1) partial.rows *= layout.samples;
  if (wanted && layout.order != Order::runs) partial.parts = q.parts();
  const int64_t units = samples * partial.parts;
  float* means = partial.gated && wanted ? partial.sums + units * kSums * C : nullptr;
  const Gradient<W> of(q, layout, means);
  const char* error = launch_each(of, groups, layout.count, false, on);
  if (error != nullptr || !wanted) return error;
  if (layout.order == Order::runs) {
    error = launch_each(RunSums<W>{of, partial}, samples * C, layout.inner, false, on);
  } else {
    const int64_t blocks = units * ((C + 32 * W - 1) / (32 * W));
    error = launch(column_sums<W>, dim3(static_cast<unsigned>(blocks)), dim3(32 * kRowsOfBlock), 0,
                   on, of, partial);
  }
  if (error != nullptr) return error;
  Parameters to{Line(p.w),         Line(p.b),         Line(p.scale),    floats(q.dw), floats(q.db),
                floats(q.d_scale), floats(q.d_shift), floats(q.d_gate), samples,      C};
  if (samples == 1 && !q.by_sample()) to.samples = partial.parts, partial.parts = 1;
  return launch(finish_parameters, blocks_for(C, 32), dim3(32 * kRowsOfBlock), 0, on, to, partial);
}

}  // namespace

const char* normalize_backward(const NormalizeBackwardParams& q) {
  const TensorView& x = q.forward.x;
  if (x.numel == 0) {
    for (const TensorView* t : {&q.dw, &q.db, &q.d_scale, &q.d_shift, &q.d_gate}) {
      if (t->numel == 0) continue;
      if (const char* error = clear_memory(t->data, 4 * static_cast<size_t>(t->numel), *t))
        return error;
    }
    return nullptr;
  }
  const Layout layout(q.forward);
  if (layout.whole(q.forward, {&q.grad, &q.dx, &q.grad_sum, &q.d_add}))
    return gradients<kGroup>(q, layout);
  return gradients<1>(q, layout);
}

}  // namespace genfast::cuda
