// Categorical and token sampling: the largest of perturbed logits, after temperature and filters.
#include <atomic>

#include "cpu/kernels.h"
#include "cpu/sampling/rows.h"

namespace genfast::cpu::GENFAST_ISA {
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
  const auto found = [&](int64_t row, int64_t best) {
    if (best < 0) bad.fetch_add(1, std::memory_order_relaxed);
    index[row] = best;
  };
  if (!filtered && s.cols <= kNarrow) {
    const NarrowRows narrow(logits, s, 1.0f);
    for_narrow_rows(s, p.noise, p.threads, [&](int64_t row, int height, const float* g) {
      Chunk x;
      float top[kChunk];
      narrow.perturb(row, height, g, x, top);
      for (int r = 0; r < height; ++r) found(row + r, argmax(x.data + r * s.cols, s.cols, top[r]));
    });
    return bad.load();
  }
  for_rows(s, p.noise, p.threads, [&](int64_t row, float* x, GumbelRows& noise) {
    const float temperature = per_row<float>(p.temperature, row, 1.0f);
    int64_t best;
    if (!filtered) {
      best = argmax(x, s.cols, perturb(logits, row * s.cols, row, s.cols, noise, 1.0f, x));
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
        top = perturb(Stage(view), 0, row, s.cols, noise, 1.0f, x);
      }
      best = argmax(x, s.cols, top);
    }
    found(row, best);
  });
  return bad.load();
}

}  // namespace genfast::cpu::GENFAST_ISA
