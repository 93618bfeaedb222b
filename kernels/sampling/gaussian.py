"""y = T(mu + e^(logvar/2) eps) with a side sum, and its backward, which draws eps again."""

import torch
import triton
import triton.language as tl

from .._launch import as_rows, ceil_div, launch, takes
from ..rng import (
    NORMAL,
    SCALARS,
    Draw,
    multiple_of_8,
    noise_blocks,
    place,
    seed_of_rows,
    tile_columns,
)
from .maths import (
    KL,
    LN_2_PI,
    LOG_PROB,
    exp_of,
    log_slope,
    log_slope_gradient,
    slope,
    transform_value,
)


@triton.jit(do_not_specialize=["mu_stride", "logvar_stride", "y_stride", *SCALARS, "side_scale"])
def reparameterize_fwd_kernel(
    mu,
    logvar,
    y,
    mu_stride: tl.int64,
    logvar_stride: tl.int64,
    y_stride: tl.int64,
    seeds,
    seed: tl.int64,
    stream: tl.int64,
    offset: tl.int64,
    per_seed: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    tiles: tl.int32,
    side,  # fp32 [rows, tiles]: one partial sum per tile
    side_scale,
    TRANSFORM: tl.constexpr,
    SIDE: tl.constexpr,
    SEEDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    cols = multiple_of_8(cols, ALIGNED)
    mu_stride = multiple_of_8(mu_stride, ALIGNED)
    logvar_stride = multiple_of_8(logvar_stride, ALIGNED)
    o_row, m_row, first = place(tiles, rows, BR, BC)
    b_seed, o_in = seed_of_rows(seeds, seed, o_row, m_row, per_seed, SEEDS)
    b_block, o_col, m = tile_columns(o_in, m_row, first, cols, offset, ALIGNED, BC)
    # [BR, BC]
    b_mu = tl.load(mu + (o_row * mu_stride + first) + o_col, mask=m, other=0.0).to(tl.float32)
    b_logvar = tl.load(logvar + (o_row * logvar_stride + first) + o_col, mask=m, other=0.0)
    b_logvar = b_logvar.to(tl.float32)
    b_sigma = exp_of(b_logvar * 0.5)
    if y is not None or SIDE == LOG_PROB:
        b_eps = noise_blocks(b_block, b_seed, stream.to(tl.int64), NORMAL)
        b_z = b_mu + b_sigma * b_eps
    if y is not None:
        y_stride = multiple_of_8(y_stride, ALIGNED)
        b_y = transform_value(b_z, TRANSFORM).to(y.dtype.element_ty)
        tl.store(y + (o_row * y_stride + first) + o_col, b_y, mask=m)
    if SIDE != 0:
        if SIDE == KL:
            b_term = (((b_mu * b_mu - 1.0) + b_sigma * b_sigma) - b_logvar) * 0.5
        else:
            b_term = ((b_eps * b_eps + b_logvar) + LN_2_PI) * -0.5 - log_slope(b_z, TRANSFORM)
        b_sum = tl.sum(tl.where(m, b_term, 0.0), axis=1) * side_scale  # [BR]
        o_side = tl.reshape(o_row, [BR])
        tl.store(side + o_side * tiles + first // BC, b_sum, mask=o_side < rows)


@triton.jit(
    do_not_specialize=[
        *("grad_y_stride", "mu_stride", "logvar_stride", "d_mu_stride", "d_logvar_stride"),
        *SCALARS,
        *("per_side", "side_scale"),
    ]
)
def reparameterize_bwd_kernel(
    grad_y,
    mu,
    logvar,
    d_mu,
    d_logvar,
    grad_y_stride: tl.int64,
    mu_stride: tl.int64,
    logvar_stride: tl.int64,
    d_mu_stride: tl.int64,
    d_logvar_stride: tl.int64,
    seeds,
    seed: tl.int64,
    stream: tl.int64,
    offset: tl.int64,
    per_seed: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    tiles: tl.int32,
    grad_side,  # fp32 [rows / per_side]
    per_side: tl.int64,
    side_scale,
    TRANSFORM: tl.constexpr,
    SIDE: tl.constexpr,
    SEEDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    cols = multiple_of_8(cols, ALIGNED)
    mu_stride = multiple_of_8(mu_stride, ALIGNED)
    logvar_stride = multiple_of_8(logvar_stride, ALIGNED)
    d_mu_stride = multiple_of_8(d_mu_stride, ALIGNED)
    d_logvar_stride = multiple_of_8(d_logvar_stride, ALIGNED)
    o_row, m_row, first = place(tiles, rows, BR, BC)
    b_seed, o_in = seed_of_rows(seeds, seed, o_row, m_row, per_seed, SEEDS)
    b_block, o_col, m = tile_columns(o_in, m_row, first, cols, offset, ALIGNED, BC)
    # [BR, BC]
    b_mu = tl.load(mu + (o_row * mu_stride + first) + o_col, mask=m, other=0.0).to(tl.float32)
    b_logvar = tl.load(logvar + (o_row * logvar_stride + first) + o_col, mask=m, other=0.0)
    b_sigma = exp_of(b_logvar.to(tl.float32) * 0.5)
    b_gz = tl.zeros([BR, BC], tl.float32)
    b_glogvar = tl.zeros([BR, BC], tl.float32)
    if SIDE != 0:
        b_gs = tl.load(grad_side + o_row // per_side, mask=m_row, other=0.0) * side_scale  # [BR, 1]
    if grad_y is not None or SIDE == LOG_PROB:
        b_eps = noise_blocks(b_block, b_seed, stream.to(tl.int64), NORMAL)
        b_y = transform_value(b_mu + b_sigma * b_eps, TRANSFORM)
        if grad_y is not None:
            grad_y_stride = multiple_of_8(grad_y_stride, ALIGNED)
            b_gy = tl.load(grad_y + (o_row * grad_y_stride + first) + o_col, mask=m, other=0.0)
            b_gz = b_gy.to(tl.float32) * slope(b_y, TRANSFORM)
        if SIDE == LOG_PROB:
            b_gz = b_gz - log_slope_gradient(b_y, TRANSFORM) * b_gs
            b_glogvar = b_glogvar + b_gs * -0.5
        b_glogvar = b_glogvar + (b_gz * (b_sigma * b_eps)) * 0.5
    if SIDE == KL:
        b_gz = b_gz + b_mu * b_gs
        b_glogvar = b_glogvar + (b_sigma * b_sigma - 1.0) * (0.5 * b_gs)
    p_mu = d_mu + (o_row * d_mu_stride + first) + o_col
    p_logvar = d_logvar + (o_row * d_logvar_stride + first) + o_col
    tl.store(p_mu, b_gz.to(d_mu.dtype.element_ty), mask=m)
    tl.store(p_logvar, b_glogvar.to(d_logvar.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["count", "per_program", "programs", "scale"])
def sum_kernel(
    partial,  # fp32 [groups, count]
    out,  # fp32 [groups, programs]
    count: tl.int64,
    per_program: tl.int64,
    programs: tl.int32,
    scale,
    BC: tl.constexpr,
):
    i = tl.program_id(0)
    i_group = (i // programs).to(tl.int64)
    i_first = (i % programs).to(tl.int64) * per_program
    end = tl.minimum(i_first + per_program, count)
    o_col = tl.arange(0, BC)
    b_sum = tl.zeros([BC], tl.float32)
    for at in range(i_first, end, BC):
        b_sum += tl.load(partial + i_group * count + at + o_col, mask=at + o_col < end, other=0.0)
    tl.store(out + i, tl.sum(b_sum, axis=0) * scale)


# Numbers that one program of the second stage adds.
_PER_SUM = 8192


def sum_rows(partial: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    """out[g] = scale * sum of row g of `partial`, in a fixed tree: the same bits every time."""
    groups, count = out.numel(), partial.numel() // max(out.numel(), 1)
    while True:
        programs = ceil_div(count, _PER_SUM)
        last = programs <= 1
        to = out if last else partial.new_empty(groups * programs)
        args = (partial, to, count, _PER_SUM, programs, scale if last else 1.0)
        launch(sum_kernel, groups * programs, out, *args, BC=1024)
        if last:
            return
        partial, count = to, programs


def _split(side, seeds) -> bool:
    """Dim 0 must be among the rows: one sum or one seed per sample."""
    per_sample = side is not None and side.dim() > 0
    return per_sample or (seeds is not None and seeds.numel() > 1)


def reparameterize(
    mu, logvar, y, side, seed, seeds, stream, offset, transform, side_kind, side_scale, scratch=None
) -> bool:
    """Arguments of the native entry point of this name (scratch is the CUDA kernel's)."""
    sums = ((side, torch.float32, mu.shape[0] if mu.dim() else 1),)
    if not takes(mu, logvar, y, seeds=seeds, small=sums, offset=offset):
        return False
    if mu.numel() == 0:
        if side is not None:
            side.zero_()
        return True
    r = as_rows([mu, logvar], [y], split=_split(side, seeds))
    d = Draw(r, seed, seeds, stream, offset)
    partial, scale = side, side_scale
    if side is not None and r.rows * d.tiles != side.numel():
        partial, scale = side.new_empty(r.rows * d.tiles), 1.0
    launch(
        reparameterize_fwd_kernel,
        d.programs,
        mu,
        *r.tensors,
        *r.strides,
        *d.noise,
        *d.shape,
        partial,
        scale,
        TRANSFORM=transform,
        SIDE=side_kind if side is not None else 0,
        **d.flags,
    )
    if partial is not side:
        sum_rows(partial, side, side_scale)
    return r.finish()


def reparameterize_backward(
    grad_y,
    grad_side,
    mu,
    logvar,
    d_mu,
    d_logvar,
    seed,
    seeds,
    stream,
    offset,
    transform,
    side_kind,
    side_scale,
) -> bool:
    """Arguments of the native entry point of this name."""
    sums = ((grad_side, torch.float32, mu.shape[0] if mu.dim() else 1),)
    tensors = (mu, logvar, grad_y, d_mu, d_logvar)
    if not takes(*tensors, seeds=seeds, small=sums, offset=offset):
        return False
    if mu.numel() == 0:
        return True
    r = as_rows([grad_y, mu, logvar], [d_mu, d_logvar], split=_split(grad_side, seeds))
    d = Draw(r, seed, seeds, stream, offset)
    launch(
        reparameterize_bwd_kernel,
        d.programs,
        mu,
        *r.tensors,
        *r.strides,
        *d.noise,
        *d.shape,
        grad_side,
        r.rows // grad_side.numel() if grad_side is not None else 1,
        side_scale,
        TRANSFORM=transform,
        SIDE=side_kind if grad_side is not None else 0,
        **d.flags,
    )
    return r.finish()
