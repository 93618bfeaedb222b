"""What the diffusion kernels share: tiles as fp32, sums in which a zero coefficient reads nothing,
coefficients in fp64, and sums of partial sums.

Products and sums are rounded one by one in the order of csrc/cpu/diffusion, so elementwise results
have the CPU's bits.
"""

import torch
import triton
import triton.language as tl

from .._launch import launch
from ..rng import multiple_of_8, shown


@triton.jit
def tile_of(p, stride, o_row, first, o_col, m, ALIGNED: tl.constexpr):
    """fp32 [BR, BC] of the rows `o_row` of p, 0 where not m."""
    p_tile = p + (o_row * multiple_of_8(shown(stride), ALIGNED) + first) + o_col
    return tl.load(p_tile, mask=m, other=0.0).to(tl.float32)


@triton.jit
def store_tile(p, stride, o_row, first, o_col, m, b, ALIGNED: tl.constexpr):
    p_tile = p + (o_row * multiple_of_8(shown(stride), ALIGNED) + first) + o_col
    tl.store(p_tile, b.to(p.dtype.element_ty), mask=m)


@triton.jit
def no_terms(BR: tl.constexpr, BC: tl.constexpr):
    """The empty sum: -0, so that the first term is added without changing its bits."""
    return tl.full([BR, BC], -0.0, tl.float32)


@triton.jit
def add_term(b_sum, b_s, c):
    """b_sum + c b_s where c [BR, 1] is not 0: what has no weight never counts, not even NaN."""
    return tl.where(c != 0.0, b_sum + b_s * c, b_sum)


@triton.jit
def per_row(p, o_index, m_row, otherwise):
    """fp32 [BR, 1] of one number per group of rows."""
    return tl.load(p + o_index, mask=m_row, other=otherwise)


@triton.jit
def coefficient(p, number, i_group, m_row):
    """fp64: the number, or the value of each row's group (p is fp32 or fp64, may be None)."""
    if p is None:
        return number + tl.zeros(i_group.shape, tl.float64)
    else:
        return tl.load(p + i_group, mask=m_row, other=1.0).to(tl.float64)


@triton.jit(do_not_specialize=["count", "scale"])
def sum64_kernel(partial, out, count: tl.int64, scale: tl.float64, BC: tl.constexpr):
    """out[g] = scale sum of row g of partial (fp64 [groups, count]), always in the same order."""
    i_group = tl.program_id(0).to(tl.int64)
    o_col = tl.arange(0, BC)
    b_sum = tl.zeros([BC], tl.float64)
    for at in range(0, count, BC):
        b_sum += tl.load(partial + i_group * count + at + o_col, mask=at + o_col < count, other=0.0)
    tl.store(out + i_group, (tl.sum(b_sum, axis=0) * scale).to(out.dtype.element_ty))


def sum64(partial: torch.Tensor, out: torch.Tensor, scale: float = 1.0) -> None:
    groups = out.numel()
    launch(sum64_kernel, groups, out, partial, out, partial.numel() // groups, scale, BC=1024)


# ---- what launchers ask about tensors ------------------------------------------------------------


def prefix_of(t: torch.Tensor | None, x: torch.Tensor) -> bool:
    """t lies over leading dimensions of x, dense and on its device."""
    return t is None or (
        t.shape == x.shape[: t.dim()] and t.is_contiguous() and t.device == x.device
    )


def vector_of(t: torch.Tensor | None, x: torch.Tensor, width: int = 1) -> bool:
    """t holds `width` fp32 numbers for all samples of x, or for each."""
    batch = x.shape[0] if x.dim() else 1
    return t is None or (
        t.dtype == torch.float32
        and t.numel() in (width, width * batch)
        and t.is_contiguous()
        and t.device == x.device
    )


def coefficient_of(value, x: torch.Tensor, batch_only: bool = False):
    """(tensor or None, number) of a coefficient, or None when the kernels do not take it."""
    if value is None or isinstance(value, (int, float)):
        return None, float(value or 0.0)
    fits = value.dtype in (torch.float32, torch.float64) and prefix_of(value, x)
    if not fits or (batch_only and value.dim() != 1 and value.numel() != 1):
        return None
    return value, 0.0


def span(t: torch.Tensor) -> tuple[int, int]:
    """First byte of t and the one behind its last."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def overlaps(out: torch.Tensor, other: torch.Tensor) -> bool:
    if out.numel() == 0 or other.numel() == 0:
        return False
    (a, b), (c, d) = span(out), span(other)
    return a < d and c < b


def overlaps_badly(out: torch.Tensor, other: torch.Tensor) -> bool:
    """They share memory, and not element by element."""
    same = out.data_ptr() == other.data_ptr() and out.dtype == other.dtype
    return not (same and out.stride() == other.stride()) and overlaps(out, other)
