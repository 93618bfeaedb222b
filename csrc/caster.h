// torch.Tensor (or any DLPack producer) → TensorView, without torch's headers or libraries.
// torch >= 2.10 hands out its tensors through the DLPack C exchange API: ~90 ns each, nothing
// allocated. The view borrows: the caller's argument keeps the memory alive during the call.
#pragma once
#include <pybind11/pybind11.h>

#include "api/dlpack.h"
#include "api/tensor.h"

namespace genfast {

// Owns what a view needs for longer than the exchange call: a capsule of the slow road, or a
// shape without strides made explicit.
class TensorArgument : public TensorView {
 public:
  TensorArgument() = default;
  TensorArgument(TensorArgument&& other) noexcept : TensorView(other), managed_(other.managed_) {
    other.managed_ = nullptr;
  }
  TensorArgument(const TensorArgument&) = delete;
  TensorArgument& operator=(const TensorArgument&) = delete;
  ~TensorArgument() {
    if (managed_ != nullptr && managed_->deleter != nullptr) managed_->deleter(managed_);
  }

  // False (no Python error set) when the object is no tensor or a kind that has no plain memory.
  bool read(PyObject* object);

 private:
  bool fill(const dl::Tensor& t);
  bool find_stream(const dl::Tensor& t, const dl::ExchangeApi* api);
  dl::ManagedVersioned* managed_ = nullptr;
};

// Remembers the exchange API of a tensor type; called once per type at import.
void register_tensor_type(PyObject* type);

inline const dl::ExchangeApi* exchange_api(PyTypeObject* type);

namespace detail {

constexpr int kTypes = 8;
struct TypeCache {
  PyTypeObject* type[kTypes] = {};
  const dl::ExchangeApi* api[kTypes] = {};
  int count = 0;
};
inline TypeCache& type_cache() {
  static TypeCache cache;
  return cache;
}

inline bool dtype_of(dl::DataType d, Dtype& out) {
  struct Row {
    uint8_t code, bits;
    Dtype dtype;
  };
  static constexpr Row table[] = {
      {2, 32, Dtype::f32}, {2, 16, Dtype::f16}, {4, 16, Dtype::bf16}, {2, 64, Dtype::f64},
      {0, 64, Dtype::i64}, {0, 32, Dtype::i32}, {1, 8, Dtype::u8},    {6, 8, Dtype::b8},
  };
  if (d.lanes != 1) return false;
  for (const Row& row : table)
    if (row.code == d.code && row.bits == d.bits) {
      out = row.dtype;
      return true;
    }
  return false;
}

}  // namespace detail

inline const dl::ExchangeApi* exchange_api(PyTypeObject* type) {
  const detail::TypeCache& cache = detail::type_cache();
  for (int i = 0; i < cache.count; ++i)
    if (cache.type[i] == type) return cache.api[i];
  for (int i = 0; i < cache.count; ++i)  // whose __dlpack__ refuses what wants a gradient
    if (PyType_IsSubtype(type, cache.type[i])) return cache.api[i];
  return nullptr;
}

inline void register_tensor_type(PyObject* type) {
  detail::TypeCache& cache = detail::type_cache();
  if (cache.count == detail::kTypes) return;
  PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    return;
  }
  auto* api =
      static_cast<const dl::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (api == nullptr) PyErr_Clear();
  while (api != nullptr && api->version.major != 1) api = api->previous;
  if (api == nullptr || api->view == nullptr) return;
  Py_INCREF(type);
  cache.type[cache.count] = reinterpret_cast<PyTypeObject*>(type);
  cache.api[cache.count++] = api;
}

inline bool TensorArgument::fill(const dl::Tensor& t) {
  if (t.ndim > kMaxDims || !detail::dtype_of(t.dtype, dtype)) return false;
  device_type = t.device.type == 3 ? 1 : t.device.type;  // pinned host memory is host memory
#if defined(GENFAST_SIMT)  // tests/simt runs the CUDA kernels on the host
  if (is_cpu()) device_type = 2;
#endif
  device = t.device.id;
  ndim = t.ndim;
  numel = 1;
  for (int i = 0; i < ndim; ++i) numel *= shape[i] = t.shape[i];
  int64_t dense = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    strides[i] = t.strides != nullptr ? t.strides[i] : dense;
    dense *= shape[i];
  }
  data = t.data == nullptr ? nullptr : static_cast<char*>(t.data) + t.byte_offset;
  // FakeTensor, DTensor and wrapper subclasses succeed with a null pointer.
  return data != nullptr || numel == 0;
}

// torch's current stream, on which the kernels run, whoever made the tensor.
inline bool TensorArgument::find_stream(const dl::Tensor& t, const dl::ExchangeApi* api) {
  if (t.device.type != 2 || api == nullptr || api->current_stream == nullptr ||
      api->current_stream(2, device, &stream) == 0)
    return true;
  PyErr_Clear();
  return false;
}

inline bool TensorArgument::read(PyObject* object) {
  if (const dl::ExchangeApi* api = exchange_api(Py_TYPE(object))) {
    dl::Tensor t;
    if (api->view(object, &t) != 0) {
      PyErr_Clear();
      return false;
    }
    return fill(t) && find_stream(t, api);
  }
  // Other producers (numpy, cupy, jax, tensor subclasses with their own protocol).
  PyObject* method = PyObject_GetAttrString(object, "__dlpack__");
  if (method == nullptr) {
    PyErr_Clear();
    return false;
  }
  PyObject* kwargs = Py_BuildValue("{s:(ii)}", "max_version", 1, 0);
  PyObject* empty = PyTuple_New(0);
  PyObject* capsule = PyObject_Call(method, empty, kwargs);
  Py_DECREF(method);
  Py_DECREF(kwargs);
  Py_DECREF(empty);
  if (capsule == nullptr) {
    PyErr_Clear();
    return false;
  }
  bool ok = false;
  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
    managed_ =
        static_cast<dl::ManagedVersioned*>(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    PyCapsule_SetName(capsule, "used_dltensor_versioned");
    const detail::TypeCache& cache = detail::type_cache();
    ok = managed_->version.major == 1 && fill(managed_->tensor) &&
         find_stream(managed_->tensor, cache.count > 0 ? cache.api[0] : nullptr);
  }
  Py_DECREF(capsule);
  return ok;
}

}  // namespace genfast

namespace pybind11::detail {

template <>
struct type_caster<genfast::TensorArgument> {
  static constexpr auto name = const_name("Tensor");
  template <class>
  using cast_op_type = genfast::TensorArgument&;

  // Always succeeds: what is no tensor stays undefined with `device_type` -1, and the binding
  // answers "not handled" instead of raising, so that Python can name the argument.
  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (!value.read(source.ptr())) value.device_type = -1;
    return true;
  }
  operator genfast::TensorArgument&() { return value; }

 private:
  genfast::TensorArgument value;
};

}  // namespace pybind11::detail
