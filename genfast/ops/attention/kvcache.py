"""Attention over a key/value cache: append, rotate, attend. No backward: this is for generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genfast.ops import _check
from genfast.ops._backend import has_kernels, kernels, under
from genfast.ops._force import forced_reference, may_compose
from genfast.ops._road import DIRECT, GRAD, KERNEL_DTYPES, define, gate, is_compiling, readable
from genfast.ops.attention.core import (
    MAX_HEAD_DIM,
    Options,
    as_scale,
    check_operands,
    check_options,
    empty_out,
    windows,
)
from genfast.reference import attention as reference

_INT32 = torch.int32


def _native(
    q, k_cache, v_cache, k, v, lengths, cos, sin, interleaved, batch_idx, leftpad, block_table,
    scale, softcap, alibi, sinks, left, right, want_lse,
):  # fmt: skip
    """(out, lse or None), or None when the kernels do not take these tensors. Cache in place."""
    if isinstance(cos, Tensor) and cos.dim() == 2 and cos.shape[1] == 0:
        cos = sin = None  # nothing to rotate
    rotated = q
    added = 0 if k is None else k.shape[2]
    if k is not None or cos is not None:
        if cos is not None:
            rotated = torch.empty_like(q, memory_format=torch.contiguous_format)
        if not kernels.attention_append(
            q, None if cos is None else rotated, k, v, k_cache, v_cache, lengths, leftpad,
            batch_idx, block_table, cos, sin, interleaved, left < 0 and right < 0,
        ):  # fmt: skip
            return None
    out = empty_out(q, v_cache.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if want_lse else None
    if kernels.attention_cached(
        rotated, k_cache, v_cache, out, lse, lengths, added, leftpad, batch_idx, block_table, alibi,
        sinks, scale, softcap, left, right,
    ):  # fmt: skip
        return out, lse
    if k is not None or cos is not None:
        raise RuntimeError("genfast: the cache kernel refused what the append kernel took")
    return None


def _composite(
    q, k_cache, v_cache, k, v, lengths, cos, sin, interleaved, batch_idx, leftpad, block_table,
    scale, softcap, alibi, sinks, left, right,
):  # fmt: skip
    may_compose("attention_with_kvcache", q, k_cache, cos, sin, alibi, sinks)
    out, lse = reference.attention_with_kvcache(
        q, k_cache, v_cache, k, v, cos=cos, sin=sin, interleaved=interleaved,
        cache_seqlens=lengths, cache_batch_idx=batch_idx, leftpad=leftpad,
        block_table=block_table, window=(left, right), alibi_slopes=alibi, scale=scale,
        softcap=softcap, sinks=sinks,
    )  # fmt: skip
    return empty_out(q, v_cache.shape[-1]).copy_(out), lse.contiguous()


def _impl(q, k_cache, v_cache, *args):
    with torch.no_grad():
        if not forced_reference() and _takes(q, k_cache, v_cache, *args[11:13], *args[9:11]):
            found = _native(q, k_cache, v_cache, *args, True)
            if found is not None:
                return found
        return _composite(q, k_cache, v_cache, *args)


def _fake(q, k_cache, v_cache, *args):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return empty_out(q, v_cache.shape[-1]), q.new_empty(q.shape[:3], dtype=dtype)


_op = define(
    "attention_with_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v,"
    " Tensor cache_seqlens, Tensor? cos, Tensor? sin, bool interleaved, Tensor? cache_batch_idx,"
    " Tensor? cache_leftpad, Tensor? block_table, float? scale, float softcap,"
    " Tensor? alibi_slopes, Tensor? sinks, SymInt left, SymInt right) -> (Tensor, Tensor)",
    _impl,
    _fake,
)

_LETTERS = {
    "q": "(B, Hq, Sq, D)",
    "k": "(B, Hkv, Snew, D)",
    "v": "(B, Hkv, Snew, Dv)",
    "k_cache": "(entries, Hkv, capacity, D)",
    "v_cache": "(entries, Hkv, capacity, Dv)",
}


def _vector(name: str, x, n: int) -> None:
    if x is None:
        return
    _check.tensor(name, x, (_INT32,))
    if tuple(x.shape) != (n,) or not x.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous int32 vector of {n}, one per batch row, "
                         f"got shape {tuple(x.shape)}")  # fmt: skip


def _validate(
    q, k_cache, v_cache, k, v, lengths, cos, sin, interleaved, batch_idx, leftpad, block_table,
    scale, softcap, alibi, sinks, left, right,
):  # fmt: skip
    operands = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    if (k is None) != (v is None):
        raise ValueError("k, v: expected both new keys and new values, or neither")
    if k is not None:
        operands |= {"k": k, "v": v}
        for name, x in {"k_cache": k_cache, "v_cache": v_cache}.items():
            _check.tensor(name, x)
            _check.own_memory(name, x)
    check_operands({name: _LETTERS[name] for name in operands}, operands)
    B, Hq, Sq, D = q.shape
    _vector("cache_seqlens", lengths, B)
    _vector("cache_batch_idx", batch_idx, B)
    _vector("cache_leftpad", leftpad, B)
    if block_table is not None:
        check_table(block_table, B)
        if batch_idx is not None:
            raise ValueError("cache_batch_idx: has no meaning beside block_table; pass only one")
    elif batch_idx is None and k_cache.shape[0] < B:
        raise ValueError(
            f"k_cache: expected at least one entry per batch row ({B}), got {k_cache.shape[0]}; "
            "allocate more, or pass block_table"
        )
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos, rotary_sin: expected both, or neither")
    if cos is not None:
        _check.tensor("rotary_cos", cos)
        _check.tensor("rotary_sin", sin)
        _check.same_shape("rotary_sin", sin, "rotary_cos", cos)
        if cos.dim() != 2 or 2 * cos.shape[1] > D or cos.shape[0] == 0:
            raise ValueError(
                f"rotary_cos: expected (positions, R), some, with 2 R <= the head dimension {D}, "
                f"got {tuple(cos.shape)}"
            )
    check_options(B, Hq, alibi, sinks, Options(scale=scale, softcap=softcap))
    _check.same_device(q=q, cache_seqlens=lengths, rotary_cos=cos, rotary_sin=sin,
                       cache_batch_idx=batch_idx, cache_leftpad=leftpad, block_table=block_table,
                       alibi_slopes=alibi, sinks=sinks)  # fmt: skip
    if readable(q, lengths, batch_idx, leftpad, block_table):
        _check_rows(k_cache, k, lengths, batch_idx, leftpad, block_table)
        turned = Sq if left >= 0 or right >= 0 else 1
        _check_positions(cos, lengths, leftpad, max(turned, 0 if k is None else k.shape[2]))


def _check_positions(cos, lengths, leftpad, turned: int) -> None:
    if cos is None or not lengths.numel():
        return
    last = int((lengths if leftpad is None else lengths - leftpad).max()) + turned
    if last > cos.shape[0]:
        raise ValueError(
            f"rotary_cos: expected at least {last} positions (rows), got shape {tuple(cos.shape)}; "
            "make a longer table"
        )


def _check_rows(k_cache, k, lengths, batch_idx, leftpad, block_table) -> None:
    """The composite indexes by these values; the kernels check them again in C++."""
    page, added = k_cache.shape[2], 0 if k is None else k.shape[2]
    capacity = page if block_table is None else page * block_table.shape[1]
    if lengths.numel() and (int(lengths.min()) < 0 or int(lengths.max()) + added > capacity):
        raise ValueError(
            f"cache_seqlens: expected 0 <= length, and length + {added} new rows <= the capacity "
            f"of {capacity}, got {lengths.tolist()}; allocate a longer cache"
        )
    if block_table is not None:
        used = torch.arange(block_table.shape[1]) * page < (lengths + added)[:, None]
        if bool((used & ((block_table < 0) | (block_table >= k_cache.shape[0]))).any()):
            raise ValueError(
                f"block_table: expected pages below {k_cache.shape[0]} for the rows in use, "
                f"got {block_table.tolist()}; allocate more pages"
            )
    if leftpad is not None and bool(((leftpad < 0) | (leftpad > lengths)).any()):
        raise ValueError(
            f"cache_leftpad: expected 0 <= padding <= cache_seqlens, got {leftpad.tolist()}"
        )
    if batch_idx is not None and bool(((batch_idx < 0) | (batch_idx >= k_cache.shape[0])).any()):
        raise ValueError(
            f"cache_batch_idx: expected entries of the cache of {k_cache.shape[0]}, "
            f"got {batch_idx.tolist()}"
        )


def _whole_lengths(q, k_cache, k, length, block_table) -> Tensor:
    """One length for every batch row; None: the whole cache."""
    if q.dim() != 4 or k_cache.dim() != 4:
        check_operands(_LETTERS, {"q": q, "k_cache": k_cache})
    full = k_cache.shape[2]
    if block_table is not None:
        check_table(block_table, q.shape[0])
        full *= block_table.shape[1]
    if length is None and k is not None:
        raise ValueError("cache_seqlens: expected with k, to know where the new rows go")
    if length is None:
        length = full
    _check.integer("cache_seqlens", length, low=0, high=full)
    return torch.full((q.shape[0],), length, dtype=_INT32, device=q.device)


def check_table(block_table, B: int) -> None:
    _check.tensor("block_table", block_table, (_INT32,))
    if block_table.dim() != 2 or block_table.shape[0] != B:
        raise ValueError(
            f"block_table: expected (B, blocks) with B = {B}, got {tuple(block_table.shape)}"
        )


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | Any:
    """Appends k, v to the cache in place, then attends to it, in one call.

    q: (B, Hq, Sq, D). k_cache, v_cache: (entries, Hkv, capacity, D | Dv), or with block_table
    (B, blocks) int32 pages (pages, Hkv, page_size, D | Dv). k, v: (B, Hkv, S_new, D | Dv), written
    at rows cache_seqlens[b] ... of the cache. One dtype for all.
    cache_seqlens: rows already valid, int or (B) int32; None: the whole cache (then k must be
    None). cache_batch_idx: (B) int32 entry of each batch row. cache_leftpad: (B) int32 first valid
    row. rotary_cos, rotary_sin: (positions, R), 2 R <= D: new keys are rotated at positions
    cache_seqlens[b] - leftpad[b] + i, q likewise when causal or windowed, else all at i = 0;
    interleaved: pairs (0, 1), (2, 3) ..., else (0, R), (1, R + 1) ... (Su et al. 2021).
    causal, window, scale, softcap, alibi_slopes, sinks, backend: as in `attention`, diagonal at the
    bottom right. Returns (B, Hq, Sq, Dv), and lse (B, Hq, Sq) on request. No gradient flows: it
    runs as under torch.no_grad(). Raises TypeError / ValueError naming the argument.
    """
    if backend is not None:
        return under(attention_with_kvcache, locals())
    left, right = windows(causal, window)
    scale = as_scale(scale)
    if not isinstance(rotary_interleaved, bool):
        raise TypeError(
            f"rotary_interleaved: expected a bool, got {_check.describe(rotary_interleaved)}"
        )
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _check.tensor(name, x)
    for name, x in (("k", k), ("v", v)):
        if x is not None:
            _check.tensor(name, x)
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = _whole_lengths(q, k_cache, k, cache_seqlens, block_table)
    args = (
        k, v, cache_seqlens, rotary_cos, rotary_sin, rotary_interleaved, cache_batch_idx,
        cache_leftpad, block_table, scale, softcap, alibi_slopes, sinks, left, right,
    )  # fmt: skip
    others = rotary_cos, rotary_sin, alibi_slopes, sinks
    if not is_compiling() and gate(q, k_cache, v_cache, k, v, *others) in (DIRECT, GRAD):
        found = None
        both = block_table is not None and cache_batch_idx is not None  # refused below
        if not both and _takes(q, k_cache, v_cache, alibi_slopes, sinks, scale, softcap):
            found = _native(q, k_cache, v_cache, *args, return_lse)
        if found is not None:
            if k is not None and not k_cache.is_inference():
                torch.autograd.graph.increment_version((k_cache, v_cache))  # as of any overwrite
            return found if return_lse else found[0]
    _validate(q, k_cache, v_cache, *args)
    given = k_cache, v_cache
    q, k, v, *caches = (
        x if x is None else x.resolve_neg() if x.stride(-1) == 1 else x.contiguous()
        for x in (q, k, v, *given)
    )
    cos, sin = (x if x is None else x.resolve_neg() for x in (rotary_cos, rotary_sin))
    alibi, sinks = (
        x if x is None else x.resolve_neg().to(torch.float32).contiguous()
        for x in (alibi_slopes, sinks)
    )
    args = (k, v, cache_seqlens, cos, sin, *args[5:11], alibi, sinks, left, right)
    with torch.no_grad():
        out, lse = _op(*(x.detach() for x in (q, *caches)), *args)
        for cache, dense in zip(given, caches, strict=True):
            if cache is not dense and k is not None:
                cache.copy_(dense)
    return (out, lse) if return_lse else out


def _takes(q, k_cache, v_cache, alibi, sinks, scale, softcap) -> bool:
    """Nothing is appended before it is sure that the rest of the call will run."""
    if not (
        q.dtype in KERNEL_DTYPES
        and all(x.dim() == 4 and x.stride(-1) == 1 for x in (q, k_cache, v_cache))
        and all(1 <= x.shape[-1] <= MAX_HEAD_DIM for x in (q, v_cache))
        and k_cache.shape[1] > 0
        and has_kernels(q.device, "attention_cached")
        and q.shape[1] % k_cache.shape[1] == 0
    ):
        return False
    if alibi is not None or sinks is not None or scale is not None or softcap != 0:
        options = Options(scale=scale, softcap=softcap)
        check_options(q.shape[0], q.shape[1], alibi, sinks, options)
    return all(
        x is None or (x.dtype is torch.float32 and x.is_contiguous() and x.device == q.device)
        for x in (alibi, sinks)
    )
