// dz = grad act'(z), S1 = sum dz and S2 = sum dz h over a channel's places, h = (x - mean) rstd,
// and
//     dx = rstd (a dz - mean over the group of a dz - h mean over the group of a dz h)
//     d_shift = S1, d_scale = w S2 + b S1, db = sum over samples of (1 + scale) S1, dw of S2
// where a = w (1 + scale). With sum = x + gate add in x's place dx is the gradient of the sum,
// d_add = gate dx and d_gate = sum dx add. dz lies in dx between its two passes; 16 bits would
// round it, so there it is made again.
#include "cpu/normalization/common.h"

namespace genfast::cpu::GENFAST_ISA {
namespace {

struct Call {
  const NormalizeParams& p;
  const NormalizeBackwardParams& q;
  Affine affine;
  Dense x, grad, dx, grad_sum, add, d_add;
  explicit Call(const NormalizeBackwardParams& all)
      : p(all.forward),
        q(all),
        affine(p),
        x(p.x),
        grad(all.grad),
        dx(all.dx),
        grad_sum(all.grad_sum),
        add(p.add),
        d_add(all.d_add) {}
  float mean(int64_t group) const { return p.rms ? 0.0f : p.mean()[group]; }
  float rstd(int64_t group) const { return p.rstd()[group]; }
  bool sums() const {
    return q.dw.defined() || q.db.defined() || q.d_scale.defined() || q.d_shift.defined();
  }
};

// grad act'(z) of one vector; grad itself without an activation.
template <class Act, class Z>
GENFAST_FN f32v times_slope(f32v grad, Z&& z) {
  if constexpr (std::is_same_v<Act, NoActivation>)
    return grad;
  else
    return grad * Act::slope(z());
}

// The gradients of the parameters from S1 and S2, [samples][parts][2][channels]. By one thread, the
// sums of 128 parts of 768 channels took 4 % of a layer norm's backward.
void of_parameters(const Call& call, int64_t samples, int64_t parts, const double* sums) {
  constexpr int64_t kChannels = 64;  // of a task
  const int64_t C = call.p.planes.channels;
  const NormalizeBackwardParams& q = call.q;
  const float *w = call.affine.w(), *b = call.affine.b();
  const int threads = samples * parts * C < 32768 ? 1 : call.p.threads;
  parallel_for((C + kChannels - 1) / kChannels, threads, [&](int64_t task) {
    const int64_t first = task * kChannels, n_channels = std::min(kChannels, C - first);
    double dw[kChannels] = {}, db[kChannels] = {}, s1[kChannels], s2[kChannels];
    float scale[kChannels];
    const auto put_row = [&](const TensorView& t, int64_t row, auto&& value) {
      float* to = static_cast<float*>(t.data) + row * C + first;
      if (t.defined())
        for (int64_t c = 0; c < n_channels; ++c) to[c] = static_cast<float>(value(c));
    };
    for (int64_t n = 0; n < samples; ++n) {
      const double* own = sums + n * parts * 2 * C + first;
      std::copy_n(own, n_channels, s1), std::copy_n(own + C, n_channels, s2);
      for (int64_t t = 1; t < parts; ++t) {
        own += 2 * C;
        for (int64_t c = 0; c < n_channels; ++c) s1[c] += own[c], s2[c] += own[C + c];
      }
      call.affine.scale(n, first, n_channels, scale);
      for (int64_t c = 0; c < n_channels; ++c) {
        dw[c] += (1.0 + scale[c]) * s2[c];
        db[c] += (1.0 + scale[c]) * s1[c];
      }
      put_row(q.d_shift, n, [&](int64_t c) { return s1[c]; });
      put_row(q.d_scale, n, [&](int64_t c) { return w[first + c] * s2[c] + b[first + c] * s1[c]; });
    }
    put_row(q.dw, 0, [&](int64_t c) { return dw[c]; });
    put_row(q.db, 0, [&](int64_t c) { return db[c]; });
  });
}

// The gradients of weight and bias from x and grad once more, where a part of all rows has no more
// than kFewRows: handed on as two doubles a channel and part, those of three rows of 100,001 were
// half of 1.5 ms.
constexpr int64_t kFewRows = 2;
template <class E>
void of_few_rows(const Call& call, int64_t rows) {
  using T = typename E::type;
  constexpr int64_t kChannels = 1024;  // of a task
  const int64_t C = call.p.planes.channels;
  parallel_for((C + kChannels - 1) / kChannels, threads_for(call.p), [&](int64_t task) {
    const int64_t first = task * kChannels, n = std::min(kChannels, C - first);
    const Floats s1(n), s2(n);
    const Floats held(E::value || call.x.direct() ? 0 : n);
    const Floats given(E::value || call.grad.direct() ? 0 : n);
    double dw[kChannels], db[kChannels];
    std::fill_n(dw, n, 0.0), std::fill_n(db, n, 0.0);
    for (int64_t r = 0; r < rows; ++r) {
      const T* q = source<E>(call.x, r * C + first, n, held);
      const T* g = source<E>(call.grad, r * C + first, n, given);
      const float mean = call.mean(r), rstd = call.rstd(r);
      over(n, [&](int64_t c, auto lanes) {
        const f32v d = take(g + c, lanes);
        store(s1 + c, load(s1 + c) + d);
        store(s2 + c, load(s2 + c) + d * ((take(q + c, lanes, mean) - mean) * rstd));
      });
      if ((r + 1) % kRowsInFloat && r + 1 < rows) continue;
      flush(s1, n, db), flush(s2, n, dw);
    }
    const auto put_row = [&](const TensorView& t, const double* from) {
      if (t.defined()) std::copy_n(from, n, static_cast<float*>(t.data) + first);
    };
    put_row(call.q.dw, dw), put_row(call.q.db, db);
  });
}

// Layer and RMS norm. summed: x was a sum. With an activation dz of a row waits in L1 for the row's
// two means, else it is made again.
template <class Act, bool summed, class E>
void each_row(const Call& call) {
  using T = typename E::type;
  constexpr bool plain = std::is_same_v<Act, NoActivation>;
  const NormalizeParams& p = call.p;
  const Rows cut(p, call.affine.by_sample());
  const int64_t C = cut.channels;
  const bool gated = p.gate.defined(), joined = call.q.grad_sum.defined();
  const bool few = plain && cut.per_part <= kFewRows && !call.affine.by_sample();
  const bool wanted = call.sums() && !few;
  const Held<double> sums(wanted ? cut.units() * 2 * C : 0);
  const Held<double> gates(gated ? cut.units() * C : 0);
  struct Scratch {
    Sample sample;
    Floats held, given, waiting, s1, s2, joins, added, s3;
  };
  const auto make = [&] {
    const auto buffer = [&](bool direct) { return Floats(E::value || direct ? 0 : cut.buffer()); };
    return Scratch{Sample(call.affine, gated),
                   buffer(call.x.direct()),
                   buffer(call.grad.direct() && call.dx.direct()),
                   Floats(plain ? 0 : C),
                   Floats(wanted ? C : 0),
                   Floats(wanted ? C : 0),
                   buffer(call.grad_sum.direct()),
                   buffer(call.add.direct() && call.d_add.direct()),
                   Floats(gated ? C : 0)};
  };
  cut.each(threads_for(p), make, [&](int64_t unit, Scratch& of) {
    of.sample.load(call.affine, cut.sample(unit));
    const float *a = of.sample.a, *b = of.sample.b, *gate = of.sample.gate;
    float *t = of.waiting, *dz = of.s1, *dzh = of.s2, *ds_h = of.s3;
    double *total = sums + unit * 2 * C, *of_gate = gates + unit * C;
    if (wanted) std::fill_n(total, 2 * C, 0.0);
    if (gated) std::fill_n(of_gate, C, 0.0);
    const auto flush_all = [&] {
      if (gated) flush(ds_h, C, of_gate);
      if (wanted) flush(dz, C, total), flush(dzh, C, total + C);
    };
    int64_t unflushed = 0;
    cut.blocks(unit, [&](int64_t first, int64_t rows) {
      const T* block = source<E>(call.x, first * C, rows * C, of.held);
      const T* grads = source<E>(call.grad, first * C, rows * C, of.given);
      T* results = target<E>(call.dx, first * C, of.given);
      const T *joins = nullptr, *adds = nullptr;
      T* d_adds = nullptr;
      if (joined) joins = source<E>(call.grad_sum, first * C, rows * C, of.joins);
      if (gated) {
        adds = source<E>(call.add, first * C, rows * C, of.added);
        d_adds = target<E>(call.d_add, first * C, of.added);
      }
      // Lines to come: of the next row, or of the next block, which is widened as a whole.
      const int64_t next = first + (E::value || call.x.direct() ? 1 : rows);
      const Ahead next_x(call.x, next * C), next_grad(call.grad, next * C);
      const Ahead next_dx(call.dx, next * C);
      // One row after another: two at a time, whose sums over columns are read and written once,
      // were no faster from caches and 10 % slower from memory.
      const auto pass = [&](int64_t r, auto keep) {
        const T *q = block + r * C, *g = grads + r * C;
        T* dx = results + r * C;
        const float mean = call.mean(first + r), rstd = call.rstd(first + r);
        const f32p found = vector_sum<f32p>(C, [&](int64_t c, auto lanes) {
          next_x.read(r * C + c), next_grad.read(r * C + c), next_dx.write(r * C + c);
          const f32v h = (take(q + c, lanes, mean) - mean) * rstd;
          const f32v d = times_slope<Act>(
              take(g + c, lanes), [&] { return h * take(a + c, lanes) + take(b + c, lanes); });
          if constexpr (decltype(keep)::value) {
            store(dz + c, load(dz + c) + d);
            store(dzh + c, load(dzh + c) + d * h);
          }
          const f32v scaled = d * take(a + c, lanes);
          if constexpr (!plain) store(t + c, scaled);
          return f32p{scaled, scaled * h};
        });
        const float m1 = p.rms ? 0.0f : horizontal_sum(found.a) / C;
        const float m2 = horizontal_sum(found.b) / C;
        over(C, [&](int64_t c, auto lanes) {
          const f32v h = (take(q + c, lanes, mean) - mean) * rstd;
          const f32v scaled = plain ? take(g + c, lanes) * take(a + c, lanes) : load(t + c);
          f32v d = ((scaled - m1) - h * m2) * rstd;
          if constexpr (summed) {
            const int64_t at = r * C + c;
            if (joined) d += take(joins + at, lanes);
            if (gated) {
              store(ds_h + c, load(ds_h + c) + d * take(adds + at, lanes));
              put(d_adds + at, d * load(gate + c), lanes);
            }
          }
          put(dx + c, d, lanes);
        });
      };
      for (int64_t r = 0; r < rows; ++r)
        wanted ? pass(r, std::true_type{}) : pass(r, std::false_type{});
      finish<E>(call.dx, first * C, rows * C, results);
      if (gated) finish<E>(call.d_add, first * C, rows * C, d_adds);
      if ((unflushed += rows) < kRowsInFloat) return;
      flush_all();
      unflushed = 0;
    });
    if (unflushed > 0) flush_all();
  });
  if (wanted) of_parameters(call, cut.samples, cut.parts, sums);
  if (call.sums() && few) of_few_rows<E>(call, cut.rows);
  if (!gated) return;
  float* d_gate = static_cast<float*>(call.q.d_gate.data);
  for (int64_t n = 0; n < cut.samples; ++n, d_gate += C)
    for (int64_t c = 0; c < C; ++c) {
      double total = 0;
      for (int64_t u = n * cut.parts; u < (n + 1) * cut.parts; ++u) total += gates[u * C + c];
      d_gate[c] = static_cast<float>(total);
    }
}

// Of the channels of a group with statistics s: dx = k dz + (x - mean) u + v, from the group's
// sums.
struct OfGroup {
  double of_dz = 0, of_dzh = 0;  // the sums of a dz and a dz h
  void add(double s1, double s2) { of_dz += s1, of_dzh += s2; }
  float u(float rstd, double count) const {
    return static_cast<float>(-of_dzh / count * rstd * rstd);
  }
  float v(float rstd, double count) const { return static_cast<float>(-of_dz / count * rstd); }
};

// Group norm, channels outside.
template <class Act, class E>
void each_run(const Call& call) {
  using T = typename E::type;
  const NormalizeParams& p = call.p;
  const Runs cut(p);
  const int64_t C = cut.channels;
  constexpr bool kept = std::is_same_v<E, InPlace<float>> && !std::is_same_v<Act, NoActivation>;
  const Held<double> sums(p.planes.outer * 2 * C);
  struct Scratch {
    Floats a, b, scale, held, given;
  };
  const auto make = [&] {
    const int64_t buffer = E::value ? 0 : kBlock;
    return Scratch{Floats(cut.width), Floats(cut.width), Floats(cut.width), Floats(buffer),
                   Floats(buffer)};
  };
  cut.each(threads_for(p), make, [&](int64_t g, int64_t n, int64_t channel, Scratch& of) {
    double *s1 = sums + n * 2 * C + channel, *s2 = s1 + C;
    call.affine.of(n, channel, cut.width, of.a, of.b, of.scale);
    const float mean = call.mean(g), rstd = call.rstd(g);
    // body(first, count, dx, vectors), where vectors(i, lanes) is dz and x - mean, for a channel
    const auto each = [&](int64_t c, auto again, auto&& body) {
      constexpr bool ready = kept && decltype(again)::value;
      const float k = rstd * of.a[c], b = of.b[c];
      for (int64_t at = 0; at < cut.inner; at += kBlock) {
        const int64_t first = g * cut.run + c * cut.inner + at;
        const int64_t count = std::min(kBlock, cut.inner - at);
        const T* q = source<E>(call.x, first, count, of.held);
        T* dx = target<E>(call.dx, first, of.given);
        const T* d = ready ? dx : source<E>(call.grad, first, count, of.given);
        body(first, count, dx, [=](int64_t i, auto lanes) {
          const f32v from = take(q + i, lanes, mean) - mean, g = take(d + i, lanes);
          if constexpr (ready) return f32p{g, from};
          return f32p{times_slope<Act>(g, [&] { return from * k + b; }), from};
        });
        if (again) finish<E>(call.dx, first, count, dx);
      }
    };
    OfGroup group;
    for (int64_t c = 0; c < cut.width; ++c) {
      double sum = 0, sum_h = 0;
      each(c, std::false_type{}, [&](int64_t, int64_t count, T* dx, auto&& vectors) {
        const f32p found = vector_sum<f32p>(count, [&](int64_t i, auto lanes) {
          const f32p v = vectors(i, lanes);
          if constexpr (kept) put(dx + i, v.a, lanes);
          return f32p{v.a, v.a * v.b};
        });
        sum += horizontal_sum(found.a), sum_h += horizontal_sum(found.b);
      });
      sum_h *= rstd;
      s1[c] = sum, s2[c] = sum_h;
      group.add(of.a[c] * sum, of.a[c] * sum_h);
    }
    const float u = group.u(rstd, static_cast<double>(cut.run));
    const float v = group.v(rstd, static_cast<double>(cut.run));
    for (int64_t c = 0; c < cut.width; ++c)
      each(c, std::true_type{}, [&](int64_t first, int64_t count, T* dx, auto&& vectors) {
        const float k = rstd * of.a[c];
        const int64_t next = first + cut.ahead();
        const Ahead next_x(call.x, next), next_grad(call.grad, next), next_dx(call.dx, next);
        const auto write = [=](int64_t i, auto lanes) {
          const f32p of = vectors(i, lanes);
          put(dx + i, of.a * k + (of.b * u + v), lanes);
        };
        // Of three tensors that lie in a cache this took 1.3 times as long, from memory 0.7 times.
        if (p.x.numel < 1 << 20) return over(count, write);
        over(count, [=](int64_t i, auto lanes) {
          next_x.read(i), next_grad.read(i), next_dx.write(i);
          write(i, lanes);
        });
      });
  });
  if (call.sums()) of_parameters(call, p.planes.outer, 1, sums);
}

// Group norm, channels inside.
template <class Act, class E>
void each_column(const Call& call) {
  using T = typename E::type;
  const NormalizeParams& p = call.p;
  const Rows cut(p, true);
  const int64_t C = cut.channels, G = p.groups, width = C / G;
  const int64_t summed = E::value ? rows_summed(C) : cut.per_block;
  const int64_t applied = E::value ? rows_applied(C, p.x.numel) : cut.per_block;
  const double count = static_cast<double>(width) * cut.rows;
  constexpr bool kept = std::is_same_v<E, InPlace<float>> && !std::is_same_v<Act, NoActivation>;
  const Held<double> sums(cut.units() * 2 * C);
  const Held<OfGroup> of_units(cut.units() * G);
  struct Scratch {  // k = rstd a
    Sample sample;
    Floats mean, rstd, k, u, v, s1, s2, held, given;
    int64_t n = -1;
  };
  const auto make = [&] {
    const int64_t buffer = E::value ? 0 : cut.buffer();
    return Scratch{Sample(call.affine), Floats(C), Floats(C), Floats(C),      Floats(C),
                   Floats(C),           Floats(C), Floats(C), Floats(buffer), Floats(buffer)};
  };
  const auto load_sample = [&](int64_t n, Scratch& of) {
    if (of.n == n) return;
    of.sample.load(call.affine, of.n = n);
    for (int64_t c = 0, g = n * G; c < C; c += width, ++g)
      for (int64_t i = c; i < c + width; ++i) {
        of.mean[i] = call.mean(g), of.rstd[i] = call.rstd(g);
        of.k[i] = of.rstd[i] * of.sample.a[i];
      }
  };
  const auto slopes = [&](int64_t unit, Scratch& of) {
    load_sample(cut.sample(unit), of);
    float *s1 = of.s1, *s2 = of.s2;
    double* own = sums + unit * 2 * C;
    std::fill_n(own, 2 * C, 0.0);
    int64_t unflushed = 0;
    cut.blocks(unit, summed, [&](int64_t first, int64_t rows) {
      const T* q = source<E>(call.x, first * C, rows * C, of.held);
      const T* g = source<E>(call.grad, first * C, rows * C, of.given);
      T* dx = target<E>(call.dx, first * C, of.given);
      add_columns(rows, C, s1, s2, [&](int64_t c, auto lanes) {
        const f32v m = load(of.mean + c), k = load(of.k + c), b = take(of.sample.b + c, lanes);
        return [=](int64_t r) {
          const int64_t i = r * C + c;
          const f32v from = take(q + i, lanes) - m;
          const f32v d = times_slope<Act>(take(g + i, lanes), [&] { return from * k + b; });
          if (kept) put(dx + i, d, lanes);
          return f32p{d, d * from};
        };
      });
      if ((unflushed += rows) < kRowsInFloat) return;
      flush(s1, C, own), flush(s2, C, own + C);
      unflushed = 0;
    });
    flush(s1, C, own), flush(s2, C, own + C);
    for (int64_t c = 0; c < C; ++c) own[C + c] *= of.rstd[c];
    for (int64_t g = 0; g < G; ++g) {
      const float* a = of.sample.a + g * width;
      const double *sum = own + g * width, *sum_h = sum + C;
      of_units[unit * G + g] = {sum_of(width, [=](int64_t i) { return a[i] * sum[i]; }),
                                sum_of(width, [=](int64_t i) { return a[i] * sum_h[i]; })};
    }
  };
  // Once a sample, as in the forward.
  const Held<OfGroup> found(p.planes.outer * G);
  const auto conclude = [&](int64_t n) {
    for (int64_t g = 0; g < G; ++g) {
      OfGroup all;
      for (int64_t u = n * cut.parts; u < (n + 1) * cut.parts; ++u)
        all.add(of_units[u * G + g].of_dz, of_units[u * G + g].of_dzh);
      found[n * G + g] = all;
    }
  };
  const auto apply = [&](int64_t unit, Scratch& of) {
    const int64_t n = cut.sample(unit);
    load_sample(n, of);
    for (int64_t c = 0, g = n * G; c < C; c += width, ++g) {
      std::fill_n(of.u + c, width, found[g].u(of.rstd[c], count));
      std::fill_n(of.v + c, width, found[g].v(of.rstd[c], count));
    }
    cut.blocks(unit, applied, [&](int64_t first, int64_t rows) {
      const T* q = source<E>(call.x, first * C, rows * C, of.held);
      T* dx = target<E>(call.dx, first * C, of.given);
      const T* d = kept ? dx : source<E>(call.grad, first * C, rows * C, of.given);
      const int64_t step = C, end = rows * C;  // by reference, each store could have changed them
      over(C, [&, step, end](int64_t c, auto lanes) {
        const f32v m = load(of.mean + c), k = load(of.k + c), b = take(of.sample.b + c, lanes);
        const f32v u = load(of.u + c), v = load(of.v + c);
        for (int64_t i = c; i < end; i += step) {
          const f32v from = take(q + i, lanes) - m;
          f32v dz = take(d + i, lanes);
          if constexpr (!kept) dz = times_slope<Act>(dz, [&] { return from * k + b; });
          put(dx + i, dz * k + (from * u + v), lanes);
        }
      });
      finish<E>(call.dx, first * C, rows * C, dx);
    });
  };
  cut.each_sample(threads_for(p), make, slopes, conclude, apply);
  if (call.sums()) of_parameters(call, cut.samples, cut.parts, sums);
}

}  // namespace

void normalize_backward(const NormalizeBackwardParams& q) {
  for (const TensorView* t : {&q.dw, &q.db, &q.d_scale, &q.d_shift, &q.d_gate})
    if (t->numel > 0) std::memset(t->data, 0, 4 * t->numel);
  if (q.forward.x.numel == 0) return;
  const Call call(q);
  for (const TensorView* t : {&q.dx, &q.d_add})
    if (t->defined()) advise_huge_pages(t->data, t->numel * dtype_bytes(t->dtype));
  with_activation(q.forward.act, [&](auto act) {
    using Act = decltype(act);
    if (q.forward.groups == 0) {
      const auto rows = [&](auto elements) {
        using E = decltype(elements);
        q.grad_sum.defined() || q.forward.gate.defined() ? each_row<Act, true, E>(call)
                                                         : each_row<Act, false, E>(call);
      };
      if constexpr (std::is_same_v<Act, NoActivation>)
        return with_words({&q.forward.x, &q.grad, &q.dx, &q.grad_sum, &q.forward.add, &q.d_add},
                          rows);
      else
        return rows(Buffered{});
    }
    with_elements_of<Act>({&q.forward.x, &q.grad, &q.dx}, [&](auto elements) {
      using E = decltype(elements);
      q.forward.planes.channels_inner ? each_column<Act, E>(call) : each_run<Act, E>(call);
    });
  });
}

}  // namespace genfast::cpu::GENFAST_ISA
