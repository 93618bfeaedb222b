"""Drop-in schedulers for diffusers 0.42: same names, same configs, same images, one kernel a step.

    from genfast.integrations.diffusers import DPMSolverMultistepScheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

or, for a pipeline as it stands, `genfast.accelerate(pipe)` and `genfast.restore(pipe)`.

Without a counterpart here, and left alone by `accelerate`: DPMSolverSDE and
CosineDPMSolverMultistep (torchsde draws their noise on the CPU; `genfast.schedulers` has both as
plans, without it), the Parallel, CogVideoX, RePaint, ScoreSde, UnCLIP and token
schedulers.

Each class is a subclass of the diffusers class of the same name. Tables (`alphas_cumprod`,
`sigmas`, `timesteps`), history (`model_outputs`, `ets`, `derivatives`, `last_sample`, ...) and
counters are the peer's own public attributes: read at every step, written back after it, so they
may be changed in between; new or edited tables and configs are noticed. Coefficients are computed
in float64 from the live tables and applied in float32 in one pass.

Noise. `step(generator=...)`, or nothing: torch's stream exactly as diffusers draws it (count,
order, dtype; also where the coefficient is 0). `step(seed=...)` or `scheduler.genfast_seed = ...`:
genfast's noise of (seed, stream = step index), the same on every device and for every batch size,
made inside the step's kernel and not rounded to 16 bit (SA-Solver stores it: a tensor is drawn).

A step that no affine row expresses runs in diffusers' own code, with the reason in
`scheduler.genfast_fallback`: per-token timesteps and EDM's ready pred_original_sample, UniPC's
solver_p, flow-match LCM's scale_factors, a history that is not that of a run (a missing model
output, a timestep that is not the step index's), a noise level that says nothing about x0 (epsilon
at zero terminal SNR), a step before `set_timesteps`, a model with the wrong number of channels, a
sample or model output of integers.

Where a step differs from diffusers' (everything else agrees to rounding):

* sde-dpmsolver of order 3 and EDM sde-dpmsolver++ of order 3 run (diffusers: UnboundLocalError).
* DDPM fixed_large_log is exp(log(beta) / 2) (diffusers: NaN); a negative variance predicted with
  "learned" counts as 0 (diffusers: NaN).
* A step to sigma = 0 or between equal sigmas at order above 1 is the formula's limit (NaN).
* add_noise, get_velocity and scale_noise never round their coefficients to 16 bit. 16-bit steps
  are computed in float32 and rounded once; diffusers, in 16 bit, is up to 1e-2 off.
* IPNDM keeps the four outputs it can read in `ets`, not all.
* Solvers with fp32 arithmetic of their own in diffusers (DEIS, UniPC, SA-Solver at 50 steps) differ
  from it by its rounding, up to 1e-4 there.
* sde-dpmsolver++ of order 3 repeats diffusers' D2 weight, although its 1/2 has the wrong sign.
"""

from __future__ import annotations

import weakref

from diffusers import SchedulerMixin  # noqa: F401  what a pipeline looks for here when it loads

from .multistep import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    LMSDiscreteScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from .pndm import IPNDMScheduler, PNDMScheduler
from .sigma import (
    CMStochasticIterativeScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    TCDScheduler,
)
from .timestep import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from .twostage import (
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
)

__all__ = [
    "CMStochasticIterativeScheduler",
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
    "restore_scheduler",
    "swap_scheduler",
]

#: diffusers class -> the class that takes its place
SCHEDULERS = {}
for _name in __all__[:-2]:
    _class = globals()[_name]
    _class.__module__ = __name__  # pipelines save a scheduler as (module, class)
    _peer = next(c for c in _class.__mro__ if c.__module__.startswith("diffusers."))
    _class.__qualname__ = _name
    SCHEDULERS[_peer] = _class


def swap_scheduler(pipe) -> list:
    """Turns pipe.scheduler (or pipe, a scheduler) over in place, state and config kept; returns
    what undoes it, nothing for schedulers without a counterpart here.

    The object stays the same, so pipelines that share it and the saved config do not notice.
    """
    scheduler = getattr(pipe, "scheduler", pipe)
    own = type(scheduler)
    if own not in SCHEDULERS:
        return []
    scheduler.__class__ = SCHEDULERS[own]
    seen = weakref.ref(scheduler)  # `accelerate` keeps this by the scheduler
    return [lambda: _back(seen())]


def restore_scheduler(pipe) -> None:
    """Gives pipe.scheduler (or pipe, a scheduler) its diffusers class back."""
    _back(getattr(pipe, "scheduler", pipe))


def _back(scheduler) -> None:
    for peer, mine in SCHEDULERS.items():
        if type(scheduler) is mine:
            scheduler.__class__ = peer
            for name in [n for n in vars(scheduler) if n.startswith(("_genfast", "genfast_"))]:
                delattr(scheduler, name)
