"""The key/value cache of a decoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LayerCache(NamedTuple):
    """One layer's: k, v (B, Hkv, capacity, D); lengths (B,) int32; rotary tables or None."""

    k: Tensor
    v: Tensor
    lengths: Tensor
    cos: Tensor | None
    sin: Tensor | None

    def append(self, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, Hkv, S, D) so that `length` tokens are valid in every row; returns these.
        For scores with a bias, which the cache kernel does not take; `lengths` is left alone.
        """
        at = length - k.shape[2]
        self.k[:, :, at:length] = k
        self.v[:, :, at:length] = v
        return self.k[:, :, :length], self.v[:, :, :length]


class KVCache:
    """k, v (L, B, Hkv, capacity, D) and lengths (B,) int32: the rows that are valid.

    Every row of the batch has its own length, so prompts need no padding. Appending is in place.
    """

    def __init__(self, k: Tensor, v: Tensor, lengths: Tensor, rotary=(None, None)):
        self.k, self.v, self.lengths, self.rotary = k, v, lengths, rotary
        self.layers = [LayerCache(*kv, lengths, *rotary) for kv in zip(k, v, strict=True)]

    @classmethod
    def empty(cls, layers, batch, kv_heads, capacity, head_dim, like: Tensor, rotary=(None, None)):
        """like: a tensor of the dtype and device."""
        k, v = (like.new_zeros(layers, batch, kv_heads, capacity, head_dim) for _ in range(2))
        return cls(k, v, torch.zeros(batch, dtype=torch.int32, device=like.device), rotary)

    def row(self, b: int) -> KVCache:
        """A view of batch row b, for prompts of their own lengths."""
        at = slice(b, b + 1)
        return KVCache(self.k[:, at], self.v[:, at], self.lengths[at], self.rotary)

    def reorder(self, rows: Tensor, length: int) -> None:
        """Batch row b becomes what rows[b] was, its first `length` tokens."""
        for x in (self.k, self.v):
            x[:, :, :, :length] = x[:, rows, :, :length]
