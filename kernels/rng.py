"""The noise contract in Triton: the lines of csrc/math/rng.h, and one kernel that writes values.

Launch every kernel that draws with `enable_fp_fusion=False`: only IEEE add, mul, sqrt and integer
operations in a fixed order give the bits of the other backends. `tl.fma` and `tl.sqrt` are banned.

Names: i_ program index, o_ offsets, m_ mask, p_ pointers, b_ block of values.
"""

import torch
import triton
import triton.language as tl

from ._launch import FLOATS, as_rows, ceil_div, fits_seeds, launch

UNIFORM = tl.constexpr(0)
NORMAL = tl.constexpr(1)
EXPONENTIAL = tl.constexpr(2)
GUMBEL = tl.constexpr(3)
LOGISTIC = tl.constexpr(4)
INTEGER = tl.constexpr(5)
BITS = tl.constexpr(6)

_P24 = tl.constexpr(2.0**-24)
_P25 = tl.constexpr(2.0**-25)
_P29 = tl.constexpr(2.0**-29)
_P32 = tl.constexpr(2.0**-32)
_P33 = tl.constexpr(2.0**-33)

# How the seed comes: an int, one element of a tensor, or one element per group of rows.
SEED_INT, SEED_ONE, SEED_ROWS = 0, 1, 2


@triton.jit
def bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def from_bits(u):
    return u.to(tl.float32, bitcast=True)


@triton.jit
def philox4x32_10(c0, c1, c2, c3, k0, k1):
    """Salmon et al. 2011. All uint32."""
    for _ in tl.static_range(10):
        h0 = tl.umulhi(c0, 0xD2511F53)
        l0 = c0 * 0xD2511F53
        h1 = tl.umulhi(c2, 0xCD9E8D57)
        l1 = c2 * 0xCD9E8D57
        c0 = h1 ^ c1 ^ k0
        c1 = l1
        c2 = h0 ^ c3 ^ k1
        c3 = l0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(w):
    """[0, 1): the top 24 bits."""
    return (w >> 8).to(tl.float32) * _P24


@triton.jit
def uniform_positive(w):
    """(0, 1]: all 32 bits."""
    return w.to(tl.float32) * _P32 + _P33


@triton.jit
def log_of_parts(e, f):
    p = f * -0.07634499669075012 + 0.127615824341774
    p = p * f + -0.13160184025764465
    p = p * f + 0.14201757311820984
    p = p * f + -0.16623356938362122
    p = p * f + 0.20001226663589478
    p = p * f + -0.2500081956386566
    p = p * f + 0.3333333134651184
    f2 = f * f
    y = p * (f2 * f) + e * -2.12194440e-4
    y = y + f2 * -0.5
    return e * 0.693359375 + (f + y)


@triton.jit
def split_float(x):
    """x = 2^e m with m in [sqrt(1/2), sqrt(2)), for normal x > 0."""
    b = bits(x)
    e = (b - 0x3F3504F3).to(tl.int32, bitcast=True) >> 23
    m = from_bits(b - (e.to(tl.uint32, bitcast=True) << 23))
    return e.to(tl.float32), m


@triton.jit
def log_positive(x):
    e, m = split_float(x)
    return log_of_parts(e, m - 1.0)


@triton.jit
def exponential(v):
    """-ln(1 - v) for v in (0, 1]."""
    rest = 1.0 - v
    e, m = split_float(tl.where(rest > _P25, rest, _P25))
    return -log_of_parts(e, tl.where(v < 0.29, -v, m - 1.0))


@triton.jit
def value_of_word(w, KIND: tl.constexpr):
    if KIND == UNIFORM:
        return uniform(w)
    elif KIND == EXPONENTIAL:
        return exponential(uniform_positive(w))
    elif KIND == GUMBEL:
        return -log_positive(exponential(uniform_positive(w)))
    elif KIND == LOGISTIC:
        u = uniform_positive(w)
        return log_positive(u) + exponential(u)
    else:
        return w


@triton.jit
def sincos_turn(w):
    """sin and cos of 2 pi w / 2^32."""
    q = (w + 0x20000000) >> 30
    y = (w - (q << 30)).to(tl.int32, bitcast=True).to(tl.float32) * _P29
    t = y * y
    a = t * -3.595450834836811e-05 + 0.002490007085725665
    a = a * t + -0.08074543625116348
    a = (a * t + 0.7853981852531433) * y
    b = t * 3.5313346415932756e-06 + -0.00032594200456514955
    b = b * t + 0.015854327008128166
    b = b * t + -0.3084251284599304
    b = b * t + 1.0
    odd = (q & 1) != 0
    s = bits(tl.where(odd, b, a)) ^ ((q & 2) << 30)
    c = bits(tl.where(odd, a, b)) ^ (((q + 1) & 2) << 30)
    return from_bits(s), from_bits(c)


@triton.jit
def box_muller(wa, wb):
    """Two normals of two words."""
    r2 = log_positive(uniform_positive(wa)) * -2.0
    r = tl.sqrt_rn(tl.where(r2 > 0.0, r2, 0.0))
    s, c = sincos_turn(wb)
    return r * c, r * s


@triton.jit
def noise_blocks(b_block, b_seed, stream, KIND: tl.constexpr):
    """b_block, int64 [BR, BC / 4] Philox blocks -> values [BR, BC]. b_seed: scalar or [BR, 1]."""
    c0 = b_block.to(tl.uint32)
    c1 = (b_block >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + stream.to(tl.uint32)
    c3 = tl.zeros_like(c0) + (stream >> 32).to(tl.uint32)
    k0 = b_seed.to(tl.uint32)
    k1 = (b_seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32_10(c0, c1, c2, c3, k0, k1)
    if KIND == NORMAL:
        v0, v1 = box_muller(w0, w1)
        v2, v3 = box_muller(w2, w3)
    else:
        v0 = value_of_word(w0, KIND)
        v1 = value_of_word(w1, KIND)
        v2 = value_of_word(w2, KIND)
        v3 = value_of_word(w3, KIND)
    b_v = tl.join(tl.join(v0, v2), tl.join(v1, v3))  # [BR, BC / 4, 2, 2]
    return tl.reshape(b_v, [b_block.shape[0], 4 * b_block.shape[1]])


@triton.jit
def place(tiles, rows, BR: tl.constexpr, BC: tl.constexpr):
    """Rows of this program, int64 [BR, 1], which of them exist, and its first column.

    The grid has fewer than 2^31 programs, so that the division is a 32-bit one.
    """
    i = tl.program_id(0)
    i_group = i // tiles
    first = (i - i_group * tiles).to(tl.int64) * BC
    o_row = i_group.to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    return o_row, o_row < rows, first


@triton.jit
def seed_of_rows(seeds, seed, o_row, m_row, per_seed, SEEDS: tl.constexpr):
    """int64 seed, scalar or [BR, 1]; and the row's number among those that share its seed."""
    if SEEDS == 0:
        return seed.to(tl.int64), o_row
    elif SEEDS == 1:
        return tl.load(seeds), o_row
    else:
        o_sample = o_row // per_seed
        return tl.load(seeds + o_sample, mask=m_row, other=0), o_row - o_sample * per_seed


@triton.jit
def tile_columns(o_row, m_row, first, cols, offset, ALIGNED: tl.constexpr, BC: tl.constexpr):
    """Columns of a tile whose slot starts at `first`, shifted so that no Philox block is split.

    Returns the blocks [BR, BC / 4], columns relative to `first` [BR, BC] (down to -3), the mask.
    """
    first = cols * 0 + first  # a loop variable of the interpreter is no tensor
    b_element = offset.to(tl.int64) + o_row * cols + first  # [BR, 1]
    b_block = (b_element >> 2) + tl.arange(0, BC // 4)[None, :]  # [BR, BC / 4]
    o_col = tl.arange(0, BC)[None, :]
    high = tl.minimum(cols - first, BC).to(tl.int32)
    if ALIGNED:
        m = m_row & (o_col < tl.multiple_of(high, 8))
    else:
        low = tl.maximum(-first, -4).to(tl.int32)
        o_col = o_col - (b_element & 3).to(tl.int32)  # [BR, BC]
        m = m_row & (o_col >= low) & (o_col < high)
    return b_block, o_col, m


@triton.jit
def shown(x):
    """The int64 that `hidden` wrapped for a tuple argument."""
    return (x.to(tl.int64) >> 2) - 274877906944  # 2^38


@triton.jit
def multiple_of_8(x, ALIGNED: tl.constexpr):
    """Tells the compiler what the caller has checked, so that loads become 16-byte ones."""
    x = x.to(tl.int64)
    if ALIGNED:
        x = x // 8 * 8
    return x


# Arguments that never compile a kernel anew, whatever their value.
SCALARS = ["seed", "stream", "offset", "per_seed", "rows", "cols", "tiles"]


@triton.jit(do_not_specialize=["stride", *SCALARS, "low", "span"])
def random_kernel(
    out,
    stride: tl.int64,
    seeds,
    seed: tl.int64,
    stream: tl.int64,
    offset: tl.int64,
    per_seed: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    tiles: tl.int32,
    low: tl.int64,
    span: tl.int64,
    KIND: tl.constexpr,
    SEEDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    cols = multiple_of_8(cols, ALIGNED)
    stride = multiple_of_8(stride, ALIGNED)
    o_row, m_row, first = place(tiles, rows, BR, BC)
    b_seed, o_in = seed_of_rows(seeds, seed, o_row, m_row, per_seed, SEEDS)
    b_block, o_col, m = tile_columns(o_in, m_row, first, cols, offset, ALIGNED, BC)
    b_v = noise_blocks(b_block, b_seed, stream.to(tl.int64), KIND)  # [BR, BC]
    dtype: tl.constexpr = out.dtype.element_ty
    if KIND == INTEGER:
        b_w = b_v.to(tl.uint64)
        b_v = low.to(tl.int64) + (b_w * span.to(tl.uint64) >> 32).to(tl.int64)
    elif KIND == UNIFORM:  # 16-bit values are rounded toward zero, so that 1 never occurs
        if dtype == tl.float16:
            b_v = from_bits(bits(b_v) & 0xFFFFE000)
        elif dtype == tl.bfloat16:
            b_v = from_bits(bits(b_v) & 0xFFFF0000)
    tl.store(out + o_row * stride + first + o_col, b_v.to(dtype), mask=m)


def tile(cols: int, size: int, narrow: bool = True) -> tuple[int, int]:
    """(BR, BC) of `size` elements: few sizes, so that new shapes do not compile anew."""
    for bc in (16, 64, 256, 1024):
        if narrow and cols <= bc < size:
            return size // bc, bc
    return 1, size


def signed(x: int) -> int:
    """The same 64 bits as an int64."""
    return (int(x) + 2**63) % 2**64 - 2**63


class Draw:
    """The noise arguments of a launch over `r`, and its grid: what every drawing kernel shares."""

    def __init__(self, r, seed, seeds, stream, offset, size=1024, narrow=True):
        many = seeds is not None and seeds.numel() > 1
        self.aligned = r.aligned and offset % 4 == 0
        reach = r.cols + (0 if self.aligned else 3)  # a Philox block may start before the row
        self.br, self.bc = tile(reach, size, narrow)
        self.tiles = ceil_div(reach, self.bc)
        self.programs = ceil_div(r.rows, self.br) * self.tiles
        per_seed = r.rows // seeds.numel() if many else r.rows
        self.noise = (seeds, signed(seed), signed(stream), offset, per_seed)
        self.shape = (r.rows, r.cols, self.tiles)
        self.flags = {
            "SEEDS": SEED_INT if seeds is None else SEED_ROWS if many else SEED_ONE,
            "ALIGNED": self.aligned,
            "BR": self.br,
            "BC": self.bc,
        }


def random(out, distribution, seed, seeds, stream, offset, low=0, span=1) -> bool:
    """Contract values into `out`, any strides: arguments of the native entry point `random`."""
    integers = distribution >= INTEGER.value
    allowed = (torch.int64, torch.int32) if integers else (*FLOATS, torch.float64)
    if out.dtype not in allowed or not fits_seeds(out, seeds, out.dim()) or offset < 0:
        return False
    if out.numel() == 0:
        return True
    r = as_rows([], [out], split=seeds is not None and seeds.numel() > 1)
    d = Draw(r, seed, seeds, stream, offset)
    launch(
        random_kernel,
        d.programs,
        out,
        *r.tensors,
        *r.strides,
        *d.noise,
        *d.shape,
        low,
        span,
        KIND=distribution,
        **d.flags,
    )
    return r.finish()
