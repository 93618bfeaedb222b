// Native entry points of the convolution family; bindings.cpp has the rest and the rules.
#include "api/convolution.h"
#include "binding.h"

namespace genfast {
namespace {

// (B, C, H, W) of fp32 with the channels inside.
bool image(const TensorView& t) {
  Planes planes;
  return t.dtype == Dtype::f32 && t.ndim == 4 && planes_of(t, 1, planes) &&
         (planes.channels_inner || planes.inner == 1 || planes.channels == 1);
}

// `small` and `large` are images of one count, and `large` has `times` the sides. Channels are
// whole vectors at every level (16 floats); up to four on one side, where nothing else is asked
// for.
bool fit(const TensorView& small, const TensorView& large, int64_t times, bool plain) {
  int narrow = 0;
  for (const TensorView* t : {&small, &large}) {
    if (!image(*t) || t->shape[1] == 0) return false;
    if (t->shape[1] % 16 != 0 && (t->shape[1] > 4 || ++narrow > 1)) return false;
  }
  return (narrow == 0 || (plain && times == 1)) && small.shape[0] == large.shape[0] &&
         times * small.shape[2] == large.shape[2] && times * small.shape[3] == large.shape[3];
}

// A kernel of 3 x 3 from the channels of x to those of y.
bool kernel_of(const TensorView& weight, const TensorView& x, const TensorView& y) {
  return weight.dtype == Dtype::f32 && weight.ndim == 4 && weight.shape[0] == y.shape[1] &&
         weight.shape[1] == x.shape[1] && weight.shape[2] == 3 && weight.shape[3] == 3;
}

bool conv2d(TensorArgument& y, TensorArgument& x, TensorArgument& weight, TensorArgument& bias,
            TensorArgument& term, TensorArgument& projection, bool enlarged, bool transposed) {
  const TensorView &from = transposed ? y : x, &to = transposed ? x : y;
  if (!given({&y, &x, &weight}) || !same_device({&y, &x, &weight, &bias, &term, &projection}) ||
      !fit(from, to, enlarged ? 2 : 1, !term.defined()) || !kernel_of(weight, from, to) ||
      !vector_of(bias, Dtype::f32, y.shape[1]) || (bias.defined() && bias.ndim != 1) ||
      (projection.defined() && !term.defined()))
    return false;
  if (projection.defined()) {
    if (projection.dtype != Dtype::f32 || projection.ndim < 2 ||
        projection.numel != projection.shape[0] * projection.shape[1] ||
        projection.shape[0] != y.shape[1] || !image(term) || term.shape[0] != y.shape[0] ||
        term.shape[1] != projection.shape[1] || term.shape[2] != y.shape[2] ||
        term.shape[3] != y.shape[3])
      return false;
  } else if (term.defined() && (term.dtype != Dtype::f32 || !same_memory(term, y))) {
    return false;
  }
  ConvolutionParams p;
  p.x = x, p.y = y, p.weight = weight, p.bias = bias, p.term = term, p.projection = projection;
  p.enlarged = enlarged, p.transposed = transposed, p.threads = threads_for(x);
  return run(p, x, &cpu::Kernels::convolution);
}

bool conv2d_weight(TensorArgument& dweight, TensorArgument& dbias, TensorArgument& grad,
                   TensorArgument& x, bool enlarged) {
  if (!given({&dweight, &grad, &x}) || !same_device({&dweight, &dbias, &grad, &x}) ||
      !fit(x, grad, enlarged ? 2 : 1, true) || !kernel_of(dweight, x, grad) ||
      !vector_of(dbias, Dtype::f32, grad.shape[1]))
    return false;
  ConvolutionWeightParams p;
  p.x = x, p.grad = grad, p.dweight = dweight, p.dbias = dbias;
  p.enlarged = enlarged, p.threads = threads_for(x);
  return run(p, x, &cpu::Kernels::convolution_weight);
}

}  // namespace

void register_convolution(py::module_& m) {
  m.def("conv2d", &conv2d);
  m.def("conv2d_weight", &conv2d_weight);
}

}  // namespace genfast
