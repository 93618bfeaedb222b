// Staging: kernels work on fp32 chunks that live in L1. A contiguous fp32 tensor is used where it
// lies; any other dtype or stride is converted into a chunk buffer on load and out of it on store.
// So no kernel is written per dtype, and logical (row-major) element order holds for any strides.
// Included inside an ISA namespace by the kernel files only.
#pragma once
#include "api/tensor.h"
#include "cpu/convert.h"
#include "math/lane.h"

namespace genfast::cpu {
namespace {

constexpr int kChunk = 1024;  // 4 KiB of fp32: eight buffers fit the 32 KiB L1
constexpr int kTurn = 64;     // a multiple of what a body takes at a time, on every ISA level

struct alignas(64) Chunk {
  float data[kChunk];
};

class Stage {
 public:
  explicit Stage(const TensorView& t) : base_(static_cast<char*>(t.data)), dtype_(t.dtype) {
    size_ = dtype_bytes(t.dtype);
    for (int i = 0; i < t.ndim; ++i) {  // drop ones, merge dimensions that continue each other
      if (t.shape[i] == 1) continue;
      if (ndim_ > 0 && strides_[ndim_ - 1] == t.strides[i] * t.shape[i]) {
        shape_[ndim_ - 1] *= t.shape[i];
        strides_[ndim_ - 1] = t.strides[i];
      } else {
        shape_[ndim_] = t.shape[i];
        strides_[ndim_++] = t.strides[i];
      }
    }
    dense_ = ndim_ == 0 || (ndim_ == 1 && strides_[0] == 1);
    direct_ = dense_ && dtype_ == Dtype::f32;
  }

  // Elements [first, first + n) as fp32. What ends within a turn of the body is copied and zero
  // padded, so that it may run over whole vectors.
  const float* load(int64_t first, int n, Chunk& buffer) const {
    if (in_place(n)) return reinterpret_cast<const float*>(base_) + first;
    if (dense_)
      to_f32(base_ + first * size_, dtype_, n, buffer.data);
    else
      walk(first, n, [&](int at, int64_t offset, int64_t stride, int count) {
        gather_f32(base_ + offset * size_, dtype_, stride, count, buffer.data + at);
      });
    for (int i = n; i < ((n + kTurn - 1) & -kTurn); ++i) buffer.data[i] = 0.0f;
    return buffer.data;
  }

  void put(int64_t first, int n, Chunk& from) const {
    float* to = target(first, n, from);
    if (to != from.data) __builtin_memcpy(to, from.data, n * sizeof(float));
    store(first, n, to);
  }

  // Asks for the cache lines of elements [first, first + n), so that they arrive while the noise
  // that they will meet is made.
  void prefetch(int64_t first, int n) const {
    if (!dense_) return;
    const char* from = base_ + first * size_;
    for (int64_t i = 0; i < int64_t{n} * size_; i += 64) __builtin_prefetch(from + i);
  }

  // Where the body writes elements [first, first + n); `store` then brings them home.
  float* target(int64_t first, int n, Chunk& buffer) const {
    return in_place(n) ? reinterpret_cast<float*>(base_) + first : buffer.data;
  }
  void store(int64_t first, int n, const float* from) const {
    if (in_place(n)) return;
    if (dense_)
      from_f32(from, n, base_ + first * size_, dtype_);
    else
      walk(first, n, [&](int at, int64_t offset, int64_t stride, int count) {
        scatter_f32(from + at, count, base_ + offset * size_, dtype_, stride);
      });
  }

 private:
  bool in_place(int n) const { return direct_ && n % kTurn == 0; }
  // Calls run(at, element offset, stride, count) for the innermost runs that cover the range.
  template <class Run>
  void walk(int64_t first, int n, Run&& run) const {
    int64_t index[kMaxDims], rest = first, offset = 0;
    for (int d = ndim_ - 1; d >= 0; --d) {
      index[d] = rest % shape_[d];
      rest /= shape_[d];
      offset += index[d] * strides_[d];
    }
    const int inner = ndim_ - 1;
    for (int at = 0; at < n;) {
      const int64_t left = shape_[inner] - index[inner];
      const int count = left < n - at ? static_cast<int>(left) : n - at;
      run(at, offset, strides_[inner], count);
      at += count;
      index[inner] += count;
      offset += count * strides_[inner];
      for (int d = inner; d > 0 && index[d] == shape_[d]; --d) {
        index[d] = 0;
        offset -= shape_[d] * strides_[d];
        ++index[d - 1];
        offset += strides_[d - 1];
      }
    }
  }

  char* base_;
  Dtype dtype_;
  int size_ = 4, ndim_ = 0;
  bool dense_, direct_;
  int64_t shape_[kMaxDims], strides_[kMaxDims];
};

}  // namespace
}  // namespace genfast::cpu
