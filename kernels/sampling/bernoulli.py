"""The Bernoulli likelihood of logits, summed per sample, and its gradients."""

import torch
import triton
import triton.language as tl

from .._launch import as_rows, ceil_div, launch, takes
from ..rng import multiple_of_8, place, tile
from .gaussian import sum_rows
from .maths import sigmoid_of, softplus_of


@triton.jit(do_not_specialize=["logits_stride", "x_stride", "rows", "cols", "tiles"])
def bernoulli_nll_fwd_kernel(
    logits,
    x,
    logits_stride: tl.int64,
    x_stride: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    tiles: tl.int32,
    nll,  # fp32 [rows, tiles]: one partial sum per tile
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    cols = multiple_of_8(cols, ALIGNED)
    logits_stride = multiple_of_8(logits_stride, ALIGNED)
    x_stride = multiple_of_8(x_stride, ALIGNED)
    o_row, m_row, first = place(tiles, rows, BR, BC)
    o_col = tl.arange(0, BC)[None, :]
    m = m_row & (o_col < cols - first)
    # [BR, BC]
    b_l = tl.load(logits + (o_row * logits_stride + first) + o_col, mask=m, other=0.0)
    b_x = tl.load(x + (o_row * x_stride + first) + o_col, mask=m, other=0.0).to(tl.float32)
    b_l = b_l.to(tl.float32)
    # max(l, 0) - x l as one product: l = inf, x = 0 is no inf - 0 inf
    b_nll = softplus_of(-tl.abs(b_l)) + tl.where(b_l > 0.0, 1.0 - b_x, -b_x) * b_l
    b_sum = tl.sum(tl.where(m, b_nll, 0.0), axis=1)  # [BR]
    o_nll = tl.reshape(o_row, [BR])
    tl.store(nll + o_nll * tiles + first // BC, b_sum, mask=o_nll < rows)


@triton.jit(
    do_not_specialize=[
        *("logits_stride", "x_stride", "d_logits_stride", "d_x_stride"),
        *("rows", "cols", "tiles", "per_sample"),
    ]
)
def bernoulli_nll_bwd_kernel(
    logits,
    x,
    d_logits,
    d_x,
    logits_stride: tl.int64,
    x_stride: tl.int64,
    d_logits_stride: tl.int64,
    d_x_stride: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    tiles: tl.int32,
    grad,  # fp32 [rows / per_sample]
    per_sample: tl.int64,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    cols = multiple_of_8(cols, ALIGNED)
    logits_stride = multiple_of_8(logits_stride, ALIGNED)
    o_row, m_row, first = place(tiles, rows, BR, BC)
    o_col = tl.arange(0, BC)[None, :]
    m = m_row & (o_col < cols - first)
    b_g = tl.load(grad + o_row // per_sample, mask=m_row, other=0.0)  # [BR, 1]
    # [BR, BC]
    b_l = tl.load(logits + (o_row * logits_stride + first) + o_col, mask=m, other=0.0)
    b_l = b_l.to(tl.float32)
    if d_logits is not None:
        x_stride = multiple_of_8(x_stride, ALIGNED)
        d_logits_stride = multiple_of_8(d_logits_stride, ALIGNED)
        b_x = tl.load(x + (o_row * x_stride + first) + o_col, mask=m, other=0.0).to(tl.float32)
        b_d = ((sigmoid_of(b_l) - b_x) * b_g).to(d_logits.dtype.element_ty)
        tl.store(d_logits + (o_row * d_logits_stride + first) + o_col, b_d, mask=m)
    if d_x is not None:
        d_x_stride = multiple_of_8(d_x_stride, ALIGNED)
        b_d = (-b_l * b_g).to(d_x.dtype.element_ty)
        tl.store(d_x + (o_row * d_x_stride + first) + o_col, b_d, mask=m)


def _grid(r) -> tuple[int, tuple[int, int, int], dict]:
    """Programs, the arguments rows, cols, tiles, and the constants."""
    br, bc = tile(r.cols, 1024)
    tiles = ceil_div(r.cols, bc)
    flags = {"ALIGNED": r.aligned, "BR": br, "BC": bc}
    return ceil_div(r.rows, br) * tiles, (r.rows, r.cols, tiles), flags


def bernoulli_nll(nll, logits, x, scratch=None) -> bool:
    """Arguments of the native entry point of this name (scratch is the CUDA kernel's)."""
    sums = ((nll, torch.float32, nll.numel()),)
    if not takes(logits, x, small=sums) or nll.shape != logits.shape[:1]:
        return False
    if logits.numel() == 0:
        nll.zero_()
        return True
    r = as_rows([logits, x], [], split=1)
    programs, shape, flags = _grid(r)
    partial = nll
    if shape[0] * shape[2] != nll.numel():
        partial = nll.new_empty(shape[0] * shape[2])
    args = (*r.tensors, *r.strides, *shape, partial)
    launch(bernoulli_nll_fwd_kernel, programs, logits, *args, **flags)
    if partial is not nll:
        sum_rows(partial, nll, 1.0)
    return True


def bernoulli_nll_backward(grad, d_logits, d_x, logits, x) -> bool:
    """Arguments of the native entry point of this name."""
    sums = ((grad, torch.float32, grad.numel()),)
    if not takes(logits, x, d_logits, d_x, small=sums) or grad.shape != logits.shape[:1]:
        return False
    if logits.numel() == 0:
        return True
    r = as_rows([logits, x], [d_logits, d_x], split=1)
    programs, shape, flags = _grid(r)
    args = (*r.tensors, *r.strides, *shape, grad, r.rows // grad.numel())
    launch(bernoulli_nll_bwd_kernel, programs, logits, *args, **flags)
    return r.finish()
