"""What families share whose kernels take dense tensors and widen to fp32."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from genfast.ops._backend import has_kernels
from genfast.ops._road import KERNEL_DTYPES


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any is, else fp32: what composites compute in, like the kernel."""
    given = (t.dtype for t in tensors if t is not None)
    return torch.float64 if torch.float64 in given else torch.float32


def composite_dtype(x: Tensor, *others: Tensor | None) -> torch.dtype:
    """wide_dtype; off the CPU x's own where all have it: PyTorch's kernels there are fp32 inside,
    and casts around them would be two passes more."""
    uniform = all(t is None or t.dtype == x.dtype for t in others)
    return x.dtype if uniform and x.device.type != "cpu" else wide_dtype(x, *others)


AUTOCAST = ("cpu", "cuda")


def full_precision(composite):
    """A composite whose products autocast leaves alone, as it does the kernel's."""

    @functools.wraps(composite)
    def run(x, *args, **kwargs):
        if not torch._C._is_any_autocast_enabled() or x.device.type not in AUTOCAST:
            return composite(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return composite(x, *args, **kwargs)

    return run


def on_kernel(name: str, x: Tensor, *others: Tensor | None, feature: str | None = None) -> bool:
    """The backend in force has a kernel `name` for these dtypes on x's device, which the others
    share (the kernel refuses what does not). feature: as in has_kernels."""
    if x.dtype not in KERNEL_DTYPES:
        return False
    for t in others:  # in a generator it takes 1 us more
        if t is not None and t.dtype not in KERNEL_DTYPES:
            return False
    return has_kernels(x.device, name, feature)


def cast(g: Tensor, x: Tensor) -> Tensor:
    """g in the dtype of x: `to` takes 0.9 us to do nothing."""
    return g if g.dtype == x.dtype else g.to(x.dtype)


def like(g: Tensor, x: Tensor) -> Tensor:
    """g in the memory order of x: a gradient can come expanded or transposed."""
    return g if g.stride() == x.stride() else torch.empty_like(x).copy_(g)
