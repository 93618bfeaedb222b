"""Flow-matching solvers: x = (1 - sigma) x0 + sigma eps and the model predicts eps - x0 (Lipman et
al. 2023; Esser et al. 2024).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from . import _check
from ._check import rows_from
from .euler import churn
from .plan import CLIP, COEF, COLUMNS, D_M, D_X, INPUT_SCALE, M, PlanBuilder, SolverPlan, X, Z, sym
from .schedules import SigmaGrid, flow_grid


def _grid(grid) -> SigmaGrid:
    return grid if isinstance(grid, SigmaGrid) else flow_grid(grid)


def flow_match_euler_plan(
    grid: SigmaGrid | ArrayLike,
    *,
    stochastic: bool = False,
    clip: float | None = None,
    begin: int = 0,
) -> SolverPlan:
    """x + (sigma_next - sigma) m; stochastic: (1 - sigma_next) x0 + sigma_next z. grid: number of
    steps or `flow_grid`.
    """
    grid = _grid(grid)
    plan = PlanBuilder("flow_match_euler", clip=clip)
    for i in rows_from(begin, len(grid)):
        s, s_next = grid.sigmas[i], grid.sigmas[i + 1]
        x0 = X - s * M
        D = plan.x0(x0)
        if stochastic:
            prev = (1 - s_next) * D + s_next * Z
        elif plan.opaque:
            prev = X + (s_next - s) / s * (X - D)
        else:
            prev = X + (s_next - s) * M
        plan.row(grid.timesteps[i], s, x0, prev, denoised=D, draws=stochastic, step=i)
    return plan.build(integer_timesteps=False)


def flow_match_heun_plan(
    grid: SigmaGrid | ArrayLike,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    begin: int = 0,
) -> SolverPlan:
    """Heun's method with the churn of Karras et al. 2022, alg. 2: two rows a step, one for the
    last.
    """
    grid = _grid(grid)
    settings = _check.churn(s_churn, s_tmin, s_tmax, s_noise)
    plan = PlanBuilder("flow_match_heun")
    for i in rows_from(begin, len(grid)):
        s, s_next = grid.sigmas[i], grid.sigmas[i + 1]
        # the peer counts 2N - 1 evaluations as its steps
        s_hat, sd = churn(s, 2 * len(grid) - 1, **settings)
        x_hat = X + sd * Z
        d, dt = s / s_hat * M, s_next - s_hat
        plan.row(
            grid.timesteps[i],
            s,
            X - s * M,
            x_hat + dt * d,
            save={f"half{i}": x_hat + dt / 2 * d},
            denoised=x_hat - s * M,
            draws=s_hat > s,
            step=i,
        )
        if i + 1 < len(grid):
            plan.row(
                grid.timesteps[i + 1],
                s_next,
                X - s_next * M,
                sym(f"half{i}") + dt / 2 * M,
                denoised=X - s_next * M,
                draws=s_hat > s,
                step=i,
                stage=1,
            )
    return plan.build(integer_timesteps=False)


def flow_match_lcm_plan(
    grid: SigmaGrid | ArrayLike, *, clip: float | None = None, begin: int = 0
) -> SolverPlan:
    """Predict x0, noise it again to sigma_next: (1 - sigma_next) x0 + sigma_next z."""
    grid = _grid(grid)
    plan = PlanBuilder("flow_match_lcm", clip=clip)
    for i in rows_from(begin, len(grid)):
        s, s_next = grid.sigmas[i], grid.sigmas[i + 1]
        D = plan.x0(X - s * M)
        prev = (1 - s_next) * D + s_next * Z
        plan.row(grid.timesteps[i], s, X - s * M, prev, denoised=D, draws=True, step=i)
    return plan.build(integer_timesteps=False)


def flow_match_token_table(
    sigmas: ArrayLike, token_sigmas: ArrayLike, *, stochastic: bool = False
) -> np.ndarray:
    """Coefficient rows (B, L, 36) for one Euler step in which every token has its own noise level.

    sigmas: (N+1,) of the grid. token_sigmas: (B, L); a token goes to the largest grid sigma more
    than 1e-6 below its own, or to 0. dt = sigma_next - sigma, as for whole samples (diffusers has
    the opposite sign here). float64, for `diffusion_step` as torch.tensor(…, dtype=float32).
    """
    grid, s = np.asarray(sigmas, np.float64), np.asarray(token_sigmas, np.float64)
    below = grid < s[..., None] - 1e-6
    s_next = np.where(below, grid, 0.0).max(-1)
    table = np.zeros((*s.shape, COLUMNS))
    table[..., D_X], table[..., D_M], table[..., CLIP], table[..., INPUT_SCALE] = (
        1.0,
        -s,
        np.inf,
        1.0,
    )
    if stochastic:
        table[..., COEF], table[..., COEF + 1], table[..., COEF + 9] = (
            1 - s_next,
            -(1 - s_next) * s,
            s_next,
        )
    else:
        table[..., COEF], table[..., COEF + 1] = 1.0, s_next - s
    denoised = COEF + 2 * (COLUMNS - COEF) // 3
    table[..., denoised], table[..., denoised + 1] = 1.0, -s
    return table
