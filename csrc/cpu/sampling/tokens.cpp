// Categorical and token sampling: the largest of perturbed logits, after temperature and filters.
#include <atomic>
#include <vector>

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

// Bins by distance from the largest logit, with the probability and the number of what is in each.
class Bins {
 public:
  Bins(double first, double width) : first_(first), per_width_(kBins / width) {}
  int of(double distance) const {
    const double bin = (distance - first_) * per_width_;
    return bin < kBins - 1 ? static_cast<int>(bin) : kBins - 1;
  }
  void add(double distance, double mass) {
    const int bin = of(distance);
    mass_[bin] += mass, ++count_[bin];
  }
  // The bin in which the mass reaches `target`, or the last; adds that of the bins before it.
  int reaching(double target, double& before) const {
    int last = 0;
    for (int b = 0; b < kBins; ++b) {
      if (count_[b] == 0) continue;
      if (before + mass_[b] >= target) return b;
      before += mass_[last = b];
    }
    before -= mass_[last];
    return last;
  }
  int64_t count(int bin) const { return count_[bin]; }

 private:
  static constexpr int kBins = 1024;
  double first_, per_width_, mass_[kBins] = {};
  int64_t count_[kBins] = {};
};

// The fewest logits, largest first, whose probability reaches p of all that are left. Only what
// shares a bin with the last of them is sorted, in finer bins while that is much: sorting the
// nucleus took 17 ms of 100,000 normals.
void keep_nucleus(float* x, int64_t n, float top, float p) {
  constexpr int64_t kSorted = 64;
  const auto mass_of = [=](float v) { return std::exp(static_cast<double>(v) - top); };
  const auto distance_of = [=](float v) { return static_cast<double>(top) - v; };
  double total = 0, before = 0;
  std::vector<Candidate> list;
  const auto each = [=](auto&& fn) {
    for (int64_t i = 0; i < n; ++i)
      if (x[i] > -INFINITY) fn(Candidate{x[i], i});
  };
  if (n <= kSorted) {
    list.reserve(n);
    each([&](Candidate c) { list.push_back(c), total += mass_of(c.value); });
  } else {
    Bins bins(0.0, 32.0);
    each([&](Candidate c) {
      const double mass = mass_of(c.value);
      bins.add(distance_of(c.value), mass);
      total += mass;
    });
    const int last = bins.reaching(p * total, before);
    list.reserve(bins.count(last));
    each([&](Candidate c) {
      if (bins.of(distance_of(c.value)) == last) list.push_back(c);
    });
  }
  const double target = p * total;
  while (static_cast<int64_t>(list.size()) > kSorted) {
    const auto [most, least] = std::minmax_element(list.begin(), list.end(), ByValue{});
    const double first = distance_of(most->value), width = distance_of(least->value) - first;
    if (!(width > 0)) break;  // no bins: all the same, or as far in fp64
    Bins bins(first, width);
    for (const Candidate& c : list) bins.add(distance_of(c.value), mass_of(c.value));
    const int last = bins.reaching(target, before);
    const auto outside = [&](const Candidate& c) { return bins.of(distance_of(c.value)) != last; };
    list.erase(std::remove_if(list.begin(), list.end(), outside), list.end());
  }
  std::sort(list.begin(), list.end(), ByValue{});
  Candidate end = list.back();
  for (const Candidate& c : list)
    if ((before += mass_of(c.value)) >= target) {
      end = c;
      break;
    }
  for (int64_t i = 0; i < n; ++i)
    if (ByValue{}(end, {x[i], i})) x[i] = -INFINITY;
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
  if (p < 1.0f) keep_nucleus(x, n, top, p);
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
