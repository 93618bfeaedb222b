"""The ops of NVlabs' stylegan2-ada-pytorch and stylegan3 (torch_utils.ops), on genfast: nothing is
compiled at run time, and CPU tensors have a kernel.

    import genfast.integrations.stylegan as ops
    torch_utils.ops.bias_act.bias_act = ops.bias_act            # or all of them at once:
    with ops.enabled(torch_utils.ops): ...                      # and back

Signatures, defaults and results are theirs; `impl="ref"` runs the reference in plain PyTorch,
"cuda" what genfast chooses for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from genfast.ops import _check, filtering
from genfast.ops._backend import backend

__all__ = [
    "bias_act", "downsample2d", "enabled", "filter2d", "setup_filter", "upfirdn2d", "upsample2d",
]  # fmt: skip

setup_filter = filtering.setup_filter


def _on(impl: str):
    """impl "cuda": genfast's choice; "ref": plain PyTorch."""
    if impl not in ("cuda", "ref"):
        _check.choice("impl", impl, ("cuda", "ref"))
    return backend("reference") if impl == "ref" else contextlib.nullcontext()


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    impl: str = "cuda",
) -> Tensor:
    """clamp(act(x + b) gain, +-clamp); arguments as in `genfast.bias_act`. clamp < 0: none."""
    if clamp is not None and not isinstance(clamp, torch.Tensor) and clamp < 0:
        clamp = None
    alpha, gain, clamp = (None if n is None else float(n) for n in (alpha, gain, clamp))
    with _on(impl):
        return filtering.bias_act(x, b, dim=dim, act=act, alpha=alpha, gain=gain, clamp=clamp)


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "cuda",
) -> Tensor:
    """Pad, up-sample, filter and down-sample; arguments as in `genfast.upfirdn2d`."""
    with _on(impl):
        return filtering.upfirdn2d(
            x, f, up=up, down=down, padding=padding, flip_filter=flip_filter, gain=gain
        )


def filter2d(
    x: Tensor,
    f: Tensor | None,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "cuda",
) -> Tensor:
    """`genfast.filter2d`."""
    with _on(impl):
        return filtering.filter2d(x, f, padding, flip_filter, gain)


def upsample2d(
    x: Tensor,
    f: Tensor | None,
    up: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "cuda",
) -> Tensor:
    """`genfast.upsample2d`."""
    with _on(impl):
        return filtering.upsample2d(x, f, up, padding, flip_filter, gain)


def downsample2d(
    x: Tensor,
    f: Tensor | None,
    down: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "cuda",
) -> Tensor:
    """`genfast.downsample2d`."""
    with _on(impl):
        return filtering.downsample2d(x, f, down, padding, flip_filter, gain)


_MODULES = {
    "bias_act": ("bias_act",),
    "upfirdn2d": ("setup_filter", "upfirdn2d", "filter2d", "upsample2d", "downsample2d"),
}


@contextlib.contextmanager
def enabled(ops) -> Iterator[None]:
    """Puts these functions into the modules bias_act and upfirdn2d of `ops` (their package
    torch_utils.ops), and what was there back at the end. AttributeError where they are missing.
    """
    places = [(getattr(ops, m), name) for m, names in _MODULES.items() for name in names]
    before = [(module, name, getattr(module, name)) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, globals()[name])
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)
