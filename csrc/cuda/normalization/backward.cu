// The gradient of the norms on CUDA. dz = grad act'(z), h = (x - mean) rstd, and of a channel's
// places S1 = sum dz, S2 = sum dz h, S3 = sum d_sum add. First dx of every group, then, where
// gradients of parameters are wanted, the sums by parts of rows, and their total in a fixed order.
// Of long or scattered groups (strips.cuh) the sums come first: a group's means are made of them.
#include "cuda/normalization/strips.cuh"

namespace genfast::cuda {
namespace {

constexpr int kSums = 3, kRowsOfBlock = 8;

float* floats(const TensorView& t) { return static_cast<float*>(t.data); }

// Of lane i: one number for all, or one of each.
__device__ __forceinline__ float lane(float v, int) { return v; }
template <int W>
__device__ __forceinline__ float lane(const float (&v)[W], int i) {
  return v[i];
}

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

  // x and grad, in place, become h and dz, of one sample, and of one group where M is one number.
  template <class M>
  __device__ __forceinline__ void slopes(const M& m, const M& r, const float (&a)[W],
                                         const float (&k)[W], float (&h)[W], float (&d)[W]) const {
#pragma unroll
    for (int i = 0; i < W; ++i) h[i] = (h[i] - lane(m, i)) * lane(r, i);
    if (act == NormActivation::linear) return;
    with_activation(act, [&](auto of) {
      using Act = decltype(of);
#pragma unroll
      for (int i = 0; i < W; ++i) d[i] *= Act::slope(h[i] * a[i] + k[i]);
    });
  }
  // dz, in place, becomes the gradient of x, or of the sum in its place.
  template <class M>
  __device__ __forceinline__ void finish(int64_t at, const M& r, const M& m1, const M& m2,
                                         const float (&a)[W], const float (&h)[W],
                                         float (&d)[W]) const {
#pragma unroll
    for (int i = 0; i < W; ++i)
      d[i] = (d[i] * a[i] - lane(m1, i) - h[i] * lane(m2, i)) * lane(r, i);
    if (!grad_sum.defined()) return;
    float g[W];
    read(grad_sum, at, g);
#pragma unroll
    for (int i = 0; i < W; ++i) d[i] += g[i];
  }

  template <class Team>
  __device__ __forceinline__ void operator()(const Team& team, int64_t group, float*) const {
    const GroupPlace place(layout, group);
    const int64_t chunk = static_cast<int64_t>(team.size()) * kPieces<W> * W;
    const float m = mean != nullptr ? mean[group] : 0.0f, r = rstd[group];
    float h[kPieces<W>][W], d[kPieces<W>][W];
    const auto slopes_of = [&](int64_t c, float (&a)[W]) {
      float k[W];
      affine.at(place.sample, c, a, k);
      slopes(m, r, a, k, h[0], d[0]);
    };
    double s1 = 0, s2 = 0;
    for (int64_t base = 0; base < layout.count; base += chunk) {
      const Pieces<W, Team> pieces(place, team, base);
      pieces.load(x, h), pieces.load(grad, d);
      float of_d = 0.0f, of_dh = 0.0f;
      pieces.each(
          [&](int64_t, int64_t c) {
            float a[W];
            slopes_of(c, a);
#pragma unroll
            for (int i = 0; i < W; ++i) of_d += d[0][i] * a[i], of_dh += d[0][i] * a[i] * h[0][i];
          },
          h, d);
      s1 += of_d, s2 += of_dh;
    }
    const float m2 = layout.mean_of(team.reduce(s2, Add()));
    const float m1 = mean != nullptr ? layout.mean_of(team.reduce(s1, Add())) : 0.0f;
    if (means != nullptr && team.rank() == 0) means[2 * group] = m1, means[2 * group + 1] = m2;
    const bool held = layout.count <= chunk;
    for (int64_t base = 0; base < layout.count; base += chunk) {
      const Pieces<W, Team> pieces(place, team, base);
      if (!held) pieces.load(x, h), pieces.load(grad, d);
      pieces.each(
          [&](int64_t at, int64_t c) {
            float a[W], k[W];
            if (held)
              affine.at(place.sample, c, a, k);
            else
              slopes_of(c, a);
            finish(at, r, m1, m2, a, h[0], d[0]);
            write(dx, at, d[0]);
            if (!gate.defined()) return;
            read(gate, place.sample * gate.step + c, a);
#pragma unroll
            for (int i = 0; i < W; ++i) d[0][i] *= a[i];
            write(d_add, at, d[0]);
          },
          h, d);
    }
  }
};

// Where the sums of a part of a sample's rows go: [samples * parts][3][channels].
struct Partial {
  float* sums;
  int64_t parts, rows;  // of a sample
  bool gated;
  int64_t step;  // units from a sample to the next: `parts`, if those are not added yet

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
      read(of.x, at, h), read(of.grad, at, d);
      of.slopes(of.mean != nullptr ? of.mean[group] : 0.0f, r, a, k, h, d);
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
      read(of.x, row * layout.inner + j, h), read(of.grad, row * layout.inner + j, d);
      of.slopes(m, r, a, k, h, d);
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
      for (int64_t unit = n * partial.step; unit < n * partial.step + partial.parts; ++unit) {
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

// ---- long or scattered groups -------------------------------------------------------------------

template <int W>
struct StripGroups {  // what the groups of a thread's channels have
  float m[W], r[W], a[W], k[W];

  __device__ __forceinline__ StripGroups(const Strip<W>& strip, const Gradient<W>& of) {
    of.affine.at(strip.sample, strip.channel, a, k);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const int64_t group = strip.group(i);
      m[i] = of.mean[group], r[i] = of.rstd[group];
    }
  }
};

// fn(at, h, dz) of each of a thread's steps, two of which are on their way at once.
template <int W, class Fn>
__device__ __forceinline__ void each_step(const Strip<W>& strip, const Gradient<W>& of,
                                          const StripGroups<W>& g, Fn&& fn) {
#pragma unroll 1
  for (int i = 0; i < strip.steps; i += 2) {
    float h[2][W], d[2][W];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      if (i + u >= strip.steps) continue;
      const int64_t at = strip.first + (i + u) * strip.step;
      read(of.x, at, h[u]), read(of.grad, at, d[u]);
    }
#pragma unroll 1
    for (int u = i; u < i + 2 && u < strip.steps; ++u) {
      of.slopes(g.m, g.r, g.a, g.k, h[0], d[0]);
      fn(strip.first + u * strip.step, h[0], d[0]);
      turn(h), turn(d);
    }
  }
}

template <int W>
__global__ void __launch_bounds__(kStrip, 2)
    strip_sums(const __grid_constant__ Strips strips, const __grid_constant__ Gradient<W> of) {
  const Strip<W> strip(strips);
  float s1[W] = {}, s2[W] = {};
  if (strip.steps > 0) {
    const StripGroups<W> g(strip, of);
    each_step(strip, of, g, [&](int64_t, const float (&h)[W], const float (&d)[W]) {
#pragma unroll
      for (int j = 0; j < W; ++j) s1[j] += d[j], s2[j] += d[j] * h[j];
    });
  }
  strip.leave(strips, 0.0f, s1, s2, JoinSums());
}

// A block adds a group's parts, channel by channel, into the first part's place.
__global__ void __launch_bounds__(kStrip, 4)
    group_means(const __grid_constant__ Strips strips, const __grid_constant__ Affine affine,
                float* means) {
  const Layout& of = strips.layout;
  const int64_t group = blockIdx.x, sample = group / of.groups, unit = sample * strips.parts;
  const int64_t first = (group - sample * of.groups) * of.width;
  const int lanes = of.width < kStrip ? static_cast<int>(of.width) : kStrip;
  const int t = static_cast<int>(threadIdx.x), row = t / lanes, rows = kStrip / lanes;
  Two all{};
  for (int64_t j = t - row * lanes; j - t % lanes < of.width; j += lanes) {
    const int64_t c = first + j;
    float s1[1] = {}, s2[1] = {}, a[1], k[1];
    if (j < of.width && row < rows) {
      for (int64_t part = row; part < strips.parts; part += rows)
        s1[0] += strips.of(unit + part, 0)[c], s2[0] += strips.of(unit + part, 1)[c];
    }
    fold_rows(row, rows, lanes, 0.0f, s1, s2, JoinSums());
    if (j >= of.width || row > 0) continue;
    strips.of(unit, 0)[c] = s1[0], strips.of(unit, 1)[c] = s2[0];
    affine.at(sample, c, a, k);
    all.a += a[0] * s1[0], all.b += a[0] * s2[0];
  }
  all = BlockTeam().reduce(all, JoinSums());
  if (t == 0) means[2 * group] = all.a / of.count, means[2 * group + 1] = all.b / of.count;
}

template <int W>
__global__ void __launch_bounds__(kStrip, 2)
    strip_gradient(const __grid_constant__ Strips strips, const __grid_constant__ Gradient<W> of) {
  const Strip<W> strip(strips);
  if (strip.steps == 0) return;
  const StripGroups<W> g(strip, of);
  float m1[W], m2[W];
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const int64_t group = strip.group(i);
    m1[i] = of.means[2 * group], m2[i] = of.means[2 * group + 1];
  }
  each_step(strip, of, g, [&](int64_t at, const float (&h)[W], float (&d)[W]) {
    of.finish(at, g.r, m1, m2, g.a, h, d);
    write(of.dx, at, d);
  });
}

// ---- launches -----------------------------------------------------------------------------------

bool wants_parameters(const NormalizeBackwardParams& q) {
  return q.dw.defined() || q.db.defined() || q.d_scale.defined() || q.d_shift.defined() ||
         q.d_gate.defined();
}

const char* conclude(const NormalizeBackwardParams& q, const Partial& partial, int64_t samples) {
  const NormalizeParams& p = q.forward;
  const int64_t C = p.planes.channels;
  const Parameters to{
      Line(p.w),         Line(p.b),         Line(p.scale),    floats(q.dw), floats(q.db),
      floats(q.d_scale), floats(q.d_shift), floats(q.d_gate), samples,      C};
  return launch(finish_parameters, blocks_for(C, 32), dim3(32 * kRowsOfBlock), 0, p.x, to, partial);
}

template <int W>
const char* gradients_in_strips(const NormalizeBackwardParams& q, const Layout& layout) {
  const TensorView& on = q.forward.x;
  const int64_t groups = q.forward.group_count();
  const Strips strips(layout, floats(q.scratch), q.parts(), W);
  float* means = floats(q.scratch) + q.scratch.numel - 2 * groups;
  const Gradient<W> of(q, layout, means);
  const char* error = launch(strip_sums<W>, strips.blocks(), dim3(kStrip), 0, on, strips, of);
  if (error == nullptr)
    error = launch(group_means, dim3(static_cast<unsigned>(groups)), dim3(kStrip), 0, on, strips,
                   of.affine, means);
  if (error == nullptr)
    error = launch(strip_gradient<W>, strips.blocks(), dim3(kStrip), 0, on, strips, of);
  if (error != nullptr || !wants_parameters(q)) return error;
  return conclude(q, Partial{strips.sums, 1, 0, false, strips.parts}, layout.samples);
}

template <int W>
const char* gradients(const NormalizeBackwardParams& q, const Layout& layout) {
  const NormalizeParams& p = q.forward;
  const TensorView& on = p.x;
  const bool wanted = wants_parameters(q);
  const int64_t C = layout.channels, groups = p.group_count();
  Partial partial{floats(q.scratch), 1, layout.inner, p.gate.defined(), 1};
  int64_t samples = q.samples();
  if (samples == 1) partial.rows *= layout.samples;
  if (wanted && layout.order != Order::runs) partial.parts = q.parts();
  const int64_t units = samples * partial.parts;
  float* means = partial.gated && wanted ? partial.sums + units * kSums * C : nullptr;
  const Gradient<W> of(q, layout, means);
  const char* error = launch_each<W>(of, groups, layout.count, on);
  if (error != nullptr || !wanted) return error;
  if (layout.order == Order::runs) {
    error = launch_each<W>(RunSums<W>{of, partial}, samples * C, layout.inner, on);
  } else {
    const int64_t blocks = units * ((C + 32 * W - 1) / (32 * W));
    error = launch(column_sums<W>, dim3(static_cast<unsigned>(blocks)), dim3(32 * kRowsOfBlock), 0,
                   on, of, partial);
  }
  if (error != nullptr) return error;
  if (samples == 1 && !q.by_sample()) samples = partial.parts, partial.parts = 1;
  partial.step = partial.parts;
  return conclude(q, partial, samples);
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
  if (in_strips(layout) && q.parts() > 0) {
    if (layout.whole(q.forward, {&q.grad, &q.dx}, layout.side_by_side()))
      return gradients_in_strips<kGroup>(q, layout);
    return gradients_in_strips<1>(q, layout);
  }
  if (layout.whole(q.forward, {&q.grad, &q.dx, &q.grad_sum, &q.d_add}, layout.line))
    return gradients<kGroup>(q, layout);
  return gradients<1>(q, layout);
}

}  // namespace genfast::cuda
