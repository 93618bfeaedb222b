"""Bias, noise, activation, gain and clamp in one pass, and its backward with the sums of dz.

Products and sums are rounded one by one in the order of csrc/cpu/filtering/bias_act.cpp: y and dz
have the CPU's bits, but for the two GELUs, whose reciprocal is no IEEE division there. The sums
have their own order, and it is fixed.

A place is what the channels share: an element of x with one channel. A program takes a tile of
places and goes over some of the channels, so that noise is made once for all of them.
"""

import math

import torch
import triton
import triton.language as tl

from .._launch import FLOATS, ceil_div, fits_seeds, launch, on_16_bytes, planes_of, same_memory
from ..gelu import gelu_of, gelu_slope, gelu_tanh_of, gelu_tanh_slope
from ..rng import (
    NORMAL,
    SEED_INT,
    SEED_ONE,
    SEED_ROWS,
    log_of_parts,
    log_positive,
    multiple_of_8,
    noise_blocks,
    seed_of_rows,
    signed,
    tile,
    tile_columns,
)
from ..sampling.gaussian import sum_rows
from ..sampling.maths import exp_of, sigmoid_of, tanh_of

# Values of the native enum Activation.
ACTIVATIONS = 11
LINEAR, RELU, LRELU, TANH, SIGMOID, ELU, SELU, SOFTPLUS, SWISH, GELU, GELU_TANH = (
    tl.constexpr(k) for k in range(ACTIVATIONS)
)
SELU_SCALE, SELU_SCALED_ALPHA = tl.constexpr(1.0507009873554805), tl.constexpr(1.7580993408473766)


# ---- activations: the lines of csrc/math/filtering.h ---------------------------------------------


@triton.jit
def expm1_of(x):
    """e^x - 1 for x <= 0."""
    s = x * 2.7557319224e-06 + 2.4801587302e-05
    s = s * x + 1.9841269841e-04
    s = s * x + 1.3888888889e-03
    s = s * x + 8.3333333333e-03
    s = s * x + 4.1666666667e-02
    s = s * x + 1.6666666667e-01
    s = s * x + 0.5
    return tl.where(x > -0.5, (s * x) * x + x, exp_of(x) - 1.0)


@triton.jit
def log1p_of(e):
    """ln(1 + e) for e in [0, 1]."""
    return tl.where(e < 0.41, log_of_parts(e * 0.0, e), log_positive(e + 1.0))


@triton.jit
def value_of(z, alpha, ACT: tl.constexpr):
    if ACT == RELU:
        return tl.where(z < 0.0, 0.0, z)
    elif ACT == LRELU:
        return tl.where(z > 0.0, z, z * alpha)
    elif ACT == TANH:
        return tanh_of(z)
    elif ACT == SIGMOID:
        return sigmoid_of(z)
    elif ACT == ELU:
        return tl.where(z > 0.0, z, expm1_of(z))
    elif ACT == SELU:
        return tl.where(z > 0.0, z * SELU_SCALE, expm1_of(z) * SELU_SCALED_ALPHA)
    elif ACT == SOFTPLUS:
        positive = tl.where(z > 0.0, z, tl.where(z == z, 0.0, z))
        return positive + log1p_of(exp_of(tl.where(z < 0.0, z, -z)))
    elif ACT == SWISH:
        return z * sigmoid_of(z)
    elif ACT == GELU:
        return gelu_of(z, True)
    elif ACT == GELU_TANH:
        return gelu_tanh_of(z, True)
    else:
        return z


@triton.jit
def slope_of(z, alpha, ACT: tl.constexpr):
    if ACT == RELU:
        return tl.where(z <= 0.0, 0.0, 1.0)  # 1 of NaN, as PyTorch's
    elif ACT == LRELU:
        return tl.where(z > 0.0, 1.0, alpha)
    elif ACT == TANH:
        t = tanh_of(z)
        return 1.0 - t * t
    elif ACT == SIGMOID:
        s = sigmoid_of(z)
        return s * (1.0 - s)
    elif ACT == ELU:
        return tl.where(z > 0.0, 1.0, exp_of(z))
    elif ACT == SELU:
        return tl.where(z > 0.0, SELU_SCALE, exp_of(z) * SELU_SCALED_ALPHA)
    elif ACT == SOFTPLUS:
        return sigmoid_of(z)
    elif ACT == SWISH:
        s = sigmoid_of(z)
        return s * (z * (1.0 - s) + 1.0)
    elif ACT == GELU:
        return gelu_slope(z, True)
    elif ACT == GELU_TANH:
        return gelu_tanh_slope(z, True)
    else:
        return tl.full(z.shape, 1.0, tl.float32)


# ---- places and channels -------------------------------------------------------------------------


@triton.jit
def places(
    tiles, splits, rows, cols, channels, noise, period, seeds, seed, stream, offset, per_seed,
    DRAWS: tl.constexpr, INNER: tl.constexpr, SEEDS: tl.constexpr, ALIGNED: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The tile of places of this program: its number, the element of x before its first place (or
    of each place, with the channels inside), columns, mask, and noise. Places lie along a line
    [1, BC], and with the channels inside along a column [BR BC, 1]."""
    i_place = tl.program_id(0) // splits
    i_group = i_place // tiles
    first = (i_place - i_group * tiles).to(tl.int64) * BC
    o_row = i_group.to(tl.int64) * BR + tl.arange(0, BR)[:, None]  # [BR, 1]
    m_row = o_row < rows
    if DRAWS:
        b_seed, o_in = seed_of_rows(seeds, seed, o_row, m_row, per_seed, SEEDS)
        b_block, o_col, m = tile_columns(
            o_in, m_row, first, cols, offset, ALIGNED and not INNER, BC
        )  # fmt: skip
        b_n = noise_blocks(b_block, b_seed, stream.to(tl.int64), NORMAL)  # [BR, BC]
    else:
        o_col = tl.arange(0, BC)[None, :]
        m = m_row & (o_col < cols - first)
        b_n = tl.zeros([BR, BC], tl.float32)
    if INNER:
        o_place = (o_row * cols + first) + o_col  # [BR, BC]
        if noise is not None:
            b_n = tl.load(noise + o_place % period, mask=m, other=0.0).to(tl.float32)
        o_place = tl.reshape(o_place, [BR * BC, 1]) * channels
        m, b_n = tl.reshape(m, [BR * BC, 1]), tl.reshape(b_n, [BR * BC, 1])
    else:
        if noise is not None:
            p_n = noise + ((o_row * cols) % period + first) + o_col
            b_n = tl.load(p_n, mask=m, other=0.0).to(tl.float32)
        o_place = o_row * channels * cols + first
    return i_place, o_place, o_col, m, b_n


@triton.jit
def with_channels(o_place, o_col, m, at, channels, cols, INNER: tl.constexpr, BN: tl.constexpr):
    """BN channels from `at` on: [1, BN] or [BN, 1]; then the elements of x as the first of each
    line and a column, and the mask [BR BC, BN] or [BN, BC]."""
    o_n = tl.arange(0, BN)
    if INNER:
        o_c, o_first, o_col = (at + o_n)[None, :], o_place + at, o_n[None, :]
    else:
        o_c = (at + o_n)[:, None]
        o_first = o_place + o_c * cols
    return o_c, o_first, o_col, m & (o_c < channels)


@triton.jit
def added(b_z, b_n, s, b, o_c, channels, NOISE: tl.constexpr):
    """(z + s n) + b, without the terms that are not there: 0 would turn -0."""
    if NOISE:
        b_z = b_z + b_n * s
    if b is not None:
        b_z = b_z + tl.load(b + o_c, mask=o_c < channels, other=0.0).to(tl.float32)
    return b_z


# Arguments that never compile a kernel anew, whatever their value.
SETTINGS = [
    *("period", "seed", "stream", "offset", "per_seed", "rows", "cols", "channels", "tiles"),
    *("splits", "steps", "alpha", "gain", "clamp"),
]


@triton.jit(do_not_specialize=SETTINGS)
def bias_act_fwd_kernel(
    x,
    y,
    b,  # [channels] or None
    noise,  # [period] or None
    period: tl.int64,
    strength,  # fp32 [1], or None: no noise
    seeds,
    seed: tl.int64,
    stream: tl.int64,
    offset: tl.int64,
    per_seed: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    channels: tl.int64,
    tiles: tl.int32,
    splits: tl.int32,
    steps: tl.int32,  # tiles of channels of one program
    alpha: tl.float32,
    gain: tl.float32,
    clamp: tl.float32,
    ACT: tl.constexpr,
    CLAMP: tl.constexpr,
    DRAWS: tl.constexpr,
    INNER: tl.constexpr,
    SEEDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
):
    cols = multiple_of_8(cols, ALIGNED and not INNER)
    channels = multiple_of_8(channels, ALIGNED and INNER)
    _, o_place, o_col, m_place, b_n = places(
        tiles, splits, rows, cols, channels, noise, period, seeds, seed, stream, offset, per_seed,
        DRAWS, INNER, SEEDS, ALIGNED, BR, BC,
    )  # fmt: skip
    s = 0.0
    if strength is not None:
        s = tl.load(strength)
    begin = (tl.program_id(0) % splits).to(tl.int64) * steps * BN
    for at in range(begin, tl.minimum(begin + steps * BN, channels), BN):
        o_c, o_first, o, m = with_channels(
            o_place, o_col, m_place, at, channels, cols, INNER, BN
        )  # fmt: skip
        # [BN, BC], INNER: [BR BC, BN]
        b_x = tl.load(x + o_first + o, mask=m, other=0.0).to(tl.float32)
        b_z = added(b_x, b_n, s, b, o_c, channels, strength is not None)
        b_y = value_of(b_z, alpha, ACT) * gain
        if CLAMP:  # NaN stays NaN
            b_y = tl.where(-clamp > b_y, -clamp, b_y)
            b_y = tl.where(clamp < b_y, clamp, b_y)
        tl.store(y + o_first + o, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=[*SETTINGS, "count"])
def bias_act_bwd_kernel(
    grad,
    source,  # x, or with FROM_Y y
    dz,
    partial_b,  # fp32 [channels, count]: a sum per tile of places, or None
    partial_s,  # fp32 [programs] or None
    count: tl.int64,
    b,
    noise,
    period: tl.int64,
    strength,
    seeds,
    seed: tl.int64,
    stream: tl.int64,
    offset: tl.int64,
    per_seed: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    channels: tl.int64,
    tiles: tl.int32,
    splits: tl.int32,
    steps: tl.int32,
    alpha: tl.float32,
    gain: tl.float32,
    clamp: tl.float32,
    FROM_Y: tl.constexpr,
    ACT: tl.constexpr,
    CLAMP: tl.constexpr,
    DRAWS: tl.constexpr,
    INNER: tl.constexpr,
    SEEDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
):
    cols = multiple_of_8(cols, ALIGNED and not INNER)
    channels = multiple_of_8(channels, ALIGNED and INNER)
    i_place, o_place, o_col, m_place, b_n = places(
        tiles, splits, rows, cols, channels, noise, period, seeds, seed, stream, offset, per_seed,
        DRAWS, INNER, SEEDS, ALIGNED, BR, BC,
    )  # fmt: skip
    s = 0.0
    if strength is not None:
        s = tl.load(strength)
    if partial_s is not None:  # of dz alone: the channels share the noise
        b_total = tl.zeros([BR * BC, BN] if INNER else [BN, BC], tl.float32)
    begin = (tl.program_id(0) % splits).to(tl.int64) * steps * BN
    for at in range(begin, tl.minimum(begin + steps * BN, channels), BN):
        o_c, o_first, o, m = with_channels(
            o_place, o_col, m_place, at, channels, cols, INNER, BN
        )  # fmt: skip
        # [BN, BC], INNER: [BR BC, BN]; 0 outside, and so is all that is added below
        b_g = tl.load(grad + o_first + o, mask=m, other=0.0).to(tl.float32)
        b_z = tl.load(source + o_first + o, mask=m, other=0.0).to(tl.float32)
        if not FROM_Y:
            b_z = added(b_z, b_n, s, b, o_c, channels, strength is not None)
        b_d = b_g * (slope_of(b_z, alpha, ACT) * gain)
        if CLAMP:
            b_y = b_z
            if not FROM_Y:
                b_y = value_of(b_z, alpha, ACT) * gain
            b_d = tl.where(tl.where(b_y < 0.0, -b_y, b_y) < clamp, b_d, 0.0)
        tl.store(dz + o_first + o, b_d.to(dz.dtype.element_ty), mask=m)
        if partial_b is not None:
            b_sum = tl.sum(b_d, axis=0 if INNER else 1, keep_dims=True)  # [BN, 1], INNER: [1, BN]
            tl.store(partial_b + o_c * count + i_place, b_sum, mask=o_c < channels)
        if partial_s is not None:
            b_total += b_d
    if partial_s is not None:
        tl.store(partial_s + tl.program_id(0), tl.sum(tl.sum(b_total * b_n, axis=1), axis=0))


# ---- launchers -----------------------------------------------------------------------------------


# Programs of a noisy launch below which one does not take more than a tile: 132 SMs hold 16 each.
_PROGRAMS = 2048


class _Call:
    """What both directions have in common. `fits`: the kernels can run."""

    def __init__(self, like_x, b, noise, strength, seeds, offset, draws, dim, act, numbers):
        self.x, self.noise, self.act, self.numbers = like_x[0], noise, act, numbers
        self.b, self.strength, self.seeds, self.offset = b, strength, seeds, offset
        self.draws = bool(draws) and noise is None
        self.like_x = like_x
        self.fits = self._fits(dim)

    def _fits(self, dim: int) -> bool:
        x, b, noise, strength, seeds = self.x, self.b, self.noise, self.strength, self.seeds
        if any(t.dtype not in FLOATS or not same_memory(t, x) for t in self.like_x):
            return False
        planes = planes_of(x, dim)
        small = [t for t in (b, noise, strength, seeds) if t is not None]
        if planes is None or any(t.device != x.device for t in (*self.like_x, *small)):
            return False
        self.outer, self.channels, self.inner, self.channels_inner = planes
        self.places = self.outer * self.inner
        if not 0 <= self.act < ACTIVATIONS or not all(math.isfinite(n) for n in self.numbers):
            return False
        if any(t is not None and not (t.dtype in FLOATS and t.is_contiguous()) for t in (b, noise)):
            return False
        if b is not None and b.shape != (self.channels,):
            return False
        if noise is not None and noise.numel() not in (self.places, self.inner):
            return False
        if strength is None:
            if self.draws or noise is not None:
                return False
        elif strength.dtype != torch.float32 or strength.numel() != 1:
            return False
        if seeds is not None and (seeds.dtype != torch.int64 or seeds.dim() > 1):
            return False
        return fits_seeds(x, seeds, dim) and 0 <= self.offset <= 2**62

    def plan(self, seed, stream, with_bias: bool, with_noise: bool, sums=False) -> tuple:
        """(programs, tiles of places, the arguments from b on, the constants).

        Tiles of 1024 elements: 8 a thread, a load of 16 bytes in 16 bit. Channels inside: at most
        64 of them, lines of 128 bytes, which leaves 16 places to make noise for. sums: of the
        channels too; with those inside, sums of 16 places would be 8 % more bytes, so that the tile
        has 32 (but not unaligned: 8 addresses a thread of 256 spill).
        """
        draws = self.draws and with_noise
        noise = self.noise if with_noise else None
        seeds = self.seeds if draws else None
        offset = self.offset if draws else 0
        noisy, many = draws or noise is not None, seeds is not None and seeds.numel() > 1
        rows, cols = self.outer, self.inner
        whole = noise is None or noise.numel() == self.places
        if self.channels_inner or (self.channels == 1 and whole):
            rows = seeds.numel() if many else 1
            cols = self.places // rows
        side = self.channels if self.channels_inner else cols
        aligned = side % 8 == 0 and on_16_bytes(self.like_x)
        if not self.channels_inner:
            aligned = aligned and offset % 4 == 0
        # A Philox block may start before the row.
        reach = cols + 3 if draws and (self.channels_inner or not aligned) else cols
        wide = sums and self.channels_inner and aligned
        if self.channels_inner:
            bn = 16 if self.channels <= 16 else 64
            br, bc = tile(reach, (2048 if wide else 1024) // bn)
        else:
            bn, bc = tile(reach, 1024)
            br = 1
        tiles = ceil_div(reach, bc)
        count = ceil_div(rows, br) * tiles
        # Noise is made for up to 16 tiles of channels: a normal takes 65 operations, and an H100
        # has time for 34 while it moves an element of 16 bit in and out.
        all_steps = ceil_div(self.channels, bn)
        steps = max(1, min(16, count * all_steps // _PROGRAMS)) if noisy else 1
        splits = ceil_div(all_steps, steps)
        seeds_kind = SEED_INT if seeds is None else SEED_ROWS if many else SEED_ONE
        args = (
            self.b if with_bias else None,
            noise,
            1 if noise is None else noise.numel(),
            self.strength if noisy else None,
            seeds,
            signed(seed) if draws else 0,
            signed(stream) if draws else 0,
            offset,
            rows // seeds.numel() if many else rows,
            rows,
            cols,
            self.channels,
            tiles,
            splits,
            steps,
            *map(float, self.numbers),
        )
        flags = {
            "ACT": self.act,
            "CLAMP": self.numbers[2] >= 0,
            "DRAWS": draws,
            "INNER": self.channels_inner,
            "SEEDS": seeds_kind,
            "ALIGNED": aligned,
            "BR": br,
            "BC": bc,
            "BN": bn,
            "num_warps": 8 if wide else 4,
        }
        return count * splits, count, args, flags


def bias_act(
    y, x, b, noise, strength, seeds, seed, stream, offset, draws, dim, act, alpha, gain, clamp
) -> bool:
    """Arguments of the native entry point of this name."""
    numbers = (alpha, gain, clamp)
    call = _Call((x, y), b, noise, strength, seeds, offset, draws, dim, act, numbers)
    if not call.fits:
        return False
    if x.numel() == 0:
        return True
    programs, _, args, flags = call.plan(seed, stream, True, True)
    launch(bias_act_fwd_kernel, programs, x, x, y, *args, **flags)
    return True


def bias_act_backward(
    grad, dz, db, d_strength, source, from_y, b, noise, strength, seeds, seed, stream, offset,
    draws, dim, act, alpha, gain, clamp, scratch=None,
) -> bool:  # fmt: skip
    """Arguments of the native entry point of this name (scratch is the CUDA kernel's)."""
    numbers, like_x = (alpha, gain, clamp), (source, grad, dz)
    call = _Call(like_x, b, noise, strength, seeds, offset, draws, dim, act, numbers)
    if not call.fits:
        return False
    for total, n in ((db, call.channels), (d_strength, 1)):
        if total is not None and (
            total.dtype != torch.float32 or total.numel() != n or not total.is_contiguous()
            or total.device != source.device
        ):  # fmt: skip
            return False
    if d_strength is not None and noise is None and not call.draws:
        return False
    if source.numel() == 0:
        for total in (db, d_strength):
            if total is not None:
                total.zero_()
        return True
    with_noise = not from_y or d_strength is not None
    plan = call.plan(seed, stream, not from_y, with_noise, db is not None)
    programs, count, args, flags = plan
    partial_b, partial_s = db, d_strength
    if db is not None and count > 1:
        partial_b = db.new_empty(call.channels * count)
    if d_strength is not None and programs > 1:
        partial_s = d_strength.new_empty(programs)
    launch(
        bias_act_bwd_kernel,
        programs,
        source,
        grad,
        source,
        dz,
        partial_b,
        partial_s,
        count,
        *args,
        FROM_Y=from_y,
        **flags,
    )
    for partial, total in ((partial_b, db), (partial_s, d_strength)):
        if partial is not total:
            sum_rows(partial, total, 1.0)
    return True
