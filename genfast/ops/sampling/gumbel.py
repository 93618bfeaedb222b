"""Gumbel-softmax and the relaxed Bernoulli (Jang et al. 2017; Maddison et al. 2017).

Saved for backward: the logits and the seed, and the soft sample unless it is hard: never noise.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from genfast.ops import _check, _noise
from genfast.ops._backend import has_kernels, kernels, under
from genfast.ops._force import forced_reference, may_compose
from genfast.ops._road import (
    DIRECT,
    KERNEL_DTYPES,
    Node,
    define,
    differentiable_backward,
    gate,
    is_compiling,
    plain,
    ran,
    transforming,
    wants_graph,
)
from genfast.ops.rng import noise_like
from genfast.reference import sampling as reference

# One row per function: native forward, native backward, reference, distribution of the noise.


def _softmax_forward(logits, y, tau, seed, seeds, stream, offset, hard):
    return kernels.gumbel_softmax(logits, y, tau, seed, seeds, stream, offset, hard)


def _softmax_backward(grad, y, logits, tau, d_logits, seed, seeds, stream, offset):
    return kernels.gumbel_softmax_backward(
        grad, y, None if y is not None else logits, tau, d_logits, seed, seeds, stream, offset
    )


def _bernoulli_forward(logits, y, tau, seed, seeds, stream, offset, hard):
    return kernels.relaxed_bernoulli(logits, y, tau, None, seed, seeds, stream, offset, hard)


def _bernoulli_backward(grad, y, logits, tau, d_logits, seed, seeds, stream, offset):
    return kernels.relaxed_bernoulli(
        logits, d_logits, tau, grad, seed, seeds, stream, offset, False
    )


FAMILY = {
    "gumbel_softmax": (_softmax_forward, _softmax_backward, reference.gumbel_softmax, "gumbel"),
    "relaxed_bernoulli": (
        _bernoulli_forward,
        _bernoulli_backward,
        reference.relaxed_bernoulli,
        "logistic",
    ),
}


def _native(name, logits, tau, seed, seeds, stream, offset, hard):
    y = torch.empty_like(logits)
    return y if FAMILY[name][0](logits, y, tau, seed, seeds, stream, offset, hard) else None


def _native_backward(name, grad, y, logits, tau, seed, seeds, stream, offset):
    d_logits = torch.empty_like(logits)
    ran(FAMILY[name][1](grad, y, logits, tau, d_logits, seed, seeds, stream, offset))
    return d_logits


def _composite(name, seed, seeds, stream, offset, hard, logits, tau):
    may_compose(name, logits)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))  # like the kernel
    noise = noise_like(wide, FAMILY[name][3], seed, seeds, stream, offset)
    return FAMILY[name][2](wide, noise, tau.to(wide.dtype), hard).to(logits.dtype)


def _kernel_takes(logits: Tensor) -> bool:
    return logits.dtype in KERNEL_DTYPES and has_kernels(logits.device)


def _save(name, ctx, inputs, output):
    logits, tau, seed, seeds, stream, offset, hard = inputs
    # The soft sample is all that the softmax's backward needs; logits are kept for the rest.
    keep = name == "gumbel_softmax" and not hard
    ctx.save_for_backward(logits, tau, seeds, output if keep else None)
    ctx.rest = (seed, stream, offset, hard)


def _gradients(name, ctx, grad, first_order):
    logits, tau, seeds, y = ctx.saved_tensors
    seed, stream, offset, hard = ctx.rest
    if wants_graph() or tau.requires_grad or not (is_compiling() or plain(grad)):
        composite = partial(_composite, name, seed, seeds, stream, offset, hard)
        return differentiable_backward(composite, (logits, tau), [grad])
    return first_order(grad, y, logits, tau, seed, seeds, stream, offset), None


def _register(name: str):
    args = "Tensor tau, SymInt seed, Tensor? seeds, SymInt stream, SymInt offset"

    def impl(logits, tau, seed, seeds, stream, offset, hard):
        y = None
        if _kernel_takes(logits):
            y = _native(name, logits, tau.to(torch.float32), seed, seeds, stream, offset, hard)
        if y is None:
            y = _composite(name, seed, seeds, stream, offset, hard, logits, tau)
        return y

    def backward_impl(grad, y, logits, tau, seed, seeds, stream, offset):
        if _kernel_takes(logits):
            return _native_backward(
                name, grad, y, logits, tau.to(torch.float32), seed, seeds, stream, offset
            )
        leaf = logits.detach().requires_grad_()
        composite = partial(_composite, name, seed, seeds, stream, offset, False)
        return differentiable_backward(lambda x: composite(x, tau), [leaf], [grad])[0].detach()

    backward_op = define(
        f"{name}_backward(Tensor grad, Tensor? y, Tensor logits, {args}) -> Tensor",
        backward_impl,
        lambda grad, y, logits, *rest: torch.empty_like(logits),
    )

    def op_backward(ctx, grad):
        return (*_gradients(name, ctx, grad, backward_op), *[None] * 5)

    def op_save(ctx, inputs, output):
        _save(name, ctx, inputs, output)

    op = define(
        f"{name}(Tensor logits, {args}, bool hard) -> Tensor",
        impl,
        lambda logits, *rest: torch.empty_like(logits),
        op_backward,
        op_save,
    )

    class Road(Node):
        @staticmethod
        def forward(ctx, logits, tau, *rest):
            y = _native(name, logits, tau, *rest)
            _save(name, ctx, (logits, tau, *rest), y)
            return y

        @staticmethod
        def backward(ctx, grad):
            return (*_gradients(name, ctx, grad, partial(_native_backward, name)), *[None] * 5)

    Road.__name__ = f"{name}_road"
    return op, Road


_REGISTERED = {name: _register(name) for name in FAMILY}
_TAU_CACHE: dict[float, Tensor] = {}
# The kernels divide by tau in fp32: a smaller one has no reciprocal there, a larger one counts as
# the largest.
_TAU_MIN, _TAU_MAX = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def _tau_tensor(tau: float) -> Tensor:
    """tau as a 0-dim fp32 tensor on the CPU, kept to spare 1 us a call; kernels on a GPU
    take it from there, which spares the launch of a fill. Plain roads only."""
    found = _TAU_CACHE.get(tau)
    if found is None:
        if len(_TAU_CACHE) >= 64:  # an annealed temperature: keep the dictionary small
            _TAU_CACHE.clear()
        with torch.inference_mode(False), torch.no_grad():
            tau32 = torch.tensor(min(tau, _TAU_MAX), dtype=torch.float32, device="cpu")
            found = _TAU_CACHE[tau] = tau32
    return found


def _relax(name, logits, tau, hard, seed, stream, offset, generator):
    op, road_function = _REGISTERED[name]
    if (
        not is_compiling()
        and type(tau) is float
        and type(hard) is bool
        and _TAU_MIN <= tau < math.inf
    ):
        road = gate(logits)
        if (
            road
            and logits is not None
            and _kernel_takes(logits)
            and logits.dim()
            and not isinstance(seed, Tensor)
        ):
            try:
                seed, generator = _noise.drawn_once(seed, logits.device, generator)
                int_seed, seeds = _noise.resolve(seed, generator, logits.device)
                args = (logits, _tau_tensor(tau), int_seed, seeds, stream, offset, bool(hard))
                y = _native(name, *args) if road == DIRECT else road_function.apply(*args)
                if y is not None:
                    return y
            except (TypeError, ValueError):
                _validate(name, logits, tau, hard, seed, stream, offset, generator)
                raise
    _validate(name, logits, tau, hard, seed, stream, offset, generator)
    seed, seeds = _noise.resolve(seed, generator, logits.device)
    seed, stream = _noise.signed(seed), _noise.signed(stream)
    if isinstance(tau, Tensor):
        tau = tau.reshape(())
    else:  # never the cache: a mode or transform in force would leak into it
        tau = torch.full((), min(float(tau), _TAU_MAX), dtype=torch.float32, device=logits.device)
    if tau.requires_grad and torch.is_grad_enabled():
        may_compose(name, logits, lacks="a gradient by tau")
    if logits.dtype == torch.float64 or forced_reference() or transforming():
        return _composite(name, seed, seeds, stream, offset, hard, logits, tau)
    return op(logits, tau, seed, seeds, stream, offset, bool(hard))


def _validate(name, logits, tau, hard, seed, stream, offset, generator):
    _check.tensor("logits", logits)
    _check.number("tau", tau, low=0.0, open_low=True)
    if not isinstance(tau, Tensor) and tau < _TAU_MIN:
        raise ValueError(f"tau: expected at least {_TAU_MIN:.2g}, fp32 divides by it, got {tau!r}")
    if not isinstance(hard, int):
        raise TypeError(f"hard: expected a bool, got {_check.describe(hard)}")
    if isinstance(tau, Tensor):
        _check.tensor("tau", tau)
        _check.same_device(logits=logits, tau=tau)
    # The softmax's samples are rows: dim 0 of a single row is no batch.
    shape = logits.shape[:-1] if name == "gumbel_softmax" else logits.shape
    _noise.check(seed, stream, offset, generator, shape, logits.device)


def gumbel_softmax(
    logits: Tensor,
    tau: float | Tensor = 1.0,
    hard: bool = False,
    dim: int = -1,
    *,
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax((logits + g) / tau) along dim, g ~ Gumbel(0, 1); hard: one-hot, straight-through.

    logits: (..., V, ...), float32, float16, bfloat16 (fp32 inside) or float64. tau: a float of at
    least 1.2e-38, or a 0-dim tensor (whose value is not checked, and which gets a gradient). Noise
    elements are counted in the logical order of logits.movedim(dim, -1). backend: one for this call
    and its gradient, as `genfast.set_backend`. Returns the dtype of logits.
    Raises TypeError / ValueError naming the argument. Jang et al. 2017; Maddison et al. 2017.
    """
    if backend is not None:
        return under(gumbel_softmax, locals())
    if type(dim) is not int or dim != -1:
        _check.tensor("logits", logits)
        _check.integer("dim", dim, low=-max(logits.dim(), 1), high=max(logits.dim(), 1) - 1)
        if logits.dim() and dim % logits.dim() != logits.dim() - 1:
            moved = logits.movedim(dim, -1)
            y = _relax("gumbel_softmax", moved, tau, hard, seed, stream, offset, generator)
            return y.movedim(-1, dim)
    if isinstance(logits, Tensor) and logits.dim() == 0:
        raise ValueError("logits: expected at least one dimension, got a 0-dim tensor")
    return _relax("gumbel_softmax", logits, tau, hard, seed, stream, offset, generator)


def relaxed_bernoulli(
    logits: Tensor,
    tau: float | Tensor = 1.0,
    hard: bool = False,
    *,
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """sigmoid((logits + l) / tau), l ~ Logistic(0, 1); hard: 0 or 1, straight-through.

    logits: any shape. Arguments and errors as in `gumbel_softmax`. Maddison et al. 2017, app. C.
    """
    if backend is not None:
        return under(relaxed_bernoulli, locals())
    return _relax("relaxed_bernoulli", logits, tau, hard, seed, stream, offset, generator)
