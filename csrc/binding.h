// What the entry points of every family share: checks of views, Python's noise arguments, the call.
#pragma once
#include <pybind11/pybind11.h>

#include <atomic>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>

#include "caster.h"
#include "cpu/kernels.h"
#include "gate.h"

namespace py = pybind11;

namespace genfast {

inline Gate g_gate;  // one per module: every binding file sees the same
// CUDA tensors reach the CUDA kernels where the process's backend says so, or a block's: "cuda",
// and where there is code for the GPUs "auto" and those that compose all but the noise.
inline std::atomic<bool> g_cuda_enabled{false}, g_cuda_covered{false};

using Views = std::initializer_list<const TensorView*>;

// Defined views are real memory on one device that this binary has kernels for.
inline bool same_device(Views views) {
  const TensorView* first = nullptr;
  for (const TensorView* v : views) {
    if (v->device_type == -1) return false;
    if (!v->defined()) continue;
    if (first == nullptr) first = v;
    if (v->device_type != first->device_type || v->device != first->device) return false;
  }
  if (first == nullptr) return false;
#if GENFAST_HAVE_CUDA
  if (first->is_cpu()) return true;
  if (!first->is_cuda()) return false;
  if (g_cuda_enabled) return true;
  const int asked = g_gate.asked();
  return asked == kCudaBlock || (g_cuda_covered && (asked == kAutoBlock || asked == kOther));
#else
  return first->is_cpu();
#endif
}

// What the kernel reads or writes without asking is there.
inline bool given(Views views) {
  for (const TensorView* v : views)
    if (!v->defined()) return false;
  return true;
}

// Threads for one pass over t. Few elements run on one thread: torch need not be asked (60 ns).
inline int threads_for(const TensorView& t) { return t.numel < 4096 ? 1 : g_gate.threads(); }

inline bool floats(Views views) {
  for (const TensorView* v : views)
    if (v->defined() && !is_float(v->dtype)) return false;
  return true;
}

inline bool same_shapes(Views views) {
  const TensorView* first = nullptr;
  for (const TensorView* v : views) {
    if (!v->defined()) continue;
    if (first == nullptr) first = v;
    if (!same_shape(*first, *v)) return false;
  }
  return true;
}

// `t` holds n numbers of this dtype side by side.
inline bool vector_of(const TensorView& t, Dtype dtype, int64_t n) {
  return !t.defined() || (t.dtype == dtype && t.numel == n && is_contiguous(t));
}

// Memory of `t` around the channel dimension `dim`; false when it is neither kind.
inline bool planes_of(const TensorView& t, int64_t dim, Planes& planes) {
  if (dim < 0 || dim >= t.ndim) return false;
  planes = Planes{};
  for (int64_t i = 0; i < t.ndim; ++i)
    (i < dim ? planes.outer : i > dim ? planes.inner : planes.channels) *= t.shape[i];
  if (is_contiguous(t)) {
    planes.channels_inner = planes.inner == 1 && planes.channels > 1;
    return true;
  }
  int64_t expected = planes.channels;  // dim moved to the end, contiguous
  for (int64_t i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] == 1) continue;
    if (t.strides[i] != (i == dim ? 1 : expected)) return false;
    if (i != dim) expected *= t.shape[i];
  }
  planes.channels_inner = true;
  return true;
}

inline bool same_memory(const TensorView& a, const TensorView& b) {
  if (!same_shape(a, b)) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.shape[i] > 1 && a.strides[i] != b.strides[i]) return false;
  return true;
}

inline bool dense_floats(const TensorView& t) {
  return !t.defined() || (is_float(t.dtype) && is_contiguous(t));
}

// What is thrown, as Python's error: of functions that Python calls without pybind11, out of which
// nothing may be thrown.
inline void set_python_error() {
  try {
    throw;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

// Python's noise arguments, in this order everywhere: seed, seeds, stream, offset.
struct NoiseArgument {
  uint64_t seed, stream;
  int64_t offset;
  NoiseArgument(py::handle s, py::handle st, py::handle o)
      : NoiseArgument(s, st, static_cast<int64_t>(word("offset", o))) {}
  NoiseArgument(py::handle s, py::handle st, int64_t o)
      : seed(word("seed", s)), stream(word("stream", st)), offset(o) {
    // The bound leaves room for offset + element in 63 bits.
    if (offset < 0 || offset > int64_t{1} << 62)
      throw py::value_error("offset: expected 0 <= offset <= 2**62, got " + std::to_string(offset));
  }
  // 64 bits of an int in [-2**63, 2**64): a wider one would repeat another's noise.
  static uint64_t word(const char* name, py::handle x) {
    py::object number;
    if (PyLong_Check(x.ptr()) && !PyBool_Check(x.ptr()))
      number = py::reinterpret_borrow<py::object>(x);
    else if (py::hasattr(x, "numerator") && PyIndex_Check(x.ptr()) && !PyBool_Check(x.ptr()))
      number = py::reinterpret_steal<py::object>(PyNumber_Index(x.ptr()));  // numpy's integers
    if (!number) {
      PyErr_Clear();
      throw py::type_error(std::string(name) + ": expected an int, got " +
                           Py_TYPE(x.ptr())->tp_name);
    }
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
    if (overflow == 0) return static_cast<uint64_t>(value);
    const unsigned long long wide = overflow > 0 ? PyLong_AsUnsignedLongLong(number.ptr()) : 0;
    if (overflow < 0 || PyErr_Occurred()) {
      PyErr_Clear();
      throw py::value_error(std::string(name) +
                            ": expected an int in [-2**63, 2**64), got a wider one");
    }
    return wide;
  }
  // Fills `noise` for a tensor of this shape; false when the seeds do not fit it.
  bool fill(Noise& noise, const TensorView& seeds, const TensorView& like) const {
    noise.seed = seed;
    noise.stream = stream;
    noise.offset = offset;
    if (!seeds.defined()) return true;
    if (seeds.dtype != Dtype::i64 || seeds.ndim > 1 || !is_contiguous(seeds)) return false;
    if (seeds.numel != 1 && (like.ndim == 0 || seeds.numel != like.shape[0])) return false;
    noise.seeds = static_cast<const int64_t*>(seeds.data);
    noise.n_seeds = seeds.numel;
    return true;
  }
};

// What `run` takes after the views: the family's kernel on both kinds of device.
#if GENFAST_HAVE_CUDA
#define GENFAST_KERNEL(name) &cpu::Kernels::name, &cuda::name
#else
#define GENFAST_KERNEL(name) &cpu::Kernels::name, nullptr
#endif

// Runs a kernel without the GIL; a text returned by a CUDA launch becomes an exception.
template <class Params>
struct OnCuda {  // keeps the null pointer below out of the deduction
  using Function = const char* (*)(const Params&);
};
template <class Params, class Result>
bool run(const Params& p, const TensorView& like, Result (*cpu::Kernels::*on_cpu)(const Params&),
         typename OnCuda<Params>::Function on_cuda = nullptr, int64_t brief = 4096) {
  if (like.is_cuda() && on_cuda != nullptr) {
    const char* error;
    {
      py::gil_scoped_release release;  // a launch can wait for a full queue
      error = on_cuda(p);
    }
    if (error != nullptr) throw std::runtime_error(error);
    return true;
  }
  if (!like.is_cpu()) return false;
  if (like.numel < brief) {  // releasing and taking the GIL again costs more than it frees
    (cpu::kernels().*on_cpu)(p);
  } else {
    py::gil_scoped_release release;
    (cpu::kernels().*on_cpu)(p);
  }
  return true;
}

// Adds a function that takes its arguments without pybind11's dispatch (~0.3 us less a call).
inline void add_fast(py::module_& m, PyMethodDef& method) {
  PyObject* function = PyCFunction_New(&method, nullptr);
  if (function == nullptr) throw py::error_already_set();
  m.add_object(method.ml_name, py::reinterpret_steal<py::object>(function));
}

void register_attention(py::module_& m);      // bindings_attention.cpp
void register_convolution(py::module_& m);    // bindings_convolution.cpp
void register_filtering(py::module_& m);      // bindings_filtering.cpp
void register_linear(py::module_& m);         // bindings_linear.cpp
void register_normalization(py::module_& m);  // bindings_normalization.cpp

}  // namespace genfast
