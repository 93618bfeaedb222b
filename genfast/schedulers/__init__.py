"""Noise schedules and solver plans, host side, in float64. `plan` has the row layout; a new solver
is a new row-maker, not a new kernel.

    plan = dpm_solver_plan(20)                     # or plan_from_config("DDIMScheduler", cfg, 50)
    x = sample(model, plan, plan.init_noise_sigma * randn(...), seed=0)

Plan makers share grid (a number of steps, the steps themselves or an `AlphaGrid` or `SigmaGrid`),
prediction (what the model gives: "epsilon", "sample", "v_prediction", of flows "flow_prediction"),
clip (bound of |x0|), threshold ((ratio, max) of dynamic thresholding), begin (the first step that
is run, image to image) and s_churn, s_tmin, s_tmax, s_noise (Karras et al. 2022, algorithm 2).

Where a plan differs from diffusers 0.42.1 on purpose (`plan_from_config` maps its configs here):

* sde-dpmsolver order 3, EDM sde-dpmsolver++ order 3: diffusers raises UnboundLocalError; here the
  published formula.
* sde-dpmsolver++ order 3: diffusers' D2 weight has the wrong sign on its 1/2 (it tends to -alpha_t,
  not 0, as h -> 0). Plan makers use k-diffusion's; plan_from_config(compat=True) repeats diffusers.
* DDPM fixed_large_log: diffusers takes the root of log(beta), NaN; here exp(log(beta) / 2).
  DDPM learned: diffusers takes roots of negative predicted variances, NaN; here they count as 0.
* Flow-match Euler with per-token timesteps: dt has the sign of the scalar branch.
* Trailing spacing: diffusers gives N + 1 timesteps, the last one -1, for 62 of the N in 1..1000
  (first 61), where T / N rounds down; here always N.
* EDM exponential with N = 1 starts at sigma_max (diffusers: sigma_min).
* A step to sigma = 0, or between equal sigmas (DEIS and SA-Solver end in one), is the limit of the
  formula; diffusers divides 0 by 0 there for orders above 1 unless lower_order_final saves it.
* Started in the middle (begin > 0), LMS uses the weights of the order it has history for, where
  diffusers drops the missing terms of a higher one; PNDM repeats the step it started with.
* LCM and TCD with strength < 1 on own timesteps: the last step adds no noise.
* Histories hold what a solver can still read: IPNDM does not keep every tensor alive.
* betas and sigmas are float64; diffusers' fp32 table of the same schedule is up to 1e-5 away (pass
  alphas_cumprod= to use it).

Not plans: schedulers that draw categorical tokens or resize x0 between steps (scale_factors).
"""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike

from .consistency import consistency_grid, consistency_plan, lcm_plan, tcd_plan
from .ddpm import ddim_inverse_grid, ddim_inverse_plan, ddim_plan, ddpm_plan
from .dpm import dpm_solver_plan, dpm_solver_singlestep_plan
from .euler import (
    dpm_sde_plan,
    edm_euler_plan,
    euler_ancestral_plan,
    euler_plan,
    heun_plan,
    kdpm2_ancestral_plan,
    kdpm2_plan,
    lms_plan,
)
from .flow import (
    flow_match_euler_plan,
    flow_match_heun_plan,
    flow_match_lcm_plan,
    flow_match_token_table,
)
from .from_config import plan_from_config
from .multistep import deis_plan, sa_solver_plan, unipc_plan
from .plan import PlanBuilder, SolverPlan, stack_rows
from .pndm import ipndm_plan, pndm_plan
from .sample import SolverState, sample, step, step_batch
from .schedules import (
    AlphaGrid,
    NoiseSchedule,
    SigmaGrid,
    alpha_grid,
    distilled_timesteps,
    dynamic_shift_mu,
    edm_grid,
    flow_grid,
    flow_sigma_grid,
    noise_schedule,
    sigma_grid,
    sigma_to_t,
    stretch_to_terminal,
    time_shift,
    zero_terminal_snr,
)


def edm_dpm_plan(grid: SigmaGrid | ArrayLike, **options: Any) -> SolverPlan:
    """`dpm_solver_plan` on an EDM grid: number of steps or `edm_grid(...)`; same options."""
    return dpm_solver_plan(grid if isinstance(grid, SigmaGrid) else edm_grid(grid), **options)


__all__ = [
    "AlphaGrid",
    "NoiseSchedule",
    "PlanBuilder",
    "SigmaGrid",
    "SolverPlan",
    "SolverState",
    "alpha_grid",
    "consistency_grid",
    "consistency_plan",
    "ddim_inverse_grid",
    "ddim_inverse_plan",
    "ddim_plan",
    "ddpm_plan",
    "deis_plan",
    "distilled_timesteps",
    "dpm_sde_plan",
    "dpm_solver_plan",
    "dpm_solver_singlestep_plan",
    "dynamic_shift_mu",
    "edm_dpm_plan",
    "edm_euler_plan",
    "edm_grid",
    "euler_ancestral_plan",
    "euler_plan",
    "flow_grid",
    "flow_match_euler_plan",
    "flow_match_heun_plan",
    "flow_match_lcm_plan",
    "flow_match_token_table",
    "flow_sigma_grid",
    "heun_plan",
    "ipndm_plan",
    "kdpm2_ancestral_plan",
    "kdpm2_plan",
    "lcm_plan",
    "lms_plan",
    "noise_schedule",
    "plan_from_config",
    "pndm_plan",
    "sa_solver_plan",
    "sample",
    "sigma_grid",
    "sigma_to_t",
    "stack_rows",
    "step",
    "step_batch",
    "stretch_to_terminal",
    "tcd_plan",
    "time_shift",
    "unipc_plan",
    "zero_terminal_snr",
]
