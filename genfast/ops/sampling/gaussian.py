"""Reparameterized Gaussian draws, y = T(mu + e^(logvar/2) eps), with a side sum in the same pass.

Kingma & Welling 2014 (section 2.4, appendix B); tanh-squashed: Haarnoja et al. 2018, appendix C.
Saved for backward: mu, logvar and the seed. eps is drawn again, never stored.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from genfast.ops import _check, _noise
from genfast.ops._backend import has_kernels, kernels, under
from genfast.ops._force import forced_reference, may_compose
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
    taken,
    transforming,
    wants_graph,
)
from genfast.ops._scratch import parts
from genfast.ops.rng import noise_like
from genfast.reference import sampling as reference

# Native enums, by position.
TRANSFORMS = {"none": 0, "tanh": 1, "exp": 2}
NO_SIDE, KL, LOG_PROB = 0, 1, 2
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "batchmean": 3}
_TRANSFORM_NAMES, _REDUCTION_NAMES = tuple(TRANSFORMS), tuple(REDUCTIONS)


def _scale(shape: torch.Size, reduction: int) -> float:
    if reduction == 2:
        return 1.0 / max(shape.numel(), 1)
    return 1.0 / max(shape[0], 1) if reduction == 3 and len(shape) else 1.0


def _side_shape(shape, reduction: int):
    return shape[:1] if reduction == 0 else ()


def _scratch_size(shape, reduction: int) -> int:
    """Partial sums of the CUDA kernel."""
    rows = shape[0] if reduction == 0 and len(shape) else 1
    return rows * parts(shape.numel() // max(rows, 1))


# ---- native calls -----------------------------------------------------------------------------


def _forward(mu, logvar, seed, seeds, stream, offset, transform, side, reduction, want_y=True):
    """(y, side sum) by the kernel, or None when it does not take these tensors."""
    y = None
    if want_y:
        same = mu.dtype is logvar.dtype
        y = (
            torch.empty_like(mu)
            if same
            else torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))
        )
    total = scratch = None
    if side:
        total = mu.new_empty(_side_shape(mu.shape, reduction), dtype=torch.float32)
        if mu.is_cuda:
            scratch = mu.new_empty(_scratch_size(mu.shape, reduction), dtype=torch.float64)
    if kernels.reparameterize(
        mu,
        logvar,
        y,
        total,
        seed,
        seeds,
        stream,
        offset,
        transform,
        side,
        _scale(mu.shape, reduction) if side else 1.0,
        scratch,
    ):
        return y, total
    return None


def _backward(
    grad_y, grad_side, mu, logvar, seed, seeds, stream, offset, transform, side, reduction
):
    if grad_y is None and grad_side is None:
        return None, None
    d_mu, d_logvar = torch.empty_like(mu), torch.empty_like(logvar)
    if grad_side is not None:
        grad_side = grad_side.to(torch.float32).contiguous()
    ran(kernels.reparameterize_backward(
        grad_y, grad_side, mu, logvar, d_mu, d_logvar, seed, seeds, stream, offset, transform, side,
        _scale(mu.shape, reduction),
    ))  # fmt: skip
    return d_mu, d_logvar


# ---- composite: the reference with native noise -------------------------------------------------


def _composite(mu, logvar, seed, seeds, stream, offset, transform, side, reduction):
    may_compose("reparameterize", mu, logvar)
    name = _TRANSFORM_NAMES[transform]
    dtype = torch.promote_types(mu.dtype, logvar.dtype)
    wide = _side_dtype(mu, logvar)  # 16-bit inputs: fp32 inside, like the kernel
    mu, logvar = mu.to(wide), logvar.to(wide)
    eps = noise_like(mu, "normal", seed, seeds, stream, offset)
    y = reference.reparameterize(mu, logvar, eps, name).to(dtype)
    if side == KL:
        return y, reference.gaussian_kl(mu, logvar, _REDUCTION_NAMES[reduction])
    if side == LOG_PROB:
        return y, reference.log_prob(mu, logvar, eps, name)
    return y, None


# ---- the op ------------------------------------------------------------------------------------

_ARGS = (
    "SymInt seed, Tensor? seeds, SymInt stream, SymInt offset, int transform, int side, "
    "int reduction"
)


def _side_dtype(mu: Tensor, logvar: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(mu.dtype, logvar.dtype), torch.float32)


def _impl(mu, logvar, *args):
    found = None
    if mu.dtype in KERNEL_DTYPES and logvar.dtype in KERNEL_DTYPES:
        found = _forward(mu, logvar, *args)
    y, side = found or _composite(mu, logvar, *args)
    return y, mu.new_empty((0,)) if side is None else side


def _fake(mu, logvar, seed, seeds, stream, offset, transform, side, reduction):
    y = torch.empty_like(mu, dtype=torch.promote_types(mu.dtype, logvar.dtype))
    if not side:
        return y, mu.new_empty((0,))
    shape = _side_shape(mu.shape, reduction)
    return y, mu.new_empty(shape, dtype=_side_dtype(mu, logvar))


def _backward_impl(grad_y, grad_side, mu, logvar, *args):
    if mu.dtype in KERNEL_DTYPES and logvar.dtype in KERNEL_DTYPES and has_kernels(mu.device):
        return _backward(grad_y, grad_side, mu.detach(), logvar.detach(), *args)
    inputs = [x.detach().requires_grad_() for x in (mu, logvar)]
    composite = partial(_composite_of, args)
    found = differentiable_backward(composite, inputs, [grad_y, grad_side])
    return tuple(
        torch.zeros_like(x) if g is None else g.detach() for g, x in zip(found, inputs, strict=True)
    )


def _backward_fake(grad_y, grad_side, mu, logvar, *args):
    return torch.empty_like(mu), torch.empty_like(logvar)


_backward_op = define(
    f"reparameterize_backward(Tensor? grad_y, Tensor? grad_side, Tensor mu, Tensor logvar, {_ARGS})"
    " -> (Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


def _composite_of(args, mu, logvar):
    y, side = _composite(mu, logvar, *args)
    return (y, side)


def _save(ctx, inputs, output):
    mu, logvar, seed, seeds, *rest = inputs
    ctx.save_for_backward(mu, logvar, seeds)
    ctx.rest = (seed, *rest)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_y, grad_side, first_order):
    mu, logvar, seeds = ctx.saved_tensors
    seed, *rest = ctx.rest
    args = (seed, seeds, *rest)
    if rest[3] == NO_SIDE:
        grad_side = None
    if grad_y is None and grad_side is None:
        return None, None
    if wants_graph() or not (is_compiling() or plain(grad_y, grad_side)):
        grads = [grad_y, grad_side]
        return differentiable_backward(partial(_composite_of, args), (mu, logvar), grads)
    return first_order(grad_y, grad_side, mu, logvar, *args)


def _op_backward(ctx, grad_y, grad_side):
    return (*_gradients(ctx, grad_y, grad_side, _backward_op), *[None] * 7)


_op = define(
    f"reparameterize(Tensor mu, Tensor logvar, {_ARGS}) -> (Tensor, Tensor)",
    _impl,
    _fake,
    _op_backward,
    _save,
)


class _Reparameterize(Node):
    """The GRAD road: kernel forward, kernel backward; differentiable backward on request."""

    @staticmethod
    def forward(ctx, mu, logvar, seed, seeds, *rest):
        _save(ctx, (mu, logvar, seed, seeds, *rest), None)
        return taken(_forward(mu, logvar, seed, seeds, *rest))

    @staticmethod
    def backward(ctx, grad_y, grad_side):
        return (*_gradients(ctx, grad_y, grad_side, _backward), *[None] * 7)


# ---- the road ----------------------------------------------------------------------------------


def _sample(mu, logvar, seed, stream, offset, generator, transform, side, reduction):
    """(y, side sum or None)."""
    if not is_compiling() and (road := gate(mu, logvar)):
        try:
            if type(seed) is int and generator is None:  # 0.2 us of 5
                int_seed, seeds = seed, None
            else:
                seed, generator = _noise.drawn_once(seed, mu.device, generator)
                int_seed, seeds = _noise.resolve(seed, generator, mu.device)
            if road == DIRECT:
                found = _forward(
                    mu, logvar, int_seed, seeds, stream, offset, transform, side, reduction
                )
                if found is not None:
                    return found
            elif (
                road == GRAD
                and mu.dtype in KERNEL_DTYPES
                and logvar.dtype in KERNEL_DTYPES
                and mu.shape == logvar.shape
                and mu.device == logvar.device
                and (mu.is_cpu or has_kernels(mu.device))
                and (seeds is None or seeds.numel() == 1 or seeds.shape == mu.shape[:1])
                and offset >= 0
            ):
                return _Reparameterize.apply(
                    mu, logvar, int_seed, seeds, stream, offset, transform, side, reduction
                )
        except (TypeError, ValueError, RuntimeError, AttributeError):
            _validate(mu, logvar, seed, stream, offset, generator)
            raise
    return _slow(mu, logvar, seed, stream, offset, generator, transform, side, reduction)


def _validate(mu, logvar, seed, stream, offset, generator):
    _check.tensor("mu", mu)
    _check.tensor("logvar", logvar)
    _check.same_device(mu=mu, logvar=logvar)
    _check.broadcastable(mu=mu, logvar=logvar)
    shape = torch.broadcast_shapes(mu.shape, logvar.shape)
    _noise.check(seed, stream, offset, generator, shape, mu.device)


def _slow(mu, logvar, seed, stream, offset, generator, transform, side, reduction):
    _validate(mu, logvar, seed, stream, offset, generator)
    if mu.dim() != logvar.dim() or mu.shape != logvar.shape:  # else a guard of an exported B
        mu, logvar = torch.broadcast_tensors(mu, logvar)
    seed, seeds = _noise.resolve(seed, generator, mu.device)
    args = (_noise.signed(seed), seeds, _noise.signed(stream), offset, transform, side, reduction)
    wide = mu.dtype == torch.float64 or logvar.dtype == torch.float64
    if forced_reference() or wide or transforming():
        return _composite(mu, logvar, *args)
    y, total = _op(mu, logvar, *args)
    return y, total if side else None


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    return_kl: bool = False,
    kl_reduction: str = "batchmean",
    backend: str | None = None,
) -> Tensor | Any:
    """z = mu + e^(logvar/2) eps in one pass, eps ~ N(0, 1) from the noise contract.

    mu, logvar: (B, ...), broadcast together; float32, float16, bfloat16 (fp32 inside), float64.
    seed: int, int64 tensor of one seed or of one per sample, or None: drawn from torch's generator.
    return_kl: also KL(N(mu, e^logvar) || N(0, 1)), float32 (float64 for float64 inputs);
    kl_reduction "none" -> (B,), "sum", "mean" (over elements) or "batchmean" (sum / B) -> ().
    backend: one for this call and its gradient, as `genfast.set_backend`.
    Returns z, of the promoted dtype, or (z, kl). Differentiable in mu and logvar, twice too; the
    backward draws eps again from the seed. Raises TypeError / ValueError naming the argument.
    Kingma & Welling, "Auto-encoding variational Bayes", 2014, section 2.4 and appendix B.
    """
    if backend is not None:
        return under(reparameterize, locals())
    if type(kl_reduction) is not str or kl_reduction not in REDUCTIONS:
        _check.choice("kl_reduction", kl_reduction, REDUCTIONS)
    z, kl = _sample(
        mu,
        logvar,
        seed,
        stream,
        offset,
        generator,
        0,
        KL if return_kl else NO_SIDE,
        REDUCTIONS[kl_reduction],
    )
    return (z, kl) if return_kl else z


def gaussian_kl(
    mu: Tensor, logvar: Tensor, *, reduction: str = "batchmean", backend: str | None = None
) -> Tensor:
    """KL(N(mu, e^logvar) || N(0, 1)) in one pass, without drawing.

    mu, logvar: (B, ...). backend: as in `reparameterize`. Returns float32 (float64 for float64
    inputs): (B,) for reduction "none", else (). Kingma & Welling 2014, appendix B.
    """
    if backend is not None:
        return under(gaussian_kl, locals())
    if type(reduction) is not str or reduction not in REDUCTIONS:
        _check.choice("reduction", reduction, REDUCTIONS)
    code = REDUCTIONS[reduction]
    given = mu is not None and logvar is not None
    if given and not is_compiling() and gate(mu, logvar) == DIRECT:
        try:
            found = _forward(mu, logvar, 0, None, 0, 0, 0, KL, code, want_y=False)
            if found is not None:
                return found[1]
        except RuntimeError:
            pass  # the checks below name the argument
    return _sample(mu, logvar, 0, 0, 0, None, 0, KL, code)[1]


def tanh_normal(
    mu: Tensor,
    logvar: Tensor,
    *,
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    return_log_prob: bool = False,
    backend: str | None = None,
) -> Tensor | Any:
    """y = tanh(mu + e^(logvar/2) eps), and ln q(y) per sample on request.

    mu, logvar: (B, ...). Returns y or (y, log_prob (B,) float32, float64 for float64): the
    log-density sums over all but dim 0, with ln(1 - tanh^2) in the form that does not cancel
    (Haarnoja et al. 2018, app. C).
    Arguments, gradients and errors as in `reparameterize`.
    """
    if backend is not None:
        return under(tanh_normal, locals())
    y, log_prob = _sample(
        mu, logvar, seed, stream, offset, generator, 1, LOG_PROB if return_log_prob else 0, 0
    )
    return (y, log_prob) if return_log_prob else y


def log_normal(
    mu: Tensor,
    logvar: Tensor,
    *,
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    return_log_prob: bool = False,
    backend: str | None = None,
) -> Tensor | Any:
    """y = e^(mu + e^(logvar/2) eps), and ln q(y) per sample on request; otherwise `tanh_normal`."""
    if backend is not None:
        return under(log_normal, locals())
    y, log_prob = _sample(
        mu, logvar, seed, stream, offset, generator, 2, LOG_PROB if return_log_prob else 0, 0
    )
    return (y, log_prob) if return_log_prob else y
