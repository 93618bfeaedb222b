"""The key/value cache: new rows behind the old ones, through the page table when there is one, keys
and queries rotated on the way (rotary embedding, Su et al. 2021)."""

import triton
import triton.language as tl

from .._launch import FLOATS, ceil_div, hidden, launch
from ..rng import shown
from .plan import MAX_HEAD_BYTES, same_layout, too_old, unit_rows
from .score import clamped


@triton.jit
def rotated(p_x, cos, sin, o_at, m_row, o_d, R, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rows p_x [BS, 1] of D elements, the first 2 R of them rotated to positions o_at [BS, 1]:
    (x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos). fp32 [BS, BD]."""
    m = m_row & (o_d < D)
    b_x = tl.load(p_x + o_d, mask=m, other=0.0).to(tl.float32)
    if INTERLEAVED:
        o_r, second, o_other = o_d // 2, o_d % 2 == 1, o_d ^ 1
    else:
        o_r, second = o_d % R, o_d >= R
        o_other = tl.where(second, o_d - R, o_d + R)
    m_r = m & (o_d < 2 * R)
    b_y = tl.load(p_x + o_other, mask=m_r, other=0.0).to(tl.float32)
    b_c = tl.load(cos + o_at * R + o_r, mask=m_r, other=1.0).to(tl.float32)
    b_s = tl.load(sin + o_at * R + o_r, mask=m_r, other=0.0).to(tl.float32)
    b_turned = tl.where(second, b_y * b_s + b_x * b_c, b_x * b_c - b_y * b_s)
    return tl.where(o_d < 2 * R, b_turned, b_x)


NUMBERS = ["H", "S", "tiles", "strides", "table_stride", "page_size", "pages", "entries", "R"]


@triton.jit(do_not_specialize=[*NUMBERS, "capacity", "positions", "step"])
def attention_append_kernel(
    x,  # (B, H, S, D): new keys, values, or queries
    to,  # the cache, or the rotated queries
    strides,  # of x, to: each (b, h, s)
    seqlens,
    leftpad,
    batch_idx,
    block_table,
    table_stride: tl.int64,
    page_size: tl.int64,
    pages: tl.int64,
    entries: tl.int64,
    capacity: tl.int64,
    cos,  # (positions, R) or None
    sin,
    R: tl.int32,
    positions: tl.int64,
    step: tl.int64,  # positions from one row to the next: 1, or 0 for queries without a diagonal
    H: tl.int32,
    S: tl.int32,
    tiles: tl.int32,
    CACHED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    D: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
):
    i = tl.program_id(0)
    i_bh = i // tiles
    i_b, i_h = i_bh // H, i_bh % H
    o_s = (i % tiles) * BS + tl.arange(0, BS)[:, None]  # [BS, 1]
    o_d = tl.arange(0, BD)[None, :]
    m_row = o_s < S
    length = tl.load(seqlens + i_b).to(tl.int64)
    p_x = x + i_b * shown(strides[0][0]) + i_h * shown(strides[0][1])
    p_x += o_s * shown(strides[0][2])
    if cos is not None:
        first = length
        if leftpad is not None:
            first -= tl.load(leftpad + i_b)
        o_at = tl.minimum(tl.maximum(first + o_s * step, 0), positions - 1)
        b_x = rotated(p_x, cos, sin, o_at, m_row, o_d, R, D, INTERLEAVED)  # [BS, BD]
    else:
        b_x = tl.load(p_x + o_d, mask=m_row & (o_d < D), other=0.0)
    i_entry = i_b.to(tl.int64)
    p_to = to + i_h * shown(strides[1][1])
    if CACHED:
        o_row = length + o_s
        m_row = m_row & (o_row >= 0) & (o_row < capacity)
        if batch_idx is not None:
            i_entry = clamped(tl.load(batch_idx + i_b), entries - 1)
        if block_table is not None:
            o_page = o_row // page_size
            b_page = tl.load(block_table + i_b * table_stride + o_page, mask=m_row, other=0)
            m_row = m_row & (b_page >= 0) & (b_page < pages)
            p_to += b_page.to(tl.int64) * shown(strides[1][0])
            o_row = o_row - o_page * page_size
        else:
            p_to += i_entry * shown(strides[1][0])
    else:
        o_row = o_s.to(tl.int64)
        p_to += i_entry * shown(strides[1][0])
    p_to += o_row * shown(strides[1][2])
    tl.store(p_to + o_d, b_x.to(to.dtype.element_ty), mask=m_row & (o_d < D))


def attention_append(
    q, q_out, k, v, k_cache, v_cache, lengths, leftpad, batch_idx, block_table, cos, sin,
    interleaved, q_same_position,
) -> bool:  # fmt: skip
    """Arguments of the native entry point of this name."""
    if q.dim() != 4 or k_cache.dim() != 4 or q.dtype not in FLOATS or lengths is None:
        return False
    if too_old(q.device):  # attention_cached refuses what this would have written
        return False
    tensors = [t for t in (q, q_out, k, v, k_cache, v_cache) if t is not None]
    if any(t.dtype != q.dtype or t.device != q.device or not unit_rows(t) for t in tensors):
        return False
    if (k is None) != (v is None) or (cos is None) != (sin is None):
        return False
    if (cos is None) != (q_out is None) or max(
        t.shape[-1] for t in tensors
    ) * q.element_size() > MAX_HEAD_BYTES:
        return False
    if not same_layout(q.shape[0], q.device, lengths, leftpad, batch_idx, block_table):
        return False
    if k_cache.shape[:3] != v_cache.shape[:3] or k_cache.shape[-1] != q.shape[-1]:
        return False
    if k is not None:
        heads = (q.shape[0], k_cache.shape[1], k.shape[2])
        if k.shape[:3] != heads or v.shape[:3] != heads or k.shape[-1] != q.shape[-1]:
            return False
        if v.shape[-1] != v_cache.shape[-1]:
            return False
        if block_table is None and batch_idx is None and k_cache.shape[0] < q.shape[0]:
            return False
    if cos is not None:
        if cos.shape != sin.shape or cos.dtype != sin.dtype or cos.dtype not in FLOATS:
            return False
        if cos.dim() != 2 or not cos.is_contiguous() or not sin.is_contiguous():
            return False
        if 2 * cos.shape[1] > q.shape[-1] or cos.device != q.device or q_out.shape != q.shape:
            return False
    page, entries = k_cache.shape[2], k_cache.shape[0]
    paged = block_table is not None
    capacity = block_table.shape[1] * page if paged else page
    place = (block_table, block_table.stride(0) if paged else 0, page, entries, entries, capacity)
    turn = (cos, sin, 1 if cos is None else cos.shape[1], 1 if cos is None else cos.shape[0])

    def write(x, to, turned, step, cached):
        B, H, S, D = x.shape
        if x.numel() == 0:
            return
        bd = max(triton.next_power_of_2(D), 16)
        bs = max(min(triton.next_power_of_2(S), 2048 // bd), 1)
        tiles = ceil_div(S, bs)
        args = (
            x,
            to,
            hidden((x.stride()[:3], to.stride()[:3])),
            lengths,
            leftpad,
            batch_idx,
            *place,
        )
        flags = {"CACHED": cached, "INTERLEAVED": interleaved, "D": D, "BS": bs, "BD": bd}
        args = (*args, *turned, step, H, S, tiles)
        launch(attention_append_kernel, B * H * tiles, q, *args, **flags)

    nothing = (None, None, 1, 1)
    if k is not None:
        write(k, k_cache, turn if cos is not None else nothing, 1, True)
        write(v, v_cache, nothing, 1, True)
    if cos is not None:
        write(q, q_out, turn, 0 if q_same_position else 1, False)
    return True
