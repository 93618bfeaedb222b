"""The one way to start a kernel, and how tensors of any strides become rows of dense columns."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch


def launch(kernel: Any, programs: int, on: torch.Tensor, *args: Any, **options: Any) -> None:
    """Starts `programs` programs on the device of `on`. No FP fusion unless asked for: the noise
    contract needs every product rounded."""
    options.setdefault("enable_fp_fusion", False)
    if on.is_cuda and on.device.index != torch.cuda.current_device():
        with torch.cuda.device(on.device):
            kernel[(programs,)](*args, **options)
    else:
        kernel[(programs,)](*args, **options)
    # Each launch would compare every constant that the kernel names with its value of the first
    # one: 7 of 15 us for random_kernel's eleven. Ours do not change.
    if getattr(kernel, "used_global_vals", None):
        kernel.used_global_vals = {}  # a new one: another thread may be reading the old


def hidden(values: tuple) -> tuple:
    """Numbers for a tuple argument of a kernel, which reads them with `shown`.

    Triton specialises every number in a tuple (1 becomes a constant, multiples of 16 a hint, and
    the size picks 32 or 64 bits), so that each new shape would compile anew; 2^40 + 4 x + 2 is
    never special.
    """
    return tuple(hidden(x) if isinstance(x, tuple) else 2**40 + 4 * x + 2 for x in values)


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def takes(*tensors: torch.Tensor | None, seeds=None, small=(), offset=0, rows=False) -> bool:
    """The kernels can run: float tensors of one shape, seeds that fit, all on one device.

    small: (tensor or None, dtype, count) of the settings. rows: samples are rows of the last dim.
    """
    present = [t for t in tensors if t is not None]
    x = present[0]
    if any(t.dtype not in FLOATS or t.shape != x.shape or t.device != x.device for t in present):
        return False
    if any(
        t is not None and (t.dtype != dtype or t.numel() not in (1, n) or t.device != x.device)
        for t, dtype, n in small
    ):
        return False
    return (not rows or x.dim() > 0) and fits_seeds(x, seeds, x.dim() - rows) and offset >= 0


def fits_seeds(x: torch.Tensor, seeds: torch.Tensor | None, sample_dims: int) -> bool:
    if seeds is None or seeds.numel() == 1:
        return seeds is None or seeds.device == x.device
    fits = sample_dims > 0 and seeds.numel() == x.shape[0] and seeds.is_contiguous()
    return fits and seeds.device == x.device


def planes_of(x: torch.Tensor, dim: int) -> tuple[int, int, int, bool] | None:
    """(outer, channels, inner, channels inside) of csrc/api/tensor.h, None for other memory."""
    if not 0 <= dim < x.dim():
        return None
    outer, inner = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    channels = x.shape[dim]
    if x.is_contiguous():
        return outer, channels, inner, inner == 1 and channels > 1
    return (outer, channels, inner, True) if x.movedim(dim, -1).is_contiguous() else None


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.device != b.device:
        return False
    return all(n <= 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def row_stride(x: torch.Tensor, first: int) -> int | None:
    """Elements between rows if dims [first:] are dense and dims [:first] step evenly, else None."""
    step = 1
    for size, stride in zip(reversed(x.shape[first:]), reversed(x.stride()[first:]), strict=True):
        if size != 1 and stride != step:
            return None
        step *= size
    even = None
    for size, stride in zip(reversed(x.shape[:first]), reversed(x.stride()[:first]), strict=True):
        if size == 1:
            continue
        if even is not None and stride != even:
            return None
        step = stride if even is None else step
        even = stride * size
    return step


@dataclass
class Rows:
    """`rows` x `cols` elements in logical order; strides[i] elements between rows of tensor i."""

    rows: int
    cols: int
    tensors: list[torch.Tensor | None]
    strides: list[int]
    copies: list[tuple[torch.Tensor, torch.Tensor]]  # (output asked for, dense one written instead)
    aligned: bool  # every row of every tensor starts at a multiple of 8 elements and 16 bytes

    def finish(self) -> bool:
        for wanted, written in self.copies:
            wanted.copy_(written)
        return True


def as_rows(
    inputs: list[torch.Tensor | None],
    outputs: list[torch.Tensor | None],
    first: int | None = None,
    split: int = 0,
) -> Rows:
    """Views tensors of one shape as rows of dense columns, copying those that cannot be seen so.

    first: the first dim of the columns; None: the fewest rows that fit all tensors. split: so many
    dims must be among the rows (1: one seed or one sum per sample).
    """
    tensors = [*inputs, *outputs]
    present = [t for t in tensors if t is not None]
    shape = present[0].shape
    low = min(split, len(shape))
    if all(t.is_contiguous() for t in present):  # most calls; 4 of 8 us
        first = low if first is None else first
        rows, cols = math.prod(shape[:first]), math.prod(shape[first:])
        step = cols if rows > 1 else 0
        strides = [0 if t is None else step for t in tensors]
        return Rows(rows, cols, tensors, strides, [], cols % 8 == 0 and on_16_bytes(present))
    if first is None:
        fits = (
            d
            for d in range(low, max(len(shape), low + 1))
            if all(row_stride(t, d) is not None for t in present)
        )
        first = next(fits, low)
    strides, copies = [], []
    for i, t in enumerate(tensors):
        stride = 0 if t is None else row_stride(t, first)
        if stride is None:
            dense = torch.contiguous_format
            if i < len(inputs):
                tensors[i] = t.contiguous()
            else:
                tensors[i] = torch.empty_like(t, memory_format=dense)
                copies.append((t, tensors[i]))
            stride = row_stride(tensors[i], first)
        strides.append(stride)
    rows, cols = math.prod(shape[:first]), math.prod(shape[first:])
    if rows == 1:
        strides = [0] * len(strides)
    aligned = cols % 8 == 0 and all(s % 8 == 0 for s in strides)
    aligned = aligned and on_16_bytes(t for t in tensors if t is not None)
    return Rows(rows, cols, tensors, strides, copies, aligned)


def on_16_bytes(tensors: Iterable[torch.Tensor]) -> bool:
    return all(t.data_ptr() % 16 == 0 for t in tensors)
