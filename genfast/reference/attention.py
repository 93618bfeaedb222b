"""Attention in plain PyTorch: the truth the kernels are judged by.

Notation: q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv); query head h reads key/value
head h // (Hq // Hkv).

    S = scale q kᵀ;   S = softcap tanh(S / softcap);   S = S - slope |i + offset - j| + mask
    key j is visible to query i when  -left <= j - (i + offset) <= right
    (a negative side is unbounded)
    LSE = log(Σ_j exp(S) + exp(sink));   P = exp(S - LSE);   out = dropout(P) v

A row that sees no key gives out = 0, LSE = -inf (or the sink) and zero gradients. Differentiable
any number of times, in reverse and forward mode. 16-bit inputs are computed in float32; float64
stays float64.
"""

from __future__ import annotations

import math

import torch


def visible(
    Sq: int, Sk: int, window: tuple[int, int] = (-1, -1), offset: int = 0, device=None
) -> torch.Tensor:
    """(Sq, Sk) bool: which keys a query sees. Causal: window (-1, 0); bottom-right: Sk - Sq."""
    d = torch.arange(Sk, device=device) - torch.arange(Sq, device=device)[:, None] - offset
    left, right = window
    seen = torch.ones(Sq, Sk, dtype=torch.bool, device=device)
    if left >= 0:
        seen &= d >= -left
    if right >= 0:
        seen &= d <= right
    return seen


def dropout_threshold(p: float) -> int:
    """A 32-bit noise word at or above this is kept: round(p 2³²), capped at 2³² - 1."""
    return min(int(math.floor(p * 2.0**32 + 0.5)), 2**32 - 1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    offset: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, Hq, Sq, Dv) in q's dtype and LSE (B, Hq, Sq) in the dtype of the computation.

    mask: bool (true = visible) or additive, broadcastable to (B, Hq, Sq, Sk). alibi_slopes (Hq) or
    (B, Hq). sinks (Hq). keep (B, Hq, Sq, Sk) bool: the dropout mask of probability ``dropout_p``,
    drawn by the caller.
    """
    B, Hq, Sq, D = q.shape
    Hkv, Sk, Dv = k.shape[1], k.shape[2], v.shape[3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = 1.0 / math.sqrt(D) if scale is None else scale

    qg = q.to(dtype).reshape(B, Hkv, Hq // Hkv, Sq, D)
    s = (qg * scale @ k.to(dtype)[:, :, None].mT).reshape(B, Hq, Sq, Sk)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        i, j = torch.arange(Sq, device=q.device)[:, None], torch.arange(Sk, device=q.device)
        s = s - alibi_slopes.to(dtype).reshape(-1, Hq, 1, 1) * (i + offset - j).abs()
    seen = visible(Sq, Sk, window, offset, q.device)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        s = s + mask.to(dtype)
    s = s.masked_fill(~seen, -math.inf)

    if sinks is None:
        sink = s.new_full((1, Hq, 1, 1), -math.inf)
    else:
        sink = sinks.to(dtype).reshape(1, Hq, 1, 1)
    m = sink.expand(B, Hq, Sq, 1) if Sk == 0 else torch.maximum(s.amax(-1, keepdim=True), sink)
    m = m.detach().masked_fill(m == -math.inf, 0.0)  # any m gives the same value and derivatives
    e = torch.exp(s - m)
    total = e.sum(-1, keepdim=True) + torch.exp(sink - m)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (m + total.log()).masked_fill(empty, -math.inf).squeeze(-1)
    p = e / total
    if keep is not None:
        p = p * keep * (1.0 / (1.0 - dropout_p) if dropout_p < 1 else 0.0)
    out = p.reshape(B, Hkv, Hq // Hkv, Sq, Sk) @ v.to(dtype)[:, :, None]
    return out.reshape(B, Hq, Sq, Dv).to(q.dtype), lse


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    bottom_right: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed sequences: q (Tq, Hq, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv), cu_seqlens (B + 1)
    -> out (Tq, Hq, Dv), LSE (Hq, Tq).

    keep (B, Hq, max Sq, max Sk). Other options as in :func:`attention`, each sequence on its own.
    """
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [q.new_zeros(0, q.shape[1], v.shape[2])], []
    for b, (q0, q1, k0, k1) in enumerate(zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)):
        slopes = (
            alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        )
        out, lse = attention(
            *(x[a:e].transpose(0, 1)[None] for x, a, e in ((q, q0, q1), (k, k0, k1), (v, k0, k1))),
            offset=(k1 - k0) - (q1 - q0) if bottom_right else 0,
            alibi_slopes=slopes,
            keep=None if keep is None else keep[b : b + 1, :, : q1 - q0, : k1 - k0],
            **options,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    if not lses:
        given = [q, k, v, alibi_slopes, options.get("sinks")]
        graph = 0 * sum(x.sum() for x in given if x is not None)  # zeros that have a gradient
        return outs[0] + graph, q.new_zeros(q.shape[1], 0) + graph
    return torch.cat(outs), torch.cat(lses, dim=1)


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """Rotate the first 2R of D dims of x (..., S, D) by cos, sin (S, R).

    Pairs are (2r, 2r + 1) if interleaved, else (r, r + R).
    """
    R = cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x[..., : 2 * R].to(dtype)
    c, s = cos.to(dtype), sin.to(dtype)
    a, b = (y[..., ::2], y[..., 1::2]) if interleaved else (y[..., :R], y[..., R:])
    pair = (a * c - b * s, a * s + b * c)
    y = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([y.to(x.dtype), x[..., 2 * R :]], -1)


def attention_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = True,
    cache_seqlens: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    alibi_slopes: torch.Tensor | None = None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append k, v (B, Hkv, S_new, D) to the cache **in place**, then attend with the diagonal at
    the bottom right.

    k_cache (B_cache, Hkv, capacity, D), or pages (pages, Hkv, page_size, D) with block_table
    (B, blocks). New rows go to cache_seqlens[b] + 0, 1, …; keys are rows leftpad[b] …
    cache_seqlens[b] + S_new. cos, sin (positions, R) rotate new keys at position
    cache_seqlens[b] - leftpad[b] + i, and q likewise when a window is set, else all of q at i = 0.
    """
    B, Sq = q.shape[0], q.shape[2]
    page = k_cache.shape[2]
    lens = [page] * B if cache_seqlens is None else cache_seqlens.tolist()
    pads = [0] * B if leftpad is None else leftpad.tolist()
    entries = list(range(B)) if cache_batch_idx is None else cache_batch_idx.tolist()
    added = 0 if k is None else k.shape[2]
    outs, lses = [], []
    for b, (n, pad, entry) in enumerate(zip(lens, pads, entries, strict=True)):
        rows = torch.arange(n + added, device=q.device)
        pages = torch.full_like(rows, entry)
        if block_table is not None:
            pages = block_table[b].long()[rows // page]
        at = (pages, slice(None), rows if block_table is None else rows % page)  # -> (rows, Hkv, D)
        qb = q[b]
        if cos is not None:
            turn = torch.arange(Sq, device=q.device) * (max(window) >= 0) + n - pad
            qb = rotary(qb, cos[turn], sin[turn], interleaved)
        if k is not None:
            kb, turn = k[b], torch.arange(added, device=q.device) + n - pad
            kb = kb if cos is None else rotary(kb, cos[turn], sin[turn], interleaved)
            new = (pages[n:], slice(None), at[2][n:])
            k_cache[new] = kb.transpose(0, 1).to(k_cache.dtype)
            v_cache[new] = v[b].transpose(0, 1).to(v_cache.dtype)
        slopes = (
            alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        )
        out, lse = attention(
            qb[None],
            k_cache[at][pad:].transpose(0, 1)[None],
            v_cache[at][pad:].transpose(0, 1)[None],
            window=window,
            offset=n + added - pad - Sq,
            alibi_slopes=slopes,
            **options,
        )
        outs.append(out)
        lses.append(lse)
    if not outs:
        return q.new_zeros(0, *q.shape[1:3], v_cache.shape[3]), q.new_zeros(0, *q.shape[1:3])
    return torch.cat(outs), torch.cat(lses)
