// Bias, noise and activation in one pass over chunks of the memory, and its backward.
//
// A chunk is a run of kChunk elements wherever the rows end: what is added differs from row to row
// and is added segment by segment, the activation then runs over whole vectors.
#include <algorithm>
#include <memory>

#include "cpu/kernels.h"
#include "cpu/noise.h"
#include "math/filtering.h"

namespace genfast::cpu::GENFAST_ISA {
namespace {

constexpr int kSegment = 16;  // floats of one partial sum, whatever the vector width
typedef float f32x16 __attribute__((vector_size(4 * kSegment)));

// The dense memory of t as one row.
TensorView flat(const TensorView& t) {
  TensorView v = t;
  v.ndim = 1, v.shape[0] = t.numel, v.strides[0] = 1;
  return v;
}

std::unique_ptr<float[]> widened(const TensorView& t) {
  std::unique_ptr<float[]> to;
  if (!t.defined()) return to;
  to.reset(new float[t.numel + 1]);
  const int size = dtype_bytes(t.dtype);
  for (int64_t i = 0; i < t.numel; i += kChunk)
    to_f32(static_cast<const char*>(t.data) + i * size, t.dtype,
           static_cast<int>(std::min<int64_t>(kChunk, t.numel - i)), to.get() + i);
  return to;
}

// Bias and noise as fp32, and where they fall in the memory of x.
class Added {
 public:
  Added(const BiasActParams& p, bool with_bias, bool with_noise) : planes_(p.planes) {
    if (with_bias) bias_ = widened(p.b);
    if (!with_noise || !(p.draws || p.noise.defined())) return;
    strength_ = *static_cast<const float*>(p.strength.data);
    period_ = planes_.outer * planes_.inner;
    if (!p.draws) {
      noise_ = widened(p.noise);
      period_ = p.noise.numel;
      return;
    }
    // 1 / channels of the tensor: drawn once, and read for every channel
    noise_.reset(new float[period_ + 1]);
    RandomParams r;
    r.out.data = noise_.get(), r.out.device_type = 1, r.out.numel = period_;
    r.out.ndim = 2, r.out.shape[0] = p.drawn_rows;
    r.out.shape[1] = r.out.strides[0] = p.drawn_rows > 0 ? period_ / p.drawn_rows : 0;
    r.out.strides[1] = 1;
    r.noise = p.drawn, r.threads = p.threads;
    random(r);
  }

  bool any() const { return bias_ || noise_; }

  // Calls run(at, count, channel, noise) for the segments of [first, first + n) that lie in one row
  // of the memory: one channel with its noise values, or with channels_inner a run of channels
  // from `channel` on under one noise value. noise: null where there is none.
  template <class Run>
  void segments(int64_t first, int n, Run&& run) const {
    const int64_t length = planes_.channels_inner ? planes_.channels : planes_.inner;
    int64_t row = first / length, column = first - row * length;
    for (int at = 0; at < n; ++row, column = 0) {
      const int count = static_cast<int>(std::min<int64_t>(length - column, n - at));
      if (planes_.channels_inner) {
        run(at, count, column, noise_ ? noise_.get() + row % period_ : nullptr);
      } else {
        const int64_t o = row / planes_.channels;
        run(at, count, row - o * planes_.channels,
            noise_ ? noise_.get() + (o * planes_.inner) % period_ + column : nullptr);
      }
      at += count;
    }
  }

  // z = (x + strength n) + b.
  void add(int64_t first, int n, const float* __restrict x, float* __restrict z) const {
    const float s = strength_;
    segments(first, n, [&](int at, int count, int64_t channel, const float* noise) {
      const float* __restrict from = x + at;
      float* __restrict to = z + at;
      if (planes_.channels_inner) {
        const float shift = noise != nullptr ? s * *noise : 0.0f;
        const float* __restrict b = bias_ ? bias_.get() + channel : nullptr;
        if (b != nullptr && noise != nullptr)
          for (int i = 0; i < count; ++i) to[i] = (from[i] + shift) + b[i];
        else if (b != nullptr)
          for (int i = 0; i < count; ++i) to[i] = from[i] + b[i];
        else
          for (int i = 0; i < count; ++i) to[i] = from[i] + shift;
        return;
      }
      const float b = bias_ ? bias_[channel] : 0.0f;
      if (noise == nullptr)
        for (int i = 0; i < count; ++i) to[i] = from[i] + b;
      else if (bias_)
        for (int i = 0; i < count; ++i) to[i] = (from[i] + s * noise[i]) + b;
      else
        for (int i = 0; i < count; ++i) to[i] = from[i] + s * noise[i];
    });
  }

 private:
  Planes planes_;
  std::unique_ptr<float[]> bias_, noise_;
  float strength_ = 0.0f;
  int64_t period_ = 1;  // of the noise, along [outer][inner]
};

// Sums of a dense run: sixteen lanes, then double.
double sum(const float* p, int n) {
  f32x16 lanes{};
  int i = 0;
  for (; i + kSegment <= n; i += kSegment) {
    f32x16 v;
    __builtin_memcpy(&v, p + i, sizeof v);
    lanes += v;
  }
  double total = 0;
  for (; i < n; ++i) total += p[i];
  if (n >= kSegment)
    for (int k = 0; k < kSegment; ++k) total += lanes[k];
  return total;
}
double dot(const float* p, const float* q, int n) {
  f32x16 lanes{};
  int i = 0;
  for (; i + kSegment <= n; i += kSegment) {
    f32x16 v, w;
    __builtin_memcpy(&v, p + i, sizeof v);
    __builtin_memcpy(&w, q + i, sizeof w);
    lanes += v * w;
  }
  double total = 0;
  for (; i < n; ++i) total += static_cast<double>(p[i]) * q[i];
  if (n >= kSegment)
    for (int k = 0; k < kSegment; ++k) total += lanes[k];
  return total;
}

// Sums of the columns of rows: floats over kRows rows, then double.
class Columns {
 public:
  Columns(double* total, int64_t channels) : total_(total), channels_(channels) {
    if (total != nullptr) sums_.reset(new float[channels]());
  }
  ~Columns() { flush(); }
  void add(const float* __restrict row, int64_t channel, int count) {
    float* __restrict sums = sums_.get() + channel;
    for (int i = 0; i < count; ++i) sums[i] += row[i];
    if (++rows_ == kRows) flush();
  }

 private:
  static constexpr int kRows = 64;
  void flush() {
    if (rows_ == 0) return;
    for (int64_t c = 0; c < channels_; ++c) total_[c] += sums_[c];
    std::fill_n(sums_.get(), channels_, 0.0f);
    rows_ = 0;
  }
  double* total_;
  int64_t channels_;
  std::unique_ptr<float[]> sums_;
  int rows_ = 0;
};

// One thread where a second gains little, see threads_for of the diffusion family.
int threads_for(int64_t numel, int threads) { return numel < 64 * kChunk ? 1 : threads; }

}  // namespace

void bias_act(const BiasActParams& p) {
  const Stage from(flat(p.x)), to(flat(p.y));
  const Added added(p, true, true);
  advise_huge_pages(p.y.data, p.y.numel * dtype_bytes(p.y.dtype));
  with_activation(p.act, [&](auto act) {
    using Act = decltype(act);
    const bool clamped = p.clamp >= 0.0f;
    for_chunks(1, p.x.numel, threads_for(p.x.numel, p.threads),
               [&](int64_t, int64_t, int64_t first, int n) {
                 Chunk buffer, staged;
                 const float* z = from.load(first, n, buffer);
                 if (added.any()) {
                   added.add(first, n, z, staged.data);
                   for (int i = n; i < ((n + 63) & ~63); ++i) staged.data[i] = 0.0f;
                   z = staged.data;
                 }
                 float* y = to.target(first, n, buffer);
                 if (clamped)
                   for (int i = 0; i < n; i += W)
                     store(y + i, clamp_symmetric<f32v>(Act::value(load(z + i), p.alpha) * p.gain,
                                                        splat(p.clamp)));
                 else
                   for (int i = 0; i < n; i += W)
                     store(y + i, Act::value(load(z + i), p.alpha) * p.gain);
                 to.store(first, n, y);
               });
  });
}

void bias_act_backward(const BiasActBackwardParams& q) {
  const BiasActParams& p = q.forward;
  const Stage source(flat(p.x)), grad(flat(q.grad)), to(flat(q.dz));
  const bool strength = q.d_strength.defined(), sums = strength || q.db.defined();
  const Added added(p, !q.from_y, !q.from_y || strength);
  advise_huge_pages(q.dz.data, q.dz.numel * dtype_bytes(q.dz.dtype));
  const int64_t numel = p.x.numel, channels = p.planes.channels;
  // Tasks of whole chunks with sums of their own, cut by the shape alone: the same bits for any
  // number of threads.
  const int64_t chunks = (numel + kChunk - 1) / kChunk;
  const int64_t per_task = std::max<int64_t>(16, (chunks + 63) / 64);
  const int64_t tasks = (chunks + per_task - 1) / per_task;
  std::unique_ptr<double[]> partial;
  if (sums) partial.reset(new double[tasks * (channels + 1) + 1]());

  with_activation(p.act, [&](auto act) {
    using Act = decltype(act);
    const auto run = [&](int64_t first, int n, double* own, Columns& columns) {
      Chunk buffer, held, staged;
      const float* g = grad.load(first, n, held);
      const float* z = source.load(first, n, buffer);
      if (!q.from_y && added.any()) {
        added.add(first, n, z, staged.data);
        for (int i = n; i < ((n + 63) & ~63); ++i) staged.data[i] = 0.0f;
        z = staged.data;
      }
      float* dz = to.target(first, n, buffer);
      if (p.clamp >= 0.0f)
        for (int i = 0; i < n; i += W) {
          const f32v v = load(z + i), y = q.from_y ? v : Act::value(v, p.alpha) * p.gain;
          const f32v size = select(y < 0.0f, -y, y);
          store(dz + i,
                select(size < p.clamp, load(g + i) * (Act::slope(v, p.alpha) * p.gain), f32v{}));
        }
      else
        for (int i = 0; i < n; i += W)
          store(dz + i, load(g + i) * (Act::slope(load(z + i), p.alpha) * p.gain));
      if (sums)
        added.segments(first, n, [&](int at, int count, int64_t channel, const float* noise) {
          if (!p.planes.channels_inner) {
            own[channel] += sum(dz + at, count);
            if (strength) own[channels] += dot(dz + at, noise, count);
            return;
          }
          columns.add(dz + at, channel, count);
          if (strength) own[channels] += *noise * sum(dz + at, count);
        });
      to.store(first, n, dz);
    };
    parallel_for(tasks, threads_for(numel, p.threads), [&](int64_t task) {
      double* own = sums ? partial.get() + task * (channels + 1) : nullptr;
      Columns columns(p.planes.channels_inner ? own : nullptr, channels);
      for (int64_t c = task * per_task; c < std::min(chunks, (task + 1) * per_task); ++c)
        run(c * kChunk, static_cast<int>(std::min<int64_t>(kChunk, numel - c * kChunk)), own,
            columns);
    });
  });

  if (!sums) return;
  std::unique_ptr<double[]> total(new double[channels + 1]());
  for (int64_t t = 0; t < tasks; ++t)
    for (int64_t c = 0; c <= channels; ++c) total[c] += partial[t * (channels + 1) + c];
  if (q.db.defined())
    for (int64_t c = 0; c < channels; ++c)
      static_cast<float*>(q.db.data)[c] = static_cast<float>(total[c]);
  if (strength) *static_cast<float*>(q.d_strength.data) = static_cast<float>(total[channels]);
}

}  // namespace genfast::cpu::GENFAST_ISA
