"""The forward process: out = a p + b q; a, b per tensor, sample or token; q given or drawn."""

import triton
import triton.language as tl

from .._launch import FLOATS, as_rows, fits_seeds, hidden, launch
from ..rng import NORMAL, SCALARS, Draw, noise_blocks, place, seed_of_rows, tile_columns
from .terms import (
    add_term,
    coefficient,
    coefficient_of,
    no_terms,
    overlaps_badly,
    store_tile,
    tile_of,
)


@triton.jit(
    do_not_specialize=["strides", "a_number", "b_number", "a_sign", "b_sign", "per_group", *SCALARS]
)
def diffusion_mix_kernel(
    out,
    p,
    q,  # or None
    strides,  # elements between rows of p, q, out
    a,  # fp32 or fp64 [groups], or None: the number
    a_number: tl.float64,
    b,
    b_number: tl.float64,
    a_sign: tl.float32,
    b_sign: tl.float32,
    per_group: tl.int64,
    seeds,
    seed: tl.int64,
    stream: tl.int64,
    offset: tl.int64,
    per_seed: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    tiles: tl.int32,
    ONE_MINUS_B: tl.constexpr,  # a = 1 - b
    DRAWS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    SEEDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    cols = cols // 8 * 8 if ALIGNED else cols
    o_row, m_row, first = place(tiles, rows, BR, BC)
    b_seed, o_in = seed_of_rows(seeds, seed, o_row, m_row, per_seed, SEEDS)
    b_block, o_col, m = tile_columns(o_in, m_row, first, cols, offset, ALIGNED, BC)
    i_group = o_row // per_group
    w_b = coefficient(b, b_number, i_group, m_row)  # [BR, 1]
    if ONE_MINUS_B:
        w_a = 1.0 - w_b
    else:
        w_a = coefficient(a, a_number, i_group, m_row)
    c_a, c_b = w_a.to(tl.float32) * a_sign, w_b.to(tl.float32) * b_sign
    b_p = tile_of(p, strides[0], o_row, first, o_col, m & (c_a != 0.0), ALIGNED)  # [BR, BC]
    b_sum = add_term(no_terms(BR, BC), b_p, c_a)
    b_some = c_a != 0.0
    if DRAWS or q is not None:
        if DRAWS:
            b_q = noise_blocks(b_block, b_seed, stream.to(tl.int64), NORMAL)
        else:
            b_q = tile_of(q, strides[1], o_row, first, o_col, m & (c_b != 0.0), ALIGNED)
        b_sum, b_some = add_term(b_sum, b_q, c_b), b_some | (c_b != 0.0)
    b_sum = tl.where(b_some, b_sum, 0.0)
    if IN_PLACE:  # a thread may store an element that another one has loaded
        tl.debug_barrier()
    store_tile(out, strides[2], o_row, first, o_col, m, b_sum, ALIGNED)


def expanded(c, other):
    """A coefficient of `coefficient_of` over as many dimensions as the other."""
    (c, number), other = c, other[0]
    if c is not None and other is not None and c.dim() < other.dim():
        c = c.reshape(c.shape + (1,) * (other.dim() - c.dim())).expand(other.shape).contiguous()
    return c, number


def diffusion_mix(
    out, p, q, seed, seeds, stream, offset, draws, a, b, a_sign, b_sign, a_is_one_minus_b
) -> bool:
    """Arguments of the native entry point of this name."""
    present = [t for t in (out, p, q) if t is not None]
    if any(t.dtype not in FLOATS or t.shape != p.shape or t.device != p.device for t in present):
        return False
    if any(n > 1 and s == 0 for n, s in zip(out.shape, out.stride(), strict=True)):
        return False
    if overlaps_badly(out, p) or (q is not None and overlaps_badly(out, q)):
        return False
    c_a, c_b = coefficient_of(a, p), coefficient_of(b, p)
    if c_a is None or c_b is None or not fits_seeds(p, seeds, p.dim()) or offset < 0:
        return False
    if p.numel() == 0:
        return True
    c_a, c_b = expanded(c_a, c_b), expanded(c_b, c_a)
    given = [c for c in (c_a[0], c_b[0]) if c is not None]
    draws = draws and q is None
    many = draws and seeds is not None and seeds.numel() > 1
    split = max([int(many), *[c.dim() for c in given]])
    r = as_rows([p, q], [out], split=split)
    d = Draw(r, seed if draws else 0, seeds if draws else None, stream, offset if draws else 0)
    groups = given[0].numel() if given else 1
    launch(
        diffusion_mix_kernel,
        d.programs,
        p,
        r.tensors[2],
        *r.tensors[:2],
        hidden(tuple(r.strides)),
        *c_a,
        *c_b,
        a_sign,
        b_sign,
        max(r.rows // groups, 1),
        *d.noise,
        *d.shape,
        ONE_MINUS_B=a_is_one_minus_b,
        DRAWS=draws,
        IN_PLACE=any(t is not None and t.data_ptr() == out.data_ptr() for t in (p, q)),
        **d.flags,
    )
    return r.finish()
