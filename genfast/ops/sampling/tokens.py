"""Categorical and token sampling by Gumbel-max: one pass, per-row seeds, no sort of the vocabulary.

A row's draw is a function of its seed (or of seed and row index) alone: batch order and size, or
how many rows run at once, never matter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genfast.ops import _check, _noise
from genfast.ops._backend import has_kernels, kernels, under
from genfast.ops._force import forced_reference, may_compose
from genfast.ops._road import (
    DIRECT,
    KERNEL_DTYPES,
    define,
    gate,
    is_compiling,
    readable,
    transforming,
)
from genfast.ops.rng import noise_like
from genfast.reference import sampling as reference

_MOST = torch.finfo(torch.float32).max
_FILTERS = ("temperature", "top_k", "top_p", "min_p")
_ARGS = (
    "Tensor logits, Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, "
    "SymInt seed, Tensor? seeds, SymInt stream, SymInt offset"
)


def _native(logits, temperature, top_k, top_p, min_p, seed, seeds, stream, offset):
    index = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    bad = kernels.categorical(
        logits, index, temperature, top_k, top_p, min_p, seed, seeds, stream, offset
    )
    if bad < 0:
        return None
    _refuse(bad)
    return index


def _refuse(bad: int):
    if bad:
        raise ValueError(
            f"logits: expected a finite maximum in every row, got {bad} row(s) that hold NaN or "
            "+inf, or nothing but -inf; mask fewer entries or clean the model's output"
        )


def _per_row(x, rows):
    return None if x is None else x.reshape(-1).expand(rows)


def _composite(logits, temperature, top_k, top_p, min_p, seed, seeds, stream, offset):
    may_compose("sample_tokens", logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # like the kernel
    top = logits.amax(-1)
    if type(logits) is Tensor and logits.device.type == "cpu" and not (
        is_compiling() or transforming()
    ):  # fmt: skip
        _refuse(int((~torch.isfinite(top)).sum()))
    noise = noise_like(logits, "gumbel", seed, seeds, stream, offset)
    if temperature is None and top_k is None and top_p is None and min_p is None:
        return reference.sample_categorical(logits, noise)
    shape, v = logits.shape[:-1], logits.shape[-1]
    flat, noise = logits.reshape(-1, v), noise.reshape(-1, v)
    rows = flat.shape[0]
    t = (
        torch.ones(rows, device=logits.device)
        if temperature is None
        else _per_row(temperature, rows)
    )
    t = t.to(logits.dtype)
    greedy = (t <= 0) | ~torch.isfinite(top.reshape(-1) / t)  # logits / t would overflow
    scaled = flat / torch.where(greedy, torch.ones_like(t), t).to(flat.dtype)[:, None]
    kept = reference.filter_logits(scaled, *(_per_row(x, rows) for x in (top_k, top_p, min_p)))
    index = reference.sample_categorical(kept, noise)
    return torch.where(greedy, flat.argmax(-1), index).reshape(shape)


def _impl(logits, *args):
    found = None
    if logits.dtype in KERNEL_DTYPES and has_kernels(logits.device):
        found = _native(logits, *args)
    return _composite(logits, *args) if found is None else found


_op = define(
    f"sample_tokens({_ARGS}) -> Tensor",
    _impl,
    lambda logits, *rest: logits.new_empty(logits.shape[:-1], dtype=torch.int64),
)


def _draw(logits, filters, seed, stream, offset, generator):
    nested = isinstance(logits, Tensor) and logits.is_nested  # has no shape
    if nested or not isinstance(logits, Tensor) or logits.dim() == 0 or logits.shape[-1] == 0:
        _check.tensor("logits", logits)
        raise ValueError(f"logits: expected shape (..., V) with V > 0, got {tuple(logits.shape)}")
    if not is_compiling() and gate(logits) == DIRECT and (seed is None or type(seed) is int):
        try:
            seed, generator = _noise.drawn_once(seed, logits.device, generator)
            args = _noise.resolve(seed, generator, logits.device)
            found = _native(logits, *filters, *args, stream, offset)
            if found is not None:
                return found
        except TypeError:
            pass  # the checks below name the argument
    _check.tensor("logits", logits)
    _noise.check(seed, stream, offset, generator, logits.shape[:-1], logits.device)
    seed, seeds = _noise.resolve(seed, generator, logits.device)
    args = (*filters, _noise.signed(seed), seeds, _noise.signed(stream), offset)
    detached = logits.detach()
    if forced_reference() or transforming():
        return _composite(detached, *args)
    return _op(detached, *args)


def sample_categorical(
    logits: Tensor,
    *,
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Index drawn from softmax(logits) over the last dimension: argmax(logits + Gumbel noise).

    logits: (..., V) float. seed: int, one int64 seed per sample of dim 0, or None. backend: one for
    this call, as `genfast.set_backend`. Returns int64 (...). No gradient. Raises ValueError for a
    row without a finite maximum (on the CPU; other devices give -1, without a sync), TypeError /
    ValueError naming a bad argument.
    Gumbel 1954; Maddison et al. 2014.
    """
    if backend is not None:
        return under(sample_categorical, locals())
    return _draw(logits, (None, None, None, None), seed, stream, offset, generator)


def _filter_tensor(name, value, low, high, logits, rows):
    """None, or an fp32 (top_k: int64) tensor of one or `rows` values."""
    if value is None:
        return None
    dtype = torch.int64 if name == "top_k" else torch.float32
    if isinstance(value, Tensor):
        if value.numel() not in (1, rows):
            raise ValueError(
                f"{name}: expected a number or one per row ({rows}), got {_check.describe(value)}"
            )
        if value.is_floating_point() == (name == "top_k"):
            raise TypeError(f"{name}: expected {dtype}, got {value.dtype}; convert it with .to()")
        _check.same_device(logits=logits, **{name: value})
        if readable(value):
            fits = (value >= low) & (value <= high)  # false for NaN; no sync on a CPU
            finite = "finite " if name == "temperature" else ""  # -inf over inf is NaN
            if finite:
                fits &= value.isfinite()
            if not bool(fits.all()):
                raise ValueError(
                    f"{name}: expected {finite}numbers in [{low}, {high}], got {value.tolist()}"
                )
        if name != "top_k":
            value = value.clamp(max=_MOST)
        return value.reshape(-1).to(dtype).contiguous()
    if name == "top_k":
        _check.integer(name, value, low=low, high=2**63 - 1)
    else:
        _check.number(name, value, low=low, high=high)
        value = min(float(value), _MOST)
    return torch.full((1,), value, dtype=dtype, device=logits.device)  # no copy from the host


def sample_tokens(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    *,
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Next tokens: temperature, then top-k (ties kept), top-p, min-p, then Gumbel-max.

    logits: (B, V) or (..., V) float. Each filter is a number, or a tensor with one value per row;
    None, top_k 0, top_p >= 1 and min_p 0 switch a filter off; temperature 0 is greedy.
    seed: int, or one int64 seed per sample of dim 0 (its draw then depends on nothing else).
    backend: as there.
    Returns int64 (...). Raises as `sample_categorical`, and for NaN or negative settings.
    top-p: Holtzman et al. 2020; min-p: Nguyen et al. 2024.
    """
    if backend is not None:
        return under(sample_tokens, locals())
    if not isinstance(logits, Tensor) or logits.is_nested:
        _check.tensor("logits", logits)
    rows = math.prod(logits.shape[:-1])
    inf = math.inf
    bounds = ((temperature, 0.0, inf), (top_k, 0, inf), (top_p, 0.0, inf), (min_p, 0.0, 1.0))
    filters = tuple(
        _filter_tensor(name, value, low, high, logits, rows)
        for name, (value, low, high) in zip(_FILTERS, bounds, strict=True)
    )
    return _draw(logits, filters, seed, stream, offset, generator)
