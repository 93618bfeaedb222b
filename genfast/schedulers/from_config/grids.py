"""Which grid a config asks for: (config, steps, schedule, options) -> AlphaGrid or SigmaGrid. An
option `grid` is taken as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..schedules import (
    NoiseSchedule,
    SigmaGrid,
    alpha_grid,
    distilled_timesteps,
    edm_grid,
    flow_grid,
    flow_sigma_grid,
    init_noise,
    noise_schedule,
    sigma_grid,
    sigma_to_t,
)


def schedule_of(c: Mapping) -> NoiseSchedule:
    """beta_schedule, beta_start, beta_end, trained_betas, num_train_timesteps,
    rescale_betas_zero_snr.
    """
    if c["trained_betas"] is not None:
        return NoiseSchedule.from_betas(c["trained_betas"], zero_snr=c["rescale_betas_zero_snr"])
    return noise_schedule(
        c["beta_schedule"],
        c["num_train_timesteps"],
        c["beta_start"],
        c["beta_end"],
        zero_snr=c["rescale_betas_zero_snr"],
    )


def kind_of(c):
    """Which re-spacing of the sigmas the config asks for; at most one."""
    flags = dict(
        karras="use_karras_sigmas",
        exponential="use_exponential_sigmas",
        beta="use_beta_sigmas",
        lu="use_lu_lambdas",
    )
    on = [kind for kind, flag in flags.items() if c.get(flag)]
    if len(on) > 1:
        raise ValueError(f"config: expected at most one of {', '.join(flags.values())}, got {on}")
    return on[0] if on else None


def by_alpha(c, steps, schedule, o, **kw):
    if "grid" in o:
        return o["grid"]
    final = 1.0 if c.get("set_alpha_to_one", True) else float(schedule.alpha_bar[0])
    return alpha_grid(
        steps,
        schedule,
        spacing=c["timestep_spacing"],
        offset=c["steps_offset"],
        final_alpha_bar=final,
        **kw,
    )


def by_sigma(c, steps, schedule, o, **kw):
    """Euler, Heun, KDPM2, LMS: sigmas at float timesteps, or re-spaced between the visited ends."""
    if "grid" in o:
        return o["grid"]
    if "sigmas" in o:  # Euler only: given sigmas, the last one included
        s = np.asarray(o["sigmas"], np.float64)
        grid = SigmaGrid(
            sigma_to_t(s[:-1], schedule.sigmas),
            s,
            table=schedule.sigmas,
            init_noise_sigma=init_noise(s.max(), c["timestep_spacing"]),
        )
    else:
        grid = sigma_grid(
            steps,
            schedule,
            spacing=c["timestep_spacing"],
            offset=c["steps_offset"],
            kind=kind_of(c),
            sigma_min=c.get("sigma_min"),
            sigma_max=c.get("sigma_max"),
            **kw,
        )
    return _continuous(grid.sigmas, grid) if _times_are_sigmas(c) else grid


def _times_are_sigmas(c):
    return c.get("timestep_type") == "continuous" and c["prediction_type"] == "v_prediction"


def _continuous(sigmas, grid):
    return SigmaGrid(
        0.25 * np.log(sigmas[:-1]), sigmas, table=grid.table, init_noise_sigma=grid.init_noise_sigma
    )


def _log_linear(c, o):
    """Euler's N + 1 log-linear sigmas, kept as they are."""
    return c["interpolation_type"] == "log_linear" and kind_of(c) is None and "sigmas" not in o


def ends_in_table(c, o):
    """The last step goes to the smallest sigma of training, and the final one of the config, one
    more in the peer's list, is never reached: a timestep is missing for it.
    """
    return _log_linear(c, o) and not _times_are_sigmas(c)


def euler(c, steps, schedule, o):
    final = "sigma_min" if _log_linear(c, o) else c["final_sigmas_type"]
    grid = by_sigma(c, steps, schedule, o, interpolation=c["interpolation_type"], final=final)
    if _log_linear(c, o) and not ends_in_table(c, o) and "grid" not in o:  # N + 1 steps
        end = 0.0 if c["final_sigmas_type"] == "zero" else grid.sigmas[-1]
        return _continuous(np.append(grid.sigmas, end), grid)
    return grid


def by_lambda(c, steps, schedule, o, *, final=None, round_t=True, floor_t=True, spacing=None):
    """DPM-Solver, DEIS, UniPC, SA-Solver: N+1 integer points, cleanest dropped. final=None reads
    final_sigmas_type.
    """
    if "grid" in o:
        return o["grid"]
    mu = o.get("mu")
    kind = kind_of(c)
    if c.get("use_flow_sigmas") and kind is None:
        shift = math.exp(mu) if mu is not None else c["flow_shift"]
        return flow_sigma_grid(
            steps,
            shift=shift,
            final=final or c["final_sigmas_type"],
            T=len(schedule),
            sigma_min=schedule.sigmas[0],
        )
    grid = sigma_grid(
        steps,
        schedule,
        spacing=spacing or c["timestep_spacing"],
        offset=c.get("steps_offset", 0),
        drop_last=True,
        kind=kind,
        range_of="table",
        sigma_min=c["sigma_min"],
        sigma_max=c["sigma_max"],
        final=(final if kind else "sigma_min") if final else c["final_sigmas_type"],
        round_t=round_t and kind in ("karras", "lu"),
        lambda_min=c.get("lambda_min_clipped", -math.inf),
    )
    if floor_t:  # the peer stores them as int64
        grid = SigmaGrid(np.trunc(grid.timesteps), grid.sigmas, grid.kind, grid.table)
    return grid


def unipc(c, steps, schedule, o):
    if "grid" in o:
        return o["grid"]
    kind, T = kind_of(c), len(schedule)
    last = c["final_sigmas_type"]
    if c["use_flow_sigmas"] and kind is None:
        s = (
            np.asarray(o["sigmas"], np.float64)
            if "sigmas" in o
            else np.linspace(1, 1 / T, steps + 1)[:-1]
        )
        mu = o.get("mu") if c["use_dynamic_shifting"] else None
        s = (
            flow_grid(
                s,
                shift=c["flow_shift"],
                mu=mu,
                form=c["time_shift_type"],
                terminal=c["shift_terminal"],
            )
            .sigmas[:-1]
            .copy()
        )
        if abs(s[0] - 1) < 1e-6:  # lambda is -inf at 1
            s[0] -= 1e-6
        t = np.trunc(s * T)
        return SigmaGrid(t, np.append(s, 0.0 if last == "zero" else s[-1]), "flow")
    final = "repeat" if kind and last == "sigma_min" else last
    grid = by_lambda({**c, "use_flow_sigmas": False}, steps, schedule, o, final=None)
    s = np.append(
        grid.sigmas[:-1],
        {"zero": 0.0, "repeat": grid.sigmas[-2], "sigma_min": schedule.sigmas[0]}[final],
    )
    if c["use_flow_sigmas"]:  # karras in sigma / alpha, then to flow time
        s = np.append(s[:-1] / (s[:-1] + 1), 0.0)
        s[-1] = s[-2] if last == "sigma_min" else 0.0
        return SigmaGrid(np.trunc(s[:-1] * T), s, "flow")
    return SigmaGrid(grid.timesteps, s, grid.kind, grid.table)


def by_flow(c, steps, o):
    if "grid" in o:
        return o["grid"]
    T = c["num_train_timesteps"]
    if c.get("use_dynamic_shifting") and o.get("mu") is None:
        raise ValueError(
            "mu: expected a number because config.use_dynamic_shifting is set, got None"
        )
    given = o.get("sigmas")
    if given is None and o.get("timesteps") is not None:
        given = np.asarray(o["timesteps"], np.float64) / T
    return flow_grid(
        steps if given is None else given,
        shift=c["shift"],
        mu=o["mu"] if c.get("use_dynamic_shifting") else None,
        form=c.get("time_shift_type", "exponential"),
        terminal=c.get("shift_terminal"),
        kind=kind_of(c),
        invert=c.get("invert_sigmas", False),
        T=T,
        timesteps=o.get("timesteps"),
    )


def edm(c, steps, o, **kw):
    if "grid" in o:
        return o["grid"]
    return edm_grid(
        steps if o.get("sigmas") is None else o["sigmas"],
        sigma_min=c["sigma_min"],
        sigma_max=c["sigma_max"],
        rho=c["rho"],
        kind=c["sigma_schedule"],
        final=c["final_sigmas_type"],
        **kw,
    )


def distilled(c, steps, o):
    original = o.get("original_inference_steps")
    if o.get("timesteps") is not None:
        t = np.asarray(o["timesteps"])
        return t[max(len(t) - int(len(t) * o.get("strength", 1.0)), 0) :]
    return distilled_timesteps(
        steps,
        c["num_train_timesteps"],
        original or c["original_inference_steps"],
        o.get("strength", 1.0),
    )
