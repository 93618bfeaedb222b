// What the native drivers share: tensors of any dtype and strides with nothing around them (one
// byte too far is AddressSanitizer's), and checks that stop the run.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#include "api/tensor.h"
#include "cpu/convert.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) {                                                        \
      std::fprintf(stderr, "%s:%d: case %d: failed: %s\n", __FILE__, __LINE__, \
                   genfast::test::g_case, #condition);                         \
      std::exit(1);                                                            \
    }                                                                          \
  } while (0)
#define GENFAST_TEXT_(x) #x
#define GENFAST_TEXT(x) GENFAST_TEXT_(x)

namespace genfast::test {

// A driver's cases, called by main.cpp. Quick, for ThreadSanitizer: what several threads share.
void run(bool quick);

inline int g_case = 0;  // what a failed check names; the drivers count their drawn cases

// Row-major; column-major; every second element; rows three elements apart; dimensions 1 and 2
// exchanged in memory, as (B, H, S, D) lies when it was made as (B, S, H, D).
enum class Layout { dense, reversed, gaps, padded, swapped };

// Owns exactly the bytes that its view can reach; filled with a pattern that is finite as a float.
class Tensor : public TensorView {
 public:
  Tensor(std::vector<int64_t> sizes, Dtype type, Layout layout = Layout::dense) {
    dtype = type;
    device_type = 1;
    ndim = static_cast<int>(sizes.size());
    numel = 1;
    for (int i = 0; i < ndim; ++i) numel *= shape[i] = sizes[i];
    int64_t step = layout == Layout::gaps ? 2 : 1, last = 0;
    for (int k = 0; k < ndim; ++k) {
      int i = layout == Layout::reversed ? k : ndim - 1 - k;
      if (layout == Layout::swapped && ndim > 2 && (i == 1 || i == 2)) i = 3 - i;
      strides[i] = step;
      step *= shape[i];
      if (layout == Layout::padded && k == 0) step += 3;
      last += shape[i] > 0 ? (shape[i] - 1) * strides[i] : 0;
    }
    elements = numel > 0 ? last + 1 : 0;
    bytes_.reset(static_cast<char*>(std::malloc(bytes())));
    data = elements > 0 ? bytes_.get() : nullptr;
    for (int64_t i = 0; i < elements; ++i) set(i, 0.25 * static_cast<double>((i * 7) % 13) - 1.5);
  }

  int64_t elements = 0;  // of the memory, gaps included
  int64_t bytes() const { return elements * cpu::dtype_bytes(dtype); }

  void set(int64_t at, double x) {  // by memory position
    const float f = static_cast<float>(x);
    switch (dtype) {
      case Dtype::f64:
        return put(at, x);
      case Dtype::i64:
        return put(at, static_cast<int64_t>(x));
      case Dtype::i32:
        return put(at, static_cast<int32_t>(x));
      case Dtype::u8:
      case Dtype::b8:
        return put(at, static_cast<uint8_t>(x));
      default:
        return cpu::scatter_f32(&f, 1, as<char>() + at * cpu::dtype_bytes(dtype), dtype, 1);
    }
  }
  // Before a kernel writes: all bits set, a NaN in every float dtype.
  void blank() {
    if (elements > 0) std::memset(data, 0xFF, bytes());
  }
  // How many elements are no longer blank: all that belong to the view and none in its gaps.
  int64_t written() const {
    const int size = cpu::dtype_bytes(dtype);
    int64_t count = 0;
    for (int64_t i = 0; i < elements; ++i) {
      bool touched = false;
      for (int k = 0; k < size; ++k) touched |= as<uint8_t>()[i * size + k] != 0xFF;
      count += touched;
    }
    return count;
  }
  bool same_bytes(const Tensor& o) const {
    return bytes() == o.bytes() && (elements == 0 || std::memcmp(data, o.data, bytes()) == 0);
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

 private:
  template <class T>
  void put(int64_t at, T x) {
    std::memcpy(static_cast<char*>(data) + at * sizeof(T), &x, sizeof(T));
  }
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> bytes_;
};

// Choices of the drawn cases: the same ones in every run.
struct Pick {
  uint32_t state;
  explicit Pick(int seed) : state(static_cast<uint32_t>(seed) * 2654435761u + 12345u) {}
  uint32_t below(uint32_t n) {
    state = state * 1664525u + 1013904223u;
    return static_cast<uint32_t>((static_cast<uint64_t>(state) * n) >> 32);
  }
  bool one_in(uint32_t n) { return below(n) == 0; }
  template <class T>
  T of(std::initializer_list<T> list) {
    return list.begin()[below(static_cast<uint32_t>(list.size()))];
  }
  // Quarters in [-1.5, 1.5]: exact in every float dtype, and so are their products in float32.
  void fill(Tensor& t) {
    for (int64_t i = 0; i < t.elements; ++i) t.set(i, 0.25 * below(13) - 1.5);
  }
};

// one(pick) for `count` cases.
template <class One>
void cases(int count, One&& one) {
  for (int i = 0; i < count; ++i) {
    Pick pick(++g_case);
    one(pick);
  }
}

// The same memory would do for both, element for element.
inline bool same_layout(const TensorView& a, const TensorView& b) {
  bool same = a.dtype == b.dtype;
  for (int d = 0; d < a.ndim; ++d) same &= a.strides[d] == b.strides[d];
  return same;
}

// Elements of a float tensor in logical order.
inline std::vector<double> values(const TensorView& t) {
  std::vector<double> out(t.numel);
  std::vector<int64_t> index(t.ndim + 1);
  const int size = cpu::dtype_bytes(t.dtype);
  for (double& to : out) {
    int64_t at = 0;
    for (int d = 0; d < t.ndim; ++d) at += index[d] * t.strides[d];
    float f;
    cpu::gather_f32(static_cast<const char*>(t.data) + at * size, t.dtype, 1, 1, &f);
    to = f;
    for (int d = t.ndim - 1; d >= 0 && ++index[d] == t.shape[d]; --d) index[d] = 0;
  }
  return out;
}

// Within rounding to the dtype, and `slack` of float32 arithmetic.
inline bool close(double got, double want, Dtype dtype, double slack = 1e-5) {
  const double rounding = dtype == Dtype::f16 ? 1e-3 : dtype == Dtype::bf16 ? 8e-3 : 0.0;
  return std::fabs(got - want) <= (slack + rounding) * (1.0 + std::fabs(want));
}

// call(threads) for 1, 2 and 3 threads into blank outputs: the same bits, gaps included.
template <class Fn>
void same_bits(const std::vector<Tensor*>& outputs, Fn&& call) {
  std::vector<std::vector<char>> first;
  for (int threads : {1, 2, 3}) {
    for (Tensor* t : outputs) t->blank();
    call(threads);
    for (size_t i = 0; i < outputs.size(); ++i) {
      const char* data = outputs[i]->as<char>();
      const std::vector<char> now(data, data + outputs[i]->bytes());
      if (threads == 1) first.push_back(now);
      CHECK(now == first[i]);
    }
  }
}

inline const std::vector<std::vector<int64_t>>& odd_shapes() {
  static const std::vector<std::vector<int64_t>> shapes = {
      {},        {1},       {3},         {1, 1},       {2, 33}, {3, 5, 7},
      {2, 1025}, {5, 2051}, {9, 1, 130}, {3, 4, 0, 2}, {0, 5},  {2, 3, 1, 2, 3, 1, 2, 2},
      {17000},   {700, 13}, {4, 4097}};
  return shapes;
}
constexpr Dtype kFloats[] = {Dtype::f32, Dtype::f16, Dtype::bf16};
constexpr Layout kLayouts[] = {Layout::dense, Layout::reversed, Layout::gaps};

}  // namespace genfast::test
