"""The Bernoulli likelihood of logits: forward and backward one pass each."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.ops import _check
from genfast.ops._backend import kernels, under
from genfast.ops._common import on_kernel, wide_dtype
from genfast.ops._force import forced_reference, may_compose
from genfast.ops._road import (
    DIRECT,
    GRAD,
    Node,
    define,
    differentiable_backward,
    gate,
    is_compiling,
    plain,
    ran,
    taken,
    transforming,
    wants_graph,
)
from genfast.reference import sampling as reference


def _native(logits, x):
    nll = torch.empty(logits.shape[:1], dtype=torch.float32, device=logits.device)
    return nll if kernels.bernoulli_nll(nll, logits, x) else None


def _composite(logits, x):
    may_compose("bernoulli_nll", logits, x)
    dtype = wide_dtype(logits, x)
    return reference.bernoulli_nll(logits.to(dtype), x.to(dtype))


def _impl(logits, x):
    nll = _native(logits, x) if on_kernel("bernoulli_nll", logits, x) else None
    return _composite(logits, x).float() if nll is None else nll


def _native_backward(g, logits, x, of_logits, of_x):
    d_logits = torch.empty_like(logits) if of_logits else None
    d_x = torch.empty_like(x) if of_x else None
    ran(kernels.bernoulli_nll_backward(g.contiguous(), d_logits, d_x, logits, x))
    return d_logits, d_x


def _backward_impl(g, logits, x, of_logits, of_x):
    if on_kernel("bernoulli_nll_backward", g, logits, x):
        found = _native_backward(g, logits, x, of_logits, of_x)
    else:
        leaves = [logits.detach().requires_grad_(of_logits), x.detach().requires_grad_(of_x)]
        found = differentiable_backward(_composite, leaves, [g])
    return tuple(logits.new_empty(0) if d is None else d.detach() for d in found)


def _backward_fake(g, logits, x, of_logits, of_x):
    return tuple(
        torch.empty_like(t) if wanted else logits.new_empty(0)
        for t, wanted in ((logits, of_logits), (x, of_x))
    )


# A gradient that is not wanted is empty.
_backward_op = define(
    "bernoulli_nll_backward(Tensor g, Tensor logits, Tensor x, bool of_logits, bool of_x)"
    " -> (Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


def _gradients(ctx, g, first_order):
    logits, x = ctx.saved_tensors
    if not is_compiling() and (wants_graph() or not plain(g)):
        return differentiable_backward(_composite, [logits, x], [g])
    wanted = ctx.needs_input_grad
    found = first_order(g, logits, x, *wanted)
    return tuple(d if want else None for d, want in zip(found, wanted, strict=True))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_op = define(
    "bernoulli_nll(Tensor logits, Tensor x) -> Tensor",
    _impl,
    lambda logits, x: logits.new_empty(logits.shape[:1], dtype=torch.float32),
    lambda ctx, g: _gradients(ctx, g, _backward_op),
    _save,
)


class _BernoulliNll(Node):
    @staticmethod
    def forward(ctx, logits, x):
        nll = taken(_native(logits, x))
        ctx.save_for_backward(logits, x)
        return nll

    @staticmethod
    def backward(ctx, g):
        return _gradients(ctx, g, _native_backward)


def bernoulli_nll(logits: Tensor, x: Tensor, *, backend: str | None = None) -> Tensor:
    """-ln p(x | logits) of each sample: ln(1 + e^l) - x l, summed over all but dim 0, in nats.

    logits, x: (B, ...) of one shape, any strides, float32, float16, bfloat16 (fp32 inside) or
    float64; x in [0, 1], not checked. backend: one for this call and its gradient, as
    `genfast.set_backend`. Returns (B,) float32 (float64 where an input is). Differentiable in both,
    any number of times. Raises TypeError / ValueError naming the argument. Kingma & Welling 2014,
    appendix C.1.
    """
    if backend is not None:
        return under(bernoulli_nll, locals())
    if not is_compiling():
        try:
            road = gate(logits, x)
            if road == DIRECT:
                nll = _native(logits, x)
                if nll is not None:
                    return nll
            elif (
                road == GRAD
                and logits.shape == x.shape
                and (x.is_cpu or on_kernel("bernoulli_nll", logits, x))
            ):
                return _BernoulliNll.quick(logits, x)
        except (TypeError, ValueError, RuntimeError, AttributeError):
            pass  # the checks below name the argument
    _check.tensor("logits", logits)
    _check.tensor("x", x)
    _check.same_shape("x", x, "logits", logits)
    _check.same_device(logits=logits, x=x)
    if not logits.dim():
        raise ValueError("logits: expected (B, ...), got a tensor of no dimensions; add one")
    wide = wide_dtype(logits, x) == torch.float64
    if forced_reference() or wide or transforming() or not on_kernel("bernoulli_nll", logits, x):
        return _composite(logits, x)
    return _op(logits, x)
