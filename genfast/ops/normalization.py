"""normalization: group, layer and RMS norm with affine, modulation and activation in one pass, the
last two of a sum x + gate add too, which they then return as well.

Saved for backward: x or the sum, with a gate the term, and mean and 1 / deviation of each group;
nothing between the norm and the activation is kept, the backward makes it again from x. A
differentiable backward goes through the reference.
"""

from __future__ import annotations

import math
from functools import partial
from typing import overload

import torch
from torch import Tensor

from genfast.ops import _check, _road
from genfast.ops._backend import kernels, norm_feature, under
from genfast.ops._common import cast, composite_dtype, like, on_kernel, wide_dtype
from genfast.ops._force import forced_reference, get_backend, may_compose
from genfast.ops._road import (
    DIRECT,
    GRAD,
    Node,
    define,
    differentiable_backward,
    is_compiling,
    plain,
    ran,
    taken,
    transforming,
    wants_graph,
)
from genfast.reference import normalization as reference
from genfast.reference.normalization import ACTIVATIONS

_CODES = {name: i for i, name in enumerate(ACTIVATIONS)}  # the native enum
_NAMES = tuple(ACTIVATIONS)
_EPS = torch.finfo(torch.float32).eps

# Tensors x, weight, bias, scale, shift, add, gate; then groups (0: the last dimension's), rms, act,
# eps.
_TENSORS = (
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? add, "
    "Tensor? gate"
)
_REST = "int groups, bool rms, int act, float eps"


def _feature(x, weight, bias, scale, shift, add, gate, groups, rms, act, eps, training=False):
    return norm_feature(scale, shift, add, act, training)


def _training(x, weight, bias, *rest):
    """The feature where a gradient is wanted. PyTorch's group norm on a GPU loses the memory order,
    and its norms have weights of x's dtype alone: others' training is not what was timed."""
    alike = all(t is None or t.dtype == x.dtype for t in (weight, bias))
    return _feature(x, weight, bias, *rest, training=alike and x.is_contiguous())


# ---- native calls ------------------------------------------------------------------------------


def _statistics(x: Tensor, groups: int, rms: bool) -> Tensor:
    """Memory of the means, none with rms, and then of 1 / deviation: fp32, one number a group."""
    n = x.shape[0] * groups if groups else x.numel() // max(x.shape[-1], 1)
    return torch.empty(n if rms else 2 * n, dtype=torch.float32, device=x.device)


def _of_rows(x: Tensor, groups: int, rms: bool) -> tuple[int, ...]:
    """The statistics' shape outside the op, whose dimensions x's are: so they can be cut alike."""
    rows = (x.shape[0], groups) if groups else x.shape[:-1]
    return (1 if rms else 2, *rows)


def _native(x, *rest):
    """y, its statistics and the sum, if any, or None where the kernel does not take the tensors."""
    y, statistics = torch.empty_like(x), _statistics(x, *rest[6:8])
    total = None if rest[4] is None else torch.empty_like(x)
    if kernels.normalize(y, statistics, total, x, *rest):
        return y, statistics, total
    return None


def _sums(of_channels, wants):
    """Memory of the gradients of weight, bias, scale and shift, fp32; None where none is wanted."""
    return [
        torch.empty_like(t, dtype=torch.float32) if wanted else None
        for t, wanted in zip(of_channels, wants, strict=True)
    ]


def _of_gated(add, gate):
    """Memory of the gradients of a gated term, None of one without: of add, of gate in fp32."""
    if gate is None:
        return None, None
    return torch.empty_like(add), torch.empty_like(gate, dtype=torch.float32)


def _native_backward(g, g_sum, statistics, x, *rest, wants):
    dx, gated = torch.empty_like(x), _of_gated(*rest[4:6])
    sums = _sums(rest[:4], wants)
    g, g_sum = like(g, x), None if g_sum is None else like(g_sum, x)
    ran(kernels.normalize_backward(g, g_sum, dx, *sums, *gated, statistics, x, *rest))
    return dx, *sums, *gated


# ---- composite: the reference ------------------------------------------------------------------


def _composite(x, weight, bias, scale, shift, add, gate, groups, rms, act, eps):
    """y and the sum, if any."""
    tensors = (x, weight, bias, scale, shift, add, gate)
    may_compose("normalize", *tensors)
    dtype = composite_dtype(*tensors)
    wide, *rest, add, gate = (None if t is None else t.to(dtype) for t in tensors)
    total = None
    if add is not None:
        total = reference.gated_sum(wide, add, gate).to(x.dtype)
        wide = total.to(dtype)
    y = reference.normalize(wide, *rest, groups=groups, rms=rms, act=_NAMES[act], eps=eps)
    return y.to(x.dtype), total


def _of_given(rest, places, *tensors):
    inputs = [None] * 7
    for at, t in zip(places, tensors, strict=True):
        inputs[at] = t
    return _composite(*inputs, *rest)[0]


def _by_reference(tensors, rest, g, g_sum):
    """Of the saved tensors, where the sum has x's place."""
    *normed, add, gate = tensors
    found = [None] * 5
    if g is not None:
        places = [i for i, t in enumerate(normed) if t is not None]
        gradients = differentiable_backward(
            partial(_of_given, rest, places), [normed[i] for i in places], [g]
        )
        for at, d in zip(places, gradients, strict=True):
            found[at] = d
    if g_sum is not None:
        found[0] = g_sum if found[0] is None else found[0] + g_sum
    return *found, *_of_term(found[0], add, gate)


def _of_term(d_sum, add, gate):
    """The gradients of a gated term from the sum's; without a gate add's is the sum's."""
    if d_sum is None or gate is None:
        return None, None
    wide = d_sum.to(wide_dtype(d_sum, add, gate))
    d_add = reference.of_samples(gate, wide, 0) * wide
    return d_add, (wide * add).sum(
        tuple(range(1, wide.dim() - 1))
    ) if wide.dim() > 2 else wide * add


# ---- gradients ---------------------------------------------------------------------------------


def _gradients(ctx, g, g_sum, first_order):
    """Of the op's eleven inputs."""
    if g is None and g_sum is None:
        return (None,) * 11
    *tensors, statistics = ctx.saved_tensors
    needs = ctx.needs_input_grad[:7]
    higher = not is_compiling() and (wants_graph() or not (plain(g) and plain(g_sum)))
    if g is None or higher:
        found = _by_reference(tensors, ctx.rest, g, g_sum)
    else:
        found = first_order(g, g_sum, statistics, *tensors, *ctx.rest, wants=needs[1:5])
    dx, *others, d_add, d_gate = found
    if needs[5] and tensors[6] is None:
        d_add = dx
    found = [
        None if d is None or not need else d if t is None else cast(d, t)
        for d, t, need in zip((dx, *others, d_add, d_gate), tensors, needs, strict=True)
    ]
    return *found, None, None, None, None


def _backward_impl(g, g_sum, statistics, *inputs):
    tensors, rest = inputs[:7], inputs[7:]
    if on_kernel("normalize_backward", g, g_sum, *tensors, feature=_feature(*inputs)):
        wants = [t is not None for t in tensors[1:5]]
        found = _native_backward(g, g_sum, statistics.reshape(-1), *inputs, wants=wants)
    else:
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        found = [None if d is None else d.detach() for d in _by_reference(leaves, rest, g, g_sum)]
    dx, *sums, d_add, d_gate = found
    empty = partial(g.new_empty, 0, dtype=torch.float32)
    sums = [empty() if d is None else d.float() for d in (*sums, d_gate)]
    return dx, *sums[:4], empty() if d_add is None else d_add.to(tensors[5].dtype), sums[4]


def _backward_fake(g, g_sum, statistics, x, *inputs):
    found = *_sums(inputs[:4], [t is not None for t in inputs[:4]]), *_of_gated(*inputs[4:6])
    empty = partial(g.new_empty, 0, dtype=torch.float32)
    return torch.empty_like(x), *(empty() if d is None else d for d in found)


_backward_op = define(
    f"normalize_backward(Tensor g, Tensor? g_sum, Tensor statistics, {_TENSORS}, {_REST}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


def _first_by_op(*args, wants):
    return _backward_op(*args)


# ---- the op ------------------------------------------------------------------------------------


def _impl(x, *rest):
    takes = on_kernel("normalize", x, *rest[:6], feature=_feature(x, *rest))
    found = _native(x, *rest) if takes else None
    if found is None:
        # One memory order whatever the road, and never the input itself. The composite's backward
        # needs no statistics; a kernel's would give NaN.
        y, total = _composite(x, *rest)
        total = None if total is None else torch.empty_like(x).copy_(total)
        statistics = _statistics(x, *rest[6:8]).fill_(torch.nan)
        found = torch.empty_like(x).copy_(y), statistics, total
    y, statistics, total = found
    statistics = statistics.view(_of_rows(x, *rest[6:8]))
    return y, statistics, x.new_empty(0) if total is None else total


def _fake(x, *rest):
    total = x.new_empty(0) if rest[4] is None else torch.empty_like(x)
    return torch.empty_like(x), _statistics(x, *rest[6:8]).view(_of_rows(x, *rest[6:8])), total


def _save(ctx, inputs, output):
    x, *others, add, gate = inputs[:7]
    x, add = x if add is None else output[2], None if gate is None else add
    ctx.save_for_backward(x, *others, add, gate, output[1])
    ctx.rest, ctx.summed = inputs[7:], inputs[5] is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, g, _, g_sum):
    # Without a sum there is a gradient of what stands for it.
    return _gradients(ctx, g, g_sum if ctx.summed else None, _first_by_op)


_op = define(
    f"normalize({_TENSORS}, {_REST}) -> (Tensor, Tensor, Tensor)", _impl, _fake, _backward, _save
)


class _Normalize(Node):
    @staticmethod
    def forward(ctx, *inputs):
        found = taken(_native(*inputs))
        _save(ctx, inputs, found)
        y, _, total = found
        return y if total is None else (total, y)

    @staticmethod
    def backward(ctx, *grads):
        g_sum, g = grads if ctx.summed else (None, *grads)
        return _gradients(ctx, g, g_sum, _native_backward)


class _NormalizeAffine(Node):
    """The same without a condition and a sum: in a small call the host's part is what counts."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, rms, act, eps):
        y, statistics = torch.empty_like(x), _statistics(x, groups, rms)
        ctx.rest = None, None, None, None, groups, rms, act, eps
        taken(kernels.normalize(y, statistics, None, x, weight, bias, *ctx.rest) or None)
        ctx.save_for_backward(x, weight, bias, statistics)
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, bias, statistics = ctx.saved_tensors
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        if wants_graph() or not plain(g):
            tensors = x, weight, bias, None, None, None, None
            dx, dw, db, *_ = _by_reference(tensors, ctx.rest[4:], g, None)
        else:
            dx = torch.empty_like(x)
            dw = torch.empty_like(weight, dtype=torch.float32) if of_weight else None
            db = torch.empty_like(bias, dtype=torch.float32) if of_bias else None
            ran(kernels.normalize_backward(
                like(g, x), None, dx, dw, db, None, None, None, None, statistics, x, weight, bias,
                *ctx.rest,
            ))  # fmt: skip
        return (
            dx if of_x else None, cast(dw, weight) if of_weight else None,
            cast(db, bias) if of_bias else None, None, None, None, None,
        )  # fmt: skip


# ---- the road ----------------------------------------------------------------------------------


def _by_torch(x, weight, bias, scale, shift, add, gate, groups, rms, act, eps):
    """A plain norm that the table gives to PyTorch, None where the checks must name something."""
    C = x.shape[1 if groups else -1]
    wrong = any(t is not None and t.shape != (C,) for t in (weight, bias))
    if wrong or gate is not None or not 0.0 <= eps < math.inf:
        return None
    return cast(reference.normalize(x, weight, bias, groups=groups, rms=rms, eps=eps), x)


def _norm(x, weight, bias, scale, shift, groups, rms, act, eps, add=None, gate=None):
    if not is_compiling():
        try:
            road = _road.gate(x, weight, bias, scale, shift, add, gate)
            if road and type(eps) is float:
                code = _CODES[act]
                args = (x, weight, bias, scale, shift, add, gate, groups, rms, code, eps)
                if road == DIRECT:
                    y, total = torch.empty_like(x), None if add is None else torch.empty_like(x)
                    if kernels.normalize(y, None, total, *args):
                        return y if add is None else (total, y)
                else:
                    feature = None if x.is_cpu else _training(*args)
                    if x.is_cpu or on_kernel("normalize", *args[:7], feature=feature):
                        if scale is shift is add is gate is None:
                            return _NormalizeAffine.quick(x, weight, bias, groups, rms, code, eps)
                        return _Normalize.quick(*args)
                    if feature == "plain training" and get_backend() == "auto":
                        y = _by_torch(*args)
                        if y is not None:
                            return y
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
            pass  # the checks below name the argument
    return _slow(x, weight, bias, scale, shift, groups, rms, act, eps, add, gate)


def _slow(x, weight, bias, scale, shift, groups, rms, act, eps, add, gate):
    _check.tensor("x", x)
    least = 2 if groups or any(t is not None for t in (scale, shift, gate)) else 1
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
                f"groups: expected a divisor of the {C} channels (dimension 1 of x), such as "
                f"{math.gcd(C, groups)}, got {groups}"
            )
    for name, t, shape in (
        ("weight", weight, (C,)), ("bias", bias, (C,)),
        ("scale", scale, (x.shape[0], C)), ("shift", shift, (x.shape[0], C)),
        ("gate", gate, (x.shape[0], C)),
    ):  # fmt: skip
        if t is None:
            continue
        _check.tensor(name, t)
        if tuple(t.shape) != shape:
            per = "number a channel" if len(shape) == 1 else "row a sample"
            raise ValueError(
                f"{name}: expected shape {shape}, one {per}, got {tuple(t.shape)}; reshape it"
            )
    if add is not None:
        _check.tensor("add", add)
        if add.shape != x.shape:
            raise ValueError(
                f"add: expected x's shape {tuple(x.shape)}, got {tuple(add.shape)}; expand it"
            )
    elif gate is not None:
        raise ValueError("gate: expected None without add, got a tensor; give add, which it scales")
    _check.same_device(
        x=x, weight=weight, bias=bias, scale=scale, shift=shift, add=add, gate=gate
    )  # fmt: skip
    tensors = (x, weight, bias, scale, shift, add, gate)
    rest = (groups, rms, _CODES[act], float(eps))
    feature = _feature
    if not is_compiling() and _road.gate(*tensors) == GRAD:
        feature = _training
    if (
        forced_reference()
        or wide_dtype(*tensors) == torch.float64
        or transforming()
        or not (is_compiling() or x.numel())  # contiguous with any strides, which no kernel takes
        or not on_kernel("normalize", *tensors, feature=feature(*tensors, *rest))
    ):
        y, total = _composite(*tensors, *rest)
        return y if add is None else (total, y)
    weight, bias, add = (None if t is None else t.contiguous() for t in (weight, bias, add))
    scale, shift, gate = (
        t if t is None or t.stride(1) == 1 else t.contiguous() for t in (scale, shift, gate)
    )
    if not (x.is_contiguous() or (groups and x.movedim(1, -1).is_contiguous())):
        x = x.contiguous()
    tensors = (x, weight, bias, scale, shift, add, gate)
    if not is_compiling() and _road.gate(*tensors) == GRAD:
        return _Normalize.apply(*tensors, *rest)
    y, _, total = _op(*tensors, *rest)
    return y if add is None else (total, y)


def _eps(x, eps) -> float:
    """RMS norm's default: PyTorch's, the spacing at 1 of the numbers it computes in."""
    if eps is not None or not isinstance(x, Tensor):
        return _EPS if eps is None else eps
    return torch.finfo(torch.float64).eps if x.dtype == torch.float64 else _EPS


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
    backend: str | None = None,
) -> Tensor:
    """act((norm(x) weight + bias) (1 + scale) + shift), norm over each sample's groups of channels.

    x: (B, C, ...), float32, float16, bfloat16 (fp32 inside) or float64; contiguous or with the
    channels last, as the result is (otherwise it is copied). groups: divides C. weight, bias: (C,).
    scale, shift: (B, C), of a condition (AdaGN); a slice of a wider tensor is read in place. act:
    "linear", "silu", "gelu" or "gelu_tanh". eps: added to the variance. backend: one for this call
    and its gradient, as `genfast.set_backend`.
    Returns a tensor like x. Differentiable in every tensor, any number of times; the same bits from
    any number of threads. Raises TypeError / ValueError naming the argument.
    Wu & He, "Group normalization", 2018; Dhariwal & Nichol 2021, section 3.1 (AdaGN).
    """
    if backend is not None:
        return under(group_norm, locals())
    _check.counts(groups=groups)
    return _norm(x, weight, bias, scale, shift, groups, False, act, eps)


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *,
    scale: Tensor | None = None, shift: Tensor | None = None, act: str = "linear",
    eps: float = 1e-5, add: None = None, gate: None = None, backend: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *,
    scale: Tensor | None = None, shift: Tensor | None = None, act: str = "linear",
    eps: float = 1e-5, add: Tensor, gate: Tensor | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *,
    scale: Tensor | None = None, shift: Tensor | None = None, act: str = "linear",
    eps: float = 1e-5, add: Tensor | None, gate: Tensor | None = None, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "linear",
    eps: float = 1e-5,
    add: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """act((norm(x) weight + bias) (1 + scale) + shift), norm over the last dimension.

    x: (..., C), with scale or shift (B, ..., C); contiguous, otherwise it is copied. weight, bias:
    (C,). scale, shift: (B, C), of a condition (adaLN). The rest as in `group_norm`.
    add: None, or like x: then of the sum x + gate add, as between two parts of a transformer, and
    (sum, y) is returned; sum in x's dtype. gate: None for 1, or (B, C), of a condition.
    Ba et al., "Layer normalization", 2016; Peebles & Xie 2023, section 3.2 (adaLN, its gates).
    """
    if backend is not None:
        return under(layer_norm, locals())
    return _norm(x, weight, bias, scale, shift, 0, False, act, eps, add, gate)


@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, scale: Tensor | None = None,
    shift: Tensor | None = None, act: str = "linear", eps: float | None = None, add: None = None,
    gate: None = None, backend: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, scale: Tensor | None = None,
    shift: Tensor | None = None, act: str = "linear", eps: float | None = None, add: Tensor,
    gate: Tensor | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, scale: Tensor | None = None,
    shift: Tensor | None = None, act: str = "linear", eps: float | None = None,
    add: Tensor | None, gate: Tensor | None = None, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "linear",
    eps: float | None = None,
    add: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """act(x / sqrt(mean(x^2) + eps) weight (1 + scale) + shift), the mean over the last dimension.

    eps: None is that of the dtype inside (torch.finfo's: 1.2e-7, in float64 2.2e-16), as in
    PyTorch. The rest as in `layer_norm`.
    Zhang & Sennrich, "Root mean square layer normalization", 2019.
    """
    if backend is not None:
        return under(rms_norm, locals())
    return _norm(x, weight, None, scale, shift, 0, True, act, _eps(x, eps), add, gate)
