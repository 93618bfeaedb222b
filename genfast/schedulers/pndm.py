"""Pseudo numerical methods: PNDM (PLMS, with or without Runge-Kutta start) and improved PNDM."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ._check import choice, positive, rows_from
from .convert import vp
from .plan import Lin, M, PlanBuilder, SolverPlan, X, sym
from .schedules import AlphaGrid, alpha_grid

#: Adams-Bashforth weights by number of outputs, newest first (Liu et al. 2022, eq. 9 and 12)
ADAMS_BASHFORTH = {
    1: [1.0],
    2: [3 / 2, -1 / 2],
    3: [23 / 12, -16 / 12, 5 / 12],
    4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
}


def adams_bashforth(entries) -> Lin:
    """Combination of 1 to 4 outputs, newest first."""
    return sum(w * e for w, e in zip(ADAMS_BASHFORTH[len(entries)], entries, strict=True))


def transfer(x: Lin, out: Lin, a_t: float, a_p: float, prediction: str) -> Lin:
    """phi(x, eps, t, t_prev), Liu et al. 2022, eq. 11: the deterministic DDIM step."""
    eps = {"epsilon": out, "v_prediction": math.sqrt(a_t) * out + math.sqrt(1 - a_t) * x}
    denom = a_t * math.sqrt(1 - a_p) + math.sqrt(a_t * (1 - a_t) * a_p)
    return math.sqrt(a_p / a_t) * x - (a_p - a_t) / denom * choice("prediction", prediction, eps)


def pndm_plan(
    grid: AlphaGrid | ArrayLike,
    *,
    prediction: str = "epsilon",
    skip_prk: bool = False,
    begin: int = 0,
) -> SolverPlan:
    """PNDM (Liu et al. 2022, alg. 2): PLMS, started by three pseudo Runge-Kutta steps (4
    evaluations each) or, with skip_prk, by an improved Euler step that evaluates the second
    timestep twice.

    grid: steps, timesteps T // N apart or `AlphaGrid` (its stride is the step length). begin: first
        row run (skip_prk only).
    """
    given = not isinstance(grid, AlphaGrid) and np.ndim(grid) > 0
    grid = grid if isinstance(grid, AlphaGrid) else alpha_grid(grid, chain="stride")
    t, stride = grid.timesteps, grid.stride
    if given and (np.diff(t) != -stride).any():
        raise ValueError(
            f"grid: expected timesteps T // N = {stride} apart, the length of every step, got "
            f"{t[:8].tolist()}; give the number of steps"
        )
    plan = PlanBuilder("pndm")
    ets: list[Lin] = []

    def row(t_in, x, out, t_from, t_to, save, step, stage=0):
        a_in, a_t, a_p = (float(v) for v in grid.at([t_in, t_from, t_to]))
        x0, _ = vp(prediction, math.sqrt(a_in), math.sqrt(1 - a_in))
        prev = transfer(x, out, a_t, a_p, prediction)
        plan.row(
            t_in,
            math.sqrt(1 - a_in),
            x0,
            prev,
            save=save,
            denoised=x0 if len(save) < 2 else None,
            step=step,
            stage=stage,
        )

    if skip_prk:
        for i in rows_from(begin, len(t)):
            save = {f"e{i}": M} | ({"first": X} if i == begin else {})
            row(t[i], X, adams_bashforth([M, *ets[::-1][:3]]), t[i], t[i] - stride, save, i)
            ets.append(sym(f"e{i}"))
            if i == begin and len(t) > begin + 1:
                # the step just made, again with the mean of both ends
                mean, end = (M + ets[-1]) * 0.5, t[i + 1]
                row(end, sym("first"), mean, end + stride, end, {}, i, 1)
        return plan.build()

    if len(t) < 4:
        raise ValueError(
            f"grid: PNDM with its Runge-Kutta start needs at least 4 steps, got {len(t)}; use "
            f"skip_prk=True"
        )
    if begin:
        raise ValueError(
            f"begin: expected 0 with the Runge-Kutta start, got {begin}; use skip_prk=True"
        )
    half = stride // 2
    for n in range(3):
        # k1 at t, k2 and k3 in the middle, k4 at the next timestep: the middle is counted from the
        # cleaner end
        mid, end = t[n + 1] + half, t[n + 1]
        x, e, acc = sym(f"saved{n}"), sym(f"e{n}"), sym(f"acc{n}")
        row(t[n], X, M, t[n], t[n] - half, {f"e{n}": M, f"saved{n}": X}, n)
        row(mid, x, M, t[n], mid, {f"acc{n}": e / 6 + M / 3}, n, 1)
        row(mid, x, M, t[n], mid - half, {f"acc{n}b": acc + M / 3}, n, 2)
        row(end, x, sym(f"acc{n}b") + M / 6, t[n], end, {}, n, 3)
        ets.append(e)
    for n in range(3, len(t)):
        row(t[n], X, adams_bashforth([M, *ets[::-1][:3]]), t[n], t[n] - stride, {f"e{n}": M}, n)
        ets.append(sym(f"e{n}"))
    return plan.build()


def ipndm_plan(steps: int, *, betas: ArrayLike | None = None, begin: int = 0) -> SolverPlan:
    """Improved PNDM with Adams-Bashforth up to order 4 on x = alpha x0 + beta eps, the model
    predicting v (crowsonkb/v-diffusion-pytorch).
    betas: (steps + 1,) noise levels in [0, 1]; by default sin^2 of equal steps from pi/2 to 0."""
    steps = positive("steps", steps)
    if betas is None:
        betas = np.sin(np.append(np.linspace(1, 0, steps + 1)[:-1], 0.0) * math.pi / 2) ** 2
    b = np.asarray(betas, np.float64)
    if b.shape != (steps + 1,):
        raise ValueError(f"betas: expected shape ({steps + 1},), got {b.shape}")
    if not ((b >= 0) & (b <= 1)).all():
        raise ValueError(f"betas: expected noise levels in [0, 1], got {b}")
    a = np.sqrt(1 - b**2)
    plan = PlanBuilder("ipndm")
    ets: list[Lin] = []
    for i in rows_from(begin, steps):
        e = b[i] * X + a[i] * M
        combo = adams_bashforth([e, *ets[::-1][:3]])
        prev = a[i + 1] / max(a[i], 1e-8) * (X - b[i] * combo) + b[i + 1] * combo
        plan.row(
            math.atan2(b[i], a[i]) / math.pi * 2,
            b[i],
            a[i] * X - b[i] * M,
            prev,
            save={f"e{i}": e},
            step=i,
        )
        ets.append(sym(f"e{i}"))
    return plan.build(integer_timesteps=False)
