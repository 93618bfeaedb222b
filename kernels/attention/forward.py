"""Forward: online softmax over key blocks, with the keys split where the rows alone are too few.

A tile holds BM rows of one key/value head in the order (head of its group, position), as on the
CPU, so a decode step of grouped queries and a long prefill are the same program. Each program walks
three ranges of keys: edge blocks on the left, blocks that all its rows see, edge blocks on the
right. Partial (m, l, O) of split keys are merged in order: the same bits every time.
"""

import triton
import triton.language as tl

from .._launch import ceil_div, hidden, launch
from ..rng import shown
from .plan import NOTHING, Call, aligned, config, descriptors, has_descriptors, same_layout
from .score import (
    LN2,
    LOG2E,
    SCALARS,
    keeps,
    key_offsets,
    load_rows,
    product,
    scores,
    seen,
    sequence_of,
    step,
)


@triton.jit
def attend_block(
    b_o, b_m, b_l, b_q, first, p_k, p_v, k_strides, v_strides, k_row, p_table, page_size, pages,
    o_i, b_head, i_b, i_h, Hq, Sq, Sk, offset, left, right, scale, softcap, alibi, alibi_step, mask,
    mask_strides, seeds, seed, stream, noise_Sq, noise_Sk, threshold,
    D: tl.constexpr, DV: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr, SEEDS: tl.constexpr,
    WHOLE: tl.constexpr, ALIGNED: tl.constexpr, TMA: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One key block: O [BM, BV], running maximum m [BM, 1] (log2 units), running sum l [BM, 1].

    p_k, p_v: the head's first row, or with TMA a descriptor that gives 0 beyond the last key."""
    o_n = tl.arange(0, BN)  # [BN]
    o_j = first + o_n[None, :]  # [1, BN]
    if TMA:
        b_k = p_k.load([i_b, i_h, first, 0]).reshape([BN, BD]).T  # [BD, BN]
    else:
        k_b, k_s = step(k_strides[0], ALIGNED), step(k_strides[2], ALIGNED)
        o_k = key_offsets(first, o_n, Sk, k_row, k_b, k_s, p_table, page_size, pages)[None, :]
        b_k = load_rows(p_k, o_k, o_j < Sk, tl.arange(0, BD)[:, None], D, BD, EDGE)  # [BD, BN]
    b_s = product(b_q, b_k, PRECISION)  # [BM, BN]
    if FOLD:  # a positive factor commutes with the maximum: scaled and shifted in one fused step
        if EDGE:
            m_seen = seen(o_i, o_j, Sk, offset, left, right, LEFT, RIGHT)
            b_s = tl.where(m_seen, b_s, float("-inf"))
        b_scale = scale * LOG2E
        b_top = tl.max(b_s, axis=1, keep_dims=True) * b_scale
    else:
        b_s, b_t = scores(
            b_s, o_i, o_j, b_head, i_b, Sq, Sk, offset, left, right, scale, softcap, alibi,
            alibi_step, mask, mask_strides, SOFTCAP, MASK, LEFT, RIGHT, EDGE,
        )  # fmt: skip
        b_scale = 1.0
        b_top = tl.max(b_s, axis=1, keep_dims=True)
    b_new = tl.maximum(b_m, b_top)
    b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # a row may see nothing so far
    b_p = tl.exp2(b_s * b_scale - b_base)
    b_down = tl.exp2(b_m - b_base)
    b_l = b_l * b_down + tl.sum(b_p, axis=1, keep_dims=True)
    if DROPOUT:
        b_keep = keeps(
            b_head, o_i, first, i_b, Hq, noise_Sq, noise_Sk, seeds, seed, stream, threshold,
            SEEDS, WHOLE, BM, BN,
        )  # fmt: skip
        b_p = tl.where(b_keep, b_p, 0.0)
    if TMA:
        b_v = p_v.load([i_b, i_h, first, 0]).reshape([BN, BV])
    else:
        v_b, v_s = step(v_strides[0], ALIGNED), step(v_strides[2], ALIGNED)
        o_v = key_offsets(first, o_n, Sk, k_row, v_b, v_s, p_table, page_size, pages)[:, None]
        m_v = (first + o_n)[:, None] < Sk
        b_v = load_rows(p_v, o_v, m_v, tl.arange(0, BV)[None, :], DV, BV, EDGE)  # [BN, BV]
    b_o = b_o * b_down
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, acc=b_o, input_precision=PRECISION)
    return b_o, b_new, b_l


@triton.jit
def store_rows(
    b_o, b_m, b_l, o_i, b_head, q_row, i_b, m_row, out, out_strides, lse, lse_strides, sinks,
    keep_scale, DV: tl.constexpr, BV: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """out = O / l, LSE = ln 2 (m + log2 l), with the sink in the denominator."""
    if sinks is not None:
        b_sink = tl.load(sinks + b_head, mask=m_row, other=float("-inf")) * LOG2E  # [BM, 1]
        b_top = tl.maximum(b_m, b_sink)
        b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_down = tl.exp2(b_m - b_base)
        b_l = b_l * b_down + tl.exp2(b_sink - b_base)
        b_o = b_o * b_down
        b_m = b_top
    b_factor = tl.where(b_l == 0.0, 0.0, keep_scale / b_l)
    o_x = tl.arange(0, BV)[None, :]
    p_out = out + i_b * step(out_strides[0], ALIGNED) + b_head * step(out_strides[1], ALIGNED)
    p_out = p_out + (q_row + o_i) * step(out_strides[2], ALIGNED)
    b_o = tl.where(b_l == 0.0, 0.0, b_o * b_factor).to(out.dtype.element_ty)
    tl.store(p_out + o_x, b_o, mask=m_row & (o_x < DV))
    if lse is not None:
        p_lse = lse + i_b * shown(lse_strides[0]) + b_head * shown(lse_strides[1])
        b_lse = tl.where(b_l == 0.0, float("-inf"), (b_m + tl.log2(b_l)) * LN2)
        tl.store(p_lse + (q_row + o_i) * shown(lse_strides[2]), b_lse, mask=m_row)


@triton.jit(do_not_specialize=[*SCALARS, "tiles", "splits", "split_keys"])
def attention_fwd_kernel(
    q,  # (B, Hq, Sq, D), strides below; packed: (T, H, D) with b stride 0
    k,  # (B, Hkv, Sk, D), a descriptor of blocks (1, 1, BN, BD) with TMA
    v,
    out,
    lse,  # fp32 (B, Hq, Sq), or None
    strides,  # of q, k, v, out, lse: each (b, h, s)
    part_o,  # fp32 [splits, B, Hq, Sq, DV], or None
    part_ml,  # fp32 [2, splits, B, Hq, Sq]
    cu_q,
    cu_k,
    seqlens,
    leftpad,
    batch_idx,
    block_table,
    table_stride: tl.int64,
    page_size: tl.int32,
    pages: tl.int64,
    added: tl.int64,
    entries: tl.int64,
    Hq: tl.int32,
    Sq: tl.int32,
    Sk: tl.int32,
    Tq: tl.int64,
    Tk: tl.int64,
    left: tl.int32,
    right: tl.int32,
    scale: tl.float32,
    softcap: tl.float32,
    alibi,
    alibi_step: tl.int64,
    sinks,
    mask,
    mask_strides,
    seeds,
    seed: tl.int64,
    stream: tl.int64,
    noise_Sq: tl.int64,
    noise_Sk: tl.int64,
    threshold: tl.int64,
    keep_scale: tl.float32,
    tiles: tl.int32,
    splits: tl.int32,
    split_keys: tl.int32,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    DROPOUT: tl.constexpr,
    SEEDS: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TMA: tl.constexpr,
    FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    i = tl.program_id(0)
    i_split = i % splits
    i_tile = tiles - 1 - i // splits % tiles  # the longest causal rows first
    i_bh = i // splits // tiles
    kv_heads = Hq // GROUP
    i_b, i_h = i_bh // kv_heads, i_bh % kv_heads
    q_row, k_row, entry, n_q, n_k, offset = sequence_of(
        i_b, cu_q, cu_k, seqlens, leftpad, batch_idx, added, Sq, Sk, Tq, Tk, entries, BOTTOM_RIGHT
    )
    begin = i_tile * BM
    last = tl.minimum(begin + BM, n_q * GROUP) - 1
    if last >= begin:
        o_row = begin + tl.arange(0, BM)[:, None]  # [BM, 1]
        o_g = o_row // n_q if GROUP > 1 else o_row * 0
        o_i = o_row - o_g * n_q
        m_row = o_row <= last
        b_head = (i_h * GROUP + tl.minimum(o_g, GROUP - 1)).to(tl.int64)
        # positions of the first and the last row; all of them when the tile spans heads
        one_head = begin // n_q == last // n_q
        low = tl.where(one_head, begin % n_q, 0) + offset
        high = tl.where(one_head, last % n_q, n_q - 1) + offset

        q_s = step(strides[0][2], ALIGNED)
        o_q = b_head * step(strides[0][1], ALIGNED) + (q_row + o_i) * q_s  # [BM, 1]
        p_q = q + i_b * step(strides[0][0], ALIGNED)
        b_q = load_rows(p_q, o_q, m_row, tl.arange(0, BD)[None, :], D, BD, True)  # [BM, BD]
        p_k, p_v, p_table = k, v, block_table
        if not TMA:
            p_k += i_h * step(strides[1][1], ALIGNED)
            p_v += i_h * step(strides[2][1], ALIGNED)
            if block_table is None:
                p_k += entry * step(strides[1][0], ALIGNED)
                p_v += entry * step(strides[2][0], ALIGNED)
            else:
                p_table += i_b * table_stride

        # keys that some row sees [start, end), keys that all see [all_from, all_to)
        start, all_from = n_k * 0, n_k * 0
        end, all_to = n_k, n_k
        if LEFT:
            start = tl.maximum(low - left, 0)
            all_from = tl.maximum(high - left, 0)
        if RIGHT:
            end = tl.minimum(high + right + 1, n_k)
            all_to = tl.minimum(low + right + 1, n_k)
        start = tl.maximum(start, i_split * split_keys) // BN * BN
        # not below 0, where division truncates upward: rows of a tall bottom-right call see no key
        end = tl.maximum(tl.minimum(end, (i_split + 1) * split_keys), 0)
        all_from = tl.minimum(tl.maximum((all_from + BN - 1) // BN * BN, start), end)
        all_to = tl.maximum(tl.minimum(all_to, end) // BN * BN, all_from)

        b_o = tl.zeros([BM, BV], tl.float32)
        b_m = tl.full([BM, 1], float("-inf"), tl.float32)
        b_l = tl.zeros([BM, 1], tl.float32)
        if LEFT:
            for first in range(start, all_from, BN):
                b_o, b_m, b_l = attend_block(
                    b_o, b_m, b_l, b_q, first, p_k, p_v, strides[1], strides[2], k_row, p_table,
                    page_size, pages, o_i, b_head, i_b, i_h, Hq, n_q, n_k, offset, left, right,
                    scale, softcap, alibi, alibi_step, mask, mask_strides, seeds, seed, stream,
                    noise_Sq, noise_Sk, threshold, D, DV, SOFTCAP, MASK, LEFT, RIGHT, DROPOUT,
                    SEEDS, WHOLE, ALIGNED, TMA, FOLD, PRECISION, BM, BN, BD, BV, True,
                )  # fmt: skip
        # No warp_specialize: for sm_90 Triton 3.6 and 3.9 compile the same code with it, for sm_100
        # both fail on this loop (TritonGPUHoistTMEMAlloc).
        for first in range(all_from, all_to, BN):
            b_o, b_m, b_l = attend_block(
                b_o, b_m, b_l, b_q, first, p_k, p_v, strides[1], strides[2], k_row, p_table,
                page_size, pages, o_i, b_head, i_b, i_h, Hq, n_q, n_k, offset, left, right,
                scale, softcap, alibi, alibi_step, mask, mask_strides, seeds, seed, stream,
                noise_Sq, noise_Sk, threshold, D, DV, SOFTCAP, MASK, LEFT, RIGHT, DROPOUT, SEEDS,
                WHOLE, ALIGNED, TMA, FOLD, PRECISION, BM, BN, BD, BV, False,
            )  # fmt: skip
        for first in range(all_to, end, BN):
            b_o, b_m, b_l = attend_block(
                b_o, b_m, b_l, b_q, first, p_k, p_v, strides[1], strides[2], k_row, p_table,
                page_size, pages, o_i, b_head, i_b, i_h, Hq, n_q, n_k, offset, left, right,
                scale, softcap, alibi, alibi_step, mask, mask_strides, seeds, seed, stream,
                noise_Sq, noise_Sk, threshold, D, DV, SOFTCAP, MASK, LEFT, RIGHT, DROPOUT, SEEDS,
                WHOLE, ALIGNED, TMA, FOLD, PRECISION, BM, BN, BD, BV, True,
            )  # fmt: skip

        if part_o is None:
            store_rows(
                b_o, b_m, b_l, o_i, b_head, q_row, i_b, m_row, out, strides[3], lse, strides[4],
                sinks, keep_scale, DV, BV, ALIGNED,
            )  # fmt: skip
        else:
            batch = tl.num_programs(0) // (splits * tiles * kv_heads)
            rows = (batch * Hq).to(tl.int64) * Sq
            o_part = (i_b.to(tl.int64) * Hq + b_head) * Sq + o_i  # [BM, 1]
            o_x = tl.arange(0, BV)[None, :]
            o_part += i_split * rows
            tl.store(part_o + o_part * DV + o_x, b_o, mask=m_row & (o_x < DV))
            tl.store(part_ml + o_part, b_m, mask=m_row)
            tl.store(part_ml + splits * rows + o_part, b_l, mask=m_row)


@triton.jit(do_not_specialize=["strides", "rows", "Hq", "Sq", "Tq", "splits", "keep_scale"])
def attention_merge_kernel(
    part_o,  # fp32 [splits, rows, DV]
    part_ml,  # fp32 [2, splits, rows]
    out,
    lse,
    strides,  # of out, lse
    cu_q,
    sinks,
    keep_scale: tl.float32,
    rows: tl.int64,  # B Hq Sq
    Hq: tl.int32,
    Sq: tl.int32,
    Tq: tl.int64,
    splits: tl.int32,
    DV: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]  # [BM, 1]
    o_bh = o_row // Sq
    o_i = (o_row - o_bh * Sq).to(tl.int32)
    o_b = o_bh // Hq
    b_head = o_bh - o_b * Hq
    m_row = o_row < rows
    q_row = o_row * 0
    if cu_q is not None:  # positions beyond a sequence's own length hold nothing
        q_row = tl.load(cu_q + o_b, mask=m_row, other=0).to(tl.int64)
        b_end = tl.load(cu_q + o_b + 1, mask=m_row, other=0).to(tl.int64)
        m_row = m_row & (q_row >= 0) & (q_row + o_i < tl.minimum(b_end, Tq))
    b_m = tl.full([BM, 1], float("-inf"), tl.float32)
    for s in range(0, splits):
        b_m = tl.maximum(b_m, tl.load(part_ml + s * rows + o_row, mask=m_row, other=float("-inf")))
    b_base = tl.where(b_m == float("-inf"), 0.0, b_m)
    o_x = tl.arange(0, BV)[None, :]
    b_o = tl.zeros([BM, BV], tl.float32)
    b_l = tl.zeros([BM, 1], tl.float32)
    for s in range(0, splits):
        o_part = s * rows + o_row
        b_down = tl.load(part_ml + o_part, mask=m_row, other=float("-inf"))
        b_down = tl.exp2(b_down - b_base)
        b_l += tl.load(part_ml + splits * rows + o_part, mask=m_row, other=0.0) * b_down
        b_part = tl.load(part_o + o_part * DV + o_x, mask=m_row & (o_x < DV), other=0.0)  # [BM, BV]
        b_o += b_part * b_down
    store_rows(
        b_o, b_m, b_l, o_i, b_head, q_row, o_b, m_row, out, strides[0], lse, strides[1], sinks,
        keep_scale, DV, BV, ALIGNED,
    )  # fmt: skip


# Programs that fill the largest GPUs; with fewer the keys are split, in pieces of at least so many.
_PROGRAMS, _LEAST_KEYS = 256, 512


def _run(c: Call, out, lse, paging=NOTHING) -> bool:
    if c.B == 0 or c.Hq == 0 or c.Sq == 0:
        return True
    rows = c.Sq * c.group
    described = paging is NOTHING and has_descriptors(c)
    bm, bn, warps, stages = config("forward", c, rows, described)
    tiles = ceil_div(rows, bm)
    programs = c.B * c.Hkv * tiles
    # Where the keys are cut depends on the sizes alone, so results do not depend on the machine.
    split_keys = max(c.Sk, 1)
    if programs < _PROGRAMS:
        wanted = ceil_div(_PROGRAMS, programs)
        split_keys = max(ceil_div(c.Sk, wanted), _LEAST_KEYS)
    split_keys = ceil_div(split_keys, 128) * 128
    splits = max(ceil_div(c.Sk, split_keys), 1)
    part_o = part_ml = None
    if splits > 1:
        part_o = c.scratch(splits, c.B, c.Hq, c.Sq, c.Dv)
        part_ml = c.scratch(2, splits, c.B, c.Hq, c.Sq)
    flags = {**c.flags, "ALIGNED": c.flags["ALIGNED"] and aligned(out)}
    keys = descriptors(c, bn) if described else (c.k, c.v)
    flags |= {"TMA": described, "FOLD": c.folds}
    lse_strides = c.stats_strides(lse)
    strides = hidden((*c.strides, c.row_strides(out), lse_strides))
    launch(
        attention_fwd_kernel,
        programs * splits,
        c.q,
        c.q,
        *keys,
        out,
        lse,
        strides,
        part_o,
        part_ml,
        c.cu_q,
        c.cu_k,
        *paging,
        c.entries,
        *c.sizes,
        *c.options,
        tiles,
        splits,
        split_keys,
        GROUP=c.group,
        **flags,
        BM=bm,
        BN=bn,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    if splits > 1:
        total = c.B * c.Hq * c.Sq
        args = (part_o, part_ml, out, lse, strides[3:], c.cu_q, c.sinks, c.keep_scale, total)
        sizes = (c.Hq, c.Sq, c.Tq, splits)
        flags = {k: flags[k] for k in ("DV", "ALIGNED", "BV")} | {"enable_fp_fusion": True}
        launch(attention_merge_kernel, ceil_div(total, 4), c.q, *args, *sizes, BM=4, **flags)
    return True


def attention_forward(
    q, k, v, out, lse, mask, cu_q, cu_k, max_q, max_k, alibi, sinks, seed, seeds, stream, scale,
    softcap, left, right, bottom_right, dropout_p,
) -> bool:  # fmt: skip
    """Arguments of the native entry point of this name."""
    c = Call.of(
        q, k, v, mask, cu_q, cu_k, max_q, max_k, alibi, sinks, seed, seeds, stream, scale, softcap,
        left, right, bottom_right, dropout_p,
    )  # fmt: skip
    if c is None or not c.takes_out(out, lse):
        return False
    if cu_q is not None:  # rows of no sequence
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
    return _run(c, out, lse)


def attention_cached(
    q, k_cache, v_cache, out, lse, lengths, added, leftpad, batch_idx, block_table, alibi, sinks,
    scale, softcap, left, right,
) -> bool:  # fmt: skip
    """Arguments of the native entry point of this name."""
    capacity = None
    if block_table is not None:
        capacity = block_table.shape[1] * k_cache.shape[2]
    c = Call.of(
        q, k_cache, v_cache, None, None, None, 0, 0, alibi, sinks, 0, None, 0, scale, softcap, left,
        right, True, 0.0, capacity=capacity,
    )  # fmt: skip
    if c is None or not c.takes_out(out, lse):
        return False
    if not same_layout(c.B, q.device, lengths, leftpad, batch_idx, block_table):
        return False
    if block_table is None and batch_idx is None and c.entries < c.B:
        return False
    paged = block_table is not None
    table_stride = block_table.stride(0) if paged else 0
    place = (lengths, leftpad, batch_idx, block_table, table_stride)
    return _run(c, out, lse, (*place, k_cache.shape[2], c.entries, added))
