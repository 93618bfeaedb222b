// Up-sampling, filtering and down-sampling of planes in one pass.
//
// Along one axis out[o] = sum over k of f[k] in[(o d + k - p) / u], over the k that divide. With
// o = u m + s and (s d + k - p) / u = d a + r every sum runs over dense runs,
//
//     out_s[m] = sum over taps of c in_r[m + a],   in_r[j] = in[d j + r],
//
// so a row is split into its d phases, filtered, and woven from its u phases; nothing is ever
// multiplied with an inserted zero. A filter of rank one goes down the columns first, into a row
// buffer, then along the row; any other goes along the row once per row of the filter.
#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/stage.h"

namespace genfast::cpu::GENFAST_ISA {
namespace {

struct Tap {
  float c;
  int64_t phase, shift;  // r, a
};

// One axis: the taps of each output phase s that reach the input for some output. So what is kept
// of a row grows with in and out alone, whatever up, down and the padding are.
struct Axis {
  int64_t in, out, up, down;
  int64_t split, woven;  // phases that hold something: of a row, and of the output (two for up = 2)
  Vector<Vector<Tap>> phases;

  Axis(int64_t in, int64_t out, int64_t up, int64_t down, int64_t before, const float* f, int64_t n)
      : in(in),
        out(out),
        up(up),
        down(down),
        split(std::min(down, in)),
        woven(std::min(up, out + 1)),
        phases(woven) {
    for (int64_t s = 0; s < woven; ++s)
      for (int64_t k = 0; k < n; ++k) {
        const int64_t at = s * down + k - before;
        if (f[k] == 0.0f || at % up != 0) continue;
        const int64_t q = at / up, a = q >= 0 ? q / down : -((down - 1 - q) / down);
        const int64_t r = q - a * down, m = std::max<int64_t>(0, -a);  // m: the first that may
        if (m < count(s) && (m + a) * down + r < in) phases[s].push_back({f[k], r, a});
      }
  }
  int64_t count(int64_t s) const { return s < out ? (out - s + up - 1) / up : 0; }  // of phase s
};

// The filter as a correlation: reversed unless `flip`, with its gain. Of rank one: one row and one
// column; else all its rows.
struct Filter {
  int64_t fh, fw;
  bool separable;
  Vector<float> column, row;  // row: of rank one, else fh rows

  explicit Filter(const UpfirdnParams& p) {
    const float* f = static_cast<const float*>(p.f.data);
    const int64_t n = p.f.numel;
    fh = p.f.shape[0], fw = p.f.ndim == 2 ? p.f.shape[1] : n;
    separable = true;
    if (p.f.ndim == 1) {
      const double g = std::sqrt(std::fabs(p.gain)), sign = p.gain < 0 ? -1.0 : 1.0;
      for (int64_t i = 0; i < n; ++i) {
        const double v = f[p.flip ? i : n - 1 - i];
        column.push_back(static_cast<float>(v * g * sign));
        row.push_back(static_cast<float>(v * g));
      }
      return;
    }
    Vector<double> k(n);
    for (int64_t i = 0; i < n; ++i) k[i] = f[p.flip ? i : n - 1 - i];
    int64_t peak = 0;
    for (int64_t i = 0; i < n; ++i)
      if (std::fabs(k[i]) > std::fabs(k[peak])) peak = i;
    const double most = std::fabs(k[peak]);
    for (int64_t i = 0; i < fh; ++i)
      for (int64_t j = 0; j < fw; ++j) {
        const double product =
            most > 0 ? k[i * fw + peak % fw] * k[peak / fw * fw + j] / k[peak] : 0.0;
        // a quarter of an ulp of the largest: not NaN, and no more than rounding the product costs
        separable = separable && std::fabs(k[i * fw + j] - product) <= most * 0x1p-26;
      }
    if (separable) {
      const double scale = most > 0 ? std::sqrt(most) : 1.0, sign = k[peak] < 0 ? -1.0 : 1.0;
      for (int64_t i = 0; i < fh; ++i)
        column.push_back(static_cast<float>(k[i * fw + peak % fw] / scale * p.gain));
      for (int64_t j = 0; j < fw; ++j)
        row.push_back(static_cast<float>(k[peak / fw * fw + j] / scale * sign));
      return;
    }
    column.assign(fh, 1.0f);
    for (double v : k) row.push_back(static_cast<float>(v * p.gain));
  }
};

struct Source {
  const float* at;
  float c;
};

// to[i] (+)= sum of c s[i], added in this order; the loop is compiled once per number of terms.
// Reads and writes whole vectors: up to W - 1 floats past n.
template <int K>
void sum_of(const Source* s, int64_t n, bool first, float* to) {
  for (int64_t i = 0; i < n; i += W) {
    f32v a = load(s[0].at + i) * s[0].c;
    if (!first) a = load(to + i) + a;
#pragma GCC unroll 8
    for (int k = 1; k < K; ++k) a = a + load(s[k].at + i) * s[k].c;
    store(to + i, a);
  }
}
void sums(const Source* s, int64_t terms, int64_t n, bool first, float* to) {
  using Sum = void (*)(const Source*, int64_t, bool, float*);
  static constexpr Sum table[] = {nullptr,   sum_of<1>, sum_of<2>, sum_of<3>, sum_of<4>,
                                  sum_of<5>, sum_of<6>, sum_of<7>, sum_of<8>};
  if (terms == 0 && first)
    for (int64_t i = 0; i < n; i += W) store(to + i, f32v{});
  for (int64_t t = 0; t < terms; t += 8)
    table[std::min<int64_t>(8, terms - t)](s + t, n, first && t == 0, to);
}

int64_t rounded(int64_t n) { return (n + W - 1) / W * W + W; }

struct Buffer {
  Vector<float> data;
  float* get(int64_t n) {
    if (static_cast<int64_t>(data.size()) < n) data.resize(n);
    return data.data();
  }
};

// n values in fp32 to a dtype.
void narrowed(const float* from, int64_t n, char* to, Dtype d) {
  if (d == Dtype::f32) {
    std::copy_n(from, n, reinterpret_cast<float*>(to));
    return;
  }
  const int size = dtype_bytes(d);
  for (int64_t i = 0; i < n; i += kChunk)
    from_f32(from + i, static_cast<int>(std::min<int64_t>(kChunk, n - i)), to + i * size, d);
}

// What one task works with: rows in fp32 that may be read past their end.
class Rows {
 public:
  Rows(const UpfirdnParams& p, const Filter& f, const Axis& y, const Vector<Axis>& x, int64_t pixel)
      : f_(f), y_(y), x_(x), pixel_(pixel), columns_(x[0]) {
    size_ = dtype_bytes(p.x.dtype), dtype_ = p.x.dtype, before_ = p.before[0];
    end_ = static_cast<const char*>(p.x.data) + p.x.numel * size_;
    lead_ = 0, reach_ = (columns_.in + columns_.down - 1) / columns_.down;
    for (const Axis& axis : x)
      for (int64_t s = 0; s < axis.woven; ++s)
        for (const Tap& t : axis.phases[s]) {
          lead_ = std::max(lead_, -t.shift);
          reach_ = std::max(reach_, axis.count(s) + t.shift);
        }
    width_ = columns_.in * pixel_;
    column_.get(rounded(width_));
    copies_.resize(f.fh + 1);  // more than one output row wants
    if (pixel_ == 1) {
      stride_ = lead_ + rounded(reach_);
      phases_.data.assign(columns_.split * stride_ + W, 0.0f);
      woven_stride_ = rounded(columns_.count(0));
      woven_.get(columns_.woven * woven_stride_);
    }
    out_.get(rounded(columns_.out * pixel_));
  }

  // Output row `oy` of the plane (or, pixel > 1, of the image) at `plane`, into `to`.
  void run(const char* plane, int64_t oy, char* to, Dtype dtype) {
    const int64_t m = oy / y_.up, s = oy % y_.up;
    float* out = out_.get(0);
    if (f_.separable) {
      terms_.clear();
      for (const Tap& t : y_.phases[s]) {
        const int64_t row = (m + t.shift) * y_.down + t.phase;
        if (row >= 0 && row < y_.in) terms_.push_back({input(plane, row), t.c});
      }
      const bool dense = pixel_ == 1 && columns_.down == 1;
      float* column = dense ? phases_.get(0) + lead_ : column_.get(0);
      sums(terms_.data(), static_cast<int64_t>(terms_.size()), width_, true, column);
      if (dense) clear(column);
      along(x_[0], column, true, dense);
    } else {
      bool first = true;
      // The taps of an axis of ones: which row of the filter each is follows from its place.
      for (int64_t k = 0; k < f_.fh; ++k) {
        const int64_t at = oy * y_.down + k - before_;
        if (at < 0 || at % y_.up != 0 || at / y_.up >= y_.in) continue;
        along(x_[k], input(plane, at / y_.up), first, false);
        first = false;
      }
      if (first) {
        const int64_t n = pixel_ == 1 ? columns_.woven * woven_stride_ : columns_.out * pixel_;
        std::fill_n(pixel_ == 1 ? woven_.get(0) : out, n, 0.0f);
      }
    }
    if (pixel_ == 1) weave(out);
    narrowed(out, columns_.out * pixel_, to, dtype);
  }

 private:
  // A row of the input, readable up to the next whole vector: in place where memory goes on.
  const float* input(const char* plane, int64_t row) {
    const char* from = plane + row * width_ * size_;
    if (dtype_ == Dtype::f32 && from + rounded(width_) * 4 <= end_)
      return reinterpret_cast<const float*>(from);
    Copy& copy = copies_[row % static_cast<int64_t>(copies_.size())];
    if (copy.from == from) return copy.data.data();
    copy.from = from;
    copy.data.resize(rounded(width_));
    for (int64_t i = 0; i < width_; i += kChunk)
      to_f32(from + i * size_, dtype_, static_cast<int>(std::min<int64_t>(kChunk, width_ - i)),
             copy.data.data() + i);
    return copy.data.data();
  }

  // Zero again what a whole vector wrote past the row.
  void clear(float* row) const {
    for (int64_t i = width_; i < (width_ + W - 1) / W * W; ++i) row[i] = 0.0f;
  }

  void along(const Axis& axis, const float* row, bool first, bool placed) {
    if (pixel_ > 1) {
      float* out = out_.get(0);
      for (int64_t ox = 0; ox < axis.out; ++ox) {
        const int64_t m = ox / axis.up;
        line_.clear();
        for (const Tap& t : axis.phases[ox % axis.up]) {
          const int64_t ix = (m + t.shift) * axis.down + t.phase;
          if (ix >= 0 && ix < axis.in) line_.push_back({row + ix * pixel_, t.c});
        }
        pixel(first, out + ox * pixel_);
      }
      return;
    }
    if (!placed) split(row);
    for (int64_t s = 0; s < axis.woven; ++s) {
      line_.clear();
      for (const Tap& t : axis.phases[s])
        line_.push_back({phases_.get(0) + t.phase * stride_ + lead_ + t.shift, t.c});
      sums(line_.data(), static_cast<int64_t>(line_.size()), axis.count(s), first,
           woven_.get(0) + s * woven_stride_);
    }
  }

  // As `sums`, but with its end exact: the next pixel is already there when sums are added up.
  void pixel(bool first, float* to) {
    const int64_t whole = pixel_ / W * W, terms = static_cast<int64_t>(line_.size());
    if (whole > 0) sums(line_.data(), terms, whole, first, to);
    for (int64_t i = whole; i < pixel_; ++i) {
      float a = first ? 0.0f : to[i];
      for (const Source& s : line_) a = a + s.at[i] * s.c;
      to[i] = a;
    }
  }

  void split(const float* row) {
    const int64_t d = columns_.down, n = columns_.in;
    float* to = phases_.get(0) + lead_;
    if (d == 1) {
      std::copy_n(row, n, to);
    } else if (d == 2) {
      float* __restrict even = to, * __restrict odd = to + stride_;
      for (int64_t j = 0; j < n / 2; ++j) even[j] = row[2 * j], odd[j] = row[2 * j + 1];
      if (n % 2) even[n / 2] = row[n - 1];
    } else {
      for (int64_t i = 0; i < n; ++i) to[i % d * stride_ + i / d] = row[i];
    }
  }

  void weave(float* out) {
    const int64_t u = columns_.up, n = columns_.out;
    const float* from = woven_.get(0);
    if (u == 1) {
      std::copy_n(from, n, out);
    } else if (u == 2) {
      const float* odd = from + woven_stride_;
      for (int64_t m = 0; 2 * m < n; m += W) {
        f32v low, high;
        interleave(load(from + m), load(odd + m), low, high);
        store(out + 2 * m, low);
        if (2 * m + W < n) store(out + 2 * m + W, high);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = from[i % u * woven_stride_ + i / u];
    }
  }

  struct Copy {
    const char* from = nullptr;
    Vector<float> data;
  };

  const Filter& f_;
  const Axis& y_;
  const Vector<Axis>& x_;
  int64_t pixel_;  // floats side by side that belong to one place: 1, or the channels
  const Axis& columns_;
  int64_t width_ = 0, lead_ = 0, reach_ = 0, stride_ = 0, woven_stride_ = 0;
  int64_t before_ = 0;
  int size_ = 4;
  Dtype dtype_;
  const char* end_;
  Vector<Source> terms_, line_;
  Vector<Copy> copies_;
  Buffer column_, phases_, woven_, out_;
};

// A plane at a time, for a filter of rank one and planes that stay in the cache: the phases of the
// plane lie with zeros around them, so that every tap of every row is one run. A row of 28 alone
// costs more to set up than to filter (100 ns a row against 15).
class Planes {
 public:
  // Floats of one task's buffers, at most (256 KiB).
  static constexpr int64_t kMost = 65536;

  Planes(const UpfirdnParams& p, const Axis& y, const Axis& x)
      : p_(p), y_(y), x_(x), size_(dtype_bytes(p.x.dtype)) {
    const Margin rows(y), columns(x);
    lead_y_ = rows.lead, lead_x_ = columns.lead;
    stride_ = columns.lead + columns.reach;
    plane_ = (rows.lead + rows.reach) * stride_;
    high_ = y.count(0) * stride_;
    terms_ = 0;
    for (const Axis* axis : {&y, &x})
      for (const auto& taps : axis->phases) terms_ = std::max<int64_t>(terms_, taps.size());
    past_ = 2 * W + stride_;
    floats_ = y.split * x.split * plane_ + x.split * high_ + y.woven * x.woven * high_ + 3 * past_;
  }
  int64_t floats() const { return floats_; }
  int64_t stride() const { return stride_; }

  // What a task works with.
  class Task {
   public:
    explicit Task(const Planes& s)
        : s_(s),
          in_(s.y_.split * s.x_.split * s.plane_ + s.past_, 0.0f),
          middle_(s.x_.split * s.high_ + s.past_, 0.0f),
          out_(s.y_.woven * s.x_.woven * s.high_ + s.past_),
          line_(s.terms_),
          row_(rounded(std::max(s.x_.in, s.x_.out))) {}

    void run(const char* from, char* to) {
      const Axis &y = s_.y_, &x = s_.x_;
      for (int64_t r = 0; r < y.in; ++r) split(from + r * x.in * s_.size_, r);
      for (int64_t s = 0; s < y.woven; ++s) {
        for (int64_t q = 0; q < x.split; ++q) {
          const float* phase = in_.data() + q * s_.plane_ + s_.lead_y_ * s_.stride_;
          int64_t n = 0;
          for (const Tap& t : y.phases[s])
            line_[n++] = {phase + t.phase * x.split * s_.plane_ + t.shift * s_.stride_, t.c};
          sums(line_.data(), n, y.count(s) * s_.stride_, true, middle_.data() + q * s_.high_);
        }
        for (int64_t u = 0; u < x.woven; ++u) {
          int64_t n = 0;
          for (const Tap& t : x.phases[u])
            line_[n++] = {middle_.data() + t.phase * s_.high_ + s_.lead_x_ + t.shift, t.c};
          sums(line_.data(), n, y.count(s) * s_.stride_, true, plane(s, u));
        }
      }
      for (int64_t r = 0; r < y.out; ++r) weave(r, to + r * x.out * dtype_bytes(s_.p_.y.dtype));
    }

   private:
    float* plane(int64_t s, int64_t u) { return out_.data() + (s * s_.x_.woven + u) * s_.high_; }

    // Row r of the input to its places in the phases.
    void split(const char* from, int64_t r) {
      const int64_t d = s_.x_.down, n = s_.x_.in;
      const float* row = reinterpret_cast<const float*>(from);
      if (s_.p_.x.dtype != Dtype::f32) row = widened(from, n);
      float* to = in_.data() + r % s_.y_.down * s_.x_.split * s_.plane_ +
                  (s_.lead_y_ + r / s_.y_.down) * s_.stride_ + s_.lead_x_;
      if (d == 1) {
        std::copy_n(row, n, to);
      } else if (d == 2) {
        float* __restrict even = to, * __restrict odd = to + s_.plane_;
        for (int64_t j = 0; j < n / 2; ++j) even[j] = row[2 * j], odd[j] = row[2 * j + 1];
        if (n % 2) even[n / 2] = row[n - 1];
      } else {
        for (int64_t i = 0; i < n; ++i) to[i % d * s_.plane_ + i / d] = row[i];
      }
    }

    const float* widened(const char* from, int64_t n) {
      for (int64_t i = 0; i < n; i += kChunk)
        to_f32(from + i * s_.size_, s_.p_.x.dtype,
               static_cast<int>(std::min<int64_t>(kChunk, n - i)), row_.data() + i);
      return row_.data();
    }

    // Row r of the output from its phases.
    void weave(int64_t r, char* to) {
      const int64_t up = s_.x_.up, n = s_.x_.out, at = r / s_.y_.up * s_.stride_;
      const float* from = plane(r % s_.y_.up, 0) + at;
      if (up == 2) {
        const float* odd = from + s_.high_;
        for (int64_t m = 0; 2 * m < n; m += W) {
          f32v low, high;
          interleave(load(from + m), load(odd + m), low, high);
          store(row_.data() + 2 * m, low);
          if (2 * m + W < n) store(row_.data() + 2 * m + W, high);
        }
      } else if (up > 2) {
        for (int64_t i = 0; i < n; ++i) row_[i] = from[i % up * s_.high_ + i / up];
      }
      narrowed(up == 1 ? from : row_.data(), n, to, s_.p_.y.dtype);
    }

    const Planes& s_;
    Vector<float> in_, middle_, out_;
    Vector<Source> line_;
    Vector<float> row_;
  };

 private:
  // Places before a phase, and from its first to the last that a tap or the input reaches.
  struct Margin {
    int64_t lead = 0, reach;
    explicit Margin(const Axis& axis) : reach((axis.in + axis.down - 1) / axis.down) {
      for (int64_t s = 0; s < axis.woven; ++s)
        for (const Tap& t : axis.phases[s]) {
          lead = std::max(lead, -t.shift);
          reach = std::max(reach, axis.count(s) + t.shift);
        }
      reach = std::max(reach, axis.count(0));
    }
  };

  const UpfirdnParams& p_;
  const Axis &y_, &x_;
  int size_;
  int64_t lead_y_, lead_x_, stride_, plane_, high_, terms_, past_, floats_;
};

}  // namespace

void upfirdn2d(const UpfirdnParams& p) {
  if (p.y.numel == 0) return;
  const Filter f(p);
  const int64_t images = p.x.shape[0], channels = p.x.shape[1];
  const int64_t H = p.x.shape[2], Wd = p.x.shape[3], OH = p.y.shape[2], OW = p.y.shape[3];
  const Axis y(H, OH, p.up[0], p.down[0], p.before[0], f.column.data(), f.fh);
  Vector<Axis> x;
  for (int64_t k = 0; k < (f.separable ? 1 : f.fh); ++k)
    x.emplace_back(Wd, OW, p.up[1], p.down[1], p.before[1], f.row.data() + k * f.fw, f.fw);
  advise_huge_pages(p.y.data, p.y.numel * dtype_bytes(p.y.dtype));

  const int64_t pixel = p.channels_inner ? channels : 1;
  const int64_t planes = p.channels_inner ? images : images * channels;
  const int64_t in_bytes = H * Wd * pixel * dtype_bytes(p.x.dtype);
  const int64_t row_bytes = OW * pixel * dtype_bytes(p.y.dtype);
  const int threads = p.y.numel < 32 * kChunk ? 1 : p.threads;
  if (f.separable && pixel == 1) {
    const Planes whole(p, y, x[0]);
    if (whole.floats() <= Planes::kMost) {
      const int64_t group = std::max<int64_t>(1, 16384 / (OH * OW));
      parallel_for((planes + group - 1) / group, threads, [&](int64_t task) {
        Planes::Task work(whole);
        for (int64_t n = task * group; n < std::min(planes, (task + 1) * group); ++n)
          work.run(static_cast<const char*>(p.x.data) + n * in_bytes,
                   static_cast<char*>(p.y.data) + n * OH * row_bytes);
      });
      return;
    }
  }
  // About 16384 output values a task, of several planes or of a part of one.
  const int64_t rows = planes * OH;
  const int64_t per_task = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, OW * pixel));
  const int64_t tasks = (rows + per_task - 1) / per_task;
  parallel_for(tasks, threads, [&](int64_t task) {
    Rows work(p, f, y, x, pixel);
    for (int64_t r = task * per_task; r < std::min(rows, (task + 1) * per_task); ++r)
      work.run(static_cast<const char*>(p.x.data) + r / OH * in_bytes, r % OH,
               static_cast<char*>(p.y.data) + r * row_bytes, p.y.dtype);
  });
}

}  // namespace genfast::cpu::GENFAST_ISA
