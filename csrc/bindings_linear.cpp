// Native entry points of the linear family; bindings.cpp has the rest and the rules.
#include "api/linear.h"
#include "binding.h"

namespace genfast {
namespace {

bool rows_of(const TensorView& t) {
  return t.dtype == Dtype::f32 && t.ndim == 2 && (t.shape[1] <= 1 || t.strides[1] == 1);
}

// Rows, or their transpose.
bool matrix_of(const TensorView& t) {
  return rows_of(t) || (t.dtype == Dtype::f32 && t.ndim == 2 && t.strides[0] == 1);
}

bool linear(TensorArgument& y, TensorArgument& x, TensorArgument& weight, TensorArgument& bias,
            bool relu) {
  if (!given({&y, &x, &weight}) || !same_device({&y, &x, &weight, &bias}) || !rows_of(y) ||
      !is_contiguous(y) || !rows_of(x) || !matrix_of(weight) || x.shape[1] != weight.shape[1] ||
      y.shape[0] != x.shape[0] || y.shape[1] != weight.shape[0] ||
      !vector_of(bias, Dtype::f32, weight.shape[0]))
    return false;
  LinearParams p;
  p.x = x, p.weight = weight, p.bias = bias, p.y = y, p.relu = relu;
  p.threads = threads_for(weight);
  return run(p, weight, &cpu::Kernels::linear);
}

bool linear_weight(TensorArgument& dweight, TensorArgument& dbias, TensorArgument& grad,
                   TensorArgument& x) {
  if (!given({&dweight, &grad, &x}) || !same_device({&dweight, &dbias, &grad, &x}) || !rows_of(x) ||
      !rows_of(grad) || !rows_of(dweight) || !is_contiguous(dweight) ||
      x.shape[0] != grad.shape[0] || dweight.shape[0] != grad.shape[1] ||
      dweight.shape[1] != x.shape[1] || !vector_of(dbias, Dtype::f32, grad.shape[1]))
    return false;
  LinearWeightParams p;
  p.x = x, p.grad = grad, p.dweight = dweight, p.dbias = dbias, p.threads = threads_for(x);
  return run(p, x, &cpu::Kernels::linear_weight);
}

}  // namespace

void register_linear(py::module_& m) {
  m.def("linear", &linear);
  m.def("linear_weight", &linear_weight);
}

}  // namespace genfast
