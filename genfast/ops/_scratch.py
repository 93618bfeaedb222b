"""What the CUDA entry points want beside the arguments of their CPU and Triton twins: room for
partial results as a last argument, and rows of no sequence cleared. Sizes come from shapes alone,
so that the order of a sum, and with it the result, never depends on the GPU.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def parts(per_sample: int) -> int:
    """Blocks that share a sample's sums: one per 8192 elements, at most 1024."""
    return min(max(per_sample // 8192, 1), 1024)


def splits(heads: int, rows: int, keys: int) -> int:
    """Blocks that share a query row's keys: so many that about 256 run.

    heads: B * Hkv, rows: query rows of one (all heads of its group), in tiles of 64. Up to 16 rows
    are a decode step, whose blocks have at least 128 keys each, two rounds of their warps; there
    the second launch and the scratch cost the host 5 us, as much as 256 keys of one block.
    """
    tiles = heads * math.ceil(rows / 64)
    if tiles == 0:
        return 1
    if rows <= 16:
        return max(min(256 // tiles, keys // 128, 64), 1) if keys > 512 else 1
    return max(min(256 // tiles, keys // 256, 64), 1) if keys > 1024 and tiles < 128 else 1


def _sums(x: Tensor, width: int = 1) -> Tensor:
    samples = max(x.shape[0], 1)
    return x.new_empty(samples * parts(x.numel() // samples) * width, dtype=torch.float64)


def _bernoulli_nll(nll, logits, x):
    return _sums(logits)


def _diffusion_step(outs, x, *rest):
    extras = rest[-1]
    return None if extras is None or extras[7] is None else _sums(x)


def _guidance_weights(cond, *rest):
    return _sums(cond, 5) if rest[4] else None  # method 0 needs no sums


def _dynamic_threshold(x, *rest):
    """Histograms (of 2064 numbers) where blocks share samples: from 8192 elements on, up to 512
    samples. Past either, a sample in a block is one launch instead of four."""
    samples = x.shape[0]
    if not 0 < samples <= 512 or x.numel() // samples < 8192:
        return None
    return x.new_empty(samples * 2064, dtype=torch.float64)


def _denoising_loss(output, *rest):
    return None if rest[13] is None else _sums(output)  # per_sample


def _split_keys(q, v, B, Hq, Sq, Hkv, Sk):
    n = splits(B * Hkv, Sq * (Hq // max(Hkv, 1)), Sk)
    return q.new_empty(n * B * Hq * Sq * (v.shape[-1] + 2), dtype=torch.float32) if n > 1 else None


def _attention_forward(q, k, v, out, lse, mask, cu_q, cu_k, max_q, max_k, *rest):
    if cu_q is None:
        (B, Hq, Sq, _), (_, Hkv, Sk, _) = q.shape, k.shape
        return _split_keys(q, v, B, Hq, Sq, Hkv, Sk)
    out.zero_()
    if lse is not None:
        lse.fill_(-math.inf)
    return _split_keys(q, v, cu_q.numel() - 1, q.shape[1], max_q, k.shape[1], max_k)


def _attention_cached(q, k_cache, v_cache, out, lse, lengths, added, leftpad, batch_idx, table, *_):
    (B, Hq, Sq, _), (_, Hkv, capacity, _) = q.shape, k_cache.shape
    pages = 1 if table is None else table.shape[1]
    return _split_keys(q, v_cache, B, Hq, Sq, Hkv, capacity * pages)


@functools.cache
def _has_warpgroups(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def adds_queries(q: Tensor) -> bool:
    """Whether blocks add their parts of dQ to common sums, in any order: on sm_90, unless
    `torch.use_deterministic_algorithms` asks for the same bits every time."""
    return _has_warpgroups(q.device) and not torch.are_deterministic_algorithms_enabled()


def _attention_backward(dout, dlse, dq, dk, dv, dmask, dsinks, q, k, v, *rest):
    cu_q, max_q = rest[3], rest[5]
    if cu_q is None:
        batch, heads, length = q.shape[:3]
    else:
        batch, heads, length = cu_q.numel() - 1, q.shape[1], max_q
    # What no block writes: rows of no sequence, and all where there is no block.
    unwritten = () if cu_q is None else (dq, dk, dv)
    if batch * heads == 0:
        unwritten = (dq, dk, dv, dmask, dsinks)
    for grad in unwritten:
        if grad is not None:
            grad.zero_()
    room = 2 * batch * heads * length  # of each row: its LSE and sum(out dout)
    width = max(q.shape[-1], v.shape[-1])
    if q.dtype != torch.float32 and width <= 128 and adds_queries(q):
        kv_heads = max(k.shape[1], 1)  # of each: its queries in whole tiles of 128 rows
        tiles = batch * kv_heads * math.ceil(length * (heads // kv_heads) / 128)
        room = math.ceil(room / 4) * 4 + tiles * 128 * (64 if width <= 64 else 128)
    return q.new_empty(room, dtype=torch.float32)


def _group_parts(x, groups) -> int:
    """Parts of a sample's places where a group is too long for a block or lies scattered (in_strips
    of csrc/cuda/normalization/strips.cuh), else 0: of 16384 elements of all channels, or of 8192 of
    one, and shorter ones until 512 blocks run, but 16 places at the least."""
    samples, channels = x.shape[:2]
    per_sample = x.numel() // max(samples, 1)
    inside = not x.is_contiguous()
    places = per_sample // max(channels, 1)
    long = per_sample // groups > 24576 and (inside or places >= 1024)
    if not long and not (inside and x.numel() >= 2**18):
        return 0
    each, most, units = (
        (per_sample, 16384, samples) if inside else (places, 8192, samples * channels)
    )
    parts = max(each // most, min(each // 2048, 512 // units))
    return max(min(parts, places // 16), 1)


def _normalize(y, statistics, total, x, *rest):
    """Two numbers of each part's channels, in room for three, and two of each group."""
    groups = rest[6]
    if not groups or not (n := _group_parts(x, groups)):
        return None
    samples, channels = x.shape[:2]
    return x.new_empty(samples * (n * 3 * channels + 2 * groups), dtype=torch.float32)


def _normalize_backward(grad, grad_sum, dx, dw, db, d_scale, d_shift, d_add, d_gate, *rest):
    """Three sums of each channel over parts of at least 32 rows, of up to 512 in all; with a gate
    two numbers a group too (a row, as gated calls are no group norms). Of group norms as in the
    forward, wanted or not."""
    x, (scale, shift, gate, groups) = rest[1], (*rest[4:6], *rest[7:9])
    n = _group_parts(x, groups) if groups else 0
    if n == 0 and dw is db is d_scale is d_shift is d_gate is None:
        return None
    C = x.shape[1 if groups else -1]
    by_sample = groups or any(t is not None for t in (scale, shift, gate))
    samples = x.shape[0] if by_sample else 1
    rows = x.numel() // max(C, 1)
    n = n or min(max(rows // max(samples, 1) // 32, 1), max(512 // max(samples, 1), 1))
    of_groups = samples * groups if groups else 0 if gate is None else rows
    return x.new_empty(samples * n * 3 * C + 2 * of_groups, dtype=torch.float32)


def _bias_act_backward(grad, dz, db, d_strength, source, *rest):
    """Sums of each channel over parts of the places, and of the strength: up to 640 blocks make
    them, of 128 channels. Up to 4096 elements they are one launch."""
    if db is d_strength is None or dz.numel() <= 4096:
        return None
    C = dz.shape[rest[9]]  # dim
    room = min(640 * (min(C, 128) + 1), dz.numel() // 4)
    return dz.new_empty(max(room, 2 * C), dtype=torch.float64)


# Entry point -> its scratch from its arguments.
ROOM = {
    "bernoulli_nll": _bernoulli_nll,
    "diffusion_step": _diffusion_step,
    "guidance_weights": _guidance_weights,
    "dynamic_threshold": _dynamic_threshold,
    "denoising_loss": _denoising_loss,
    "attention_forward": _attention_forward,
    "attention_cached": _attention_cached,
    "attention_backward": _attention_backward,
    "normalize": _normalize,
    "normalize_backward": _normalize_backward,
    "bias_act_backward": _bias_act_backward,
}


# Entry point -> the place of a tensor that always is one, where that is not the second.
GIVEN = {"dynamic_threshold": 0, "attention_backward": 7, "normalize": 0, "normalize_backward": 0}


def with_scratch(name: str, native):
    """`native` with its scratch, where it wants one and the call is on a GPU."""
    room = ROOM.get(name)
    if room is None:
        return native

    place = GIVEN.get(name, 1)

    def run(*args):
        x = args[place]
        return native(*args, room(*args)) if x.is_cuda else native(*args)

    return run
