"""dz = grad act'(z) and h = (x - mean) rstd, a = w (1 + scale); with means over the group

    dx = rstd (a dz - mean(a dz) - h mean(a dz h)) + grad_sum

without mean(a dz) in RMS norm. S1 = sum dz and S2 = sum dz h over a channel's places, with a gate
S3 = sum dx add too: rows of partial sums, one a program, which a second kernel adds in their order.
"""

import torch
import triton
import triton.language as tl

from .._launch import FLOATS, ceil_div, launch, same_memory
from ..rng import multiple_of_8
from .forward import (
    APPLY,
    GROUPS,
    LINEAR,
    MEASURE,
    STRIDES,
    WHOLE,
    act_slope,
    affine_of,
    along,
    condition_at,
    group_of,
    load_at,
    places_of,
)
from .layout import MOST_PARTS, group_grid, layout_of, row_tile, strides_of, vector_of


@triton.jit
def dz_and_h(grad, x, o, m, mean, rstd, b_a, b_t, ACT: tl.constexpr):
    """Both 0 outside of m."""
    b_h = tl.where(m, (load_at(x, o, m) - mean) * rstd, 0.0)
    b_dz = load_at(grad, o, m)
    if ACT != LINEAR:
        b_dz = b_dz * act_slope(b_h * b_a + b_t, ACT)
    return b_dz, b_h


@triton.jit(
    do_not_specialize=[*STRIDES, "cols", "rows", "per_sample", "parts", "per_part", "tiles"]
)
def normalize_bwd_kernel(
    grad, grad_sum, dx, d_add, statistics, x, w, b, scale, shift, add, gate, partial,
    scale_stride: tl.int64, shift_stride: tl.int64, gate_stride: tl.int64,
    cols: tl.int64, rows: tl.int64, per_sample: tl.int64, parts: tl.int32, per_part: tl.int64,
    tiles: tl.int32, K: tl.constexpr, RMS: tl.constexpr, ACT: tl.constexpr,
    SUMS_ALONE: tl.constexpr, ALIGNED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """per_part rows of a sample's per_sample. partial: fp32 [samples, parts, K, cols], S1, S2 and
    with a gate S3, or None. SUMS_ALONE: of one of a row's tiles, whose dx is there already."""
    cols = multiple_of_8(cols, ALIGNED)
    i = tl.program_id(0)
    i_unit = i // tiles
    i_sample = i_unit // parts
    i_part = i_unit - i_sample * parts
    i_sample = i_sample.to(tl.int64)
    o_c = (i - i_unit * tiles).to(tl.int64) * BC + tl.arange(0, BC)[None, :]  # [1, BC]
    m_c = o_c < cols
    b_a, b_t = affine_of(  # [1, BC]
        w, b, scale, shift, i_sample, scale_stride, shift_stride, o_c, m_c, m_c, ALIGNED
    )
    if gate is not None:
        b_gate = condition_at(gate, i_sample, gate_stride, o_c, m_c, ALIGNED)  # [1, BC]
    b_1 = tl.zeros([BR, BC], tl.float32)
    b_2 = tl.zeros([BR, BC], tl.float32)
    b_3 = tl.zeros([BR, BC], tl.float32)
    n = cols.to(tl.float32)
    begin = i_sample * per_sample + i_part * per_part
    end = tl.minimum(begin + per_part, (i_sample + 1) * per_sample)
    for r0 in range(begin, end, BR):
        o_row = r0 + tl.arange(0, BR)[:, None]  # [BR, 1]
        m_row = o_row < end
        o, m = o_row * cols + o_c, m_row & m_c
        if RMS:
            b_mean = 0.0
            b_rstd = load_at(statistics, o_row, m_row)
        else:
            b_mean = load_at(statistics, o_row, m_row)
            b_rstd = load_at(statistics, rows + o_row, m_row)
        b_dz, b_h = dz_and_h(grad, x, o, m, b_mean, b_rstd, b_a, b_t, ACT)  # [BR, BC]
        if partial is not None:
            b_1 += b_dz
            b_2 += b_dz * b_h
        if SUMS_ALONE:
            if gate is not None:
                b_3 += load_at(dx, o, m) * load_at(add, o, m)
        else:
            b_dz = b_dz * b_a
            b_dx = b_dz - b_h * (tl.sum(b_dz * b_h, axis=1, keep_dims=True) / n)
            if not RMS:
                b_dx -= tl.sum(b_dz, axis=1, keep_dims=True) / n
            b_dx = b_dx * b_rstd
            if grad_sum is not None:
                b_dx += load_at(grad_sum, o, m)
            if gate is not None:
                b_3 += b_dx * load_at(add, o, m)
                tl.store(d_add + o, (b_dx * b_gate).to(d_add.dtype.element_ty), mask=m)
            tl.store(dx + o, b_dx.to(dx.dtype.element_ty), mask=m)
    if partial is not None:
        p = partial + i_unit.to(tl.int64) * K * cols + o_c  # [1, BC]
        tl.store(p, tl.sum(b_1, axis=0, keep_dims=True), mask=m_c)
        tl.store(p + cols, tl.sum(b_2, axis=0, keep_dims=True), mask=m_c)
        if gate is not None:
            tl.store(p + 2 * cols, tl.sum(b_3, axis=0, keep_dims=True), mask=m_c)


@triton.jit(do_not_specialize=[*STRIDES, *GROUPS])
def normalize_groups_bwd_kernel(
    grad, grad_sum, dx, d_add, statistics, x, w, b, scale, shift, gate, moments, partial,
    scale_stride: tl.int64, shift_stride: tl.int64, gate_stride: tl.int64,
    groups: tl.int32, per_sample: tl.int32, width: tl.int32, inner: tl.int64,
    parts: tl.int32, per_part: tl.int64, count: tl.int64,
    RMS: tl.constexpr, ACT: tl.constexpr, STAGE: tl.constexpr, LAST: tl.constexpr,
    ALIGNED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """As the forward. moments: fp32 [count, parts, 2], the sums of a dz and a dz h of each part;
    partial: fp32 [samples, parts, 2, channels], S1 and S2, or None."""
    BCH: tl.constexpr = BC if LAST else BR  # channels and places of a tile
    BP: tl.constexpr = BR if LAST else BC
    P_AXIS: tl.constexpr = 0 if LAST else 1
    width = width // 8 * 8 if ALIGNED and LAST else width
    inner = multiple_of_8(inner, ALIGNED and not LAST)
    i_group, i_b, i_sample, first_channel, first, i_part, begin, end = group_of(
        parts, per_part, groups, per_sample, width, inner, LAST, ALIGNED
    )
    channels, n = groups * width, (inner * width).to(tl.float32)
    if RMS:
        mean = 0.0
        rstd = tl.load(statistics + i_group)
    else:
        mean = tl.load(statistics + i_group)
        rstd = tl.load(statistics + count + i_group)

    sum_1, sum_2 = 0.0, 0.0
    if STAGE != APPLY:
        for c0 in range(0, width, BCH):
            o_c = along(c0, BCH, 1 - P_AXIS)
            m_c = o_c < width
            b_a, b_t = affine_of(
                w, b, scale, shift, i_sample, scale_stride, shift_stride, first_channel + o_c,
                m_c, m_c, ALIGNED,
            )  # fmt: skip
            b_1 = tl.zeros([BR, BC], tl.float32)
            b_2 = tl.zeros([BR, BC], tl.float32)
            for p0 in range(begin, end, BP):
                o, m = places_of(first, o_c, m_c, p0, end, inner, channels, BP, LAST)
                b_dz, b_h = dz_and_h(grad, x, o, m, mean, rstd, b_a, b_t, ACT)  # [BR, BC]
                b_1 += b_dz
                b_2 += b_dz * b_h
            b_1 = tl.sum(b_1, axis=P_AXIS, keep_dims=True)  # of each channel
            b_2 = tl.sum(b_2, axis=P_AXIS, keep_dims=True)
            if partial is not None:
                p = partial + (i_b * parts + i_part) * 2 * channels + first_channel + o_c
                tl.store(p, b_1, mask=m_c)
                tl.store(p + channels, b_2, mask=m_c)
            sum_1 += tl.sum(b_1 * b_a)
            sum_2 += tl.sum(b_2 * b_a)
    else:
        o_part = tl.arange(0, MOST_PARTS)
        p_moments = moments + (i_group * parts + o_part) * 2
        sum_1 = tl.sum(load_at(p_moments, 0, o_part < parts))
        sum_2 = tl.sum(load_at(p_moments, 1, o_part < parts))

    if STAGE == MEASURE:
        p_moments = moments + (i_group * parts + i_part) * 2
        tl.store(p_moments, sum_1)
        tl.store(p_moments + 1, sum_2)
    else:
        mean_1 = 0.0 if RMS else sum_1 / n
        mean_2 = sum_2 / n
        for c0 in range(0, width, BCH):
            o_c = along(c0, BCH, 1 - P_AXIS)
            m_c = o_c < width
            b_a, b_t = affine_of(
                w, b, scale, shift, i_sample, scale_stride, shift_stride, first_channel + o_c,
                m_c, m_c, ALIGNED,
            )  # fmt: skip
            for p0 in range(begin, end, BP):
                o, m = places_of(first, o_c, m_c, p0, end, inner, channels, BP, LAST)
                b_dz, b_h = dz_and_h(grad, x, o, m, mean, rstd, b_a, b_t, ACT)  # [BR, BC]
                b_dx = (b_dz * b_a - mean_1 - b_h * mean_2) * rstd
                if grad_sum is not None:
                    b_dx += load_at(grad_sum, o, m)
                if gate is not None:
                    b_d = b_dx * condition_at(gate, i_sample, gate_stride, o_c, m_c, ALIGNED)
                    tl.store(d_add + o, b_d.to(d_add.dtype.element_ty), mask=m)
                tl.store(dx + o, b_dx.to(dx.dtype.element_ty), mask=m)


# ---- sums of partial sums ------------------------------------------------------------------------


@triton.jit
def added(p, parts, step, m_c, BP: tl.constexpr, BC: tl.constexpr):
    """The sum of p, p + step, ...; p and the result are [1, BC]."""
    b_sum = tl.zeros([BP, BC], tl.float32)
    for at in range(0, parts, BP):
        o_part = at + tl.arange(0, BP)[:, None]  # [BP, 1]
        b_sum += load_at(p, o_part * step, (o_part < parts) & m_c)
    return tl.sum(b_sum, axis=0, keep_dims=True)


@triton.jit(do_not_specialize=["scale_stride", "d_stride", "parts", "cols", "tiles"])
def normalize_sums_kernel(
    partial, dw, db, d_scale, d_shift, d_gate, w, b, scale,
    scale_stride: tl.int64, d_stride: tl.int64, parts: tl.int64, cols: tl.int64, tiles: tl.int32,
    K: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """What a sample's S1, S2 and S3 of partial, fp32 [samples, parts, K, cols], are gradients of.
    Those of w and b are of one sample, d_stride elements behind the last one's."""
    i = tl.program_id(0)
    i_sample = (i // tiles).to(tl.int64)
    o_c = (i - i_sample * tiles) * BC + tl.arange(0, BC)[None, :]  # [1, BC]
    m_c = o_c < cols
    o, step = i_sample * cols + o_c, K * cols
    p = partial + i_sample * parts * step + o_c
    b_1 = added(p, parts, step, m_c, BP, BC)  # [1, BC]
    b_2 = added(p + cols, parts, step, m_c, BP, BC)
    if d_shift is not None:
        tl.store(d_shift + o, b_1, mask=m_c)
    if d_scale is not None:
        b_d = b_2
        if w is not None:
            b_d = b_d * load_at(w, o_c, m_c)
        if b is not None:
            b_d += b_1 * load_at(b, o_c, m_c)
        tl.store(d_scale + o, b_d, mask=m_c)
    if d_gate is not None:
        tl.store(d_gate + o, added(p + 2 * cols, parts, step, m_c, BP, BC), mask=m_c)
    if scale is not None:
        b_s = load_at(scale, i_sample * scale_stride + o_c, m_c) + 1.0
        b_1 = b_1 * b_s
        b_2 = b_2 * b_s
    if dw is not None:
        tl.store(dw + i_sample * d_stride + o_c, b_2, mask=m_c)
    if db is not None:
        tl.store(db + i_sample * d_stride + o_c, b_1, mask=m_c)


# ---- launchers -----------------------------------------------------------------------------------

# Elements of a thread, each with up to three sums; in rows off 8 elements each has its own address:
# 8 spilled with Triton 3.6, and so did 4 of 16 warps. Columns of a row that lies in registers.
_EACH = {True: 8, False: 4}
_ROW = {True: 4096, False: 1024}
# Programs that fill a GPU, and the fewest tiles of one that adds up: its row of partial sums, fp32
# and read again, weighs as much as two rows of tensors.
_PROGRAMS, _TILES = 512, 8


def _conclude(partial, dw, db, of_samples, w, b, scale) -> None:
    """The gradients of partial [samples, parts, K, channels]; of_samples: of scale, shift, gate."""
    samples, parts, K, cols = partial.shape
    if scale is None and all(d is None for d in of_samples):
        samples, parts = 1, samples * parts
    apart, to_w, to_b, d_stride = None, dw, db, 0
    if samples > 1 and (dw is not None or db is not None):
        apart, d_stride = partial.new_empty((samples, 1, 2, cols)), 2 * cols
        to_b, to_w = apart[0, 0]  # S1, S2
    stride = 0 if scale is None else scale.stride(0)
    tiles = ceil_div(cols, 32)  # 128 bytes of a row
    args = (partial, to_w, to_b, *of_samples, w, b, scale, stride, d_stride, parts, cols, tiles)
    flags = {"K": K, "BP": 64, "BC": 32, "enable_fp_fusion": True}
    launch(normalize_sums_kernel, samples * tiles, partial, *args, **flags)
    if apart is not None:
        _conclude(apart, dw, db, (None,) * 3, None, None, None)


def _rows(tensors, strides, p, samples, kinds, codes, sums_alone):
    """Starts the rows' kernel; its partial sums of so many kinds, if any."""
    br, bc = row_tile(min(p.channels, 1024 if sums_alone else _ROW[p.aligned]))
    rows, tiles = p.count(), ceil_div(p.channels, bc)
    per_sample, per_part, partial = rows // samples, br, None
    if kinds:
        least = max(_PROGRAMS // (samples * tiles), 1)
        per_part = max(ceil_div(ceil_div(per_sample, least), br), _TILES) * br
    parts = ceil_div(per_sample, per_part)
    if kinds:
        partial = tensors[5].new_empty((samples, parts, kinds, p.channels), dtype=torch.float32)
    args = (*tensors, partial, *strides, p.channels, rows, per_sample, parts, per_part, tiles)
    flags = {"K": kinds, "SUMS_ALONE": sums_alone, "ALIGNED": p.aligned, "BR": br, "BC": bc}
    flags["num_warps"] = br * bc // (32 * _EACH[p.aligned])
    launch(normalize_bwd_kernel, samples * parts * tiles, tensors[5], *args, **codes, **flags)
    return partial


def _groups(tensors, strides, p, per_sample, wanted, codes):
    """Starts the groups' kernel; its partial sums, if wanted."""
    parts, numbers, flags = group_grid(p, per_sample)
    count, x, fp32 = p.count(), tensors[5], {"dtype": torch.float32}
    moments = x.new_empty((count, parts, 2), **fp32) if parts > 1 else None
    partial = x.new_empty((p.outer, parts, 2, p.channels), **fp32) if wanted else None
    args = (*tensors[:10], tensors[11], moments, partial, *strides, *numbers)
    for stage in (WHOLE,) if parts == 1 else (MEASURE, APPLY):
        kernel, programs = normalize_groups_bwd_kernel, count * parts
        launch(kernel, programs, x, *args, **codes, **flags, STAGE=stage.value)
    return partial


def normalize_backward(
    grad, grad_sum, dx, dw, db, d_scale, d_shift, d_add, d_gate, statistics, x, w, b, scale, shift,
    add, gate, groups, rms, act, eps, scratch=None,
) -> bool:  # fmt: skip
    """Arguments of the native entry point of this name (scratch is the CUDA kernel's)."""
    p = layout_of(statistics, x, w, b, scale, shift, add, gate, groups, rms, act, eps)
    if p is None or any(t is None for t in (grad, dx, statistics)) or dx.dtype != x.dtype:
        return False
    if groups and grad_sum is not None:
        return False
    like_x = [t for t in (grad, grad_sum, dx) if t is not None]
    if any(t.dtype not in FLOATS or not same_memory(t, x) for t in like_x):
        return False
    of_samples = (d_scale, d_shift, d_gate)
    if not all(vector_of(t, p.channels, x) for t in (dw, db)):
        return False
    if not all(vector_of(t, p.outer * p.channels, x) for t in of_samples):
        return False
    if (d_scale is not None and scale is None) or (d_shift is not None and shift is None):
        return False
    if (d_gate is None) != (gate is None) or (d_add is None) != (gate is None):
        return False
    if gate is not None and (d_add.dtype != add.dtype or not same_memory(d_add, add)):
        return False
    sums = [t for t in (dw, db, *of_samples) if t is not None]
    if x.numel() == 0:
        for t in sums:
            t.zero_()
        return True
    tensors = (grad, grad_sum, dx, d_add, statistics, x, w, b, scale, shift, add, gate)
    strides = strides_of(scale, shift, gate)
    codes = {"RMS": rms, "ACT": act, "enable_fp_fusion": True}
    if groups:
        partial = _groups(tensors, strides, p, 1, bool(sums), codes)
    else:
        by_sample = any(t is not None for t in (scale, shift, gate))
        samples, kinds = p.outer if by_sample else 1, (2 + (gate is not None)) * bool(sums)
        long, partial = p.channels > _ROW[p.aligned], None
        if long:
            _groups(tensors, strides, p.of_long_rows(), p.inner, False, codes)
        if sums or not long:
            partial = _rows(tensors, strides, p, samples, kinds, codes, long)
    if sums:
        _conclude(partial, dw, db, of_samples, w, b, scale)
    return True
