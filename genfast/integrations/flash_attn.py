"""flash-attn 2.8's functions by genfast's kernels: the same names, argument order, layouts and
returns, on any device genfast serves; flash-attn itself is not needed.

    from genfast.integrations.flash_attn import flash_attn_func

Layouts: (B, S, H, D), packed (total, H, D), cu_seqlens int32. causal and window_size have their
diagonal at the bottom right. Differences: float32 and any head dimension up to 512 work too,
softcap and dropout combine, dropout's noise comes from genfast's contract, seeded by torch's
generator, and `deterministic` changes nothing: the backward gives the same bits every time, but in
16 bits on sm_90, where `torch.use_deterministic_algorithms(True)` asks for that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genfast.ops import _check
from genfast.ops._noise import draw_seed
from genfast.ops.attention.core import Options, _keep, windows
from genfast.ops.attention.core import attention as _attention
from genfast.ops.attention.kvcache import attention_with_kvcache as _with_kvcache
from genfast.ops.attention.kvcache import check_table
from genfast.ops.attention.varlen import attention_varlen as _varlen
from genfast.ops.attention.varlen import check_cu
from genfast.reference.attention import attention as _reference
from genfast.reference.attention import visible

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def _bhsd(x: Tensor | None) -> Tensor | None:
    return x.transpose(1, 2) if isinstance(x, Tensor) and x.dim() == 4 else x


def _unpacked(name: str, x: Tensor, layout: str) -> tuple[Tensor, ...]:
    """k, v or q, k, v of one tensor; their gradient is one stack, not a sum of padded slices."""
    _check.tensor(name, x)
    if x.dim() != layout.count(",") + 1 or x.shape[-3] != len(name):
        raise ValueError(f"{name}: expected {layout}, got shape {tuple(x.shape)}")
    return x.unbind(-3)


def _s_dmask(q, k, options: dict, dropout_p, seed) -> Tensor | None:
    """Attention weights (B, Hq, Sq, Sk) in q's dtype, negative where dropped: for tests, O(S^2).

    flash-attn returns it only beside dropout; its columns are rounded up to a multiple of 128
    there, here they are the Sk keys.
    """
    if dropout_p == 0:
        return None
    with torch.no_grad():
        left, right = windows(options["causal"], options["window"])
        (B, Sq, Hq, _), Sk = q.shape, k.shape[1]
        eye = torch.eye(Sk, dtype=torch.float32, device=q.device).expand(B, k.shape[2], Sk, Sk)
        weights, _ = _reference(
            _bhsd(q).float(),
            _bhsd(k).float(),
            eye,
            window=(left, right),
            offset=Sk - Sq,
            scale=options["scale"],
            softcap=options["softcap"],
            alibi_slopes=options["alibi_slopes"],
        )
        drawn = Options(seed=0, seeds=seed, dropout_p=dropout_p)
        keep = _keep((B, Hq, Sq, Sk), drawn, q.device)
        weights = weights.where(visible(Sq, Sk, (left, right), Sk - Sq, q.device), 0.0)
        return torch.where(keep, weights, -weights).to(q.dtype)


def _seed(q: Tensor, dropout_p: float) -> Tensor | None:
    return draw_seed(q.device) if dropout_p and isinstance(q, Tensor) else None


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | Any:
    """q: (B, Sq, Hq, D), k: (B, Sk, Hkv, D), v: (B, Sk, Hkv, Dv) -> (B, Sq, Hq, Dv).

    return_attn_probs: (out, lse (B, Hq, Sq) float32, S_dmask or None).
    """
    options = {
        "causal": causal,
        "window": window_size,
        "scale": softmax_scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }
    seed = _seed(q, dropout_p)
    out, lse = _attention(
        _bhsd(q),
        _bhsd(k),
        _bhsd(v),
        align="bottom_right",
        dropout_p=dropout_p,
        seed=seed,
        return_lse=True,
        **options,
    )
    out = _bhsd(out)
    if not return_attn_probs:
        return out
    return out, lse, _s_dmask(q, k, options, dropout_p, seed)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | Any:
    """q: (B, Sq, Hq, D), kv: (B, Sk, 2, Hkv, D); otherwise `flash_attn_func`."""
    return flash_attn_func(
        q,
        *_unpacked("kv", kv, "(B, S, 2, H, D)"),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | Any:
    """qkv: (B, S, 3, H, D); otherwise `flash_attn_func`."""
    return flash_attn_func(
        *_unpacked("qkv", qkv, "(B, S, 3, H, D)"),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def _pages_to_rows(pages: Tensor, block_table: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(pages, page_size, H, D) through the table -> packed (total, H, D)."""
    _check.tensor("k, v", pages)
    if pages.dim() != 4:
        raise ValueError(
            f"k, v: expected pages (pages, page_size, Hkv, D), got shape {tuple(pages.shape)}"
        )
    check_cu("cu_seqlens_k", cu_seqlens)
    check_table(block_table, cu_seqlens.shape[0] - 1)
    size, blocks = pages.shape[1], block_table.shape[1]
    rows = [pages.new_zeros(max(int(cu_seqlens[0]), 0), *pages.shape[2:])]  # of no sequence
    for table, n in zip(block_table, cu_seqlens.diff().tolist(), strict=True):
        used = -(-n // max(size, 1))
        if used > blocks:
            raise ValueError(
                f"block_table: expected at least the {used} blocks of {n} rows, got {blocks}"
            )
        table = table[: max(used, 0)].long()
        if bool(((table < 0) | (table >= pages.shape[0])).any()):
            raise ValueError(
                f"block_table: expected pages below {pages.shape[0]} for the rows in use, "
                f"got {table.tolist()}"
            )
        rows.append(pages[table].flatten(0, 1)[: max(n, 0)])
    return torch.cat(rows)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | Any:
    """q: (Tq, Hq, D), k: (Tk, Hkv, D), v: (Tk, Hkv, Dv) -> (Tq, Hq, Dv); lse is (Hq, Tq).

    block_table (B, blocks): k and v are pages (pages, page_size, Hkv, D). S_dmask is None: ask
    `flash_attn_func` for one.
    """
    if block_table is not None:
        k, v = (_pages_to_rows(x, block_table, cu_seqlens_k) for x in (k, v))
    out, lse = _varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=causal,
        window=window_size,
        scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        seed=_seed(q, dropout_p),
        return_lse=True,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | Any:
    """q: (Tq, Hq, D), kv: (Tk, 2, Hkv, D); otherwise `flash_attn_varlen_func`."""
    return flash_attn_varlen_func(
        q,
        *_unpacked("kv", kv, "(T, 2, H, D)"),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | Any:
    """qkv: (T, 3, H, D); otherwise `flash_attn_varlen_func`."""
    return flash_attn_varlen_func(
        *_unpacked("qkv", qkv, "(T, 3, H, D)"),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | Any:
    """q: (B, Sq, Hq, D); caches (entries, capacity, Hkv, D) or pages (pages, page_size, Hkv, D);
    k, v: (B, S_new, Hkv, D), written into the caches in place -> (B, Sq, Hq, Dv), and lse
    (B, Hq, Sq) on request. num_splits is chosen by the kernel. No backward, as in flash-attn.
    """
    found = _with_kvcache(
        _bhsd(q),
        _bhsd(k_cache),
        _bhsd(v_cache),
        _bhsd(k),
        _bhsd(v),
        cache_seqlens=cache_seqlens,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        causal=causal,
        window=window_size,
        scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=return_softmax_lse,
    )
    if return_softmax_lse:
        return _bhsd(found[0]), found[1]
    return _bhsd(found)
