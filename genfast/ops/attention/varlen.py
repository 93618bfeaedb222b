"""Attention over sequences packed one behind the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genfast.ops import _check
from genfast.ops._backend import under
from genfast.ops._noise import Seed
from genfast.ops._road import readable
from genfast.ops.attention.core import (
    ALIGN,
    Options,
    Packed,
    as_scale,
    attend,
    autocasting,
    check_align,
    lower_precision,
    noise,
    windows,
)


def check_cu(name: str, cu, other: Tensor | None = None) -> None:
    _check.tensor(name, cu, (torch.int32,))
    if cu.dim() != 1 or cu.shape[0] < 1 or not cu.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous vector of B + 1 first rows, got shape {tuple(cu.shape)}"
        )
    if other is not None and cu.shape != other.shape:
        raise ValueError(
            f"{name}: expected B + 1 = {other.shape[0]} entries as in cu_seqlens_q, "
            f"got {cu.shape[0]}"
        )


def _longest(name: str, cu: Tensor, total: int, given: int | None) -> int:
    """Checks the values (read on the CPU only: no device synchronisation elsewhere)."""
    if not readable(cu):
        return total if given is None else given
    lengths = cu.long().diff()  # int32 could wrap
    if int(cu[0]) < 0 or int(cu[-1]) > total or bool((lengths < 0).any()):
        raise ValueError(
            f"{name}: expected entries that rise from >= 0 to <= {total} packed rows, "
            f"got {cu.tolist()}; begin with 0 and add the lengths up"
        )
    longest = int(lengths.max()) if lengths.numel() else 0
    if given is None:
        return longest
    name = name.replace("cu_seqlens", "max_seqlen")
    given = given.item() if isinstance(given, Tensor) and given.numel() == 1 else given
    _check.integer(name, given, high=2**31 - 1)
    if given < longest:
        raise ValueError(f"{name}: expected at least the longest sequence, {longest}, got {given}")
    return given


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    align: str = "bottom_right",
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
    stream: int = 0,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | Any:
    """`attention` for packed sequences of different lengths.

    q: (Tq, Hq, D), k: (Tk, Hkv, D), v: (Tk, Hkv, Dv). cu_seqlens_q, cu_seqlens_k: (B + 1) int32,
    first row of each sequence; sequence b attends to sequence b only. max_seqlen_*: longest
    sequence (found when None; it also sizes the dropout noise). Other arguments as in `attention`,
    with the diagonal of causal and window at the bottom right of each sequence. Returns
    (Tq, Hq, Dv), and lse (Hq, Tq) on request; rows of no sequence are 0. Raises TypeError /
    ValueError naming the argument.
    """
    if backend is not None:
        return under(attention_varlen, locals())
    check_align(align)
    for name, x in {"q": q, "k": k}.items():
        _check.tensor(name, x)
        if x.dim() != 3:
            raise ValueError(
                f"{name}: expected packed rows (T, H, D), got {tuple(x.shape)}; reshape it"
            )
    check_cu("cu_seqlens_q", cu_seqlens_q)
    check_cu("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q)
    _check.same_device(q=q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    max_q = _longest("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    max_k = _longest("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    if dropout_p:  # the noise is counted by them: not by what some roads cannot read
        max_q = q.shape[0] if max_seqlen_q is None else max_q
        max_k = k.shape[0] if max_seqlen_k is None else max_k
    if autocasting(q):
        q, k, v = lower_precision(q, k, v)
    left, right = windows(causal, window)
    options = Options(
        *noise(dropout_p, seed, stream, generator, q.device), as_scale(scale), softcap, left, right,
        ALIGN[align], dropout_p,
    )  # fmt: skip
    packed = Packed(cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    out, lse = attend(q, k, v, None, alibi_slopes, sinks, packed, options, return_lse)
    return (out, lse) if return_lse else out
