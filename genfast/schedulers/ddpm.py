"""Ancestral and implicit samplers on integer timesteps: DDPM, DDIM, DDIM inversion."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ._check import choice, number, rows_from
from .convert import vp
from .plan import X0, PlanBuilder, SolverPlan, X, Z
from .schedules import AlphaGrid, NoiseSchedule, alpha_grid

#: variance type -> (standard deviation or None when the model gives it, plan's variance mode) from
#: (beta, beta_tilde). fixed_large_log is exp(log(beta) / 2); diffusers takes the root of log(beta),
#: which is NaN.
DDPM_VARIANCES = {
    "fixed_small": lambda beta, tilde: (math.sqrt(tilde), "fixed"),
    "fixed_small_log": lambda beta, tilde: (math.sqrt(tilde), "fixed"),
    "fixed_large": lambda beta, tilde: (math.sqrt(beta), "fixed"),
    "fixed_large_log": lambda beta, tilde: (math.sqrt(beta), "fixed"),
    "learned": lambda beta, tilde: (1.0, "learned"),
    "learned_range": lambda beta, tilde: (1.0, "learned_range"),
}


def _grid(grid, **kw) -> AlphaGrid:
    return grid if isinstance(grid, AlphaGrid) else alpha_grid(grid, **kw)


def ddpm_plan(
    grid: AlphaGrid | ArrayLike,
    *,
    prediction: str = "epsilon",
    variance: str = "fixed_small",
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
    begin: int = 0,
) -> SolverPlan:
    """Ho et al. 2020, eq. 6-7: the posterior mean of x_{t-1} given x_t and the predicted x0, plus
    beta_tilde noise.

    grid: number of steps, descending timesteps, or an `AlphaGrid`. variance:
        "fixed_small", "fixed_large", either with "_log", "learned" or "learned_range". clip: |x0|
        bound.
    threshold: (ratio, max) of dynamic thresholding (Saharia et al. 2022). begin: first step run
        (image to image).
    """
    grid = _grid(grid)
    std = choice("variance", variance, DDPM_VARIANCES)
    plan = PlanBuilder("ddpm", clip=clip, threshold=threshold)
    for i in rows_from(begin, len(grid)):
        t, a_t, a_p = grid.timesteps[i], grid.alpha_bar[i], grid.alpha_bar_next[i]
        alpha, b_t, b_p = a_t / a_p, 1 - a_t, 1 - a_p
        beta = 1 - alpha
        tilde = max(b_p / b_t * beta, 1e-20)
        x0, _ = vp(prediction, math.sqrt(a_t), math.sqrt(b_t))
        D = plan.x0(x0)
        prev = math.sqrt(a_p) * beta / b_t * D + math.sqrt(alpha) * b_p / b_t * X
        sd, mode = std(beta, tilde)
        noisy = t > 0
        plan.row(
            t,
            math.sqrt(b_t),
            x0,
            prev + sd * Z if noisy else prev,
            denoised=D,
            step=i,
            variance=mode,
            logvar=(math.log(tilde), math.log(max(beta, 1e-20))),
        )
    return plan.build()


def ddim_plan(
    grid: AlphaGrid | ArrayLike,
    *,
    prediction: str = "epsilon",
    eta: float = 0.0,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
    use_clipped_eps: bool = False,
    begin: int = 0,
) -> SolverPlan:
    """Song et al. 2021 (DDIM), eq. 12 and 16: prev = sqrt(a_p) x0 + sqrt(1 - a_p - s^2) eps + s z,
    s = eta sqrt((1-a_p)/(1-a_t) (1 - a_t/a_p)). eta: 0 deterministic, 1 DDPM-like.
    use_clipped_eps: take eps from the clamped x0 rather than from the model output.
    A step of a number of steps goes to t - T // N, as in diffusers, one of given timesteps to the
    next of them.
    """
    grid = _grid(grid, chain="stride" if np.ndim(grid) == 0 else "visited")
    eta = number("eta", eta, 0.0, 1.0)
    plan = PlanBuilder("ddim", clip=clip, threshold=threshold)
    for i in rows_from(begin, len(grid)):
        a_t, a_p = grid.alpha_bar[i], grid.alpha_bar_next[i]
        a, s = math.sqrt(a_t), math.sqrt(1 - a_t)
        x0, eps = vp(prediction, a, s)
        D = plan.x0(x0)
        if use_clipped_eps and plan.opaque:
            eps = (X - a * X0) / s
        sd = eta * math.sqrt(max((1 - a_p) / (1 - a_t) * (1 - a_t / a_p), 0.0))
        prev = math.sqrt(a_p) * D + math.sqrt(max(1 - a_p - sd**2, 0.0)) * eps + sd * Z
        plan.row(grid.timesteps[i], s, x0, prev, denoised=D, draws=eta > 0, step=i)
    return plan.build()


def ddim_inverse_grid(
    steps: int,
    schedule: NoiseSchedule,
    *,
    spacing: str = "leading",
    offset: int = 0,
    initial_alpha_bar: float = 1.0,
) -> AlphaGrid:
    """Ascending grid for `ddim_inverse_plan`: from alpha_bar at t - T // N (initial_alpha_bar below
    0) to alpha_bar at t.
    """
    up = alpha_grid(
        steps,
        schedule,
        spacing=spacing,
        offset=offset,
        chain="stride",
        final_alpha_bar=initial_alpha_bar,
    )
    return AlphaGrid(
        up.timesteps[::-1],
        up.alpha_bar_next[::-1],
        up.alpha_bar[::-1],
        schedule,
        initial_alpha_bar,
        up.stride,
    )


def ddim_inverse_plan(
    grid: AlphaGrid, *, prediction: str = "epsilon", clip: float | None = None, begin: int = 0
) -> SolverPlan:
    """DDIM from data to noise (Mokady et al. 2022, sec. 3.2). grid: from `ddim_inverse_grid`."""
    if not isinstance(grid, AlphaGrid):
        raise TypeError(
            f"grid: expected an AlphaGrid, got {grid!r}; make one with ddim_inverse_grid"
        )
    plan = PlanBuilder("ddim_inverse", clip=clip)
    for i in rows_from(begin, len(grid)):
        a_t, a_p = grid.alpha_bar[i], grid.alpha_bar_next[i]
        x0, eps = vp(prediction, np.sqrt(a_t), np.sqrt(1 - a_t))
        D = plan.x0(x0)
        prev = math.sqrt(a_p) * D + math.sqrt(1 - a_p) * eps
        plan.row(grid.timesteps[i], math.sqrt(1 - a_t), x0, prev, denoised=D, step=i)
    return plan.build()
