// Sum, statistics, affine, modulation and activation: x is read from memory once, where a group (of
// channels inside: a sample) fits the second-level cache, and y written once.
#include "cpu/normalization/common.h"

namespace genfast::cpu::GENFAST_ISA {
namespace {

struct Call {
  const NormalizeParams& p;
  Affine affine;
  Dense x, y, add, sum;
  explicit Call(const NormalizeParams& q)
      : p(q), affine(q), x(q.x), y(q.y), add(q.add), sum(q.sum) {}
  void keep(int64_t group, Statistics s) const {
    if (!p.statistics.defined()) return;
    if (!p.rms) p.mean()[group] = s.mean;
    p.rstd()[group] = s.rstd;
  }
  // x + gate add of n elements, whole rows, rounded as `sum` is. buffer: may hold x.
  const float* summed(int64_t first, int64_t n, const float* x, const float* gate, float* buffer,
                      float* added) const {
    const float* h = add.read(first, n, added);
    float* s = sum.target(first, buffer);
    for (int64_t at = 0; at < n; at += p.planes.channels)
      over(p.planes.channels, [=](int64_t c, auto lanes) {
        put(s + at + c, take(x + at + c, lanes) + load(gate + c) * take(h + at + c, lanes), lanes);
      });
    sum.write(first, n, s);
    return sum.read(first, n, buffer);
  }
};

// Layer and RMS norm: a row is a group.
template <class Act>
void each_row(const Call& call) {
  const NormalizeParams& p = call.p;
  const Rows cut(p, call.affine.by_sample());
  const int64_t C = cut.channels;
  const bool in_place = call.x.direct() && !p.add.defined();
  struct Scratch {
    Sample sample;
    Floats buffer, added;
  };
  const auto make = [&] {
    return Scratch{Sample(C), call.x.buffer(cut.buffer()), call.add.buffer(cut.buffer())};
  };
  cut.each(threads_for(p), make, [&](int64_t unit, Scratch& of) {
    of.sample.load(call.affine, cut.sample(unit));
    const float *a = of.sample.a, *b = of.sample.b;
    cut.blocks(unit, [&](int64_t first, int64_t rows) {
      const float* block = call.x.read(first * C, rows * C, of.buffer);
      if (p.add.defined())
        block = call.summed(first * C, rows * C, block, of.sample.gate, of.buffer, of.added);
      float* target = call.y.target(first * C, of.buffer);
      // Lines to come: two rows on (7 % of the time from memory), or of the next block, which is
      // widened or summed as a whole.
      const Ahead next(call.x, (first + (in_place ? 2 : rows)) * C);
      const Ahead next_y(call.y, (first + rows) * C);
      for (int64_t r = 0; r < rows; ++r) {
        const float* q = block + r * C;
        float* y = target + r * C;
        const Statistics s =
            statistics(C, p.rms, p.eps, [&](int64_t at, int64_t) { return q + at; });
        call.keep(first + r, s);
        over(C, [&](int64_t c, auto lanes) {
          next.read(r * C + c);
          if (!call.y.direct()) next_y.write(r * C + c);
          const f32v h = (take(q + c, lanes) - s.mean) * s.rstd;
          put(y + c, Act::value(h * load(a + c) + load(b + c)), lanes);
        });
      }
      call.y.write(first * C, rows * C, target);
    });
  });
}

// Group norm, channels outside: a group is a run of memory.
template <class Act>
void each_run(const Call& call) {
  const NormalizeParams& p = call.p;
  const int64_t G = p.groups, C = p.planes.channels, width = C / G, inner = p.planes.inner;
  const int64_t run = width * inner, groups = p.planes.outer * G;
  const int64_t per_task = std::max<int64_t>(1, 4 * kBlock / std::max<int64_t>(1, run));
  parallel_for((groups + per_task - 1) / per_task, threads_for(p), [&](int64_t task) {
    Sample sample(C);
    const Floats buffer = call.x.buffer(kBlock);
    for (int64_t g = task * per_task; g < std::min(groups, (task + 1) * per_task); ++g) {
      sample.load(call.affine, g / G);
      const Statistics s = statistics(run, p.rms, p.eps, [&](int64_t at, int64_t n) {
        return call.x.read(g * run + at, n, buffer);
      });
      call.keep(g, s);
      for (int64_t j = 0; j < width; ++j) {
        const int64_t c = g % G * width + j;
        const float k = s.rstd * sample.a[c], b = sample.b[c];
        for (int64_t at = 0; at < inner; at += kBlock) {
          const int64_t first = g * run + j * inner + at, n = std::min(kBlock, inner - at);
          const float* q = call.x.read(first, n, buffer);
          float* y = call.y.target(first, buffer);
          over(n, [&](int64_t i, auto lanes) {
            put(y + i, Act::value((take(q + i, lanes) - s.mean) * k + b), lanes);
          });
          call.y.write(first, n, y);
        }
      }
    }
  });
}

// Group norm, channels inside. One pass sums x - k and its square of every channel, k the channel's
// mean over the first block of rows; a second applies. With n rows to a block and N in all,
// (k - mean)^2 <= variance N / n, so what cancels is log2(N / n) bits at worst.
template <class Act>
void each_column(const Call& call) {
  const NormalizeParams& p = call.p;
  const Rows cut(p, true);
  const int64_t C = cut.channels, G = p.groups, width = C / G;
  // Lines of the next block are asked for, which twelve rows side by side hide from the processor:
  // (4, 320, 64, 64) took 1.6 ms without, 0.75 with; backward 3.1 and 1.8.
  const bool large = cut.parts > 1;
  const Held<double> sums(2 * cut.units() * C);  // [units][2][C]
  const Held<float> pivots(cut.units() * C);
  struct Scratch {
    Sample sample;
    Floats mean, buffer;
  };
  const auto make = [&] { return Scratch{Sample(C), Floats(C), call.x.buffer(cut.buffer())}; };
  const auto measure = [&](int64_t unit, Scratch& of) {
    float* pivot = pivots + unit * C;
    double* own = sums + unit * 2 * C;
    std::fill_n(own, 2 * C, 0.0);
    bool known = false;
    cut.blocks(unit, [&](int64_t first, int64_t rows) {
      const float* q = call.x.read(first * C, rows * C, of.buffer);
      if (!known)
        over(C, [=](int64_t c, auto lanes) {
          const f32v sum =
              row_sum<f32v>(rows, [=](int64_t r) { return take(q + r * C + c, lanes); });
          put(pivot + c, sum * (1.0f / rows), lanes);
        });
      known = true;
      const Ahead next(call.x, (first + rows) * C);
      add_columns<f32p>(rows, C, own, [=](int64_t c, auto lanes) {
        const f32v k = take(pivot + c, lanes);
        return [=](int64_t r) {
          if (large) next.read(r * C + c);
          const f32v d = take(q + r * C + c, lanes) - k;
          return f32p{d, d * d};
        };
      });
    });
  };
  // From sums around the pivots k: sum (x - mean)^2 = sum (x - k)^2 - 2 d sum (x - k) + n d^2,
  // d = mean - k.
  const auto of_group = [&](int64_t n, int64_t g) {
    const auto each = [&](auto&& body) {
      for (int64_t u = n * cut.parts; u < (n + 1) * cut.parts; ++u)
        for (int64_t c = g * width; c < (g + 1) * width; ++c)
          body(static_cast<double>(cut.rows_of(u)), static_cast<double>(pivots[u * C + c]),
               sums[u * 2 * C + c], sums[u * 2 * C + C + c]);
    };
    const double count = static_cast<double>(width) * cut.rows;
    double mean = 0, squares = 0;
    each([&](double rows, double k, double s, double) { mean += rows * k + s; });
    mean /= count;
    each([&](double rows, double k, double s, double s2) {
      const double d = mean - k;
      squares += s2 - d * (2 * s - rows * d);
    });
    return Statistics{static_cast<float>(mean), rstd_of(std::max(squares, 0.0), count, p.eps)};
  };
  // Once a sample: made again for each of its parts, they took as long as the passes.
  const Held<Statistics> found(p.planes.outer * G);
  const auto conclude = [&](int64_t n) {
    for (int64_t g = n * G; g < (n + 1) * G; ++g) call.keep(g, found[g] = of_group(n, g % G));
  };
  const auto apply = [&](int64_t unit, Scratch& of) {
    const int64_t n = cut.sample(unit);
    of.sample.load(call.affine, n);
    float *a = of.sample.a, *b = of.sample.b, *mean = of.mean;
    for (int64_t g = 0; g < G; ++g) {
      const Statistics s = found[n * G + g];
      for (int64_t c = g * width; c < (g + 1) * width; ++c) a[c] *= s.rstd, mean[c] = s.mean;
    }
    of.sample.of = -1;  // a now holds more
    cut.blocks(unit, [&](int64_t first, int64_t rows) {
      const float* q = call.x.read(first * C, rows * C, of.buffer);
      float* y = call.y.target(first * C, of.buffer);
      const Ahead next_x(call.x, (first + rows) * C), next_y(call.y, (first + rows) * C);
      const int64_t step = C, end = rows * C;  // by reference, each store could have changed them
      over(C, [=](int64_t c, auto lanes) {
        const f32v k = load(a + c), shift = load(b + c), m = load(mean + c);
        for (int64_t i = c; i < end; i += step) {
          if (large) next_x.read(i), next_y.write(i);
          put(y + i, Act::value((take(q + i, lanes) - m) * k + shift), lanes);
        }
      });
      call.y.write(first * C, rows * C, y);
    });
  };
  if (cut.parts == 1)
    return cut.each(threads_for(p), make, [&](int64_t unit, Scratch& of) {
      measure(unit, of);
      conclude(unit);
      apply(unit, of);
    });
  cut.each(threads_for(p), make, measure);
  parallel_for(cut.samples, threads_for(p), [&](int64_t n) { conclude(n); });
  cut.each(threads_for(p), make, apply);
}

}  // namespace

void normalize(const NormalizeParams& p) {
  if (p.x.numel == 0) return;
  const Call call(p);
  for (const TensorView* t : {&p.y, &p.sum})
    if (t->defined()) advise_huge_pages(t->data, t->numel * dtype_bytes(t->dtype));
  with_activation(p.act, [&](auto act) {
    using Act = decltype(act);
    if (p.groups == 0) return each_row<Act>(call);
    if (p.planes.channels_inner) return each_column<Act>(call);
    each_run<Act>(call);
  });
}

}  // namespace genfast::cpu::GENFAST_ISA
