"""Gumbel-softmax and the relaxed Bernoulli, forward and backward."""

import torch
import triton
import triton.language as tl

from .._launch import as_rows, ceil_div, launch, takes
from ..rng import (
    GUMBEL,
    LOGISTIC,
    SCALARS,
    Draw,
    multiple_of_8,
    noise_blocks,
    place,
    seed_of_rows,
    tile_columns,
)
from .maths import exp_of, sigmoid_of


@triton.jit(do_not_specialize=["logits_stride", "grad_stride", "y_stride", *SCALARS])
def relaxed_bernoulli_kernel(
    logits,
    grad,
    y,
    logits_stride: tl.int64,
    grad_stride: tl.int64,
    y_stride: tl.int64,
    seeds,
    seed: tl.int64,
    stream: tl.int64,
    offset: tl.int64,
    per_seed: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    tiles: tl.int32,
    tau,  # fp32, one element
    HARD: tl.constexpr,
    SEEDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    cols = multiple_of_8(cols, ALIGNED)
    logits_stride = multiple_of_8(logits_stride, ALIGNED)
    y_stride = multiple_of_8(y_stride, ALIGNED)
    o_row, m_row, first = place(tiles, rows, BR, BC)
    b_seed, o_in = seed_of_rows(seeds, seed, o_row, m_row, per_seed, SEEDS)
    b_block, o_col, m = tile_columns(o_in, m_row, first, cols, offset, ALIGNED, BC)
    inv_tau = tl.div_rn(1.0, tl.load(tau))
    # [BR, BC]
    b_l = tl.load(logits + (o_row * logits_stride + first) + o_col, mask=m, other=0.0)
    b_noise = noise_blocks(b_block, b_seed, stream.to(tl.int64), LOGISTIC)
    b_x = (b_l.to(tl.float32) + b_noise) * inv_tau
    if HARD:
        b_v = tl.where(b_x > 0.0, 1.0, tl.where(b_x == b_x, 0.0, b_x))
    else:
        b_v = sigmoid_of(b_x)
    if grad is not None:  # y takes d_logits
        grad_stride = multiple_of_8(grad_stride, ALIGNED)
        b_g = tl.load(grad + (o_row * grad_stride + first) + o_col, mask=m, other=0.0)
        b_v = (b_g.to(tl.float32) * (b_v * sigmoid_of(-b_x))) * inv_tau
    tl.store(y + (o_row * y_stride + first) + o_col, b_v.to(y.dtype.element_ty), mask=m)


def number(tau: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
    """A temperature on the CPU goes along as a fill on `beside`'s device: a copy would wait."""
    if tau.is_cpu and not beside.is_cpu:
        return torch.full((), tau.item(), dtype=tau.dtype, device=beside.device)
    return tau


def relaxed_bernoulli(logits, y, tau, grad, seed, seeds, stream, offset, hard) -> bool:
    """Arguments of the native entry point of this name."""
    tau = number(tau, logits)
    small = ((tau, torch.float32, 1),)
    if not takes(logits, y, grad, seeds=seeds, small=small, offset=offset):
        return False
    if logits.numel() == 0:
        return True
    r = as_rows([logits, grad], [y], split=seeds is not None and seeds.numel() > 1)
    d = Draw(r, seed, seeds, stream, offset)
    launch(
        relaxed_bernoulli_kernel,
        d.programs,
        logits,
        *r.tensors,
        *r.strides,
        *d.noise,
        *d.shape,
        tau,
        HARD=bool(hard) and grad is None,
        **d.flags,
    )
    return r.finish()


# ---- Gumbel-softmax: rows over the last dimension ------------------------------------------------


@triton.jit
def perturbed(
    p_row, first, b_seed, o_in, m_row, cols, stream, offset, inv_tau,
    ALIGNED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """(logits + g) / tau of a tile [BR, BC], -inf outside; columns relative to `first`; mask."""
    b_block, o_col, m = tile_columns(o_in, m_row, first, cols, offset, ALIGNED, BC)
    b_l = tl.load(p_row + first + o_col, mask=m, other=0.0).to(tl.float32)  # [BR, BC]
    b_g = noise_blocks(b_block, b_seed, stream.to(tl.int64), GUMBEL)
    return tl.where(m, (b_l + b_g) * inv_tau, float("-inf")), o_col, m


@triton.jit
def grown(b_m, b_v):
    """The running maximum with b_v in it [BR, 1], 0 in place of -inf: a row may start masked."""
    b_new = tl.maximum(b_m, tl.max(b_v, axis=1, keep_dims=True))
    return b_new, tl.where(b_new == float("-inf"), 0.0, b_new)


@triton.jit
def best_of_row(
    p_row, i_from, i_to, b_seed, o_in, m_row, cols, stream, offset, inv_tau,
    ALIGNED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Largest perturbed value in tiles [i_from, i_to), NaN when there is one; its lowest index;
    whether it is not finite. All [BR, 1]."""
    b_top = tl.full([BR, BC], float("-inf"), tl.float32)
    b_best = tl.zeros([BR, BC], tl.int32)  # rows are shorter than 2^31: saves 8 registers of 16
    for first in range(i_from * BC, i_to * BC, BC):
        b_v, o_col, m = perturbed(
            p_row, first, b_seed, o_in, m_row, cols, stream, offset, inv_tau, ALIGNED, BC
        )
        b_better = (b_v > b_top) | (b_v != b_v)  # strictly: the earlier index stays; NaN sticks
        b_top = tl.where(b_better, b_v, b_top)
        b_best = tl.where(b_better, (cols * 0 + first).to(tl.int32) + o_col, b_best)
    b_nan = tl.max((b_top != b_top).to(tl.int32), axis=1, keep_dims=True) > 0
    b_row = tl.max(b_top, axis=1, keep_dims=True)
    b_best = tl.where(b_top == b_row, b_best, 2147483647)
    b_row = tl.where(b_nan, float("nan"), b_row)
    b_index = tl.min(b_best, axis=1, keep_dims=True).to(tl.int64)
    return b_row, b_index, ~((b_row > float("-inf")) & (b_row < float("inf")))


@triton.jit(do_not_specialize=["logits_stride", "y_stride", *SCALARS])
def gumbel_softmax_fwd_kernel(
    logits,
    y,
    logits_stride: tl.int64,
    y_stride: tl.int64,
    seeds,
    seed: tl.int64,
    stream: tl.int64,
    offset: tl.int64,
    per_seed: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    tiles: tl.int32,  # of a row; this program walks over them
    tau,  # fp32, one element
    HARD: tl.constexpr,
    ONE_TILE: tl.constexpr,
    SEEDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    cols = multiple_of_8(cols, ALIGNED)
    logits_stride = multiple_of_8(logits_stride, ALIGNED)
    y_stride = multiple_of_8(y_stride, ALIGNED)
    o_row, m_row, first = place(1, rows, BR, BC)
    tiles = tiles.to(tl.int64)
    b_seed, o_in = seed_of_rows(seeds, seed, o_row, m_row, per_seed, SEEDS)
    inv_tau = tl.div_rn(1.0, tl.load(tau))
    p_row = logits + o_row * logits_stride  # [BR, 1]
    p_y = y + o_row * y_stride  # [BR, 1]
    dtype: tl.constexpr = y.dtype.element_ty
    if HARD:
        b_top, b_best, b_bad = best_of_row(
            p_row,
            tiles * 0,
            tiles,
            b_seed,
            o_in,
            m_row,
            cols,
            stream,
            offset,
            inv_tau,
            ALIGNED,
            BR,
            BC,
        )
        for first in range(0, tiles * BC, BC):
            o_col = first + tl.arange(0, BC)[None, :]
            b_y = tl.where(o_col == b_best, 1.0, 0.0)
            b_y = tl.where(b_bad, float("nan"), b_y)
            tl.store(p_y + o_col, b_y.to(dtype), mask=m_row & (o_col < cols))
    elif ONE_TILE:
        b_v, o_col, m = perturbed(
            p_row, first, b_seed, o_in, m_row, cols, stream, offset, inv_tau, ALIGNED, BC
        )
        b_e = exp_of(b_v - tl.max(b_v, axis=1, keep_dims=True))
        b_y = b_e * tl.div_rn(1.0, tl.sum(b_e, axis=1, keep_dims=True))
        tl.store(p_y + o_col, b_y.to(dtype), mask=m)
    else:
        b_m = tl.full([BR, 1], float("-inf"), tl.float32)
        b_total = tl.zeros([BR, 1], tl.float32)
        for first in range(0, tiles * BC, BC):
            b_v, o_col, m = perturbed(
                p_row, first, b_seed, o_in, m_row, cols, stream, offset, inv_tau, ALIGNED, BC
            )
            b_new, b_safe = grown(b_m, b_v)
            b_sum = tl.sum(exp_of(b_v - b_safe), axis=1, keep_dims=True)
            b_total = b_total * exp_of(b_m - b_safe) + b_sum
            b_m = b_new
        b_scale = tl.div_rn(1.0, b_total)
        for first in range(
            0, tiles * BC, BC
        ):  # the noise is drawn again: cheaper than a trip through memory
            b_v, o_col, m = perturbed(
                p_row, first, b_seed, o_in, m_row, cols, stream, offset, inv_tau, ALIGNED, BC
            )
            tl.store(p_y + first + o_col, (exp_of(b_v - b_m) * b_scale).to(dtype), mask=m)


@triton.jit(
    do_not_specialize=["grad_stride", "y_stride", "logits_stride", "d_logits_stride", *SCALARS]
)
def gumbel_softmax_bwd_kernel(
    grad,
    y,  # the soft sample, or None: drawn again from logits
    logits,
    d_logits,
    grad_stride: tl.int64,
    y_stride: tl.int64,
    logits_stride: tl.int64,
    d_logits_stride: tl.int64,
    seeds,
    seed: tl.int64,
    stream: tl.int64,
    offset: tl.int64,
    per_seed: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    tiles: tl.int32,
    tau,
    ONE_TILE: tl.constexpr,
    SEEDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """d_logits = y (grad - <grad, y>) / tau."""
    cols = multiple_of_8(cols, ALIGNED)
    grad_stride = multiple_of_8(grad_stride, ALIGNED)
    d_logits_stride = multiple_of_8(d_logits_stride, ALIGNED)
    o_row, m_row, first = place(1, rows, BR, BC)
    tiles = tiles.to(tl.int64)
    b_seed, o_in = seed_of_rows(seeds, seed, o_row, m_row, per_seed, SEEDS)
    inv_tau = tl.div_rn(1.0, tl.load(tau))
    p_grad = grad + o_row * grad_stride  # [BR, 1]
    p_d = d_logits + o_row * d_logits_stride  # [BR, 1]
    if y is not None:
        p_row = y + o_row * multiple_of_8(y_stride, ALIGNED)  # [BR, 1]
    else:
        p_row = logits + o_row * multiple_of_8(logits_stride, ALIGNED)  # [BR, 1]
    dtype: tl.constexpr = d_logits.dtype.element_ty
    if ONE_TILE:
        if y is not None:
            b_block, o_col, m = tile_columns(o_in, m_row, first, cols, offset, ALIGNED, BC)
            b_y = tl.load(p_row + o_col, mask=m, other=0.0).to(tl.float32)  # [BR, BC]
        else:
            b_v, o_col, m = perturbed(
                p_row, first, b_seed, o_in, m_row, cols, stream, offset, inv_tau, ALIGNED, BC
            )
            b_e = exp_of(b_v - tl.max(b_v, axis=1, keep_dims=True))
            b_y = b_e * tl.div_rn(1.0, tl.sum(b_e, axis=1, keep_dims=True))
        b_g = tl.load(p_grad + o_col, mask=m, other=0.0).to(tl.float32)  # [BR, BC]
        b_dot = tl.sum(b_g * b_y, axis=1, keep_dims=True)
        tl.store(p_d + o_col, ((b_y * (b_g - b_dot)) * inv_tau).to(dtype), mask=m)
    else:
        b_m = tl.full([BR, 1], float("-inf"), tl.float32)
        b_total = tl.zeros([BR, 1], tl.float32)
        b_dot = tl.zeros([BR, 1], tl.float32)
        for first in range(0, tiles * BC, BC):
            if y is not None:
                b_block, o_col, m = tile_columns(o_in, m_row, first, cols, offset, ALIGNED, BC)
                b_y = tl.load(p_row + first + o_col, mask=m, other=0.0).to(tl.float32)
                b_g = tl.load(p_grad + first + o_col, mask=m, other=0.0).to(tl.float32)
                b_dot += tl.sum(b_g * b_y, axis=1, keep_dims=True)
            else:
                b_v, o_col, m = perturbed(
                    p_row, first, b_seed, o_in, m_row, cols, stream, offset, inv_tau, ALIGNED, BC
                )
                b_g = tl.load(p_grad + first + o_col, mask=m, other=0.0).to(tl.float32)
                b_new, b_safe = grown(b_m, b_v)
                b_e = exp_of(b_v - b_safe)
                b_shrink = exp_of(b_m - b_safe)
                b_total = b_total * b_shrink + tl.sum(b_e, axis=1, keep_dims=True)
                b_dot = b_dot * b_shrink + tl.sum(b_e * b_g, axis=1, keep_dims=True)
                b_m = b_new
        if y is None:
            b_scale = tl.div_rn(1.0, b_total)
            b_dot = b_dot * b_scale
        for first in range(0, tiles * BC, BC):
            if y is not None:
                b_block, o_col, m = tile_columns(o_in, m_row, first, cols, offset, ALIGNED, BC)
                b_y = tl.load(p_row + first + o_col, mask=m, other=0.0).to(tl.float32)
            else:
                b_v, o_col, m = perturbed(
                    p_row, first, b_seed, o_in, m_row, cols, stream, offset, inv_tau, ALIGNED, BC
                )
                b_y = exp_of(b_v - b_m) * b_scale
            b_g = tl.load(p_grad + first + o_col, mask=m, other=0.0).to(tl.float32)
            b_d = (b_y * (b_g - b_dot)) * inv_tau
            tl.store(p_d + first + o_col, b_d.to(dtype), mask=m)


def row_draw(r, seed, seeds, stream, offset):
    """Grid of kernels whose programs hold whole rows, or walk over them in tiles of 4096."""
    d = Draw(r, seed, seeds, stream, offset, size=2048 if r.cols <= 2045 else 4096)
    options = {"ONE_TILE": d.tiles == 1, "num_warps": 4 if d.br * d.bc <= 2048 else 8}
    return d, ceil_div(r.rows, d.br), {**d.flags, **options}


def gumbel_softmax(logits, y, tau, seed, seeds, stream, offset, hard) -> bool:
    """Arguments of the native entry point of this name."""
    tau = number(tau, logits)
    small = ((tau, torch.float32, 1),)
    if not takes(logits, y, seeds=seeds, small=small, offset=offset, rows=True):
        return False
    if logits.shape[-1] >= 2**31:  # indices within a row are 32-bit ones
        return False
    if logits.numel() == 0:
        return True
    r = as_rows([logits], [y], first=logits.dim() - 1)
    d, programs, flags = row_draw(r, seed, seeds, stream, offset)
    args = (*r.tensors, *r.strides, *d.noise, *d.shape, tau)
    launch(gumbel_softmax_fwd_kernel, programs, logits, *args, HARD=bool(hard), **flags)
    return r.finish()


def gumbel_softmax_backward(grad, y, logits, tau, d_logits, seed, seeds, stream, offset) -> bool:
    """Arguments of the native entry point of this name."""
    tau = number(tau, grad)
    tensors = (grad, y, None if y is not None else logits, d_logits)
    small = ((tau, torch.float32, 1),)
    if not takes(*tensors, seeds=seeds, small=small, offset=offset, rows=True):
        return False
    if grad.numel() == 0:
        return True
    r = as_rows([*tensors[:3]], [d_logits], first=grad.dim() - 1)
    d, programs, flags = row_draw(r, seed, seeds, stream, offset)
    args = (*r.tensors, *r.strides, *d.noise, *d.shape, tau)
    launch(gumbel_softmax_bwd_kernel, programs, grad, *args, **flags)
    return r.finish()
