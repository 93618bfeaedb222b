"""Few-step samplers of distilled models: LCM, TCD and consistency models."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ._check import finite, number, positive, rows_from, sigma_range
from .convert import vp
from .plan import M, PlanBuilder, SolverPlan, X, Z
from .schedules import AlphaGrid, SigmaGrid, alpha_grid, distilled_timesteps


def _grid(grid, chain) -> AlphaGrid:
    if isinstance(grid, AlphaGrid):
        return grid
    return alpha_grid(distilled_timesteps(grid) if np.ndim(grid) == 0 else grid, chain=chain)


def lcm_plan(
    grid: AlphaGrid | ArrayLike,
    *,
    prediction: str = "epsilon",
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
    begin: int = 0,
) -> SolverPlan:
    """Latent consistency models (Luo et al. 2023, eq. 9 and alg. 3): denoised = c_skip(t) x +
    c_out(t) x0, noised again to the next timestep; the last step returns it. grid: steps (of 50
    distilled ones), timesteps, or `AlphaGrid` with chain "repeat"."""
    grid = _grid(grid, "repeat")
    timestep_scaling = finite("timestep_scaling", timestep_scaling, above=True)
    sigma_data = finite("sigma_data", sigma_data, above=True)
    plan = PlanBuilder("lcm", clip=clip, threshold=threshold)
    for i in rows_from(begin, len(grid)):
        a_t, a_p = grid.alpha_bar[i], grid.alpha_bar_next[i]
        x0, _ = vp(prediction, math.sqrt(a_t), math.sqrt(1 - a_t))
        t = grid.timesteps[i] * timestep_scaling
        r = math.hypot(t, sigma_data)
        denoised = t / r * plan.x0(x0) + (sigma_data / r) ** 2 * X
        last = i == len(grid) - 1
        prev = denoised if last else math.sqrt(a_p) * denoised + math.sqrt(1 - a_p) * Z
        plan.row(grid.timesteps[i], math.sqrt(1 - a_t), x0, prev, denoised=denoised, step=i)
    return plan.build()


def tcd_plan(
    grid: AlphaGrid | ArrayLike, *, prediction: str = "epsilon", eta: float = 0.3, begin: int = 0
) -> SolverPlan:
    """Trajectory consistency (Zheng et al. 2024, alg. 4, strategic stochastic sampling): DDIM to s
    = floor((1 - eta) t_next), then noise up to t_next. The "denoised" output is the sample at s.
    grid: as in `lcm_plan`, chain "zero"."""
    grid = _grid(grid, "zero")
    eta = number("eta", eta, 0.0, 1.0)
    plan = PlanBuilder("tcd")
    for i in rows_from(begin, len(grid)):
        last = i == len(grid) - 1
        t_next = 0 if last else grid.timesteps[i + 1]
        # in fp32, as diffusers computes it: the result indexes a table, so a last bit can matter
        t_s = int(np.floor(np.float32(1 - eta) * np.float32(t_next)))
        a_t, a_p, a_s = grid.alpha_bar[i], grid.alpha_bar_next[i], float(grid.at(t_s))
        x0, eps = vp(prediction, math.sqrt(a_t), math.sqrt(1 - a_t))
        at_s = math.sqrt(a_s) * x0 + math.sqrt(1 - a_s) * eps
        prev = at_s
        if eta > 0 and not last:
            prev = math.sqrt(a_p / a_s) * at_s + math.sqrt(max(1 - a_p / a_s, 0.0)) * Z
        plan.row(
            grid.timesteps[i],
            math.sqrt(1 - a_t),
            x0,
            prev,
            denoised=at_s,
            draws=eta > 0 and not last,
            step=i,
        )
    return plan.build()


def consistency_grid(
    steps: ArrayLike,
    *,
    T: int = 40,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> SigmaGrid:
    """Sigmas of the visited indices of a T-point Karras ramp; timesteps 250 ln sigma. steps: N <=
    T, or descending indices < T.
    """
    sigma_range(sigma_min, sigma_max, rho)
    if np.ndim(steps) == 0:
        N = positive("steps", steps)
        if N > positive("T", T):
            raise ValueError(f"steps: expected at most {T}, the points of the ramp, got {N}")
        index = np.arange(N) * (T // N)
    else:
        index = np.asarray(steps, np.float64)[::-1]
        whole = index.ndim == 1 and index.size and (index == np.round(index)).all()
        if not whole or index[0] < 0 or index[-1] >= T or not (np.diff(index) > 0).all():
            raise ValueError(
                f"steps: expected descending whole indices in [0, {T - 1}], got "
                f"{list(np.ravel(steps))[:8]}"
            )
    ramp = index / (T - 1)
    hi, lo = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (hi + ramp * (lo - hi)) ** rho
    return SigmaGrid(
        250 * np.log(sigmas + 1e-44),
        np.append(sigmas, sigma_min),
        "edm",
        init_noise_sigma=sigma_max,
    )


def consistency_plan(
    grid: SigmaGrid | ArrayLike,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    sigma_data: float = 0.5,
    s_noise: float = 1.0,
    clip: float | None = 1.0,
    begin: int = 0,
) -> SolverPlan:
    """Consistency models (Song et al. 2023, alg. 1; boundary scalings: app. C): denoise fully,
    noise again to the next sigma.
    """
    grid = (
        grid
        if isinstance(grid, SigmaGrid)
        else consistency_grid(grid, sigma_min=sigma_min, sigma_max=sigma_max)
    )
    sigma_range(sigma_min, sigma_max, 1.0)
    sigma_data = finite("sigma_data", sigma_data, above=True)
    s_noise = finite("s_noise", s_noise)
    plan = PlanBuilder("consistency", clip=clip)
    for i in rows_from(begin, len(grid)):
        s = grid.sigmas[i]
        c_skip = sigma_data**2 / ((s - sigma_min) ** 2 + sigma_data**2)
        c_out = (s - sigma_min) * sigma_data / math.hypot(s, sigma_data)
        form = c_skip * X + c_out * M
        D = plan.x0(form)
        s_hat = min(max(grid.sigmas[i + 1], sigma_min), sigma_max)
        noise = s_noise * math.sqrt(s_hat**2 - sigma_min**2) if len(grid) > 1 else 0.0
        plan.row(
            grid.timesteps[i],
            s,
            form,
            D + noise * Z,
            denoised=D,
            draws=len(grid) > 1,
            step=i,
            input_scale=1 / math.hypot(s, sigma_data),
        )
    return plan.build(init_noise_sigma=sigma_max, integer_timesteps=False)
