"""A stochastic step with the exact log-density of its outcome, for reinforcement learning on
samplers (Black et al. 2023; Liu et al. 2025, Flow-GRPO)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from genfast.ops import _check
from genfast.ops._backend import kernels, under
from genfast.ops._force import forced_reference, may_compose
from genfast.ops._noise import Seed
from genfast.ops._road import define, differentiable_backward, is_compiling, readable, transforming
from genfast.ops.diffusion import _common
from genfast.ops.diffusion.step import (
    _COUNT,
    _NATIVE,
    _OTHERS,
    _SCHEMA,
    _TENSORS,
    COEF,
    SOURCES,
    _kernel_takes,
    _models,
    pack,
)
from genfast.reference import diffusion as reference

_Z_COLUMN = COEF + SOURCES - 1


def _native(sample, args):
    """(sample, summed log-density) by the kernel, or None."""
    x, outputs = args[0], (torch.empty_like(args[0]),)
    z, seeds, threshold = args[13:16]
    row, seed, stream, offset, draws = args[20:25]
    log_prob = torch.empty(x.shape[:1], dtype=torch.float32, device=x.device)
    extras = (0, threshold, None, None, None, None, sample, log_prob)
    if kernels.diffusion_step(
        outputs, x, _models(args), args[4], args[5], args[6], row, tuple(args[7:13]), z, seed,
        seeds, stream, offset, draws, extras,
    ):  # fmt: skip
        return outputs[0], log_prob
    return None


def _mean_and_std(args):
    x, weights, table, index, threshold, row = (args[i] for i in (0, 4, 5, 6, 15, 20))
    dtype = _common.wide_dtype(x, *args[1:4], *args[7:13])
    coef = table[row] if index is None else table[index]
    m = args[1]
    if weights is not None:
        models = [t.to(dtype) for t in args[1:4] if t is not None]
        m = reference.combine(models, [w.to(dtype) for w in weights.unbind(-1)])
    mean = reference.diffusion_step(
        x.to(dtype), m, coef, history=args[7:13], threshold=threshold, n_out=1
    )[0]
    return mean, coef[..., _Z_COLUMN].abs().to(dtype)


def _composite(sample, args):
    may_compose("step_log_prob", *(args[i] for i in (*_NATIVE, *_OTHERS)), sample)
    x, z, seeds = args[0], args[13], args[14]
    seed, stream, offset = args[21:24]
    mean, std = _mean_and_std(args)
    if sample is None:
        if z is None:
            z = _common.drawn(x, mean.dtype, seed, seeds, stream, offset)
        c = _common.like(args[5][args[20] if args[6] is None else args[6]][..., _Z_COLUMN], x)
        sample = (mean + c.to(mean.dtype) * z.to(mean.dtype)).to(x.dtype)
    sample = sample.detach()
    return sample, reference.step_log_prob(sample, mean, std, reduction="sum")


def _log_prob_of(args, places, sample, *tensors):
    args = list(args)
    for at, t in zip(places, tensors, strict=True):
        args[at] = t
    return _composite(sample, args)[1]


def _impl(sample, *args):
    found = None
    if _kernel_takes(args) and _common.on_kernel(sample):
        found = _native(sample, args)
    return _composite(sample, args) if found is None else found


def _fake(sample, x, *rest):
    dtype = _common.wide_dtype(x, *rest[:3], *rest[6:12])
    return torch.empty_like(x), x.new_empty(x.shape[:1], dtype=dtype)


_DIFFERENTIABLE = tuple(i for i in (*_NATIVE, *_OTHERS) if _TENSORS[i] != "z")


def _backward_impl(g, sample, wanted, *args):
    leaves = list(args)
    for k, at in enumerate(_NATIVE):
        if wanted >> k & 1:
            leaves[at] = args[at].detach().requires_grad_()
    places = [i for i in _DIFFERENTIABLE if args[i] is not None]
    found = dict(zip(places, differentiable_backward(
        partial(_log_prob_of, leaves, places, sample), [leaves[i] for i in places], [g]
    ), strict=True))  # fmt: skip
    return tuple(
        args[0].new_empty((0,)) if not wanted >> k & 1
        else torch.zeros_like(args[at]) if found.get(at) is None else found[at].detach()
        for k, at in enumerate(_NATIVE)
    )  # fmt: skip


_backward_op = define(
    f"step_log_prob_backward(Tensor g, Tensor sample, int wanted, {_SCHEMA}) -> ("
    + ", ".join(["Tensor"] * len(_NATIVE)) + ")",
    _backward_impl,
    lambda g, sample, wanted, *args: tuple(
        torch.empty_like(args[at]) if wanted >> k & 1 else args[0].new_empty((0,))
        for k, at in enumerate(_NATIVE)
    ),
)  # fmt: skip


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[0], *inputs[1 : 1 + _COUNT])
    ctx.rest = inputs[1 + _COUNT :]
    ctx.set_materialize_grads(False)


def _op_backward(ctx, _, g):
    sample, *tensors = ctx.saved_tensors
    args = (*tensors, *ctx.rest)
    result = [None] * (1 + len(args))
    if g is None:
        return tuple(result)
    if is_compiling():
        wants = [ctx.needs_input_grad[1 + at] for at in _NATIVE]
        found = _backward_op(g, sample, sum(w << k for k, w in enumerate(wants)), *args)
        for at, w, d in zip(_NATIVE, wants, found, strict=True):
            result[1 + at] = d if w else None
        return tuple(result)
    places = [i for i in _DIFFERENTIABLE if args[i] is not None]
    found = differentiable_backward(
        partial(_log_prob_of, args, places, sample), [args[i] for i in places], [g]
    )
    for at, d in zip(places, found, strict=True):
        result[1 + at] = d
    return tuple(result)


_op = define(
    f"step_log_prob(Tensor? sample, {_SCHEMA}) -> (Tensor, Tensor)",
    _impl,
    _fake,
    _op_backward,
    _save,
)


def step_log_prob(
    x: Tensor,
    m: Tensor | Sequence[Tensor],
    table: Tensor,
    row: int | Tensor = 0,
    *,
    sample: Tensor | None = None,
    history: Sequence[Tensor | None] = (),
    noise: Tensor | None = None,
    seed: Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    weights: float | Sequence[float] | Tensor | None = None,
    threshold: Tensor | None = None,
    reduction: str = "sum",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A step of `diffusion_step` and ln N(sample; mean, std^2), mean and std those of the row.

    sample: like x, an outcome to judge (replay); None: drawn from noise / seed as in
    `diffusion_step`, and judged as rounded to x's dtype, so that a replay gives the same number.
    Other arguments as there (fixed variance). reduction over all but the batch: "sum" or "mean".
    Returns (sample, log_prob (B,) fp32, fp64 for float64). The gradient of log_prob reaches x, m
    and history through the mean; the sample is a constant. Raises ValueError where the row adds no
    noise (std 0), and as `diffusion_step`.
    """
    if backend is not None:
        return under(step_log_prob, locals())
    _check.choice("reduction", reduction, ("sum", "mean"))
    drawn = sample is None
    args = pack(
        x, m, table, row, history, noise, seed, stream, offset, generator, weights, threshold,
        "fixed", None, None, None, None, 1, need_noise=drawn,
    )  # fmt: skip
    if x.dim() == 0:
        raise ValueError("x: expected shape (B, ...), got a 0-dim tensor")
    if sample is not None:
        _check.tensor("sample", sample)
        _check.same_shape("sample", sample, "x", x)
        _check.same_device(x=x, sample=sample)
        if noise is not None or args[24]:
            raise ValueError("sample: expected it alone, got noise too; pass only one")
        sample = sample.detach()
    elif noise is None and not args[24]:
        raise ValueError("noise: expected noise=, seed=, generator= or sample=, got none of them")
    if readable(table, args[6]):
        used = table[args[20]] if args[6] is None else table[args[6].unique()]
        if not bool((used[..., _Z_COLUMN] != 0).all()):
            raise ValueError(
                "row: expected rows that add noise, got one whose standard deviation is 0: its "
                "outcome has no density; take a plan that adds noise, such as ddpm_plan"
            )
    wide = _common.wide_dtype(*args[:4], *args[7:14]) == torch.float64
    learned = [
        i for i in _DIFFERENTIABLE
        if torch.is_grad_enabled() and args[i] is not None and args[i].requires_grad
    ]  # fmt: skip
    others = any(i in _OTHERS for i in learned)
    if learned:
        may_compose("step_log_prob", *args[:4], lacks="a gradient")
    if forced_reference() or wide or transforming() or others:
        value, log_prob = _composite(sample, args)
    else:
        args = (*args[:5], args[5].to(torch.float32).contiguous(), *args[6:])
        value, log_prob = _op(sample, *args)
        value = value.detach()
    if reduction == "mean":
        log_prob = log_prob / max(x[0].numel() if x.shape[0] else 1, 1)
    return value, log_prob
