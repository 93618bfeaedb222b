"""The affine step with its log-probability, and its gradients; the row of the table comes from an
int or from a tensor on the device, so that one CUDA graph serves every step.

A source whose coefficient is 0 in every output is not read: loads are masked by the row.
"""

import torch
import triton
import triton.language as tl

from .._launch import FLOATS, as_rows, fits_seeds, hidden, launch
from ..rng import (
    NORMAL,
    SCALARS,
    Draw,
    log_positive,
    noise_blocks,
    place,
    seed_of_rows,
    tile_columns,
)
from ..sampling.maths import exp_of
from .terms import (
    add_term,
    no_terms,
    overlaps,
    overlaps_badly,
    per_row,
    prefix_of,
    store_tile,
    sum64,
    tile_of,
    vector_of,
)

# A row of the table: d_x d_m clip input_scale logvar_min logvar_max c_0[10] c_1[10] c_2[10].
COLUMNS, COEF = tl.constexpr(36), tl.constexpr(6)
X, M, X0, H1, Z = (tl.constexpr(k) for k in (0, 1, 2, 3, 9))
HALF_LN_2_PI = tl.constexpr(0.91893853320467274)
LEARNED_RANGE = tl.constexpr(1)


@triton.jit
def column(p_row, k: tl.constexpr, m_row):
    """Coefficient k of each row [BR, 1]."""
    return tl.load(p_row + k, mask=m_row, other=0.0)


@triton.jit
def used(p_row, SOURCE: tl.constexpr, m_row, OUTPUTS: tl.constexpr):
    """Some output has a coefficient for the source [BR, 1]."""
    any_c = column(p_row, COEF + SOURCE, m_row) != 0.0
    for i in tl.static_range(1, OUTPUTS):
        any_c = any_c | (column(p_row, COEF + 10 * i + SOURCE, m_row) != 0.0)
    return any_c


@triton.jit
def clamp_symmetric(b_v, bound):
    """min(max(v, -bound), bound); NaN stays NaN."""
    b_v = tl.where(-bound > b_v, -bound, b_v)
    return tl.where(bound < b_v, bound, b_v)


@triton.jit
def row_of_table(table, index, row, o_row, m_row, per_group, table_rows):
    """Pointers to the row of coefficients of each row of elements [BR, 1]; indices are clamped."""
    if index is None:
        i_row = row.to(tl.int64) + o_row * 0
    else:
        i_row = tl.load(index + o_row // per_group, mask=m_row, other=0)
        i_row = tl.minimum(tl.maximum(i_row, 0), table_rows.to(tl.int64) - 1)
    return table + i_row * COLUMNS


@triton.jit
def guided(
    models, strides, weights, weight_step, i_sample, o_row, m_row, first, o_col, m,
    MODELS: tl.constexpr, ALIGNED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """sum_j w_j m_j of 1 to 3 model outputs [BR, BC]."""
    if weights is None:
        return tile_of(models[0], strides[0], o_row, first, o_col, m, ALIGNED)
    else:
        b_sum = no_terms(BR, BC)
        b_some = m_row & False
        for j in tl.static_range(MODELS):
            w = per_row(weights, i_sample * weight_step + j, m_row, 0.0)  # [BR, 1]
            b_m = tile_of(models[j], strides[j], o_row, first, o_col, m & (w != 0.0), ALIGNED)
            b_sum = add_term(b_sum, b_m, w)
            b_some = b_some | (w != 0.0)
        return tl.where(b_some, b_sum, 0.0)


@triton.jit
def add_source(
    b_0, b_1, b_2, some_0, some_1, some_2, b_s, given, p_row, m_row,
    SOURCE: tl.constexpr, OUTPUTS: tl.constexpr, NOT_FIRST: tl.constexpr,
):  # fmt: skip
    """Adds a source to the outputs [BR, BC] that use it; notes which rows have a term [BR, 1]."""
    if not NOT_FIRST:
        c = tl.where(given, column(p_row, COEF + SOURCE, m_row), 0.0)
        b_0, some_0 = add_term(b_0, b_s, c), some_0 | (c != 0.0)
    if OUTPUTS > 1:
        c = tl.where(given, column(p_row, COEF + 10 + SOURCE, m_row), 0.0)
        b_1, some_1 = add_term(b_1, b_s, c), some_1 | (c != 0.0)
    if OUTPUTS > 2:
        c = tl.where(given, column(p_row, COEF + 20 + SOURCE, m_row), 0.0)
        b_2, some_2 = add_term(b_2, b_s, c), some_2 | (c != 0.0)
    return b_0, b_1, b_2, some_0, some_1, some_2


# Arguments that never compile a kernel anew, whatever their value.
STEP_SCALARS = ["strides", "row", "table_rows", "per_group", "per_sample", "weight_step"]


@triton.jit(do_not_specialize=[*STEP_SCALARS, "threshold_step", "level_step", *SCALARS])
def diffusion_step_kernel(
    x,
    models,  # 1 to 3, and None
    history,  # 6, None where empty
    z,
    variance,
    mask,
    known,
    known_z,
    sample,
    outs,  # 1 to 3, and None
    strides,  # elements between rows, of the tensors in the order above
    table,  # fp32 [R, 36]
    index,  # int64 [groups] or None
    row: tl.int64,
    table_rows: tl.int32,
    per_group: tl.int64,
    per_sample: tl.int64,
    weights,  # fp32 [models] or [B, models], or None
    weight_step: tl.int32,
    threshold,  # fp32 [1] or [B], or None
    threshold_step: tl.int32,
    level,  # fp32 [2] or [B, 2], or None
    level_step: tl.int32,
    log_prob,  # fp64 [rows, tiles] partial sums, or None
    seeds,
    seed: tl.int64,
    stream: tl.int64,
    offset: tl.int64,
    per_seed: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    tiles: tl.int32,
    MODELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DRAWS: tl.constexpr,
    VARIANCE: tl.constexpr,
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
    p_row = row_of_table(table, index, row, o_row, m_row, per_group, table_rows)
    i_sample = o_row // per_sample

    u_x0 = used(p_row, X0, m_row, OUTPUTS)
    d_x, d_m = column(p_row, 0, m_row), column(p_row, 1, m_row)
    r_x = used(p_row, X, m_row, OUTPUTS) | (u_x0 & (d_x != 0.0))
    r_m = used(p_row, M, m_row, OUTPUTS) | (u_x0 & (d_m != 0.0))
    b_x = tile_of(x, strides[0], o_row, first, o_col, m & r_x, ALIGNED)  # [BR, BC]
    b_m = guided(
        models, strides[1:4], weights, weight_step, i_sample, o_row, m_row, first, o_col, m & r_m,
        MODELS, ALIGNED, BR, BC,
    )  # fmt: skip
    b_x0 = tl.where(
        r_x & r_m, b_x * d_x + b_m * d_m, tl.where(r_x, b_x * d_x, b_m * d_m)
    )  # [BR, BC]
    b_x0 = clamp_symmetric(b_x0, column(p_row, 2, m_row))
    if threshold is not None:
        s = per_row(threshold, i_sample * threshold_step, m_row, 1.0)
        b_x0 = tl.div_rn(clamp_symmetric(b_x0, s), s + tl.zeros([BR, BC], tl.float32))
    u_x0 = u_x0 & (r_x | r_m)

    b_0, b_1, b_2 = no_terms(BR, BC), no_terms(BR, BC), no_terms(BR, BC)
    none = m_row & False
    some_0, some_1, some_2 = none, none, none
    b_0, b_1, b_2, some_0, some_1, some_2 = add_source(
        b_0, b_1, b_2, some_0, some_1, some_2, b_x, m_row, p_row, m_row, X, OUTPUTS, False
    )
    b_0, b_1, b_2, some_0, some_1, some_2 = add_source(
        b_0, b_1, b_2, some_0, some_1, some_2, b_m, m_row, p_row, m_row, M, OUTPUTS, False
    )
    b_0, b_1, b_2, some_0, some_1, some_2 = add_source(
        b_0, b_1, b_2, some_0, some_1, some_2, b_x0, u_x0, p_row, m_row, X0, OUTPUTS, False
    )
    for h in tl.static_range(6):
        if history[h] is not None:
            u_h = used(p_row, H1 + h, m_row, OUTPUTS)
            b_h = tile_of(history[h], strides[4 + h], o_row, first, o_col, m & u_h, ALIGNED)
            b_0, b_1, b_2, some_0, some_1, some_2 = add_source(
                b_0, b_1, b_2, some_0, some_1, some_2, b_h, u_h, p_row, m_row, H1 + h, OUTPUTS,
                False,
            )  # fmt: skip

    u_z = used(p_row, Z, m_row, OUTPUTS)
    a, b = 1.0 + tl.zeros([BR, 1], tl.float32), tl.zeros([BR, 1], tl.float32)
    if level is not None:
        a = per_row(level, i_sample * level_step, m_row, 1.0)
        b = per_row(level, i_sample * level_step + 1, m_row, 0.0)
    if DRAWS:
        wanted = u_z
        if mask is not None and known_z is None:
            wanted = wanted | (b != 0.0)
        b_eps = tl.zeros([BR, BC], tl.float32)
        if tl.max(wanted.to(tl.int32)) != 0:  # making noise costs more than all the loads
            b_eps = noise_blocks(b_block, b_seed, stream.to(tl.int64), NORMAL)
    elif z is not None:
        b_eps = tile_of(z, strides[10], o_row, first, o_col, m & u_z, ALIGNED)
    if DRAWS or z is not None:
        b_z = b_eps
        if VARIANCE != 0:
            b_v = tile_of(variance, strides[11], o_row, first, o_col, m & u_z, ALIGNED)
            if VARIANCE == LEARNED_RANGE:  # Nichol & Dhariwal 2021, eq. 15
                b_f = (b_v + 1.0) * 0.5
                low, high = column(p_row, 4, m_row), column(p_row, 5, m_row)
                b_z = b_eps * exp_of((b_f * high + (1.0 - b_f) * low) * 0.5)
            else:
                b_z = b_eps * tl.sqrt_rn(tl.where(0.0 > b_v, 0.0, b_v))
        b_0, b_1, b_2, some_0, some_1, some_2 = add_source(
            b_0, b_1, b_2, some_0, some_1, some_2, b_z, u_z, p_row, m_row, Z, OUTPUTS,
            log_prob is not None,
        )  # fmt: skip
    b_0 = tl.where(some_0, b_0, 0.0)

    if log_prob is not None:  # b_0 is the mean
        std = column(p_row, COEF + Z, m_row)
        if sample is not None:
            b_s = tile_of(sample, strides[15], o_row, first, o_col, m, ALIGNED)
        else:  # as the caller will see it, so that a replay gives the same number
            b_s = (b_0 + b_z * std).to(outs[0].dtype.element_ty).to(tl.float32)
        b_d = (b_s - b_0) * tl.div_rn(1.0, std)
        b_sum = tl.sum(tl.where(m, b_d * b_d, 0.0), axis=1, keep_dims=True)  # [BR, 1]
        n = tl.sum(m.to(tl.int32), axis=1, keep_dims=True).to(tl.float64)
        log_std = log_positive(tl.where(std < 0.0, -std, std)).to(tl.float64)
        b_lp = b_sum.to(tl.float64) * -0.5 - n * (log_std + HALF_LN_2_PI)
        tl.store(log_prob + o_row * tiles + first // BC, b_lp, mask=m_row)
        b_0 = b_s
    if mask is not None:
        b_t = tile_of(known, strides[13], o_row, first, o_col, m, ALIGNED) * a
        if known_z is not None:
            b_t = b_t + tile_of(known_z, strides[14], o_row, first, o_col, m, ALIGNED) * b
        elif DRAWS:
            b_t = tl.where(b != 0.0, b_t + b_eps * b, b_t)
        b_w = tile_of(mask, strides[12], o_row, first, o_col, m, ALIGNED)
        b_0 = b_0 * b_w + b_t * (1.0 - b_w)
    if IN_PLACE:  # a thread may store an element that another one has loaded
        tl.debug_barrier()
    store_tile(outs[0], strides[16], o_row, first, o_col, m, b_0, ALIGNED)
    if OUTPUTS > 1:
        b_1 = tl.where(some_1, b_1, 0.0)
        store_tile(outs[1], strides[17], o_row, first, o_col, m, b_1, ALIGNED)
    if OUTPUTS > 2:
        b_2 = tl.where(some_2, b_2, 0.0)
        store_tile(outs[2], strides[18], o_row, first, o_col, m, b_2, ALIGNED)


@triton.jit
def into(
    b_g0, b_g1, b_g2, grads, p_row, m_row,
    SOURCE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """sum_i c_i[SOURCE] g_i [BR, BC], and which rows have a term [BR, 1]."""
    b_sum = no_terms(BR, BC)
    b_some = m_row & False
    if grads[0] is not None:
        c = column(p_row, COEF + SOURCE, m_row)
        b_sum, b_some = add_term(b_sum, b_g0, c), b_some | (c != 0.0)
    if grads[1] is not None:
        c = column(p_row, COEF + 10 + SOURCE, m_row)
        b_sum, b_some = add_term(b_sum, b_g1, c), b_some | (c != 0.0)
    if grads[2] is not None:
        c = column(p_row, COEF + 20 + SOURCE, m_row)
        b_sum, b_some = add_term(b_sum, b_g2, c), b_some | (c != 0.0)
    return b_sum, b_some


@triton.jit(do_not_specialize=[*STEP_SCALARS, "threshold_step", "rows", "cols", "tiles"])
def diffusion_step_bwd_kernel(
    grads,  # 3, None: zero
    x,
    models,  # 1 to 3, and None
    mask,
    d_x,
    d_models,  # 3, None where not wanted, as the rest
    d_history,  # 6
    d_z,
    strides,  # elements between rows, of the tensors in the order above
    table,  # fp32 [R, 36]
    index,  # int64 [groups] or None
    row: tl.int64,
    table_rows: tl.int32,
    per_group: tl.int64,
    per_sample: tl.int64,
    weights,  # fp32 [models] or [B, models], or None
    weight_step: tl.int32,
    threshold,  # fp32 [1] or [B], or None
    threshold_step: tl.int32,
    rows: tl.int64,
    cols: tl.int64,
    tiles: tl.int32,
    MODELS: tl.constexpr,
    WANT_M: tl.constexpr,
    ALIGNED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """The transposed affine map, with the clamp's mask."""
    cols = cols // 8 * 8 if ALIGNED else cols
    o_row, m_row, first = place(tiles, rows, BR, BC)
    o_col = tl.arange(0, BC)[None, :]
    m = m_row & (first + o_col < cols)
    p_row = row_of_table(table, index, row, o_row, m_row, per_group, table_rows)
    i_sample = o_row // per_sample

    b_g0, b_g1, b_g2 = no_terms(BR, BC), no_terms(BR, BC), no_terms(BR, BC)
    if grads[0] is not None:
        b_g0 = tile_of(grads[0], strides[0], o_row, first, o_col, m, ALIGNED)  # [BR, BC]
        if mask is not None:  # of the blend only the generated part counts
            b_g0 = b_g0 * tile_of(mask, strides[7], o_row, first, o_col, m, ALIGNED)
    if grads[1] is not None:
        b_g1 = tile_of(grads[1], strides[1], o_row, first, o_col, m, ALIGNED)
    if grads[2] is not None:
        b_g2 = tile_of(grads[2], strides[2], o_row, first, o_col, m, ALIGNED)

    if d_x is not None or WANT_M:
        b_gx0, u_x0 = into(b_g0, b_g1, b_g2, grads, p_row, m_row, X0, BR, BC)
        bound = column(p_row, 2, m_row)
        if threshold is not None:
            s = per_row(threshold, i_sample * threshold_step, m_row, 1.0)
            bound = tl.where(bound < s, bound, s)
        b_bounded = u_x0 & (bound < float("inf"))
        m_x0 = m & b_bounded
        b_x = tile_of(x, strides[3], o_row, first, o_col, m_x0, ALIGNED)
        b_m = guided(
            models, strides[4:7], weights, weight_step, i_sample, o_row, m_row, first, o_col, m_x0,
            MODELS, ALIGNED, BR, BC,
        )  # fmt: skip
        b_raw = b_x * column(p_row, 0, m_row) + b_m * column(p_row, 1, m_row)
        b_kept = tl.where(tl.where(b_raw < 0.0, -b_raw, b_raw) > bound, 0.0, b_gx0)
        if threshold is not None:
            b_kept = tl.div_rn(b_kept, s + tl.zeros([BR, BC], tl.float32))
        b_gx0 = tl.where(b_bounded, b_kept, b_gx0)  # gradient of the unclamped x0
    if d_x is not None:
        b_sum, b_some = into(b_g0, b_g1, b_g2, grads, p_row, m_row, X, BR, BC)
        c = tl.where(u_x0, column(p_row, 0, m_row), 0.0)
        b_sum = tl.where(b_some | (c != 0.0), add_term(b_sum, b_gx0, c), 0.0)
        store_tile(d_x, strides[8], o_row, first, o_col, m, b_sum, ALIGNED)
    if WANT_M:
        b_sum, b_some = into(b_g0, b_g1, b_g2, grads, p_row, m_row, M, BR, BC)
        c = tl.where(u_x0, column(p_row, 1, m_row), 0.0)
        b_sum = tl.where(b_some | (c != 0.0), add_term(b_sum, b_gx0, c), 0.0)
        for j in tl.static_range(MODELS):
            if d_models[j] is not None:
                b_dm = b_sum
                if weights is not None:
                    w = per_row(weights, i_sample * weight_step + j, m_row, 0.0)
                    b_dm = tl.where(w != 0.0, b_sum * w, 0.0)
                store_tile(d_models[j], strides[9 + j], o_row, first, o_col, m, b_dm, ALIGNED)
    for h in tl.static_range(6):
        if d_history[h] is not None:
            b_sum, b_some = into(b_g0, b_g1, b_g2, grads, p_row, m_row, H1 + h, BR, BC)
            b_sum = tl.where(b_some, b_sum, 0.0)
            store_tile(d_history[h], strides[12 + h], o_row, first, o_col, m, b_sum, ALIGNED)
    if d_z is not None:
        b_sum, b_some = into(b_g0, b_g1, b_g2, grads, p_row, m_row, Z, BR, BC)
        b_sum = tl.where(b_some, b_sum, 0.0)
        store_tile(d_z, strides[18], o_row, first, o_col, m, b_sum, ALIGNED)


# ---- launchers ----------------------------------------------------------------------------------


def _padded(tensors, n: int) -> tuple:
    tensors = tuple(tensors or ())
    return (*tensors, *[None] * (n - len(tensors)))


def _fits(x, like_x, table, index, row) -> bool:
    present = [t for t in like_x if t is not None]
    if any(t.dtype not in FLOATS or t.shape != x.shape or t.device != x.device for t in present):
        return False
    if table.dtype != torch.float32 or table.dim() != 2 or table.shape[1] != COLUMNS.value:
        return False
    if not table.is_contiguous() or table.device != x.device:
        return False
    if index is None:
        return 0 <= row < table.shape[0]
    return index.dtype == torch.int64 and prefix_of(index, x)


class _Groups:
    """How rows of elements share rows of the table and numbers per sample."""

    def __init__(self, x, table, index, row, weights, models, threshold, level=None):
        self.step = {
            "weights": models if weights is not None and weights.numel() > models else 0,
            "threshold": int(threshold is not None and threshold.numel() > 1),
            "level": 2 if level is not None and level.numel() > 2 else 0,
        }
        per_sample = any(self.step.values())
        self.split = max(index.dim() if index is not None else 0, int(per_sample))
        self.table = (table, index, row, table.shape[0])
        self.groups = 1 if index is None else index.numel()
        self.batch = x.shape[0] if x.dim() else 1

    def args(self, rows: int, sampled: bool) -> tuple:
        """sampled: dim 0 is among the rows."""
        per_sample = rows // self.batch if sampled else rows
        return (*self.table, max(rows // self.groups, 1), max(per_sample, 1))


def diffusion_step(
    outs, x, models, weights, table, index, row, history, z, seed, seeds, stream, offset, draws,
    extras,
) -> bool:  # fmt: skip
    """Arguments of the native entry point of this name."""
    models, history = tuple(models), _padded(history, 6)
    count, outputs = len(models), len(outs)
    variance, threshold, mask, known, known_z, level, sample, log_prob = extras or (0, *[None] * 7)
    of_variance = None
    if variance:
        if x.dim() < 2 or any(m.shape[1] != 2 * x.shape[1] for m in models):
            return False
        of_variance = models[0][:, x.shape[1] :]
        models = tuple(m[:, : x.shape[1]] for m in models)
    inputs = [x, *_padded(models, 3), *history, z, of_variance, mask, known, known_z, sample]
    if not outputs or not _fits(x, [*inputs, *outs], table, index, row):
        return False
    if not all(vector_of(*t) for t in ((weights, x, count), (threshold, x), (level, x, 2))):
        return False
    if (count > 1 and weights is None) or (mask is None) != (known is None):
        return False
    if log_prob is not None and (variance or not vector_of(log_prob, x)):
        return False
    if log_prob is not None and sample is None and not draws and z is None:
        return False
    if known is not None and known_z is None and not draws and level is not None:
        return False
    if not fits_seeds(x, seeds, x.dim()) or offset < 0:
        return False
    in_place = False
    for i, out in enumerate(outs):
        if any(n > 1 and s == 0 for n, s in zip(out.shape, out.stride(), strict=True)):
            return False
        for t in inputs:
            if t is not None and overlaps_badly(out, t):
                return False
            in_place |= t is not None and t.data_ptr() == out.data_ptr()
        if any(overlaps(out, other) for other in outs[:i]):
            return False
    if x.numel() == 0:
        if log_prob is not None:
            log_prob.zero_()
        return True
    draws = draws and z is None
    seeds = seeds if draws else None
    g = _Groups(x, table, index, row, weights, count, threshold, level)
    many = seeds is not None and seeds.numel() > 1
    sampled = g.split > 0 or many or log_prob is not None
    r = as_rows(inputs, list(outs), split=max(g.split, int(sampled)))
    d = Draw(r, seed if draws else 0, seeds, stream if draws else 0, offset if draws else 0)
    partial = None
    if log_prob is not None:
        partial = log_prob.new_empty((r.rows, d.tiles), dtype=torch.float64)
    x, *rest = r.tensors
    launch(
        diffusion_step_kernel,
        d.programs,
        x,
        x,
        tuple(rest[:3]),
        tuple(rest[3:9]),
        *rest[9:15],
        tuple(rest[15:]),
        hidden(tuple(r.strides)),
        *g.args(r.rows, sampled),
        weights,
        g.step["weights"],
        threshold,
        g.step["threshold"],
        level,
        g.step["level"],
        partial,
        *d.noise,
        *d.shape,
        MODELS=count,
        OUTPUTS=outputs,
        DRAWS=draws,
        VARIANCE=variance,
        IN_PLACE=in_place,
        **d.flags,
    )
    if log_prob is not None:
        sum64(partial, log_prob)
    return r.finish()


def diffusion_step_backward(
    grads, x, models, weights, table, index, row, threshold, mask, d_x, d_models, d_history, d_z
) -> bool:
    """Arguments of the native entry point of this name."""
    models, count = tuple(models), len(models)
    inputs = [*_padded(grads, 3), x, *_padded(models, 3), mask]
    outputs = [d_x, *_padded(d_models, 3), *_padded(d_history, 6), d_z]
    if not _fits(x, [*inputs, *outputs], table, index, row):
        return False
    if not vector_of(weights, x, count) or not vector_of(threshold, x):
        return False
    if count > 1 and weights is None:
        return False
    if x.numel() == 0 or all(t is None for t in outputs):
        return True
    g = _Groups(x, table, index, row, weights, count, threshold)
    r = as_rows(inputs, outputs, split=g.split)
    d = Draw(r, 0, None, 0, 0)
    t = r.tensors
    launch(
        diffusion_step_bwd_kernel,
        d.programs,
        x,
        tuple(t[:3]),
        t[3],
        tuple(t[4:7]),
        t[7],
        t[8],
        tuple(t[9:12]),
        tuple(t[12:18]),
        t[18],
        hidden(tuple(r.strides)),
        *g.args(r.rows, g.split > 0),
        weights,
        g.step["weights"],
        threshold,
        g.step["threshold"],
        *d.shape,
        MODELS=count,
        WANT_M=any(m is not None for m in t[9:12]),
        **{k: d.flags[k] for k in ("ALIGNED", "BR", "BC")},
    )
    return r.finish()
