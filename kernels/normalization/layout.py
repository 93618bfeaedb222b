"""How the tensors of a call lie, and how the kernels cut them: what both launchers ask."""

import math
from dataclasses import dataclass

import torch
import triton.language as tl

from .._launch import FLOATS, ceil_div, planes_of, same_memory

ACTIVATIONS = 4  # of the native enum NormActivation
MOST_PARTS = tl.constexpr(64)
# Elements of a tile that walks over groups at 16 warps, 8 of a thread, 4 off 8 elements: twice as
# many took up to 255 registers and spilled.
_TILE = {True: 4096, False: 2048}
# Programs that fill a GPU, and the fewest elements of a group's part: eight tiles take about as
# long as it takes to start the second pass.
_PROGRAMS, _PART = 512, 32768


@dataclass
class Planes:
    """[outer][inner][channels] with `last`, else [outer][channels][inner]; groups: of a sample, 0
    in layer and RMS norm. aligned: rows start a multiple of 8 behind their tensor's first."""

    outer: int
    channels: int
    inner: int
    last: bool
    groups: int
    aligned: bool

    def count(self) -> int:
        return self.outer * (self.groups or self.inner)

    def of_long_rows(self) -> "Planes":
        """Each row a group of one place."""
        return Planes(self.count(), self.channels, 1, True, 1, self.aligned)


def vector_of(t: torch.Tensor | None, n: int, x: torch.Tensor) -> bool:
    """t is None or n fp32 numbers side by side."""
    if t is None:
        return True
    dense = t.dtype == torch.float32 and t.is_contiguous()
    return dense and t.numel() == n and t.device == x.device


def layout_of(
    statistics, x, w, b, scale, shift, add, gate, groups, rms, act, eps
) -> Planes | None:  # fmt: skip
    """The layout of a call, or None where the kernels do not take it: `fill` of
    csrc/bindings_normalization.cpp."""
    conditions = [t for t in (scale, shift, gate) if t is not None]
    given = [x, *(t for t in (w, b, add) if t is not None), *conditions]
    if any(t.dtype not in FLOATS or t.device != x.device for t in given) or x.dim() < 1:
        return None
    if groups < 0 or (rms and groups) or not 0 <= act < ACTIVATIONS:
        return None
    if not 0 <= eps < math.inf or (add is None and gate is not None):
        return None
    if groups:
        planes = planes_of(x, 1)
        if planes is None or planes[1] % groups or add is not None:
            return None
        outer, channels, inner, last = planes
    else:
        if not x.is_contiguous() or (x.dim() < 2 and conditions):
            return None
        outer, channels, last = x.shape[0] if x.dim() > 1 else 1, x.shape[-1], True
        inner = math.prod(x.shape[1:-1])
        if add is not None and not same_memory(add, x):
            return None
    if channels >= 2**31 or any(t.shape != (outer, channels) for t in conditions):
        return None
    if channels > 1 and any(t.stride(1) != 1 for t in conditions):
        return None
    if any(t is not None and (t.shape != (channels,) or not t.is_contiguous()) for t in (w, b)):
        return None
    dense = channels // max(groups, 1) if last else inner
    aligned = dense % 8 == 0 and all(t.stride(0) % 8 == 0 for t in conditions)
    p = Planes(outer, channels, inner, last, groups, aligned)
    return p if vector_of(statistics, (1 if rms else 2) * p.count(), x) else None


def row_tile(cols: int) -> tuple[int, int]:
    """(BR, BC) with whole rows, at least 1024 elements: few sizes, as `rng.tile`."""
    bc = next(bc for bc in (16, 64, 256, 1024, 2048, 4096, 8192) if cols <= bc)
    return max(1024 // bc, 1), bc


def strides_of(*conditions: torch.Tensor | None) -> tuple[int, ...]:
    return tuple(0 if t is None else t.stride(0) for t in conditions)


def group_grid(p: Planes, per_sample: int) -> tuple[int, tuple[int, ...], dict]:
    """Parts of a group, the arguments GROUPS and the constants."""
    width = p.channels // p.groups
    rows, cols = (p.inner, width) if p.last else (width, p.inner)
    size = _TILE[p.aligned] if rows * cols > 1024 else 1024

    def padded(bc):
        return ceil_div(cols, bc) * bc * ceil_div(rows, size // bc) * (size // bc)

    bc = min((bc for bc in (size, 1024, 256, 64, 16) if bc <= size), key=padded)
    br = size // bc
    parts = min(_PROGRAMS // p.count(), rows * cols // _PART, MOST_PARTS.value)
    step = br if p.last else bc  # a part is made of whole tiles
    per_part = ceil_div(ceil_div(p.inner, max(parts, 1)), step) * step
    parts = ceil_div(p.inner, per_part)
    numbers = (p.groups, per_sample, width, p.inner, parts, per_part, p.count())
    flags = {"LAST": p.last, "ALIGNED": p.aligned, "BR": br, "BC": bc}
    return parts, numbers, {**flags, "num_warps": 16 if size > 1024 else 4}
