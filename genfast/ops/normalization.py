"""normalization: group, layer and RMS norm with affine, modulation and activation in one pass.

Saved for backward: x, and mean and 1 / deviation of each group; nothing between the norm and the
activation is kept, the backward makes it again from x. A differentiable backward goes through the
reference.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.autograd import Function

from genfast.ops import _check
from genfast.ops._backend import forced_reference, kernels
from genfast.ops._common import composite_dtype, like, on_kernel, wide_dtype
from genfast.ops._road import (
    DIRECT,
    GRAD,
    define,
    differentiable_backward,
    gate,
    is_compiling,
    plain,
    transforming,
    wants_graph,
)
from genfast.reference import normalization as reference
from genfast.reference.normalization import ACTIVATIONS

_CODES = {name: i for i, name in enumerate(ACTIVATIONS)}  # the native enum
_NAMES = tuple(ACTIVATIONS)

# Tensors x, weight, bias, scale, shift; then groups (0: the last dimension's), rms, act, eps.
_TENSORS = "Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift"
_REST = "int groups, bool rms, int act, float eps"


# ---- native calls ------------------------------------------------------------------------------


def _statistics(x: Tensor, groups: int, rms: bool) -> Tensor:
    """Memory of the means, none with rms, and then of 1 / deviation: fp32, one number a group."""
    n = x.shape[0] * groups if groups else x.numel() // max(x.shape[-1], 1)
    return torch.empty(n if rms else 2 * n, dtype=torch.float32, device=x.device)


def _native(x, *rest):
    """y and its statistics, or None where the kernel does not take the tensors."""
    y, statistics = torch.empty_like(x), _statistics(x, *rest[4:6])
    if kernels.normalize(y, statistics, x, *rest):
        return y, statistics
    return None


def _sums(x, wants, groups):
    """Memory of the gradients of weight, bias, scale and shift, fp32; None where none is wanted."""
    C = x.shape[1 if groups else -1]
    empty = partial(torch.empty, dtype=torch.float32, device=x.device)
    return [empty(s) if w else None for w, s in zip(wants, (C, C, (len(x), C), (len(x), C)),
                                                    strict=True)]  # fmt: skip


def _native_backward(g, statistics, x, *rest, wants):
    dx = torch.empty_like(x)
    sums = _sums(x, wants, rest[4])
    if not kernels.normalize_backward(like(g, x), dx, *sums, statistics, x, *rest):
        raise RuntimeError("genfast: the backward kernel refused what the forward kernel took")
    return dx, *sums


# ---- composite: the reference ------------------------------------------------------------------


def _composite(x, weight, bias, scale, shift, groups, rms, act, eps):
    dtype = composite_dtype(x, weight, bias, scale, shift)
    tensors = (None if t is None else t.to(dtype) for t in (x, weight, bias, scale, shift))
    y = reference.normalize(*tensors, groups=groups, rms=rms, act=_NAMES[act], eps=eps)
    return y.to(x.dtype)


def _of_given(rest, places, *tensors):
    inputs = [None] * 5
    for at, t in zip(places, tensors, strict=True):
        inputs[at] = t
    return _composite(*inputs, *rest)


def _by_reference(tensors, rest, g):
    places = [i for i, t in enumerate(tensors) if t is not None]
    gradients = differentiable_backward(
        partial(_of_given, rest, places), [tensors[i] for i in places], [g]
    )
    found = [None] * 5
    for at, d in zip(places, gradients, strict=True):
        found[at] = d
    return found


# ---- gradients ---------------------------------------------------------------------------------


def _gradients(ctx, g, first_order):
    *tensors, statistics = ctx.saved_tensors
    if not is_compiling() and (wants_graph() or not plain(g)):
        return _by_reference(tensors, ctx.rest, g)
    needs = ctx.needs_input_grad[:5]
    found = first_order(g, statistics, *tensors, *ctx.rest, wants=needs[1:])
    return [
        d.to(t.dtype) if need else None for d, t, need in zip(found, tensors, needs, strict=True)
    ]


def _backward_impl(g, statistics, x, weight, bias, scale, shift, *rest):
    tensors = (x, weight, bias, scale, shift)
    wants = [t is not None for t in tensors[1:]]
    if on_kernel("normalize_backward", g, *tensors):
        found = _native_backward(g, statistics, *tensors, *rest, wants=wants)
    else:
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        found = [None if d is None else d.detach() for d in _by_reference(leaves, rest, g)]
    dx, *sums = found
    return dx, *(g.new_empty(0, dtype=torch.float32) if d is None else d.float() for d in sums)


def _backward_fake(g, statistics, x, weight, bias, scale, shift, *rest):
    wants = [t is not None for t in (weight, bias, scale, shift)]
    return torch.empty_like(x), *(
        g.new_empty(0, dtype=torch.float32) if d is None else d for d in _sums(x, wants, rest[0])
    )


_backward_op = define(
    f"normalize_backward(Tensor g, Tensor statistics, {_TENSORS}, {_REST}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


def _first_by_op(*args, wants):
    return _backward_op(*args)


# ---- the op ------------------------------------------------------------------------------------


def _impl(x, *rest):
    found = _native(x, *rest) if on_kernel("normalize", x, *rest[:4]) else None
    if found is None:
        # One memory order whatever the road, and never the input itself; the composite's backward
        # needs no statistics.
        y = torch.empty_like(x).copy_(_composite(x, *rest))
        found = y, _statistics(x, *rest[4:6]).zero_()
    return found


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.rest = inputs[5:]
    ctx.set_materialize_grads(False)


_op = define(
    f"normalize({_TENSORS}, {_REST}) -> (Tensor, Tensor)",
    _impl,
    lambda x, *rest: (torch.empty_like(x), _statistics(x, *rest[4:6])),
    lambda ctx, g, _: (*([None] * 5 if g is None else _gradients(ctx, g, _first_by_op)),
                       *[None] * 4),
    _save,
)  # fmt: skip


class _Normalize(Function):
    @staticmethod
    def forward(ctx, *inputs):
        found = _native(*inputs)
        if found is None:
            raise TypeError("genfast: the kernel does not take these tensors")
        ctx.save_for_backward(*inputs[:5], found[1])
        ctx.rest = inputs[5:]
        return found[0]

    @staticmethod
    def backward(ctx, g):
        return (*_gradients(ctx, g, _native_backward), *[None] * 4)


# ---- the road ----------------------------------------------------------------------------------


def _norm(x, weight, bias, scale, shift, groups, rms, act, eps):
    if not is_compiling():
        try:
            tensors = (x, weight, bias, scale, shift)
            road = gate(*tensors)
            if road and type(eps) is float:
                args = (*tensors, groups, rms, _CODES[act], eps)
                if road == DIRECT:
                    y = torch.empty_like(x)
                    if kernels.normalize(y, None, *args):
                        return y
                elif on_kernel("normalize", *tensors):
                    return _Normalize.apply(*args)
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
            pass  # the checks below name the argument
    return _slow(x, weight, bias, scale, shift, groups, rms, act, eps)


def _slow(x, weight, bias, scale, shift, groups, rms, act, eps):
    _check.tensor("x", x)
    least = 2 if groups or scale is not None or shift is not None else 1
    if x.dim() < least:
        raise ValueError(
            f"x: expected at least {least} dimensions, got shape {tuple(x.shape)}; add a batch "
            "dimension with x[None]"
        )
    _check.choice("act", act, _NAMES)
    _check.number("eps", eps, low=0.0)
    if isinstance(eps, Tensor):
        raise TypeError(f"eps: expected a number, got {_check.describe(eps)}; pass eps.item()")
    C = x.shape[1 if groups else -1]
    if groups:
        if groups < 1 or C % groups:
            raise ValueError(
                f"groups: expected a divisor of the {C} channels (dimension 1 of x), got {groups}"
            )
    for name, t, shape in (
        ("weight", weight, (C,)), ("bias", bias, (C,)),
        ("scale", scale, (len(x), C)), ("shift", shift, (len(x), C)),
    ):  # fmt: skip
        if t is None:
            continue
        _check.tensor(name, t)
        if tuple(t.shape) != shape:
            per = "number a channel" if len(shape) == 1 else "row a sample"
            raise ValueError(
                f"{name}: expected shape {shape}, one {per}, got {tuple(t.shape)}; reshape it"
            )
    _check.same_device(x=x, weight=weight, bias=bias, scale=scale, shift=shift)
    tensors = (x, weight, bias, scale, shift)
    rest = (groups, rms, _CODES[act], float(eps))
    if (
        forced_reference()
        or wide_dtype(*tensors) == torch.float64
        or transforming()
        or not on_kernel("normalize", *tensors)
    ):
        return _composite(*tensors, *rest)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    scale, shift = (
        t if t is None or t.stride(1) == 1 else t.contiguous() for t in (scale, shift)
    )  # fmt: skip
    if not (x.is_contiguous() or (groups and x.movedim(1, -1).is_contiguous())):
        x = x.contiguous()
    tensors = (x, weight, bias, scale, shift)
    if not is_compiling() and gate(*tensors) == GRAD:
        return _Normalize.apply(*tensors, *rest)
    return _op(*tensors, *rest)[0]


def _eps(x, eps) -> float:
    """RMS norm's default: PyTorch's, the spacing of x's numbers at 1."""
    if eps is not None or not isinstance(x, Tensor) or not x.is_floating_point():
        return 1e-5 if eps is None else eps
    return torch.finfo(x.dtype).eps


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "linear",
    eps: float = 1e-5,
) -> Tensor:
    """act((norm(x) weight + bias) (1 + scale) + shift), norm over each sample's groups of channels.

    x: (B, C, ...), float32, float16, bfloat16 (fp32 inside) or float64; contiguous or with the
    channels last, as the result is (otherwise it is copied). groups: divides C. weight, bias: (C,).
    scale, shift: (B, C), of a condition (AdaGN); a slice of a wider tensor is read in place. act:
    "linear", "silu", "gelu" or "gelu_tanh". eps: added to the variance.
    Returns a tensor like x. Differentiable in every tensor, any number of times; the same bits from
    any number of threads. Raises TypeError / ValueError naming the argument.
    Wu & He, "Group normalization", 2018; Dhariwal & Nichol 2021, section 3.1 (AdaGN).
    """
    _check.counts(groups=groups)
    return _norm(x, weight, bias, scale, shift, groups, False, act, eps)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "linear",
    eps: float = 1e-5,
) -> Tensor:
    """act((norm(x) weight + bias) (1 + scale) + shift), norm over the last dimension.

    x: (..., C), with scale or shift (B, ..., C); contiguous, otherwise it is copied. weight, bias:
    (C,). scale, shift: (B, C), of a condition (adaLN). The rest as in `group_norm`.
    Ba et al., "Layer normalization", 2016; Peebles & Xie 2023, section 3.2 (adaLN).
    """
    return _norm(x, weight, bias, scale, shift, 0, False, act, eps)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "linear",
    eps: float | None = None,
) -> Tensor:
    """act(x / sqrt(mean(x^2) + eps) weight (1 + scale) + shift), the mean over the last dimension.

    eps: None is torch.finfo(x.dtype).eps, as in PyTorch. The rest as in `layer_norm`.
    Zhang & Sennrich, "Root mean square layer normalization", 2019.
    """
    return _norm(x, weight, None, scale, shift, 0, True, act, _eps(x, eps))
