// Native entry points of the filtering family; bindings.cpp has the rest and the rules.
#include <cmath>

#include "api/filtering.h"
#include "binding.h"

namespace genfast {
namespace {

// The settings of both directions; `x` decides the shape.
bool fill(BiasActParams& p, const TensorView& x, const TensorView& b, const TensorView& noise,
          const TensorView& strength, const TensorView& seeds, py::handle seed, py::handle stream,
          py::handle offset, bool draws, int64_t dim, int act, float alpha, float gain,
          float clamp) {
  if (!is_float(x.dtype) || !planes_of(x, dim, p.planes) || act < 0 ||
      act > static_cast<int>(Activation::gelu_tanh) || !dense_floats(b) || !dense_floats(noise) ||
      !vector_of(strength, Dtype::f32, 1))
    return false;
  if (b.defined() && (b.ndim != 1 || b.numel != p.planes.channels)) return false;
  if (!std::isfinite(alpha) || !std::isfinite(gain) || !std::isfinite(clamp)) return false;
  const int64_t places = p.planes.outer * p.planes.inner;
  if (noise.defined() && noise.numel != places && noise.numel != p.planes.inner) return false;
  draws = draws && !noise.defined();
  if ((draws || noise.defined()) && !strength.defined()) return false;
  TensorView rows;  // what the noise is drawn for: x with one channel
  rows.ndim = x.ndim;
  for (int i = 0; i < x.ndim; ++i) rows.shape[i] = i == dim ? 1 : x.shape[i];
  if (!NoiseArgument(seed, stream, offset).fill(p.drawn, seeds, rows)) return false;
  p.drawn_rows = rows.shape[0];
  p.x = x, p.b = b, p.noise = noise, p.strength = strength, p.draws = draws;
  p.act = static_cast<Activation>(act), p.alpha = alpha, p.gain = gain, p.clamp = clamp;
  p.threads = g_gate.threads();
  return true;
}

bool bias_act(TensorArgument& y, TensorArgument& x, TensorArgument& b, TensorArgument& noise,
              TensorArgument& strength, TensorArgument& seeds, py::handle seed, py::handle stream,
              py::handle offset, bool draws, int64_t dim, int act, float alpha, float gain,
              float clamp) {
  BiasActParams p;
  if (!given({&y, &x}) || !same_device({&y, &x, &b, &noise, &strength, &seeds}) ||
      !is_float(y.dtype) || !same_memory(y, x) ||
      !fill(p, x, b, noise, strength, seeds, seed, stream, offset, draws, dim, act, alpha, gain,
            clamp))
    return false;
  p.y = y;
  return run(p, x, GENFAST_KERNEL(bias_act));
}

bool bias_act_backward(TensorArgument& grad, TensorArgument& dz, TensorArgument& db,
                       TensorArgument& d_strength, TensorArgument& source, bool from_y,
                       TensorArgument& b, TensorArgument& noise, TensorArgument& strength,
                       TensorArgument& seeds, py::handle seed, py::handle stream, py::handle offset,
                       bool draws, int64_t dim, int act, float alpha, float gain, float clamp,
                       TensorArgument& scratch) {
  BiasActBackwardParams q;
  if (!given({&grad, &dz, &source}) ||
      !same_device(
          {&grad, &dz, &db, &d_strength, &source, &b, &noise, &strength, &seeds, &scratch}) ||
      !floats({&grad, &dz}) || !same_memory(grad, source) || !same_memory(dz, source) ||
      !fill(q.forward, source, b, noise, strength, seeds, seed, stream, offset, draws, dim, act,
            alpha, gain, clamp))
    return false;
  if (!vector_of(db, Dtype::f32, q.forward.planes.channels) ||
      !vector_of(d_strength, Dtype::f32, 1) || !vector_of(scratch, Dtype::f64, scratch.numel) ||
      (d_strength.defined() && !noise.defined() && !draws))
    return false;
  q.from_y = from_y, q.grad = grad, q.dz = dz, q.db = db, q.d_strength = d_strength;
  q.scratch = scratch;
  return run(q, source, GENFAST_KERNEL(bias_act_backward));
}

bool fill(GatedActParams& p, const TensorView& x, const TensorView& y, int act) {
  if (x.ndim < 1 || y.ndim != x.ndim || y.dtype != x.dtype || !is_float(x.dtype) ||
      !is_contiguous(x) || !is_contiguous(y) || act < 0 ||
      act > static_cast<int>(Activation::gelu_tanh))
    return false;
  p.rows = 1, p.half = y.shape[y.ndim - 1];
  for (int i = 0; i + 1 < x.ndim; ++i) {
    if (x.shape[i] != y.shape[i]) return false;
    p.rows *= x.shape[i];
  }
  if (x.shape[x.ndim - 1] != 2 * p.half) return false;
  p.x = x, p.y = y, p.act = static_cast<Activation>(act), p.threads = threads_for(x);
  return true;
}

bool gated_act(TensorArgument& y, TensorArgument& x, int act) {
  GatedActParams p;
  if (!given({&y, &x}) || !same_device({&y, &x}) || !fill(p, x, y, act)) return false;
  return run(p, x, GENFAST_KERNEL(gated_act));
}

bool gated_act_backward(TensorArgument& grad, TensorArgument& dx, TensorArgument& x, int act) {
  GatedActBackwardParams q;
  if (!given({&grad, &dx, &x}) || !same_device({&grad, &dx, &x}) || dx.dtype != x.dtype ||
      !same_memory(dx, x) || !fill(q.forward, x, grad, act))
    return false;
  q.grad = grad, q.dx = dx;
  return run(q, x, GENFAST_KERNEL(gated_act_backward));
}

// Front and back padding of both axes; sizes that fit y are checked here, so that no kernel reads
// or writes beyond its tensors.
bool upfirdn2d(TensorArgument& y, TensorArgument& x, TensorArgument& f, int64_t up_x, int64_t up_y,
               int64_t down_x, int64_t down_y, int64_t x0, int64_t x1, int64_t y0, int64_t y1,
               bool flip, double gain) {
  constexpr int64_t kMost = int64_t{1} << 31;
  if (!given({&y, &x, &f}) || !same_device({&y, &x, &f}) || !floats({&y, &x}) || x.ndim != 4 ||
      y.ndim != 4 || f.dtype != Dtype::f32 || !is_contiguous(f) || f.ndim < 1 || f.ndim > 2 ||
      f.numel == 0 || !std::isfinite(gain))
    return false;
  for (int64_t v : {up_x, up_y, down_x, down_y})
    if (v < 1 || v > kMost) return false;
  for (int64_t v : {x0, x1, y0, y1})
    if (v < -kMost || v > kMost) return false;
  if (y.shape[0] != x.shape[0] || y.shape[1] != x.shape[1] || x.shape[1] < 1) return false;
  const auto fits = [](int64_t in, int64_t out, int64_t up, int64_t down, int64_t pad, int64_t n) {
    const int64_t room = in * up + pad - n;
    return in >= 1 && in <= kMost && room >= 0 && out == room / down + 1;
  };
  if (!fits(x.shape[2], y.shape[2], up_y, down_y, y0 + y1, f.shape[0]) ||
      !fits(x.shape[3], y.shape[3], up_x, down_x, x0 + x1, f.shape[f.ndim - 1]))
    return false;
  Planes of_x, of_y;
  if (!planes_of(x, 1, of_x) || !planes_of(y, 1, of_y)) return false;
  UpfirdnParams p;
  p.channels_inner = x.shape[1] > 1 && !is_contiguous(x);
  if (p.channels_inner ? y.numel > 1 && y.strides[1] != 1 : !is_contiguous(y)) return false;
  p.x = x, p.f = f, p.y = y;
  p.up[0] = up_y, p.up[1] = up_x, p.down[0] = down_y, p.down[1] = down_x;
  p.before[0] = y0, p.before[1] = x0;
  p.flip = flip, p.gain = gain, p.threads = g_gate.threads();
  return run(p, y, GENFAST_KERNEL(upfirdn2d));
}

}  // namespace

void register_filtering(py::module_& m) {
  m.def("bias_act", &bias_act);
  m.def("bias_act_backward", &bias_act_backward, py::arg("grad"), py::arg("dz"), py::arg("db"),
        py::arg("d_strength"), py::arg("source"), py::arg("from_y"), py::arg("b"), py::arg("noise"),
        py::arg("strength"), py::arg("seeds"), py::arg("seed"), py::arg("stream"),
        py::arg("offset"), py::arg("draws"), py::arg("dim"), py::arg("act"), py::arg("alpha"),
        py::arg("gain"), py::arg("clamp"), py::arg("scratch") = py::none());
  m.def("gated_act", &gated_act);
  m.def("gated_act_backward", &gated_act_backward);
  m.def("upfirdn2d", &upfirdn2d);
}

}  // namespace genfast
