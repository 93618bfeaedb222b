"""Reductions over samples: guidance weights from five sums, and the exact quantile of |x0|.

Both give the same bits every time: fixed trees, no floating-point atomics.
"""

import torch
import triton
import triton.language as tl

from .._launch import FLOATS, as_rows, ceil_div, hidden, launch
from ..rng import bits, from_bits, place
from .step import COLUMNS
from .terms import prefix_of, tile_of, vector_of

CFG, RESCALE, CFG_ZERO_STAR, APG, MAG, TCFG = (tl.constexpr(k) for k in range(6))


@triton.jit(do_not_specialize=["strides", "rows", "cols", "tiles"])
def guidance_sums_kernel(
    cond,
    other,  # uncond, or the running average
    strides,
    partial,  # fp64 [rows, tiles, 5]: sums of c, u, c c, u u, c u
    rows: tl.int64,
    cols: tl.int64,
    tiles: tl.int32,
    ALIGNED: tl.constexpr,
    BC: tl.constexpr,
):
    """In fp64: products of two floats are exact there, and |c - u|^2 comes out of a cancellation
    (c and u differ by a few percent)."""
    cols = cols // 8 * 8 if ALIGNED else cols
    o_row, m_row, first = place(tiles, rows, 1, BC)
    o_col = tl.arange(0, BC)[None, :]
    m = m_row & (first + o_col < cols)
    b_c = tile_of(cond, strides[0], o_row, first, o_col, m, ALIGNED).to(tl.float64)  # [1, BC]
    b_u = tile_of(other, strides[1], o_row, first, o_col, m, ALIGNED).to(tl.float64)
    p = partial + (o_row * tiles + first // BC) * 5
    tl.store(p, tl.sum(b_c, axis=1, keep_dims=True))
    tl.store(p + 1, tl.sum(b_u, axis=1, keep_dims=True))
    tl.store(p + 2, tl.sum(b_c * b_c, axis=1, keep_dims=True))
    tl.store(p + 3, tl.sum(b_u * b_u, axis=1, keep_dims=True))
    tl.store(p + 4, tl.sum(b_c * b_u, axis=1, keep_dims=True))


@triton.jit
def column_sum(partial, i_b, count, k: tl.constexpr, BC: tl.constexpr):
    o_col = tl.arange(0, BC)
    b_sum = tl.zeros([BC], tl.float64)
    for at in range(0, count, BC):
        m = at + o_col < count
        b_sum += tl.load(partial + (i_b * count + at + o_col) * 5 + k, mask=m, other=0.0)
    return tl.sum(b_sum, axis=0)


@triton.jit
def root(x):
    """fp64; a cancellation below 0 counts as 0."""
    return tl.sqrt(tl.where(x > 0.0, x, 0.0))


@triton.jit(do_not_specialize=["count", "n", "scale_step", "option_0", "option_1"])
def guidance_weights_kernel(
    partial,  # fp64 [B, count, 5], or None
    count: tl.int64,
    n: tl.float64,
    scale,  # fp32 [1] or [B]
    scale_step: tl.int32,
    option_0: tl.float64,
    option_1: tl.float64,
    weights,  # fp32 [B, WIDTH]
    METHOD: tl.constexpr,
    ORIGINAL: tl.constexpr,
    WIDTH: tl.constexpr,
    BC: tl.constexpr,
):
    """The formulas of csrc/math/diffusion.h; papers in genfast/reference/diffusion.py."""
    i_b = tl.program_id(0).to(tl.int64)
    w = tl.load(scale + i_b * scale_step).to(tl.float64)
    if ORIGINAL:
        w_c, w_u = 1.0 + w, -w
    else:
        w_c, w_u = w, 1.0 - w
    w_a = w * 0.0
    if METHOD != CFG:
        cc = column_sum(partial, i_b, count, 2, BC)
        uu = column_sum(partial, i_b, count, 3, BC)
        cu = column_sum(partial, i_b, count, 4, BC)
        if METHOD == RESCALE:
            c = column_sum(partial, i_b, count, 0, BC)
            u = column_sum(partial, i_b, count, 1, BC)
            var_c, var_u, cov = cc - c * c / n, uu - u * u / n, cu - c * u / n
            var_g = (w_c * w_c * var_c + w_u * w_u * var_u) + 2.0 * w_c * w_u * cov
            # rounding leaves less of an output that is the same everywhere, which stays as it is
            least = 1e-13 * (w_c * w_c * cc + w_u * w_u * uu)
            ratio = tl.where(var_g <= least, 1.0, root(var_c) / tl.sqrt(var_g))
            factor = option_0 * ratio + (1.0 - option_0)
            w_c, w_u = w_c * factor, w_u * factor
        elif METHOD == CFG_ZERO_STAR:
            w_u = w_u * (cu / (uu + 1e-8))
        elif METHOD == APG:
            if WIDTH == 3:
                dd, dc = uu, cu
            else:
                dd, dc = (cc + uu) - 2.0 * cu, cc - cu
            ratio = option_1 / root(dd)
            shrink = tl.where((option_1 > 0.0) & (ratio < 1.0), ratio, 1.0)
            # the part of c that is taken away; none of a c that is all zero
            along = (1.0 - option_0) * shrink * dc / tl.where(cc > 0.0, cc, cc * 0.0 + 1.0)
            if ORIGINAL:
                w_c, w_u = 1.0 - w * along, w * 0.0
            else:
                w_c, w_u = -w * along, w * 0.0 + 1.0
            if WIDTH == 3:
                w_a = w * shrink
            else:
                w_c, w_u = w_c + w * shrink, w_u - w * shrink
        elif METHOD == MAG:
            dd = (cc + uu) - 2.0 * cu
            damp = tl.where(dd <= 0.0, 1.0, tl.exp(-option_0 * root(dd) / tl.sqrt(uu)))
            if ORIGINAL:
                w_c, w_u = 1.0 + w * damp, -w * damp
            else:
                damped = 1.0 + (w - 1.0) * damp
                w_c, w_u = damped, 1.0 - damped
        else:  # first right singular vector p c + q u of [c; u], from the 2 x 2 Gram matrix
            half = (cc - uu) / 2.0
            top = (cc + uu) / 2.0 + tl.sqrt(half * half + cu * cu)
            p = tl.where(cc >= uu, top - uu, cu)  # two forms of it; one is not close to zero
            q = tl.where(cc >= uu, cu, top - cc)
            vv = (p * p * cc + q * q * uu) + 2.0 * p * q * cu
            # vv = 0: orthogonal of one length, c itself is such a vector; or both are zero
            r = (p * cu + q * uu) / tl.where(vv > 0.0, vv, vv * 0.0 + 1.0)
            w_c, w_u = w_c + w_u * r * p, w_u * r * q
    p_w = weights + i_b * WIDTH
    tl.store(p_w, w_c.to(tl.float32))
    tl.store(p_w + 1, w_u.to(tl.float32))
    if WIDTH == 3:
        tl.store(p_w + 2, w_a.to(tl.float32))


def guidance_weights(
    cond, uncond, average, scale, weights, method, original, option_0, option_1
) -> bool:
    """Arguments of the native entry point of this name."""
    present = [t for t in (cond, uncond, average) if t is not None]
    width = 2 if average is None else 3
    if cond.dim() == 0 or any(
        t.dtype not in FLOATS or t.shape != cond.shape or t.device != cond.device for t in present
    ):
        return False
    batch = cond.shape[0]
    if not vector_of(scale, cond) or weights.numel() != batch * width:
        return False
    if weights.dtype != torch.float32 or not weights.is_contiguous():
        return False
    if batch == 0:
        return True
    n = cond.numel() // batch
    partial, count = None, 0
    if method != CFG.value:
        # A sample's sums, and so its weights, are added in an order that its size alone decides.
        r = as_rows([cond, uncond if average is None else average], [], first=1)
        tiles = ceil_div(max(r.cols, 1), 2048)
        partial, count = cond.new_empty((batch, tiles, 5), dtype=torch.float64), tiles
        args = (*r.tensors, hidden(tuple(r.strides)), partial, batch, n, tiles)
        launch(guidance_sums_kernel, batch * tiles, cond, *args, ALIGNED=r.aligned, BC=2048)
    launch(
        guidance_weights_kernel,
        batch,
        cond,
        partial,
        count,
        n,
        scale,
        int(scale.numel() > 1),
        option_0,
        option_1,
        weights,
        METHOD=method,
        ORIGINAL=original,
        WIDTH=width,
        BC=512,
    )
    return True


# ---- the quantile: four rounds of counting, 8 bits of the magnitude each -------------------------


@triton.jit
def magnitudes(
    x, m, strides, table, index, row, index_step, table_rows, i_b, first, end,
    ALIGNED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Bits of |x0| as int32 [1, BC]: they order as the magnitudes do; NaN is above infinity."""
    o_row = i_b + tl.zeros([1, 1], tl.int64)
    o_col = tl.arange(0, BC)[None, :]
    m_col = first + o_col < end
    b_x = tile_of(x, strides[0], o_row, first, o_col, m_col, ALIGNED)
    if m is not None:
        if index is not None:
            row = tl.load(index + i_b * index_step)
            row = tl.minimum(tl.maximum(row, 0), table_rows - 1)
        p_row = table + row * COLUMNS
        b_m = tile_of(m, strides[1], o_row, first, o_col, m_col, ALIGNED)
        b_x = b_x * tl.load(p_row) + b_m * tl.load(p_row + 1)
    return (bits(b_x) & 0x7FFFFFFF).to(tl.int32, bitcast=True), m_col


@triton.jit(do_not_specialize=["strides", "row", "index_step", "table_rows", "cols", "splits"])
def count_kernel(
    x,
    m,  # or None
    strides,
    table,
    index,
    row: tl.int64,
    index_step: tl.int64,
    table_rows: tl.int64,
    cols: tl.int64,
    splits: tl.int32,
    state,  # int64 [B, 3]: bits found so far, rank among those that have them, is the next equal
    counts,  # int32 [B, splits, 256], or least and largest magnitudes [B, splits, 2]
    SHIFT: tl.constexpr,  # of the 8 bits that this round counts; -1: the round after the last
    ALIGNED: tl.constexpr,
    PER: tl.constexpr,
    BC: tl.constexpr,
):
    cols = cols // 8 * 8 if ALIGNED else cols
    i = tl.program_id(0)
    i_b = (i // splits).to(tl.int64)
    begin = (i % splits).to(tl.int64) * PER
    end = tl.minimum(begin + PER, cols)
    found = tl.load(state + i_b * 3).to(tl.int32)
    if SHIFT >= 0:
        b_counts = tl.zeros([256], tl.int32)
    else:
        b_least = tl.full([1, BC], 2147483647, tl.int32)
        b_most = tl.zeros([1, BC], tl.int32)
    for first in range(begin, end, BC):
        b_key, m_col = magnitudes(
            x, m, strides, table, index, row, index_step, table_rows, i_b, cols * 0 + first, end,
            ALIGNED, BC,
        )  # fmt: skip
        if SHIFT >= 0:
            # 64-bit shifts: SHIFT + 8 reaches 32 in the first round, where all agree
            same = (b_key.to(tl.int64) >> (SHIFT + 8)) == (found.to(tl.int64) >> (SHIFT + 8))
            b_bin = tl.where(m_col & same, (b_key >> SHIFT) & 255, 256)
            b_bin = tl.reshape(b_bin, [BC])
            b_counts += tl.histogram(b_bin, 256, mask=b_bin < 256)
        else:
            b_least = tl.minimum(b_least, tl.where(m_col & (b_key > found), b_key, 2147483647))
            b_most = tl.maximum(b_most, tl.where(m_col, b_key, 0))
    if SHIFT >= 0:
        tl.store(counts + i.to(tl.int64) * 256 + tl.arange(0, 256), b_counts)
    else:
        tl.store(counts + i.to(tl.int64) * 2, tl.min(b_least))
        tl.store(counts + i.to(tl.int64) * 2 + 1, tl.max(b_most))


@triton.jit(do_not_specialize=["splits"])
def pick_kernel(counts, state, splits: tl.int32, SHIFT: tl.constexpr):
    """The bin of the wanted rank, and the rank within it."""
    i_b = tl.program_id(0).to(tl.int64)
    o_bin = tl.arange(0, 256)
    b_n = tl.zeros([256], tl.int64)
    for s in range(0, splits):
        b_n += tl.load(counts + (i_b * splits + s) * 256 + o_bin).to(tl.int64)
    p = state + i_b * 3
    rank = tl.load(p + 1)
    b_upto = tl.cumsum(b_n, axis=0)
    pick = tl.sum((b_upto <= rank).to(tl.int32), axis=0)
    below = tl.sum(tl.where(o_bin < pick, b_n, 0), axis=0)
    here = tl.sum(tl.where(o_bin == pick, b_n, 0), axis=0)
    tl.store(p, tl.load(p) + (pick.to(tl.int64) << SHIFT))
    tl.store(p + 1, rank - below)
    tl.store(p + 2, (rank - below + 1 < here).to(tl.int64))


@triton.jit(do_not_specialize=["splits", "weight", "limit"])
def quantile_kernel(
    ends,  # int32 [B, splits, 2]: least magnitude above the found one, largest of all
    state,
    s,  # fp32 [B]
    splits: tl.int32,
    weight: tl.float64,  # of the next larger magnitude
    limit: tl.float64,
    BS: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BS)
    p = ends + (i_b * splits + o) * 2
    above = tl.min(tl.load(p, mask=o < splits, other=2147483647), axis=0)
    most = tl.max(tl.load(p + 1, mask=o < splits, other=0), axis=0)
    found = tl.load(state + i_b * 3).to(tl.int32)
    above = tl.where(tl.load(state + i_b * 3 + 2) != 0, found, above)
    lower = from_bits(found.to(tl.uint32, bitcast=True)).to(tl.float64)
    upper = from_bits(above.to(tl.uint32, bitcast=True)).to(tl.float64)
    b_q = lower + weight * (upper - lower)
    b_q = tl.where((upper == lower) | (weight == 0.0), lower, b_q)  # inf - inf is avoided
    b_q = tl.where(b_q > 1.0, b_q, 1.0)
    b_q = tl.where(b_q < limit, b_q, limit).to(tl.float32)
    nan = from_bits(tl.full([1], 0x7FC00000, tl.uint32))
    tl.store(s + i_b + tl.zeros([1], tl.int64), tl.where(most > 0x7F800000, nan, b_q))


# Elements of one program's count; at most so many programs share a sample.
_PER_COUNT, _SPLITS = 16384, 1024


def dynamic_threshold(x, m, s, table, index, row, ratio, limit) -> bool:
    """Arguments of the native entry point of this name."""
    if x.dim() == 0 or x.numel() == 0 or not 0 <= ratio <= 1:
        return False
    present = [x] if m is None else [x, m]
    if any(t.dtype not in FLOATS or t.shape != x.shape or t.device != x.device for t in present):
        return False
    batch, n = x.shape[0], x.numel() // x.shape[0]
    if s.dtype != torch.float32 or s.numel() != batch or not s.is_contiguous() or n >= 2**40:
        return False
    if m is not None:
        dense = table.dtype == torch.float32 and table.dim() == 2 and table.is_contiguous()
        if not dense or table.shape[1] != COLUMNS.value or table.device != x.device:
            return False
        if index is None and not 0 <= row < table.shape[0]:
            return False
        if index is not None and (index.dim() > 1 or not prefix_of(index, x)):
            return False
    rank = ratio * (n - 1)
    low = int(rank)
    weight = rank - low if low + 1 < n else 0.0
    per = _PER_COUNT
    while ceil_div(n, per) > _SPLITS:
        per *= 2
    splits = ceil_div(n, per)
    r = as_rows([x, m], [], first=1)
    state = torch.zeros((batch, 3), dtype=torch.int64, device=x.device)
    state[:, 1] = low
    counts = x.new_empty((batch, splits, 256), dtype=torch.int32)
    step = int(index is not None and index.numel() > 1)
    rows = 1 if table is None else table.shape[0]
    args = (
        *r.tensors,
        hidden(tuple(r.strides)),
        table,
        index,
        row,
        step,
        rows,
        n,
        splits,
        state,
        counts,
    )
    flags = {"ALIGNED": r.aligned, "PER": per, "BC": 1024}
    for shift in (24, 16, 8, 0):
        launch(count_kernel, batch * splits, x, *args, SHIFT=shift, **flags)
        launch(pick_kernel, batch, x, counts, state, splits, SHIFT=shift)
    launch(count_kernel, batch * splits, x, *args, SHIFT=-1, **flags)
    args = (counts, state, s, splits, weight, limit)
    launch(quantile_kernel, batch, x, *args, BS=_SPLITS)
    return True
