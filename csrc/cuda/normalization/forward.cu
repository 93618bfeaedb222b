// Group, layer and RMS norm on CUDA: a group by a warp or a block, which keeps its values in shared
// memory between the statistics and the result (up to 24,576; larger groups are read again, from
// the second-level cache where they fit it).
#include "cuda/normalization/common.cuh"

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

  // x, or x + gate add rounded to the dtype of `sum`, which is written.
  __device__ __forceinline__ void first_read(int64_t sample, int64_t at, int64_t c,
                                             float (&v)[W]) const {
    read(x, at, v);
    if (!add.defined()) return;
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
  __device__ __forceinline__ void operator()(const Team& team, int64_t group, float* cache) const {
    const GroupPlace place(layout, group);
    // Neighbouring threads keep element i of their pieces side by side: no two in one bank. What a
    // thread has put down is read by the same thread.
    const int64_t pieces = layout.count / W;
    const auto again = [&](int64_t j, int64_t at, float (&v)[W]) {
      if (cache == nullptr) return read(add.defined() ? sum : x, at, v);
#pragma unroll
      for (int i = 0; i < W; ++i) v[i] = cache[j / W + i * pieces];
    };
    LongSum first;
    place.template each<W>(team, [&](int64_t j, int64_t at, int64_t c) {
      float v[W], part = 0.0f;
      first_read(place.sample, at, c, v);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        if (cache != nullptr) cache[j / W + i * pieces] = v[i];
        part += rms ? v[i] * v[i] : v[i];
      }
      first.add(part);
    });
    double squares = first.of(team);
    float m = 0.0f;
    if (!rms) {
      m = static_cast<float>(squares / layout.count);
      LongSum second;
      place.template each<W>(team, [&](int64_t j, int64_t at, int64_t) {
        float v[W], part = 0.0f;
        again(j, at, v);
#pragma unroll
        for (int i = 0; i < W; ++i) part += (v[i] - m) * (v[i] - m);
        second.add(part);
      });
      squares = second.of(team);
    }
    const auto r = static_cast<float>(1.0 / sqrt(squares / layout.count + eps));
    if (team.rank() == 0) {
      if (mean != nullptr) mean[group] = m;
      if (rstd != nullptr) rstd[group] = r;
    }
    place.template each<W>(team, [&](int64_t j, int64_t at, int64_t c) {
      float v[W], a[W], k[W];
      again(j, at, v);
      affine.at(place.sample, c, a, k);
      with_activation(act, [&](auto of) {
        using Act = decltype(of);
#pragma unroll
        for (int i = 0; i < W; ++i) v[i] = Act::value((v[i] - m) * r * a[i] + k[i]);
      });
      write(y, at, v);
    });
  }
};

}  // namespace

const char* normalize(const NormalizeParams& p) {
  if (p.x.numel == 0) return nullptr;
  const Layout layout(p);
  const int64_t groups = p.group_count();
  if (layout.whole(p, {&p.y, &p.sum}))
    return launch_each(Normalize<kGroup>(p, layout), groups, layout.count, true, p.x);
  return launch_each(Normalize<1>(p, layout), groups, layout.count, true, p.x);
}

}  // namespace genfast::cuda
