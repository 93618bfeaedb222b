// The affine step on CUDA, its log-probability and its gradients: one pass, a thread owns a group
// of eight elements and reads every source that some output needs once. A thread stores after it
// has read, so outputs may lie on top of sources. Compiled with -fmad=false: the CPU's bits.
#include <math.h>

#include "cuda/diffusion/terms.cuh"

namespace genfast::cuda {
namespace {

struct Step {
  Groups groups;
  Rows rows;
  Noise noise;
  Guided guided;
  Stage x, history[kHistory], z, out[kOutputs];
  PerSample threshold;
  unsigned present;  // bit s: source s was given (or is drawn)
  int outputs;
  bool draws, dynamic;
};

// What few steps use, apart so that the everyday launch carries 3 KiB of arguments, not 4.
struct Extras {
  Stage log_variance, mask, known, known_z, sample;
  PerSample level;
  Variance variance;
  float* log_prob;
  bool blend, judge, have_known_z, have_sample;
};
struct NoExtras {};

__device__ __forceinline__ float rounded(float v, Dtype dtype) {
  if (dtype == Dtype::f16) return f32_of_f16(static_cast<uint16_t>(pack_f16(v, 0.0f)));
  if (dtype == Dtype::bf16) return f32_of_bf16(static_cast<uint16_t>(pack_bf16(v, 0.0f)));
  return v;
}

template <class More>
struct StepOp : Step {
  More more;
  static constexpr bool kMore = std::is_same<More, Extras>::value;

  using Sum = double;
  using Prepared = Nothing;
  __device__ __forceinline__ Nothing prepare(int64_t) const { return {}; }
  __device__ __forceinline__ void finish(int64_t b, double total) const {
    if constexpr (kMore) more.log_prob[b] = static_cast<float>(total);
  }
  __device__ __forceinline__ void operator()(const Group& g) const {
    sum(g, rows.sample(g.row), {});
  }

  // Writes the outputs; returns the log-density of the group's elements where it is wanted.
  __device__ __forceinline__ double sum(const Group& g, int64_t b, Nothing) const {
    const float* row = rows(g.row);
    const auto coefficient = [&](int o, int s) { return output_row(row, o)[s]; };
    const auto used = [&](int s) {
      bool any = false;
      for (int o = 0; o < outputs; ++o) any |= coefficient(o, s) != 0.0f;
      return any && (present >> s & 1u);
    };
    bool judge = false;
    if constexpr (kMore) judge = more.judge;

    Terms sums[kOutputs];
    const auto add = [&](int s, const float (&v)[kGroup]) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o)
        if (o < outputs && !(judge && o == 0 && s == kZ)) sums[o].add(v, coefficient(o, s));
    };

    float m[kGroup], v[kGroup], x0[kGroup];
    const bool wants_x0 = used(kX0);
    const bool has_x = used(kX) || (wants_x0 && row[0] != 0.0f);
    const bool has_m = used(kM) || (wants_x0 && row[1] != 0.0f);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) v[i] = m[i] = 0.0f;
    if (has_x) load(x, g.index, g.low, g.high, v);
    if (has_m) guided.load(g, b, m);
    if (has_x) add(kX, v);
    if (has_m) add(kM, m);
    if (wants_x0 && (has_x || has_m)) {
      const float d_x = row[0], d_m = row[1], clip = row[2], s = threshold(b, 0, 1.0f);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        float at = !has_x ? m[i] * d_m : !has_m ? v[i] * d_x : v[i] * d_x + m[i] * d_m;
        at = clamp_symmetric<float>(at, clip);
        if (dynamic) at = clamp_symmetric<float>(at, s) / s;
        x0[i] = at;
      }
      add(kX0, x0);
    }
#pragma unroll 1
    for (int h = 0; h < kHistory; ++h) {
      if (!used(kH1 + h)) continue;
      load(history[h], g.index, g.low, g.high, v);
      add(kH1 + h, v);
    }
    float noisy[kGroup] = {};
    if (used(kZ)) {
      if (draws)
        noise_of<NormalMap>(noise, g, noisy);
      else
        load(z, g.index, g.low, g.high, noisy);
      if constexpr (kMore) {
        if (more.variance != Variance::fixed) {
          load(more.log_variance, g.index, g.low, g.high, v);
#pragma unroll
          for (int i = 0; i < kGroup; ++i)
            noisy[i] *= more.variance == Variance::learned
                            ? std_learned<float>(v[i])
                            : std_learned_range<float>(v[i], row[4], row[5]);
        }
      }
      add(kZ, noisy);
    }

    double density = 0;
    if constexpr (kMore) {
      if (judge) density = judged(g, row, noisy, sums[0].v);
      if (more.blend) blended(g, b, sums[0].v);
    }
#pragma unroll
    for (int o = 0; o < kOutputs; ++o)
      if (o < outputs) store(out[o], g.index, g.low, g.high, sums[o].v);
    return density;
  }

  // mean -> sample, given or drawn and rounded as the caller will see it; its log-density.
  __device__ __forceinline__ double judged(const Group& g, const float* row,
                                           const float (&noisy)[kGroup],
                                           float (&mean)[kGroup]) const {
    const float std = output_row(row, 0)[kZ], inverse = 1.0f / std;
    float s[kGroup];
    if (more.have_sample) {
      load(more.sample, g.index, g.low, g.high, s);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) s[i] = rounded(mean[i] + noisy[i] * std, out[0].dtype);
    }
    double squares = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float d = (s[i] - mean[i]) * inverse;
      if (i >= g.low && i < g.high) squares += d * d;
      mean[i] = s[i];
    }
    return -0.5 * squares -
           (g.high - g.low) * (log(fabs(static_cast<double>(std))) + 0.91893853320467274);
  }

  // mask v + (1 - mask) (level[0] known + level[1] noise).
  __device__ __forceinline__ void blended(const Group& g, int64_t b, float (&v)[kGroup]) const {
    const float a = more.level(b, 0, 1.0f), c = more.level(b, 1, 0.0f);
    float k[kGroup], e[kGroup], w[kGroup];
    load(more.known, g.index, g.low, g.high, k);
    load(more.mask, g.index, g.low, g.high, w);
    const bool noised = more.have_known_z || (c != 0.0f && draws);
    if (more.have_known_z)
      load(more.known_z, g.index, g.low, g.high, e);
    else if (noised)
      noise_of<NormalMap>(noise, g, e);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float target = k[i] * a;
      if (noised) target = target + e[i] * c;
      v[i] = v[i] * w[i] + target * (1.0f - w[i]);
    }
  }
};

struct StepBackward {
  Groups groups;
  Rows rows;
  Guided guided;
  Stage x, mask, grad[kOutputs], d_x, d_models[kModels], d_history[kHistory], d_z;
  PerSample threshold;
  bool have_grad[kOutputs], want_model[kModels], want_history[kHistory];
  bool want_x, want_m, want_z, have_mask, dynamic;

  __device__ __forceinline__ void operator()(const Group& g) const {
    const float* row = rows(g.row);
    const int64_t b = rows.sample(g.row);
    float go[kOutputs][kGroup] = {};
#pragma unroll
    for (int o = 0; o < kOutputs; ++o)
      if (have_grad[o]) load(grad[o], g.index, g.low, g.high, go[o]);
    if (have_mask && have_grad[0]) {  // of the blend only the generated part counts
      float w[kGroup];
      load(mask, g.index, g.low, g.high, w);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) go[0][i] = go[0][i] * w[i];
    }
    const auto into = [&](int source) {
      Terms terms;
#pragma unroll
      for (int o = 0; o < kOutputs; ++o)
        if (have_grad[o]) terms.add(go[o], output_row(row, o)[source]);
      return terms;
    };
    Terms of_x0 = into(kX0);  // gradient of the unclamped x0
    const bool has_x0 = of_x0.any && (want_x || want_m);
    if (has_x0) {
      const float s = threshold(b, 0, 1.0f);
      const float bound = dynamic ? (row[2] < s ? row[2] : s) : row[2];
      if (bound < from_bits(0x7F800000u)) {
        float xs[kGroup], ms[kGroup];
        load(x, g.index, g.low, g.high, xs);
        guided.load(g, b, ms);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          const float raw = xs[i] * row[0] + ms[i] * row[1];
          const float size = raw < 0.0f ? -raw : raw;
          const float kept = size > bound ? 0.0f : of_x0.v[i];
          of_x0.v[i] = dynamic ? kept / s : kept;
        }
      }
    }
    if (want_x) {
      Terms terms = into(kX);
      if (has_x0) terms.add(of_x0.v, row[0]);
      store(d_x, g.index, g.low, g.high, terms.v);
    }
    if (want_m) {
      Terms terms = into(kM);
      if (has_x0) terms.add(of_x0.v, row[1]);
#pragma unroll 1
      for (int j = 0; j < guided.count; ++j) {
        if (!want_model[j]) continue;
        Terms scaled;
        scaled.add(terms.v, guided.weight(b, j));
        store(d_models[j], g.index, g.low, g.high, scaled.v);
      }
    }
#pragma unroll 1
    for (int h = 0; h < kHistory; ++h)
      if (want_history[h]) store(d_history[h], g.index, g.low, g.high, into(kH1 + h).v);
    if (want_z) store(d_z, g.index, g.low, g.high, into(kZ).v);
  }
};

}  // namespace

const char* diffusion_step(const StepParams& p) {
  const bool judge = p.log_prob.defined(), blend = p.mask.defined();
  Step s{};
  s.guided = Guided(p.models, p.weights);
  while (s.outputs < kOutputs && p.out[s.outputs].defined()) ++s.outputs;
  const int64_t batch = batch_of(p.x);
  const bool per_sample_rows =
      judge || p.threshold.defined() || p.weights.numel > s.guided.count || p.level.numel > 2;
  int64_t rows = larger(noise_rows(p.noise, p.x), per_sample_rows ? batch : 1);
  rows = larger(rows, p.index.defined() ? p.index.numel : 1);
  s.groups = Groups(p.x.numel, rows, p.draws ? p.noise : Noise());
  s.rows = Rows(p.table, p.index, p.row, rows, batch);
  s.noise = p.noise;
  s.x = Stage(p.x), s.z = Stage(p.z);
  s.present = 1u << kX | 1u << kM | 1u << kX0;
  for (int h = 0; h < kHistory; ++h) {
    s.history[h] = Stage(p.history[h]);
    if (p.history[h].defined()) s.present |= 1u << (kH1 + h);
  }
  s.draws = p.draws && !p.z.defined();
  if (s.draws || p.z.defined()) s.present |= 1u << kZ;
  for (int o = 0; o < kOutputs; ++o) s.out[o] = Stage(p.out[o]);
  s.threshold = PerSample(p.threshold, 1);
  s.dynamic = p.threshold.defined();
  if (!judge && !blend && p.variance == Variance::fixed)
    return launch_groups<2>(StepOp<NoExtras>{s, {}}, p.x);
  Extras e{};
  e.log_variance = Stage(p.log_variance), e.mask = Stage(p.mask), e.known = Stage(p.known);
  e.known_z = Stage(p.known_z), e.sample = Stage(p.sample);
  e.level = PerSample(p.level, 2);
  e.variance = p.variance;
  e.log_prob = static_cast<float*>(p.log_prob.data);
  e.blend = blend, e.judge = judge;
  e.have_known_z = p.known_z.defined(), e.have_sample = p.sample.defined();
  const StepOp<Extras> op{s, e};
  return judge ? launch_sums(op, batch, p.scratch, p.x) : launch_groups<2>(op, p.x);
}

const char* diffusion_step_backward(const StepBackwardParams& p) {
  StepBackward s{};
  s.guided = Guided(p.models, p.weights);
  const int64_t batch = batch_of(p.x);
  s.dynamic = p.threshold.defined();
  int64_t rows = s.dynamic || p.weights.numel > s.guided.count ? batch : 1;
  rows = larger(rows, p.index.defined() ? p.index.numel : 1);
  s.groups = Groups(p.x.numel, rows, Noise());
  s.rows = Rows(p.table, p.index, p.row, rows, batch);
  s.threshold = PerSample(p.threshold, 1);
  s.x = Stage(p.x), s.mask = Stage(p.mask), s.d_x = Stage(p.d_x), s.d_z = Stage(p.d_z);
  s.want_x = p.d_x.defined(), s.want_z = p.d_z.defined(), s.have_mask = p.mask.defined();
  for (int o = 0; o < kOutputs; ++o)
    s.grad[o] = Stage(p.grad[o]), s.have_grad[o] = p.grad[o].defined();
  for (int j = 0; j < kModels; ++j) {
    s.d_models[j] = Stage(p.d_models[j]);
    s.want_m |= s.want_model[j] = p.d_models[j].defined();
  }
  for (int h = 0; h < kHistory; ++h)
    s.d_history[h] = Stage(p.d_history[h]), s.want_history[h] = p.d_history[h].defined();
  return launch_groups<2>(s, p.x);
}

}  // namespace genfast::cuda
