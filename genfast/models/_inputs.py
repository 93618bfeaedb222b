"""Checks of what models are built for and fed with. Values are looked at of plain tensors on the
CPU alone: no sync elsewhere, and nothing to trace."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from genfast.ops import _check
from genfast.ops._road import DIRECT, is_compiling, plain_gate


def readable(x: Tensor) -> bool:
    plain = x.device.type == "cpu" and not is_compiling() and plain_gate(x) == DIRECT
    return plain and x.numel() > 0


def image_shape(shape: Iterable[int], levels: int = 0, least: int = 1) -> tuple[int, int, int]:
    """(C, H, W). levels: how often H and W are halved; least: of both."""
    whole = isinstance(shape, tuple | list | torch.Size) and len(shape) == 3
    if not whole or any(isinstance(n, bool) or not isinstance(n, int) for n in shape):
        raise ValueError(f"shape: expected (C, H, W), three ints, got {shape!r}")
    if shape[0] < 1 or min(shape[1:]) < least:
        raise ValueError(
            f"shape: expected (C, H, W) with C >= 1 and H, W >= {least}, got {tuple(shape)}"
        )
    if shape[1] % 2**levels or shape[2] % 2**levels:
        raise ValueError(
            f"shape: expected (C, H, W) with H and W divisible by {2**levels} for {levels} levels, "
            f"got {tuple(shape)}; take fewer levels, or crop or pad the images"
        )
    return tuple(shape)


def images(
    name: str, x: Tensor, shape: tuple[int, ...],
    remedy: str = "resize the images or build the model for this size",
) -> None:  # fmt: skip
    """x (B, *shape), floats."""
    floats(name, x)
    if tuple(x.shape[1:]) != tuple(shape) or x.dim() != 1 + len(shape):
        raise ValueError(
            f"{name}: expected (B, {', '.join(map(str, shape))}), got shape {tuple(x.shape)}; "
            f"{remedy}"
        )


def some(name: str, x: Tensor) -> None:
    """A batch of at least one sample: the mean loss of none is NaN."""
    if isinstance(x, Tensor) and x.dim() and not len(x):
        raise ValueError(
            f"{name}: expected at least one sample, got shape {tuple(x.shape)}; skip empty batches"
        )


def floats(name: str, x: Tensor) -> None:
    if isinstance(x, Tensor) and x.dtype == torch.uint8:
        raise TypeError(
            f"{name}: expected floats in [0, 1], got {x.dtype}; divide bytes by 255: x / 255"
        )
    _check.tensor(name, x)


def labels(name: str, y: Tensor, n: int, classes: int) -> None:
    """y (n,) int64 in [0, classes)."""
    _check.tensor(name, y, (torch.int64,))
    if y.shape != (n,):
        raise ValueError(f"{name}: expected shape ({n},), a label a sample, got {tuple(y.shape)}")
    if readable(y):
        low, high = (int(v) for v in y.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"{name}: expected labels in 0 ... {classes - 1}, got {low} ... {high}"
            )


def ids(name: str, ids: Tensor, vocab: int, longest: int | None = None, least: int = 0) -> None:
    """ids (B, S) int64 in [0, vocab) with least <= S <= longest."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name}: expected an int64 tensor of token ids, got {got}")
    if ids.dim() != 2:
        raise ValueError(f"{name}: expected shape (B, S), got {tuple(ids.shape)}")
    if ids.shape[1] < least:
        raise ValueError(f"{name}: expected at least {least} tokens, got {ids.shape[1]}")
    if longest is not None and ids.shape[1] > longest:
        raise ValueError(
            f"{name}: expected at most {longest} tokens (the model's context), got {ids.shape[1]}; "
            "cut the text or build the model with a longer context"
        )
    if readable(ids):
        low, high = (int(v) for v in ids.aminmax())
        if low < 0 or high >= vocab:
            raise ValueError(f"{name}: expected ids in [0, {vocab}), got {low} ... {high}")


def seeds(name: str, seed: Tensor, n: int | None = None) -> None:
    """seed (n,) int64."""
    _check.tensor(name, seed, (torch.int64,))
    if seed.dim() != 1 or not len(seed) or n not in (None, len(seed)):
        want = "(B,) with B >= 1" if n is None else f"({n},)"
        raise ValueError(f"{name}: expected shape {want}, a seed a sample, got {tuple(seed.shape)}")
