"""Exponential multistep solvers on the DPM-Solver grid: DEIS, SA-Solver, UniPC.

lambda = ln(alpha / sigma), h = lambda_next - lambda; D is the history of x0 or eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from ._check import choice, finite, positive, rows_from
from ._special import phi
from .convert import convert
from .dpm import dpm_grid, history_entry, log_snr
from .plan import Lin, PlanBuilder, SolverPlan, X, Z, is_symbolic, sym
from .schedules import SigmaGrid


def lagrange_phi(nodes, y: float) -> list[float]:
    """Integrals over [0, 1] of e^{(1-tau) y} L_k(tau) for the Lagrange basis at ``nodes``
    (distinct), as sum_n l_kn n! phi_{n+1}(y) with L_k = sum_n l_kn tau^n."""
    # int_0^1 e^{(1-tau) y} tau^n dtau = n! phi_{n+1}(y)
    moments = [math.factorial(n) * phi(n + 1, y) for n in range(len(nodes))]
    out = []
    for k, node in enumerate(nodes):
        others = [n for j, n in enumerate(nodes) if j != k]
        poly = np.atleast_1d(np.poly(others))[::-1] / np.prod(
            [node - n for n in others]
        )  # ascending powers
        out.append(float(np.dot(poly, moments)))
    return out


def deis_plan(
    grid: SigmaGrid | ArrayLike,
    *,
    prediction: str = "epsilon",
    order: int = 2,
    lower_order_final: bool = True,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
    begin: int = 0,
) -> SolverPlan:
    """DEIS, Adams-Bashforth in log rho, rho = sigma / alpha (Zhang & Chen 2023, tAB-DEIS): the eps
    history is extrapolated as a polynomial in lambda and integrated exactly:
    x_next = (alpha_t/alpha_s) x - sigma_t h sum_k w_k eps_k, eps = (x - alpha x0) / sigma.
    """
    grid = dpm_grid(grid)
    if positive("order", order) > 3:
        raise ValueError(f"order: expected 1, 2 or 3, got {order}")
    a, s, lam = log_snr(grid)
    N = len(grid)
    plan = PlanBuilder("deis", clip=clip, threshold=threshold)
    for i in rows_from(begin, N):
        x0, _ = convert(grid.kind, prediction, a[i], s[i])
        eps = (X - a[i] * x0) / s[i]  # as diffusers: on a flow grid a v model's own is another
        E0, D = history_entry(plan, x0, eps, False, a[i], s[i])
        p = min(order, i - begin + 1)
        if lower_order_final and N < 15:
            p = min(p, N - i)
        h = lam[i + 1] - lam[i]
        if s[i + 1] == 0:
            w = [a[i + 1] * s[i] / a[i]]  # order 1; sigma_t e^h in the limit
        elif h == 0:
            w = [0.0]
        else:
            w = lagrange_phi([(lam[i - k] - lam[i]) / h for k in range(p)], h)
            w = [s[i + 1] * h * wk for wk in w]
        past = sum(wk * sym(f"E{i - k}") for k, wk in enumerate(w) if k)
        prev = a[i + 1] / a[i] * X - w[0] * E0 + -1.0 * (past or Lin({}))
        plan.row(
            grid.timesteps[i], grid.sigmas[i], x0, prev, save={f"E{i}": E0}, denoised=D, step=i
        )
    return plan.build()


def _tau_default(t: float) -> float:
    return 1.0 if 200 <= t <= 800 else 0.0


def sa_solver_plan(
    grid: SigmaGrid | ArrayLike,
    *,
    prediction: str = "epsilon",
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: Callable[[float], float] = _tau_default,
    data: bool = True,
    lower_order_final: bool = True,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
    begin: int = 0,
) -> SolverPlan:
    """SA-Solver (Xue et al. 2023, eq. 14 and 17): stochastic Adams predictor and corrector.

    tau: timestep -> stochasticity (0: ODE, 1: SDE). data: history of x0 (True) or eps.
    predictor_order: 1..3, corrector_order: 1..4. The noise of a step returns in the next step's
    corrector; what that needs, c_x x + c_z z, is one history entry here.
    """
    grid = dpm_grid(grid)
    if (
        positive("predictor_order", predictor_order) > 3
        or positive("corrector_order", corrector_order) > 4
    ):
        raise ValueError(
            f"predictor_order, corrector_order: expected up to 3 and 4, got {predictor_order}, "
            f"{corrector_order}"
        )
    if not callable(tau):
        raise TypeError(f"tau: expected a function of the timestep, got {tau!r}")
    taus = [finite("tau", tau(t)) for t in grid.timesteps]
    a, s, lam = log_snr(grid)
    N, depth = len(grid), max(predictor_order, corrector_order - 1)
    plan = PlanBuilder("sa_solver", clip=clip, threshold=threshold)

    def weights(j: int, nodes: list[int], q: float) -> list[float]:
        """Weight of the model output at each of ``nodes`` in the step from j to j+1."""
        h = lam[j + 1] - lam[j]
        if s[j + 1] == 0:  # one node; the limits of the formulas below
            return [a[j + 1]] if data else [-a[j + 1] * s[j] / a[j]]
        if h == 0:
            return [0.0] * len(nodes)
        unit = [(lam[k] - lam[j]) / h for k in nodes]
        if not data:
            return [-q * s[j + 1] * h * w for w in lagrange_phi(unit, h)]
        w = [q * a[j + 1] * h * w for w in lagrange_phi(unit, -q * h)]
        if (
            len(nodes) == 2
        ):  # the paper's order-2 correction, O(h^3): makes both ends exact for tau = 0
            gap = 1.0 if nodes[0] > j else h / (lam[j] - lam[nodes[1]])
            shift = q * a[j + 1] * h * q * h * phi(3, -q * h) * gap
            w = [w[0] + shift, w[1] - shift]
        return w

    x, order_c, carried, filled = X, 0, None, 0
    for i in rows_from(begin, N):
        x0, eps = convert(grid.kind, prediction, a[i], s[i])
        D0, D = history_entry(plan, x0, eps, data, a[i], s[i])
        entry = lambda k, D0=D0, i=i: D0 if k == i else sym(f"D{k}")  # noqa: E731
        x = X
        if i > begin:  # correct x_i with the newest model output
            nodes = [i - k for k in range(order_c)]
            q = 1 + taus[i - 1] ** 2
            x = carried + sum(
                w * entry(k) for k, w in zip(nodes, weights(i - 1, nodes, q), strict=True)
            )
        p, c = predictor_order, corrector_order
        if lower_order_final:
            p, c = min(p, N - i), min(c, N - i + 1)
        if s[i + 1] == 0:
            p = 1
        p, order_c = min(p, filled + 1), min(c, filled + 2)
        filled = min(filled + 1, depth)
        t2 = taus[i] ** 2
        h = lam[i + 1] - lam[i]
        if data:
            c_x = math.exp(-t2 * h) * s[i + 1] / s[i] if t2 else s[i + 1] / s[i]
            c_z = s[i + 1] * math.sqrt(-math.expm1(-2 * t2 * h)) if t2 else 0.0
        else:
            c_x = a[i + 1] / a[i]
            c_z = math.sqrt(t2) * s[i + 1] * math.sqrt(math.expm1(2 * h)) if t2 else 0.0
        kept = c_x * x + c_z * Z
        nodes = [i - k for k in range(p)]
        prev = kept + sum(
            w * entry(k) for k, w in zip(nodes, weights(i, nodes, 1 + t2), strict=True)
        )
        carried, save = sym(f"w{i}"), {f"w{i}": kept}
        if is_symbolic():  # whoever keeps the history keeps its two parts
            carried = c_x * sym(f"saved{i}") + c_z * sym(f"noise{i}")
            save = {f"saved{i}": x, f"noise{i}": Z}
        plan.row(
            grid.timesteps[i],
            grid.sigmas[i],
            x0,
            prev,
            save={f"D{i}": D0, **save},
            denoised=D,
            draws=True,
            step=i,
        )
    return plan.build()


#: solver type -> B(h); hh = -h for x0 histories, h for eps
UNIPC_B = {"bh1": lambda hh: hh, "bh2": lambda hh: math.expm1(hh)}


def unipc_plan(
    grid: SigmaGrid | ArrayLike,
    *,
    prediction: str = "epsilon",
    order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool = True,
    disable_corrector: Sequence[int] = (),
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
    begin: int = 0,
) -> SolverPlan:
    """UniPC (Zhao et al. 2023, alg. 1-2): each model output first corrects the x it was computed at
    (UniC), then predicts (UniP).

    order: 1 and more; a history of order + 1 tensors must fit the 6 slots. solver_type: "bh1" (B =
        h) or "bh2"
    (B = e^h - 1). disable_corrector: steps after which the corrector is skipped.
    """
    grid = dpm_grid(grid)
    positive("order", order)
    B_of = choice("solver_type", solver_type, UNIPC_B)
    a, s, lam = log_snr(grid)
    N = len(grid)
    plan = PlanBuilder("unipc", clip=clip, threshold=threshold)

    def update(x, j, D_j, order, new=None):
        """x at j moved to j+1: D_j the output at j, older ones from the history, ``new`` the output
        at j+1 (corrector).
        """
        h = lam[j + 1] - lam[j]
        hh = -h if predict_x0 else h
        c_x, c = (s[j + 1] / s[j], a[j + 1]) if predict_x0 else (a[j + 1] / a[j], s[j + 1])
        e = math.expm1(hh)
        if not predict_x0 and s[j + 1] == 0:
            c, e = 1.0, a[j + 1] * s[j] / a[j]  # sigma_t (e^h - 1) in the limit
        out = c_x * x - c * e * D_j
        rk = [(lam[j - k] - lam[j]) / h for k in range(1, order)]
        d1 = [(sym(f"D{j - k}") - D_j) / r for k, r in enumerate(rk, 1)]
        if new is not None:
            rk, d1 = [*rk, 1.0], [*d1, new - D_j]
        if not d1:
            return out
        B = B_of(hh)
        if len(d1) == 1:
            rho = [0.5]  # the closed form both order-1 UniC and order-2 UniP use
        else:  # sum_k rho_k r_k^{n-1} = n! h phi_{n+1}(h) / B(h), n = 1 .. len
            R = np.array([[r**n for r in rk] for n in range(len(rk))])
            b = [math.factorial(n) * hh * phi(n + 1, hh) / B for n in range(1, len(rk) + 1)]
            rho = np.linalg.solve(R, b)
        return out - c * B * sum(r * d for r, d in zip(rho, d1, strict=True))

    p = 0
    for i in rows_from(begin, N):
        x0, eps = convert(grid.kind, prediction, a[i], s[i])
        D0, D = history_entry(plan, x0, eps, predict_x0, a[i], s[i])
        x = X
        if i > begin and i - 1 not in disable_corrector:
            x = update(sym(f"saved{i - 1}"), i - 1, sym(f"D{i - 1}"), p, new=D0)
        p = min(order, N - i) if lower_order_final or s[-1] == 0 and i == N - 1 else order
        p = min(p, i - begin + 1)
        prev = update(x, i, D0, p)
        plan.row(
            grid.timesteps[i],
            grid.sigmas[i],
            x0,
            prev,
            save={f"D{i}": D0, f"saved{i}": x},
            denoised=D,
            step=i,
        )
    return plan.build()
