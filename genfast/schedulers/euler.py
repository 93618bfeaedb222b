"""First and second order solvers in sigma (x = x0 + sigma eps): Euler, Euler ancestral, Heun,
KDPM2, DPM-Solver++ SDE in two stages, LMS, and EDM Euler.

All follow Karras et al. 2022: d = (x - x0) / sigma is dx/dsigma.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from . import _check
from ._check import finite, number, positive, rows_from
from .convert import edm, input_scale, ve
from .plan import PlanBuilder, SolverPlan, X, Z, sym
from .schedules import SigmaGrid, edm_grid, sigma_grid, sigma_to_t


def _grid(grid) -> SigmaGrid:
    return grid if isinstance(grid, SigmaGrid) else sigma_grid(grid)


def _build(plan: PlanBuilder, grid: SigmaGrid) -> SolverPlan:
    return plan.build(init_noise_sigma=grid.init_noise_sigma, integer_timesteps=False)


def churn(s: float, steps: int, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float):
    """(sigma_hat, standard deviation of the added noise) of Karras et al. 2022, alg. 2."""
    gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_tmin <= s <= s_tmax else 0.0
    s_hat = s * (gamma + 1)
    return s_hat, s_noise * math.sqrt(max(s_hat**2 - s**2, 0.0))


def _substitute(form, x_hat):
    """form with x replaced by x_hat."""
    cx = form.terms.get("x", 0.0)
    return form - cx * X + cx * x_hat


def _euler_rows(plan, grid, x0_of, c_in, *, churn_steps, begin, **settings):
    settings = _check.churn(**settings)
    steps = len(grid) if churn_steps is None else positive("churn_steps", churn_steps)
    for i in rows_from(begin, len(grid)):
        s, s_next = grid.sigmas[i], grid.sigmas[i + 1]
        s_hat, sd = churn(s, steps, **settings)
        x_hat = X + sd * Z
        form = x0_of(s, s_hat)
        D = _substitute(plan.x0(form), x_hat) if sd else plan.x0(form)
        prev = x_hat + (x_hat - D) * ((s_next - s_hat) / s_hat)
        plan.row(
            grid.timesteps[i],
            s,
            form,
            prev,
            denoised=D,
            input_scale=c_in(s),
            draws=s_hat > s,
            step=i,
        )


def euler_plan(
    grid: SigmaGrid | ArrayLike,
    *,
    prediction: str = "epsilon",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    churn_steps: int | None = None,
    clip: float | None = None,
    begin: int = 0,
) -> SolverPlan:
    """Euler steps dx = d dsigma, with churn (Karras et al. 2022, alg. 2 without the 2nd order
    correction).

    As in diffusers the churn noise is added after the model was evaluated at sigma; epsilon models
    are then read at sigma_hat, v models at sigma. grid: number of steps or `SigmaGrid`.
    churn_steps: N in gamma = s_churn / N.
    """
    grid = _grid(grid)
    if clip is not None and s_churn:
        raise ValueError(f"clip: expected None with churn (x0 then contains noise), got {clip}")
    plan = PlanBuilder("euler", clip=clip)

    def x0_of(s, s_hat):
        return ve(prediction, s_hat if prediction == "epsilon" else s)

    _euler_rows(
        plan,
        grid,
        x0_of,
        lambda s: input_scale("ve", s),
        s_churn=s_churn,
        s_tmin=s_tmin,
        s_tmax=s_tmax,
        s_noise=s_noise,
        churn_steps=churn_steps,
        begin=begin,
    )
    return _build(plan, grid)


def edm_euler_plan(
    grid: SigmaGrid | ArrayLike,
    *,
    prediction: str = "epsilon",
    sigma_data: float = 0.5,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    begin: int = 0,
) -> SolverPlan:
    """Euler with EDM preconditioning: x0 = c_skip x + c_out m at sigma_hat (Karras et al. 2022,
    table 1 and alg. 2).
    """
    grid = grid if isinstance(grid, SigmaGrid) else edm_grid(grid)
    sigma_data = finite("sigma_data", sigma_data, above=True)
    plan = PlanBuilder("edm_euler")
    _euler_rows(
        plan,
        grid,
        lambda s, s_hat: edm(prediction, s_hat, sigma_data),
        lambda s: input_scale("edm", s, sigma_data),
        s_churn=s_churn,
        s_tmin=s_tmin,
        s_tmax=s_tmax,
        s_noise=s_noise,
        churn_steps=None,
        begin=begin,
    )
    return _build(plan, grid)


def ancestral(s: float, s_next: float, eta: float = 1.0) -> tuple[float, float]:
    """(sigma_down, sigma_up) with sigma_down^2 + sigma_up^2 = sigma_next^2 (k-diffusion,
    get_ancestral_step).
    """
    up = min(s_next, eta * math.sqrt(max(s_next**2 * (s**2 - s_next**2) / s**2, 0.0)))
    return math.sqrt(max(s_next**2 - up**2, 0.0)), up


def euler_ancestral_plan(
    grid: SigmaGrid | ArrayLike,
    *,
    prediction: str = "epsilon",
    eta: float = 1.0,
    clip: float | None = None,
    begin: int = 0,
) -> SolverPlan:
    """Euler to sigma_down, then noise sigma_up (k-diffusion, sample_euler_ancestral)."""
    grid, eta = _grid(grid), number("eta", eta, 0.0, math.inf)
    plan = PlanBuilder("euler_ancestral", clip=clip)
    for i in rows_from(begin, len(grid)):
        s, s_next = grid.sigmas[i], grid.sigmas[i + 1]
        down, up = ancestral(s, s_next, eta)
        form = ve(prediction, s)
        D = plan.x0(form)
        prev = X + (X - D) * ((down - s) / s) + up * Z
        plan.row(
            grid.timesteps[i],
            s,
            form,
            prev,
            denoised=D,
            input_scale=input_scale("ve", s),
            draws=True,
            step=i,
        )
    return _build(plan, grid)


def heun_plan(
    grid: SigmaGrid | ArrayLike,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    begin: int = 0,
) -> SolverPlan:
    """Heun's second order (Karras et al. 2022, alg. 1): two rows a step, one for a last step to
    sigma = 0.

    Row 1 keeps x + d dt/2, all that row 2 needs of it.
    """
    grid = _grid(grid)
    plan = PlanBuilder("heun", clip=clip)
    for i in rows_from(begin, len(grid)):
        s, s_next = grid.sigmas[i], grid.sigmas[i + 1]
        form = ve(prediction, s)
        D = plan.x0(form)
        d, dt = (X - D) / s, s_next - s
        plan.row(
            grid.timesteps[i],
            s,
            form,
            X + d * dt,
            save={f"half{i}": X + d * (dt / 2)},
            denoised=D,
            input_scale=input_scale("ve", s),
            step=i,
        )
        if i + 1 < len(grid):
            form = ve(prediction, s_next)
            D = plan.x0(form)
            prev = sym(f"half{i}") + (X - D) / s_next * (dt / 2)
            plan.row(
                grid.timesteps[i + 1],
                s_next,
                form,
                prev,
                denoised=D,
                input_scale=input_scale("ve", s_next),
                step=i,
                stage=1,
            )
    return _build(plan, grid)


def _kdpm2(name, grid, prediction, clip, begin, target, noisy):
    """KDPM2: Euler to the geometric middle of sigma and sigma_to, evaluate there, then the full
    step from the saved x.
    """
    grid = _grid(grid)
    plan = PlanBuilder(name, clip=clip)
    for i in rows_from(begin, len(grid)):
        s, s_next = grid.sigmas[i], grid.sigmas[i + 1]
        s_to, up = target(s, s_next)
        last = s_to == 0
        s_mid = 0.0 if last else math.exp((math.log(s) + math.log(s_to)) / 2)
        form = ve(prediction, s)
        D = plan.x0(form)
        plan.row(
            grid.timesteps[i],
            s,
            form,
            X + (X - D) / s * (s_mid - s),
            save={f"saved{i}": X},
            denoised=D,
            input_scale=input_scale("ve", s),
            step=i,
        )
        if not last:
            form = ve(prediction, s_mid)
            D = plan.x0(form)
            prev = sym(f"saved{i}") + (X - D) / s_mid * (s_to - s) + up * Z
            t_mid = sigma_to_t(s_mid, grid.table)
            plan.row(
                t_mid,
                s_mid,
                form,
                prev,
                denoised=D,
                input_scale=input_scale("ve", s_mid),
                draws=noisy,
                step=i,
                stage=1,
            )
    return _build(plan, grid)


def kdpm2_plan(
    grid: SigmaGrid | ArrayLike,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    begin: int = 0,
) -> SolverPlan:
    """DPM-Solver-2 in sigma (k-diffusion, sample_dpm_2; Karras et al. 2022, app. C.3): two rows a
    step, one for the last.
    """
    return _kdpm2("kdpm2", grid, prediction, clip, begin, lambda s, s_next: (s_next, 0.0), False)


def kdpm2_ancestral_plan(
    grid: SigmaGrid | ArrayLike,
    *,
    prediction: str = "epsilon",
    eta: float = 1.0,
    clip: float | None = None,
    begin: int = 0,
) -> SolverPlan:
    """DPM-Solver-2 to sigma_down, then noise sigma_up (k-diffusion, sample_dpm_2_ancestral)."""
    eta = number("eta", eta, 0.0, math.inf)
    return _kdpm2(
        "kdpm2_ancestral",
        grid,
        prediction,
        clip,
        begin,
        lambda s, s_next: ancestral(s, s_next, eta),
        True,
    )


def dpm_sde_plan(
    grid: SigmaGrid | ArrayLike,
    *,
    prediction: str = "epsilon",
    eta: float = 1.0,
    s_noise: float = 1.0,
    clip: float | None = None,
    begin: int = 0,
) -> SolverPlan:
    """DPM-Solver++ (SDE) in two stages, the second from the geometric middle of sigma and its next
    (k-diffusion, sample_dpmpp_sde with r = 1/2): two rows a step, one for a last step to sigma = 0.

    eta: 0 takes no noise (an ODE), 1 all of the SDE's. s_noise: factor of the noise.
    Both stages follow one Brownian path W, in time sigma:

        z_1 = (W(sigma) - W(mid)) / sqrt(sigma - mid)
        z = (W(sigma) - W(next)) / sqrt(sigma - next)

    The increments of [next, mid] and [mid, sigma] are independent, so z = r z_1 + sqrt(1 - r^2)
    z_2 with r^2 = (sigma - mid) / (sigma - next): row 1 keeps r z_1's part of the step, and no tree
    is needed.
    """
    grid = _grid(grid)
    eta, s_noise = number("eta", eta, 0.0, math.inf), finite("s_noise", s_noise)
    plan = PlanBuilder("dpm_sde", clip=clip)
    for i in rows_from(begin, len(grid)):
        s, s_next = grid.sigmas[i], grid.sigmas[i + 1]
        form = ve(prediction, s)
        D = plan.x0(form)
        common = dict(denoised=D, input_scale=input_scale("ve", s), step=i)
        if s_next == 0:
            plan.row(grid.timesteps[i], s, form, D, **common)
            continue
        mid = math.sqrt(s * s_next)
        (to_mid, up_mid), (down, up) = ancestral(s, mid, eta), ancestral(s, s_next, eta)
        shared = (s - mid) / (s - s_next)
        kept = down / s * X + s_noise * up * math.sqrt(shared) * Z
        prev = to_mid / s * X + (1 - to_mid / s) * D + s_noise * up_mid * Z
        plan.row(grid.timesteps[i], s, form, prev, save={f"kept{i}": kept}, draws=True, **common)
        form = ve(prediction, mid)
        D = plan.x0(form)
        prev = sym(f"kept{i}") + (1 - down / s) * D + s_noise * up * math.sqrt(1 - shared) * Z
        plan.row(
            sigma_to_t(mid, grid.table),
            mid,
            form,
            prev,
            denoised=D,
            input_scale=input_scale("ve", mid),
            draws=True,
            step=i,
            stage=1,
        )
    return _build(plan, grid)


_GAUSS = np.polynomial.legendre.leggauss(4)


def lms_coefficients(sigmas, i: int, order: int) -> list[float]:
    """Integrals over [sigma_i, sigma_{i+1}] of the Lagrange basis at sigma_i, sigma_{i-1}, … ;
    Gauss-Legendre with 4 nodes is exact up to degree 7, that is order 8."""
    nodes, weights = _GAUSS
    a, b = sigmas[i], sigmas[i + 1]
    tau = (a + b) / 2 + (b - a) / 2 * nodes
    past = [sigmas[i - k] for k in range(order)]
    basis = [
        np.prod([(tau - s) / (past[k] - s) for j, s in enumerate(past) if j != k], axis=0)
        for k in range(order)
    ]
    return [float((b - a) / 2 * np.sum(weights * f)) for f in basis]


def lms_plan(
    grid: SigmaGrid | ArrayLike,
    *,
    prediction: str = "epsilon",
    order: int = 4,
    clip: float | None = None,
    begin: int = 0,
) -> SolverPlan:
    """Linear multistep (Adams-Bashforth) in sigma with unequal steps (k-diffusion, sample_lms).
    order: 1..7.
    """
    grid = _grid(grid)
    if positive("order", order) > 7:
        raise ValueError(f"order: expected 1..7, got {order}")
    plan = PlanBuilder("lms", clip=clip)
    for i in rows_from(begin, len(grid)):
        s = grid.sigmas[i]
        form = ve(prediction, s)
        D = plan.x0(form)
        d = (X - D) / s
        c = lms_coefficients(grid.sigmas, i, min(i - begin + 1, order))
        prev = X + c[0] * d + sum(ck * sym(f"d{i - k}") for k, ck in enumerate(c) if k)
        plan.row(
            grid.timesteps[i],
            s,
            form,
            prev,
            save={f"d{i}": d},
            denoised=D,
            input_scale=input_scale("ve", s),
            step=i,
        )
    return _build(plan, grid)
