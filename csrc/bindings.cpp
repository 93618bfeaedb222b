// The one list of native entry points. Each validates what would otherwise crash, picks the device
// and calls the kernel; the maths is below. A `false` means "not handled here" (device, dtype,
// layout): Python then takes the slow road, which names the argument that is wrong.
#include "api/rng.h"
#include "api/sampling.h"
#include "binding.h"
#include "cpu/parallel.h"
#include "cpu/processor.h"

namespace genfast {
namespace {

template <Asked slow_from>
PyObject* gate(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    return PyLong_FromLong(g_gate(args, count, slow_from));
  } catch (...) {
    set_python_error();
    return nullptr;
  }
}
template <Asked slow_from>
PyMethodDef gate_method(const char* name, const char* about) {
  return {name, reinterpret_cast<PyCFunction>(gate<slow_from>), METH_FASTCALL, about};
}
PyMethodDef g_gates[] = {
    gate_method<kCpuBlock>("gate", "gate(*tensors) -> int: 1 direct, 2 gradient wanted, 0 slow"),
    gate_method<kOther>("cpu_gate", "The same of what has CPU kernels and no registered op"),
    gate_method<kAnything>("plain_gate", "The same, whichever backend was asked for"),
};

bool random(TensorArgument& out, int distribution, py::handle seed, TensorArgument& seeds,
            py::handle stream, py::handle offset, int64_t low, uint64_t range) {
  if (!given({&out}) || !same_device({&out, &seeds})) return false;
  if (distribution < 0 || distribution > static_cast<int>(Distribution::bits)) return false;
  RandomParams p;
  p.out = out;
  p.distribution = static_cast<Distribution>(distribution);
  const bool integers = p.distribution >= Distribution::integer;
  if (integers ? !(is_contiguous(out) && (out.dtype == Dtype::i64 || out.dtype == Dtype::i32))
               : !(is_float(out.dtype) || out.dtype == Dtype::f64))
    return false;
  if (integers && (range < 1 || range > uint64_t{1} << 32)) return false;
  if (!NoiseArgument(seed, stream, offset).fill(p.noise, seeds, out)) return false;
  p.low = low;
  p.range = range;
  p.threads = threads_for(out);
  return run(p, out, GENFAST_KERNEL(random));
}

// Values of the native enums; anything else would select no code at all.
bool known(int transform, int side_kind) {
  return transform >= 0 && transform <= static_cast<int>(Transform::exp) && side_kind >= 0 &&
         side_kind <= static_cast<int>(Side::log_prob);
}

// Functions of whole rows take one seed per row: a single row (1-d) has one seed.
bool row_seeds(const TensorView& seeds, const TensorView& t) {
  return !seeds.defined() || seeds.numel == 1 || t.ndim > 1;
}

// Room for the CUDA kernels' partial sums, as much for each row.
bool parts_fit(const TensorView& scratch, int64_t rows) {
  return !scratch.defined() ||
         (vector_of(scratch, Dtype::f64, scratch.numel) && rows > 0 && scratch.numel % rows == 0);
}

bool reparameterize(TensorArgument& mu, TensorArgument& logvar, TensorArgument& y,
                    TensorArgument& side, py::handle seed, TensorArgument& seeds, py::handle stream,
                    py::handle offset, int transform, int side_kind, float side_scale,
                    TensorArgument& scratch) {
  if (!given({&mu, &logvar}) || !known(transform, side_kind) ||
      !same_device({&mu, &logvar, &y, &side, &scratch, &seeds}) || !floats({&mu, &logvar, &y}) ||
      !same_shapes({&mu, &logvar, &y}))
    return false;
  ReparameterizeParams p;
  if (!NoiseArgument(seed, stream, offset).fill(p.noise, seeds, mu)) return false;
  p.mu = mu, p.logvar = logvar, p.y = y, p.side = side, p.scratch = scratch;
  p.transform = static_cast<Transform>(transform);
  p.side_kind = static_cast<Side>(side_kind);
  p.side_scale = side_scale;
  if (side.defined()) {
    p.rows = side.numel;
    if (side.dtype != Dtype::f32 || !is_contiguous(side)) return false;
    if (side.ndim != 0 && (mu.ndim == 0 || side.numel != mu.shape[0])) return false;
  } else if (p.side_kind != Side::none) {
    return false;
  }
  if (!parts_fit(scratch, p.rows)) return false;
  p.threads = threads_for(mu);
  return run(p, mu, GENFAST_KERNEL(reparameterize));
}

// Whether p.logits and p.x make a call; rows: nll or grad.
bool bernoulli(BernoulliNllParams& p, const TensorView& rows) {
  p.threads = threads_for(p.logits);
  return floats({&p.logits, &p.x}) && same_shapes({&p.logits, &p.x}) && p.logits.ndim > 0 &&
         vector_of(rows, Dtype::f32, p.logits.shape[0]);
}

bool bernoulli_nll(TensorArgument& nll, TensorArgument& logits, TensorArgument& x,
                   TensorArgument& scratch) {
  if (!given({&nll, &logits, &x}) || !same_device({&nll, &logits, &x, &scratch}) ||
      !parts_fit(scratch, nll.numel))
    return false;
  BernoulliNllParams p;
  p.logits = logits, p.x = x, p.nll = nll, p.scratch = scratch;
  return bernoulli(p, nll) && run(p, logits, GENFAST_KERNEL(bernoulli_nll));
}

bool bernoulli_nll_backward(TensorArgument& grad, TensorArgument& d_logits, TensorArgument& d_x,
                            TensorArgument& logits, TensorArgument& x) {
  if (!given({&grad, &logits, &x}) || !same_device({&grad, &d_logits, &d_x, &logits, &x}) ||
      !floats({&d_logits, &d_x}) || !same_shapes({&logits, &d_logits, &d_x}))
    return false;
  BernoulliNllParams p;
  p.logits = logits, p.x = x, p.grad = grad, p.d_logits = d_logits, p.d_x = d_x;
  return bernoulli(p, grad) && run(p, logits, GENFAST_KERNEL(bernoulli_nll_backward));
}

bool reparameterize_backward(TensorArgument& grad_y, TensorArgument& grad_side, TensorArgument& mu,
                             TensorArgument& logvar, TensorArgument& d_mu, TensorArgument& d_logvar,
                             py::handle seed, TensorArgument& seeds, py::handle stream,
                             py::handle offset, int transform, int side_kind, float side_scale) {
  if (!given({&mu, &logvar, &d_mu, &d_logvar}) || !known(transform, side_kind) ||
      !same_device({&grad_y, &grad_side, &mu, &logvar, &d_mu, &d_logvar, &seeds}) ||
      !floats({&grad_y, &mu, &logvar, &d_mu, &d_logvar}) ||
      !same_shapes({&grad_y, &mu, &logvar, &d_mu, &d_logvar}))
    return false;
  ReparameterizeBackwardParams p;
  if (!NoiseArgument(seed, stream, offset).fill(p.noise, seeds, mu)) return false;
  p.grad_y = grad_y, p.grad_side = grad_side, p.mu = mu, p.logvar = logvar;
  p.d_mu = d_mu, p.d_logvar = d_logvar;
  p.transform = static_cast<Transform>(transform);
  p.side_kind = static_cast<Side>(side_kind);
  p.side_scale = side_scale;
  if (grad_side.defined()) {
    p.rows = grad_side.numel;
    if (grad_side.dtype != Dtype::f32 || !is_contiguous(grad_side)) return false;
    if (grad_side.ndim != 0 && (mu.ndim == 0 || grad_side.numel != mu.shape[0])) return false;
  }
  p.threads = g_gate.threads();
  return run(p, mu, GENFAST_KERNEL(reparameterize_backward));
}

// A temperature, f32: on the other tensors' device, or a number on the CPU.
bool is_tau(const TensorView& tau, const TensorView& beside) {
  return vector_of(tau, Dtype::f32, 1) && (tau.is_cpu() || same_device({&tau, &beside}));
}

bool gumbel_softmax(TensorArgument& logits, TensorArgument& y, TensorArgument& tau, py::handle seed,
                    TensorArgument& seeds, py::handle stream, py::handle offset, bool hard) {
  if (!given({&logits, &y, &tau}) || !row_seeds(seeds, logits) ||
      !same_device({&logits, &y, &seeds}) || !floats({&logits, &y}) ||
      !same_shapes({&logits, &y}) || logits.ndim == 0 || !is_tau(tau, logits))
    return false;
  GumbelSoftmaxParams p;
  if (!NoiseArgument(seed, stream, offset).fill(p.noise, seeds, logits)) return false;
  p.logits = logits, p.y = y, p.tau = tau, p.hard = hard, p.threads = g_gate.threads();
  return run(p, logits, GENFAST_KERNEL(gumbel_softmax));
}

bool gumbel_softmax_backward(TensorArgument& grad, TensorArgument& y, TensorArgument& logits,
                             TensorArgument& tau, TensorArgument& d_logits, py::handle seed,
                             TensorArgument& seeds, py::handle stream, py::handle offset) {
  if (!given({&grad, &tau, &d_logits}) || !row_seeds(seeds, grad) ||
      !same_device({&grad, &y, &logits, &d_logits, &seeds}) ||
      !floats({&grad, &y, &logits, &d_logits}) || !same_shapes({&grad, &y, &logits, &d_logits}) ||
      grad.ndim == 0 || !is_tau(tau, grad) || (!y.defined() && !logits.defined()))
    return false;
  GumbelSoftmaxBackwardParams p;
  if (!NoiseArgument(seed, stream, offset).fill(p.noise, seeds, grad)) return false;
  p.grad = grad, p.y = y, p.logits = logits, p.tau = tau, p.d_logits = d_logits;
  p.threads = g_gate.threads();
  return run(p, grad, GENFAST_KERNEL(gumbel_softmax_backward));
}

bool relaxed_bernoulli(TensorArgument& logits, TensorArgument& y, TensorArgument& tau,
                       TensorArgument& grad, py::handle seed, TensorArgument& seeds,
                       py::handle stream, py::handle offset, bool hard) {
  if (!given({&logits, &y, &tau}) || !same_device({&logits, &y, &grad, &seeds}) ||
      !floats({&logits, &y, &grad}) || !same_shapes({&logits, &y, &grad}) || !is_tau(tau, logits))
    return false;
  RelaxedBernoulliParams p;
  if (!NoiseArgument(seed, stream, offset).fill(p.noise, seeds, logits)) return false;
  p.logits = logits, p.y = y, p.tau = tau, p.grad = grad, p.hard = hard;
  p.backward = grad.defined();
  p.threads = g_gate.threads();
  return run(p, logits, GENFAST_KERNEL(relaxed_bernoulli));
}

// Number of rows without a finite maximum (0 on a GPU: counting would wait for it), or -1 when not
// handled.
int64_t categorical(TensorArgument& logits, TensorArgument& index, TensorArgument& temperature,
                    TensorArgument& top_k, TensorArgument& top_p, TensorArgument& min_p,
                    py::handle seed, TensorArgument& seeds, py::handle stream, py::handle offset) {
  if (!given({&logits, &index}) || !row_seeds(seeds, logits) ||
      !same_device({&logits, &index, &temperature, &top_k, &top_p, &min_p, &seeds}) ||
      !floats({&logits}) || logits.ndim == 0 || index.dtype != Dtype::i64 || !is_contiguous(index))
    return -1;
  const int64_t cols = logits.shape[logits.ndim - 1], rows = cols ? logits.numel / cols : 0;
  if (index.numel != rows) return -1;
  const auto fits = [&](const TensorView& t, Dtype dtype) {
    return vector_of(t, dtype, 1) || vector_of(t, dtype, rows);
  };
  if (!fits(temperature, Dtype::f32) || !fits(top_k, Dtype::i64) || !fits(top_p, Dtype::f32) ||
      !fits(min_p, Dtype::f32))
    return -1;
  CategoricalParams p;
  if (!NoiseArgument(seed, stream, offset).fill(p.noise, seeds, logits)) return -1;
  p.logits = logits, p.index = index, p.temperature = temperature, p.top_k = top_k;
  p.top_p = top_p, p.min_p = min_p, p.threads = g_gate.threads();
  if (!logits.is_cpu()) return run(p, logits, GENFAST_KERNEL(categorical)) ? 0 : -1;
  py::gil_scoped_release release;
  return cpu::kernels().categorical(p);
}

// (operations, 0) or (0, word): what the machine does at most; `data` chooses reading.
double limit(TensorArgument& data, int64_t rounds) {
  LimitParams p;
  p.data = data, p.rounds = rounds, p.threads = g_gate.threads();
  if (!data.defined()) {
    py::gil_scoped_release release;
    return cpu::kernels().fma_limit(p);
  }
  if (!p.data.is_cpu() || p.data.dtype != Dtype::f32 || !is_contiguous(p.data))
    throw py::value_error("data: expected a contiguous float32 tensor on the CPU");
  py::gil_scoped_release release;
  return cpu::kernels().read_limit(p);
}

py::dict build_info() {
  py::dict info;
  py::list isa;
  for (const char* const* name = cpu::isa_usable(); *name != nullptr; ++name) isa.append(*name);
  info["isa"] = cpu::isa_name();
  info["isa_usable"] = isa;
  char vendor[13];
  cpu::vendor(vendor);
  info["vendor"] = vendor;
  info["amd_512_bit_unit"] = cpu::amd_has_512_bit_unit();
  info["threads"] = cpu::thread_runtime();
  info["compiler"] = GENFAST_COMPILER;
  info["cuda"] = bool(GENFAST_HAVE_CUDA);
  info["cuda_archs"] = GENFAST_CUDA_ARCHS;
  info["exchange_api"] = detail::type_cache().count > 0;
  return info;
}

}  // namespace
}  // namespace genfast

namespace genfast {
void register_diffusion(py::module_& m);  // bindings_diffusion.cpp
}

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using namespace genfast;
  m.doc() = "Native kernels of genfast. Arguments are positional; use the Python functions.";
  m.def(
      "init",
      [](py::handle torch) {
        g_gate.init(torch);
        register_tensor_type(torch.attr("Tensor").ptr());
        register_tensor_type(torch.attr("nn").attr("Parameter").ptr());
      },
      "Takes the handles of torch that the gate and the caster need.");
  for (PyMethodDef& method : g_gates) add_fast(m, method);
  m.def("ask", [](py::function ask) { g_gate.set_ask(std::move(ask)); });
  m.def("asked", [](int what) { g_gate.set_asked(what); });
  m.def(
      "enable_cuda", [](bool on, bool covered) { g_cuda_enabled = on, g_cuda_covered = covered; },
      py::arg("on"), py::arg("covered") = false);
  m.def("build_info", &build_info);
  m.def("limit", &limit);
  m.def("random", &genfast::random);
  m.def("reparameterize", &reparameterize, py::arg("mu"), py::arg("logvar"), py::arg("y"),
        py::arg("side"), py::arg("seed"), py::arg("seeds"), py::arg("stream"), py::arg("offset"),
        py::arg("transform"), py::arg("side_kind"), py::arg("side_scale"),
        py::arg("scratch") = py::none());
  m.def("reparameterize_backward", &reparameterize_backward);
  m.def("gumbel_softmax", &gumbel_softmax);
  m.def("gumbel_softmax_backward", &gumbel_softmax_backward);
  m.def("relaxed_bernoulli", &relaxed_bernoulli);
  m.def("categorical", &categorical);
  m.def("bernoulli_nll", &bernoulli_nll, py::arg("nll"), py::arg("logits"), py::arg("x"),
        py::arg("scratch") = py::none());
  m.def("bernoulli_nll_backward", &bernoulli_nll_backward);
  register_attention(m);
  register_diffusion(m);
  register_filtering(m);
  register_normalization(m);
  register_convolution(m);
  register_linear(m);
}
