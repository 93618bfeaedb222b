"""act(gate) up of the two halves of a tensor's last dimension, in one pass.

Saved for backward: x. A differentiable backward goes through the reference.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from genfast.ops import _check
from genfast.ops._backend import kernels, under
from genfast.ops._common import composite_dtype, on_kernel
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
from genfast.reference import filtering as reference
from genfast.reference.filtering import ACTIVATIONS, GATES

_NAMES = tuple(ACTIVATIONS)
_CODES = {name: i for i, name in enumerate(_NAMES) if name in GATES}  # the native enum
_CODES["silu"] = _CODES["swish"]  # as PyTorch and `layer_norm` call it


def _empty(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _native(x: Tensor, act: int) -> Tensor | None:
    y = _empty(x)
    return y if kernels.gated_act(y, x, act) else None


def _native_backward(g: Tensor, x: Tensor, act: int) -> Tensor:
    dx = torch.empty_like(x)
    ran(kernels.gated_act_backward(g.to(x.dtype).contiguous(), dx, x, act))
    return dx


def _composite(x: Tensor, act: int) -> Tensor:
    may_compose("gated_act", x)
    return reference.gated_act(x.to(composite_dtype(x)), act=_NAMES[act]).to(x.dtype)


def _gradient(ctx, g, first_order):
    (x,) = ctx.saved_tensors
    if not is_compiling() and (wants_graph() or not plain(g)):
        return differentiable_backward(partial(_composite, act=ctx.act), [x], [g])[0]
    return first_order(g, x, ctx.act)


def _backward_impl(g, x, act):
    if on_kernel("gated_act_backward", g, x):
        return _native_backward(g, x, act)
    leaf = x.detach().requires_grad_()
    (dx,) = differentiable_backward(partial(_composite, act=act), [leaf], [g])
    return torch.empty_like(x).copy_(dx)


_backward_op = define(
    "gated_act_backward(Tensor g, Tensor x, int act) -> Tensor",
    _backward_impl,
    lambda g, x, act: torch.empty_like(x),
)


def _impl(x, act):
    y = _native(x, act) if on_kernel("gated_act", x) else None
    return _composite(x, act).contiguous() if y is None else y


def _save(ctx, inputs, output):
    x, ctx.act = inputs
    ctx.save_for_backward(x)


_op = define(
    "gated_act(Tensor x, int act) -> Tensor",
    _impl,
    lambda x, act: _empty(x),
    lambda ctx, g: (_gradient(ctx, g, _backward_op), None),
    _save,
)


class _GatedAct(Node):
    @staticmethod
    def forward(ctx, x, act):
        y = taken(_native(x, act))
        ctx.save_for_backward(x)
        ctx.act = act
        return y

    @staticmethod
    def backward(ctx, g):
        return _gradient(ctx, g, _native_backward), None


def gated_act(x: Tensor, act: str = "sigmoid", *, backend: str | None = None) -> Tensor:
    """act(gate) up, gate and up the first and the second half of x's last dimension.

    x: (..., 2 H), float32, float16, bfloat16 (fp32 inside) or float64; otherwise than contiguous it
    is copied. act: "sigmoid" (GLU), "swish" or "silu" (SwiGLU), "gelu", "gelu_tanh" (GEGLU), "relu"
    (ReGLU) or "linear" (bilinear). backend: one for this call and its gradient, as
    `genfast.set_backend`. Returns (..., H). Differentiable any number of times; the same bits from
    any number of threads. Raises TypeError / ValueError naming the argument.
    Dauphin et al., "Language modeling with gated convolutional networks", 2017; Shazeer, "GLU
    variants improve transformer", 2020.
    """
    if backend is not None:
        return under(gated_act, locals())
    if not is_compiling():
        try:
            road = gate(x)
            if road == DIRECT:
                y = _native(x, _CODES[act])
                if y is not None:
                    return y
            elif road == GRAD and x.is_contiguous() and (x.is_cpu or on_kernel("gated_act", x)):
                return _GatedAct.quick(x, _CODES[act])
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
            pass  # the checks below name the argument
    _check.tensor("x", x)
    _check.choice("act", act, _CODES)
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(
            f"x: expected (..., 2 H), an even last dimension, got shape {tuple(x.shape)}; put gate "
            "and up side by side"
        )
    act = _CODES[act]
    if (
        forced_reference()
        or x.dtype == torch.float64
        or transforming()
        or not on_kernel("gated_act", x)
    ):
        return _composite(x, act)
    x = x.contiguous()
    if not is_compiling() and gate(x) == GRAD:
        return _GatedAct.apply(x, act)
    return _op(x, act)
