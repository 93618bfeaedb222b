"""The training loss of a denoiser. The noise is drawn from its seed where it is needed: neither eps
nor the target is ever stored."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

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
    ran,
    taken,
    transforming,
    wants_graph,
)
from genfast.ops.diffusion import _common
from genfast.reference import diffusion as reference

# Native enums, by position.
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
WEIGHTINGS = ("none", "min_snr", "p2", "snr", "sigma_sqrt", "cosmap", "edm", "given")
REDUCTIONS = ("none", "sum", "mean")
_GIVEN = len(WEIGHTINGS) - 1
# Of the numbers a weight is made of: min(snr, gamma), and (k + snr)^-gamma for any gamma.
_GAMMA = {WEIGHTINGS.index("min_snr"): {"low": 0.0, "open_low": True}}
_K = {WEIGHTINGS.index("p2"): {"low": 0.0}}

# Tensors: output, x0, z, alpha (None: 1 - sigma), sigma, weight, seeds; then seed, stream, offset,
# prediction, weighting, gamma, k, reduction.


def _total_scale(output, reduction):
    return 1.0 / max(output.shape[0], 1) if reduction == 2 else 1.0


def _native(output, x0, z, alpha, sigma, weight, seeds, seed, stream, offset, prediction, weighting,
            gamma, k, reduction, d_output=None):  # fmt: skip
    per_sample = torch.empty(output.shape[:1], dtype=torch.float32, device=output.device)
    total = torch.empty((), dtype=torch.float32, device=output.device)
    if kernels.denoising_loss(
        output, x0, z, seed, seeds, stream, offset, alpha, sigma, weight, prediction, weighting,
        gamma, k, per_sample, total, _total_scale(output, reduction), None, d_output,
    ):  # fmt: skip
        return total, per_sample
    return None


def _native_backward(g_total, g_each, output, x0, z, alpha, sigma, weight, seeds, seed, stream,
                     offset, prediction, weighting, gamma, k, reduction):  # fmt: skip
    scale = _total_scale(output, reduction)
    if g_each is None:
        grad = g_total
    else:
        grad = g_each if g_total is None else g_each + g_total * scale
        scale = 1.0
    grad = grad.to(torch.float32).contiguous()
    d_output = torch.empty_like(output)
    ran(kernels.denoising_loss(
        output, x0, z, seed, seeds, stream, offset, alpha, sigma, weight, prediction, weighting,
        gamma, k, None, None, scale, grad, d_output,
    ))  # fmt: skip
    return d_output


def _composite(output, x0, z, alpha, sigma, weight, seeds, seed, stream, offset, prediction,
               weighting, gamma, k, reduction):  # fmt: skip
    learned = any(t is not None and t.requires_grad for t in (x0, z, alpha, sigma, weight))
    lacks = "a gradient but by model_output" if learned else None
    may_compose("denoising_loss", output, x0, z, lacks=lacks)
    dtype = _common.wide_dtype(output, x0, z)
    if z is None:
        z = _common.drawn(x0, dtype, seed, seeds, stream, offset)
    alpha = 1 - sigma if alpha is None else alpha
    names = WEIGHTINGS[weighting]
    options = {"min_snr": {"gamma": gamma}, "p2": {"gamma": gamma, "k": k}}.get(names, {})
    each = reference.denoising_loss(
        output, x0, z, alpha, sigma, prediction=PREDICTIONS[prediction],
        weighting="none" if weighting == _GIVEN else names, reduction="none", **options,
    )  # fmt: skip
    if weighting == _GIVEN:
        each = each * weight.to(dtype)
    return each.sum() * _total_scale(output, reduction), each


_PLACES = (0, 1, 2, 3, 4, 5)  # of the differentiable tensors


def _composite_of(rest, places, *tensors):
    inputs = [None] * 6
    for at, t in zip(places, tensors, strict=True):
        inputs[at] = t
    return _composite(*inputs, *rest)


def _impl(*args):
    found = _native(*args) if _common.on_kernel(*args[:3]) else None
    return _composite(*args) if found is None else found


def _fake(output, x0, z, *rest):
    dtype = _common.wide_dtype(output, x0, z)
    return output.new_empty((), dtype=dtype), output.new_empty(output.shape[:1], dtype=dtype)


_SCHEMA = (
    "Tensor output, Tensor x0, Tensor? z, Tensor? alpha, Tensor sigma, Tensor? weight, "
    "Tensor? seeds, SymInt seed, SymInt stream, SymInt offset, int prediction, int weighting, "
    "float gamma, float k, int reduction"
)


def _backward_impl(g_total, g_each, output, *args):
    if _common.on_kernel(output, *args[:2]):
        return _native_backward(g_total, g_each, output, *args)
    leaf = output.detach().requires_grad_()
    found = differentiable_backward(lambda o: _composite(o, *args), [leaf], [g_total, g_each])
    return found[0].detach()


_backward_op = define(
    f"denoising_loss_backward(Tensor? g_total, Tensor? g_each, {_SCHEMA}) -> Tensor",
    _backward_impl,
    lambda g_total, g_each, output, *rest: torch.empty_like(output),
)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.rest = inputs[7:]
    ctx.set_materialize_grads(False)


def _gradients(ctx, g_total, g_each, first_order):
    tensors = ctx.saved_tensors
    if g_total is None and g_each is None:
        return [None] * 6
    others = any(t is not None and t.requires_grad for t in tensors[1:6])
    if not is_compiling() and (wants_graph() or others or not plain(g_total, g_each)):
        places = [i for i in _PLACES if tensors[i] is not None]
        found = [None] * 6
        gradients = differentiable_backward(
            partial(_composite_of, (tensors[6], *ctx.rest), places),
            [tensors[i] for i in places],
            [g_total, g_each],
        )
        for at, g in zip(places, gradients, strict=True):
            found[at] = g
        return found
    return [first_order(g_total, g_each, *tensors, *ctx.rest), *[None] * 5]


def _op_backward(ctx, g_total, g_each):
    return (*_gradients(ctx, g_total, g_each, _backward_op), *[None] * 9)


_op = define(f"denoising_loss({_SCHEMA}) -> (Tensor, Tensor)", _impl, _fake, _op_backward, _save)


class _Loss(Node):
    """both: the total and the losses of each sample, or the total alone: an output less is a tenth
    of a small call."""

    @staticmethod
    def forward(ctx, both, *args):
        _save(ctx, args, None)
        # The gradient for a unit weight of the loss costs one store here, and a whole pass later.
        # Not in 16 bit, where it could underflow before a loss scale reaches it.
        output, (_, of_output, *of_others) = args[0], ctx.needs_input_grad[:7]
        ctx.d_output = None
        if args[-1] and output.dtype is torch.float32 and of_output and not any(of_others):
            ctx.d_output = torch.empty_like(output)
        found = taken(_native(*args, ctx.d_output))
        return found if both else found[0]

    @staticmethod
    def backward(ctx, g_total, g_each=None):
        ready, ctx.d_output = ctx.d_output, None  # served once; a second backward draws again
        if ready is not None and g_each is None and g_total is not None:
            if not wants_graph() and plain(g_total):
                if g_total.is_cpu and g_total.item() == 1.0:
                    return (None, ready, *[None] * 14)
                return (None, ready.mul_(g_total), *[None] * 14)
        return (None, *_gradients(ctx, g_total, g_each, _native_backward), *[None] * 9)


def _by_sample(value) -> bool:
    """A tensor that needs no reshaping: (1, 1, 1) would give the composite a dimension more."""
    return isinstance(value, Tensor) and value.dim() < 2


def _code(name, value, table):
    if value not in table:
        _check.choice(name, value, table)
    return table.index(value)


def denoising_loss(
    model_output: Tensor,
    x0: Tensor,
    alpha: float | Tensor | None,
    sigma: float | Tensor,
    *,
    noise: Tensor | None = None,
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    prediction: str = "epsilon",
    weighting: str | Tensor = "none",
    gamma: float = 5.0,
    k: float = 1.0,
    reduction: str = "mean",
    return_per_sample: bool = False,
    backend: str | None = None,
) -> Tensor | Any:
    """weight_b mean_b (model_output - target)^2, the target formed in the same pass.

    model_output, x0: (B, ...), float32, float16, bfloat16 (fp32 inside, sums in fp64) or float64.
    alpha, sigma: of x_t = alpha x0 + sigma eps; a number or (B,); alpha None: 1 - sigma (flow).
    eps: `noise` like x0, or drawn from seed (required then; int, or int64 of one or of B), stream,
    offset: give what `add_noise` was given.
    prediction: "epsilon", "sample", "v_prediction" (alpha eps - sigma x0) or "flow_prediction"
    (eps - x0). weighting: "none", "min_snr" (gamma > 0; Hang et al. 2023), "p2" (k >= 0, gamma;
    Choi et al. 2022), "snr", "sigma_sqrt", "cosmap" (Esser et al. 2024), "edm", or a tensor (B,).
    reduction: "mean" over samples, "sum" of their means, "none" (B,). return_per_sample: also the
    (B,) losses. backend: one for this call and its gradient, as `genfast.set_backend`.
    Returns fp32 (fp64 for float64). Differentiable in every tensor, twice too.
    Raises TypeError / ValueError naming the argument.
    """
    if backend is not None:
        return under(denoising_loss, locals())
    prediction = _code("prediction", prediction, PREDICTIONS)
    code = (
        _GIVEN if isinstance(weighting, Tensor) else _code("weighting", weighting, WEIGHTINGS[:-1])
    )
    weight = weighting if code == _GIVEN else None
    reduced = _code("reduction", reduction, REDUCTIONS)
    found = None
    numbers = (prediction, code, gamma, k, reduced)
    both = return_per_sample or reduced == 0
    if not is_compiling() and (noise is None) != (seed is None):
        try:
            road = gate(
                model_output, x0, noise, weight,
                alpha if isinstance(alpha, Tensor) else None,
                sigma if isinstance(sigma, Tensor) else None,
            )  # fmt: skip
            if road and 0 < gamma < math.inf and 0 <= k < math.inf:
                int_seed, seeds = _noise.resolve(
                    0 if seed is None else seed, None, model_output.device
                )
                args = (model_output, x0, noise, alpha, sigma, weight, seeds, int_seed, stream,
                        offset, *numbers)  # fmt: skip
                if road == DIRECT:
                    found = _native(*args)
                elif (
                    _by_sample(sigma)
                    and (alpha is None or _by_sample(alpha))
                    and model_output.dtype is not torch.float64
                    and (model_output.is_cpu or _common.on_kernel(model_output, x0, noise))
                ):
                    found = _Loss.quick(both, *args)
                    if not both:
                        return found
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            found = None  # the checks below name the argument
    if found is None:
        found = _slow(model_output, x0, alpha, sigma, noise, seed, stream, offset, weight, *numbers)
    total, each = found
    main = each if reduced == 0 else total
    return (main, each) if return_per_sample else main


def _slow(output, x0, alpha, sigma, noise, seed, stream, offset, weight, prediction, weighting,
          gamma, k, reduction):  # fmt: skip
    _check.tensor("model_output", output)
    _check.tensor("x0", x0)
    if output.dim() == 0 or output.numel() == 0:
        raise ValueError(
            f"model_output: expected shape (B, ...) with elements, got {tuple(output.shape)}"
        )
    _check.same_shape("x0", x0, "model_output", output)
    if noise is not None:
        _check.tensor("noise", noise)
        _check.same_shape("noise", noise, "x0", x0)
        if seed is not None:
            raise ValueError("noise: expected it alone, got a seed too; pass only one")
    elif seed is None:
        raise ValueError(
            "seed: expected the seed (or noise) that add_noise was given, got None; the loss "
            "cannot know the noise otherwise"
        )
    _check.same_device(model_output=output, x0=x0, noise=noise, weighting=weight)
    _noise.check(seed, stream, offset, None, output.shape, output.device)
    _check.number("gamma", gamma, **_GAMMA.get(weighting, {}))
    _check.number("k", k, **_K.get(weighting, {}))
    if sigma is None:
        raise TypeError("sigma: expected a number or a tensor, got None")
    sigma = _common.coefficient("sigma", sigma, output, batch_only=True)
    alpha = None if alpha is None else _common.coefficient("alpha", alpha, output, batch_only=True)
    weight = (
        None
        if weight is None
        else _common.coefficient("weighting", weight, output, batch_only=True)
    )
    seed, seeds = _noise.resolve(0 if seed is None else seed, None, output.device)
    args = (output, x0, noise, alpha, sigma, weight, seeds, _noise.signed(seed),
            _noise.signed(stream), offset, prediction, weighting, float(gamma), float(k),
            reduction)  # fmt: skip
    wide = _common.wide_dtype(output, x0, noise) == torch.float64
    others = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[1:6])
    if others:
        may_compose("denoising_loss", output, x0, noise, lacks="a gradient but by model_output")
    if forced_reference() or wide or transforming() or (others and is_compiling()):
        return _composite(*args)
    tensors = args[:6]
    if not is_compiling() and gate(*tensors) == GRAD and _common.on_kernel(*args[:3]):
        return _Loss.apply(True, *args)
    return _op(*args)
