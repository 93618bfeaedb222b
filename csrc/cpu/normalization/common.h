// What both directions share: dense memory as fp32, loops over vectors, the affine of a sample, and
// how a tensor is cut into tasks. Cuts depend on the shape alone, so that threads change no bit.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <type_traits>

#include "cpu/convert.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/words.h"
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

// The memory of a dense tensor as fp32: where it lies, or through a buffer.
class Dense {
 public:
  explicit Dense(const TensorView& t)
      : base_(static_cast<char*>(t.data)), dtype_(t.dtype), size_(dtype_bytes(t.dtype)) {}
  bool direct() const { return dtype_ == Dtype::f32; }
  const char* at(int64_t i) const { return base_ + i * size_; }
  int size() const { return size_; }
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

#if defined(__AVX2__)
template <class T>
GENFAST_FN IfWords<T> take(const T* p, Whole, float = 0.0f) {
  return load(p);
}
template <class T>
GENFAST_FN void put(T* p, IfWords<T> v, Whole) {
  store(p, v);
}
template <class T>
GENFAST_FN IfWords<T> take(const T* p, Part part, float fill = 0.0f) {
#if defined(__AVX512F__)
  const Words words = _mm256_maskz_loadu_epi16(mask_of(part), p);
  return (f32v)_mm512_mask_mov_ps((__m512)splat(fill), mask_of(part), (__m512)widened(words, T{}));
#else
  f32v v = splat(fill);
  for (int i = 0; i < part.count; ++i) v[i] = T::wide(p[i]);
  return v;
#endif
}
template <class T>
GENFAST_FN void put(T* p, IfWords<T> v, Part part) {
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, mask_of(part), narrowed(v, T{}));
#else
  for (int i = 0; i < part.count; ++i) p[i] = T::narrow(v[i]);
#endif
}
#endif

// How a kernel meets the elements of its tensors: where they lie, or as fp32 in a buffer.
template <class T>
struct InPlace {
  using type = T;
  static constexpr bool value = true;
};
struct Buffered {
  using type = float;
  static constexpr bool value = false;
};
inline bool all_of(std::initializer_list<const TensorView*> tensors, Dtype d) {
  return std::all_of(tensors.begin(), tensors.end(),
                     [=](const TensorView* t) { return !t->defined() || t->dtype == d; });
}
// fn(E{}) of what serves all that are given; fp32 tensors are also buffers of themselves.
template <class Fn>
void with_words([[maybe_unused]] std::initializer_list<const TensorView*> tensors, Fn&& fn) {
#if defined(__AVX2__)
  if (all_of(tensors, Dtype::bf16)) return fn(InPlace<Bf16>{});
  if (all_of(tensors, Dtype::f16)) return fn(InPlace<Fp16>{});
#endif
  fn(Buffered{});
}
// The same of a group norm. GELU's, which no known model has, meets 16 bits through buffers alone:
// in place they were a fifth of these files' compile time, and its own takes twice as long.
template <class Act, class Fn>
void with_elements_of(std::initializer_list<const TensorView*> tensors, Fn&& fn) {
  if (all_of(tensors, Dtype::f32)) return fn(InPlace<float>{});
  if constexpr (std::is_same_v<Act, Gelu> || std::is_same_v<Act, GeluTanh>)
    fn(Buffered{});
  else
    with_words(tensors, fn);
}
// Elements to read, elements to write, and what follows their writing.
template <class E>
const typename E::type* source(const Dense& t, int64_t first, int64_t n, float* buffer) {
  if constexpr (E::value)
    return reinterpret_cast<const typename E::type*>(t.at(0)) + first;
  else
    return t.read(first, n, buffer);
}
template <class E>
typename E::type* target(const Dense& t, int64_t first, float* buffer) {
  if constexpr (E::value)
    return reinterpret_cast<typename E::type*>(const_cast<char*>(t.at(0))) + first;
  else
    return t.target(first, buffer);
}
template <class E>
void finish(const Dense& t, int64_t first, int64_t n, const typename E::type* from) {
  if constexpr (!E::value) t.write(first, n, from);
}

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

// s1[c] and s2[c], whole vectors, += the sums of both parts of term(r) over rows [0, rows), term =
// column(c, lanes) of each vector of columns.
template <class Column>
GENFAST_FN void add_columns(int64_t rows, int64_t channels, float* s1, float* s2, Column&& column) {
  over(channels, [&](int64_t c, auto lanes) {
    const f32p sum = row_sum<f32p>(rows, column(c, lanes));
    store(s1 + c, load(s1 + c) + sum.a);
    store(s2 + c, load(s2 + c) + sum.b);
  });
}

// The sum of term(i), double, over [0, n), in four chains.
template <class Term>
double sum_of(int64_t n, Term&& term) {
  double s[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; ++k) s[k] += term(i + k);
  for (; i < n; ++i) s[0] += term(i);
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// ---- statistics -----------------------------------------------------------------------------

struct Statistics {
  float mean, rstd;
};

// A square beyond fp32 is NaN, as in PyTorch: 1 / inf would make silent zeros of the group.
inline float rstd_of(double squares, double count, float eps) {
  return static_cast<float>(1.0 / std::sqrt(squares / count + eps) + (squares - squares));
}

// The statistics of what was added so far: numbers with their own mean, and their squares around
// it.
struct Moments {
  double count = 0, mean = 0, squares = 0;
  void add(const Moments& m) {
    if (count == 0) {  // without the divisions, 8 % of rows of 96
      *this = m;
      return;
    }
    const double d = m.mean - mean, all = count + m.count;
    squares += m.squares + d * d * (count * m.count / all);
    mean += d * (m.count / all);
    count = all;
  }
  Statistics statistics(float eps) const {
    return {static_cast<float>(mean), rstd_of(squares, count, eps)};
  }
};

// Of a block, which lies in L1: its sum first, then the squares around its mean, as one pass over
// both would cancel where the mean is large. The differences are summed too: the mean is rounded,
// and of equal numbers nothing else would be left.
template <class T>
GENFAST_FN float block_sum(const T* q, int64_t n) {
  return horizontal_sum(
      vector_sum<f32v>(n, [=](int64_t i, auto lanes) { return take(q + i, lanes); }));
}
template <class T>
GENFAST_FN f32p differences_of(const T* q, int64_t n, float mean) {
  return vector_sum<f32p>(n, [=](int64_t i, auto lanes) {
    const f32v d = take(q + i, lanes, mean) - mean;
    return f32p{d, d * d};
  });
}
template <class T>
GENFAST_FN float block_squares(const T* q, int64_t n) {
  return horizontal_sum(vector_sum<f32v>(n, [=](int64_t i, auto lanes) {
    const f32v d = take(q + i, lanes);
    return d * d;
  }));
}
// sum, squares: of the differences from k, of `count` numbers.
inline Moments moments_of(double count, float k, float sum, float squares) {
  const double s = sum / count, left = squares - s * s * count;
  return {count, k + s, left < 0 ? 0.0 : left};
}

// Of n numbers that read(first, count) hands out in blocks.
template <class Read>
GENFAST_FN Statistics statistics(int64_t n, bool rms, float eps, Read&& read) {
  Moments all;
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t count = std::min(kBlock, n - at);
    const auto* q = read(at, count);
    if (rms) {
      all.add({static_cast<double>(count), 0, block_squares(q, count)});
      continue;
    }
    const float k = block_sum(q, count) / count;
    const f32p found = differences_of(q, count, k);
    all.add(moments_of(static_cast<double>(count), k, horizontal_sum(found.a),
                       horizontal_sum(found.b)));
  }
  return all.statistics(eps);
}

// Rows whose statistics are made at once, step by step: one after the other, each waits for its
// own sums, division and root (of 32 numbers 36 ns a row, at once 19; of 768 300 and 193).
constexpr int kTogether = 8;
inline int64_t rows_together(int64_t channels) {
  return std::clamp<int64_t>(kBlock / channels, 1, kTogether);
}
template <class T>
GENFAST_FN void statistics_of_rows(const T* q, int rows, int64_t n, bool rms, float eps,
                                   Statistics* to) {
  if (n > kBlock) {
    *to = statistics(n, rms, eps, [=](int64_t at, int64_t) { return q + at; });
    return;
  }
  float k[kTogether] = {}, sums[kTogether] = {}, squares[kTogether] = {};
  if (rms) {
    for (int r = 0; r < rows; ++r) squares[r] = block_squares(q + r * n, n);
  } else {
    for (int r = 0; r < rows; ++r) k[r] = block_sum(q + r * n, n);
    for (int r = 0; r < kTogether; ++r) k[r] /= n;
    for (int r = 0; r < rows; ++r) {
      const f32p found = differences_of(q + r * n, n, k[r]);
      sums[r] = horizontal_sum(found.a), squares[r] = horizontal_sum(found.b);
    }
  }
  for (int r = 0; r < kTogether; ++r)
    to[r] = moments_of(static_cast<double>(n), k[r], sums[r], squares[r]).statistics(eps);
}

// ---- the affine -----------------------------------------------------------------------------

// a and b of z = h a + b for a sample, h = (x - mean) rstd: w (1 + scale), b (1 + scale) + shift.
// Those of fp32 are read where they lie, the last vector as a part: copied into new memory, w and b
// of 100,000 channels made a norm take up to four times as long.
class Affine {
 public:
  explicit Affine(const NormalizeParams& p)
      : channels_(p.planes.channels),
        copies_(in_place(p.w) && in_place(p.b) ? 0 : 2 * channels_),
        w_(values_of(p.w, 1.0f, copies_)),
        b_(values_of(p.b, 0.0f, copies_ + channels_)),
        scale_(p.scale),
        shift_(p.shift),
        gate_(p.gate) {}
  // A row belongs to one sample.
  bool by_sample() const { return scale_.defined() || shift_.defined() || gate_.defined(); }
  int64_t channels() const { return channels_; }
  const float* w() const { return w_; }
  const float* b() const { return b_; }

  // Of channels [first, first + n).
  void of(int64_t sample, int64_t first, int64_t n, float* a, float* b, float* scratch) const {
    const float *own_w = w_ + first, *own_b = b_ + first;
    read(scale_, sample, scratch, 0.0f, first, n);
    for (int64_t c = 0; c < n; ++c) {
      a[c] = own_w[c] * (1.0f + scratch[c]);
      b[c] = own_b[c] * (1.0f + scratch[c]);
    }
    if (!shift_.defined()) return;
    read(shift_, sample, scratch, 0.0f, first, n);
    for (int64_t c = 0; c < n; ++c) b[c] += scratch[c];
  }
  void scale(int64_t sample, int64_t first, int64_t n, float* to) const {
    read(scale_, sample, to, 0.0f, first, n);
  }
  void gate(int64_t sample, float* to) const { read(gate_, sample, to, 1.0f); }

 private:
  static bool in_place(const TensorView& t) { return t.defined() && t.dtype == Dtype::f32; }
  const float* values_of(const TensorView& t, float otherwise, float* to) const {
    if (in_place(t)) return static_cast<const float*>(t.data);
    read(t, 0, to, otherwise);
    return to;
  }
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
  Held<float> copies_;
  const float *w_, *b_;
  TensorView scale_, shift_, gate_;
};

// Per-task vectors of a sample; without a condition those of all.
struct Sample {
  const float *a, *b;
  Floats gate;
  explicit Sample(const Affine& affine, bool gated = false)
      : a(affine.w()),
        b(affine.b()),
        gate(gated ? affine.channels() : 0),
        own_a_(own(affine)),
        own_b_(own(affine)),
        scratch_(own(affine)) {
    if (gated && !affine.by_sample()) affine.gate(0, gate);
  }
  void load(const Affine& affine, int64_t sample) {
    if (sample == of_ || !affine.by_sample()) return;
    affine.of(of_ = sample, 0, affine.channels(), own_a_, own_b_, scratch_);
    a = own_a_, b = own_b_;
    if (gate != nullptr) affine.gate(sample, gate);
  }

 private:
  static int64_t own(const Affine& affine) { return affine.by_sample() ? affine.channels() : 0; }
  Floats own_a_, own_b_, scratch_;
  int64_t of_ = -1;
};

// ---- cuts -----------------------------------------------------------------------------------

// One thread where a second gains little: 32768 elements take about 10 us.
inline int threads_for(const NormalizeParams& p) { return p.x.numel < 32768 ? 1 : p.threads; }

// Threads, each with a scratch of make(): made for each task, it took a microsecond of the 15 that
// 64 rows of 768 take.
template <class Make>
class Team {
 public:
  Team(int threads, int64_t most_tasks, Make make)
      : threads_(threads),
        count_(workers(threads, most_tasks)),
        make_(make),
        slots_(new Slot[count_]) {}
  int64_t size() const { return count_; }
  // Calls body(task, scratch) for task in [0, tasks).
  template <class Body>
  void run(int64_t tasks, Body&& body) const {
    parallel_for(tasks, threads_, [&](int64_t task) {
      int i = 0;
      while (slots_[i].busy.exchange(true, std::memory_order_acquire)) i = (i + 1) % count_;
      Slot& slot = slots_[i];
      if (!slot.scratch) slot.scratch.emplace(make_());
      body(task, *slot.scratch);
      slot.busy.store(false, std::memory_order_release);
    });
  }

 private:
  struct Slot {
    std::optional<std::invoke_result_t<Make>> scratch;
    std::atomic<bool> busy{false};
  };
  int threads_, count_;
  Make make_;
  std::unique_ptr<Slot[]> slots_;
};

// Rows side by side of a group norm with channels inside, where no buffer bounds them: of the first
// pass, which sums columns; of the second, which from memory is fastest as one stream ((4, 640, 32,
// 32), backward: 757 us, four rows 866), from caches not ((4, 1280, 16, 16): 468 and 364).
// Of few channels more, so that a block is worth its start.
inline int64_t rows_summed(int64_t channels) { return std::max<int64_t>(16, 2048 / channels); }
inline int64_t rows_applied(int64_t channels, int64_t elements) {
  return elements < (1 << 21) ? std::max<int64_t>(4, 2048 / channels)
                              : std::max<int64_t>(1, 512 / channels);
}

// [outer][inner][channels] as `samples` of `rows` rows. Few or large samples are cut into parts, of
// small ones a task takes several. Parts cost a pass of memory for each step of a group norm, so 16
// samples of up to 1 MiB, which lie in a second-level cache, stay whole. Each begins with lines
// that nothing asked for: a microsecond. With a sum four blocks lie in L1.
struct Rows {
  int64_t samples, rows, channels, parts, per_part, per_block, per_task;
  Rows(const NormalizeParams& p, bool by_sample) {
    channels = std::max<int64_t>(1, p.planes.channels);
    samples = by_sample ? p.planes.outer : 1;
    rows = by_sample ? p.planes.inner : p.planes.outer * p.planes.inner;
    const int64_t most = std::max<int64_t>(1, 64 / samples);
    const int64_t large = (samples < 16 ? 16 : 64) * kBlock;
    const int64_t least = p.groups ? large : std::clamp(rows * channels / 4, 4 * kBlock, large);
    parts = std::clamp<int64_t>(rows * channels / least, 1, most);
    per_part = (rows + parts - 1) / parts;
    per_block = std::max<int64_t>(1, kBlock / (p.add.defined() ? 4 : 1) / channels);
    per_task = std::max<int64_t>(1, 4 * kBlock / (per_part * channels));
  }
  int64_t units() const { return samples * parts; }  // parts of samples
  int64_t sample(int64_t unit) const { return unit / parts; }
  int64_t rows_of(int64_t unit) const {
    const int64_t begin = unit % parts * per_part;
    return std::max<int64_t>(0, std::min(rows, begin + per_part) - begin);
  }
  int64_t buffer() const { return std::max(kBlock, per_block * channels); }

  // Calls body(unit, scratch) for every unit.
  template <class Make, class Body>
  void each(int threads, Make&& make, Body&& body) const {
    const int64_t tasks = (units() + per_task - 1) / per_task;
    Team<Make>(threads, tasks, make).run(tasks, [&](int64_t task, auto& scratch) {
      for (int64_t u = task * per_task; u < std::min(units(), (task + 1) * per_task); ++u)
        body(u, scratch);
    });
  }
  // first(unit, scratch) for the units of a sample, between(sample), then second(unit, scratch): of
  // whole samples at once, or of as many as keep the threads busy, whose second pass finds in a
  // cache what the first has read.
  template <class Make, class First, class Between, class Second>
  void each_sample(int threads, Make&& make, First&& first, Between&& between,
                   Second&& second) const {
    if (parts == 1)
      return each(threads, make, [&](int64_t unit, auto& scratch) {
        first(unit, scratch);
        between(unit);
        second(unit, scratch);
      });
    const Team<Make> team(threads, units(), make);
    const int64_t at_once = std::max<int64_t>(1, 2 * team.size() / parts);
    for (int64_t n = 0; n < samples; n += at_once) {
      const int64_t here = std::min(at_once, samples - n), begin = n * parts;
      team.run(here * parts, [&](int64_t i, auto& scratch) { first(begin + i, scratch); });
      parallel_for(here, threads, [&](int64_t i) { between(n + i); });
      team.run(here * parts, [&](int64_t i, auto& scratch) { second(begin + i, scratch); });
    }
  }
  // Calls run(first row in the whole tensor, rows) for the blocks of a unit.
  template <class Run>
  void blocks(int64_t unit, Run&& run) const {
    blocks(unit, per_block, run);
  }
  template <class Run>
  void blocks(int64_t unit, int64_t block, Run&& run) const {
    const int64_t begin = unit % parts * per_part, end = std::min(rows, begin + per_part);
    for (int64_t r = begin; r < end; r += block)
      run(sample(unit) * rows + r, std::min(block, end - r));
  }
};

// Channels outside: groups that are runs of memory.
struct Runs {
  int64_t groups, channels, width, inner, run, count;  // groups of a sample, and of all
  explicit Runs(const NormalizeParams& p)
      : groups(p.groups),
        channels(p.planes.channels),
        width(channels / groups),
        inner(p.planes.inner),
        run(width * inner),
        count(p.planes.outer * groups) {}
  // How far on the lines are that a last pass asks for, of the next group: without, its first pass
  // waited for memory ((16, 128, 32, 32) 2.0 ms, with 1.0).
  int64_t ahead() const { return std::min(run, 8 * kBlock); }
  // Calls body(group, its sample, its first channel, scratch) for every group.
  template <class Make, class Body>
  void each(int threads, Make&& make, Body&& body) const {
    const int64_t per_task = std::max<int64_t>(1, 4 * kBlock / std::max<int64_t>(1, run));
    const int64_t tasks = (count + per_task - 1) / per_task;
    Team<Make>(threads, tasks, make).run(tasks, [&](int64_t task, auto& scratch) {
      for (int64_t g = task * per_task; g < std::min(count, (task + 1) * per_task); ++g)
        body(g, g / groups, g % groups * width, scratch);
    });
  }
};

// total += sums, which start again.
inline void flush(float* sums, int64_t n, double* total) {
  for (int64_t i = 0; i < n; ++i) total[i] += sums[i];
  std::fill(sums, sums + n, 0.0f);
}

// Rows summed in fp32 before the sums in fp64 take them.
constexpr int64_t kRowsInFloat = 32;

}  // namespace
}  // namespace genfast::cpu
