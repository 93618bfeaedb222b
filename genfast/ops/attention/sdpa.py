"""torch.nn.functional.scaled_dot_product_attention's face of the attention op."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.ops import _check
from genfast.ops.attention.core import (
    DENSE,
    Options,
    attend,
    autocasting,
    broadcasts,
    check_mask,
    lower_precision,
    noise,
    plain_call,
)

_FLOAT = torch.float32


def _checked(query, key, value, attn_mask, enable_gqa) -> None:
    operands = {"query": query, "key": key, "value": value}
    for name, x in operands.items():
        _check.tensor(name, x)
        if x.dim() < 2:
            raise ValueError(f"{name}: expected at least 2 dimensions, got shape {tuple(x.shape)}")
        if x.dtype != query.dtype:
            raise TypeError(
                f"{name}: expected the dtype of query, {query.dtype}, got {x.dtype}; "
                "convert it with .to()"
            )
    _check.same_device(**operands, attn_mask=attn_mask)
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key: expected query's last dimension {query.shape[-1]}, got shape {tuple(key.shape)}"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"value: expected key's length {key.shape[-2]} before the last dimension, "
            f"got shape {tuple(value.shape)}"
        )
    if attn_mask is None:
        return
    _check.tensor("attn_mask", attn_mask, (torch.bool, *_check.FLOATS))
    if attn_mask.dtype not in (torch.bool, _FLOAT, query.dtype):
        raise TypeError(
            f"attn_mask: expected dtype bool, float32 or query's {query.dtype}, "
            f"got {attn_mask.dtype}; convert it with .to()"
        )
    if attn_mask.dim() < 2:
        raise ValueError(
            f"attn_mask: expected at least 2 dimensions, got shape {tuple(attn_mask.shape)}"
        )


def _heads(query, key, value, enable_gqa):
    """Heads that the op takes: Hq a multiple of Hkv."""
    Hq, Hk, Hv = (x.shape[-3] for x in (query, key, value))
    if enable_gqa:
        if not Hk or not Hv or Hq % Hk or Hq % Hv:
            raise ValueError(
                f"enable_gqa: expected query's heads to be a multiple of key's and value's, "
                f"got {Hq}, {Hk} and {Hv}; repeat heads of key and value"
            )
        if Hk != Hv:
            key, value = (x.repeat_interleave(Hq // x.shape[-3], -3) for x in (key, value))
        return query, key, value
    H = max(Hq, Hk, Hv) if min(Hq, Hk, Hv) > 0 else 0
    if any(n not in (1, H) for n in (Hq, Hk, Hv)):
        raise ValueError(
            f"query: expected as many heads as key and value, got {Hq}, {Hk} and {Hv}; "
            "set enable_gqa=True for grouped heads"
        )
    query = query if Hq == H else query.expand(*query.shape[:-3], H, *query.shape[-2:])
    if Hk != Hv:
        key, value = (x.expand(*x.shape[:-3], H, *x.shape[-2:]) for x in (key, value))
    return query, key, value


def _general(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """Any number of dimensions and broadcasting, brought to (B, H, S, D)."""
    _checked(query, key, value, attn_mask, enable_gqa)
    dims = max(x.dim() for x in (query, key, value))
    rank = max(dims, 4)
    query, key, value = (x.reshape((1,) * (rank - x.dim()) + x.shape) for x in (query, key, value))
    query, key, value = _heads(query, key, value, enable_gqa)
    try:
        batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    except RuntimeError:
        got = ", ".join(str(tuple(x.shape[:-3])) for x in (query, key, value))
        raise ValueError(
            f"query, key, value: expected batch dimensions that broadcast, got {got}; expand them"
        ) from None
    q, k, v = (x.expand(*batch, *x.shape[-3:]).flatten(0, -4) for x in (query, key, value))
    if attn_mask is not None:
        full = (*batch, q.shape[1], q.shape[2], k.shape[2])
        check_mask(attn_mask, full, "attn_mask")
        if attn_mask.dim() > 3 and len(batch) > 1:
            attn_mask = attn_mask.reshape((1,) * (rank - attn_mask.dim()) + attn_mask.shape)
            attn_mask = attn_mask.expand(*batch, *attn_mask.shape[-3:]).flatten(0, -4)
    out = _attend(q, k, v, attn_mask, dropout_p, is_causal, scale)
    if rank == 4:
        return out.reshape(out.shape[4 - dims :])
    return out.unflatten(0, batch)


def _attend(q, k, v, attn_mask, dropout_p, is_causal, scale):
    if isinstance(scale, Tensor):
        _check.number("scale", scale)
        scale = float(scale)
    options = Options(
        *noise(dropout_p, None, 0, None, q.device), scale, 0.0, -1, 0 if is_causal else -1, False,
        dropout_p,
    )  # fmt: skip
    return attend(q, k, v, attn_mask, None, None, DENSE, options, False)[0]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, by genfast's kernels.

    query: (N, ..., Hq, L, E), key: (N, ..., H, S, E), value: (N, ..., H, S, Ev), 2 dimensions and
    more, batch dimensions broadcast. attn_mask: bool (true = attend) or float32 / query's dtype,
    broadcastable to (N, ..., Hq, L, S); may stand beside is_causal (both apply, where PyTorch
    sometimes refuses). is_causal: top-left. Returns (N, ..., Hq, L, Ev) with query's order of
    dimensions in memory. A row that sees no key gives 0. Where PyTorch's kernel was measured to be
    faster it is what runs. Raises TypeError / ValueError naming the argument.
    """
    if dropout_p == 0:
        out = plain_call(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        if out is not None:
            return out
    plain = (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and isinstance(value, Tensor)
        and query.dim() == key.dim() == value.dim() == 4
        and not (query.is_nested or key.is_nested or value.is_nested)  # they have no shape
    )
    if plain:
        if autocasting(query):
            query, key, value, attn_mask = lower_precision(query, key, value, attn_mask)
        B, Hq, _, E = query.shape
        Bk, Hk, S, Ek = key.shape
        same = B == Bk == value.shape[0] and Hk == value.shape[1] and S == value.shape[2]
        grouped = Hq == Hk or Hk == 1 or (enable_gqa and Hk and Hq % Hk == 0)
        known = attn_mask is None or (
            isinstance(attn_mask, Tensor)
            and attn_mask.dim() >= 2
            and attn_mask.dtype in (torch.bool, query.dtype, _FLOAT)
            and broadcasts(attn_mask, (B, Hq, query.shape[2], S))
        )
        dense = query.layout is key.layout is value.layout is torch.strided
        known = known and dense and query.dtype in _check.FLOATS
        if same and grouped and known and E == Ek and query.dtype is key.dtype is value.dtype:
            return _attend(query, key, value, attn_mask, dropout_p, is_causal, scale)
    elif isinstance(query, Tensor) and autocasting(query):
        query, key, value, attn_mask = lower_precision(query, key, value, attn_mask)
    return _general(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
