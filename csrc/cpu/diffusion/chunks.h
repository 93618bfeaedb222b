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

// Eight double lanes whatever the vector width: the same sum on every ISA level.
typedef double f64x8 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));

GENFAST_FN f64x8 widen(const float* p) {
  f32x8 v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, f64x8);
}
GENFAST_FN double total(const f64x8& v) {
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

// Value of a coefficient for one group.
inline double value_of(const Coefficient& c, int64_t group) {
  if (c.data == nullptr) return c.value;
  return c.wide ? static_cast<const double*>(c.data)[group]
                : static_cast<const float*>(c.data)[group];
}

inline int64_t batch_of(const TensorView& t) { return t.ndim > 0 ? t.shape[0] : 1; }

// One thread where a second gains little: it costs ~2 us, and 8 ms once in a hundred calls where
// another process has its core. Drawn noise: 1 us gained of 14 on 16 chunks, 6 of 19 on 32.
inline int threads_for(const TensorView& t, bool draws, int threads) {
  return t.numel < (draws ? 32 : 64) * kChunk ? 1 : threads;
}

inline void advise(const TensorView& t) {
  if (t.defined()) advise_huge_pages(t.data, t.numel * dtype_bytes(t.dtype));
}

}  // namespace
}  // namespace genfast::cpu::GENFAST_ISA
