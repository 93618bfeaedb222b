"""What the functions of the family share: coefficients as tensors, checks, noise for composites."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genfast.ops import _check
from genfast.ops._backend import has_kernels
from genfast.ops._common import wide_dtype
from genfast.ops._road import KERNEL_DTYPES
from genfast.ops.rng import noise_like

_CACHE: dict[tuple, Tensor] = {}


def cached(values: tuple[float, ...], device: torch.device, *lead: int) -> Tensor:
    """fp32 tensor (*lead, n) of these numbers, kept: it spares 1 us a call, on a GPU a launch per
    number. Read only, and for plain roads only."""
    place = None
    if device.type != "cpu":
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return numbers(values, device).view(*lead, -1)  # a graph needs memory of its own
        # Another stream could read before this one has written. (A Stream object costs 2 us.)
        place = device, torch._C._cuda_getCurrentRawStream(device.index)
    key = (place, values, lead)
    found = _CACHE.get(key)
    if found is None:
        if len(_CACHE) >= 256:  # an annealed scale: keep the dictionary small
            _CACHE.clear()
        with torch.inference_mode(False), torch.no_grad():
            found = _CACHE[key] = numbers(values, device).view(*lead, -1)
    return found


def on_kernel(*tensors: Tensor | None) -> bool:
    return all(t is None or (t.dtype in KERNEL_DTYPES and has_kernels(t.device)) for t in tensors)


def numbers(values: Sequence[float], device: torch.device, dtype=torch.float32) -> Tensor:
    """These few numbers on the device. On a GPU by fills: a copy from the host would synchronise,
    and could not be captured in a graph."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype, device=device)
    result = torch.empty(len(values), dtype=dtype, device=device)
    for place, value in zip(result.split(1), values, strict=True):
        place.fill_(value)
    return result


def drawn(x: Tensor, dtype, seed, seeds, stream, offset) -> Tensor:
    """Contract normals of x's shape, not rounded to 16 bit."""
    return noise_like(x.to(dtype), "normal", seed, seeds, stream, offset)


def like(c: Tensor, x: Tensor) -> Tensor:
    """c over leading dimensions of x, to broadcast against x."""
    return c.reshape(c.shape + (1,) * (x.dim() - c.dim()))


def coefficient(name: str, value, x: Tensor, *, batch_only: bool = False) -> Tensor:
    """A number, or a tensor over leading dimensions of x (() / (B,) / (B, L)), as fp32 or fp64."""
    if isinstance(value, Tensor):
        _check.tensor(name, value)
        _check.same_device(**({"x": x, name: value} if value.dim() else {}))
        most = 1 if batch_only else x.dim()
        if value.dim() > most or value.shape != x.shape[: value.dim()]:
            if value.numel() != 1:
                raise ValueError(
                    f"{name}: expected one number, or one per leading dimension of "
                    f"{tuple(x.shape)} ({'(B,)' if batch_only else '(B,) or (B, L)'}), got shape "
                    f"{tuple(value.shape)}; reshape it"
                )
            value = value.reshape(())
        wide = value if value.dtype == torch.float64 else value.to(torch.float32)
        return wide.to(x.device).contiguous()
    _check.number(name, value)
    # a number keeps its 53 bits
    return torch.full((), float(value), dtype=torch.float64, device=x.device)


def weight_tensor(weights, count: int, x: Tensor) -> Tensor | None:
    """(count,) or (B, count), fp32 (fp64 beside a float64 x), of `weights`: None, a guidance scale,
    a sequence or a tensor."""
    if weights is None:
        if count == 1:
            return None
        raise ValueError(
            f"weights: expected {count} numbers for {count} model outputs, got None; pass a "
            "guidance scale or one weight per output"
        )
    if isinstance(weights, Tensor):
        _check.tensor("weights", weights)
        _check.same_device(x=x, weights=weights)
        batch = x.shape[0] if x.dim() else 1
        # Of as many dimensions: to compare a batch with `count` would specialise an export.
        want = (count,) if weights.dim() == 1 else (batch, count)
        if tuple(weights.shape) != want:
            raise ValueError(
                f"weights: expected shape ({count},) or ({batch}, {count}), got "
                f"{tuple(weights.shape)}"
            )
        return weights.to(wide_dtype(x)).contiguous()
    return numbers(weight_values(weights, count), x.device, wide_dtype(x))


def weight_values(weights, count: int) -> tuple[float, ...]:
    if isinstance(weights, Sequence) and not isinstance(weights, str):
        for w in weights:
            _check.number("weights", w)
        if len(weights) != count:
            raise ValueError(f"weights: expected {count} numbers, got {len(weights)}")
        return tuple(float(w) for w in weights)
    _check.number("weights", weights)
    if count == 2:  # u + w (c - u)
        return (float(weights), 1.0 - float(weights))
    if count == 1:
        return (float(weights),)
    raise ValueError(
        f"weights: a single scale serves two model outputs, got {count} outputs; pass {count} "
        "weights"
    )
