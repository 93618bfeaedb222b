"""y = act(((x - mean) rstd w + b) (1 + scale) + shift), and what both directions share.

fp32 inside. Squares are of differences from the mean; of a group of several tiles their moments are
merged (Chan et al. 1983), which reads x once and does not cancel either.

Tensors: scale, shift and gate [samples, channels], statistics as csrc/api/normalization.h says,
`total` the native entry point's `sum`. Numbers: *_stride elements between rows of the conditions.
"""

import torch
import triton
import triton.language as tl

from .._launch import ceil_div, launch, same_memory
from ..gelu import gelu_of, gelu_slope, gelu_tanh_of, gelu_tanh_slope, logistic
from ..rng import multiple_of_8
from .layout import ACTIVATIONS, MOST_PARTS, group_grid, layout_of, row_tile, strides_of

# Values of the native enum NormActivation.
LINEAR, SILU, GELU, GELU_TANH = (tl.constexpr(k) for k in range(ACTIVATIONS))
# What a program does of a group, or of its part of one: all, or one of the two passes.
WHOLE, MEASURE, APPLY = (tl.constexpr(k) for k in range(3))


# ---- activations: csrc/math/normalization.h ------------------------------------------------------


@triton.jit
def activated(z, ACT: tl.constexpr):
    if ACT == SILU:
        s, rest = logistic(z, False)
        return z * s
    elif ACT == GELU:
        return gelu_of(z, False)
    elif ACT == GELU_TANH:
        return gelu_tanh_of(z, False)
    else:
        return z


@triton.jit
def act_slope(z, ACT: tl.constexpr):
    if ACT == SILU:
        s, rest = logistic(z, False)
        return s * (z * rest + 1.0)
    elif ACT == GELU:
        return gelu_slope(z, False)
    else:
        return gelu_tanh_slope(z, False)


# ---- what all kernels do -------------------------------------------------------------------------


@triton.jit
def load_at(p, o, m):
    return tl.load(p + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def condition_at(p, i_sample, stride, o_c, m, ALIGNED: tl.constexpr):
    """The channels o_c of a condition's rows i_sample."""
    return load_at(p, i_sample * multiple_of_8(stride, ALIGNED) + o_c, m)


@triton.jit
def affine_of(
    w, b, scale, shift, i_sample, scale_stride, shift_stride, o_c, m_c, m, ALIGNED: tl.constexpr
):
    """Factor and term of z = h factor + term for the channels o_c, in shapes that broadcast."""
    b_a = tl.full([1, 1], 1.0, tl.float32)
    b_t = tl.zeros([1, 1], tl.float32)
    if w is not None:
        b_a = load_at(w, o_c, m_c)
    if b is not None:
        b_t = load_at(b, o_c, m_c)
    if scale is not None:
        b_s = condition_at(scale, i_sample, scale_stride, o_c, m, ALIGNED) + 1.0
        b_a = b_a * b_s
        if b is not None:
            b_t = b_t * b_s
    if shift is not None:
        b_t = b_t + condition_at(shift, i_sample, shift_stride, o_c, m, ALIGNED)
    return b_a, b_t


@triton.jit
def add_term(
    b_x, add, gate, total, i_sample, gate_stride, o_c, m_gate, o, m, ALIGNED: tl.constexpr
):
    """x + gate add as `total` holds it: the norm is of the rounded sum."""
    b_h = load_at(add, o, m)
    if gate is not None:
        b_h = b_h * condition_at(gate, i_sample, gate_stride, o_c, m_gate, ALIGNED)
    b_sum = (b_x + b_h).to(total.dtype.element_ty)
    tl.store(total + o, b_sum, mask=m)
    return b_sum.to(tl.float32)


@triton.jit
def mean_of(total, n):
    """total / n, all but rounded: the approximate quotient may be two ulp off, 1e-4 of a mean of
    1000, and the rounded one is a call that keeps registers in memory."""
    r = 1.0 / n
    q = total * r
    return q + tl.fma(-q, n, total) * r


@triton.jit
def rstd_of(squares, n, eps):
    """Squares beyond fp32 give NaN, as in PyTorch: 1 / inf would make silent zeros of the group."""
    return tl.rsqrt(squares / n + eps) + (squares - squares)


@triton.jit
def keep(statistics, i, count, mean, rstd, m, RMS: tl.constexpr):
    if statistics is not None:
        if not RMS:
            tl.store(statistics + i, mean, mask=m)
            statistics += count
        tl.store(statistics + i, rstd, mask=m)


STRIDES = ["scale_stride", "shift_stride", "gate_stride"]


@triton.jit(do_not_specialize=[*STRIDES, "rows", "cols", "per_sample", "eps"])
def normalize_fwd_kernel(
    x, y, statistics, w, b, scale, shift, add, gate, total,
    scale_stride: tl.int64, shift_stride: tl.int64, gate_stride: tl.int64,
    rows: tl.int64, cols: tl.int64, per_sample: tl.int64, eps: tl.float32,
    RMS: tl.constexpr, ACT: tl.constexpr, ALIGNED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Whole rows of layer and RMS norm, per_sample of them to a sample."""
    cols = multiple_of_8(cols, ALIGNED)
    o_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]  # [BR, 1]
    o_c = tl.arange(0, BC)[None, :]  # [1, BC]
    m_row, m_c = o_row < rows, o_c < cols
    o, m = o_row * cols + o_c, m_row & m_c
    i_sample = o_row // per_sample
    b_x = load_at(x, o, m)  # [BR, BC]
    if add is not None:
        b_x = add_term(b_x, add, gate, total, i_sample, gate_stride, o_c, m, o, m, ALIGNED)
    b_a, b_t = affine_of(  # up to [BR, BC]
        w, b, scale, shift, i_sample, scale_stride, shift_stride, o_c, m_c, m, ALIGNED
    )
    n = cols.to(tl.float32)
    b_mean = tl.zeros([BR, 1], tl.float32)
    if not RMS:
        b_mean = mean_of(tl.sum(b_x, axis=1, keep_dims=True), n)
        b_x = tl.where(m, b_x - b_mean, 0.0)
    b_rstd = rstd_of(tl.sum(b_x * b_x, axis=1, keep_dims=True), n, eps)  # [BR, 1]
    keep(statistics, o_row, rows, b_mean, b_rstd, m_row, RMS)
    b_y = activated(b_x * b_rstd * b_a + b_t, ACT)
    tl.store(y + o, b_y.to(y.dtype.element_ty), mask=m)


# ---- groups: [inner][channels] with LAST, else [channels][inner] of each sample ------------------


@triton.jit
def merged(n, k, d, squares, n_t, mean_t, squares_t):
    """Moments of n numbers and of n_t more. Their mean is k + d, k that of the first tile: so the
    running mean is rounded as the tiles' means differ, not as large as they are."""
    k = tl.where(n == 0.0, mean_t, k)
    step = (mean_t - k) - d
    share = n_t / (n + n_t)
    return n + n_t, k, d + step * share, squares + (squares_t + step * step * (n * share))


@triton.jit
def group_of(
    parts, per_part, groups, per_sample, width, inner, LAST: tl.constexpr, ALIGNED: tl.constexpr
):
    """This program's group, its sample, the condition's row, its first channel and first element;
    its part, and the first place and the one behind the last of that. All divisions are of 32 bits:
    those of 64 are calls."""
    i = tl.program_id(0)
    i_group = i // parts
    i_part = i - i_group * parts
    i_b = i_group // groups
    i_sample = i_b // per_sample
    first_channel = (i_group - i_b * groups) * width
    i_group, i_b, i_sample = i_group.to(tl.int64), i_b.to(tl.int64), i_sample.to(tl.int64)
    if LAST:
        first = i_b * inner * (groups * width) + first_channel
    else:
        first = i_group * inner * width
    begin = i_part * multiple_of_8(per_part, ALIGNED and not LAST)
    end = tl.minimum(begin + per_part, inner)
    if ALIGNED and not LAST:
        end = tl.multiple_of(end, 8)
    return i_group, i_b, i_sample, first_channel, first, i_part, begin, end


@triton.jit
def along(first, n: tl.constexpr, AXIS: tl.constexpr):
    """n numbers from `first` on: [n, 1] or [1, n]."""
    if AXIS == 0:
        return first + tl.arange(0, n)[:, None]
    else:
        return first + tl.arange(0, n)[None, :]


@triton.jit
def places_of(first, o_c, m_c, p0, end, inner, channels, BP: tl.constexpr, LAST: tl.constexpr):
    """Elements of a group's channels o_c at BP places from p0 on: [BR, BC], and which exist."""
    o_p = along(p0, BP, 0 if LAST else 1)
    if LAST:
        return first + o_p * channels + o_c, m_c & (o_p < end)
    else:
        return first + o_c * inner + o_p, m_c & (o_p < end)


GROUPS = ["groups", "per_sample", "width", "inner", "parts", "per_part", "count"]


@triton.jit(do_not_specialize=[*STRIDES, *GROUPS, "eps"])
def normalize_groups_fwd_kernel(
    x, y, statistics, w, b, scale, shift, add, gate, total, moments,
    scale_stride: tl.int64, shift_stride: tl.int64, gate_stride: tl.int64,
    groups: tl.int32, per_sample: tl.int32, width: tl.int32, inner: tl.int64,
    parts: tl.int32, per_part: tl.int64, count: tl.int64, eps: tl.float32,
    RMS: tl.constexpr, ACT: tl.constexpr, STAGE: tl.constexpr, LAST: tl.constexpr,
    ALIGNED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A group of `width` channels, or with parts per_part places of it. per_sample: so many long
    rows share a condition; count: groups in all; moments: fp32 [count, parts, 2], mean and sum of
    squares of each part."""
    BCH: tl.constexpr = BC if LAST else BR  # channels and places of a tile
    BP: tl.constexpr = BR if LAST else BC
    width = width // 8 * 8 if ALIGNED and LAST else width
    inner = multiple_of_8(inner, ALIGNED and not LAST)
    i_group, i_b, i_sample, first_channel, first, i_part, begin, end = group_of(
        parts, per_part, groups, per_sample, width, inner, LAST, ALIGNED
    )
    channels, n = groups * width, (inner * width).to(tl.float32)

    if STAGE != APPLY:
        n_seen, k, d, squares = 0.0, 0.0, 0.0, 0.0
        for c0 in range(0, width, BCH):
            o_c = along(c0, BCH, 1 if LAST else 0)
            m_c = o_c < width
            for p0 in range(begin, end, BP):
                o, m = places_of(first, o_c, m_c, p0, end, inner, channels, BP, LAST)
                b_x = load_at(x, o, m)  # [BR, BC]
                if add is not None:
                    b_x = add_term(
                        b_x, add, gate, total, i_sample, gate_stride, o_c, m_c, o, m, ALIGNED
                    )
                if RMS:
                    squares += tl.sum(b_x * b_x)
                else:
                    n_t = tl.minimum(width - c0, BCH) * tl.minimum(end - p0, BP)
                    n_t = n_t.to(tl.float32)
                    mean_t = mean_of(tl.sum(b_x), n_t)
                    b_d = tl.where(m, b_x - mean_t, 0.0)
                    n_seen, k, d, squares = merged(
                        n_seen, k, d, squares, n_t, mean_t, tl.sum(b_d * b_d)
                    )
    else:
        o_part = tl.arange(0, MOST_PARTS)
        m_part = o_part < parts
        b_n = (tl.minimum(inner - o_part * per_part, per_part) * width).to(tl.float32)
        p_moments = moments + i_group * parts * 2
        k = tl.load(p_moments)
        b_d = tl.load(p_moments + o_part * 2, mask=m_part, other=0.0) - k  # [parts]
        b_squares = tl.load(p_moments + o_part * 2 + 1, mask=m_part, other=0.0)
        d = tl.sum(tl.where(m_part, b_n * b_d, 0.0)) / n
        b_d = b_d - d
        squares = tl.sum(tl.where(m_part, b_squares + b_n * (b_d * b_d), 0.0))
    mean = k + d

    if STAGE == MEASURE:
        p_moments = moments + (i_group * parts + i_part) * 2
        tl.store(p_moments, mean)
        tl.store(p_moments + 1, squares)
    else:
        rstd = rstd_of(squares, n, eps)
        keep(statistics, i_group, count, mean, rstd, i_part == 0, RMS)
        if add is not None:
            tl.debug_barrier()  # what a thread reads another may have written
            x = total
        for c0 in range(0, width, BCH):
            o_c = along(c0, BCH, 1 if LAST else 0)
            m_c = o_c < width
            b_a, b_t = affine_of(
                w, b, scale, shift, i_sample, scale_stride, shift_stride, first_channel + o_c,
                m_c, m_c, ALIGNED,
            )  # fmt: skip
            for p0 in range(begin, end, BP):
                o, m = places_of(first, o_c, m_c, p0, end, inner, channels, BP, LAST)
                b_y = activated((load_at(x, o, m) - mean) * rstd * b_a + b_t, ACT)  # [BR, BC]
                tl.store(y + o, b_y.to(y.dtype.element_ty), mask=m)


# ---- launcher ------------------------------------------------------------------------------------

# Columns of a row that lies in registers, 16 of a thread. Rows off 8 elements, where each has an
# address of its own, would not fit the 128 registers of 16 warps.
_ROW = {True: 8192, False: 4096}


def normalize(
    y, statistics, total, x, w, b, scale, shift, add, gate, groups, rms, act, eps
) -> bool:  # fmt: skip
    """Arguments of the native entry point of this name."""
    p = layout_of(statistics, x, w, b, scale, shift, add, gate, groups, rms, act, eps)
    if p is None or y is None or (total is None) != (add is None):
        return False
    if any(t is not None and (t.dtype != x.dtype or not same_memory(t, x)) for t in (y, total)):
        return False
    if x.numel() == 0:
        return True
    tensors = (x, y, statistics, w, b, scale, shift, add, gate, total)
    strides = strides_of(scale, shift, gate)
    codes = {"RMS": rms, "ACT": act, "enable_fp_fusion": True}
    if not groups and p.channels <= _ROW[p.aligned]:
        rows, (br, bc) = p.count(), row_tile(p.channels)
        args = (*tensors, *strides, rows, p.channels, p.inner, eps)
        flags = {"ALIGNED": p.aligned, "BR": br, "BC": bc, "num_warps": max(bc // 512, 4)}
        launch(normalize_fwd_kernel, ceil_div(rows, br), x, *args, **codes, **flags)
        return True
    per_sample, p = (1, p) if groups else (p.inner, p.of_long_rows())
    parts, numbers, flags = group_grid(p, per_sample)
    count, moments = p.count(), None
    if parts > 1:
        moments = x.new_empty((count, parts, 2), dtype=torch.float32)
    args = (*tensors, moments, *strides, *numbers, eps)
    for stage in (WHOLE,) if parts == 1 else (MEASURE, APPLY):
        kernel, programs = normalize_groups_fwd_kernel, count * parts
        launch(kernel, programs, x, *args, **codes, **flags, STAGE=stage.value)
    return True
