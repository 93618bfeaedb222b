"""The training loss of a denoiser: noise and target are made in the pass that reads the output.

Differences have the CPU's bits. Their squares are added in fp32 within a tile and in fp64 over the
tiles, always in the same order.
"""

import torch
import triton
import triton.language as tl

from .._launch import FLOATS, as_rows, fits_seeds, hidden, launch
from ..rng import NORMAL, SCALARS, Draw, noise_blocks, place, seed_of_rows, tile_columns
from .terms import coefficient, coefficient_of, store_tile, sum64, tile_of, vector_of

# Values of the native enums Prediction and Weighting.
EPSILON, SAMPLE, V, FLOW = (tl.constexpr(k) for k in range(4))
NO_WEIGHT, MIN_SNR, P2, SNR, SIGMA_SQRT, COSMAP, EDM, GIVEN = (tl.constexpr(k) for k in range(8))
PI = tl.constexpr(3.14159265358979323846)


@triton.jit
def loss_target(b_x0, b_eps, alpha, sigma, PREDICTION: tl.constexpr):
    if PREDICTION == EPSILON:
        return b_eps
    elif PREDICTION == SAMPLE:
        return b_x0
    elif PREDICTION == V:
        return b_eps * alpha - b_x0 * sigma
    else:
        return b_eps - b_x0


@triton.jit
def loss_weight(
    alpha, sigma, weight, weight_number, i, m, gamma, k,
    WEIGHTING: tl.constexpr, PREDICTION: tl.constexpr,
):  # fmt: skip
    """fp64; the list and the sources stand in genfast/reference/diffusion.py."""
    if WEIGHTING == GIVEN:
        return coefficient(weight, weight_number, i, m)
    else:
        ratio = alpha / sigma
        snr = ratio * ratio
        if WEIGHTING == MIN_SNR:
            least = tl.where(snr > gamma, gamma, snr)  # NaN stays
            if PREDICTION == EPSILON:
                return tl.where(snr == 0, 1.0, least / snr)  # the limit at zero terminal SNR
            elif PREDICTION == SAMPLE:
                return least
            elif PREDICTION == V:
                return least / (snr + 1.0)
            else:
                return least * (sigma * sigma)
        elif WEIGHTING == P2:
            return tl.exp(tl.log(k + snr) * -gamma)
        elif WEIGHTING == SNR:
            return snr
        elif WEIGHTING == SIGMA_SQRT:
            return 1.0 / (sigma * sigma)
        elif WEIGHTING == COSMAP:
            return 2.0 / (PI * ((1.0 - 2.0 * sigma) + 2.0 * (sigma * sigma)))
        elif WEIGHTING == EDM:
            return 1.0 / (sigma * sigma) + 4.0
        else:
            return tl.full(sigma.shape, 1.0, tl.float64)


NUMBERS = ["alpha_number", "sigma_number", "weight_number", "gamma", "k", "total_scale"]


@triton.jit(do_not_specialize=["strides", "per_sample_rows", "grad_step", *NUMBERS, *SCALARS])
def denoising_loss_kernel(
    output,
    x0,  # None where the target is the noise
    z,
    d_output,  # or None
    strides,  # elements between rows of the four
    partial,  # fp64 [rows, tiles] sums of squares, or None
    per_sample_rows: tl.int64,
    alpha,  # fp32 or fp64 [B], or None: the number; the same for sigma and weight
    alpha_number: tl.float64,
    sigma,
    sigma_number: tl.float64,
    weight,
    weight_number: tl.float64,
    gamma: tl.float64,
    k: tl.float64,
    grad,  # fp32 [1] or [B], or None: 1
    grad_step: tl.int32,
    total_scale: tl.float64,
    seeds,
    seed: tl.int64,
    stream: tl.int64,
    offset: tl.int64,
    per_seed: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    tiles: tl.int32,
    FLOW_ALPHA: tl.constexpr,  # alpha = 1 - sigma
    PREDICTION: tl.constexpr,
    WEIGHTING: tl.constexpr,
    DRAWS: tl.constexpr,
    SEEDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    cols = cols // 8 * 8 if ALIGNED else cols
    o_row, m_row, first = place(tiles, rows, BR, BC)
    b_seed, o_in = seed_of_rows(seeds, seed, o_row, m_row, per_seed, SEEDS)
    b_block, o_col, m = tile_columns(o_in, m_row, first, cols, offset, ALIGNED, BC)
    i_sample = o_row // per_sample_rows
    b_o = tile_of(output, strides[0], o_row, first, o_col, m, ALIGNED)  # [BR, BC]
    b_x, b_e = b_o, b_o
    if x0 is not None:
        b_x = tile_of(x0, strides[1], o_row, first, o_col, m, ALIGNED)
    if DRAWS:
        b_e = noise_blocks(b_block, b_seed, stream.to(tl.int64), NORMAL)
    elif z is not None:
        b_e = tile_of(z, strides[2], o_row, first, o_col, m, ALIGNED)
    s = coefficient(sigma, sigma_number, i_sample, m_row)  # [BR, 1]
    if FLOW_ALPHA:
        a = 1.0 - s
    else:
        a = coefficient(alpha, alpha_number, i_sample, m_row)
    b_d = b_o - loss_target(b_x, b_e, a.to(tl.float32), s.to(tl.float32), PREDICTION)
    if partial is not None:
        b_sum = tl.sum(tl.where(m, b_d * b_d, 0.0), axis=1, keep_dims=True).to(tl.float64)
        tl.store(partial + o_row * tiles + first // BC, b_sum, mask=m_row)
    if d_output is not None:
        w = loss_weight(
            a, s, weight, weight_number, i_sample, m_row, gamma, k, WEIGHTING, PREDICTION
        )
        g = tl.full([BR, 1], 1.0, tl.float64)
        if grad is not None:
            g = tl.load(grad + i_sample * grad_step, mask=m_row, other=0.0).to(tl.float64)
        n = (cols * per_sample_rows).to(tl.float64)
        scale = (2.0 * g * w * total_scale / n).to(tl.float32)
        store_tile(d_output, strides[3], o_row, first, o_col, m, b_d * scale, ALIGNED)


@triton.jit(do_not_specialize=["count", "n", *NUMBERS])
def loss_of_samples_kernel(
    partial,  # fp64 [B, count]
    losses,  # fp64 [B]
    per_sample,  # fp32 [B]
    count: tl.int64,
    n: tl.float64,
    alpha,
    alpha_number: tl.float64,
    sigma,
    sigma_number: tl.float64,
    weight,
    weight_number: tl.float64,
    gamma: tl.float64,
    k: tl.float64,
    FLOW_ALPHA: tl.constexpr,
    PREDICTION: tl.constexpr,
    WEIGHTING: tl.constexpr,
    BC: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_col = tl.arange(0, BC)
    b_sum = tl.zeros([BC], tl.float64)
    for at in range(0, count, BC):
        b_sum += tl.load(partial + i_b * count + at + o_col, mask=at + o_col < count, other=0.0)
    i = i_b + tl.zeros([1], tl.int64)
    s = coefficient(sigma, sigma_number, i, i >= 0)
    if FLOW_ALPHA:
        a = 1.0 - s
    else:
        a = coefficient(alpha, alpha_number, i, i >= 0)
    w = loss_weight(a, s, weight, weight_number, i, i >= 0, gamma, k, WEIGHTING, PREDICTION)
    loss = tl.sum(b_sum, axis=0) / n * w  # [1]
    tl.store(losses + i, loss)
    tl.store(per_sample + i, loss.to(tl.float32))


def denoising_loss(
    output, x0, z, seed, seeds, stream, offset, alpha, sigma, weight, prediction, weighting, gamma,
    k, per_sample, total, total_scale, grad, d_output,
) -> bool:  # fmt: skip
    """Arguments of the native entry point of this name."""
    if output.dim() == 0 or output.numel() == 0 or sigma is None:
        return False
    present = [t for t in (output, x0, z, d_output) if t is not None]
    x, batch = output, output.shape[0]
    if any(t.dtype not in FLOATS or t.shape != x.shape or t.device != x.device for t in present):
        return False
    if d_output is None and per_sample is None:
        return False
    coefficients = [coefficient_of(c, x, batch_only=True) for c in (alpha, sigma, weight)]
    if any(c is None for c in coefficients) or not fits_seeds(x, seeds, x.dim()) or offset < 0:
        return False
    if any(t is not None and t.numel() != 1 and t.shape != (batch,) for t, _ in coefficients):
        return False
    if not vector_of(grad, x) or (per_sample is not None and per_sample.numel() != batch):
        return False
    # A tensor of one number for many samples has no stride here: it becomes one per sample.
    coefficients = [
        (t if t is None or t.numel() == batch else t.expand(batch).contiguous(), number)
        for t, number in coefficients
    ]
    needs_noise = prediction != SAMPLE.value
    draws = needs_noise and z is None
    inputs = [output, x0 if prediction != EPSILON.value else None, z if needs_noise else None]
    r = as_rows(inputs, [d_output], split=1)
    d = Draw(r, seed, seeds, stream, offset) if draws else Draw(r, 0, None, 0, 0)
    partial = None
    if per_sample is not None:
        partial = output.new_empty((r.rows, d.tiles), dtype=torch.float64)
    numbers = [part for c in coefficients for part in c]
    codes = {"FLOW_ALPHA": alpha is None, "PREDICTION": prediction, "WEIGHTING": weighting}
    launch(
        denoising_loss_kernel,
        d.programs,
        output,
        *r.tensors,
        hidden(tuple(r.strides)),
        partial,
        r.rows // batch,
        *numbers,
        gamma,
        k,
        grad,
        int(grad is not None and grad.numel() > 1),
        total_scale,
        *d.noise,
        *d.shape,
        DRAWS=draws,
        **codes,
        **d.flags,
    )
    if per_sample is not None:
        losses = partial.new_empty(batch)
        count, n = partial.numel() // batch, output.numel() // batch
        args = (partial, losses, per_sample, count, n, *numbers, gamma, k)
        launch(loss_of_samples_kernel, batch, output, *args, **codes, BC=1024)
        if total is not None:
            sum64(losses, total, total_scale)
    return r.finish()
