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
  template <class E, class T = typename E::type>
  const T* summed(int64_t first, int64_t n, const T* x, const float* gate, float* buffer,
                  float* added) const {
    const T* h = source<E>(add, first, n, added);
    T* s = target<E>(sum, first, buffer);
    for (int64_t at = 0; at < n; at += p.planes.channels)
      over(p.planes.channels, [=](int64_t c, auto lanes) {
        put(s + at + c, take(x + at + c, lanes) + load(gate + c) * take(h + at + c, lanes), lanes);
      });
    finish<E>(sum, first, n, s);
    return source<E>(sum, first, n, buffer);
  }
};

// Layer and RMS norm: a row is a group.
template <class Act, class E>
void each_row(const Call& call) {
  using T = typename E::type;
  const NormalizeParams& p = call.p;
  const Rows cut(p, call.affine.by_sample());
  const int64_t C = cut.channels;
  const bool row_by_row = (E::value || call.x.direct()) && !p.add.defined();
  const bool widened = !E::value && !call.y.direct();
  struct Scratch {
    Sample sample;
    Floats buffer, added;
  };
  const auto make = [&] {
    // x's and y's, of which a row of 100,000 came as fresh pages at every call.
    return Scratch{Sample(call.affine, p.add.defined()),
                   Floats(E::value || call.x.direct() ? 0 : cut.buffer()),
                   Floats(E::value || call.add.direct() ? 0 : cut.buffer())};
  };
  cut.each(threads_for(p), make, [&](int64_t unit, Scratch& of) {
    of.sample.load(call.affine, cut.sample(unit));
    const float *a = of.sample.a, *b = of.sample.b;
    cut.blocks(unit, [&](int64_t first, int64_t rows) {
      const T* block = source<E>(call.x, first * C, rows * C, of.buffer);
      if (p.add.defined())
        block = call.summed<E>(first * C, rows * C, block, of.sample.gate, of.buffer, of.added);
      T* results = target<E>(call.y, first * C, of.buffer);
      // Lines to come: of the next rows (7 % of the time from memory), or of the next block, which
      // is widened or summed as a whole.
      const int64_t most = rows_together(C), rest = row_by_row ? most : rows;
      const Ahead next(call.x, first * C + std::min(rest * C, kBlock));
      const Ahead next_y(call.y, (first + rows) * C);
      for (int64_t begin = 0; begin < rows; begin += most) {
        const int here = static_cast<int>(std::min(most, rows - begin));
        Statistics found[kTogether];
        statistics_of_rows(block + begin * C, here, C, p.rms, p.eps, found);
        for (int64_t r = begin; r < begin + here; ++r) {
          const T* q = block + r * C;
          T* y = results + r * C;
          const Statistics s = found[r - begin];
          call.keep(first + r, s);
          over(C, [=](int64_t c, auto lanes) {
            next.read(r * C + c);
            if (widened) next_y.write(r * C + c);
            const f32v h = (take(q + c, lanes) - s.mean) * s.rstd;
            put(y + c, Act::value(h * take(a + c, lanes) + take(b + c, lanes)), lanes);
          });
        }
      }
      finish<E>(call.y, first * C, rows * C, results);
    });
  });
}

// Group norm, channels outside: a group is a run of memory.
template <class Act, class E>
void each_run(const Call& call) {
  using T = typename E::type;
  const NormalizeParams& p = call.p;
  const Runs cut(p);
  struct Scratch {
    Floats a, b, scale, buffer;
  };
  const auto make = [&] {
    const int64_t C = cut.width;
    return Scratch{Floats(C), Floats(C), Floats(C), Floats(E::value ? 0 : kBlock)};
  };
  cut.each(threads_for(p), make, [&](int64_t g, int64_t n, int64_t channel, Scratch& of) {
    call.affine.of(n, channel, cut.width, of.a, of.b, of.scale);
    const Statistics s = statistics(cut.run, p.rms, p.eps, [&](int64_t at, int64_t count) {
      return source<E>(call.x, g * cut.run + at, count, of.buffer);
    });
    call.keep(g, s);
    for (int64_t c = 0; c < cut.width; ++c) {
      const float k = s.rstd * of.a[c], b = of.b[c], mean = s.mean;
      for (int64_t at = 0; at < cut.inner; at += kBlock) {
        const int64_t first = g * cut.run + c * cut.inner + at,
                      count = std::min(kBlock, cut.inner - at);
        const T* q = source<E>(call.x, first, count, of.buffer);
        T* y = target<E>(call.y, first, of.buffer);
        const Ahead next(call.x, first + cut.ahead()), next_y(call.y, first + cut.ahead());
        over(count, [=](int64_t i, auto lanes) {
          next.read(i), next_y.write(i);
          put(y + i, Act::value((take(q + i, lanes) - mean) * k + b), lanes);
        });
        finish<E>(call.y, first, count, y);
      }
    }
  });
}

// Group norm, channels inside. One pass sums x - k and its square, k the group's mean over the
// first block of rows; a second applies. With n rows to a block and N in all, (k - mean)^2 <=
// variance N / n, so what cancels is log2(N / n) bits at worst.
template <class Act, class E>
void each_column(const Call& call) {
  using T = typename E::type;
  const NormalizeParams& p = call.p;
  const Rows cut(p, true);
  const int64_t C = cut.channels, G = p.groups, width = C / G;
  const int64_t summed = E::value ? rows_summed(C) : cut.per_block;
  const int64_t applied = E::value ? rows_applied(C, p.x.numel) : cut.per_block;
  const Held<Moments> moments(cut.units() * G);
  struct Scratch {
    Sample sample;
    Floats mean, k, s1, s2, buffer;
    Vector<double> total;  // [2][C]
  };
  const auto make = [&] {
    return Scratch{Sample(call.affine),
                   Floats(C),
                   Floats(C),
                   Floats(C),
                   Floats(C),
                   Floats(E::value ? 0 : cut.buffer()),
                   Vector<double>(2 * C)};
  };
  const auto measure = [&](int64_t unit, Scratch& of) {
    float *pivot = of.mean, *s1 = of.s1, *s2 = of.s2;
    double* total = of.total.data();
    std::fill_n(total, 2 * C, 0.0);
    int64_t unflushed = 0;
    bool known = false;
    cut.blocks(unit, summed, [&](int64_t first, int64_t rows) {
      const T* q = source<E>(call.x, first * C, rows * C, of.buffer);
      if (!known) {
        over(C, [=](int64_t c, auto lanes) {
          store(s1 + c, row_sum<f32v>(rows, [=](int64_t r) { return take(q + r * C + c, lanes); }));
        });
        for (int64_t c = 0; c < C; c += width) {
          const double sum = sum_of(width, [=](int64_t i) { return s1[c + i]; });
          std::fill_n(pivot + c, width, static_cast<float>(sum / (rows * width)));
        }
        std::fill_n(s1, C, 0.0f), std::fill_n(s2, C, 0.0f);
        known = true;
      }
      add_columns(rows, C, s1, s2, [=](int64_t c, auto lanes) {
        const f32v k = load(pivot + c);
        return [=](int64_t r) {
          const f32v d = take(q + r * C + c, lanes) - k;
          return f32p{d, d * d};
        };
      });
      if ((unflushed += rows) < kRowsInFloat) return;
      flush(s1, C, total), flush(s2, C, total + C);
      unflushed = 0;
    });
    flush(s1, C, total), flush(s2, C, total + C);
    const double count = static_cast<double>(width) * cut.rows_of(unit);
    for (int64_t g = 0; g < G; ++g) {
      const double* of_group = total + g * width;
      const double s = sum_of(width, [=](int64_t i) { return of_group[i]; }) / count;
      const double squares = sum_of(width, [=](int64_t i) { return of_group[C + i]; });
      moments[unit * G + g] = {count, pivot[g * width] + s, std::max(squares - s * s * count, 0.0)};
    }
  };
  // Once a sample: made again for each of its parts, they took as long as the passes.
  const Held<Statistics> found(p.planes.outer * G);
  const auto conclude = [&](int64_t n) {
    for (int64_t g = 0; g < G; ++g) {
      Moments all;
      for (int64_t u = n * cut.parts; u < (n + 1) * cut.parts; ++u)
        if (cut.rows_of(u) > 0) all.add(moments[u * G + g]);
      call.keep(n * G + g, found[n * G + g] = all.statistics(p.eps));
    }
  };
  const auto apply = [&](int64_t unit, Scratch& of) {
    const int64_t n = cut.sample(unit);
    of.sample.load(call.affine, n);
    const float *a = of.sample.a, *b = of.sample.b;
    float *k = of.k, *mean = of.mean;
    for (int64_t g = 0; g < G; ++g) {
      const Statistics s = found[n * G + g];
      for (int64_t c = g * width; c < (g + 1) * width; ++c) k[c] = a[c] * s.rstd, mean[c] = s.mean;
    }
    cut.blocks(unit, applied, [&](int64_t first, int64_t rows) {
      const T* q = source<E>(call.x, first * C, rows * C, of.buffer);
      T* y = target<E>(call.y, first * C, of.buffer);
      const int64_t step = C, end = rows * C;  // by reference, each store could have changed them
      over(C, [=](int64_t c, auto lanes) {
        const f32v slope = load(k + c), shift = take(b + c, lanes), m = load(mean + c);
        for (int64_t i = c; i < end; i += step) {
          put(y + i, Act::value((take(q + i, lanes) - m) * slope + shift), lanes);
        }
      });
      finish<E>(call.y, first * C, rows * C, y);
    });
  };
  cut.each_sample(threads_for(p), make, measure, conclude, apply);
}

}  // namespace

void normalize(const NormalizeParams& p) {
  if (p.x.numel == 0) return;
  const Call call(p);
  for (const TensorView* t : {&p.y, &p.sum})
    if (t->defined()) advise_huge_pages(t->data, t->numel * dtype_bytes(t->dtype));
  with_activation(p.act, [&](auto act) {
    using Act = decltype(act);
    if (p.groups == 0) {
      if constexpr (std::is_same_v<Act, NoActivation>)
        return with_words({&p.x, &p.y, &p.add, &p.sum},
                          [&](auto elements) { each_row<Act, decltype(elements)>(call); });
      else
        return each_row<Act, Buffered>(call);  // where the activation is what takes the time
    }
    with_elements_of<Act>({&p.x, &p.y}, [&](auto elements) {
      using E = decltype(elements);
      p.planes.channels_inner ? each_column<Act, E>(call) : each_run<Act, E>(call);
    });
  });
}

}  // namespace genfast::cpu::GENFAST_ISA
