"""DPM-Solver and DPM-Solver++ (Lu et al. 2022a, 2022b), multistep and singlestep, ODE and SDE.

lambda = ln(alpha / sigma), h = lambda_next - lambda. All variants are one formula,

    x_next = c_x x + c_1 D0 + c_2 D1 + c_3 D2 + c_z z        ("midpoint" at order 2: c_1 (D0 +
    D1/2))

where D0 is the newest x0 ("++") or eps and D1, D2 are its scaled differences in lambda.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ._check import choice, finite, positive, rows_from
from ._special import phi
from .convert import convert, input_scale
from .plan import X0, PlanBuilder, SolverPlan, X, Z, sym
from .schedules import SigmaGrid, sigma_grid

#: algorithm -> (history holds x0, stochastic)
ALGORITHMS = {
    "dpmsolver++": (True, False),
    "sde-dpmsolver++": (True, True),
    "dpmsolver": (False, False),
    "sde-dpmsolver": (False, True),
}
SOLVER_TYPES = {"midpoint": True, "heun": False}


def dpm_grid(grid) -> SigmaGrid:
    """grid, or the default grid of that many steps."""
    return grid if isinstance(grid, SigmaGrid) else sigma_grid(grid, drop_last=True)


def log_snr(grid: SigmaGrid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(alpha, sigma, lambda), each (N+1,); lambda is +inf at sigma = 0."""
    a, s = grid.alpha_sigma
    with np.errstate(divide="ignore"):
        return a, s, np.log(a) - np.log(s)


def history_entry(plan: PlanBuilder, x0, eps, data: bool, alpha: float, sigma: float):
    """(D, x0): what enters the history. An eps history follows a dynamically thresholded x0."""
    D = plan.x0(x0)
    if data:
        return D, D
    return ((X - alpha * X0) / sigma if plan.opaque else eps), D


def _weights(data, sde, a_t, s_t, a_s, s_s, h):
    """(c_x, c_1, c_2, c_3, c_z) of the module's formula, from (alpha, sigma) = (a_s, s_s) to (a_t,
    s_t).
    """
    if data:
        u = 2 * h if sde else h
        c_x = s_t / s_s * (math.exp(-h) if sde else 1.0)
        c_z = (
            s_t * math.sqrt(max(-math.expm1(-2 * h), 0.0)) if sde else 0.0
        )  # h = -1e-8 in fp32 grids
        if math.isinf(u):
            return c_x, a_t, a_t, 0.5 * a_t, c_z
        return c_x, -a_t * math.expm1(-u), a_t * u * phi(2, -u), a_t * u * phi(3, -u), c_z
    if (
        s_t == 0
        # sigma_t e^h -> alpha_t sigma_s / alpha_s; a noise term of that size is left to the plan to
        # refuse
    ):
        return a_t / a_s, -a_t * s_s / a_s, 0.0, 0.0, math.inf if sde else 0.0
    k = 2.0 if sde else 1.0
    c_z = s_t * math.sqrt(max(math.expm1(2 * h), 0.0)) if sde else 0.0
    return (
        a_t / a_s,
        -k * s_t * math.expm1(h),
        -k * s_t * h * phi(2, h),
        -k * s_t * h * phi(3, h),
        c_z,
    )


def dpm_solver_plan(
    grid: SigmaGrid | ArrayLike,
    *,
    prediction: str = "epsilon",
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    order: int = 2,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    sigma_data: float = 0.5,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
    peer_d2: bool = False,
    begin: int = 0,
) -> SolverPlan:
    """Multistep DPM-Solver (Lu et al. 2022b, alg. 2; SDE: eq. 19 and sec. 5 of the same).

    grid: number of steps or `SigmaGrid` of any kind ("edm" uses EDM preconditioning with
        sigma_data).
    algorithm: "dpmsolver++" or "dpmsolver", either with "sde-" before it. order: 1..3, reached as
        the history fills.
    lower_order_final: with fewer than 15 steps the last step is order 1 and the one before order 2.
        A step to sigma = 0 is always order 1 (exactly x0).
    peer_d2: give the D2 term of sde-dpmsolver++ at order 3 diffusers' weight, which is alpha_t too
        low and does not vanish with h; needed only to repeat its images.
    A model with variance channels is given here without them (m[:, :C]).
    """
    grid = dpm_grid(grid)
    data, sde = choice("algorithm", algorithm, ALGORITHMS)
    midpoint = choice("solver_type", solver_type, SOLVER_TYPES)
    if positive("order", order) > 3:
        raise ValueError(f"order: expected 1, 2 or 3, got {order}")
    sigma_data = finite("sigma_data", sigma_data, above=True)
    a, s, lam = log_snr(grid)
    N = len(grid)
    plan = PlanBuilder(algorithm, clip=clip, threshold=threshold)
    for i in rows_from(begin, N):
        x0, eps = convert(grid.kind, prediction, a[i], s[i], sigma_data)
        D0, D = history_entry(plan, x0, eps, data, a[i], s[i])
        p = min(order, i - begin + 1)
        if lower_order_final and N < 15:
            p = min(p, N - i)
        if i == N - 1 and (euler_at_final or s[i + 1] == 0):
            p = 1
        h = lam[i + 1] - lam[i]
        c_x, c_1, c_2, c_3, c_z = _weights(data, sde, a[i + 1], s[i + 1], a[i], s[i], h)
        prev = c_x * X + c_1 * D0 + c_z * Z
        if p >= 2:
            m1 = sym(f"D{i - 1}")
            d10 = (D0 - m1) * (h / (lam[i] - lam[i - 1]))
            if p == 2:
                prev = prev + (c_1 / 2 if midpoint else c_2) * d10
            else:
                d11 = (m1 - sym(f"D{i - 2}")) * (h / (lam[i - 1] - lam[i - 2]))
                r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
                c_3 = c_3 - a[i + 1] if peer_d2 and data and sde else c_3
                prev = (
                    prev
                    + c_2 * (d10 + r0 / (r0 + r1) * (d10 - d11))
                    + c_3 / (r0 + r1) * (d10 - d11)
                )
        plan.row(
            grid.timesteps[i],
            grid.sigmas[i],
            x0,
            prev,
            save={f"D{i}": D0},
            denoised=D,
            draws=sde,
            step=i,
            input_scale=input_scale(grid.kind, s[i], sigma_data),
        )
    return plan.build(init_noise_sigma=_init(grid), integer_timesteps=grid.kind != "edm")


def _init(grid):
    return (
        grid.init_noise_sigma if grid.kind == "edm" else 1.0
    )  # vp and flow start from unit variance


def singlestep_orders(N: int, order: int, lower_order_final: bool, final_zero: bool) -> list[int]:
    """Order of each of N evaluations: blocks 1, 2 .. order, the tail shortened (Lu et al. 2022a,
    sec. 3.3).
    """
    block = list(range(1, order + 1))
    if lower_order_final or N % order or final_zero:
        full = {1: N, 2: (N - 1) // 2, 3: N // 3 - (N % 3 == 0)}[order]
        rest = N - full * order
        # what is left over: order 2 ends in 1 or 1, 1; order 3 in 1, or 1, 2, or 1, 2, 1
        orders = block * full + {2: [1, 1][:rest], 3: [1, 2, 1][:rest]}.get(order, [])
    else:
        orders = block * (N // order)
    if final_zero:
        orders[-1] = 1
    return orders


def dpm_solver_singlestep_plan(
    grid: SigmaGrid | ArrayLike,
    *,
    prediction: str = "epsilon",
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    order: int = 2,
    lower_order_final: bool = False,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
    peer_d2: bool = False,
    begin: int = 0,
) -> SolverPlan:
    """Singlestep DPM-Solver (Lu et al. 2022a, alg. 1-2; ++: 2022b, alg. 1): blocks of ``order``
    evaluations that all start from the x saved at the block's first one. Arguments as in
    `dpm_solver_plan`."""
    grid = dpm_grid(grid)
    data, sde = choice("algorithm", algorithm, ALGORITHMS)
    midpoint = choice("solver_type", solver_type, SOLVER_TYPES)
    if positive("order", order) > 3:
        raise ValueError(f"order: expected 1, 2 or 3, got {order}")
    a, s, lam = log_snr(grid)
    N = len(grid)
    orders = singlestep_orders(N, order, lower_order_final, s[-1] == 0)
    plan = PlanBuilder(f"singlestep {algorithm}", clip=clip, threshold=threshold)
    base = begin
    for i in rows_from(begin, N):
        x0, eps = convert(grid.kind, prediction, a[i], s[i])
        D0, D = history_entry(plan, x0, eps, data, a[i], s[i])
        p = min(orders[i], i - begin + 1)
        base = i if p == 1 else base
        b = i - p + 1  # where this update starts in lambda
        start = X if base == i else sym(f"saved{base}")
        h = lam[i + 1] - lam[b]
        c_x, c_1, c_2, c_3, c_z = _weights(data, sde, a[i + 1], s[i + 1], a[b], s[b], h)
        m = {b: sym(f"D{b}"), i: D0}
        prev = c_x * start + c_1 * m[b] + c_z * Z
        if p >= 2:
            r0 = (lam[i] - lam[b]) / h
            d1 = (D0 - m[b]) / r0
            if p == 2:
                prev = prev + (c_1 / 2 if midpoint else c_2) * d1
            elif midpoint:
                prev = prev + c_2 * d1
            else:
                r1 = (lam[i - 1] - lam[b]) / h
                d0 = (sym(f"D{i - 1}") - m[b]) / r1
                c_3 = c_3 - a[i + 1] if peer_d2 and data and sde else c_3
                prev = (
                    prev + c_2 * (r0 * d0 - r1 * d1) / (r0 - r1) + c_3 * 2 * (d1 - d0) / (r0 - r1)
                )
        save = {f"D{i}": D0} | ({f"saved{i}": X} if p == 1 else {})
        plan.row(
            grid.timesteps[i], grid.sigmas[i], x0, prev, save=save, denoised=D, draws=sde, step=i
        )
    return plan.build(init_noise_sigma=_init(grid))
