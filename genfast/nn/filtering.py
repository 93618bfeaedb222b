"""Modules over the filtering family."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genfast.nn._tables import Tables
from genfast.ops.filtering import bias_act, downsample2d, setup_filter, upsample2d


class BiasAct(nn.Module):
    """clamp(act(x + strength n + b) gain), with b and, if noise, the strength as parameters.

    x: (B, C, ...) with C = channels. Both parameters start at 0. The noise of a call comes from
    `seed` (one a sample, see `genfast.bias_act`) under this module's stream, or is given.
    """

    def __init__(
        self, channels: int, act: str = "lrelu", *, gain: float | None = None,
        clamp: float | None = None, noise: bool = False, stream: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.act, self.gain, self.clamp, self.stream = act, gain, clamp, stream
        self.bias = nn.Parameter(torch.zeros(channels))
        self.strength = nn.Parameter(torch.zeros(())) if noise else None

    def forward(
        self, x: Tensor, seed: int | Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        drawn = {}
        if self.strength is not None:
            drawn = {"strength": self.strength, "noise": noise}
            if noise is None:
                drawn |= {"seed": seed, "stream": self.stream}
        return bias_act(x, self.bias, act=self.act, gain=self.gain, clamp=self.clamp, **drawn)

    def extra_repr(self) -> str:
        noise = self.strength is not None
        return f"{len(self.bias)}, act={self.act!r}, gain={self.gain}, noise={noise}"


class _Resample2d(Tables):
    f: Tensor
    table_dtype = torch.float32  # as `upfirdn2d` takes the taps

    def __init__(self, factor: int = 2, taps=(1, 3, 3, 1)):
        super().__init__()
        self.factor = factor
        self.set_tables(f=setup_filter(taps))

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class Upsample2d(_Resample2d):
    """(N, C, H, W) -> (N, C, factor H, factor W) through the filter of these taps."""

    def forward(self, x: Tensor) -> Tensor:
        return upsample2d(x, self.f, up=self.factor)


class Downsample2d(_Resample2d):
    """(N, C, H, W) -> (N, C, H / factor, W / factor) through the filter of these taps."""

    def forward(self, x: Tensor) -> Tensor:
        return downsample2d(x, self.f, down=self.factor)
