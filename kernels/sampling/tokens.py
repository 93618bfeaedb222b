"""Categorical and token sampling by Gumbel-max; top-k and top-p by a search for the threshold."""

import torch
import triton
import triton.language as tl

from .._launch import as_rows, ceil_div, launch, takes
from ..rng import (
    GUMBEL,
    SCALARS,
    Draw,
    log_positive,
    multiple_of_8,
    noise_blocks,
    place,
    seed_of_rows,
    tile_columns,
)
from .gumbel import best_of_row
from .maths import exp_of


@triton.jit(do_not_specialize=["stride", *SCALARS, "splits", "tiles_per_split"])
def categorical_kernel(
    logits,
    stride: tl.int64,
    seeds,
    seed: tl.int64,
    stream: tl.int64,
    offset: tl.int64,
    per_seed: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    tiles: tl.int32,
    index,  # int64 [rows], when a row is not split
    part_top,  # fp32 [rows, splits]: largest value, NaN when there is a NaN
    part_index,  # int64 [rows, splits]
    splits: tl.int32,
    tiles_per_split: tl.int32,
    SPLIT: tl.constexpr,
    SEEDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    cols = multiple_of_8(cols, ALIGNED)
    stride = multiple_of_8(stride, ALIGNED)
    o_row, m_row, first = place(splits, rows, BR, 1)  # `first`: this program's split
    b_seed, o_in = seed_of_rows(seeds, seed, o_row, m_row, per_seed, SEEDS)
    i_from = first * tiles_per_split
    i_to = tl.minimum(i_from + tiles_per_split, tiles.to(tl.int64))
    b_top, b_best, b_bad = best_of_row(
        logits + o_row * stride, i_from, i_to, b_seed, o_in, m_row, cols, stream, offset, 1.0,
        ALIGNED, BR, BC,
    )  # fmt: skip
    if SPLIT:
        tl.store(part_top + o_row * splits + first, b_top, mask=m_row)
        tl.store(part_index + o_row * splits + first, b_best, mask=m_row)
    else:
        tl.store(index + o_row, tl.where(b_bad, -1, b_best), mask=m_row)


@triton.jit(do_not_specialize=["splits"])
def categorical_join_kernel(part_top, part_index, index, splits: tl.int32, BS: tl.constexpr):
    """The best of a row's splits, the lower index among equal values."""
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BS)
    b_top = tl.load(part_top + i_row * splits + o, mask=o < splits, other=float("-inf"))  # [BS]
    b_index = tl.load(part_index + i_row * splits + o, mask=o < splits, other=2**62)  # [BS]
    top = tl.max(b_top, axis=0)
    nan = tl.max((b_top != b_top).to(tl.int32), axis=0) > 0
    best = tl.min(tl.where(b_top == top, b_index, 2**62), axis=0)
    bad = nan | ~((top > float("-inf")) & (top < float("inf")))
    tl.store(index + i_row, tl.where(bad, -1, best))


# ---- filters -------------------------------------------------------------------------------------


@triton.jit
def scaled_tile(p_row, first, cols, inv_t, BC: tl.constexpr):
    """logits / temperature of [1, BC] columns from `first`, -inf outside; indices; mask."""
    p_row += first
    o_col = (cols * 0 + first).to(tl.int32) + tl.arange(0, BC)[None, :]
    m = o_col < cols.to(tl.int32)
    b_l = tl.load(p_row + tl.arange(0, BC)[None, :], mask=m, other=float("-inf")).to(tl.float32)
    return b_l * inv_t + 0.0, o_col, m  # + 0: one key for both zeros


@triton.jit
def key_of(x):
    """int32 in the order of the floats."""
    s = x.to(tl.int32, bitcast=True)
    return s ^ ((s >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def sums_above(
    p_row, cols, inv_t, top, floor, t1, t2, t3, WEIGHTED: tl.constexpr, BC: tl.constexpr
):
    """For three thresholds: elements with key >= t, and their mass sum of e^(x - top).

    Keys below `floor` are outside. Every sum runs in the same order, so it grows with the set.
    """
    b_n1 = tl.zeros([1, BC], tl.int32)
    b_n2 = tl.zeros([1, BC], tl.int32)
    b_n3 = tl.zeros([1, BC], tl.int32)
    b_f1 = tl.zeros([1, BC], tl.float32)
    b_f2 = tl.zeros([1, BC], tl.float32)
    b_f3 = tl.zeros([1, BC], tl.float32)
    for first in range(0, cols, BC):
        b_x, o_col, m = scaled_tile(p_row, first, cols, inv_t, BC)
        b_key = key_of(b_x)
        m = m & (b_key >= floor)
        m1 = m & (b_key >= t1)
        m2 = m & (b_key >= t2)
        m3 = m & (b_key >= t3)
        b_n1 += m1.to(tl.int32)
        b_n2 += m2.to(tl.int32)
        b_n3 += m3.to(tl.int32)
        if WEIGHTED:
            b_w = exp_of(b_x - top)
            b_f1 += tl.where(m1, b_w, 0.0)
            b_f2 += tl.where(m2, b_w, 0.0)
            b_f3 += tl.where(m3, b_w, 0.0)
    n1, n2, n3 = tl.sum(b_n1), tl.sum(b_n2), tl.sum(b_n3)
    if WEIGHTED:
        return n1, n2, n3, tl.sum(b_f1), tl.sum(b_f2), tl.sum(b_f3)
    else:
        return n1, n2, n3, n1.to(tl.int64), n2.to(tl.int64), n3.to(tl.int64)


@triton.jit
def search(p_row, cols, inv_t, top, lo, hi, target, WEIGHTED: tl.constexpr, BC: tl.constexpr):
    """Largest key T in [lo, hi] with f(T) >= target, f(T) the count (or mass) of keys >= T.

    target: fp32 mass, or int64 count. f(lo) >= target is known, nothing lies above hi. Three
    thresholds a pass quarter the range; it ends early when one element is left in it. Returns T
    (or a key with the same set above it), how many elements share it at most, f just above it.
    """
    floor = lo.to(tl.int32)
    lo = lo.to(tl.int64)
    hi = hi.to(tl.int64)
    n_lo = cols.to(tl.int64)
    n_hi = n_lo * 0
    f_hi = target * 0
    while (hi > lo) & (n_lo - n_hi > 1):
        q = (hi - lo + 3) // 4
        t1 = lo + q
        t2 = tl.minimum(lo + 2 * q, hi)
        t3 = tl.minimum(lo + 3 * q, hi)
        n1, n2, n3, f1, f2, f3 = sums_above(
            p_row, cols, inv_t, top, floor,
            t1.to(tl.int32), t2.to(tl.int32), t3.to(tl.int32), WEIGHTED, BC,
        )  # fmt: skip
        ok1, ok2, ok3 = f1 >= target, f2 >= target, f3 >= target
        hi = tl.where(ok3, hi, tl.where(ok2, t3 - 1, tl.where(ok1, t2 - 1, t1 - 1)))
        n_hi = tl.where(ok3, n_hi, tl.where(ok2, n3, tl.where(ok1, n2, n1)).to(tl.int64))
        f_hi = tl.where(ok3, f_hi, tl.where(ok2, f3, tl.where(ok1, f2, f1)))
        n_lo = tl.where(ok3, n3, tl.where(ok2, n2, tl.where(ok1, n1, n_lo))).to(tl.int64)
        lo = tl.where(ok3, t3, tl.where(ok2, t2, tl.where(ok1, t1, lo)))
    return lo.to(tl.int32), n_lo - n_hi, f_hi


@triton.jit
def nth_tie(p_row, cols, inv_t, key, n, BC: tl.constexpr):
    """Index of the n-th element equal to `key`, counted from 1; cols when there are fewer."""
    seen = n * 0
    cut = cols.to(tl.int32)
    for first in range(0, cols, BC):
        b_x, o_col, m = scaled_tile(p_row, first, cols, inv_t, BC)
        b_equal = (key_of(b_x) == key) & m
        b_rank = seen + tl.cumsum(b_equal.to(tl.int32), axis=1)  # [1, BC]
        cut = tl.minimum(cut, tl.min(tl.where(b_equal & (b_rank == n), o_col, 2147483647)))
        seen += tl.sum(b_equal.to(tl.int32))
    return cut


@triton.jit(
    do_not_specialize=[
        *("stride", *SCALARS),
        *("temperature_step", "top_k_step", "top_p_step", "min_p_step"),
    ]
)
def sample_tokens_kernel(
    logits,
    stride: tl.int64,
    seeds,
    seed: tl.int64,
    stream: tl.int64,
    offset: tl.int64,
    per_seed: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    tiles: tl.int32,
    index,  # int64 [rows]
    temperature,  # fp32 [1] or [rows], or None; the same for the rest, top_k int64
    top_k,
    top_p,
    min_p,
    temperature_step: tl.int32,  # 1: one value per row, 0: one for all
    top_k_step: tl.int32,
    top_p_step: tl.int32,
    min_p_step: tl.int32,
    SEEDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """One program a row; it reads the row about 4 times, and 6 to 10 times more for each search."""
    cols = multiple_of_8(cols, ALIGNED)
    stride = multiple_of_8(stride, ALIGNED)
    i_row = tl.program_id(0).to(tl.int64)
    o_row = i_row + tl.zeros([1, 1], tl.int64)
    b_seed, o_in = seed_of_rows(seeds, seed, o_row, o_row < rows, per_seed, SEEDS)
    p_row = logits + i_row * stride
    t = 1.0
    if temperature is not None:
        t = tl.load(temperature + i_row * temperature_step)
    inv_t = tl.div_rn(1.0, tl.where(t > 0.0, t, 1.0))

    b_top = tl.full([1, BC], float("-inf"), tl.float32)
    b_best = tl.zeros([1, BC], tl.int32)
    for first in range(0, cols, BC):
        b_x, o_col, m = scaled_tile(p_row, first, cols, 1.0, BC)
        b_better = (b_x > b_top) | ((b_x != b_x) & m)  # NaN sticks
        b_top = tl.where(b_better, b_x, b_top)
        b_best = tl.where(b_better, o_col, b_best)
    nan = tl.max((b_top != b_top).to(tl.int32)) > 0
    top = tl.max(b_top)
    best = tl.min(tl.where(b_top == top, b_best, 2147483647))
    bad = nan | ~((top > float("-inf")) & (top < float("inf")))

    # Temperature 0 takes the largest logit, and so does one so small that the logits overflow.
    scaled = top * inv_t + 0.0
    greedy = ~((t > 0.0) & (scaled > float("-inf")) & (scaled < float("inf")))
    if ~(greedy | bad):
        top = scaled
        hi = key_of(top)
        lo = key_of(top * 0.0 + float("-inf"))
        cut = cols.to(tl.int32)
        if top_k is not None:
            k = tl.load(top_k + i_row * top_k_step)
            if (k > 0) & (k < cols):
                lo, n_tied, f_above = search(p_row, cols, inv_t, top, lo, hi, k, False, BC)
        if top_p is not None:
            p = tl.load(top_p + i_row * top_p_step)
            if p < 1.0:
                n1, n2, n3, total, f2, f3 = sums_above(
                    p_row, cols, inv_t, top, lo, lo, lo, lo, True, BC
                )
                target = p * total
                # Below top - 104 the mass is 0, so the threshold is never there.
                lo = tl.maximum(lo, key_of(top - 104.0))
                lo, n_tied, f_above = search(p_row, cols, inv_t, top, lo, hi, target, True, BC)
                if n_tied > 1:  # equal logits: the lower indices first, until the mass is reached
                    weight = exp_of(value_of(lo) - top)
                    b_n = tl.div_rn(target - f_above, tl.where(weight > 0.0, weight, 1.0))
                    b_n = tl.where(weight > 0.0, tl.minimum(tl.maximum(b_n, 1.0), 2.0e9), 2.0e9)
                    n = b_n.to(tl.int32)
                    n += (n.to(tl.float32) < b_n).to(tl.int32)  # rounded up
                    cut = nth_tie(p_row, cols, inv_t, lo, n, BC)
        floor = float("-inf")
        if min_p is not None:
            m_p = tl.load(min_p + i_row * min_p_step)
            floor = tl.where(m_p > 0.0, top + log_positive(tl.maximum(m_p, 1.2e-38)), floor)

        b_top = tl.full([1, BC], float("-inf"), tl.float32)
        b_best = tl.zeros([1, BC], tl.int32)
        for first in range(0, tiles.to(tl.int64) * BC, BC):
            b_block, o_rel, m = tile_columns(o_in, o_row < rows, first, cols, offset, ALIGNED, BC)
            o_col = (cols * 0 + first).to(tl.int32) + o_rel
            b_l = tl.load(p_row + first + o_rel, mask=m, other=float("-inf")).to(
                tl.float32
            )  # [1, BC]
            b_x = b_l * inv_t + 0.0
            b_key = key_of(b_x)
            b_keep = m & (b_x >= floor) & ((b_key > lo) | ((b_key == lo) & (o_col <= cut)))
            b_v = b_x + noise_blocks(b_block, b_seed, stream.to(tl.int64), GUMBEL)
            b_better = b_keep & (b_v > b_top)
            b_top = tl.where(b_better, b_v, b_top)
            b_best = tl.where(b_better, o_col, b_best)
        top = tl.max(b_top)
        best = tl.min(tl.where(b_top == top, b_best, 2147483647))
    tl.store(index + i_row, tl.where(bad, -1, best).to(tl.int64))


# Programs that fill a large GPU several times over.
_PROGRAMS = 512


def categorical(
    logits, index, temperature, top_k, top_p, min_p, seed, seeds, stream, offset
) -> int:
    """Arguments of the native entry point of this name. 0: no count of bad rows without a sync."""
    filters = (temperature, top_k, top_p, min_p)
    dtypes = (torch.float32, torch.int64, torch.float32, torch.float32)
    n = index.numel()
    small = [(f, dtype, n) for f, dtype in zip(filters, dtypes, strict=True)]
    small.append((index, torch.int64, n))
    if not takes(logits, seeds=seeds, small=small, offset=offset, rows=True):
        return -1
    if logits.shape[-1] >= 2**31 or not index.is_contiguous():  # 32-bit indices within a row
        return -1
    if index.numel() == 0:
        return 0
    r = as_rows([logits], [], first=logits.dim() - 1)
    if any(f is not None for f in filters):
        d = Draw(r, seed, seeds, stream, offset, size=2048, narrow=False)
        steps = [int(f is not None and f.numel() > 1) for f in filters]
        args = (*r.tensors, *r.strides, *d.noise, *d.shape, index, *filters, *steps)
        launch(sample_tokens_kernel, r.rows, logits, *args, **d.flags, num_warps=8)
        return 0
    d = Draw(r, seed, seeds, stream, offset, size=1024)
    groups = ceil_div(r.rows, d.br)
    per_split = max(ceil_div(d.tiles * groups, _PROGRAMS), ceil_div(d.tiles, 128), 1)
    splits = ceil_div(d.tiles, per_split)
    top = part = None
    if splits > 1:
        top = logits.new_empty((r.rows, splits), dtype=torch.float32)
        part = index.new_empty((r.rows, splits))
    args = (*r.tensors, *r.strides, *d.noise, *d.shape, index, top, part, splits, per_split)
    launch(categorical_kernel, groups * splits, logits, *args, SPLIT=splits > 1, **d.flags)
    if splits > 1:
        launch(categorical_join_kernel, r.rows, logits, top, part, index, splits, BS=128)
    return 0
