// What the native drivers share: tensors of any dtype and strides with nothing around them (one
// byte too far is AddressSanitizer's), and checks that stop the run.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "api/tensor.h"
#include "cpu/kernels.h"

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (0)

namespace genfast::test {

inline bool level_runs(const char* level) {
#if defined(__x86_64__)
  if (std::strcmp(level, "v3") == 0)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
#endif
  return std::strcmp(level, "base") == 0;
}

enum class Layout { dense, reversed, gaps };  // row-major; column-major; every second element

inline int bytes_of(Dtype d) {
  constexpr int bytes[] = {4, 2, 2, 8, 8, 4, 1, 1};
  return bytes[static_cast<int>(d)];
}

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
      const int i = layout == Layout::reversed ? k : ndim - 1 - k;
      strides[i] = step;
      step *= shape[i];
      last += shape[i] > 0 ? (shape[i] - 1) * strides[i] : 0;
    }
    const int64_t elements = numel > 0 ? last + 1 : 0;
    bytes_.reset(static_cast<char*>(std::malloc(elements * bytes_of(type))));
    data = elements > 0 ? bytes_.get() : nullptr;
    for (int64_t i = 0; i < elements; ++i) set(i, 0.25 * static_cast<double>((i * 7) % 13) - 1.5);
  }

  void set(int64_t at, double x) {  // by memory position
    const float f = static_cast<float>(x);
    switch (dtype) {
      case Dtype::f32:
        return put(at, f);
      case Dtype::f64:
        return put(at, x);
      case Dtype::i64:
        return put(at, static_cast<int64_t>(x));
      case Dtype::i32:
        return put(at, static_cast<int32_t>(x));
      case Dtype::bf16: {
        uint32_t u;
        std::memcpy(&u, &f, 4);
        return put(at, static_cast<uint16_t>(u >> 16));
      }
      case Dtype::f16: {  // quarters below 2 are exact: sign, exponent, two bits of mantissa
        uint32_t u;
        std::memcpy(&u, &f, 4);
        const uint32_t sign = (u >> 16) & 0x8000u, rest = u & 0x7FFFFFFFu;
        return put(at,
                   static_cast<uint16_t>(rest == 0 ? sign : sign | ((rest - 0x38000000u) >> 13)));
      }
      default:
        return;
    }
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
