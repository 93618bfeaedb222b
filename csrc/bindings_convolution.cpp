// Native entry points of the convolution family; bindings.cpp has the rest and the rules.
#include "api/convolution.h"
#include "binding.h"

namespace genfast {
namespace {

// (B, C, H, W) of fp32 with the channels inside, whole vectors of every level (16 floats).
bool image(const TensorView& t, int64_t channels) {
  Planes planes;
  return t.dtype == Dtype::f32 && t.ndim == 4 && t.shape[1] == channels && channels > 0 &&
         channels % 16 == 0 && planes_of(t, 1, planes) &&
         (planes.channels_inner || planes.inner == 1);
}

// A kernel of 3 x 3 between images of the same sizes.
bool fits(const TensorView& x, const TensorView& y, const TensorView& weight, bool transposed) {
  if (weight.dtype != Dtype::f32 || weight.ndim != 4 || weight.shape[2] != 3 ||
      weight.shape[3] != 3)
    return false;
  const int64_t inputs = weight.shape[transposed ? 0 : 1];
  const int64_t outputs = weight.shape[transposed ? 1 : 0];
  return image(x, inputs) && image(y, outputs) && x.shape[0] == y.shape[0] &&
         x.shape[2] == y.shape[2] && x.shape[3] == y.shape[3];
}

bool conv2d(TensorArgument& y, TensorArgument& x, TensorArgument& weight, TensorArgument& bias,
            TensorArgument& add, bool transposed) {
  if (!given({&y, &x, &weight}) || !same_device({&y, &x, &weight, &bias, &add}) ||
      !fits(x, y, weight, transposed) || !vector_of(bias, Dtype::f32, y.shape[1]) ||
      (add.defined() && (add.dtype != Dtype::f32 || !same_memory(add, y))))
    return false;
  ConvolutionParams p;
  p.x = x, p.y = y, p.weight = weight, p.bias = bias, p.add = add, p.transposed = transposed;
  p.threads = threads_for(x);
  return run(p, x, &cpu::Kernels::convolution);
}

bool conv2d_weight(TensorArgument& dweight, TensorArgument& dbias, TensorArgument& grad,
                   TensorArgument& x) {
  if (!given({&dweight, &grad, &x}) || !same_device({&dweight, &dbias, &grad, &x}) ||
      !fits(x, grad, dweight, false) || !vector_of(dbias, Dtype::f32, grad.shape[1]))
    return false;
  ConvolutionWeightParams p;
  p.x = x, p.grad = grad, p.dweight = dweight, p.dbias = dbias, p.threads = threads_for(x);
  return run(p, x, &cpu::Kernels::convolution_weight);
}

}  // namespace

void register_convolution(py::module_& m) {
  m.def("conv2d", &conv2d);
  m.def("conv2d_weight", &conv2d_weight);
}

}  // namespace genfast
