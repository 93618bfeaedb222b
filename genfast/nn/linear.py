"""torch.nn's Linear on `genfast.linear`: the same constructor, parameters and state dict."""

from __future__ import annotations

from torch import Tensor, nn

from genfast.ops.linear import linear


class Linear(nn.Linear):
    """x (..., in_features) -> (..., out_features)."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
