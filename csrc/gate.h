// The choice between the direct road and the others, in one call (~0.4 us for two tensors).
#pragma once
#include <pybind11/pybind11.h>

#include <atomic>

namespace genfast {

// Which backend was asked for (genfast/ops/_force.py).
enum Asked : int {
  kNothing = 0,
  kAutoBlock = 1,  // "auto", by a block in a process that asks for another: with a gradient, what
                   // has a registered op goes through it, which remembers the block
  kCpuBlock = 2,   // "cpu", by a block: the same without a gradient
  kOther = 3,      // what the fast roads do not serve
  kCudaBlock = 4,  // "cuda", by a block
  kAnything = 5,   // more than any of them
};

enum Road : int {
  kSlow = 0,    // anything unusual: modes, functorch, forward AD, subclasses, negative views
  kDirect = 1,  // plain tensors, no gradient wanted: allocate and call the kernel
  kGrad = 2,    // plain tensors, a gradient is wanted: autograd.Function
};

class Gate {
 public:
  // Handles of torch's own queries, taken once at import.
  void init(pybind11::handle torch) {
    auto grab = [](pybind11::handle o, const char* name) {
      return PyObject_GetAttrString(o.ptr(), name);
    };
    pybind11::object c = torch.attr("_C"), functorch = c.attr("_functorch");
    tensor_ = grab(torch, "Tensor");
    parameter_ = grab(torch.attr("nn"), "Parameter");
    is_grad_enabled_ = grab(c, "is_grad_enabled");
    dispatch_modes_ = grab(c, "_len_torch_dispatch_stack");
    functorch_level_ = grab(functorch, "maybe_current_level");
    tracing_ = grab(c, "_get_tracing_state");
    threads_ = grab(torch, "get_num_threads");
    empty_like_ = grab(torch, "empty_like");
    forward_ad_ = pybind11::module_::import("torch.autograd.forward_ad").attr("__dict__").ptr();
    current_level_ = PyUnicode_InternFromString("_current_level");
    requires_grad_ = grab(torch.attr("Tensor"), "requires_grad");  // without a look-up per tensor
    is_neg_ = grab(torch.attr("Tensor"), "is_neg");
    if (PyErr_Occurred()) throw pybind11::error_already_set();
    ready_ = true;
  }

  // slow_from: the least that makes the road slow.
  int operator()(PyObject* const* args, Py_ssize_t count, Asked slow_from = kCpuBlock) const {
    const int asked = this->asked();
    if (!ready_ || asked >= slow_from) return kSlow;
    if (call_int(dispatch_modes_) != 0) return kSlow;
    PyObject* level = PyObject_CallNoArgs(functorch_level_);
    if (level == nullptr) return fail();
    Py_DECREF(level);
    if (level != Py_None) return kSlow;
    PyObject* trace = PyObject_CallNoArgs(tracing_);  // torch.jit.trace sees torch's calls alone
    if (trace == nullptr) return fail();
    Py_DECREF(trace);
    if (trace != Py_None) return kSlow;
    PyObject* forward = PyDict_GetItem(forward_ad_, current_level_);  // borrowed
    if (forward != nullptr && PyLong_AsLong(forward) >= 0) return kSlow;
    bool wanted = false;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* x = args[i];
      if (x == Py_None) continue;
      PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
      if (type != tensor_ && type != parameter_) return kSlow;
      PyObject* negative = PyObject_CallOneArg(is_neg_, x);
      if (negative == nullptr) return fail();
      Py_DECREF(negative);
      if (negative == Py_True) return kSlow;
      PyObject* grad = Py_TYPE(requires_grad_)->tp_descr_get(requires_grad_, x, type);
      if (grad == nullptr) return fail();
      Py_DECREF(grad);
      wanted |= grad == Py_True;
    }
    if (!wanted) return kDirect;
    PyObject* enabled = PyObject_CallNoArgs(is_grad_enabled_);
    if (enabled == nullptr) return fail();
    Py_DECREF(enabled);
    if (enabled != Py_True) return kDirect;
    return asked == kAutoBlock && slow_from == kCpuBlock ? kSlow : kGrad;
  }

  int asked() const {
    const int process = asked_.load(std::memory_order_relaxed);
    if (process >= 0) return process;
    const auto found = pybind11::reinterpret_steal<pybind11::object>(PyObject_CallNoArgs(ask_));
    if (!found) throw pybind11::error_already_set();  // an interrupt came: it is the caller's
    return static_cast<int>(PyLong_AsLong(found.ptr()));
  }

  // what: the process asks for, or -1: a thread has asked itself, `ask` says what.
  void set_asked(int what) { asked_ = what; }
  void set_ask(pybind11::function ask) { ask_ = ask.release().ptr(); }  // once

  PyObject* empty_like() const { return empty_like_; }  // torch's, borrowed

  int threads() const {
    const long n = ready_ ? call_int(threads_) : 0;
    return n > 0 ? static_cast<int>(n) : 0;
  }

 private:
  static int fail() {
    PyErr_Clear();
    return kSlow;
  }
  static long call_int(PyObject* f) {
    PyObject* r = PyObject_CallNoArgs(f);
    if (r == nullptr) {
      PyErr_Clear();
      return -1;
    }
    const long v = PyLong_AsLong(r);
    Py_DECREF(r);
    return v;
  }

  bool ready_ = false;
  std::atomic<int> asked_{kNothing};
  PyObject *tensor_ = nullptr, *parameter_ = nullptr, *is_grad_enabled_ = nullptr,
           *dispatch_modes_ = nullptr, *functorch_level_ = nullptr, *tracing_ = nullptr,
           *threads_ = nullptr, *empty_like_ = nullptr, *forward_ad_ = nullptr,
           *current_level_ = nullptr, *requires_grad_ = nullptr, *is_neg_ = nullptr,
           *ask_ = nullptr;
};

}  // namespace genfast
