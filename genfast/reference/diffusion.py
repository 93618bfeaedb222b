"""The diffusion family in plain PyTorch: the truth the kernels are judged against. Noise is always
an argument.
"""

from __future__ import annotations

import torch

# columns of a row; genfast/schedulers/plan.py has the whole layout
D_X, D_M, CLIP, INPUT_SCALE, LOGVAR_MIN, LOGVAR_MAX, COEF = range(7)


def _acc(*tensors):
    """Computation dtype: float64 if any input is, else float32."""
    return (
        torch.float64
        if any(t is not None and t.dtype == torch.float64 for t in tensors)
        else torch.float32
    )


def _column(coef, k, x):
    """coef[..., k], shaped to broadcast against x: leading dims of coef are leading dims of x."""
    c = coef[..., k]
    return c.reshape(c.shape + (1,) * (x.ndim - c.ndim))


def diffusion_step(x, m, coef, *, history=(), noise=None, threshold=None, variance_mode=0, n_out=3):
    """One row of a solver plan.

    x: (B, ...). m: (B, ...) as x, or twice its channels (dim 1) with variance_mode 1
        (learned_range) or 2 (learned).
    coef: (36,), (B, 36) or (B, L, 36): a row for all, per sample, or per token of x (B, L, ...).
    history: up to 6 tensors like x, H1 first, None where empty. noise: like x, or None.
    threshold: (B,) bound s of dynamic thresholding: x0 = clamp(x0, -s, s) / s.
    Returns n_out tensors like x: next sample, and what goes to the history or is the denoised
        estimate.
    """
    dtype = _acc(x, m, noise, *history)
    coef = (
        coef if isinstance(coef, torch.Tensor) else torch.tensor(coef)
    )  # copies: plans are read-only
    coef = coef.to(x.device, dtype)
    x_, m_ = x.to(dtype), m.to(dtype)
    z = None if noise is None else noise.to(dtype)
    if variance_mode:
        m_, v = m_.split(x.shape[1], dim=1)
        if z is not None and variance_mode == 1:
            f = (v + 1) / 2
            lo, hi = _column(coef, LOGVAR_MIN, x), _column(coef, LOGVAR_MAX, x)
            # a row that draws no noise has both bounds 0, and its z is unused
            z = z * torch.exp(0.5 * (f * hi + (1 - f) * lo))
        elif z is not None:
            # a variance below 0 counts as 0; tiny keeps the root's gradient finite there
            z = z * v.clamp(min=torch.finfo(dtype).tiny).sqrt()
    x0 = _column(coef, D_X, x) * x_ + _column(coef, D_M, x) * m_
    x0 = torch.minimum(torch.maximum(x0, -_column(coef, CLIP, x)), _column(coef, CLIP, x))
    if threshold is not None:
        s = threshold.to(dtype).reshape((-1, *(1,) * (x.ndim - 1))[: x.ndim])
        x0 = torch.minimum(torch.maximum(x0, -s), s) / s
    sources = [x_, m_, x0, *(None if h is None else h.to(dtype) for h in history)]
    sources += [None] * (9 - len(sources)) + [z]
    outs = []
    for i in range(n_out):
        terms = [
            _column(coef, COEF + 10 * i + k, x) * s for k, s in enumerate(sources) if s is not None
        ]
        outs.append(sum(terms).to(x.dtype))
    return tuple(outs)


def blend(generated, mask, known, noise=None, alpha=None, sigma=None):
    """Inpainting (RePaint, Lugmayr et al. 2022, eq. 8): mask generated + (1 - mask) (alpha known +
    sigma noise). All like generated (B, ...); alpha, sigma: () or (B,), None for a clean known.
    """
    if alpha is not None:
        known = add_noise(known, torch.zeros_like(known) if noise is None else noise, alpha, sigma)
    return mask * generated + (1 - mask) * known


def _like(c, x):
    """c (), (B,) or (B, L) to broadcast against x."""
    c = torch.as_tensor(c, device=x.device)
    return c.reshape(c.shape + (1,) * (x.ndim - c.ndim))


def add_noise(x0, noise, alpha, sigma):
    """q(x_t | x0): alpha x0 + sigma noise. x0, noise: (B, ...). alpha, sigma: (), (B,) or (B, L).
    Flow: alpha = 1 - sigma.
    """
    dtype = _acc(x0, noise)
    a, s = _like(alpha, x0).to(dtype), _like(sigma, x0).to(dtype)
    return (a * x0.to(dtype) + s * noise.to(dtype)).to(x0.dtype)


def velocity(x0, noise, alpha, sigma):
    """v = alpha noise - sigma x0 (Salimans & Ho 2022). Shapes as in `add_noise`."""
    return add_noise(noise, -x0, alpha, sigma)


def scale_model_input(x, scale):
    """scale x. x: (B, ...), scale: (), (B,) or (B, L): the plan's input_scale column."""
    return (_like(scale, x).to(_acc(x)) * x.to(_acc(x))).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# guidance


def combine(outputs, weights):
    """sum_j g_j m_j over 1 to 3 model outputs m_j (B, ...); weights: numbers or (B,)."""
    return sum(
        _like(g, m).to(_acc(m)) * m.to(_acc(m)) for g, m in zip(weights, outputs, strict=True)
    ).to(outputs[0].dtype)


def _rows(a):
    """(B, ...) as (B, n)."""
    return a.flatten(1) if a.dim() > 1 else a[:, None]


def _dot(a, b):
    """Per-sample inner product, (B, 1, ...)."""
    return _rows(a * b).sum(1).reshape(-1, *(1,) * (a.ndim - 1))


def _var(a):
    return _rows(a).var(1, unbiased=False).reshape(-1, *(1,) * (a.ndim - 1))


def cfg(cond, uncond, scale, *, original=False):
    """Ho & Salimans 2022: uncond + w (cond - uncond); ``original``: cond + w (cond - uncond)."""
    return (cond if original else uncond) + scale * (cond - uncond)


def cfg_rescale(cond, uncond, scale, *, rescale=0.0, original=False):
    """Lin et al. 2023, eq. 15-16: the guided output brought towards cond's standard deviation, but
    one that is the same everywhere.
    """
    g = cfg(cond, uncond, scale, original=original)
    var = _var(g)
    ratio = torch.where(var == 0, 1.0, torch.sqrt(_var(cond) / var))
    return g * (rescale * ratio + (1 - rescale))


def cfg_zero_star(cond, uncond, scale, *, original=False):
    """Fan et al. 2025, CFG-Zero*: uncond scaled by its projection coefficient <cond, uncond> /
    |uncond|^2.
    """
    s = _dot(cond, uncond) / (_dot(uncond, uncond) + 1e-8)
    return cfg(cond, uncond * s, scale, original=original)


def apg(cond, uncond, scale, *, eta=1.0, norm_threshold=0.0, original=False, average=None):
    """Sadat et al. 2024, adaptive projected guidance: the difference is clamped in norm and its
    part parallel to cond (none, where that is all zero) is scaled by eta. average: running average
    of the differences (momentum).
    """
    d = cond - uncond if average is None else average
    if norm_threshold > 0:
        d = d * torch.clamp(norm_threshold / torch.sqrt(_dot(d, d)), max=1.0)
    cc = _dot(cond, cond)
    parallel = _dot(d, cond) / torch.where(cc > 0, cc, 1.0) * cond
    return (cond if original else uncond) + scale * ((d - parallel) + eta * parallel)


def mag(cond, uncond, scale, *, alpha=8.0, original=False):
    """Magnitude-aware guidance: w' = 1 + (w - 1) exp(-alpha |c-u| / |u|), exp(...) 1 where c = u;
    original: w exp(...).
    """
    d = cond - uncond
    dd = _dot(d, d)
    damp = torch.exp(-alpha * torch.sqrt(dd) / torch.sqrt(_dot(uncond, uncond)))
    damp = torch.where(dd == 0, 1.0, damp)
    w = scale * damp if original else 1 + (scale - 1) * damp
    return cfg(cond, uncond, w, original=original)


def tcfg(cond, uncond, scale, *, original=False):
    """Kwon et al. 2025, tangential damping: uncond keeps its part along the first right singular
    vector of [cond; uncond].
    """
    cc, uu, cu = _dot(cond, cond), _dot(uncond, uncond), _dot(cond, uncond)
    # the first singular vector is p cond + q uncond with (p, q) the top eigenvector of the 2x2 Gram
    # matrix
    top = (cc + uu) / 2 + torch.sqrt(((cc - uu) / 2) ** 2 + cu**2)
    # two forms of the same eigenvector; take the one that is not close to zero
    first = cc >= uu
    p, q = torch.where(first, top - uu, cu), torch.where(first, cu, top - cc)
    v = p * cond + q * uncond
    vv = _dot(v, v)  # 0: orthogonal of one length, cond itself is such a vector; or both are 0
    uncond = _dot(uncond, v) / torch.where(vv > 0, vv, 1.0) * v
    return cfg(cond, uncond, scale, original=original)


GUIDANCE = {
    "cfg": cfg,
    "rescale": cfg_rescale,
    "cfg_zero_star": cfg_zero_star,
    "apg": apg,
    "mag": mag,
    "tcfg": tcfg,
}


def guidance_weights(cond, uncond, scale, *, method, original, options, average=False):
    """(B, 2) weights of (cond, uncond) that repeat the methods above from five sums per sample, in
    fp64: what the kernels compute. options: (rescale, -), (eta, norm_threshold) or (alpha, -).
    average: `uncond` is the running average; (B, 3) weights of (cond, uncond, average) then.
    """
    c, u = _rows(cond).double(), _rows(uncond).double()
    n, w = c.shape[1], scale.double().expand(c.shape[0])
    cc, uu, cu = (c * c).sum(1), (u * u).sum(1), (c * u).sum(1)
    one = torch.ones_like(w)
    w_c, w_u = (1 + w, -w) if original else (w, 1 - w)
    if method == "rescale":
        var_c, var_u = cc - c.sum(1) ** 2 / n, uu - u.sum(1) ** 2 / n
        var_g = w_c**2 * var_c + w_u**2 * var_u + 2 * w_c * w_u * (cu - c.sum(1) * u.sum(1) / n)
        least = 1e-13 * (w_c**2 * cc + w_u**2 * uu)  # rounding leaves less of one that is constant
        ratio = torch.where(var_g <= least, 1.0, torch.sqrt(var_c.clamp(min=0) / var_g))
        factor = options[0] * ratio + (1 - options[0])
        w_c, w_u = w_c * factor, w_u * factor
    elif method == "cfg_zero_star":
        w_u = w_u * cu / (uu + 1e-8)
    elif method == "apg":
        dd, dc = (uu, cu) if average else (cc + uu - 2 * cu, cc - cu)
        shrink = one
        if options[1] > 0:
            shrink = torch.clamp(options[1] / dd.clamp(min=0).sqrt(), max=1.0)
        along = (1 - options[0]) * shrink * dc / torch.where(cc > 0, cc, 1.0)
        w_c, w_u = (one - w * along, 0 * one) if original else (-w * along, one)
        if average:
            return torch.stack([w_c, w_u, w * shrink], -1)
        w_c, w_u = w_c + w * shrink, w_u - w * shrink
    elif method == "mag":
        dd = (cc + uu - 2 * cu).clamp(min=0)
        damp = torch.where(dd == 0, 1.0, torch.exp(-options[0] * dd.sqrt() / uu.sqrt()))
        w = w * damp if original else 1 + (w - 1) * damp
        w_c, w_u = (1 + w, -w) if original else (w, 1 - w)
    elif method == "tcfg":
        top = (cc + uu) / 2 + torch.sqrt(((cc - uu) / 2) ** 2 + cu**2)
        first = cc >= uu
        p, q = torch.where(first, top - uu, cu), torch.where(first, cu, top - cc)
        vv = p * p * cc + q * q * uu + 2 * p * q * cu
        r = (p * cu + q * uu) / torch.where(vv > 0, vv, 1.0)
        w_c, w_u = w_c + w_u * r * p, w_u * r * q
    return torch.stack([w_c, w_u], -1)


def guide(cond, uncond=None, scale=1.0, *, method="cfg", **options):
    """One guided model output from a conditional and an unconditional one, each (B, ...). scale:
    number or (B,).
    method: a key of `GUIDANCE`, which takes the options. Without uncond, cond itself."""
    if uncond is None:
        return cond
    dtype = _acc(cond, uncond)
    w = scale if isinstance(scale, (int, float)) else _like(scale, cond).to(dtype)
    return GUIDANCE[method](cond.to(dtype), uncond.to(dtype), w, **options).to(cond.dtype)


def dynamic_threshold(x0, ratio=0.995, max_value=1.0):
    """(B,) bound s = clamp(quantile of |x0| at ratio, 1, max_value), linear interpolation (Saharia
    et al. 2022, sec. 2.3).

    By sorting, so without torch.quantile's limit of 2^24 elements. NaN anywhere gives NaN.
    """
    a = _rows(x0.to(_acc(x0))).abs().sort(dim=1).values
    rank = ratio * (a.shape[1] - 1)
    low = int(rank)
    weight = rank - low
    at, above = a[:, low], a[:, min(low + 1, a.shape[1] - 1) if weight else low]
    s = torch.where(above.isinf(), above, torch.lerp(at, above, weight))  # lerp: inf - inf
    s = torch.where(torch.isnan(a[:, -1]), a[:, -1], s)  # sort puts NaN last
    return torch.maximum(s, s.new_tensor(1.0)).minimum(s.new_tensor(max_value))


# --------------------------------------------------------------------------------------------------
# training


def _target(prediction, x0, noise, alpha, sigma):
    return {
        "epsilon": lambda: noise,
        "sample": lambda: x0,
        "v_prediction": lambda: alpha * noise - sigma * x0,
        "flow_prediction": lambda: noise - x0,
    }[prediction]()


def loss_weight(weighting, prediction, alpha, sigma, *, gamma=5.0, k=1.0):
    """Weight per sample of the squared error of this prediction, like alpha. snr = alpha^2 /
    sigma^2.

    "none": 1. "min_snr": min(snr, gamma) on the error of x0 (Hang et al. 2023, sec. 3.4): / snr for
    epsilon, / (snr + 1) for v, * sigma^2 for flow. "p2": 1 / (k + snr)^gamma (Choi et al. 2022).
    "snr": snr. "sigma_sqrt": sigma^-2, "cosmap": 2 / (pi (1 - 2 sigma + 2 sigma^2)) (Esser et al.
    2024, sec. 3.1). "edm": 1/sigma^2 + 1/sigma_data^2, sigma_data 0.5.
    """
    snr = (alpha / sigma) ** 2
    per = {"sample": 1.0, "v_prediction": snr + 1, "flow_prediction": sigma**-2}
    return {
        "none": lambda: torch.ones_like(snr),
        "min_snr": lambda: (
            (gamma / snr).clamp(max=1)  # at snr 0 too
            if prediction == "epsilon"
            else snr.clamp(max=gamma) / per[prediction]
        ),
        "p2": lambda: (k + snr) ** -gamma,
        "snr": lambda: snr,
        "sigma_sqrt": lambda: sigma**-2,
        "cosmap": lambda: 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2)),
        "edm": lambda: sigma**-2 + 4.0 * torch.ones_like(snr),
    }[weighting]()


def denoising_loss(
    output,
    x0,
    noise,
    alpha,
    sigma,
    *,
    prediction="epsilon",
    weighting="none",
    reduction="mean",
    **options,
):
    """weight (output - target)^2, target from x0 and noise. output, x0, noise: (B, ...); alpha,
    sigma: () or (B,).
    reduction: "mean" over all elements, "none" for the mean of each sample (B,), "sum" for the sum
        of those means."""
    dtype = _acc(output, x0, noise)
    out, x0, noise = output.to(dtype), x0.to(dtype), noise.to(dtype)
    a, s = _like(alpha, x0).to(dtype), _like(sigma, x0).to(dtype)
    error = (out - _target(prediction, x0, noise, a, s)) ** 2
    loss = _rows(loss_weight(weighting, prediction, a, s, **options) * error).mean(1)
    return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()


def step_log_prob(sample, mean, std, *, reduction="mean"):
    """log N(sample; mean, std^2), for policy gradients through a sampler (Black et al. 2023, eq.
    10).

    sample, mean: (B, ...), std: (), (B,) or like mean. reduction over all but the batch: "mean" or
        "sum"; returns (B,).
    """
    dtype = _acc(sample, mean)
    std = _like(std, mean).to(dtype)
    log_p = (
        -0.5 * ((sample.to(dtype) - mean.to(dtype)) / std) ** 2
        - torch.log(std)
        - 0.9189385332046727
    )  # ln(2 pi)/2
    return getattr(_rows(log_p), reduction)(1)
