"""The plan of a diffusers scheduler, from its class name and config alone (diffusers need not be
installed)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .._check import choice
from ..plan import SolverPlan
from ..schedules import NoiseSchedule
from .grids import schedule_of
from .makers import CLASSES

# Options `timesteps` that count the steps alone; those of the others are the steps.
_COUNTED = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
# The peer's own silent translation of names that belong to a sibling solver: setting -> (names of
# siblings, what they become).
_DPM_NAMES = {
    "solver_type": (("logrho", "bh1", "bh2"), "midpoint"),
    "algorithm_type": (("deis",), "dpmsolver++"),
}
_SIBLINGS = {
    "DPMSolverMultistepScheduler": _DPM_NAMES,
    "DPMSolverSinglestepScheduler": _DPM_NAMES,
    "EDMDPMSolverMultistepScheduler": _DPM_NAMES,
    "CosineDPMSolverMultistepScheduler": _DPM_NAMES,
    "UniPCMultistepScheduler": {"solver_type": (("midpoint", "heun", "logrho"), "bh2")},
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
    if options.get("timesteps") is not None and class_name not in _COUNTED:
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
    for setting, (names, own) in _SIBLINGS.get(class_name, {}).items():
        if c[setting] in names:
            c[setting] = own
    return make(c, steps, schedule, {**options, "compat": compat})
