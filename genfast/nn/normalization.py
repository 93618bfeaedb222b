"""torch.nn's GroupNorm, LayerNorm and RMSNorm on the fused op, with a condition and an activation.

Same constructors, parameters and state dicts; `act` is new, and so are `scale` and `shift` of
`forward`: (1 + scale) norm(x) + shift, one row a sample, see `genfast.group_norm`; and `add` and
`gate`: (sum, y) of the norm of sum = x + gate add, see `genfast.layer_norm`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from genfast.nn._signed import signed
from genfast.ops.normalization import group_norm, layer_norm, rms_norm


@signed
class GroupNorm(nn.GroupNorm):
    """input (B, C, ...), scale and shift (B, C) -> like input."""

    def __init__(self, *args: Any, act: str = "linear", **options: Any) -> None:
        super().__init__(*args, **options)
        self.act = act

    def forward(
        self, input: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        return group_norm(
            input, self.num_groups, self.weight, self.bias, scale=scale, shift=shift, act=self.act,
            eps=self.eps,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"


def _rows(norm: nn.Module, x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """With normalized_shape, which x is checked against, as one dimension."""
    shape = norm.normalized_shape
    if x.shape[-len(shape) :] != shape:
        raise ValueError(
            f"input: expected shape (..., {', '.join(map(str, shape))}) for normalized_shape = "
            f"{list(shape)}, got {tuple(x.shape)}; reshape it"
        )
    if len(shape) == 1:
        return [x, *others]
    return [t if t is None else t.flatten(-len(shape)) for t in (x, *others)]


def _like(x: Tensor, found: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """The result in x's shape."""
    if isinstance(found, tuple):
        return tuple(t.view(x.shape) for t in found)
    return found.view(x.shape)


@signed
class LayerNorm(nn.LayerNorm):
    """input (B, ..., *normalized_shape), scale, shift and gate (B, C) with C of all normalized ->
    like input; with add, like input, (sum, y)."""

    def __init__(self, *args: Any, act: str = "linear", **options: Any) -> None:
        super().__init__(*args, **options)
        self.act = act

    def forward(
        self,
        input: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        add: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        rows, weight, bias, add = _rows(self, input, self.weight, self.bias, add)
        found = layer_norm(
            rows, weight, bias, scale=scale, shift=shift, act=self.act, eps=self.eps, add=add,
            gate=gate,
        )  # fmt: skip
        return found if rows is input else _like(input, found)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"


@signed
class RMSNorm(nn.RMSNorm):
    """x (B, ..., *normalized_shape), scale, shift and gate (B, C) with C of all normalized -> like
    x; with add, like x, (sum, y)."""

    def __init__(self, *args: Any, act: str = "linear", **options: Any) -> None:
        super().__init__(*args, **options)
        self.act = act

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        add: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        rows, weight, add = _rows(self, x, self.weight, add)
        found = rms_norm(
            rows, weight, scale=scale, shift=shift, act=self.act, eps=self.eps, add=add, gate=gate
        )
        return found if rows is x else _like(x, found)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"
