// What the diffusion kernels share: sums of scaled chunks, coefficients per group, exact sums.
#pragma once
#include <algorithm>
#include <memory>

#include "cpu/kernels.h"
#include "cpu/noise.h"
#include "cpu/words.h"
#include "math/diffusion.h"

namespace genfast::cpu::GENFAST_ISA {
namespace {

// Asks for the line that a loop will store to 512 bytes on: a 64 KiB latent leaves L1, and the
// store that misses it waits for the read of its line, 0.13 us of 1.56. Beyond the end it does no
// harm.
template <class T>
GENFAST_FN void fetch_to_write(T* p) {
  __builtin_prefetch(p + 512 / sizeof(T), 1, 3);
}

// to = c_0 s_0 + c_1 s_1 + ..., added in this order; the loop is compiled once per number of terms.
template <class T, int K>
void sum_of(const T* const* sources, const float* coefficients, int n, T* to) {
  const T* s[K];  // copies: a store to `to` might change what the arguments point at
  float c[K];
#pragma GCC unroll 12
  for (int k = 0; k < K; ++k) s[k] = sources[k], c[k] = coefficients[k];
  for (int i = 0; i < n; i += W) {
    fetch_to_write(to + i);
    f32v a = load(s[0] + i) * c[0];
#pragma GCC unroll 12
    for (int k = 1; k < K; ++k) a = a + load(s[k] + i) * c[k];
    store(to + i, a);
  }
}

template <class T>
struct TermsOf {
  int n = 0;
  const T* source[kSources + 2];
  float c[kSources + 2];

  void add(const T* s, float coefficient) {
    if (coefficient == 0.0f || s == nullptr) return;  // never read what does not count
    source[n] = s;
    c[n++] = coefficient;
  }
  void sum(int count, T* to) const {
    using Sum = void (*)(const T* const*, const float*, int, T*);
    static constexpr Sum sums[] = {nullptr,      sum_of<T, 1>, sum_of<T, 2>,  sum_of<T, 3>,
                                   sum_of<T, 4>, sum_of<T, 5>, sum_of<T, 6>,  sum_of<T, 7>,
                                   sum_of<T, 8>, sum_of<T, 9>, sum_of<T, 10>, sum_of<T, 11>,
                                   sum_of<T, 12>};
    if (n > 0) return sums[n](source, c, count, to);
    for (int i = 0; i < count; i += W) store(to + i, f32v{});
  }
};
using Terms = TermsOf<float>;

// Eight doubles whatever the vector width: the same sum on every ISA level. In registers: as one
// vector of 64 bytes, which AVX2 has not, GCC kept a sum in memory, 1.6 ns an element in place of
// 0.17.
typedef double f64v __attribute__((vector_size(sizeof(f32v))));
struct Eight {
  static constexpr int kLanes = W / 2, kParts = 8 / kLanes;
  f64v part[kParts];
};
GENFAST_FN Eight& operator+=(Eight& a, const Eight& b) {
  for (int k = 0; k < Eight::kParts; ++k) a.part[k] += b.part[k];
  return a;
}
GENFAST_FN Eight operator*(Eight a, const Eight& b) {
  for (int k = 0; k < Eight::kParts; ++k) a.part[k] *= b.part[k];
  return a;
}

GENFAST_FN Eight widen(const float* p) {
  typedef float Half __attribute__((vector_size(sizeof(f64v) / 2)));
  Eight e;
  for (int k = 0; k < Eight::kParts; ++k) {
    Half h;
    __builtin_memcpy(&h, p + k * Eight::kLanes, sizeof h);
    e.part[k] = __builtin_convertvector(h, f64v);
  }
  return e;
}
GENFAST_FN double total(const Eight& e) {
  const auto lane = [&](int i) { return e.part[i / Eight::kLanes][i % Eight::kLanes]; };
  const auto pair = [&](int i) { return lane(i) + lane(i + 4); };
  return (pair(0) + pair(1)) + (pair(2) + pair(3));
}

// Of n differences; reads on to a multiple of 8, and counts nothing of it.
GENFAST_FN double square_sum(const float* differences, int n) {
  typedef int32_t i32x8 __attribute__((vector_size(32)));
  const i32x8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  Eight sum{};
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const Eight d = widen(differences + i);
    sum += d * d;
  }
  if (i < n) {
    i32x8 bits;
    float kept[8];
    __builtin_memcpy(&bits, differences + i, sizeof bits);
    bits &= lane < n - i;
    __builtin_memcpy(kept, &bits, sizeof kept);
    const Eight d = widen(kept);
    sum += d * d;
  }
  return total(sum);
}

// The same of each of `height` rows of `cols` side by side.
template <int kCols>
void square_sums(const float* differences, int height, double* to) {
  for (int k = 0; k < height; ++k) {
    double squares[4] = {};
    for (int i = 0; i < kCols; ++i) {
      const double d = differences[k * kCols + i];
      squares[i] = d * d;
    }
    to[k] = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  }
}
inline void square_sums(const float* differences, int height, int cols, double* to) {
  switch (cols) {  // a vector of eight for one number took 5 ns
    case 1:
      return square_sums<1>(differences, height, to);
    case 2:
      return square_sums<2>(differences, height, to);
    case 3:
      return square_sums<3>(differences, height, to);
    case 4:
      return square_sums<4>(differences, height, to);
  }
  for (int k = 0; k < height; ++k) to[k] = square_sum(differences + k * cols, cols);
}

// Of n numbers, in eight chains.
inline double total(const double* v, int64_t n) {
  double s[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; ++k) s[k] += v[i + k];
  for (; i < n; ++i) s[0] += v[i];
  return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

// Value of a coefficient for one group.
inline double value_of(const Coefficient& c, int64_t group) {
  if (c.data == nullptr) return c.value;
  return c.wide ? static_cast<const double*>(c.data)[group]
                : static_cast<const float*>(c.data)[group];
}
// to[i] = of(value) of n groups from `first` on, or of one group for all: in vectors, where each
// alone took 5 ns.
template <class Of>
void values_of(const Coefficient& c, bool one, int64_t first, int n, float* to, Of&& of) {
  const auto fill = [&](auto&& value) {
    for (int i = 0; i < n; ++i) to[i] = static_cast<float>(of(static_cast<double>(value(i))));
  };
  if (one || c.data == nullptr)
    fill([value = value_of(c, 0)](int) { return value; });
  else if (c.wide)
    fill([from = static_cast<const double*>(c.data) + first](int i) { return from[i]; });
  else
    fill([from = static_cast<const float*>(c.data) + first](int i) { return from[i]; });
}

inline int64_t batch_of(const TensorView& t) { return t.ndim > 0 ? t.shape[0] : 1; }

// One thread where a second gains little: it costs ~2 us, and 8 ms once in a hundred calls where
// another process has its core. Drawn noise: 1 us gained of 14 on 16 chunks, 6 of 19 on 32.
inline int threads_for(const TensorView& t, bool draws, int threads) {
  return t.numel < (draws ? 32 : 64) * kChunk ? 1 : threads;
}

// Tensors that lie alike, as those of a network with its channels inside do, in the order in which
// memory has them: then they are contiguous. Dimension 0 stays first, so that samples stay whole.
class MemoryOrder {
 public:
  explicit MemoryOrder(const TensorView& t) : dims_(t.ndim) {
    int n = 0;
    for (int i = 0; i < dims_; ++i)
      if (t.shape[i] != 1 || i == 0) from_[n++] = i;
    const int first = dims_ > 0 && t.shape[0] == 1 ? 1 : 0;  // has any stride
    std::sort(from_ + first, from_ + n, [&](int i, int j) { return t.strides[i] > t.strides[j]; });
    for (int i = 1; i < dims_; ++i)
      if (t.shape[i] == 1) from_[n++] = i;
  }
  void add(TensorView& t) {
    if (t.defined()) tensors_[count_++] = &t;
  }
  // False, and nothing is changed, where they do not.
  bool apply() {
    if (dims_ < 2 || from_[0] != 0) return false;
    TensorView ordered[kMost];
    for (int k = 0; k < count_; ++k) {
      const TensorView& t = *tensors_[k];
      if (t.ndim != dims_) return false;
      ordered[k] = t;
      for (int i = 0; i < t.ndim; ++i) {
        ordered[k].shape[i] = t.shape[from_[i]];
        ordered[k].strides[i] = t.strides[from_[i]];
      }
      if (!is_contiguous(ordered[k])) return false;
    }
    for (int k = 0; k < count_; ++k) *tensors_[k] = ordered[k];
    return true;
  }

 private:
  static constexpr int kMost = 7 + kOutputs + kModels + kHistory;
  int dims_, from_[kMaxDims], count_ = 0;
  TensorView* tensors_[kMost];
};

inline void advise(const TensorView& t) {
  if (t.defined()) advise_huge_pages(t.data, t.numel * dtype_bytes(t.dtype));
}

}  // namespace
}  // namespace genfast::cpu::GENFAST_ISA
