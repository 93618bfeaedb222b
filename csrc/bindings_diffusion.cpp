// Native entry points of the diffusion family; bindings.cpp has the rest and the rules.
#include <cmath>

#include "api/diffusion.h"
#include "binding.h"

namespace genfast {
namespace {

// Tensors of a Python tuple (None: no tensor at all) into an array.
template <int N>
bool read_tuple(py::handle source, TensorArgument (&to)[N]) {
  if (source.is_none()) return true;
  if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) > N) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(source.ptr()); ++i) {
    PyObject* item = PyTuple_GET_ITEM(source.ptr(), i);
    if (item != Py_None && !to[i].read(item)) return false;
  }
  return true;
}

bool prefix_of(const TensorView& t, const TensorView& like) {
  if (t.ndim > like.ndim || !is_contiguous(t)) return false;
  for (int i = 0; i < t.ndim; ++i)
    if (t.shape[i] != like.shape[i]) return false;
  return true;
}

struct Range {
  uintptr_t begin = 0, end = 0;
  explicit Range(const TensorView& t) {
    constexpr int bytes[] = {4, 2, 2, 8, 8, 4, 1, 1};
    if (!t.defined() || t.numel == 0) return;
    int64_t last = 0;
    for (int i = 0; i < t.ndim; ++i) last += (t.shape[i] - 1) * t.strides[i];
    begin = reinterpret_cast<uintptr_t>(t.data);
    end = begin + (last + 1) * bytes[static_cast<int>(t.dtype)];
  }
  bool meets(const Range& o) const { return begin < o.end && o.begin < end; }
};

// An output may be a source's very memory, element for element, but not overlap it otherwise.
bool overlap_is_safe(const TensorView& out, const TensorView& source) {
  if (!out.defined() || !source.defined() || !Range(out).meets(Range(source))) return true;
  if (out.data != source.data || out.dtype != source.dtype) return false;
  for (int i = 0; i < out.ndim; ++i)
    if (out.shape[i] > 1 && out.strides[i] != source.strides[i]) return false;
  return true;
}

// Every element has memory of its own (sufficient test: strides sorted by size do not fold).
bool writable(const TensorView& t) {
  for (int i = 0; i < t.ndim && t.numel > 0; ++i)
    if (t.shape[i] > 1 && t.strides[i] == 0) return false;
  return true;
}

bool valid_table(const TensorView& table, const TensorView& index, int64_t row,
                 const TensorView& x) {
  if (!table.defined() || table.dtype != Dtype::f32 || table.ndim != 2 ||
      table.shape[1] != kRowColumns || !is_contiguous(table))
    return false;
  const int64_t rows = table.shape[0];
  if (!index.defined()) return row >= 0 && row < rows;
  if (index.dtype != Dtype::i64 || !prefix_of(index, x)) return false;
  if (!index.is_cpu()) return true;  // the device clamps
  const int64_t* at = static_cast<const int64_t*>(index.data);
  for (int64_t i = 0; i < index.numel; ++i)
    if (at[i] < 0 || at[i] >= rows) return false;
  return true;
}

// Sources with a nonzero coefficient are there (where the host can see the table).
bool sources_given(const StepParams& p, int outputs) {
  if (!p.table.is_cpu()) return true;
  const float* table = static_cast<const float*>(p.table.data);
  const int64_t* index = p.index.defined() ? static_cast<const int64_t*>(p.index.data) : nullptr;
  const int64_t count = index != nullptr ? p.index.numel : 1;
  const bool noisy = p.z.defined() || p.draws;
  for (int64_t i = 0; i < count; ++i) {
    const float* row =
        table + (index != nullptr ? index[i] : p.row) * kRowColumns + kRowCoefficients;
    for (int o = 0; o < outputs; ++o, row += kSources) {
      for (int h = 0; h < kHistory; ++h)
        if (row[kH1 + h] != 0.0f && !p.history[h].defined()) return false;
      if (row[kZ] != 0.0f && !noisy && !(p.sample.defined() && o == 0)) return false;
      if (p.log_prob.defined() && o == 0 && row[kZ] == 0.0f) return false;
    }
  }
  return true;
}

// extras: None, or (variance, threshold, mask, known, known_z, level, sample, log_prob).
struct Extras {
  int variance = 0;
  TensorArgument tensors[7];

  bool read(py::handle source) {
    if (source.is_none()) return true;
    PyObject* t = source.ptr();
    if (!PyTuple_Check(t) || PyTuple_GET_SIZE(t) != 8) return false;
    variance = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(t, 0)));
    if (variance < 0 || variance > 2) {
      PyErr_Clear();
      return false;
    }
    for (int i = 0; i < 7; ++i) {
      PyObject* item = PyTuple_GET_ITEM(t, i + 1);
      if (item != Py_None && !tensors[i].read(item)) return false;
    }
    return true;
  }
};

bool per_sample_vector(const TensorView& t, int64_t width, const TensorView& x) {
  const int64_t batch = x.ndim > 0 ? x.shape[0] : 1;
  return vector_of(t, Dtype::f32, width) || vector_of(t, Dtype::f32, width * batch);
}

// Room for partial sums of CUDA blocks.
bool sums_fit(const TensorView& scratch) { return vector_of(scratch, Dtype::f64, scratch.numel); }

// What is read before a step is checked and run.
struct StepArguments {
  TensorArgument &x, &weights, &table, &index, &z, &seeds, &scratch;
  TensorArgument model[kModels], history[kHistory], out[kOutputs];
  Extras e;
};

bool run_step(StepArguments& a, int64_t row, const NoiseArgument& noise, bool draws) {
  auto& [x, weights, table, index, z, seeds, scratch, model, history, out, e] = a;
  auto& [threshold, mask, known, known_z, level, sample, log_prob] = e.tensors;
  if (!same_device({&x,     &model[0], &model[1], &model[2], &weights,  &table,     &index,
                    &z,     &seeds,    &out[0],   &out[1],   &out[2],   &threshold, &mask,
                    &known, &known_z,  &level,    &sample,   &log_prob, &scratch}) ||
      !same_device(
          {&x, &history[0], &history[1], &history[2], &history[3], &history[4], &history[5]}))
    return false;
  StepParams p;
  if (e.variance != 0) {  // the channels' second half is the variance
    if (x.ndim < 2) return false;
    for (TensorArgument& m : model) {
      if (!m.defined()) continue;
      if (m.ndim != x.ndim || m.shape[1] != 2 * x.shape[1]) return false;
      m.shape[1] = x.shape[1];
      m.numel /= 2;
    }
    p.log_variance = model[0];
    p.log_variance.data = static_cast<char*>(model[0].data) +
                          model[0].strides[1] * x.shape[1] * (model[0].dtype == Dtype::f32 ? 4 : 2);
    p.variance = static_cast<Variance>(e.variance);
  }
  const Views like_x = {&x,          &model[0],   &model[1],   &model[2],   &history[0],
                        &history[1], &history[2], &history[3], &history[4], &history[5],
                        &z,          &mask,       &known,      &known_z,    &sample,
                        &out[0],     &out[1],     &out[2]};
  if (!same_shapes(like_x) || !floats(like_x) || !valid_table(table, index, row, x)) return false;
  int models = 0, outputs = 0;
  while (models < kModels && model[models].defined()) ++models;
  while (outputs < kOutputs && out[outputs].defined()) ++outputs;
  for (int i = models; i < kModels; ++i)
    if (model[i].defined()) return false;
  if ((models > 1 && !weights.defined()) || !per_sample_vector(weights, models, x) ||
      !per_sample_vector(threshold, 1, x) || !per_sample_vector(level, 2, x))
    return false;
  if (mask.defined() != known.defined() || (log_prob.defined() && p.variance != Variance::fixed))
    return false;
  const int64_t batch = x.ndim > 0 ? x.shape[0] : 1;
  if (!vector_of(log_prob, Dtype::f32, batch) || !sums_fit(scratch)) return false;
  for (int o = 0; o < outputs; ++o) {
    if (!writable(out[o])) return false;
    for (const TensorView* source : like_x)
      if (source != &out[o] && !overlap_is_safe(out[o], *source)) return false;
    for (int k = o + 1; k < outputs; ++k)
      if (Range(out[o]).meets(Range(out[k]))) return false;
  }
  if (!noise.fill(p.noise, seeds, x)) return false;
  p.x = x, p.weights = weights, p.table = table, p.index = index, p.row = row, p.z = z;
  for (int i = 0; i < kModels; ++i) p.models[i] = model[i];
  for (int i = 0; i < kHistory; ++i) p.history[i] = history[i];
  for (int i = 0; i < kOutputs; ++i) p.out[i] = out[i];
  p.draws = draws && !z.defined();
  p.threshold = threshold, p.mask = mask, p.known = known, p.known_z = known_z;
  p.level = level, p.sample = sample, p.log_prob = log_prob, p.scratch = scratch;
  if (!sources_given(p, outputs)) return false;
  if (known.defined() && !known_z.defined() && !draws && level.defined()) return false;
  p.threads = g_gate.threads();
  return run(p, x, GENFAST_KERNEL(diffusion_step));
}

bool diffusion_step(py::handle outs, TensorArgument& x, py::handle model_outputs,
                    TensorArgument& weights, TensorArgument& table, TensorArgument& index,
                    int64_t row, py::handle past, TensorArgument& z, py::handle seed,
                    TensorArgument& seeds, py::handle stream, py::handle offset, bool draws,
                    py::handle extras, TensorArgument& scratch) {
  StepArguments a{x, weights, table, index, z, seeds, scratch, {}, {}, {}, {}};
  return read_tuple(outs, a.out) && read_tuple(model_outputs, a.model) &&
         read_tuple(past, a.history) && a.e.read(extras) && given({&x, &a.model[0], &a.out[0]}) &&
         run_step(a, row, NoiseArgument(seed, stream, offset), draws);
}

// Which dtypes step_row takes beyond those of the kernel.
enum class Alike { any, same, float32 };  // outputs are like x; m is too; and that is float32

// An output of a step: torch.empty_like(x) in place o of `outs`, read into `view`.
bool new_output(PyObject* outs, Py_ssize_t o, PyObject* x, TensorArgument& view) {
  PyObject* out = PyObject_CallOneArg(g_gate.empty_like(), x);
  if (out == nullptr) throw py::error_already_set();
  PyTuple_SET_ITEM(outs, o, out);
  return view.read(out);
}

// step_row on the CPU without extras and with at most one seed, which is nearly every step: reads
// only what is there (a view is 230 bytes, run_step takes 25 of them) and spares new outputs the
// search for overlaps, 0.4 us of 2.4. None, or null with an error: step_row goes on.
PyObject* plain_step(PyObject* const* args, PyObject* const* tensors, Py_ssize_t past) {
  PyObject *z = args[6], *seed = args[7];
  if (seed != Py_None && !PyLong_Check(seed)) Py_RETURN_NONE;
  StepParams p;
  const auto read = [](PyObject* object, TensorView& to) {
    TensorArgument view;
    if (!view.read(object) || !view.is_cpu()) return false;
    to = view;
    return true;
  };
  const auto like_x = [&](PyObject* object, TensorView& to) {
    return object == Py_None || (read(object, to) && is_float(to.dtype) && same_shape(to, p.x));
  };
  if (!read(tensors[0], p.x) || !is_float(p.x.dtype) || tensors[1] == Py_None ||
      !like_x(tensors[1], p.models[0]) || !like_x(z, p.z) || !read(args[0], p.table))
    Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < past; ++i)
    if (!like_x(tensors[3 + i], p.history[i])) Py_RETURN_NONE;
  p.row = PyLong_AsLong(args[1]);
  const long outputs = PyLong_AsLong(args[2]);
  const auto alike = static_cast<Alike>(PyLong_AsLong(args[10]));
  if (PyErr_Occurred()) return nullptr;
  p.draws = seed != Py_None && z == Py_None;
  if (outputs < 1 || outputs > kOutputs || !valid_table(p.table, p.index, p.row, p.x) ||
      !sources_given(p, static_cast<int>(outputs)))
    Py_RETURN_NONE;
  if (alike != Alike::any && p.x.dtype != p.models[0].dtype) Py_RETURN_NONE;
  if (alike == Alike::float32 && outputs > 1 && p.x.dtype != Dtype::f32) Py_RETURN_NONE;
  try {
    if (p.draws) NoiseArgument(seed, args[8], 0).fill(p.noise, TensorView(), p.x);
    py::tuple outs(outputs);
    for (long o = 0; o < outputs; ++o) {
      TensorArgument view;
      if (!new_output(outs.ptr(), o, args[3], view)) Py_RETURN_NONE;
      p.out[o] = view;
    }
    p.threads = g_gate.threads();
    // up to what one thread does in some 8 us; drawn noise costs 1 ns an element
    const int64_t brief = p.draws ? 4096 : 65536;
    if (run(p, p.x, GENFAST_KERNEL(diffusion_step), brief)) return outs.release().ptr();
    Py_RETURN_NONE;
  } catch (...) {
    set_python_error();
  }
  return nullptr;
}

// step_row(table, row, outputs, x, m, history, z, seed, stream, extras, alike): the tuple of new
// outputs, or None where the caller must take another road. The gate, the allocations and the
// kernel in one call, without pybind11's dispatch: 1.3 us less than one by one, of 6.
// m: a tensor. seed: int or tensor; None draws nothing.
PyObject* step_row(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 11) {
    PyErr_SetString(PyExc_TypeError, "step_row: expected 11 arguments");
    return nullptr;
  }
  PyObject *history = args[5], *z = args[6], *seed = args[7];
  const Py_ssize_t past = PyTuple_Check(history) ? PyTuple_GET_SIZE(history) : kHistory + 1;
  if (past > kHistory) Py_RETURN_NONE;
  PyObject* tensors[3 + kHistory] = {args[3], args[4], z};
  for (Py_ssize_t i = 0; i < past; ++i) tensors[3 + i] = PyTuple_GET_ITEM(history, i);
  try {
    if (g_gate(tensors, 3 + past) != kDirect) Py_RETURN_NONE;
  } catch (...) {
    set_python_error();
    return nullptr;
  }
  if (args[9] == Py_None) {
    PyObject* outs = plain_step(args, tensors, past);
    if (outs != Py_None) return outs;
    Py_DECREF(outs);
  }

  TensorArgument x, weights, table, index, given_z, seeds, no_scratch;
  StepArguments a{x, weights, table, index, given_z, seeds, no_scratch, {}, {}, {}, {}};
  const bool draws = seed != Py_None, one_seed = PyLong_Check(seed);
  const long row = PyLong_AsLong(args[1]), outputs = PyLong_AsLong(args[2]);
  const auto alike = static_cast<Alike>(PyLong_AsLong(args[10]));
  if (PyErr_Occurred()) return nullptr;
  if (outputs < 1 || outputs > kOutputs || !x.read(args[3]) || !a.model[0].read(args[4]) ||
      !table.read(args[0]) || !read_tuple(history, a.history) || !a.e.read(args[9]) ||
      (z != Py_None && !given_z.read(z)) || (draws && !one_seed && !seeds.read(seed)))
    Py_RETURN_NONE;
  if (alike != Alike::any && x.dtype != a.model[0].dtype) Py_RETURN_NONE;
  if (alike == Alike::float32 && outputs > 1 && x.dtype != Dtype::f32) Py_RETURN_NONE;
  try {
    const NoiseArgument noise(one_seed ? py::handle(seed) : py::int_(0), args[8], 0);
    py::tuple outs(outputs);
    for (long o = 0; o < outputs; ++o)
      if (!new_output(outs.ptr(), o, args[3], a.out[o])) Py_RETURN_NONE;
    if (run_step(a, row, noise, draws)) return outs.release().ptr();
    Py_RETURN_NONE;
  } catch (...) {
    set_python_error();
  }
  return nullptr;
}
PyMethodDef g_step_row_method = {"step_row", reinterpret_cast<PyCFunction>(step_row), METH_FASTCALL,
                                 "step_row(table, row, outputs, x, m, history, z, seed, stream, "
                                 "extras, alike) -> tuple of new outputs, or None: not handled"};

// ---- what a drop-in scheduler asks at every step, 0.2 us each where Python takes 0.5 ------------

// unchanged(attributes, watched): every entry (name, object, version) of the flat tuple `watched`
// is still the very object under its name in the dict, a tensor at the same version (None: any).
PyObject* unchanged(PyObject*, PyObject* const* args, Py_ssize_t count) {
  static PyObject* version_of = PyUnicode_InternFromString("_version");
  if (count != 2 || !PyDict_Check(args[0]) || !PyTuple_Check(args[1]) ||
      PyTuple_GET_SIZE(args[1]) % 3 != 0) {
    PyErr_SetString(PyExc_TypeError, "unchanged: expected a dict and a tuple of triples");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[1]); i += 3) {
    PyObject* const* entry = &PyTuple_GET_ITEM(args[1], i);
    PyObject* now = PyDict_GetItemWithError(args[0], entry[0]);  // borrowed
    if (now != entry[1]) return PyErr_Occurred() ? nullptr : Py_NewRef(Py_False);
    if (entry[2] == Py_None) continue;
    PyObject* version = PyObject_GetAttr(now, version_of);
    if (version == nullptr) return nullptr;
    const int same = PyObject_RichCompareBool(version, entry[2], Py_EQ);
    Py_DECREF(version);
    if (same != 1) return same < 0 ? nullptr : Py_NewRef(Py_False);
  }
  Py_RETURN_TRUE;
}
PyMethodDef g_unchanged_method = {"unchanged", reinterpret_cast<PyCFunction>(unchanged),
                                  METH_FASTCALL, "unchanged(attributes, watched) -> bool"};

// integer(t): t, an int; the value of a CPU tensor of one int32 or int64; None of anything else.
PyObject* integer(PyObject*, PyObject* t) {
  if (PyLong_CheckExact(t)) return Py_NewRef(t);
  TensorArgument view;
  if (exchange_api(Py_TYPE(t)) == nullptr || !view.read(t) || !view.is_cpu() || view.numel != 1)
    Py_RETURN_NONE;
  if (view.dtype == Dtype::i64) return PyLong_FromLongLong(*static_cast<int64_t*>(view.data));
  if (view.dtype == Dtype::i32) return PyLong_FromLong(*static_cast<int32_t*>(view.data));
  Py_RETURN_NONE;
}
PyMethodDef g_integer_method = {"integer", integer, METH_O, "integer(t) -> int or None"};

// record(kind, names, values): kind(**dict(zip(names, values))) of a diffusers BaseOutput, an
// OrderedDict whose items are attributes as well, without its constructor (3.2 us).
PyObject* record(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 || !PyType_Check(args[0]) ||
      !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(args[0]), &PyODict_Type) ||
      !PyTuple_Check(args[1]) || !PyTuple_Check(args[2]) ||
      PyTuple_GET_SIZE(args[1]) != PyTuple_GET_SIZE(args[2])) {
    PyErr_SetString(PyExc_TypeError, "record: expected an OrderedDict type and two tuples alike");
    return nullptr;
  }
  auto* kind = reinterpret_cast<PyTypeObject*>(args[0]);
  static PyObject* nothing = PyTuple_New(0);
  PyObject* made = kind->tp_new(kind, nothing, nullptr);
  if (made == nullptr) return nullptr;
  PyObject* attributes = PyObject_GenericGetDict(made, nullptr);
  bool ok = attributes != nullptr;
  for (Py_ssize_t i = 0; ok && i < PyTuple_GET_SIZE(args[1]); ++i) {
    PyObject *name = PyTuple_GET_ITEM(args[1], i), *value = PyTuple_GET_ITEM(args[2], i);
    ok = PyDict_SetItem(attributes, name, value) == 0 && PyODict_SetItem(made, name, value) == 0;
  }
  Py_XDECREF(attributes);
  if (ok) return made;
  Py_DECREF(made);
  return nullptr;
}
PyMethodDef g_record_method = {"record", reinterpret_cast<PyCFunction>(record), METH_FASTCALL,
                               "record(kind, names, values) -> kind"};

// wanted: (d_x, (d_models), (d_history), d_z), None where not wanted.
bool diffusion_step_backward(py::handle gradients, TensorArgument& x, py::handle model_outputs,
                             TensorArgument& weights, TensorArgument& table, TensorArgument& index,
                             int64_t row, TensorArgument& threshold, TensorArgument& mask,
                             TensorArgument& d_x, py::handle d_models, py::handle d_history,
                             TensorArgument& d_z) {
  TensorArgument grad[kOutputs], model[kModels], dm[kModels], dh[kHistory];
  if (!read_tuple(gradients, grad) || !read_tuple(model_outputs, model) ||
      !read_tuple(d_models, dm) || !read_tuple(d_history, dh) || !given({&x, &model[0]}))
    return false;
  const Views like_x = {&x,     &model[0], &model[1], &model[2], &grad[0], &grad[1], &grad[2],
                        &dm[0], &dm[1],    &dm[2],    &dh[0],    &dh[1],   &dh[2],   &dh[3],
                        &dh[4], &dh[5],    &d_x,      &d_z,      &mask};
  if (!same_device(like_x) || !same_device({&x, &weights, &table, &index, &threshold}) ||
      !same_shapes(like_x) || !floats(like_x) || !valid_table(table, index, row, x))
    return false;
  int models = 0;
  while (models < kModels && model[models].defined()) ++models;
  if (!per_sample_vector(weights, models, x) || !per_sample_vector(threshold, 1, x)) return false;
  StepBackwardParams p;
  p.x = x, p.weights = weights, p.table = table, p.index = index, p.row = row;
  p.threshold = threshold, p.mask = mask, p.d_x = d_x, p.d_z = d_z;
  for (int i = 0; i < kOutputs; ++i) p.grad[i] = grad[i];
  for (int i = 0; i < kModels; ++i) p.models[i] = model[i], p.d_models[i] = dm[i];
  for (int i = 0; i < kHistory; ++i) p.d_history[i] = dh[i];
  p.threads = g_gate.threads();
  return run(p, x, GENFAST_KERNEL(diffusion_step_backward));
}

// A number or a tensor (f32 or f64) over leading dimensions of `like`; the tensor's view lives in
// `view` as long as the call.
struct CoefficientArgument : Coefficient {
  TensorArgument view;

  bool read(py::handle source, const TensorView& like, bool batch_only = false) {
    if (source.is_none()) return true;
    if (PyFloat_Check(source.ptr())) {
      value = PyFloat_AS_DOUBLE(source.ptr());
      return std::isfinite(value);
    }
    if (!view.read(source.ptr()) || (view.dtype != Dtype::f32 && view.dtype != Dtype::f64) ||
        view.device_type != like.device_type || view.device != like.device)
      return false;
    wide = view.dtype == Dtype::f64;
    if (view.numel == 1 && view.is_cpu()) {
      value = wide ? *static_cast<double*>(view.data) : *static_cast<float*>(view.data);
      return true;
    }
    data = view.data;
    return prefix_of(view, like) && !(batch_only && view.ndim != 1);
  }
};

bool diffusion_mix(TensorArgument& out, TensorArgument& from, TensorArgument& other,
                   py::handle seed, TensorArgument& seeds, py::handle stream, py::handle offset,
                   bool draws, py::handle a, py::handle b, float a_sign, float b_sign,
                   bool a_is_one_minus_b) {
  if (!given({&out, &from}) || !same_device({&out, &from, &other, &seeds}) ||
      !floats({&out, &from, &other}) || !same_shapes({&out, &from, &other}) || !writable(out) ||
      !overlap_is_safe(out, from) || !overlap_is_safe(out, other))
    return false;
  MixParams p;
  CoefficientArgument ca, cb;
  if (!ca.read(a, from) || !cb.read(b, from)) return false;
  if (ca.data != nullptr && cb.data != nullptr && ca.view.numel != cb.view.numel) return false;
  if (!NoiseArgument(seed, stream, offset).fill(p.noise, seeds, from)) return false;
  p.out = out, p.p = from, p.q = other, p.draws = draws && !other.defined();
  p.a = ca, p.b = cb, p.a_sign = a_sign, p.b_sign = b_sign;
  p.a_is_one_minus_b = a_is_one_minus_b;
  p.groups = ca.data != nullptr ? ca.view.numel : cb.data != nullptr ? cb.view.numel : 1;
  p.threads = g_gate.threads();
  return run(p, from, GENFAST_KERNEL(diffusion_mix));
}

bool guidance_weights(TensorArgument& cond, TensorArgument& uncond, TensorArgument& average,
                      TensorArgument& scale, TensorArgument& weights, int method, bool original,
                      double option_0, double option_1, TensorArgument& scratch) {
  if (!given({&cond, &uncond, &scale, &weights}) || cond.ndim == 0 || method < 0 ||
      method > static_cast<int>(Guidance::tcfg) ||
      !same_device({&cond, &uncond, &average, &scale, &weights, &scratch}) || !sums_fit(scratch) ||
      !floats({&cond, &uncond, &average}) || !same_shapes({&cond, &uncond, &average}) ||
      !per_sample_vector(scale, 1, cond) ||
      !vector_of(weights, Dtype::f32, cond.shape[0] * (average.defined() ? 3 : 2)))
    return false;
  GuidanceParams p;
  p.cond = cond, p.uncond = uncond, p.average = average, p.scale = scale, p.weights = weights;
  p.method = static_cast<Guidance>(method), p.original = original;
  p.option[0] = option_0, p.option[1] = option_1, p.scratch = scratch;
  p.threads = g_gate.threads();
  return run(p, cond, GENFAST_KERNEL(guidance_weights));
}

bool dynamic_threshold(TensorArgument& x, TensorArgument& m, TensorArgument& s,
                       TensorArgument& table, TensorArgument& index, int64_t row, double ratio,
                       double max, TensorArgument& scratch) {
  if (!given({&x, &s}) || x.ndim == 0 || x.numel == 0 ||
      !same_device({&x, &m, &s, &table, &index, &scratch}) || !floats({&x, &m}) ||
      !same_shapes({&x, &m}) || !vector_of(s, Dtype::f32, x.shape[0]) ||
      !vector_of(scratch, Dtype::f64, x.shape[0] * kThresholdRoom) || !(ratio >= 0 && ratio <= 1))
    return false;
  if (m.defined() && (!valid_table(table, index, row, x) || index.ndim > 1)) return false;
  ThresholdParams p;
  p.x = x, p.m = m, p.s = s, p.table = table, p.index = index, p.row = row;
  p.ratio = ratio, p.max = max, p.scratch = scratch, p.threads = g_gate.threads();
  return run(p, x, GENFAST_KERNEL(dynamic_threshold));
}

bool denoising_loss(TensorArgument& output, TensorArgument& x0, TensorArgument& z, py::handle seed,
                    TensorArgument& seeds, py::handle stream, py::handle offset, py::handle alpha,
                    py::handle sigma, py::handle weight, int prediction, int weighting,
                    double gamma, double k, TensorArgument& per_sample, TensorArgument& total,
                    double total_scale, TensorArgument& grad, TensorArgument& d_output,
                    TensorArgument& scratch) {
  if (!given({&output, &x0}) || output.ndim == 0 || output.numel == 0 ||
      !same_device({&output, &x0, &z, &seeds, &per_sample, &total, &grad, &d_output, &scratch}) ||
      !sums_fit(scratch) || !floats({&output, &x0, &z, &d_output}) ||
      !same_shapes({&output, &x0, &z, &d_output}) || prediction < 0 ||
      prediction > static_cast<int>(Prediction::flow) || weighting < 0 ||
      weighting > static_cast<int>(Weighting::given))
    return false;
  const int64_t batch = output.shape[0];
  LossParams p;
  CoefficientArgument ca, cs, cw;
  if (sigma.is_none() || !ca.read(alpha, output, true) || !cs.read(sigma, output, true) ||
      !cw.read(weight, output, true))
    return false;
  if (!d_output.defined() && !per_sample.defined()) return false;
  if (!vector_of(per_sample, Dtype::f32, batch) || !vector_of(total, Dtype::f32, 1) ||
      !(vector_of(grad, Dtype::f32, 1) || vector_of(grad, Dtype::f32, batch)))
    return false;
  if (!NoiseArgument(seed, stream, offset).fill(p.noise, seeds, output)) return false;
  p.output = output, p.x0 = x0, p.z = z, p.alpha = ca, p.sigma = cs, p.weight = cw;
  p.flow_alpha = alpha.is_none();
  p.prediction = static_cast<Prediction>(prediction);
  p.weighting = static_cast<Weighting>(weighting);
  p.gamma = gamma, p.k = k, p.per_sample = per_sample, p.total = total;
  p.total_scale = total_scale, p.grad = grad, p.d_output = d_output, p.scratch = scratch;
  if (total.defined() && !output.is_cpu() && !(scratch.numel >= batch)) return false;
  p.threads = g_gate.threads();
  return run(p, output, GENFAST_KERNEL(denoising_loss));
}

}  // namespace

void register_diffusion(py::module_& m) {
  // The last argument of four is the CUDA kernels' alone.
  const auto none = py::none();
  m.def("diffusion_step", &diffusion_step, py::arg("outs"), py::arg("x"), py::arg("models"),
        py::arg("weights"), py::arg("table"), py::arg("index"), py::arg("row"), py::arg("history"),
        py::arg("z"), py::arg("seed"), py::arg("seeds"), py::arg("stream"), py::arg("offset"),
        py::arg("draws"), py::arg("extras"), py::arg("scratch") = none);
  add_fast(m, g_step_row_method);
  add_fast(m, g_unchanged_method);
  add_fast(m, g_integer_method);
  add_fast(m, g_record_method);
  m.def("diffusion_step_backward", &diffusion_step_backward);
  m.def("diffusion_mix", &diffusion_mix);
  m.def("guidance_weights", &guidance_weights, py::arg("cond"), py::arg("uncond"),
        py::arg("average"), py::arg("scale"), py::arg("weights"), py::arg("method"),
        py::arg("original"), py::arg("option_0"), py::arg("option_1"), py::arg("scratch") = none);
  m.def("dynamic_threshold", &dynamic_threshold, py::arg("x"), py::arg("m"), py::arg("s"),
        py::arg("table"), py::arg("index"), py::arg("row"), py::arg("ratio"), py::arg("max"),
        py::arg("scratch") = none);
  m.def("denoising_loss", &denoising_loss, py::arg("output"), py::arg("x0"), py::arg("z"),
        py::arg("seed"), py::arg("seeds"), py::arg("stream"), py::arg("offset"), py::arg("alpha"),
        py::arg("sigma"), py::arg("weight"), py::arg("prediction"), py::arg("weighting"),
        py::arg("gamma"), py::arg("k"), py::arg("per_sample"), py::arg("total"),
        py::arg("total_scale"), py::arg("grad"), py::arg("d_output"), py::arg("scratch") = none);
}

}  // namespace genfast
