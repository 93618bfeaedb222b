"""`CLASSES`: each class of diffusers' schedulers with its defaults and a function (config, steps,
schedule, options) -> SolverPlan, which names, in one place, which config attribute feeds which
argument of which plan maker."""

from __future__ import annotations

import numpy as np

from .. import consistency, ddpm, dpm, euler, flow, multistep, pndm
from . import grids
from .defaults import (
    BETAS,
    CLIP,
    DISTILLED,
    DPM,
    EDM,
    FLOW,
    HEUN,
    LAMBDA,
    SIGMAS,
    SPACING,
    THRESHOLD,
)


def _clip(c):
    return c["clip_sample_range"] if c.get("clip_sample") else None


def _threshold(c):
    return (
        (c["dynamic_thresholding_ratio"], c["sample_max_value"]) if c.get("thresholding") else None
    )


def _pred(c):
    return dict(prediction=c["prediction_type"])


def _pick(o, *names):
    return {n: o[n] for n in names if n in o}


CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")


def _ddpm(c, steps, sch, o):
    return ddpm.ddpm_plan(
        grids.by_alpha(c, steps, sch, o, chain="visited"),
        **_pred(c),
        variance=c["variance_type"],
        clip=_clip(c),
        threshold=_threshold(c),
        **_pick(o, "begin"),
    )


def _ddim(c, steps, sch, o):
    return ddpm.ddim_plan(
        grids.by_alpha(c, steps, sch, o, chain="stride"),
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
    grid = grids.euler(c, steps, sch, o)
    return euler.euler_plan(
        grid,
        **_pred(c),
        churn_steps=len(grid) + grids.ends_in_table(c, o),  # one less than the peer's sigmas
        **_pick(o, *CHURN, "begin"),
    )


def _lms(c, steps, sch, o):
    return euler.lms_plan(
        grids.by_sigma(c, steps, sch, o), **_pred(c), **_pick(o, "order", "begin")
    )


def _ve(maker, clip=False, takes=("begin",)):
    def make(c, steps, sch, o):
        round_t = (
            maker in (euler.kdpm2_plan, euler.kdpm2_ancestral_plan) and grids.kind_of(c) == "karras"
        )
        kw = dict(clip=_clip(c)) if clip else {}
        return maker(
            grids.by_sigma(c, steps, sch, o, round_t=round_t), **_pred(c), **kw, **_pick(o, *takes)
        )

    return make


def _pndm(c, steps, sch, o):
    return pndm.pndm_plan(
        grids.by_alpha(c, steps, sch, o, chain="stride"),
        **_pred(c),
        skip_prk=c["skip_prk_steps"],
        **_pick(o, "begin"),
    )


def _ipndm(c, steps, sch, o):
    return pndm.ipndm_plan(steps, betas=c["trained_betas"], **_pick(o, "begin"))


def _dpm_common(c, o):
    return dict(**_pred(c), order=c["solver_order"], threshold=_threshold(c), **_pick(o, "begin"))


def _dpm_solver(c, o):
    return dict(
        **_dpm_common(c, o),
        algorithm=c["algorithm_type"],
        solver_type=c["solver_type"],
        lower_order_final=c["lower_order_final"],
    )


def _dpm(c, steps, sch, o):
    # a cosine schedule keeps fractional timesteps until they are stored as integers
    grid = grids.by_lambda(c, steps, sch, o, round_t=c["beta_schedule"] != "squaredcos_cap_v2")
    return dpm.dpm_solver_plan(
        grid,
        **_dpm_solver(c, o),
        euler_at_final=c["euler_at_final"],
        peer_d2=o["compat"],
    )


def _dpm_single(c, steps, sch, o):
    grid = grids.by_lambda(c, steps, sch, o, spacing="linspace")
    return dpm.dpm_solver_singlestep_plan(
        grid,
        **_dpm_solver(c, o),
        peer_d2=o["compat"],
    )


def _edm_euler(c, steps, sch, o):
    # its "sigma_min" is the last sigma visited, whatever that is
    c = {**c, "final_sigmas_type": "repeat"} if c["final_sigmas_type"] == "sigma_min" else c
    return euler.edm_euler_plan(
        grids.edm(c, steps, o), **_pred(c), sigma_data=c["sigma_data"], **_pick(o, *CHURN, "begin")
    )


def _edm_dpm(c, steps, sch, o, **kw):
    return dpm.dpm_solver_plan(
        grids.edm(c, steps, o, **kw),
        **_dpm_solver(c, o),
        euler_at_final=c["euler_at_final"],
        sigma_data=c["sigma_data"],
    )


def _cosine_dpm(c, steps, sch, o):
    return _edm_dpm({**c, "algorithm_type": "sde-dpmsolver++"}, steps, sch, o, c_noise="atan")


def _deis(c, steps, sch, o):
    # always ends at the smallest sigma: of the table, or the last visited one again
    return multistep.deis_plan(
        grids.by_lambda(c, steps, sch, o, final="repeat"),
        **_dpm_common(c, o),
        lower_order_final=c["lower_order_final"],
    )


def _unipc(c, steps, sch, o):
    c = c if c["predict_x0"] else {**c, "thresholding": False}  # the peer thresholds only x0
    return multistep.unipc_plan(
        grids.unipc(c, steps, sch, o),
        **_dpm_common(c, o),
        solver_type=c["solver_type"],
        predict_x0=c["predict_x0"],
        lower_order_final=c["lower_order_final"],
        disable_corrector=tuple(c["disable_corrector"]),
    )


def _sa(c, steps, sch, o):
    tau = {} if c["tau_func"] is None else dict(tau=c["tau_func"])
    return multistep.sa_solver_plan(
        grids.by_lambda(c, steps, sch, o, final="repeat"),
        **_pred(c),
        threshold=_threshold(c),
        predictor_order=c["predictor_order"],
        corrector_order=c["corrector_order"],
        data=c["algorithm_type"] == "data_prediction",
        lower_order_final=c["lower_order_final"],
        **tau,
        **_pick(o, "begin"),
    )


def _lcm(c, steps, sch, o):
    return consistency.lcm_plan(
        grids.by_alpha(c, grids.distilled(c, steps, o), sch, o, chain="repeat"),
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
        t = grids.distilled(c, steps, o)
    return consistency.tcd_plan(
        grids.by_alpha(c, t, sch, o, chain="zero"),
        **_pred(c),
        eta=o.get("eta", 0.3),
        **_pick(o, "begin"),
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
        grids.by_flow(c, steps, o), stochastic=c["stochastic_sampling"], **_pick(o, "begin")
    )


def _fm_heun(c, steps, sch, o):
    return flow.flow_match_heun_plan(grids.by_flow(c, steps, o), **_pick(o, *CHURN, "begin"))


def _fm_lcm(c, steps, sch, o):
    if c["scale_factors"]:
        raise ValueError(
            "config.scale_factors: expected None, a plan cannot resize x0 between steps"
        )
    return flow.flow_match_lcm_plan(grids.by_flow(c, steps, o), **_pick(o, "begin"))


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
