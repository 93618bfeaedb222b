// What a kernel knows of a tensor: plain memory, dtype, shape, strides. No framework, no Python.
#pragma once
#include <cstdint>

namespace genfast {

enum class Dtype : uint8_t { f32, f16, bf16, f64, i64, i32, u8, b8 };

constexpr int kMaxDims = 12;

struct TensorView {
  void* data = nullptr;  // first element; null only when numel == 0 or the view is undefined
  Dtype dtype = Dtype::f32;
  int device_type = 0;  // DLPack numbering: 1 = CPU, 2 = CUDA; 0 = undefined (None was passed)
  int device = 0;
  int ndim = 0;
  int64_t numel = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements
  void* stream = nullptr;          // the framework's current stream on that device

  bool defined() const { return device_type != 0; }
  bool is_cpu() const { return device_type == 1; }
  bool is_cuda() const { return device_type == 2; }
};

// Memory of a dense tensor as [outer][channels][inner], or, with channels_inner, as
// [outer][inner][channels] (NHWC, and matrices whose last dimension is the channel).
struct Planes {
  int64_t outer = 1, channels = 1, inner = 1;
  bool channels_inner = false;
};

inline bool same_shape(const TensorView& a, const TensorView& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.shape[i] != b.shape[i]) return false;
  return true;
}

inline bool is_contiguous(const TensorView& t) {
  if (t.numel == 0) return true;
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.strides[i] != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

inline bool is_float(Dtype d) { return d == Dtype::f32 || d == Dtype::f16 || d == Dtype::bf16; }

}  // namespace genfast
