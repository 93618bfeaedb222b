"""Reroutes torch.nn.functional.scaled_dot_product_attention to genfast, for CPU tensors.

    genfast.integrations.torch_sdpa.enable()        # ... disable() restores exactly
    with genfast.integrations.torch_sdpa.enabled(): ...

Calls counted, so that nested and concurrent uses from several threads stay enabled until the last
one leaves. Tensors on other devices, nested tensors and everything genfast does not take go to
PyTorch's own function. Code that imported the function by name before `enable()` keeps PyTorch's.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast.ops._road import KERNEL_DTYPES
from genfast.ops.attention.by_torch import torch_sdpa as _torch_sdpa
from genfast.ops.attention.sdpa import scaled_dot_product_attention as _genfast_sdpa

_lock = threading.Lock()
_uses = 0
_original = None


def _takes(query) -> bool:
    return (
        isinstance(query, torch.Tensor)
        and query.device.type == "cpu"
        and query.dtype in KERNEL_DTYPES
        and query.layout is torch.strided
        and not query.is_nested
    )


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
    """What stands in torch.nn.functional while enabled."""
    if torch.overrides.has_torch_function((query, key, value, attn_mask)) or not _takes(query):
        own = _original or _torch_sdpa
        return own(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return _genfast_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def enable() -> None:
    """Puts genfast's function into torch.nn.functional; `disable` as often as this was called."""
    global _uses, _original
    with _lock:
        if _uses == 0:
            _original = F.scaled_dot_product_attention
            F.scaled_dot_product_attention = scaled_dot_product_attention
        _uses += 1


def disable() -> None:
    """Takes one `enable` back; the last restores the very function that was there."""
    global _uses, _original
    with _lock:
        if _uses == 0:
            return
        _uses -= 1
        if _uses == 0:
            if F.scaled_dot_product_attention is scaled_dot_product_attention:
                F.scaled_dot_product_attention = _original
            _original = None


def is_enabled() -> bool:
    return _uses > 0


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """`with enabled(): ...`"""
    enable()
    try:
        yield
    finally:
        disable()
