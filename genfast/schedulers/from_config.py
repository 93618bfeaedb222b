"""The plan of a diffusers scheduler, from its class name and config alone (diffusers need not be
installed).

`CLASSES` maps each class to its defaults and to a function (config, steps, schedule, options) ->
SolverPlan that names, in one place, which config attribute feeds which argument of which plan
maker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from . import consistency, ddpm, dpm, euler, flow, multistep, pndm
from ._check import choice
from .plan import SolverPlan
from .schedules import (
    NoiseSchedule,
    SigmaGrid,
    alpha_grid,
    distilled_timesteps,
    edm_grid,
    flow_grid,
    flow_sigma_grid,
    noise_schedule,
    sigma_grid,
)

BETAS = dict(
    num_train_timesteps=1000,
    beta_start=0.0001,
    beta_end=0.02,
    beta_schedule="linear",
    trained_betas=None,
    rescale_betas_zero_snr=False,
    prediction_type="epsilon",
)
CLIP = dict(clip_sample=False, clip_sample_range=1.0)
THRESHOLD = dict(thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0)
SPACING = dict(timestep_spacing="linspace", steps_offset=0)
SIGMAS = dict(
    use_karras_sigmas=False,
    use_exponential_sigmas=False,
    use_beta_sigmas=False,
    use_lu_lambdas=False,
    use_flow_sigmas=False,
    flow_shift=1.0,
    sigma_min=None,
    sigma_max=None,
)
EDM = dict(
    sigma_min=0.002,
    sigma_max=80.0,
    sigma_data=0.5,
    sigma_schedule="karras",
    rho=7.0,
    prediction_type="epsilon",
    final_sigmas_type="zero",
    num_train_timesteps=1000,
)
FLOW = dict(
    num_train_timesteps=1000,
    shift=1.0,
    use_dynamic_shifting=False,
    invert_sigmas=False,
    shift_terminal=None,
    use_karras_sigmas=False,
    use_exponential_sigmas=False,
    use_beta_sigmas=False,
    time_shift_type="exponential",
    stochastic_sampling=False,
    scale_factors=None,
)
DPM = dict(
    solver_order=2,
    algorithm_type="dpmsolver++",
    solver_type="midpoint",
    lower_order_final=True,
    euler_at_final=False,
    final_sigmas_type="zero",
    lambda_min_clipped=-math.inf,
    variance_type=None,
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


def _clip(c):
    return c["clip_sample_range"] if c.get("clip_sample") else None


def _threshold(c):
    return (
        (c["dynamic_thresholding_ratio"], c["sample_max_value"]) if c.get("thresholding") else None
    )


def _kind(c):
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


def _alpha(c, steps, schedule, o, **kw):
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


def _ve_grid(c, steps, schedule, o, **kw):
    """Euler, Heun, KDPM2, LMS: sigmas at float timesteps, or re-spaced between the visited ends."""
    if "grid" in o:
        return o["grid"]
    if "sigmas" in o:  # Euler only: given sigmas, the last one included
        from .schedules import sigma_to_t

        s = np.asarray(o["sigmas"], np.float64)
        return SigmaGrid(
            sigma_to_t(s[:-1], schedule.sigmas), s, table=schedule.sigmas, init_noise_sigma=s.max()
        )
    grid = sigma_grid(
        steps,
        schedule,
        spacing=c["timestep_spacing"],
        offset=c["steps_offset"],
        kind=_kind(c),
        sigma_min=c.get("sigma_min"),
        sigma_max=c.get("sigma_max"),
        **kw,
    )
    if c.get("timestep_type") == "continuous" and c["prediction_type"] == "v_prediction":
        s = grid.sigmas[:-1]
        grid = SigmaGrid(
            0.25 * np.log(s), grid.sigmas, table=grid.table, init_noise_sigma=grid.init_noise_sigma
        )
    return grid


def _euler_grid(c, steps, schedule, o):
    if c["interpolation_type"] == "log_linear" and "sigmas" not in o:
        # the peer's table has one sigma more than steps: it ends at the smallest of training
        return _ve_grid(c, steps, schedule, o, interpolation="log_linear", final="sigma_min")
    return _ve_grid(c, steps, schedule, o, final=c["final_sigmas_type"])


def _lambda_grid(c, steps, schedule, o, *, final=None, round_t=True, floor_t=True, spacing=None):
    """DPM-Solver, DEIS, UniPC, SA-Solver: N+1 integer points, cleanest dropped. final=None reads
    final_sigmas_type.
    """
    if "grid" in o:
        return o["grid"]
    mu = o.get("mu")
    kind = _kind(c)
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


def _unipc_grid(c, steps, schedule, o):
    if "grid" in o:
        return o["grid"]
    kind, T = _kind(c), len(schedule)
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
    grid = _lambda_grid({**c, "use_flow_sigmas": False}, steps, schedule, o, final=None)
    s = np.append(
        grid.sigmas[:-1],
        {"zero": 0.0, "repeat": grid.sigmas[-2], "sigma_min": schedule.sigmas[0]}[final],
    )
    if c["use_flow_sigmas"]:  # karras in sigma / alpha, then to flow time
        s = np.append(s[:-1] / (s[:-1] + 1), 0.0)
        s[-1] = s[-2] if last == "sigma_min" else 0.0
        return SigmaGrid(np.trunc(s[:-1] * T), s, "flow")
    return SigmaGrid(grid.timesteps, s, grid.kind, grid.table)


def _flow_grid(c, steps, o):
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
        kind=_kind(c),
        invert=c.get("invert_sigmas", False),
        T=T,
        timesteps=o.get("timesteps"),
    )


def _edm(c, steps, o, **kw):
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


def _pred(c):
    return dict(prediction=c["prediction_type"])


def _pick(o, *names):
    return {n: o[n] for n in names if n in o}


CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")


def _ddpm(c, steps, sch, o):
    return ddpm.ddpm_plan(
        _alpha(c, steps, sch, o, chain="visited"),
        **_pred(c),
        variance=c["variance_type"],
        clip=_clip(c),
        threshold=_threshold(c),
        **_pick(o, "begin"),
    )


def _ddim(c, steps, sch, o):
    return ddpm.ddim_plan(
        _alpha(c, steps, sch, o, chain="stride"),
        **_pred(c),
        eta=o.get("eta", 0.0),
        clip=_clip(c),
        threshold=_threshold(c),
        use_clipped_eps=o.get("use_clipped_model_output", False),
        **_pick(o, "begin"),
    )


def _ddim_inverse(c, steps, sch, o):
    first = 1.0 if c["set_alpha_to_one"] else float(sch.alpha_bar[0])
    grid = ddpm.ddim_inverse_grid(
        steps, sch, spacing=c["timestep_spacing"], offset=c["steps_offset"], initial_alpha_bar=first
    )
    return ddpm.ddim_inverse_plan(grid, **_pred(c), clip=_clip(c), **_pick(o, "begin"))


def _euler(c, steps, sch, o):
    log_linear = c["interpolation_type"] == "log_linear" and "sigmas" not in o
    return euler.euler_plan(
        _euler_grid(c, steps, sch, o),
        **_pred(c),
        churn_steps=steps + 1 if log_linear else None,
        **_pick(o, *CHURN, "begin"),
    )


def _lms(c, steps, sch, o):
    return euler.lms_plan(_ve_grid(c, steps, sch, o), **_pred(c), **_pick(o, "order", "begin"))


def _ve(maker, clip=False, takes=("begin",)):
    def make(c, steps, sch, o):
        round_t = maker in (euler.kdpm2_plan, euler.kdpm2_ancestral_plan) and _kind(c) == "karras"
        kw = dict(clip=_clip(c)) if clip else {}
        return maker(
            _ve_grid(c, steps, sch, o, round_t=round_t), **_pred(c), **kw, **_pick(o, *takes)
        )

    return make


def _pndm(c, steps, sch, o):
    return pndm.pndm_plan(
        _alpha(c, steps, sch, o, chain="stride"),
        **_pred(c),
        skip_prk=c["skip_prk_steps"],
        **_pick(o, "begin"),
    )


def _ipndm(c, steps, sch, o):
    return pndm.ipndm_plan(steps, betas=c["trained_betas"], **_pick(o, "begin"))


def _dpm_common(c, o):
    return dict(**_pred(c), order=c["solver_order"], threshold=_threshold(c), **_pick(o, "begin"))


def _dpm(c, steps, sch, o):
    # a cosine schedule keeps fractional timesteps until they are stored as integers
    grid = _lambda_grid(c, steps, sch, o, round_t=c["beta_schedule"] != "squaredcos_cap_v2")
    return dpm.dpm_solver_plan(
        grid,
        **_dpm_common(c, o),
        algorithm=c["algorithm_type"],
        solver_type=c["solver_type"],
        lower_order_final=c["lower_order_final"],
        euler_at_final=c["euler_at_final"],
        peer_d2=o["compat"],
    )


def _dpm_single(c, steps, sch, o):
    grid = _lambda_grid(c, steps, sch, o, spacing="linspace")
    return dpm.dpm_solver_singlestep_plan(
        grid,
        **_dpm_common(c, o),
        algorithm=c["algorithm_type"],
        solver_type=c["solver_type"],
        lower_order_final=c["lower_order_final"],
        peer_d2=o["compat"],
    )


def _edm_euler(c, steps, sch, o):
    # its "sigma_min" is the last sigma visited, whatever that is
    c = {**c, "final_sigmas_type": "repeat"} if c["final_sigmas_type"] == "sigma_min" else c
    return euler.edm_euler_plan(
        _edm(c, steps, o), **_pred(c), sigma_data=c["sigma_data"], **_pick(o, *CHURN, "begin")
    )


def _edm_dpm(c, steps, sch, o, **kw):
    return dpm.dpm_solver_plan(
        _edm(c, steps, o, **kw),
        **_dpm_common(c, o),
        algorithm=c["algorithm_type"],
        solver_type=c["solver_type"],
        lower_order_final=c["lower_order_final"],
        euler_at_final=c["euler_at_final"],
        sigma_data=c["sigma_data"],
    )


def _cosine_dpm(c, steps, sch, o):
    return _edm_dpm({**c, "algorithm_type": "sde-dpmsolver++"}, steps, sch, o, c_noise="atan")


def _deis(c, steps, sch, o):
    # always ends at the smallest sigma: of the table, or the last visited one again
    return multistep.deis_plan(
        _lambda_grid(c, steps, sch, o, final="repeat"),
        **_dpm_common(c, o),
        lower_order_final=c["lower_order_final"],
    )


def _unipc(c, steps, sch, o):
    return multistep.unipc_plan(
        _unipc_grid(c, steps, sch, o),
        **_dpm_common(c, o),
        solver_type=c["solver_type"],
        predict_x0=c["predict_x0"],
        lower_order_final=c["lower_order_final"],
        disable_corrector=tuple(c["disable_corrector"]),
    )


def _sa(c, steps, sch, o):
    tau = {} if c["tau_func"] is None else dict(tau=c["tau_func"])
    return multistep.sa_solver_plan(
        _lambda_grid(c, steps, sch, o, final="repeat"),
        **_pred(c),
        threshold=_threshold(c),
        predictor_order=c["predictor_order"],
        corrector_order=c["corrector_order"],
        data=c["algorithm_type"] == "data_prediction",
        lower_order_final=c["lower_order_final"],
        **tau,
        **_pick(o, "begin"),
    )


def _distilled(c, steps, o):
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


def _lcm(c, steps, sch, o):
    return consistency.lcm_plan(
        _alpha(c, _distilled(c, steps, o), sch, o, chain="repeat"),
        **_pred(c),
        clip=_clip(c),
        timestep_scaling=c["timestep_scaling"],
        threshold=_threshold(c),
        **_pick(o, "begin"),
    )


def _tcd(c, steps, sch, o):
    if o.get("original_inference_steps") is not None and o.get("timesteps") is None:
        # the peer then spaces over all training timesteps
        T = c["num_train_timesteps"]
        origin = np.arange(int(T * o.get("strength", 1.0)))
        t = origin[::-1][
            np.floor(np.linspace(0, len(origin), steps, endpoint=False)).astype(np.int64)
        ]
    else:
        t = _distilled(c, steps, o)
    return consistency.tcd_plan(
        _alpha(c, t, sch, o, chain="zero"), **_pred(c), eta=o.get("eta", 0.3), **_pick(o, "begin")
    )


def _consistency(c, steps, sch, o):
    ends = {k: c[k] for k in ("sigma_min", "sigma_max")}
    grid = consistency.consistency_grid(steps, T=c["num_train_timesteps"], rho=c["rho"], **ends)
    return consistency.consistency_plan(
        grid,
        **ends,
        sigma_data=c["sigma_data"],
        s_noise=c["s_noise"],
        clip=1.0 if c["clip_denoised"] else None,
        **_pick(o, "begin"),
    )


def _fm_euler(c, steps, sch, o):
    return flow.flow_match_euler_plan(
        _flow_grid(c, steps, o), stochastic=c["stochastic_sampling"], **_pick(o, "begin")
    )


def _fm_heun(c, steps, sch, o):
    return flow.flow_match_heun_plan(_flow_grid(c, steps, o), **_pick(o, *CHURN, "begin"))


def _fm_lcm(c, steps, sch, o):
    if c["scale_factors"]:
        raise ValueError(
            "config.scale_factors: expected None, a plan cannot resize x0 between steps"
        )
    return flow.flow_match_lcm_plan(_flow_grid(c, steps, o), **_pick(o, "begin"))


DISTILLED = {
    **BETAS,
    **CLIP,
    **THRESHOLD,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}
HEUN = {**BETAS, **SPACING, **SIGMAS, **CLIP, "beta_start": 0.00085, "beta_end": 0.012}
LAMBDA = {**BETAS, **SPACING, **SIGMAS, **THRESHOLD, **DPM}

#: diffusers class -> (its config defaults, maker(config, steps, schedule, options))
CLASSES = {
    "DDPMScheduler": (
        {
            **BETAS,
            **CLIP,
            **THRESHOLD,
            "clip_sample": True,
            "variance_type": "fixed_small",
            "timestep_spacing": "leading",
            "steps_offset": 0,
        },
        _ddpm,
    ),
    "DDIMScheduler": (
        {
            **BETAS,
            **CLIP,
            **THRESHOLD,
            "clip_sample": True,
            "set_alpha_to_one": True,
            "timestep_spacing": "leading",
            "steps_offset": 0,
        },
        _ddim,
    ),
    "DDIMInverseScheduler": (
        {
            **BETAS,
            **CLIP,
            "clip_sample": True,
            "set_alpha_to_one": True,
            "timestep_spacing": "leading",
            "steps_offset": 0,
        },
        _ddim_inverse,
    ),
    "PNDMScheduler": (
        {
            **BETAS,
            "skip_prk_steps": False,
            "set_alpha_to_one": False,
            "timestep_spacing": "leading",
            "steps_offset": 0,
        },
        _pndm,
    ),
    "IPNDMScheduler": (dict(num_train_timesteps=1000, trained_betas=None), _ipndm),
    "EulerDiscreteScheduler": (
        {
            **BETAS,
            **SPACING,
            **SIGMAS,
            "interpolation_type": "linear",
            "timestep_type": "discrete",
            "final_sigmas_type": "zero",
        },
        _euler,
    ),
    "EulerAncestralDiscreteScheduler": ({**BETAS, **SPACING}, _ve(euler.euler_ancestral_plan)),
    "HeunDiscreteScheduler": (HEUN, _ve(euler.heun_plan, clip=True)),
    "KDPM2DiscreteScheduler": (HEUN, _ve(euler.kdpm2_plan)),
    "KDPM2AncestralDiscreteScheduler": (HEUN, _ve(euler.kdpm2_ancestral_plan)),
    "DPMSolverSDEScheduler": (HEUN, _ve(euler.dpm_sde_plan, takes=("begin", "s_noise"))),
    "LMSDiscreteScheduler": ({**BETAS, **SPACING, **SIGMAS}, _lms),
    "DPMSolverMultistepScheduler": (LAMBDA, _dpm),
    "DPMSolverSinglestepScheduler": ({**LAMBDA, "lower_order_final": False}, _dpm_single),
    "DEISMultistepScheduler": (LAMBDA, _deis),
    "UniPCMultistepScheduler": (
        {
            **LAMBDA,
            "solver_type": "bh2",
            "predict_x0": True,
            "disable_corrector": (),
            "use_dynamic_shifting": False,
            "time_shift_type": "exponential",
            "shift_terminal": None,
        },
        _unipc,
    ),
    "SASolverScheduler": (
        {
            **LAMBDA,
            "predictor_order": 2,
            "corrector_order": 2,
            "tau_func": None,
            "algorithm_type": "data_prediction",
        },
        _sa,
    ),
    "LCMScheduler": (DISTILLED, _lcm),
    "TCDScheduler": (DISTILLED, _tcd),
    "CMStochasticIterativeScheduler": (
        {**EDM, "num_train_timesteps": 40, "s_noise": 1.0, "clip_denoised": True},
        _consistency,
    ),
    "EDMEulerScheduler": (EDM, _edm_euler),
    "EDMDPMSolverMultistepScheduler": (
        {**EDM, **DPM, **THRESHOLD, "final_sigmas_type": "zero"},
        _edm_dpm,
    ),
    "CosineDPMSolverMultistepScheduler": (
        {
            **EDM,
            **DPM,
            "sigma_min": 0.3,
            "sigma_max": 500.0,
            "sigma_data": 1.0,
            "sigma_schedule": "exponential",
            "prediction_type": "v_prediction",
            "final_sigmas_type": "zero",
        },
        _cosine_dpm,
    ),
    "FlowMatchEulerDiscreteScheduler": (FLOW, _fm_euler),
    "FlowMatchHeunDiscreteScheduler": (FLOW, _fm_heun),
    "FlowMatchLCMScheduler": (FLOW, _fm_lcm),
}


#: classes that draw their noise in float32 whatever the model's dtype; LCM and TCD draw in the
#: dtype x and m promote to, all others in the model output's. Needed to follow a torch.Generator
#: exactly.
NOISE_FLOAT32 = {
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchLCMScheduler",
}


def plan_from_config(
    class_name: str,
    config: Mapping,
    num_inference_steps: int | None = None,
    *,
    alphas_cumprod=None,
    compat: bool = True,
    **options,
) -> SolverPlan:
    """The plan that the diffusers class of this name would execute with this config.

    num_inference_steps and options: what set_timesteps takes (timesteps, sigmas, mu,
        original_inference_steps, strength) and what step takes (eta, use_clipped_model_output,
        s_churn, s_tmin, s_tmax, s_noise, order), plus begin (set_begin_index). grid= replaces the
        grid built from the config by an `AlphaGrid` or `SigmaGrid`.
    alphas_cumprod: (T,) to use instead of the one the config implies, such as the fp32 table of a
        live scheduler.
    compat: repeat diffusers' numbers where they are wrong but finite (see the package's list);
        False for the formula.
    Raises ValueError for an unknown class or a config that no plan can express.
    """
    defaults, make = choice("class_name", class_name, CLASSES)
    c = {**defaults, **{k: v for k, v in config.items() if not k.startswith("_")}}
    c["final_sigmas_type"] = c.get("final_sigmas_type") or "zero"
    steps = num_inference_steps
    if steps is None and options.get("sigmas") is not None:
        steps = len(options["sigmas"])
    if options.get("timesteps") is not None and class_name not in (
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "LCMScheduler",
        "TCDScheduler",
    ):
        steps = np.asarray(options["timesteps"])
    elif steps is None and options.get("timesteps") is not None:
        steps = len(options["timesteps"])
    if steps is None and options.get("grid") is not None:
        steps = len(options["grid"])
    if steps is None:
        raise ValueError("num_inference_steps: expected an int, or timesteps= or sigmas=, got None")
    schedule = None
    if alphas_cumprod is not None:
        schedule = NoiseSchedule(alphas_cumprod)
    elif "beta_schedule" in c:
        schedule = schedule_of(c)
    # the peer's own silent translation of names that belong to a sibling solver
    if class_name in (
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EDMDPMSolverMultistepScheduler",
        "CosineDPMSolverMultistepScheduler",
    ):
        c["solver_type"] = (
            "midpoint" if c["solver_type"] in ("logrho", "bh1", "bh2") else c["solver_type"]
        )
        c["algorithm_type"] = (
            "dpmsolver++" if c["algorithm_type"] == "deis" else c["algorithm_type"]
        )
    if class_name == "UniPCMultistepScheduler" and c["solver_type"] in (
        "midpoint",
        "heun",
        "logrho",
    ):
        c["solver_type"] = "bh2"
    return make(c, steps, schedule, {**options, "compat": compat})
