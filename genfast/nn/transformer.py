"""torch.nn.TransformerEncoderLayer and TransformerDecoderLayer on genfast's MultiheadAttention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from genfast.nn._signed import signed
from genfast.nn.attention import MultiheadAttention


def _adopt(attention: nn.MultiheadAttention) -> None:
    """The same module, parameters and hooks, with genfast's forward."""
    attention.__class__ = MultiheadAttention


@signed
class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Drop-in for torch.nn.TransformerEncoderLayer: its constructor, state dict and forward.

    Padding that hides every key of a row gives finite values instead of NaN.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self.self_attn)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src: (S, N, E), (N, S, E) if batch_first, or (S, E); masks as in PyTorch."""
        if src.is_nested:  # made by torch.nn.TransformerEncoder out of padding masks
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

        def attend(x):
            return self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal)

        if self.norm_first:
            x = src + attend(self.norm1(src))
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + attend(src))
        return self.norm2(x + self._ff_block(x))


@signed
class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """Drop-in for torch.nn.TransformerDecoderLayer: both attentions run on genfast."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self.self_attn)
        _adopt(self.multihead_attn)
