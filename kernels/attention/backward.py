"""Backward: P is made again from LSE. No atomics: a program owns what it writes, so the bits are
the same every time.

    S = Q K^T,  P = 2^(S - LSE),  dP = dO V^T,  dS = P (dP - delta),  delta = rowsum(dO O) - dLSE
    dV = P^T dO,  dK = dS^T Q,  dQ = dS K

One pass per key block makes dK and dV, one per query block dQ, one per block of the mask its
gradient: two more products than a single pass with atomics. With dropout D (0 or 1 / (1 - p)): dV
takes P D, dS = P (D dP - delta). Softcap multiplies dS by 1 - tanh^2. The sink sees
P_sink = 2^(sink - LSE): dsink = -sum P_sink delta.
"""

import torch
import triton
import triton.language as tl

from .._launch import ceil_div, hidden, launch
from ..rng import shown
from .plan import Call, aligned, config, unit_rows
from .score import (
    ADDITIVE,
    LOG2E,
    SCALARS,
    clamped,
    keeps,
    load_rows,
    product,
    scores,
    sequence_of,
    step,
)


@triton.jit(do_not_specialize=["strides", "Hq", "Sq", "Tq", "tiles"])
def attention_rows_kernel(
    out,
    dout,
    lse,
    dlse,  # or None
    strides,  # of out, dout, lse, dlse: each (b, h, s)
    lse2,  # fp32 [B, Hq, Sq]: LSE in units of log2, +inf for a row that sees nothing: P = 0
    delta,  # fp32 [B, Hq, Sq]
    cu_q,
    Hq: tl.int32,
    Sq: tl.int32,
    Tq: tl.int64,
    tiles: tl.int32,
    DV: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
):
    i = tl.program_id(0)
    i_bh = i // tiles
    i_b, i_h = i_bh // Hq, i_bh % Hq
    q_row = i_b.to(tl.int64) * 0
    n_q = Sq.to(tl.int64)
    if cu_q is not None:
        q_row = clamped(tl.load(cu_q + i_b), Tq)
        n_q = clamped(clamped(tl.load(cu_q + i_b + 1), Tq) - q_row, Sq)
    o_i = (i % tiles) * BM + tl.arange(0, BM)[:, None]  # [BM, 1]
    m_row = o_i < n_q
    o_x = tl.arange(0, BV)[None, :]
    m = m_row & (o_x < DV)
    p_out = out + i_b * step(strides[0][0], ALIGNED) + i_h * step(strides[0][1], ALIGNED)
    p_dout = dout + i_b * step(strides[1][0], ALIGNED) + i_h * step(strides[1][1], ALIGNED)
    p_lse = lse + i_b * shown(strides[2][0]) + i_h * shown(strides[2][1])
    b_o = tl.load(p_out + (q_row + o_i) * step(strides[0][2], ALIGNED) + o_x, mask=m, other=0.0)
    b_do = tl.load(p_dout + (q_row + o_i) * step(strides[1][2], ALIGNED) + o_x, mask=m, other=0.0)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), axis=1, keep_dims=True)  # [BM, 1]
    b_lse = tl.load(p_lse + (q_row + o_i) * shown(strides[2][2]), mask=m_row, other=0.0)
    if dlse is not None:
        p_dlse = dlse + i_b * shown(strides[3][0]) + i_h * shown(strides[3][1])
        b_delta -= tl.load(p_dlse + (q_row + o_i) * shown(strides[3][2]), mask=m_row, other=0.0)
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
    o_row = i_bh.to(tl.int64) * Sq + o_i
    m_all = o_i < Sq  # rows behind a packed sequence: P = 0
    tl.store(lse2 + o_row, tl.where(m_row, b_lse, float("inf")), mask=m_all)
    tl.store(delta + o_row, tl.where(m_row, b_delta, 0.0), mask=m_all)


@triton.jit
def block_gradients(
    b_s, b_dp, b_lse, b_delta, o_i, o_j, b_keep, i_head, i_b, Sq, Sk, offset, left, right, scale,
    softcap, alibi, alibi_step, mask, mask_strides, keep_scale,
    SOFTCAP: tl.constexpr, MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """P D and dS of a block from q k and dO v; dS after the softcap, and before it."""
    b_s, b_t = scores(
        b_s, o_i, o_j, i_head, i_b, Sq, Sk, offset, left, right, scale, softcap, alibi, alibi_step,
        mask, mask_strides, SOFTCAP, MASK, LEFT, RIGHT, True,
    )  # fmt: skip
    b_p = tl.exp2(b_s - b_lse)
    b_pd = b_p
    if DROPOUT:
        b_factor = tl.where(b_keep, keep_scale, 0.0)
        b_pd = b_p * b_factor
        b_dp = b_dp * b_factor
    b_after = b_p * (b_dp - b_delta)
    b_before = b_after
    if SOFTCAP:
        b_before = b_after * (1.0 - b_t * b_t)
    return b_pd, b_after, b_before


@triton.jit(do_not_specialize=[*SCALARS, "tiles", "grad_strides"])
def attention_bwd_kv_kernel(
    q,
    k,
    v,
    strides,  # of q, k, v: each (b, h, s)
    dout,
    dk,
    dv,
    grad_strides,  # of dout, dk, dv
    lse2,  # fp32 [B, Hq, Sq]
    delta,  # fp32 [B, Hq, Sq]
    cu_q,
    cu_k,
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
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    """dK and dV of one key block: walks the query rows of the group's heads that see it."""
    i = tl.program_id(0)
    i_bh = i // tiles
    kv_heads = Hq // GROUP
    i_b, i_h = i_bh // kv_heads, i_bh % kv_heads
    q_row, k_row, entry, n_q, n_k, offset = sequence_of(
        i_b, cu_q, cu_k, None, None, None, 0, Sq, Sk, Tq, Tk, 1, BOTTOM_RIGHT
    )
    begin = (i % tiles) * BN
    if begin < n_k:
        o_j = begin + tl.arange(0, BN)[:, None]  # [BN, 1]
        o_d, o_x = tl.arange(0, BD)[None, :], tl.arange(0, BV)[None, :]
        p_k = k + i_b * step(strides[1][0], ALIGNED)
        p_k += i_h * step(strides[1][1], ALIGNED)
        p_v = v + i_b * step(strides[2][0], ALIGNED)
        p_v += i_h * step(strides[2][1], ALIGNED)
        o_k = (k_row + o_j) * step(strides[1][2], ALIGNED)
        o_v = (k_row + o_j) * step(strides[2][2], ALIGNED)
        b_k = load_rows(p_k, o_k, o_j < n_k, o_d, D, BD, True)  # [BN, BD]
        b_v = load_rows(p_v, o_v, o_j < n_k, o_x, DV, BV, True)  # [BN, BV]
        b_dk = tl.zeros([BN, BD], tl.float32)
        b_dv = tl.zeros([BN, BV], tl.float32)
        low, high = n_q * 0, n_q
        if RIGHT:
            low = tl.maximum(begin - offset - right, 0) // BM * BM
        if LEFT:
            high = tl.minimum(tl.minimum(begin + BN, n_k) - offset + left, n_q)
        q_s = step(strides[0][2], ALIGNED)
        do_s = step(grad_strides[0][2], ALIGNED)
        for g in range(0, GROUP):
            i_head = (i_h * GROUP + g).to(tl.int64)
            p_q = q + i_b * step(strides[0][0], ALIGNED)
            p_q += i_head * step(strides[0][1], ALIGNED)
            p_do = dout + i_b * step(grad_strides[0][0], ALIGNED)
            p_do += i_head * step(grad_strides[0][1], ALIGNED)
            o_stat = (i_b.to(tl.int64) * Hq + i_head) * Sq
            for first in range(low, high, BM):
                o_i = first + tl.arange(0, BM)[None, :]  # [1, BM]
                m_i = o_i < n_q
                b_q = load_rows(
                    p_q, (q_row + o_i) * q_s, m_i, tl.arange(0, BD)[:, None], D, BD, True
                )  # [BD, BM]
                b_do = load_rows(
                    p_do, (q_row + tl.trans(o_i)) * do_s, tl.trans(m_i), o_x, DV, BV, True
                )  # [BM, BV]
                b_lse = tl.load(lse2 + o_stat + o_i, mask=m_i, other=float("inf"))
                b_delta = tl.load(delta + o_stat + o_i, mask=m_i, other=0.0)  # [1, BM]
                b_s = product(b_k, b_q, PRECISION)  # [BN, BM]
                b_dp = product(b_v, tl.trans(b_do), PRECISION)  # [BN, BM]
                b_keep = b_s
                if DROPOUT:
                    b_keep = tl.trans(
                        keeps(
                            i_head, tl.trans(o_i), begin, i_b, Hq, noise_Sq, noise_Sk, seeds, seed,
                            stream, threshold, SEEDS, WHOLE, BM, BN,
                        )
                    )  # fmt: skip
                b_p, b_after, b_ds = block_gradients(
                    b_s, b_dp, b_lse, b_delta, o_i, o_j, b_keep, i_head, i_b, n_q, n_k, offset,
                    left, right, scale, softcap, alibi, alibi_step, mask, mask_strides, keep_scale,
                    SOFTCAP, MASK, LEFT, RIGHT, DROPOUT,
                )  # fmt: skip
                b_dv = tl.dot(b_p.to(b_do.dtype), b_do, acc=b_dv, input_precision=PRECISION)
                b_ds = b_ds.to(b_q.dtype)
                b_dk = tl.dot(b_ds, tl.trans(b_q), acc=b_dk, input_precision=PRECISION)
        p_dk = (
            dk + i_b * step(grad_strides[1][0], ALIGNED) + i_h * step(grad_strides[1][1], ALIGNED)
        )
        p_dv = (
            dv + i_b * step(grad_strides[2][0], ALIGNED) + i_h * step(grad_strides[2][1], ALIGNED)
        )
        p_dk += (k_row + o_j) * step(grad_strides[1][2], ALIGNED)
        p_dv += (k_row + o_j) * step(grad_strides[2][2], ALIGNED)
        b_dk = (b_dk * scale).to(dk.dtype.element_ty)
        tl.store(p_dk + o_d, b_dk, mask=(o_j < n_k) & (o_d < D))
        tl.store(p_dv + o_x, b_dv.to(dv.dtype.element_ty), mask=(o_j < n_k) & (o_x < DV))


@triton.jit
def query_block(
    q, k, v, dout, strides, grad_strides, lse2, delta, i_b, i_head, i_kv, q_row, k_row, first, o_j,
    n_q, n_k, Sq, Hq, D: tl.constexpr, DV: tl.constexpr, ALIGNED: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What a block of query rows from `first` on needs, for dQ and for the mask's gradient."""
    o_i = first + tl.arange(0, BM)[:, None]  # [BM, 1]
    m_i = o_i < n_q
    p_q = q + i_b * step(strides[0][0], ALIGNED)
    p_q += i_head * step(strides[0][1], ALIGNED)
    p_do = dout + i_b * step(grad_strides[0][0], ALIGNED)
    p_do += i_head * step(grad_strides[0][1], ALIGNED)
    o_q = (q_row + o_i) * step(strides[0][2], ALIGNED)
    o_do = (q_row + o_i) * step(grad_strides[0][2], ALIGNED)
    b_q = load_rows(p_q, o_q, m_i, tl.arange(0, BD)[None, :], D, BD, True)  # [BM, BD]
    b_do = load_rows(p_do, o_do, m_i, tl.arange(0, BV)[None, :], DV, BV, True)  # [BM, BV]
    o_stat = (i_b.to(tl.int64) * Hq + i_head) * Sq + o_i
    b_lse = tl.load(lse2 + o_stat, mask=m_i, other=float("inf"))  # [BM, 1]
    b_delta = tl.load(delta + o_stat, mask=m_i, other=0.0)  # [BM, 1]
    return o_i, b_q, b_do, b_lse, b_delta


@triton.jit
def products(
    b_q, b_do, k, v, strides, i_b, i_kv, k_row, o_j, n_k, D: tl.constexpr, DV: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """q k and dO v with keys o_j [1, BN]: both [BM, BN]; and the keys [BD, BN]."""
    p_k = k + i_b * step(strides[1][0], ALIGNED)
    p_k += i_kv * step(strides[1][1], ALIGNED)
    p_v = v + i_b * step(strides[2][0], ALIGNED)
    p_v += i_kv * step(strides[2][1], ALIGNED)
    o_k = (k_row + o_j) * step(strides[1][2], ALIGNED)
    o_v = (k_row + o_j) * step(strides[2][2], ALIGNED)
    b_k = load_rows(p_k, o_k, o_j < n_k, tl.arange(0, BD)[:, None], D, BD, True)  # [BD, BN]
    b_v = load_rows(p_v, o_v, o_j < n_k, tl.arange(0, BV)[:, None], DV, BV, True)  # [BV, BN]
    b_s = product(b_q, b_k, PRECISION)
    b_dp = product(b_do, b_v, PRECISION)
    return b_s, b_dp, b_k


@triton.jit(do_not_specialize=[*SCALARS, "tiles", "grad_strides"])
def attention_bwd_q_kernel(
    q,
    k,
    v,
    strides,  # of q, k, v: each (b, h, s)
    dout,
    dq,
    grad_strides,  # of dout, dq
    lse2,  # fp32 [B, Hq, Sq]
    delta,  # fp32 [B, Hq, Sq]
    cu_q,
    cu_k,
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
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    """dQ of one query block: walks the keys that it sees."""
    i = tl.program_id(0)
    begin = (tiles - 1 - i % tiles) * BM  # the longest causal rows first
    i_bh = i // tiles
    i_b, i_head = i_bh // Hq, (i_bh % Hq).to(tl.int64)
    i_kv = i_head // GROUP
    q_row, k_row, entry, n_q, n_k, offset = sequence_of(
        i_b, cu_q, cu_k, None, None, None, 0, Sq, Sk, Tq, Tk, 1, BOTTOM_RIGHT
    )
    if begin < n_q:
        o_i, b_q, b_do, b_lse, b_delta = query_block(
            q, k, v, dout, strides, grad_strides, lse2, delta, i_b, i_head, i_kv, q_row, k_row,
            begin, 0, n_q, n_k, Sq, Hq, D, DV, ALIGNED, BM, BD, BV,
        )  # fmt: skip
        b_dq = tl.zeros([BM, BD], tl.float32)
        low, high = n_k * 0, n_k
        if LEFT:
            low = tl.maximum(begin + offset - left, 0) // BN * BN
        if RIGHT:
            high = tl.minimum(tl.minimum(begin + BM, n_q) + offset + right, n_k)
        for first in range(low, high, BN):
            o_j = first + tl.arange(0, BN)[None, :]  # [1, BN]
            b_s, b_dp, b_k = products(
                b_q, b_do, k, v, strides, i_b, i_kv, k_row, o_j, n_k, D, DV, ALIGNED, PRECISION,
                BD, BV,
            )  # fmt: skip
            b_keep = b_s
            if DROPOUT:
                b_keep = keeps(
                    i_head, o_i, first, i_b, Hq, noise_Sq, noise_Sk, seeds, seed, stream, threshold,
                    SEEDS, WHOLE, BM, BN,
                )  # fmt: skip
            b_p, b_after, b_ds = block_gradients(
                b_s, b_dp, b_lse, b_delta, o_i, o_j, b_keep, i_head, i_b, n_q, n_k, offset, left,
                right, scale, softcap, alibi, alibi_step, mask, mask_strides, keep_scale, SOFTCAP,
                MASK, LEFT, RIGHT, DROPOUT,
            )  # fmt: skip
            b_ds = b_ds.to(b_k.dtype)
            b_dq = tl.dot(b_ds, tl.trans(b_k), acc=b_dq, input_precision=PRECISION)
        p_dq = (
            dq
            + i_b * step(grad_strides[1][0], ALIGNED)
            + i_head * step(grad_strides[1][1], ALIGNED)
        )
        p_dq += (q_row + o_i) * step(grad_strides[1][2], ALIGNED)
        o_d = tl.arange(0, BD)[None, :]
        b_dq = (b_dq * scale).to(dq.dtype.element_ty)
        tl.store(p_dq + o_d, b_dq, mask=(o_i < n_q) & (o_d < D))


@triton.jit(do_not_specialize=[*SCALARS, "B", "grad_strides", "sizes", "dmask_strides"])
def attention_bwd_mask_kernel(
    q,
    k,
    v,
    strides,  # of q, k, v: each (b, h, s)
    dout,
    grad_strides,  # of dout
    dmask,  # fp32 (B | 1, Hq | 1, Sq | 1, Sk | 1)
    dmask_strides,  # 0 on a broadcast dimension
    sizes,  # programs along batch, heads, query blocks, key blocks
    lse2,  # fp32 [B, Hq, Sq]
    delta,  # fp32 [B, Hq, Sq]
    B: tl.int32,
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
    ALL_B: tl.constexpr,  # summed over, as the next three
    ALL_H: tl.constexpr,
    ALL_I: tl.constexpr,
    ALL_J: tl.constexpr,
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
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    """The elements of the mask that one program owns, summed over broadcast dimensions in order."""
    i = tl.program_id(0)
    size_j, size_i = shown(sizes[3]).to(tl.int32), shown(sizes[2]).to(tl.int32)
    size_h = shown(sizes[1]).to(tl.int32)
    i_j = i % size_j
    i_i = i // size_j % size_i
    i_h = i // size_j // size_i % size_h
    i_b = i // size_j // size_i // size_h
    b_from, b_to = (i_b, i_b + 1) if not ALL_B else (i_b * 0, B)
    h_from, h_to = (i_h, i_h + 1) if not ALL_H else (i_h * 0, Hq)
    q_from, q_to = (i_i * BM, i_i * BM + 1) if not ALL_I else (i_i * 0, Sq)
    k_from, k_to = (i_j * BN, i_j * BN + 1) if not ALL_J else (i_j * 0, Sk)
    offset = Sk - Sq if BOTTOM_RIGHT else Sk * 0
    row = i.to(tl.int64) * 0
    b_sum = tl.zeros([BM, BN], tl.float32)
    for b in range(b_from, b_to):
        at_b = row + b
        for h in range(h_from, h_to):
            i_head = row + h
            for q_first in range(q_from, q_to, BM):
                o_i, b_q, b_do, b_lse, b_delta = query_block(
                    q, k, v, dout, strides, grad_strides, lse2, delta, at_b, i_head,
                    i_head // GROUP, row, row, q_first, 0, Sq, Sk, Sq, Hq, D, DV, ALIGNED, BM, BD,
                    BV,
                )  # fmt: skip
                for first in range(k_from, k_to, BN):
                    o_j = first + tl.arange(0, BN)[None, :]  # [1, BN]
                    b_s, b_dp, b_k = products(
                        b_q, b_do, k, v, strides, at_b, i_head // GROUP, row, o_j, Sk, D, DV,
                        ALIGNED, PRECISION, BD, BV,
                    )  # fmt: skip
                    b_keep = b_s
                    if DROPOUT:
                        b_keep = keeps(
                            i_head, o_i, first, at_b, Hq, noise_Sq, noise_Sk, seeds, seed, stream,
                            threshold, SEEDS, WHOLE, BM, BN,
                        )  # fmt: skip
                    b_p, b_after, b_ds = block_gradients(
                        b_s, b_dp, b_lse, b_delta, o_i, o_j, b_keep, i_head, at_b, Sq, Sk, offset,
                        left, right, scale, softcap, alibi, alibi_step, mask, mask_strides,
                        keep_scale, SOFTCAP, MASK, LEFT, RIGHT, DROPOUT,
                    )  # fmt: skip
                    b_sum += b_after
    o_i = tl.arange(0, BM)[:, None]
    o_j = tl.arange(0, BN)[None, :]
    m_i, m_j = i_i * BM + o_i < Sq, i_j * BN + o_j < Sk
    if ALL_I:
        b_sum = tl.sum(b_sum, axis=0, keep_dims=True)
        o_i, m_i = tl.zeros([1, 1], tl.int32), tl.full([1, 1], True, tl.int1)
    else:
        o_i = i_i * BM + o_i
    if ALL_J:
        b_sum = tl.sum(b_sum, axis=1, keep_dims=True)
        o_j, m_j = tl.zeros([1, 1], tl.int32), tl.full([1, 1], True, tl.int1)
    else:
        o_j = i_j * BN + o_j
    p = dmask + i_b * shown(dmask_strides[0]) + i_h * shown(dmask_strides[1])
    p = p + o_i * shown(dmask_strides[2]) + o_j * shown(dmask_strides[3])
    tl.store(p, b_sum.to(dmask.dtype.element_ty), mask=m_i & m_j)


@triton.jit(do_not_specialize=["B", "Hq", "Sq"])
def attention_bwd_sink_kernel(
    sinks,  # fp32 [Hq]
    dsinks,
    lse2,  # fp32 [B, Hq, Sq]
    delta,
    B: tl.int32,
    Hq: tl.int32,
    Sq: tl.int32,
    BC: tl.constexpr,
):
    i_h = tl.program_id(0)
    sink = tl.load(sinks + i_h) * LOG2E
    b_sum = tl.zeros([BC], tl.float64)
    for b in range(0, B):
        p = (i_h.to(tl.int64) + b * Hq.to(tl.int64)) * Sq
        for first in range(0, Sq, BC):
            o = first + tl.arange(0, BC)
            b_lse = tl.load(lse2 + p + o, mask=o < Sq, other=float("inf"))
            b_delta = tl.load(delta + p + o, mask=o < Sq, other=0.0)
            b_sum += (tl.exp2(sink - b_lse) * b_delta).to(tl.float64)
    tl.store(dsinks + i_h, (-tl.sum(b_sum, axis=0)).to(tl.float32))


def attention_backward(
    dout, dlse, dq, dk, dv, dmask, dsinks, q, k, v, out, lse, mask, cu_q, cu_k, max_q, max_k, alibi,
    sinks, seed, seeds, stream, scale, softcap, left, right, bottom_right, dropout_p,
) -> bool:  # fmt: skip
    """Arguments of the native entry point of this name."""
    c = Call.of(
        q, k, v, mask, cu_q, cu_k, max_q, max_k, alibi, sinks, seed, seeds, stream, scale, softcap,
        left, right, bottom_right, dropout_p,
    )  # fmt: skip
    if c is None or not c.takes_out(out, lse) or dout.shape != out.shape or not unit_rows(dout):
        return False
    pairs = ((q, dq), (k, dk), (v, dv))
    if any(x.shape != g.shape or x.dtype != g.dtype or not unit_rows(g) for x, g in pairs):
        return False
    if dlse is not None and (dlse.shape != lse.shape or dlse.dtype != torch.float32):
        return False
    if dmask is not None and (c.flags["MASK"] != ADDITIVE.value or dmask.shape != mask.shape):
        return False
    if dsinks is not None and sinks is None:
        return False
    if c.packed or c.Sq == 0:  # rows of no sequence, keys that nobody sees
        for x in (dq, dk, dv):
            x.zero_()
    if c.B == 0 or c.Hq == 0 or c.Sq == 0 or c.Sk == 0:
        for x in (dq, dk, dv, dmask):
            if x is not None:
                x.zero_()
        if c.B == 0 or c.Hq == 0 or c.Sq == 0:
            if dsinks is not None:
                dsinks.zero_()
            return True
    lse2, delta = c.scratch(c.B, c.Hq, c.Sq), c.scratch(c.B, c.Hq, c.Sq)
    bm = max(4096 // c.flags["BV"], 4)
    tiles = ceil_div(c.Sq, bm)
    strides = (c.row_strides(out), c.row_strides(dout), c.stats_strides(lse))
    strides = hidden((*strides, c.stats_strides(dlse)))
    args = (out, dout, lse, dlse, strides, lse2, delta, cu_q, c.Hq, c.Sq, c.Tq, tiles)
    flags = {"DV": c.Dv, "BM": bm, "BV": c.flags["BV"], "enable_fp_fusion": True}
    flags["ALIGNED"] = c.Dv % 8 == 0 and aligned(out) and aligned(dout)
    launch(attention_rows_kernel, c.B * c.Hq * tiles, q, *args, **flags)
    if dsinks is not None:
        args = (sinks, dsinks, lse2, delta, c.B, c.Hq, c.Sq)
        launch(attention_bwd_sink_kernel, c.Hq, q, *args, BC=1024)
    if c.Sk == 0:
        return True

    bm, bn, warps, stages = config("backward", c, c.Sq, not c.packed)
    steps = c.row_strides(dout)
    flags = {**c.flags, "GROUP": c.group, "num_warps": warps, "num_stages": stages}
    flags |= {"enable_fp_fusion": True}
    flags["ALIGNED"] &= all(aligned(x) for x in (dout, dq, dk, dv))
    given = (q, q, k, v, hidden(c.strides), dout)
    rest = (lse2, delta, cu_q, cu_k, *c.sizes, *c.options)
    tiles = ceil_div(c.Sk, bn)
    args = (dk, dv, hidden((steps, c.row_strides(dk), c.row_strides(dv))), *rest, tiles)
    programs = c.B * c.Hkv * tiles
    launch(attention_bwd_kv_kernel, programs, *given, *args, BM=bm, BN=bn, **flags)
    tiles = ceil_div(c.Sq, bn)  # rows and keys change places
    args = (dq, hidden((steps, c.row_strides(dq))), *rest, tiles)
    launch(attention_bwd_q_kernel, c.B * c.Hq * tiles, *given, *args, BM=bn, BN=bm, **flags)
    if dmask is not None:
        shape = (*[1] * (4 - dmask.dim()), *dmask.shape)
        along = (*[0] * (4 - dmask.dim()), *dmask.stride())
        full = (c.B, c.Hq, c.Sq, c.Sk)
        every = [m == 1 and f != 1 for m, f in zip(shape, full, strict=True)]
        sizes = (shape[0], shape[1], ceil_div(shape[2], bn), ceil_div(shape[3], bm))
        programs = sizes[0] * sizes[1] * sizes[2] * sizes[3]
        rest = (lse2, delta, c.B, *c.sizes, *c.options)
        names = ("ALL_B", "ALL_H", "ALL_I", "ALL_J")
        flags |= dict(zip(names, every, strict=True))
        args = (hidden((steps,)), dmask, hidden(along), hidden(sizes), *rest)
        launch(attention_bwd_mask_kernel, programs, *given, *args, BM=bn, BN=bm, **flags)
    return True
