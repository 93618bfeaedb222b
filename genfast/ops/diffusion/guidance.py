"""Guidance: weights of the model outputs from five per-sample sums, then the affine kernel.

The sums (of c, u, c^2, u^2, c u) are accumulated in double over fixed chunks, so a sample's weights
depend neither on the threads nor on the batch it came in.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from genfast.ops import _check
from genfast.ops._backend import kernels, under
from genfast.ops._force import forced_reference, may_compose
from genfast.ops._road import (
    DIRECT,
    KERNEL_DTYPES,
    define,
    gate,
    is_compiling,
    transforming,
)
from genfast.ops.diffusion import _common
from genfast.ops.diffusion.step import COEF, COLUMNS, diffusion_step
from genfast.reference import diffusion as reference

# Method -> its place in the native enum and its options with their defaults.
METHODS = {
    "cfg": {},
    "rescale": {"rescale": 0.0},
    "cfg_zero_star": {},
    "apg": {"eta": 1.0, "norm_threshold": 0.0},
    "mag": {"alpha": 8.0},
    "tcfg": {},
}
_CODES = {name: i for i, name in enumerate(METHODS)}
_NAMES = tuple(METHODS)


# out_0 = m
_IDENTITY = (0.0, 0.0, math.inf, *[0.0] * (COEF - 3), 0.0, 1.0, *[0.0] * (COLUMNS - COEF - 2))


def _identity_row(device) -> Tensor:
    return _common.numbers(_IDENTITY, device)[None]


def _is_finite(scale) -> bool:
    return isinstance(scale, (int, float)) and scale - scale == 0


def _cfg_as_mix(cond, uncond, scale, original):
    """u + w (c - u) = (1 - w) u + w c with w a float or (B,): one pass, no weights in memory."""
    p, q, w = (cond, uncond, -scale) if original else (uncond, cond, scale)
    out = torch.empty_like(cond)
    taken = kernels.diffusion_mix(out, p, q, 0, None, 0, 0, False, None, w, 1, 1, True)
    return out if taken else None


def _native(cond, uncond, average, scale, method, original, o_0, o_1):
    width = 2 if average is None else 3
    weights = torch.empty((cond.shape[0], width), dtype=torch.float32, device=cond.device)
    if kernels.guidance_weights(cond, uncond, average, scale, weights, method, original, o_0, o_1):
        return weights
    return None


def _plain_weights(cond, uncond, average, scale, method, original, o_0, o_1):
    """The same from sums in fp64, for devices and dtypes without a kernel."""
    may_compose("guidance_weights", cond, uncond, average)
    u = uncond if average is None else average
    return reference.guidance_weights(
        cond.double(), u.double(), scale.double(), method=_NAMES[method], original=original,
        options=(o_0, o_1), average=average is not None,
    ).to(_common.wide_dtype(cond, uncond))  # fmt: skip


def _impl(cond, uncond, average, scale, *rest):
    found = None
    if _common.on_kernel(cond, uncond, average):
        found = _native(cond, uncond, average, scale, *rest)
    return _plain_weights(cond, uncond, average, scale, *rest) if found is None else found


_op = define(
    "guidance_weights(Tensor cond, Tensor uncond, Tensor? average, Tensor scale, int method, "
    "bool original, float o_0, float o_1) -> Tensor",
    _impl,
    lambda cond, uncond, average, *rest: cond.new_empty(
        (cond.shape[0], 2 if average is None else 3), dtype=_common.wide_dtype(cond, uncond)
    ),
)


def _options(method: str, options: dict) -> tuple[float, float]:
    _check.choice("method", method, METHODS)
    allowed = METHODS[method]
    for name, value in options.items():
        if name not in allowed:
            takes = ", ".join(allowed) or "none"
            raise TypeError(f"{name}: no option of method {method!r}, which takes {takes}")
        _check.number(name, value)
    values = [float(options.get(n, default)) for n, default in allowed.items()]
    return (*values, 0.0, 0.0)[:2]


def _scale(scale, cond) -> Tensor:
    if isinstance(scale, Tensor):
        _check.tensor("scale", scale)
        _check.same_device(cond=cond, scale=scale)
        if scale.numel() not in (1, cond.shape[0]):
            raise ValueError(
                f"scale: expected a number or one per sample ({cond.shape[0]},), got "
                f"{tuple(scale.shape)}"
            )
        return scale.detach().reshape(-1).to(torch.float32).contiguous()
    _check.number("scale", scale)
    return _common.numbers((scale,), cond.device)


def _validate(cond, uncond, average, method):
    _check.tensor("cond", cond)
    _check.tensor("uncond", uncond)
    if cond.dim() == 0:
        raise ValueError("cond: expected shape (B, ...), got a 0-dim tensor")
    _check.same_shape("uncond", uncond, "cond", cond)
    if average is not None:
        _check.tensor("average", average)
        _check.same_shape("average", average, "cond", cond)
        if method != "apg":
            raise TypeError(f"average: belongs to method 'apg', got method {method!r}")
    _check.same_device(cond=cond, uncond=uncond, average=average)


def guidance_weights(
    cond: Tensor,
    uncond: Tensor,
    scale: float | Tensor = 1.0,
    *,
    method: str = "cfg",
    original: bool = False,
    average: Tensor | None = None,
    backend: str | None = None,
    **options: Any,
) -> Tensor:
    """(B, 2) weights w with w_0 cond + w_1 uncond = the guided output; (B, 3) with average. fp32
    (fp64 for float64).

    For `diffusion_step(x, (cond, uncond), ..., weights=w)`: guidance and step in two passes.
    Arguments and errors as in `guide`. No gradient.
    """
    if backend is not None:
        return under(guidance_weights, locals())
    o_0, o_1 = _options(method, options)
    code = _CODES[method]
    plain = isinstance(cond, Tensor) and not is_compiling() and (average is None or method == "apg")
    each = scale if isinstance(scale, Tensor) else None
    if plain and (each is not None or _is_finite(scale)):
        with torch.no_grad():
            if gate(cond, uncond, average, each) == DIRECT and cond.dim():
                scales = _common.cached((float(scale),), cond.device) if each is None else each
                found = _native(cond, uncond, average, scales, code, original, o_0, o_1)
                if found is not None:
                    return found
    _validate(cond, uncond, average, method)
    args = (cond.detach(), uncond.detach(), None if average is None else average.detach())
    rest = (_scale(scale, cond), code, bool(original), o_0, o_1)
    if forced_reference() or transforming():
        return _plain_weights(*args, *rest)
    return _op(*args, *rest)


def guide(
    cond: Tensor,
    uncond: Tensor | None = None,
    scale: float | Tensor = 1.0,
    *,
    method: str = "cfg",
    original: bool = False,
    average: Tensor | None = None,
    backend: str | None = None,
    **options: Any,
) -> Tensor:
    """One guided model output of a conditional and an unconditional one.

    cond, uncond: (B, ...); without uncond, cond itself. scale: a number or (B,).
    original: cond + w (cond - uncond) instead of uncond + w (cond - uncond).
    method, with its options: "cfg" (Ho & Salimans 2022); "rescale": rescale (Lin et al. 2023);
    "cfg_zero_star" (Fan et al. 2025); "apg": eta, norm_threshold, and average, the running average
    of cond - uncond that replaces it (Sadat et al. 2024); "mag": alpha; "tcfg" (Kwon et al. 2025).
    backend: one for this call, as `genfast.set_backend`; gradients come from "reference" alone.
    Formulas: genfast.reference.diffusion. Differentiable, twice too. Raises TypeError / ValueError
    naming the argument.
    """
    if backend is not None:
        return under(guide, locals())
    if uncond is None:
        _check.tensor("cond", cond)
        return cond
    models = (cond, uncond) if average is None else (cond, uncond, average)
    each = scale if isinstance(scale, Tensor) else None
    road = gate(*models, each) if not is_compiling() and isinstance(cond, Tensor) else 0
    if (
        road == DIRECT
        and (_is_finite(scale) if each is None else cond.dtype in KERNEL_DTYPES)
        and cond.dim()
        and type(method) is str
    ):
        plain = method == "cfg" and average is None and not options
        if plain and (each is None or (each.dim() == 1 and each.dtype == torch.float32)):
            # a number in fp32, as the kernel of the weights reads it
            w = ctypes.c_float(scale).value if each is None else each
            out = _cfg_as_mix(cond, uncond, w, original)
            if out is not None:
                return out
        weights = guidance_weights(
            cond, uncond, scale, method=method, original=original, average=average, **options
        )
        out = torch.empty_like(cond)
        row = _common.cached(_IDENTITY, cond.device, 1)
        if kernels.diffusion_step(
            (out,), cond, models, weights, row, None, 0, None, None, 0, None, 0, 0, False, None
        ):
            return out
    o_0, o_1 = _options(method, options)
    _validate(cond, uncond, average, method)
    weights_tensor = _scale(scale, cond)
    needs = torch.is_grad_enabled() and (
        any(t.requires_grad for t in models) or (isinstance(scale, Tensor) and scale.requires_grad)
    )
    wide = _common.wide_dtype(*models) == torch.float64
    if needs or wide or forced_reference() or transforming():
        may_compose("guide", *models, lacks="a gradient")
        named = dict(options, original=original)
        if average is not None:
            named["average"] = average.to(_common.wide_dtype(*models))
        return reference.guide(cond, uncond, scale, method=method, **named)
    detached = [t.detach() for t in models]
    weights = _op(
        detached[0], detached[1], None if average is None else detached[2], weights_tensor,
        _CODES[method], bool(original), o_0, o_1,
    )  # fmt: skip
    return diffusion_step(cond, models, _identity_row(cond.device), weights=weights)
