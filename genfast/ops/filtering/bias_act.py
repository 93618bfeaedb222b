"""Bias, noise injection, activation, gain and clamp in one pass over the tensor.

Saved for backward: y where the slope follows from its sign (linear, relu, lrelu), which the next
layer keeps anyway, else x. Drawn noise is drawn again, never stored. A differentiable backward of
these three is the same kernel again, so gradients of any order cost what the first does; the other
activations go through the reference then.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from genfast.ops import _check, _noise
from genfast.ops._backend import kernels, under
from genfast.ops._common import cast, composite_dtype, like, on_kernel, wide_dtype
from genfast.ops._force import forced_reference, get_backend, may_compose
from genfast.ops._road import (
    DIRECT,
    GRAD,
    KERNEL_DTYPES,
    Node,
    define,
    differentiable_backward,
    gate,
    is_compiling,
    plain,
    ran,
    readable,
    taken,
    transforming,
    wants_graph,
)
from genfast.ops.rng import noise_like
from genfast.reference import filtering as reference
from genfast.reference.filtering import ACTIVATIONS

_NAMES = tuple(ACTIVATIONS)
_CODES = {name: i for i, name in enumerate(_NAMES)}  # the native enum
_NO_CLAMP = -1.0

# Tensors x, b, noise, strength, seeds; then seed, stream, offset, draws, dim, act, alpha, gain,
# clamp.
_TENSORS = "Tensor x, Tensor? b, Tensor? noise, Tensor? strength, Tensor? seeds"
_REST = (
    "SymInt seed, SymInt stream, SymInt offset, bool draws, int dim, int act, float alpha, "
    "float gain, float clamp"
)


def _numbers(rest):
    act, alpha, gain, clamp = rest[5:]
    return dict(act=_NAMES[act], alpha=alpha, gain=gain, clamp=None if clamp < 0 else clamp)


def _from_y(x: Tensor, rest) -> bool:
    """The backward can take its slope from y. Not from a clamped y of 16 bit, which may have been
    rounded to the bound."""
    act, alpha, gain, clamp = rest[5:]
    by_sign = ACTIVATIONS[_NAMES[act]].by_sign and alpha >= 0 and gain > 0
    return by_sign and (clamp < 0 or x.dtype == torch.float32)


# ---- native calls -----------------------------------------------------------------------------


def _native(x, b, noise, strength, seeds, *rest):
    y = torch.empty_like(x)
    if kernels.bias_act(y, x, b, noise, strength, seeds, *rest):
        return y
    return None


def _native_backward(g, source, from_y, b, noise, strength, seeds, *rest, sums=(True, True)):
    """dz, db (fp32) and d_strength (fp32), None for the sums that are not wanted."""
    dz = torch.empty_like(source)
    db = d_strength = None
    if sums[0]:
        db = torch.empty_like(b, dtype=torch.float32)
    if sums[1]:
        d_strength = torch.empty((), dtype=torch.float32, device=source.device)
    ran(kernels.bias_act_backward(
        like(g, source), dz, db, d_strength, source, from_y, b, noise, strength, seeds, *rest
    ))  # fmt: skip
    return dz, db, d_strength


# ---- composite: the reference with native noise -------------------------------------------------


def _drawn(x, seeds, seed, stream, offset, dim):
    one = x.narrow(dim, 0, 1) if x.shape[dim] else x.sum(dim, keepdim=True)
    return noise_like(one, "normal", seed, seeds, stream, offset)


def _noise_of(x, noise, seeds, rest, dtype):
    """The noise as a tensor that broadcasts to x, or None."""
    seed, stream, offset, draws, dim = rest[:5]
    if noise is not None:
        return noise.to(dtype)
    return _drawn(x.detach().to(dtype), seeds, seed, stream, offset, dim) if draws else None


def _composite(x, b, noise, strength, seeds, *rest):
    may_compose("bias_act", x, b, noise, strength)
    dtype = composite_dtype(x, b, noise)
    noise = _noise_of(x, noise, seeds, rest, dtype)
    y = reference.bias_act(
        x.to(dtype), None if b is None else b.to(dtype), noise,
        None if strength is None else strength.to(dtype), dim=rest[4], **_numbers(rest),
    )  # fmt: skip
    return y.to(x.dtype)


def _composite_of(seeds, rest, places, *tensors):
    inputs = [None] * 4
    for at, t in zip(places, tensors, strict=True):
        inputs[at] = t
    return _composite(*inputs, seeds, *rest)


# ---- gradients ---------------------------------------------------------------------------------


class _Slope(Node):
    """grad -> dz at a fixed y: linear in grad, so its backward is itself."""

    @staticmethod
    def forward(ctx, g, y, rest):
        ctx.save_for_backward(y)
        ctx.rest = rest
        return _native_backward(
            g, y, True, None, None, None, None, *rest, sums=(False, False)
        )[0]  # fmt: skip

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return _slope(g, y, ctx.rest), None, None


def _slope(g, y, rest):
    """dz of `grad`, differentiable in it any number of times; y's own slope is 0 everywhere."""
    if plain(g) and on_kernel("bias_act_backward", g, y):
        return _Slope.apply(g, y.detach(), (0, 0, 0, False, *rest[4:]))
    return reference.slope_by_sign(g, y.detach(), **_numbers(rest))


def _of_sums(dz, b, noise, strength, seeds, rest, needs):
    """db, d_noise and d_strength as sums of a differentiable dz."""
    dim, wide = rest[4], dz.to(wide_dtype(dz))
    db = d_noise = d_strength = None
    if needs[1]:
        db = wide.sum_to_size(reference.over_channels(b, wide, dim).shape).view(-1)
    if needs[2]:
        d_noise = (strength * wide).sum_to_size(noise.shape)
    if needs[3]:
        d_strength = (wide * _noise_of(dz, noise, seeds, rest, wide.dtype)).sum()
    return db, d_noise, d_strength


def _gradients(ctx, g, first_order):
    *tensors, seeds, y = ctx.saved_tensors
    rest, needs = ctx.rest, ctx.needs_input_grad
    x, b, noise, strength = tensors
    compiling = is_compiling()
    if not compiling and (wants_graph() or not plain(g)):
        if y is not None:
            dz = _slope(g, y, rest)
            db, d_noise, d_strength = _of_sums(dz, b, noise, strength, seeds, rest, needs)
            found = [dz if needs[0] else None, db, d_noise, d_strength]
            return [
                None if d is None else d if t is None else d.to(t.dtype).reshape(t.shape)
                for d, t in zip(found, tensors, strict=True)
            ]
        places = [i for i, t in enumerate(tensors) if t is not None]
        found = [None] * 4
        gradients = differentiable_backward(
            partial(_composite_of, seeds, rest, places), [tensors[i] for i in places], [g]
        )
        for at, d in zip(places, gradients, strict=True):
            found[at] = d
        return found
    source, from_y = (x, False) if y is None else (y, True)
    dz, db, d_strength = first_order(
        g, source, from_y, b, noise, strength, seeds, rest, needs[1], needs[3]
    )
    d_noise = None
    if needs[2]:
        d_noise = (strength * dz.to(torch.float32)).sum_to_size(noise.shape)
    found = [dz if needs[0] else None, db if needs[1] else None, d_noise,
             d_strength if needs[3] else None]  # fmt: skip
    return [
        d if d is None or t is None else _like(d, t) for d, t in zip(found, tensors, strict=True)
    ]


def _like(d: Tensor, t: Tensor) -> Tensor:
    """d as the gradient of t: of a strength that is no scalar it has another shape."""
    d = cast(d, t)
    return d if d.shape == t.shape else d.view(t.shape)


def _save(ctx, inputs, output):
    x, b, noise, strength, seeds, *rest = inputs
    from_y = _from_y(x, rest)
    # b is kept for its dtype and shape even where y is enough.
    ctx.save_for_backward(
        None if from_y else x, b, noise, strength, seeds, output if from_y else None
    )
    ctx.rest = tuple(rest)


def _first(g, source, from_y, b, noise, strength, seeds, rest, wants_b, wants_strength):
    return _native_backward(
        g, source, from_y, b, noise, strength, seeds, *rest, sums=(wants_b, wants_strength)
    )


def _backward_impl(g, source, from_y, b, noise, strength, seeds, *rest):
    sums = (b is not None, strength is not None)
    if on_kernel("bias_act_backward", g, source, b, noise):
        dz, db, ds = _native_backward(g, source, from_y, b, noise, strength, seeds, *rest,
                                      sums=sums)  # fmt: skip
    elif from_y:
        dz = reference.slope_by_sign(g, source, **_numbers(rest))
        db, _, ds = _of_sums(dz, b, noise, strength, seeds, rest, (True, sums[0], False, sums[1]))
    else:
        tensors = [source, b, noise, strength]
        places = [i for i, t in enumerate(tensors) if t is not None]
        leaves = [tensors[i].detach().requires_grad_() for i in places]
        found = [None] * 4
        gradients = differentiable_backward(
            partial(_composite_of, seeds, rest, places), leaves, [g]
        )
        for at, d in zip(places, gradients, strict=True):
            found[at] = d.detach()
        dz, db, _, ds = found
    empty = g.new_empty((0,), dtype=torch.float32)
    return dz, empty if db is None else db.float(), empty.clone() if ds is None else ds.float()


def _backward_fake(g, source, from_y, b, noise, strength, seeds, *rest):
    small = partial(g.new_empty, dtype=torch.float32)
    return (
        torch.empty_like(source),
        small((0,) if b is None else b.shape),
        small((0,) if strength is None else ()),
    )


_backward_op = define(
    "bias_act_backward(Tensor g, Tensor source, bool from_y, Tensor? b, Tensor? noise, "
    f"Tensor? strength, Tensor? seeds, {_REST}) -> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


def _first_by_op(g, source, from_y, b, noise, strength, seeds, rest, *wanted):
    return _backward_op(g, source, from_y, b, noise, strength, seeds, *rest)


# ---- the op ------------------------------------------------------------------------------------


def _impl(x, b, noise, strength, seeds, *rest):
    y = None
    if on_kernel("bias_act", x, b, noise):
        y = _native(x, b, noise, strength, seeds, *rest)
    if y is None:
        y = _composite(x, b, noise, strength, seeds, *rest)
        # One memory order whatever the road, and never the input itself.
        y = torch.empty_like(x).copy_(y)
    return y


_op = define(
    f"bias_act({_TENSORS}, {_REST}) -> Tensor",
    _impl,
    lambda x, *rest: torch.empty_like(x),
    lambda ctx, g: (*_gradients(ctx, g, _first_by_op), *[None] * 10),
    _save,
)


class _BiasAct(Node):
    @staticmethod
    def forward(ctx, x, b, noise, strength, seeds, *rest):
        y = taken(_native(x, b, noise, strength, seeds, *rest))
        _save(ctx, (x, b, noise, strength, seeds, *rest), y)
        return y

    @staticmethod
    def backward(ctx, g):
        return (*_gradients(ctx, g, _first), *[None] * 10)


# ---- the road ----------------------------------------------------------------------------------

_ONE: dict[torch.device, Tensor] = {}


def _strength(strength, device, kept: bool = True) -> Tensor | None:
    """fp32 of one element. 1 is kept, on plain roads only: it costs 2 us to make."""
    if isinstance(strength, Tensor):
        return strength
    if not -math.inf < strength < math.inf:  # which dynamo has for a symbol too
        _check.number("strength", strength)
    if kept and strength == 1 and device.type == "cpu":
        if device not in _ONE:
            with torch.inference_mode(False), torch.no_grad():
                one = torch.ones((), dtype=torch.float32, device=device)
            if not readable(one):
                return one  # of a mode or transform: it would outlive them
            _ONE[device] = one
        return _ONE[device]
    return torch.full((), float(strength), dtype=torch.float32, device=device)


def _noise_layout(noise: Tensor, x: Tensor, dim: int) -> Tensor:
    """The noise with x's number of dimensions and one place along dim (ValueError otherwise),
    contiguous where the kernel reads it: over all of x, or over what follows dim."""
    shape = [1 if i == dim else n for i, n in enumerate(x.shape)]
    padded = [1] * (x.dim() - noise.dim()) + list(noise.shape)
    fits = noise.dim() <= x.dim() and all(
        n in (1, m) for n, m in zip(padded, shape, strict=True)
    )  # fmt: skip
    if not fits:
        raise ValueError(
            f"noise: expected a shape that broadcasts to {tuple(shape)} (x with one channel), got "
            f"{tuple(noise.shape)}; reshape it"
        )
    noise = noise.reshape(padded)
    ours = list(noise.shape)
    if ours == shape or (ours[dim:] == shape[dim:] and all(n == 1 for n in ours[:dim])):
        return noise.contiguous()
    return noise.expand(shape).contiguous()


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    *,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    noise: Tensor | None = None,
    strength: Tensor | float | None = None,
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """clamp(act(x + strength n + b) gain, -clamp, clamp) in one pass.

    x: (B, ...), float32, float16, bfloat16 (fp32 inside) or float64; C = x.shape[dim]. b: (C,).
    act: "linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish", "gelu" or
    "gelu_tanh".
    alpha: slope of lrelu below 0, default 0.2. gain: default sqrt 2 for relu, lrelu and swish,
    else 1. clamp: None, or a number >= 0; a clamped element has no gradient.
    n: none unless strength (a number, or a tensor of one element) or noise is given. noise: a
    tensor that broadcasts to x with one channel, (B, 1, H, W), (1, 1, H, W), (H, W); else drawn in
    that shape from seed (int, int64 tensor of one or of B, None: torch's generator), stream and
    offset: `genfast.randn((B, 1, H, W), seed=seed, stream=stream)`, so that with a seed a sample
    its noise is a function of that seed alone. backend: one for this call and its gradient, as
    `genfast.set_backend`.
    Returns a tensor like x, strides too. Differentiable in x, b, noise and strength, any number of
    times; the backward draws the noise again. Raises TypeError / ValueError naming the argument.
    Karras et al. 2020, section 2 and appendix B (noise, bias, activation and gain).
    """
    if backend is not None:
        return under(bias_act, locals())
    found = ACTIVATIONS.get(act) if isinstance(act, str) else None
    if found is None:
        _check.choice("act", act, _NAMES)
    numbers = (
        found.alpha if alpha is None else alpha,
        found.gain if gain is None else gain,
        _NO_CLAMP if clamp is None else clamp,
    )
    if type(clamp) in (int, float) and clamp == _NO_CLAMP:
        _check.number("clamp", clamp, low=0)
    draws = noise is None and strength is not None
    if not is_compiling() and noise is None and (draws or (seed is None and generator is None)):
        try:
            s = _strength(strength, x.device) if draws else None
            road = gate(x, b, s)
            if road and all(type(n) is float for n in numbers) and (clamp is None or clamp >= 0):
                if act == "linear" and not draws and numbers[1:] == (1.0, _NO_CLAMP):
                    y = _shifted(x, b, dim)
                    if y is not None:
                        return y
                int_seed, seeds = 0, None
                if draws:
                    seed, generator = _noise.drawn_once(seed, x.device, generator)
                    int_seed, seeds = _noise.resolve(seed, generator, x.device)
                args = (x, b, None, s, seeds, int_seed, stream, offset, draws, dim, _CODES[act],
                        *numbers)  # fmt: skip
                if road == DIRECT:
                    y = _native(*args)
                    if y is not None:
                        return y
                elif (x.is_cpu or on_kernel("bias_act", x, b)) and (
                    s is None or s.dtype == torch.float32
                ):
                    return _BiasAct.quick(*args)
        except (TypeError, ValueError, RuntimeError, AttributeError):
            pass  # the checks below name the argument
    return _slow(x, b, noise, strength, seed, stream, offset, generator, dim, act, *numbers)


def _shifted(x, b, dim) -> Tensor | None:
    """x + b: one pass of PyTorch's too, which in the backward has none for x (on Zen 4 the kernel
    took 1.6 times as long, and so with gradients). None of what the kernel or a check is for."""
    fits = (
        b is not None
        and x.dtype is b.dtype
        and x.dtype in KERNEL_DTYPES
        and b.dim() == 1
        and -x.dim() <= dim < x.dim()
        and b.shape[0] == x.shape[dim]
        and dense(x, dim)
        and get_backend() == "auto"
    )
    return x + b.view(-1, *[1] * (x.dim() - 1 - dim % x.dim())) if fits else None


def _slow(x, b, noise, strength, seed, stream, offset, generator, dim, act, alpha, gain, clamp):
    _check.tensor("x", x)
    _check.integer("dim", dim, low=-x.dim(), high=x.dim() - 1)
    dim = dim % x.dim()
    _check.number("alpha", alpha)
    _check.number("gain", gain)
    if clamp != _NO_CLAMP:
        _check.number("clamp", clamp, low=0)
    for name, n in (("alpha", alpha), ("gain", gain), ("clamp", clamp)):
        if isinstance(n, Tensor):
            raise TypeError(f"{name}: expected a number, got {_check.describe(n)}; pass n.item()")
    if b is not None:
        _check.tensor("b", b)
        if b.dim() != 1 or b.shape[0] != x.shape[dim]:
            raise ValueError(
                f"b: expected shape ({x.shape[dim]},), one number a channel (dimension {dim} of "
                f"x), got {tuple(b.shape)}; reshape it, or name the channels by dim="
            )
    draws = noise is None and strength is not None
    if not draws and (seed is not None or generator is not None):
        raise ValueError(
            "seed: has no effect without noise to draw; give strength=, and leave noise= away"
        )
    if noise is not None:
        _check.tensor("noise", noise)
        _check.same_device(x=x, noise=noise)
        noise = _noise_layout(noise, x, dim)
        strength = 1.0 if strength is None else strength
    if strength is not None:
        _check.number("strength", strength)
        if isinstance(strength, Tensor):
            _check.tensor("strength", strength)
        strength = _strength(strength, x.device, kept=False)
    _check.same_device(x=x, b=b, noise=noise, strength=strength)
    shape = [1 if i == dim else n for i, n in enumerate(x.shape)]
    _noise.check(seed, stream, offset, generator, shape, x.device)
    seed, seeds = _noise.resolve(seed, generator, x.device) if draws else (0, None)
    rest = (_noise.signed(seed), _noise.signed(stream), offset, draws, dim, _CODES[act],
            float(alpha), float(gain), float(clamp))  # fmt: skip
    tensors = (x, b, noise, strength)
    wide = wide_dtype(*tensors) == torch.float64
    learned_noise = noise is not None and noise.requires_grad and torch.is_grad_enabled()
    if (
        forced_reference()
        or wide
        or transforming()
        or not on_kernel("bias_act", x)
        or (learned_noise and is_compiling())
    ):
        return _composite(*tensors, seeds, *rest)
    if strength is not None:
        strength = strength.to(torch.float32)
    if b is not None:
        b = b.contiguous()
    if not dense(x, dim):
        x = x.contiguous()
    tensors = (x, b, noise, strength)
    if not is_compiling() and gate(*tensors) == GRAD and on_kernel("bias_act", *tensors):
        return _BiasAct.apply(*tensors, seeds, *rest)
    return _op(*tensors, seeds, *rest)


def dense(x: Tensor, dim: int) -> bool:
    """Contiguous, or contiguous with the channels moved to the end."""
    return x.is_contiguous() or x.movedim(dim, -1).is_contiguous()
