"""torch.nn's Linear on `genfast.linear`: the same parameters and state dict."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genfast.ops import _check
from genfast.ops.linear import linear


class Linear(nn.Linear):
    """x (..., in_features) -> act(x weight^T + bias) (..., out_features), act: "linear" or "relu";
    torch.nn's arguments else.
    """

    act = "linear"  # of layers that `accelerate` turned over, too

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
        act: str = "linear",
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        _check.choice("act", act, ("linear", "relu"))
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        # A hook (offloading) that was put on an accelerated layer holds this beyond `restore`.
        if not isinstance(self, Linear):
            return nn.Linear.forward(self, input)
        return linear(input, self.weight, self.bias, act=self.act)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", act={self.act}" if self.act != "linear" else "")
