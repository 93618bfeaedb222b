"""torch.nn's GroupNorm, LayerNorm and RMSNorm on the fused op, with a condition and an activation.

Same constructors, parameters and state dicts; `act` is new, and so are `scale` and `shift` of
`forward`: (1 + scale) norm(x) + shift, one row a sample, see `genfast.group_norm`.
"""

from __future__ import annotations

from torch import Tensor, nn

from genfast.ops.normalization import group_norm, layer_norm, rms_norm


class GroupNorm(nn.GroupNorm):
    """x (B, C, ...), scale and shift (B, C) -> like x."""

    def __init__(self, *args, act: str = "linear", **options):
        super().__init__(*args, **options)
        self.act = act

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        return group_norm(
            x, self.num_groups, self.weight, self.bias, scale=scale, shift=shift, act=self.act,
            eps=self.eps,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"


def _rows(norm: nn.Module, *tensors: Tensor | None) -> list[Tensor | None]:
    """With normalized_shape as one dimension."""
    sizes = len(norm.normalized_shape)
    return [t if t is None or sizes == 1 else t.flatten(-sizes) for t in tensors]


class LayerNorm(nn.LayerNorm):
    """x (B, ..., *normalized_shape), scale and shift (B, C) with C of all normalized -> like x."""

    def __init__(self, *args, act: str = "linear", **options):
        super().__init__(*args, **options)
        self.act = act

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        rows, weight, bias = _rows(self, x, self.weight, self.bias)
        y = layer_norm(
            rows, weight, bias, scale=scale, shift=shift, act=self.act, eps=self.eps
        )  # fmt: skip
        return y if rows is x else y.view(x.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"


class RMSNorm(nn.RMSNorm):
    """x (B, ..., *normalized_shape), scale and shift (B, C) with C of all normalized -> like x."""

    def __init__(self, *args, act: str = "linear", **options):
        super().__init__(*args, **options)
        self.act = act

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        rows, weight = _rows(self, x, self.weight)
        y = rms_norm(rows, weight, scale=scale, shift=shift, act=self.act, eps=self.eps)
        return y if rows is x else y.view(x.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"
