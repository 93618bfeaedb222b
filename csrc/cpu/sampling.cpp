// sampling on the CPU. One pass each: noise is drawn in L1 beside the elements it meets.
#include "math/sampling.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>

#include "cpu/kernels.h"
#include "cpu/noise.h"

namespace genfast::cpu::GENFAST_ISA {
namespace {

// Calls fn with a tag object per transform: the loops below are compiled once for each.
template <class Fn>
void with_transform(Transform t, Fn&& fn) {
  switch (t) {
    case Transform::none:
      return fn(NoneTransform{});
    case Transform::tanh:
      return fn(TanhTransform{});
    case Transform::exp:
      return fn(ExpTransform{});
  }
}

constexpr int kStep = lane<f32p>::width;  // elements of one turn: two vectors in flight

inline float lane_sum(f32p v) {
  float s = 0;
  for (int i = 0; i < W; ++i) s += v.a[i] + v.b[i];
  return s;
}

// Sum over the first n elements of a chunk, whatever the padding of the last turn holds.
class Sum {
 public:
  void add(f32p term, int left) {
    if (left >= kStep) {
      lanes_ += term;
      return;
    }
    float t[kStep];
    store(t, term);
    for (int j = 0; j < left; ++j) tail_ += t[j];
  }
  double total() const { return static_cast<double>(lane_sum(lanes_)) + tail_; }

 private:
  f32p lanes_{};
  float tail_ = 0;
};

// Rows so that no chunk crosses a side row or a seed row.
inline int64_t split_rows(int64_t rows, const Noise& noise, const TensorView& t) {
  return std::max(rows, noise_rows(noise, t));
}

}  // namespace

void reparameterize(const ReparameterizeParams& p) {
  const Stage mu(p.mu), logvar(p.logvar), y(p.y);
  const bool want_y = p.y.defined();
  if (want_y) advise_huge_pages(p.y.data, p.y.numel * dtype_bytes(p.y.dtype));
  const int64_t rows = split_rows(p.rows, p.noise, p.mu), cols = rows ? p.mu.numel / rows : 0;
  const NoiseAt noise(p.noise, p.mu);
  const int64_t per_row = (cols + kChunk - 1) / kChunk;
  std::unique_ptr<double[]> partial;  // one sum per chunk, added in chunk order: no thread matters
  if (p.side_kind != Side::none) partial.reset(new double[rows * per_row + 1]);

  with_transform(p.transform, [&](auto transform) {
    using T = decltype(transform);
    for_spans(rows, cols, p.threads, [&](int64_t row, int64_t first, int n, int height) {
      Chunk a, b, staged;
      NoiseChunk noise_buffer, terms;
      const int64_t at = row * cols + first;
      const bool need_noise = want_y || p.side_kind == Side::log_prob;
      mu.prefetch(at, n), logvar.prefetch(at, n);
      const float* e =
          need_noise ? noise.values<NormalMap>(at, n, noise_buffer) : noise_buffer.data;
      const float* m = mu.load(at, n, a);
      const float* l = logvar.load(at, n, b);
      float* to = want_y ? y.target(at, n, staged) : staged.data;
      Sum sum;
      const auto add = [&](int i, f32p term) {
        height == 1 ? sum.add(term, n - i) : store(terms.data + i, term);
      };
      for (int i = 0; i < n; i += kStep) {
        const f32p mi = load_pair(m + i), li = load_pair(l + i), ei = load_pair(e + i);
        const Draw<f32p> d = draw(mi, li, ei);
        const f32p yi = T::template value<f32p>(d.z);
        store(to + i, yi);
        if (p.side_kind == Side::kl) add(i, gaussian_kl(mi, li, d.sigma));
        if (p.side_kind == Side::log_prob)
          add(i, log_density(ei, li, T::template log_slope<f32p>(d.z, yi)));
      }
      if (want_y) y.store(at, n, to);
      if (!partial) return;
      if (height == 1) partial[row * per_row + first / kChunk] = sum.total();
      for (int r = 0; height > 1 && r < height; ++r) {
        Sum own;
        for (int i = 0; i < cols; i += kStep)
          own.add(load_pair(terms.data + r * cols + i), static_cast<int>(cols) - i);
        partial[row + r] = own.total();
      }
    });
  });

  if (!partial) return;
  float* side = static_cast<float*>(p.side.data);
  const int64_t chunks = rows * per_row / std::max<int64_t>(p.rows, 1);
  for (int64_t r = 0; r < p.rows; ++r) {
    double s = 0;
    for (int64_t c = r * chunks; c < (r + 1) * chunks; ++c) s += partial[c];
    side[r] = static_cast<float>(s * p.side_scale);
  }
}

void reparameterize_backward(const ReparameterizeBackwardParams& p) {
  const Stage mu(p.mu), logvar(p.logvar), grad_y(p.grad_y), d_mu(p.d_mu), d_logvar(p.d_logvar);
  for (const TensorView* t : {&p.d_mu, &p.d_logvar})
    advise_huge_pages(t->data, t->numel * dtype_bytes(t->dtype));
  const bool have_y = p.grad_y.defined(), have_side = p.grad_side.defined();
  const bool is_kl = p.side_kind == Side::kl, is_log_prob = have_side && !is_kl;
  const float* grad_side = static_cast<const float*>(p.grad_side.data);
  const int64_t rows = split_rows(p.rows, p.noise, p.mu), cols = rows ? p.mu.numel / rows : 0;
  const int64_t split = p.rows ? rows / p.rows : 1;  // seed rows per side row
  const NoiseAt noise(p.noise, p.mu);

  with_transform(p.transform, [&](auto transform) {
    using T = decltype(transform);
    for_spans(rows, cols, p.threads, [&](int64_t row, int64_t first, int n, int height) {
      Chunk a, b, g, staged_mu, staged_logvar, scales;
      NoiseChunk noise_buffer;
      const int64_t at = row * cols + first;
      mu.prefetch(at, n), logvar.prefetch(at, n);
      if (have_y) grad_y.prefetch(at, n);
      const float* e =
          have_y || is_log_prob ? noise.values<NormalMap>(at, n, noise_buffer) : noise_buffer.data;
      const float* m = mu.load(at, n, a);
      const float* l = logvar.load(at, n, b);
      const float* gy = have_y ? grad_y.load(at, n, g) : nullptr;
      const auto side = [&](int r) { return grad_side[(row + r) / split] * p.side_scale; };
      const f32v one = splat(have_side && height == 1 ? side(0) : 0.0f);
      for (int r = 0; have_side && height > 1 && r < height; ++r)
        std::fill_n(scales.data + r * cols, cols, side(r));
      float* to_mu = d_mu.target(at, n, staged_mu);
      float* to_logvar = d_logvar.target(at, n, staged_logvar);
      for (int i = 0; i < n; i += kStep) {
        const f32p mi = load_pair(m + i), li = load_pair(l + i), ei = load_pair(e + i);
        const Draw<f32p> d = draw(mi, li, ei);
        const f32p gs = height == 1 ? f32p{one, one} : load_pair(scales.data + i);
        f32p gz{}, g_logvar{};
        if (have_y || is_log_prob) {
          const f32p yi = T::template value<f32p>(d.z);
          if (have_y) gz = load_pair(gy + i) * T::template slope<f32p>(yi);
          if (is_log_prob) {
            gz -= T::template log_slope_gradient<f32p>(yi) * gs;
            g_logvar = f32p{} + gs * -0.5f;
          }
          g_logvar += (gz * (d.sigma * ei)) * 0.5f;
        }
        if (have_side && is_kl) {
          gz += mi * gs;
          g_logvar += (d.sigma * d.sigma - 1.0f) * (gs * 0.5f);
        }
        store(to_mu + i, gz);
        store(to_logvar + i, g_logvar);
      }
      d_mu.store(at, n, to_mu);
      d_logvar.store(at, n, to_logvar);
    });
  });
}

// ---- rows over the last dimension -------------------------------------------------------------

namespace {

// Fp32 scratch of whole vectors.
class Row {
 public:
  explicit Row(int64_t cols) : data_(new float[((cols + 63) & ~int64_t{63}) + 64]) {}
  float* data() { return data_.get(); }

 private:
  std::unique_ptr<float[]> data_;
};

struct RowShape {
  int64_t rows, cols, per_seed;  // per_seed: rows that share a seed

  RowShape(const TensorView& t, const Noise& noise) {
    cols = t.ndim > 0 ? t.shape[t.ndim - 1] : 1;
    rows = cols > 0 ? t.numel / cols : 0;
    const int64_t seeds = noise_rows(noise, t);
    per_seed = seeds > 0 ? rows / seeds : 1;
    if (t.ndim < 2) per_seed = rows;
  }
};

template <class Fn>
void for_rows(const RowShape& s, int threads, Fn&& fn) {
  if (s.rows * s.cols < 4 * kChunk) threads = 1;
  const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(s.cols, 1));
  parallel_for((s.rows + grain - 1) / grain, threads, [&](int64_t task) {
    Row scratch(s.cols);
    const int64_t end = std::min(s.rows, (task + 1) * grain);
    for (int64_t r = task * grain; r < end; ++r) fn(r, scratch.data());
  });
}

// to[i] = (logits[i] + g_i) * inv_tau for the row; returns the maximum, NaN when there is a NaN.
template <class Map>
float perturb(const Stage& logits, const Noise& noise, const RowShape& s, int64_t row,
              float inv_tau, float* to) {
  const int64_t seed_row = noise.n_seeds > 1 ? row / s.per_seed : 0;
  const uint64_t seed = seed_of_row(noise, seed_row);
  const int64_t element = noise.offset + (row - seed_row * s.per_seed) * s.cols;
  float top = -INFINITY;
  bool nan = false;
  for (int64_t c = 0; c < s.cols; c += kChunk) {
    Chunk staged;
    NoiseChunk buffer;
    const int n = static_cast<int>(std::min<int64_t>(kChunk, s.cols - c));
    const float* l = logits.load(row * s.cols + c, n, staged);
    const float* g =
        noise_values<Map>(seed, noise.stream, static_cast<uint64_t>(element + c), n, buffer);
    float* v = to + c;
    int i = 0;
    f32p most = f32p{} - INFINITY;
    i32p strange{};
    for (; i < n; i += kStep) {
      const f32p x = (load_pair(l + i) + load_pair(g + i)) * inv_tau;
      store(v + i, x);
      if (i + kStep > n) break;
      most = maximum(x, most);
      strange |= x != x;
    }
    for (int j = 0; j < W; ++j) {
      top = std::max(top, std::max(most.a[j], most.b[j]));
      nan |= (strange.a[j] | strange.b[j]) != 0;
    }
    for (int j = i; j < n; ++j) {
      top = std::max(top, v[j]);
      nan |= v[j] != v[j];
    }
    for (int j = n; j < i + kStep && i < n; ++j) v[j] = -INFINITY;  // padding: e^-inf adds 0
  }
  return nan ? NAN : top;
}

// Row of softmax((logits + g) / tau), in place of scratch.
void soft_row(const Stage& logits, const Noise& noise, const RowShape& s, int64_t row,
              float inv_tau, float* y) {
  const float m = perturb<GumbelMap>(logits, noise, s, row, inv_tau, y);
  double total = 0;
  for (int64_t c = 0; c < s.cols; c += kChunk) {
    f32p sum{};
    const int64_t end = std::min<int64_t>(s.cols, c + kChunk);
    for (int64_t i = c; i < end; i += kStep) {
      const f32p e = exp_of<f32p>(load_pair(y + i) - m);
      store(y + i, e);
      sum += e;
    }
    total += lane_sum(sum);
  }
  const float scale = static_cast<float>(1.0 / total);
  for (int64_t i = 0; i < s.cols; i += kStep) store(y + i, load_pair(y + i) * scale);
}

void store_row(const Stage& out, int64_t row, int64_t cols, const float* from) {
  for (int64_t c = 0; c < cols; c += kChunk) {
    const int n = static_cast<int>(std::min<int64_t>(kChunk, cols - c));
    Chunk staged;
    float* to = out.target(row * cols + c, n, staged);
    __builtin_memcpy(to, from + c, n * sizeof(float));
    out.store(row * cols + c, n, to);
  }
}

// First index of the largest value `top`; -1 when that is not finite.
int64_t argmax(const float* v, int64_t n, float top) {
  if (!(top > -INFINITY && top < INFINITY)) return -1;
  for (int64_t i = 0; i < n; ++i)
    if (v[i] == top) return i;
  return -1;
}

float inverse(const TensorView& tau) { return 1.0f / *static_cast<const float*>(tau.data); }

}  // namespace

void gumbel_softmax(const GumbelSoftmaxParams& p) {
  const Stage logits(p.logits), y(p.y);
  advise_huge_pages(p.y.data, p.y.numel * dtype_bytes(p.y.dtype));
  const RowShape s(p.logits, p.noise);
  const float inv_tau = inverse(p.tau);
  for_rows(s, p.threads, [&](int64_t row, float* scratch) {
    if (p.hard) {
      const float top = perturb<GumbelMap>(logits, p.noise, s, row, inv_tau, scratch);
      const int64_t best = argmax(scratch, s.cols, top);
      for (int64_t i = 0; i < s.cols; ++i) scratch[i] = best < 0 ? NAN : i == best;
    } else {
      soft_row(logits, p.noise, s, row, inv_tau, scratch);
    }
    store_row(y, row, s.cols, scratch);
  });
}

void gumbel_softmax_backward(const GumbelSoftmaxBackwardParams& p) {
  const bool have_y = p.y.defined();
  const Stage grad(p.grad), soft(have_y ? p.y : p.logits), d_logits(p.d_logits);
  advise_huge_pages(p.d_logits.data, p.d_logits.numel * dtype_bytes(p.d_logits.dtype));
  const RowShape s(p.grad, p.noise);
  const float inv_tau = inverse(p.tau);
  for_rows(s, p.threads, [&](int64_t row, float* y) {
    if (!have_y) soft_row(soft, p.noise, s, row, inv_tau, y);
    double dot = 0;
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t c = 0; c < s.cols; c += kChunk) {
        Chunk a, b, staged;
        const int64_t at = row * s.cols + c;
        const int n = static_cast<int>(std::min<int64_t>(kChunk, s.cols - c));
        const float* g = grad.load(at, n, a);
        const float* yc = have_y ? soft.load(at, n, b) : y + c;
        if (pass == 0) {
          Sum sum;
          for (int i = 0; i < n; i += kStep) sum.add(load_pair(g + i) * load_pair(yc + i), n - i);
          dot += sum.total();
        } else {
          float* to = d_logits.target(at, n, staged);
          const float d = static_cast<float>(dot);
          for (int i = 0; i < n; i += kStep)
            store(to + i, (load_pair(yc + i) * (load_pair(g + i) - d)) * inv_tau);
          d_logits.store(at, n, to);
        }
      }
  });
}

void relaxed_bernoulli(const RelaxedBernoulliParams& p) {
  const Stage logits(p.logits), y(p.y), grad(p.grad);
  advise_huge_pages(p.y.data, p.y.numel * dtype_bytes(p.y.dtype));
  const float inv_tau = inverse(p.tau);
  const int64_t rows = noise_rows(p.noise, p.logits), cols = rows ? p.logits.numel / rows : 0;
  const NoiseAt noise(p.noise, p.logits);
  for_spans(rows, cols, p.threads, [&](int64_t row, int64_t first, int n, int) {
    Chunk a, g, staged;
    NoiseChunk noise_buffer;
    const int64_t at = row * cols + first;
    const float* l = logits.load(at, n, a);
    const float* e = noise.values<LogisticMap>(at, n, noise_buffer);
    const float* gy = p.backward ? grad.load(at, n, g) : nullptr;
    float* to = y.target(at, n, staged);
    for (int i = 0; i < n; i += kStep) {
      const f32p x = (load_pair(l + i) + load_pair(e + i)) * inv_tau;
      f32p v = sigmoid_of<f32p>(x);
      if (p.backward)
        v = (load_pair(gy + i) * (v * sigmoid_of<f32p>(-x))) * inv_tau;
      else if (p.hard)
        v = select(x > 0.0f, f32p{} + 1.0f, select(x == x, f32p{}, x));
      store(to + i, v);
    }
    y.store(at, n, to);
  });
}

// ---- categorical and token sampling -----------------------------------------------------------

namespace {

struct Candidate {
  float value;
  int64_t index;
};
struct ByValue {  // larger first, then the lower index: a total order, so results are repeatable
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
  }
};

template <class T>
T per_row(const TensorView& t, int64_t row, T otherwise) {
  if (!t.defined()) return otherwise;
  const T* p = static_cast<const T*>(t.data);
  return p[t.numel > 1 ? row * (t.ndim ? t.strides[t.ndim - 1] : 1) : 0];
}

// Leaves the kept logits of x (already divided by the temperature, maximum `top`) and puts -inf in
// place of the rest: top-k, then top-p over what is left, then min-p.
void filter(float* x, int64_t n, float top, int64_t k, float p, float min_p) {
  float floor = -INFINITY;
  if (min_p > 0) floor = top + std::log(min_p);
  if (k > 0 && k < n) {
    Row copy(n);
    std::copy(x, x + n, copy.data());
    std::nth_element(copy.data(), copy.data() + (k - 1), copy.data() + n,
                     [](float a, float b) { return a > b; });
    const float kth = copy.data()[k - 1];
    for (int64_t i = 0; i < n; ++i)
      if (x[i] < kth) x[i] = -INFINITY;
  }
  if (p < 1.0f) {
    std::unique_ptr<Candidate[]> list(new Candidate[n]);
    int64_t count = 0;
    double total = 0;
    for (int64_t i = 0; i < n; ++i)
      if (x[i] > -INFINITY) {
        list[count++] = {x[i], i};
        total += std::exp(static_cast<double>(x[i]) - top);
      }
    // The nucleus is usually small: order a growing head instead of the whole vocabulary.
    double mass = 0;
    int64_t sorted = 0, kept = 0;
    for (int64_t head = std::min<int64_t>(count, 128); kept == 0 && sorted < count;
         head = std::min(count, head * 4)) {
      std::partial_sort(list.get() + sorted, list.get() + head, list.get() + count, ByValue{});
      for (; sorted < head && kept == 0; ++sorted) {
        mass += std::exp(static_cast<double>(list[sorted].value) - top);
        if (mass >= p * total) kept = sorted + 1;
      }
    }
    if (kept > 0)
      for (int64_t i = kept; i < count; ++i) x[list[i].index] = -INFINITY;
  }
  if (min_p > 0)
    for (int64_t i = 0; i < n; ++i)
      if (x[i] < floor) x[i] = -INFINITY;
}

}  // namespace

int64_t categorical(const CategoricalParams& p) {
  const Stage logits(p.logits);
  const RowShape s(p.logits, p.noise);
  int64_t* index = static_cast<int64_t*>(p.index.data);
  const bool filtered =
      p.temperature.defined() || p.top_k.defined() || p.top_p.defined() || p.min_p.defined();
  std::atomic<int64_t> bad{0};
  for_rows(s, p.threads, [&](int64_t row, float* x) {
    const float temperature = per_row<float>(p.temperature, row, 1.0f);
    int64_t best;
    if (!filtered) {
      best = argmax(x, s.cols, perturb<GumbelMap>(logits, p.noise, s, row, 1.0f, x));
    } else {
      float top = -INFINITY;
      bool nan = false;
      for (int64_t c = 0; c < s.cols; c += kChunk) {
        Chunk staged;
        const int n = static_cast<int>(std::min<int64_t>(kChunk, s.cols - c));
        const float* l = logits.load(row * s.cols + c, n, staged);
        for (int i = 0; i < n; ++i) {
          x[c + i] = l[i];
          top = std::max(top, l[i]);
          nan |= l[i] != l[i];
        }
      }
      if (nan || top == INFINITY) top = NAN;
      const float inverse_t = 1.0f / temperature;
      // A temperature so small that the logits overflow is greedy too.
      if (temperature > 0 && std::isfinite(top * inverse_t)) {
        for (int64_t i = 0; i < s.cols; ++i) x[i] *= inverse_t;
        top *= inverse_t;
        filter(x, s.cols, top, per_row<int64_t>(p.top_k, row, 0), per_row<float>(p.top_p, row, 1),
               per_row<float>(p.min_p, row, 0));
        // The perturbation reads the filtered row as if it were the logits.
        TensorView view;
        view.data = x;
        view.device_type = 1;
        view.ndim = 1;
        view.numel = view.shape[0] = s.cols;
        view.strides[0] = 1;
        const int64_t seed_row = p.noise.n_seeds > 1 ? row / s.per_seed : 0;
        Noise noise = p.noise;
        noise.seed = seed_of_row(p.noise, seed_row);
        noise.seeds = nullptr;
        noise.n_seeds = 0;
        noise.offset += (row - seed_row * s.per_seed) * s.cols;
        top = perturb<GumbelMap>(Stage(view), noise, RowShape(view, noise), 0, 1.0f, x);
      }
      best = argmax(x, s.cols, top);
    }
    if (best < 0) bad.fetch_add(1, std::memory_order_relaxed);
    index[row] = best;
  });
  return bad.load();
}

namespace {

// Calls run(row, first, count) for the chunks of [B, n] in logical order; a task has whole rows.
template <class Run>
void for_row_chunks(const BernoulliNllParams& p, Run&& run) {
  const int64_t B = p.logits.shape[0], n = B > 0 ? p.logits.numel / B : 0;
  const int64_t per_task = std::max<int64_t>(1, 16 * kChunk / std::max<int64_t>(1, n));
  parallel_for((B + per_task - 1) / per_task, p.threads, [&](int64_t task) {
    for (int64_t b = task * per_task; b < std::min(B, (task + 1) * per_task); ++b)
      for (int64_t i = 0; i < n; i += kChunk)
        run(b, b * n + i, static_cast<int>(std::min<int64_t>(kChunk, n - i)));
  });
}

}  // namespace

void bernoulli_nll(const BernoulliNllParams& p) {
  const Stage logits(p.logits), x(p.x);
  // In fp32 a sum of 2^24 equal terms was 2e-4 off: each chunk's rounds the same way.
  const std::unique_ptr<double[]> sums(new double[p.nll.numel]());
  for_row_chunks(p, [&](int64_t row, int64_t first, int n) {
    Chunk l_buffer, x_buffer;
    const float *l = logits.load(first, n, l_buffer), *t = x.load(first, n, x_buffer);
    for (int i = n; i < ((n + kStep - 1) & -kStep); ++i) l_buffer.data[i] = -1e30f;  // adds 0
    const auto term = [=](int i) { return genfast::bernoulli_nll<f32v>(load(l + i), load(t + i)); };
    f32v s0{}, s1{};
    for (int i = 0; i < n; i += kStep) s0 += term(i), s1 += term(i + W);
    sums[row] += horizontal_sum(s0 + s1);
  });
  std::copy_n(sums.get(), p.nll.numel, static_cast<float*>(p.nll.data));
}

void bernoulli_nll_backward(const BernoulliNllParams& p) {
  const Stage logits(p.logits), x(p.x), d_logits(p.d_logits), d_x(p.d_x);
  const float* grad = static_cast<const float*>(p.grad.data);
  for_row_chunks(p, [&](int64_t row, int64_t first, int n) {
    Chunk l_buffer, x_buffer, d_buffer;
    const float *l = logits.load(first, n, l_buffer), *t = x.load(first, n, x_buffer);
    const auto write = [&](const Stage& out, auto&& value) {
      float* d = out.target(first, n, d_buffer);
      for (int i = 0; i < n; i += W) store(d + i, value(i) * grad[row]);
      out.store(first, n, d);
    };
    if (p.d_logits.defined())
      write(d_logits, [=](int i) { return logistic<f32v>(load(l + i)).s - load(t + i); });
    if (p.d_x.defined()) write(d_x, [=](int i) { return -load(l + i); });
  });
}

}  // namespace genfast::cpu::GENFAST_ISA
