// What both directions share: dense memory as fp32, loops over vectors, the affine of a sample, and
// how a tensor is cut into tasks. Cuts depend on the shape alone, so that threads change no bit.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>

#include "cpu/convert.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "math/normalization.h"

// GCC 12 means its own _mm512_undefined_ps, inlined here.
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace genfast::cpu {
namespace {

constexpr int64_t kBlock = 4096;  // floats that a pass holds in L1: 16 KiB, of x and of grad

// fp32 scratch of one task, whole vectors.
class Floats {
 public:
  explicit Floats(int64_t n) {
    if (n == 0) return;
    memory_.reset(new float[padded(n) + 16]);
    const auto at = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = memory_.get() + ((64 - at % 64) % 64) / 4;
    std::memset(data_, 0, 4 * padded(n));
  }
  operator float*() const { return data_; }

 private:
  static int64_t padded(int64_t n) { return (n + W - 1) / W * W; }
  std::unique_ptr<float[]> memory_;
  float* data_ = nullptr;
};

// What a call's tasks hand on, not filled, in memory that the thread keeps: freed each time, 1.5
// MiB of sums made glibc give 50 MiB of tensors back to the system at every training step.
template <class T>
class Held {
 public:
  explicit Held(int64_t n) : memory_(std::max<int64_t>(1, n * sizeof(T))) {}
  operator T*() const { return reinterpret_cast<T*>(memory_.data()); }

 private:
  Memory memory_;
};

// The memory of a dense tensor as fp32: where it lies, or through a buffer.
class Dense {
 public:
  explicit Dense(const TensorView& t)
      : base_(static_cast<char*>(t.data)), dtype_(t.dtype), size_(dtype_bytes(t.dtype)) {}
  bool direct() const { return dtype_ == Dtype::f32; }
  const char* at(int64_t i) const { return base_ + i * size_; }
  int size() const { return size_; }
  Floats buffer(int64_t n) const { return Floats(direct() ? 0 : n); }  // for read and target
  const float* read(int64_t first, int64_t n, float* buffer) const {
    if (direct()) return reinterpret_cast<const float*>(base_) + first;
    to_f32(base_ + first * size_, dtype_, static_cast<int>(n), buffer);
    return buffer;
  }
  float* target(int64_t first, float* buffer) const {
    return direct() ? reinterpret_cast<float*>(base_) + first : buffer;
  }
  void write(int64_t first, int64_t n, const float* from) const {
    if (!direct()) from_f32(from, static_cast<int>(n), base_ + first * size_, dtype_);
  }

 private:
  char* base_;
  Dtype dtype_;
  int size_;
};

// Asks for the lines of elements [first, ...) before they are used.
class Ahead {
 public:
  Ahead(const Dense& t, int64_t first) : from_(t.at(first)), size_(t.size()) {}
  void read(int64_t i) const { __builtin_prefetch(from_ + i * size_); }
  void write(int64_t i) const { __builtin_prefetch(from_ + i * size_, 1); }

 private:
  const char* from_;
  int64_t size_;
};

// ---- vectors --------------------------------------------------------------------------------

struct Whole {  // all lanes of a vector
  static constexpr int count = W;
};
struct Part {  // the first lanes; the others read `fill` and are not written
  int count;
};
GENFAST_FN f32v take(const float* p, Whole, float = 0.0f) { return load(p); }
GENFAST_FN void put(float* p, f32v v, Whole) { store(p, v); }
// By masks: copying a number of bytes known at run time made a norm of 40 channels take 2.6 times
// as long as one of 48.
#if defined(__AVX512F__)
GENFAST_FN __mmask16 mask_of(Part part) { return static_cast<__mmask16>((1u << part.count) - 1); }
GENFAST_FN f32v take(const float* p, Part part, float fill = 0.0f) {
  return (f32v)_mm512_mask_loadu_ps((__m512)splat(fill), mask_of(part), p);
}
GENFAST_FN void put(float* p, f32v v, Part part) {
  _mm512_mask_storeu_ps(p, mask_of(part), (__m512)v);
}
#elif defined(__AVX2__)
GENFAST_FN __m256i mask_of(Part part) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(part.count),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
GENFAST_FN f32v take(const float* p, Part part, float fill = 0.0f) {
  const __m256i mask = mask_of(part);
  return (f32v)_mm256_blendv_ps((__m256)splat(fill), _mm256_maskload_ps(p, mask),
                                _mm256_castsi256_ps(mask));
}
GENFAST_FN void put(float* p, f32v v, Part part) {
  _mm256_maskstore_ps(p, mask_of(part), (__m256)v);
}
#else
GENFAST_FN f32v take(const float* p, Part part, float fill = 0.0f) {
  f32v v = splat(fill);
  for (int i = 0; i < part.count; ++i) v[i] = p[i];
  return v;
}
GENFAST_FN void put(float* p, f32v v, Part part) {
  for (int i = 0; i < part.count; ++i) p[i] = v[i];
}
#endif

// fn(i, lanes) for the vectors of [0, n).
template <class Fn>
GENFAST_FN void over(int64_t n, Fn&& fn) {
  int64_t i = 0;
  for (; i + W <= n; i += W) fn(i, Whole{});
  if (i < n) fn(i, Part{static_cast<int>(n - i)});
}

// The sum of term(i, lanes) over the vectors of [0, n), in four chains: one add would wait for the
// last. A term of a part is 0 in the lanes beyond.
template <class V, class Term>
GENFAST_FN V vector_sum(int64_t n, Term&& term) {
  V s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    s0 += term(i, Whole{}), s1 += term(i + W, Whole{});
    s2 += term(i + 2 * W, Whole{}), s3 += term(i + 3 * W, Whole{});
  }
  for (; i + W <= n; i += W) s0 += term(i, Whole{});
  if (i < n) s1 += term(i, Part{static_cast<int>(n - i)});
  return (s0 + s1) + (s2 + s3);
}

GENFAST_FN void add_lanes(double* total, int64_t, int64_t c, int count, f32v v) {
  typedef double Doubles __attribute__((vector_size(8 * W)));
  if (count == W) {  // lane by lane, blocks of few rows took 1.5 times as long
    Doubles sum;
    __builtin_memcpy(&sum, total + c, sizeof sum);
    sum += __builtin_convertvector(v, Doubles);
    __builtin_memcpy(total + c, &sum, sizeof sum);
    return;
  }
  float lane[W];
  store(lane, v);
  for (int k = 0; k < count; ++k) total[c + k] += lane[k];
}
GENFAST_FN void add_lanes(double* total, int64_t channels, int64_t c, int count, f32p v) {
  add_lanes(total, channels, c, count, v.a);
  add_lanes(total + channels, channels, c, count, v.b);
}

// The sum of term(r) over rows [0, rows), in four chains.
template <class V, class Term>
GENFAST_FN V row_sum(int64_t rows, Term&& term) {
  V s0{}, s1{}, s2{}, s3{};
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    s0 += term(r), s1 += term(r + 1), s2 += term(r + 2), s3 += term(r + 3);
  for (; r < rows; ++r) s0 += term(r);
  return (s0 + s1) + (s2 + s3);
}

// total[c] += the sum of term(r) over rows [0, rows), term = column(c, lanes) of each vector of
// columns; of a pair, its second lies behind.
template <class V, class Column>
GENFAST_FN void add_columns(int64_t rows, int64_t channels, double* total, Column&& column) {
  over(channels, [&](int64_t c, auto lanes) {
    add_lanes(total, channels, c, lanes.count, row_sum<V>(rows, column(c, lanes)));
  });
}

// ---- statistics -----------------------------------------------------------------------------

struct Statistics {
  float mean, rstd;
};

// A square beyond fp32 is NaN, as in PyTorch: 1 / inf would make silent zeros of the group.
inline float rstd_of(double squares, double count, float eps) {
  return static_cast<float>(1.0 / std::sqrt(squares / count + eps) + (squares - squares));
}

// Of n numbers that read(first, count) hands out in blocks. The mean first, then the squares around
// it: one pass over both would cancel where the mean is large.
template <class Read>
GENFAST_FN Statistics statistics(int64_t n, bool rms, float eps, Read&& read) {
  double total = 0, squares = 0;
  const auto blocks = [&](double& sum, auto&& term) {
    for (int64_t at = 0; at < n; at += kBlock) {
      const int64_t count = std::min(kBlock, n - at);
      const float* q = read(at, count);
      sum += horizontal_sum(
          vector_sum<f32v>(count, [&](int64_t i, auto lanes) { return term(q + i, lanes); }));
    }
  };
  if (!rms) blocks(total, [](const float* q, auto lanes) { return take(q, lanes); });
  const float mean = static_cast<float>(total / n);
  blocks(squares, [&](const float* q, auto lanes) {
    const f32v d = take(q, lanes, mean) - mean;
    return d * d;
  });
  return {mean, rstd_of(squares, static_cast<double>(n), eps)};
}

// ---- the affine -----------------------------------------------------------------------------

// a and b of z = h a + b for a sample, h = (x - mean) rstd: w (1 + scale), b (1 + scale) + shift.
class Affine {
 public:
  explicit Affine(const NormalizeParams& p)
      : channels_(p.planes.channels),
        w_(channels_),
        b_(channels_),
        scale_(p.scale),
        shift_(p.shift),
        gate_(p.gate) {
    read(p.w, 0, w_, 1.0f);
    read(p.b, 0, b_, 0.0f);
  }
  // A row belongs to one sample.
  bool by_sample() const { return scale_.defined() || shift_.defined() || gate_.defined(); }
  const float* w() const { return w_; }
  const float* b() const { return b_; }

  void of(int64_t sample, float* a, float* b, float* scratch) const {
    read(scale_, sample, scratch, 0.0f);
    for (int64_t c = 0; c < channels_; ++c) {
      a[c] = w_[c] * (1.0f + scratch[c]);
      b[c] = b_[c] * (1.0f + scratch[c]);
    }
    if (!shift_.defined()) return;
    read(shift_, sample, scratch, 0.0f);
    for (int64_t c = 0; c < channels_; ++c) b[c] += scratch[c];
  }
  void scale(int64_t sample, int64_t first, int64_t n, float* to) const {
    read(scale_, sample, to, 0.0f, first, n);
  }
  void gate(int64_t sample, float* to) const { read(gate_, sample, to, 1.0f); }

 private:
  void read(const TensorView& t, int64_t row, float* to, float otherwise) const {
    read(t, row, to, otherwise, 0, channels_);
  }
  static void read(const TensorView& t, int64_t row, float* to, float otherwise, int64_t first,
                   int64_t n) {
    if (!t.defined()) return std::fill(to, to + n, otherwise);
    if (t.ndim == 2) first += row * t.strides[0];
    to_f32(static_cast<const char*>(t.data) + first * dtype_bytes(t.dtype), t.dtype,
           static_cast<int>(n), to);
  }
  int64_t channels_;
  Floats w_, b_;
  TensorView scale_, shift_, gate_;
};

// Per-task vectors of a sample.
struct Sample {
  Floats a, b, gate, scratch;
  int64_t of = -1;
  explicit Sample(int64_t channels) : a(channels), b(channels), gate(channels), scratch(channels) {}
  void load(const Affine& affine, int64_t sample) {
    if (sample == of) return;
    affine.of(of = sample, a, b, scratch);
    affine.gate(sample, gate);
  }
};

// ---- cuts -----------------------------------------------------------------------------------

// One thread where a second gains little: 32768 elements take about 10 us.
inline int threads_for(const NormalizeParams& p) { return p.x.numel < 32768 ? 1 : p.threads; }

// [outer][inner][channels] as `samples` of `rows` rows. Few or large samples are cut into parts, of
// small ones a task takes several. Parts cost a pass of memory for each step of a group norm, so 16
// samples of up to 1 MiB, which lie in a second-level cache, stay whole. Each begins with lines
// that nothing asked for: a microsecond.
struct Rows {
  int64_t samples, rows, channels, parts, per_part, per_block, per_task;
  explicit Rows(const NormalizeParams& p, bool by_sample) {
    channels = std::max<int64_t>(1, p.planes.channels);
    samples = by_sample ? p.planes.outer : 1;
    rows = by_sample ? p.planes.inner : p.planes.outer * p.planes.inner;
    const int64_t most = std::max<int64_t>(1, 64 / samples);
    const int64_t least = (samples < 16 ? 16 : 64) * kBlock;
    parts = std::clamp<int64_t>(rows * channels / least, 1, most);
    per_part = (rows + parts - 1) / parts;
    per_block = std::max<int64_t>(1, kBlock / channels);
    per_task = std::max<int64_t>(1, 4 * kBlock / (per_part * channels));
  }
  int64_t units() const { return samples * parts; }  // parts of samples
  int64_t sample(int64_t unit) const { return unit / parts; }
  int64_t rows_of(int64_t unit) const {
    const int64_t begin = unit % parts * per_part;
    return std::max<int64_t>(0, std::min(rows, begin + per_part) - begin);
  }
  int64_t buffer() const { return std::max(kBlock, per_block * channels); }

  // Calls body(unit, scratch) for every unit, with a scratch of make() for each thread: made for
  // each task, it took a microsecond of the 15 that 64 rows of 768 take.
  template <class Make, class Body>
  void each(int threads, Make&& make, Body&& body) const {
    struct Slot {
      std::optional<decltype(make())> scratch;
      std::atomic<bool> busy{false};
    };
    const int64_t tasks = (units() + per_task - 1) / per_task;
    const int count = workers(threads, tasks);
    const std::unique_ptr<Slot[]> slots(new Slot[count]);
    parallel_for(tasks, threads, [&](int64_t task) {
      int i = 0;
      while (slots[i].busy.exchange(true, std::memory_order_acquire)) i = (i + 1) % count;
      Slot& slot = slots[i];
      if (!slot.scratch) slot.scratch.emplace(make());
      for (int64_t u = task * per_task; u < std::min(units(), (task + 1) * per_task); ++u)
        body(u, *slot.scratch);
      slot.busy.store(false, std::memory_order_release);
    });
  }
  // Calls run(first row in the whole tensor, rows) for the blocks of a unit.
  template <class Run>
  void blocks(int64_t unit, Run&& run) const {
    const int64_t begin = unit % parts * per_part, end = std::min(rows, begin + per_part);
    for (int64_t r = begin; r < end; r += per_block)
      run(sample(unit) * rows + r, std::min(per_block, end - r));
  }
};

}  // namespace
}  // namespace genfast::cpu
