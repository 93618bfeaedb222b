"""Up-sampling, a filter and down-sampling of images in one pass.

Along one axis y[o] = sum over k of f[k] x[(o down + k - before) / up], over the k that divide: the
taps first, first + up, first + 2 up, ... of samples side by side. No noise, so that products and
sums fuse.
"""

import math

import torch
import triton
import triton.language as tl

from .._launch import FLOATS, ceil_div, launch, on_16_bytes, planes_of
from ..rng import multiple_of_8


@triton.jit
def first_tap(o, up, down, lead, shift, ONE_PHASE: tl.constexpr):
    """First tap of the outputs `o` that meets a place of x, and that place."""
    at = o * down.to(o.dtype) + lead.to(o.dtype)
    if ONE_PHASE:
        return at * 0, at - shift.to(o.dtype)
    else:
        up = up.to(o.dtype)
        i = (at + (up - 1)) // up
        return i * up - at, i - shift.to(o.dtype)


@triton.jit(
    do_not_specialize=[
        *("rows", "cols", "tiles", "height", "width", "out_height", "out_width"),
        *("up_y", "up_x", "down_y", "down_x", "lead_y", "lead_x", "shift_y", "shift_x"),
        *("fh", "fw", "taps_y", "taps_x", "f_first", "f_step", "gain"),
    ]
)
def upfirdn2d_kernel(
    x,
    f,  # fp32 [fh, fw], or SEPARABLE [n]
    y,
    rows: tl.int64,  # planes x heights of y; INNER: the pixels of y
    cols: tl.int64,  # width of y; INNER: channels
    tiles: tl.int32,
    height: tl.int64,  # of x
    width: tl.int64,
    out_height: tl.int64,
    out_width: tl.int64,
    up_y: tl.int64,
    up_x: tl.int64,
    down_y: tl.int64,
    down_x: tl.int64,
    lead_y: tl.int64,  # o down + lead >= 0 is the place of o in x, up-sampled and shifted
    lead_x: tl.int64,
    shift_y: tl.int64,
    shift_x: tl.int64,
    fh: tl.int32,
    fw: tl.int32,
    taps_y: tl.int32,  # of one output, at most
    taps_x: tl.int32,
    f_first: tl.int32,
    f_step: tl.int32,  # -1: convolution
    gain: tl.float32,
    SEPARABLE: tl.constexpr,
    ONE_PHASE: tl.constexpr,  # up = 1: a tap is the same for all outputs
    INNER: tl.constexpr,  # channels last
    WIDE: tl.constexpr,  # places in the up-sampled image need 64 bit
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    cols = multiple_of_8(cols, ALIGNED)
    place: tl.constexpr = tl.int64 if WIDE else tl.int32
    i_group = tl.program_id(0) // tiles
    first = (tl.program_id(0) - i_group * tiles).to(tl.int64) * BC
    o_row = i_group.to(place) * BR + tl.arange(0, BR)[:, None]  # [BR, 1]
    o_col = tl.arange(0, BC)[None, :]
    m = (o_row < rows) & (o_col < cols - first)  # [BR, BC]
    if INNER:
        o_x = o_row % out_width.to(place)  # [BR, 1]
        o_line = o_row // out_width.to(place)
    else:
        o_x = first.to(place) + o_col  # [1, BC]
        o_line = o_row
    o_y = o_line % out_height.to(place)  # [BR, 1]
    o_plane = (o_line // out_height.to(place)).to(tl.int64)
    k_y, i_y = first_tap(o_y, up_y, down_y, lead_y, shift_y, ONE_PHASE)  # like o_y
    k_x, i_x = first_tap(o_x, up_x, down_x, lead_x, shift_x, ONE_PHASE)  # like o_x
    o_line = (o_plane * height + i_y) * width
    if INNER:
        p_x, o_in, step = x + ((o_line + i_x) * cols + first), o_col, cols
    else:
        p_x, o_in, step = x + o_line, i_x, 1
    p_f = f + f_first
    end_y, end_x = height.to(place), width.to(place)
    b_sum = tl.zeros([BR, BC], tl.float32)
    for j_y in range(0, taps_y):
        m_y = m & (i_y + j_y >= 0) & (i_y + j_y < end_y)
        o_ky = k_y + j_y * up_y.to(place)
        if SEPARABLE:
            if ONE_PHASE:
                b_fy = tl.load(p_f + f_step * j_y)
            else:
                b_fy = tl.load(p_f + f_step * o_ky, mask=o_ky < fh, other=0.0)  # like o_y
        p_tap = p_x
        for j_x in range(0, taps_x):
            m_x = m_y & (i_x + j_x >= 0) & (i_x + j_x < end_x)
            b_x = tl.load(p_tap + o_in, mask=m_x, other=0.0).to(tl.float32)  # [BR, BC]
            o_kx = k_x + j_x * up_x.to(place)
            if ONE_PHASE:
                b_f = tl.load(p_f + f_step * (j_x if SEPARABLE else j_y * fw + j_x))
            elif SEPARABLE:
                b_f = tl.load(p_f + f_step * o_kx, mask=o_kx < fw, other=0.0)  # like o_x
            else:
                m_f = (o_ky < fh) & (o_kx < fw)
                b_f = tl.load(p_f + f_step * (o_ky * fw + o_kx), mask=m_f, other=0.0)
            if SEPARABLE:
                b_f = b_f * b_fy
            b_sum += b_x * b_f
            p_tap += step
        p_x += width * step
    p_y = y + (o_row.to(tl.int64) * cols + first) + o_col
    tl.store(p_y, (b_sum * gain).to(y.dtype.element_ty), mask=m)


_MOST = 2**31


def _fits(y, x, f, up, down, padding, gain) -> bool:
    """As the native entry point: sizes that fit y, so that nothing beyond a tensor is touched."""
    if any(t.dtype not in FLOATS or t.dim() != 4 or t.device != x.device for t in (y, x)):
        return False
    if f.dtype != torch.float32 or f.device != x.device or not f.is_contiguous():
        return False
    if f.dim() not in (1, 2) or not 0 < f.numel() < _MOST or not math.isfinite(gain):
        return False
    if not all(1 <= n <= _MOST for n in (*up, *down)) or not all(abs(n) <= _MOST for n in padding):
        return False
    if x.shape[:2] != y.shape[:2] or x.shape[1] < 1:
        return False
    for axis, taps in ((0, f.shape[0]), (1, f.shape[-1])):
        n = x.shape[2 + axis]
        room = n * up[axis] + padding[2 * axis] + padding[2 * axis + 1] - taps
        if not 1 <= n <= _MOST or room < 0 or y.shape[2 + axis] != room // down[axis] + 1:
            return False
    return planes_of(x, 1) is not None and planes_of(y, 1) is not None


def upfirdn2d(
    y, x, f, up_x, up_y, down_x, down_y, x0, x1, y0, y1, flip, gain
) -> bool:  # fmt: skip
    """Arguments of the native entry point of this name."""
    up, down, before = (up_y, up_x), (down_y, down_x), (y0, x0)
    if not _fits(y, x, f, up, down, (y0, y1, x0, x1), gain):
        return False
    N, C, H, W = x.shape
    OH, OW = y.shape[2:]
    inner = C > 1 and not x.is_contiguous()
    if not (y.numel() <= 1 or y.stride(1) == 1 if inner else y.is_contiguous()):
        return False
    if y.numel() == 0:
        return True
    # 16 lines of 64 columns, not one of 1024: the lines of a filter find each other's samples in
    # the L1 cache. 64 channels: in 16 bit a line of 128 bytes, which 8 threads load at once; twice
    # the elements, so that a thread has two such loads under way.
    rows, cols = (N * OH * OW, C) if inner else (N * C * OH, OW)
    bc = 16 if cols <= 16 else 64
    br = (2048 if inner else 1024) // bc
    tiles = ceil_div(cols, bc)
    shift = [ceil_div(max(n, 0), u) for n, u in zip(before, up, strict=True)]
    lead = [s * u - n for s, u, n in zip(shift, up, before, strict=True)]
    farthest = max(
        (n + br) * d + abs(b) + 2 * u
        for n, d, b, u in zip((OH, OW), down, before, up, strict=True)
    )  # fmt: skip
    taps = [ceil_div(n, u) for n, u in zip((f.shape[0], f.shape[-1]), up, strict=True)]
    launch(
        upfirdn2d_kernel,
        ceil_div(rows, br) * tiles,
        x,
        x,
        f,
        y,
        rows,
        cols,
        tiles,
        H,
        W,
        OH,
        OW,
        *up,
        *down,
        *lead,
        *shift,
        f.shape[0],
        f.shape[-1],
        *taps,
        0 if flip else f.numel() - 1,
        1 if flip else -1,
        float(gain),
        SEPARABLE=f.dim() == 1,
        ONE_PHASE=up == (1, 1),
        INNER=inner,
        WIDE=max(farthest, H, W, rows, f.numel()) >= 2**30,
        ALIGNED=inner and C % 8 == 0 and on_16_bytes((x, y)),
        BR=br,
        BC=bc,
        enable_fp_fusion=True,
    )
    return True
