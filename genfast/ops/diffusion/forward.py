"""The forward process: two-term mixes with one coefficient for all, per sample or per token.

Coefficients are never rounded to 16 bit (a bf16 alpha_bar loses the noise of ten timesteps of the
linear schedule altogether). Saved for backward: coefficients and the seed, no noise.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from genfast.ops import _check, _noise
from genfast.ops._backend import kernels, under
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
    transforming,
    wants_graph,
)
from genfast.ops.diffusion import _common

# out = a_sign a p + b_sign b q; a None: 1 - b; b None: no q; q None: drawn.


def _native(p, q, a, b, seeds, seed, stream, offset, draws, a_sign, b_sign, out=None):
    if out is None:
        out = torch.empty_like(p)
    if kernels.diffusion_mix(
        out, p, q, seed, seeds, stream, offset, draws, a, b, a_sign, b_sign, a is None
    ):
        return out
    return None


def _composite(p, q, a, b, seeds, seed, stream, offset, draws, a_sign, b_sign):
    may_compose("add_noise", p, q)
    dtype = _common.wide_dtype(p, q)
    if a is None:
        a = 1 - b
    result = a_sign * _common.like(a, p).to(dtype) * p.to(dtype)
    if b is not None and (draws or q is not None):
        noise = _common.drawn(p, dtype, seed, seeds, stream, offset) if q is None else q.to(dtype)
        result = result + b_sign * _common.like(b, p).to(dtype) * noise
    return result.to(p.dtype)


def _composite_of(rest, places, given, *tensors):
    inputs = [None] * 4
    for at, t in zip(places, tensors, strict=True):
        inputs[at] = t
    return _composite(*inputs, *rest)


def _impl(p, q, a, b, *rest):
    y = _native(p, q, a, b, *rest) if _common.on_kernel(p, q) else None
    return _composite(p, q, a, b, *rest) if y is None else y


def _save(ctx, inputs, output):
    p, q, a, b, seeds, *rest = inputs
    ctx.save_for_backward(p, q, a, b, seeds)
    ctx.rest = tuple(rest)


def _scaled(g, a, b, sign, run):
    """sign a g (a None: 1 - b)."""
    return run(g, None, a, b if a is None else None, None, 0, 0, 0, False, sign, 1)


def _gradients(ctx, g, run):
    p, q, a, b, seeds = ctx.saved_tensors
    *_, a_sign, b_sign = ctx.rest
    learned = any(c is not None and c.requires_grad for c in (a, b))
    if not is_compiling() and (wants_graph() or learned or not plain(g)):
        places = [i for i, t in enumerate((p, q, a, b)) if t is not None]
        inputs = [(p, q, a, b)[i] for i in places]
        composite = partial(_composite_of, (seeds, *ctx.rest), places, None)
        found = [None] * 4
        for at, d in zip(places, differentiable_backward(composite, inputs, [g]), strict=True):
            found[at] = d
        return found
    d_p = _scaled(g, a, b, a_sign, run).to(p.dtype) if ctx.needs_input_grad[0] else None
    d_q = None
    if q is not None and ctx.needs_input_grad[1]:
        d_q = _scaled(g, b, None, b_sign, run).to(q.dtype)
    return [d_p, d_q, None, None]


def _op_backward(ctx, g):
    return (*_gradients(ctx, g, _op), *[None] * 7)


_op = define(
    "diffusion_mix(Tensor p, Tensor? q, Tensor? a, Tensor? b, Tensor? seeds, SymInt seed, "
    "SymInt stream, SymInt offset, bool draws, int a_sign, int b_sign) -> Tensor",
    _impl,
    lambda p, *rest: torch.empty_like(p),
    _op_backward,
    _save,
)


class _Mix(Node):
    @staticmethod
    def forward(ctx, *args):
        _save(ctx, args, None)
        y = _native(*args)
        return _composite(*args) if y is None else y

    @staticmethod
    def backward(ctx, g):
        return (*_gradients(ctx, g, _impl), *[None] * 7)


def _mix(
    name, p, q, a, b, seed, stream, offset, generator, draws, out, *, a_sign=1, b_sign=1,
    names=("alpha", "sigma"),
):  # fmt: skip
    """name: of the tensor p, for messages."""
    if not is_compiling():
        try:
            if gate(
                p, q, a if isinstance(a, Tensor) else None, b if isinstance(b, Tensor) else None
            ) == DIRECT and (out is None or gate(out) == DIRECT):  # fmt: skip
                int_seed, seeds = 0, None
                if draws:
                    seed, generator = _noise.drawn_once(seed, p.device, generator)
                    int_seed, seeds = _noise.resolve(seed, generator, p.device)
                y = _native(p, q, a, b, seeds, int_seed, stream, offset, draws, a_sign, b_sign, out)
                if y is not None and (draws or (seed is None and generator is None)):
                    if out is not None and not out.is_inference():
                        torch.autograd.graph.increment_version(out)
                    return y
        except (TypeError, ValueError, RuntimeError, AttributeError):
            pass  # the checks below name the argument
    _check.tensor(name, p)
    if q is not None:
        _check.tensor("noise", q)
        _check.same_shape("noise", q, name, p)
        _check.same_device(**{name: p, "noise": q})
        if seed is not None or generator is not None:
            raise ValueError("noise: expected it alone, got a seed or generator too; pass only one")
    _noise.check(seed, stream, offset, generator, p.shape, p.device)
    a = None if a is None else _common.coefficient(names[0], a, p)
    b = None if b is None else _common.coefficient(names[1], b, p)
    if a is not None and b is not None and a.dim() and b.dim() and a.shape != b.shape:
        wider = max((a, b), key=Tensor.dim).shape
        a, b = (_common.like(c, torch.empty(wider, device="meta")).expand(wider).contiguous()
                for c in (a, b))  # fmt: skip
    seed, seeds = _noise.resolve(seed, generator, p.device) if draws else (0, None)
    args = (
        p, q, a, b, seeds, _noise.signed(seed), _noise.signed(stream), offset, draws, a_sign,
        b_sign,
    )  # fmt: skip
    needs = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (p, q, a, b))
    learned = needs and any(t is not None and t.requires_grad for t in (a, b))
    if out is not None:
        _check.tensor("out", out)
        _check.output(out, p.shape, None)
        if needs:
            raise ValueError(
                "out: expected no gradient to be wanted, got inputs that require grad; "
                "leave out= away or call it under torch.no_grad()"
            )
    if learned:
        may_compose("add_noise", p, q, lacks=f"a gradient by {' or '.join(names)}")
    if (
        forced_reference()
        or _common.wide_dtype(p, q) == torch.float64
        or transforming()
        or (learned and is_compiling())
    ):
        y = _composite(*args)
    elif needs and not is_compiling() and gate(p, q, a, b) == GRAD and _common.on_kernel(p, q):
        y = _Mix.apply(*args)
    else:
        y = _op(*args)
    return y if out is None else out.copy_(y)


def _needed(name: str, value) -> None:
    if value is None:
        raise TypeError(f"{name}: expected a number or a tensor, got None")


def add_noise(
    x0: Tensor,
    alpha: float | Tensor | None,
    sigma: float | Tensor,
    *,
    noise: Tensor | None = None,
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """q(x_t | x_0): alpha x0 + sigma noise, in one pass.

    x0: (B, ...), float32, float16, bfloat16 (fp32 inside) or float64. alpha, sigma: a number, or a
    tensor () / (B,) / (B, L) of fp32 or fp64; alpha None: 1 - sigma (flow matching). noise: like
    x0, or drawn from seed (int, int64 tensor of one or of B, None: torch's generator), stream,
    offset: the values of `genfast.randn(x0.shape, seed=seed, stream=stream)`. out: may be x0.
    backend: one for this call and its gradient, as `genfast.set_backend`.
    Differentiable in x0, noise, alpha and sigma, twice too. Raises TypeError / ValueError naming
    the argument. Ho et al. 2020, eq. 4; flow: Lipman et al. 2023.
    """
    if backend is not None:
        return under(add_noise, locals())
    _needed("sigma", sigma)
    draws = noise is None
    return _mix("x0", x0, noise, alpha, sigma, seed, stream, offset, generator, draws, out)


def scale_noise(
    x0: Tensor,
    sigma: float | Tensor,
    *,
    noise: Tensor | None = None,
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """(1 - sigma) x0 + sigma noise, the forward process of flow matching; `add_noise` otherwise."""
    if backend is not None:
        return under(scale_noise, locals())
    _needed("sigma", sigma)
    draws = noise is None
    return _mix("x0", x0, noise, None, sigma, seed, stream, offset, generator, draws, out)


def velocity(
    x0: Tensor,
    alpha: float | Tensor,
    sigma: float | Tensor,
    *,
    noise: Tensor | None = None,
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """v = alpha noise - sigma x0, the target of v-prediction; arguments as in `add_noise`.

    alpha may not be None. Salimans & Ho 2022, appendix D.
    """
    if backend is not None:
        return under(velocity, locals())
    _needed("alpha", alpha)
    _needed("sigma", sigma)
    return _mix(
        "x0", x0, noise, sigma, alpha, seed, stream, offset, generator, noise is None, out,
        a_sign=-1, names=("sigma", "alpha"),
    )  # fmt: skip


def scale_model_input(
    x: Tensor, scale: float | Tensor, *, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """scale x. x: (B, ...); scale: a number, or a tensor () / (B,) / (B, L) (a plan's input_scale:
    1 / sqrt(sigma^2 + 1) for Euler and its kin). Differentiable; errors as in `add_noise`.
    """
    if backend is not None:
        return under(scale_model_input, locals())
    _needed("scale", scale)
    return _mix("x", x, None, scale, None, None, 0, 0, None, False, out, names=("scale", "scale"))
