// Native entry points of the normalization family; bindings.cpp has the rest and the rules.
#include <cmath>

#include "api/normalization.h"
#include "binding.h"

namespace genfast {
namespace {

// Undefined, or [rows, channels] of floats with unit last stride.
bool rows_of(const TensorView& t, int64_t rows, int64_t channels) {
  if (!t.defined()) return true;
  return is_float(t.dtype) && t.ndim == 2 && t.shape[0] == rows && t.shape[1] == channels &&
         (channels <= 1 || t.strides[1] == 1);
}

// The settings of both directions; x decides the shape. groups = 0: the last dimension's.
bool fill(NormalizeParams& p, const TensorView& x, const TensorView& statistics,
          const TensorView& w, const TensorView& b, const TensorView& scale,
          const TensorView& shift, const TensorView& add, const TensorView& gate, int64_t groups,
          bool rms, int act, float eps) {
  if (!is_float(x.dtype) || x.ndim < 1 || groups < 0 || (rms && groups > 0) || act < 0 ||
      act > static_cast<int>(NormActivation::gelu_tanh) || !(eps >= 0.0f) || std::isinf(eps))
    return false;
  if (groups > 0) {
    if (x.ndim < 2 || !planes_of(x, 1, p.planes) || p.planes.channels % groups != 0) return false;
  } else {
    if (!is_contiguous(x) || (x.ndim < 2 && (scale.defined() || shift.defined() || gate.defined())))
      return false;
    p.planes.channels = x.shape[x.ndim - 1];
    p.planes.channels_inner = true;
    p.planes.outer = x.ndim > 1 ? x.shape[0] : 1;
    for (int i = 1; i + 1 < x.ndim; ++i) p.planes.inner *= x.shape[i];
  }
  p.groups = groups, p.rms = rms;
  const int64_t C = p.planes.channels, outer = p.planes.outer;
  if (!vector_of(statistics, Dtype::f32, (rms ? 1 : 2) * p.group_count())) return false;
  for (const TensorView* t : {&w, &b})
    if (!dense_floats(*t) || (t->defined() && (t->ndim != 1 || t->numel != C))) return false;
  for (const TensorView* t : {&scale, &shift, &gate})
    if (!rows_of(*t, outer, C)) return false;
  if (gate.defined() && !add.defined()) return false;
  if (add.defined() && (groups > 0 || !is_float(add.dtype) || !same_memory(add, x))) return false;
  p.x = x, p.statistics = statistics, p.w = w, p.b = b, p.scale = scale, p.shift = shift;
  p.add = add, p.gate = gate;
  p.act = static_cast<NormActivation>(act), p.eps = eps;
  p.threads = threads_for(x);
  return true;
}

bool normalize(TensorArgument& y, TensorArgument& statistics, TensorArgument& sum,
               TensorArgument& x, TensorArgument& w, TensorArgument& b, TensorArgument& scale,
               TensorArgument& shift, TensorArgument& add, TensorArgument& gate, int64_t groups,
               bool rms, int act, float eps, TensorArgument& scratch) {
  NormalizeParams p;
  if (!given({&y, &x}) ||
      !same_device({&y, &statistics, &sum, &x, &w, &b, &scale, &shift, &add, &gate, &scratch}) ||
      !vector_of(scratch, Dtype::f32, scratch.numel) || y.dtype != x.dtype || !same_memory(y, x) ||
      sum.defined() != add.defined() ||
      !fill(p, x, statistics, w, b, scale, shift, add, gate, groups, rms, act, eps))
    return false;
  if (sum.defined() && (sum.dtype != x.dtype || !same_memory(sum, x))) return false;
  p.y = y, p.sum = sum, p.scratch = scratch;
  return run(p, x, GENFAST_KERNEL(normalize));
}

bool normalize_backward(TensorArgument& grad, TensorArgument& grad_sum, TensorArgument& dx,
                        TensorArgument& dw, TensorArgument& db, TensorArgument& d_scale,
                        TensorArgument& d_shift, TensorArgument& d_add, TensorArgument& d_gate,
                        TensorArgument& statistics, TensorArgument& x, TensorArgument& w,
                        TensorArgument& b, TensorArgument& scale, TensorArgument& shift,
                        TensorArgument& add, TensorArgument& gate, int64_t groups, bool rms,
                        int act, float eps, TensorArgument& scratch) {
  NormalizeBackwardParams q;
  if (!given({&grad, &dx, &statistics, &x}) ||
      !same_device({&grad, &grad_sum, &dx, &dw, &db, &d_scale, &d_shift, &d_add, &d_gate,
                    &statistics, &x, &w, &b, &scale, &shift, &add, &gate, &scratch}) ||
      !floats({&grad, &dx}) || dx.dtype != x.dtype || !same_memory(grad, x) ||
      !same_memory(dx, x) ||
      !fill(q.forward, x, statistics, w, b, scale, shift, add, gate, groups, rms, act, eps))
    return false;
  const int64_t C = q.forward.planes.channels, outer = q.forward.planes.outer;
  for (const TensorView* t : {&dw, &db})
    if (!vector_of(*t, Dtype::f32, C)) return false;
  for (const TensorView* t : {&d_scale, &d_shift, &d_gate})
    if (!vector_of(*t, Dtype::f32, outer * C)) return false;
  // Each row of a modulated call belongs to one sample; S1 and S2 are then a sample's.
  if ((d_scale.defined() && !scale.defined()) || (d_shift.defined() && !shift.defined()))
    return false;
  if (grad_sum.defined() && (groups > 0 || !is_float(grad_sum.dtype) || !same_memory(grad_sum, x)))
    return false;
  // The gradients of a gated term, both or none: ungated, add's is dx.
  if (d_gate.defined() != gate.defined() || d_add.defined() != gate.defined()) return false;
  if (gate.defined() && (d_add.dtype != add.dtype || !same_memory(d_add, add))) return false;
  if (!vector_of(scratch, Dtype::f32, scratch.numel)) return false;
  q.grad_sum = grad_sum, q.d_add = d_add, q.d_gate = d_gate, q.scratch = scratch;
  q.grad = grad, q.dx = dx, q.dw = dw, q.db = db, q.d_scale = d_scale, q.d_shift = d_shift;
  const bool sums = dw.defined() || db.defined() || d_scale.defined() || d_shift.defined();
  if (x.is_cuda() && x.numel > 0 && (sums || d_gate.defined()) && q.parts() < 1) return false;
  return run(q, x, GENFAST_KERNEL(normalize_backward));
}

}  // namespace

void register_normalization(py::module_& m) {
  m.def("normalize", &normalize, py::arg("y"), py::arg("statistics"), py::arg("sum"), py::arg("x"),
        py::arg("w"), py::arg("b"), py::arg("scale"), py::arg("shift"), py::arg("add"),
        py::arg("gate"), py::arg("groups"), py::arg("rms"), py::arg("act"), py::arg("eps"),
        py::arg("scratch") = py::none());
  m.def("normalize_backward", &normalize_backward, py::arg("grad"), py::arg("grad_sum"),
        py::arg("dx"), py::arg("dw"), py::arg("db"), py::arg("d_scale"), py::arg("d_shift"),
        py::arg("d_add"), py::arg("d_gate"), py::arg("statistics"), py::arg("x"), py::arg("w"),
        py::arg("b"), py::arg("scale"), py::arg("shift"), py::arg("add"), py::arg("gate"),
        py::arg("groups"), py::arg("rms"), py::arg("act"), py::arg("eps"),
        py::arg("scratch") = py::none());
}

}  // namespace genfast
