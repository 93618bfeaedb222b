"""Filters, and `upfirdn2d` with the padding that keeps images in place: NVlabs' helpers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genfast.ops import _check
from genfast.ops.filtering.upfirdn2d import _pair, _quad, filter_size, upfirdn2d


def setup_filter(
    f: Tensor | Sequence[float] | float | None,
    device: torch.device | str = "cpu",
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1.0,
    separable: bool | None = None,
) -> Tensor:
    """The filter for `upfirdn2d` of its taps: a number, a sequence, an array or a tensor.

    (n,) taps stay (n,), along both axes, where separable (default: from 8 taps on), else become
    their outer product (n, n). normalize: to sum 1. gain: of the whole image (no root of a negative
    one: not for (n,) taps). Returns float32
    (fh, fw) or (n,). Raises TypeError / ValueError naming the argument.
    """
    try:
        own = None if isinstance(f, Tensor) else "cpu"
        f = torch.as_tensor(1 if f is None else f, dtype=torch.float32, device=own)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"f: expected numbers, as a sequence, an array or a tensor, got {_check.describe(f)}"
        ) from error
    _check.number("gain", gain)
    if f.dim() > 2 or f.numel() == 0:
        raise ValueError(f"f: expected at most two dimensions with taps, got {tuple(f.shape)}")
    f = f.reshape(1) if f.dim() == 0 else f
    if separable is None:
        separable = f.dim() == 1 and f.numel() >= 8
    if separable and f.dim() != 1:
        raise ValueError(f"separable: expected taps (n,) for it, got a filter {tuple(f.shape)}")
    if separable and gain < 0:
        raise ValueError(
            f"gain: expected a number >= 0 for separable taps, got {gain}; negate them"
        )
    if f.dim() == 1 and not separable:
        f = f.outer(f)
    if normalize:
        total = f.sum()
        if not f.requires_grad and total == 0:
            raise ValueError("f: expected taps with a sum other than 0, or normalize=False")
        f = f / total
    if flip_filter:
        f = f.flip(list(range(f.dim())))
    return (f * gain ** (f.dim() / 2)).to(device)


def filter2d(
    x: Tensor,
    f: Tensor | None,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """`upfirdn2d` that keeps the size of x (padding 0), (N, C, H, W); its other arguments."""
    fw, fh = filter_size(f)
    left, right, top, bottom = _quad(padding)
    padding = (left + fw // 2, right + (fw - 1) // 2, top + fh // 2, bottom + (fh - 1) // 2)
    return upfirdn2d(x, f, padding=padding, flip_filter=flip_filter, gain=gain, backend=backend)


def upsample2d(
    x: Tensor,
    f: Tensor | None,
    up: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """(N, C, H, W) -> (N, C, H up, W up) (padding 0), of the same mean but for the border; else as
    `upfirdn2d`."""
    (up_x, up_y), (fw, fh) = _pair("up", up), filter_size(f)
    left, right, top, bottom = _quad(padding)
    padding = (
        left + (fw + up_x - 1) // 2, right + (fw - up_x) // 2,
        top + (fh + up_y - 1) // 2, bottom + (fh - up_y) // 2,
    )  # fmt: skip
    _check.number("gain", gain)
    if not isinstance(gain, Tensor):
        gain = gain * up_x * up_y
    return upfirdn2d(
        x, f, up=up, padding=padding, flip_filter=flip_filter, gain=gain, backend=backend
    )


def downsample2d(
    x: Tensor,
    f: Tensor | None,
    down: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """(N, C, H, W) -> (N, C, H / down, W / down) (padding 0); else as `upfirdn2d`."""
    (down_x, down_y), (fw, fh) = _pair("down", down), filter_size(f)
    left, right, top, bottom = _quad(padding)
    padding = (
        left + (fw - down_x + 1) // 2, right + (fw - down_x) // 2,
        top + (fh - down_y + 1) // 2, bottom + (fh - down_y) // 2,
    )  # fmt: skip
    return upfirdn2d(
        x, f, down=down, padding=padding, flip_filter=flip_filter, gain=gain, backend=backend
    )
