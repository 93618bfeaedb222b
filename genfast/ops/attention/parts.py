"""The heads of one product taken apart into q, k and v, and their gradients put together in place.

PyTorch's own way writes the three gradients and then copies them into one: 190 of the 906 us of a
backward of 32 x 4 heads, 49 queries. Where q, k and v lie side by side in one tensor, the
attention's backward gives theirs the same order, and what took them apart returns the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genfast.ops._force import forced_reference
from genfast.ops._road import GRAD, Node, cpu_gate, is_compiling, wants_graph


def _views(x: Tensor, heads: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(part.transpose(1, 2) for part in x.split(heads, 2))


def _side_by_side(parts: Sequence[Tensor]) -> bool:
    """They fill (B, S, all heads, D), each (B, H, S, D), in their order."""
    first = parts[0]
    if first.dim() != 4 or first.is_contiguous():  # all but a single row's; the rest takes 4 us
        return False
    B, _, S, D = first.shape
    width = D * sum(part.shape[1] for part in parts)
    strides, at = (S * width, D, width, 1), first.data_ptr()
    for part in parts:
        fits = part.shape[0] == B and part.shape[2:] == (S, D) and part.dtype == first.dtype
        if not fits or part.stride() != strides or part.data_ptr() != at:
            return False
        at += part.shape[1] * D * part.element_size()
    return True


def empty_like_parts(*parts: Tensor) -> tuple[Tensor, ...]:
    """Memory like each of them, side by side where they are."""
    if not _side_by_side(parts):
        return tuple(torch.empty_like(part) for part in parts)
    B, _, S, D = parts[0].shape
    heads = [part.shape[1] for part in parts]
    return _views(parts[0].new_empty(B, S, sum(heads), D), heads)


class _Apart(Node):
    @staticmethod
    def forward(ctx, x, heads):
        ctx.heads, ctx.shape = heads, x.shape
        ctx.set_materialize_grads(False)
        return _views(x, heads)

    @staticmethod
    def backward(ctx, *grads):
        given = [g for g in grads if g is not None]
        if not given:
            return None, None
        B, S, _, D = ctx.shape
        if len(given) == len(grads) and not wants_graph():
            whole = given[0]._base
            if whole is not None and whole.shape == ctx.shape and whole.is_contiguous():
                if given[0].data_ptr() == whole.data_ptr() and _side_by_side(given):
                    return whole, None
        parts = [
            given[0].new_zeros(B, S, H, D) if g is None else g.transpose(1, 2)
            for g, H in zip(grads, ctx.heads, strict=True)
        ]
        return torch.cat(parts, 2), None


def apart(x: Tensor, heads: Sequence[int]) -> tuple[Tensor, ...]:
    """Views (B, H, S, D) for each H of heads of x (B, S, sum of heads, D)."""
    if not is_compiling() and not forced_reference() and cpu_gate(x) == GRAD:
        return _Apart.apply(x, tuple(heads))
    return _views(x, heads)
