"""Where PyTorch's own attention is what runs, because it was measured to be faster.

A row says: these dtypes, gradient or not, and a condition on the sizes. The numbers come from
benchmarks/bench_attention.py. Options that PyTorch's fused CPU kernel lacks never come here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import (
    scaled_dot_product_attention as torch_sdpa,  # kept before any reroute
)

from genfast.ops._backend import forced_reference


class Row(NamedTuple):
    dtypes: tuple[torch.dtype, ...]
    grad: bool
    fits: Callable[[int, int, int, int, bool], bool]  # (B * Hq, Sq, Sk, D, causal)
    why: str


ROWS: list[Row] = []


def prefers_torch(q, k, mask, dropout_p, causal) -> bool:
    if not ROWS or mask is not None or dropout_p or q.device.type != "cpu" or forced_reference():
        return False
    grad = torch.is_grad_enabled() and q.requires_grad
    B, H, Sq, D = q.shape
    return any(
        q.dtype in row.dtypes and row.grad == grad and row.fits(B * H, Sq, k.shape[2], D, causal)
        for row in ROWS
    )


__all__ = ["ROWS", "Row", "prefers_torch", "torch_sdpa"]
