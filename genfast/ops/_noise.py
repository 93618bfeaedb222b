"""The four noise arguments that every sampling function shares: seed, stream, offset, generator.

`seed`: None (drawn from torch's generator), an int, or an int64 tensor: one element, or one per
sample of dim 0. `stream` separates uses of one seed (layer, solver step, dropout). `offset` is the
index of the first element, so a shard reproduces its slice of the whole.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch

from genfast.ops import _check
from genfast.ops._road import is_compiling, transforming

Seed = int | torch.Tensor  # `None` beside it: drawn

_INT64 = torch.int64
_ONLY_ONE = "generator: has no effect beside an explicit seed; pass only one of the two"


def draw_seed(device: torch.device | str | None, generator: torch.Generator | None = None):
    """A fresh seed from torch's generator, as an int64 tensor of one element: no device sync."""
    if is_compiling() or transforming():  # functional: vmap refuses the in-place draw
        return torch.randint(0, 2**63 - 1, (1,), generator=generator, dtype=_INT64, device=device)
    # Of randint's range, so that a compiled call has the same seed.
    seed = torch.empty(1, dtype=_INT64, device=device)
    return seed.random_(0, 2**63 - 1, generator=generator)


def drawn_once(seed: Any, device: Any, generator: torch.Generator | None):
    """(seed, generator) of a road that another one may take over: what the first has drawn."""
    return (draw_seed(device, generator), None) if seed is None else (seed, generator)


def resolve(seed: Any, generator: torch.Generator | None, device: Any):
    """(int, None) or (0, seeds): what the kernels take."""
    if seed is None:
        return 0, draw_seed(device, generator)
    if generator is not None:
        raise ValueError(_ONLY_ONE)
    if type(seed) is int:
        return seed, None
    if isinstance(seed, torch.Tensor):
        return 0, seed.reshape(1) if seed.dim() == 0 else seed
    if isinstance(seed, Integral) and not isinstance(seed, bool):  # numpy's integers
        return int(seed), None
    return seed, None  # SymInt while tracing; anything else is refused by `check`


def signed(seed: int) -> int:
    """The same 64 bits as the int64 that an op schema carries."""
    if type(seed) is not int or -(2**63) <= seed < 2**63:
        return seed
    return seed - 2**64


def check(seed: Any, stream: Any, offset: Any, generator: Any, shape: Any, device: Any) -> None:
    if isinstance(seed, torch.Tensor):
        if seed.dtype != _INT64:
            raise TypeError(
                f"seed: expected an int or an int64 tensor, got {_check.describe(seed)}; "
                "convert it with .to(torch.int64)"
            )
        batch = shape[0] if len(shape) else 1
        if seed.dim() > 1 or seed.numel() not in (1, batch):
            raise ValueError(
                f"seed: expected one seed, or one per sample of dim 0 ({batch}), "
                f"got shape {tuple(seed.shape)}"
            )
        if not seed.is_contiguous():
            raise ValueError("seed: expected a contiguous tensor; pass seed.contiguous()")
        if device is not None and seed.device != torch.device(device):
            raise ValueError(
                f"seed: expected it on {device}, got {seed.device}; move it with .to()"
            )
        if generator is not None:
            raise ValueError(_ONLY_ONE)
    elif seed is not None:
        _check.integer("seed", seed, low=-(2**63), high=2**64 - 1)
        if generator is not None:
            raise ValueError(_ONLY_ONE)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {_check.describe(generator)}")
    _check.integer("stream", stream, low=-(2**63), high=2**64 - 1)
    _check.integer("offset", offset, low=0, high=2**62)
