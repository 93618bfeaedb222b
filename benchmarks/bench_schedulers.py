"""schedulers: one step of the drop-in schedulers against diffusers, with its default config.

Two-stage solvers run a whole step, both evaluations. "torch noise" follows torch's generator draw
by draw, which is most of the time at small sizes; "seed" is genfast's noise instead.
"""

from __future__ import annotations

from functools import partial

import torch

from genfast.benchmarks.harness import Case, Work

SMALL, LARGE = (1, 4, 64, 64), (4, 3, 512, 512)
STEPS, AT = 20, 8

#: class -> (tensors read and written per call, evaluations per call)
DETERMINISTIC = {
    "DDIM": (4, 1),
    "DDIMInverse": (4, 1),
    "PNDM": (6, 1),
    "IPNDM": (7, 1),
    "EulerDiscrete": (4, 1),
    "HeunDiscrete": (11, 2),
    "KDPM2Discrete": (9, 2),
    "LMSDiscrete": (8, 1),
    "DPMSolverMultistep": (5, 1),
    "DPMSolverSinglestep": (5, 2),
    "DEISMultistep": (5, 1),
    "UniPCMultistep": (8, 1),
    "EDMEuler": (4, 1),
    "EDMDPMSolverMultistep": (5, 1),
    "FlowMatchEulerDiscrete": (3, 1),
    "FlowMatchHeunDiscrete": (8, 2),
}
STOCHASTIC = {
    "DDPM": (5, 1),
    "EulerAncestralDiscrete": (5, 1),
    "KDPM2AncestralDiscrete": (10, 2),
    "SASolver": (10, 1),
    "LCM": (5, 1),
    "TCD": (5, 1),
    "CMStochasticIterative": (4, 1),
    "FlowMatchLCM": (4, 1),
}


def _call(scheduler, x, m, evaluations):
    """One step in the middle of a run, as often as one likes."""
    scheduler.set_timesteps(STEPS)
    if hasattr(scheduler, "is_scale_input_called"):
        scheduler.is_scale_input_called = True
    times = list(scheduler.timesteps)
    with torch.no_grad():
        for t in times[:AT]:
            scheduler.step(m, t, x)
    state = {
        name: getattr(scheduler, name) for name in ("_step_index", "counter", "dt", "sample")
        if name in vars(scheduler)
    }  # fmt: skip
    before = list(getattr(scheduler, "timestep_list", ()))
    now = times[AT : AT + evaluations]
    variables = vars(scheduler)

    def call():
        variables.update(state)
        if before:
            scheduler.timestep_list = list(before)
        with torch.no_grad():
            for t in now:
                out = scheduler.step(m, t, x)
        return out

    return call


def _setup(name, shape, evaluations, seed, device):
    import diffusers

    from genfast.integrations import diffusers as dropin

    x, m = torch.randn(shape, device=device), torch.randn(shape, device=device)
    mine = getattr(dropin, f"{name}Scheduler")()
    mine.genfast_seed = seed
    ours = _call(mine, x, m, evaluations)
    theirs = _call(getattr(diffusers, f"{name}Scheduler")(), x, m, evaluations)

    def proof():
        if seed is not None:  # other noise, same size
            a, b = ours().prev_sample, theirs().prev_sample
            if not 0.8 < a.std() / b.std() < 1.25:
                raise AssertionError(f"{name}: std {a.std():.3f}, diffusers has {b.std():.3f}")
            return
        torch.manual_seed(0)
        a = ours().prev_sample
        torch.manual_seed(0)
        b = theirs().prev_sample
        error = (a - b).abs().max() / b.abs().max()
        if not error < 1e-4:
            raise AssertionError(f"{name}: {error:.1e} from diffusers")

    return Work(ours=ours, rivals={"diffusers": theirs}, proof=proof)


def _case(name, shape, table, seed=None, note="", targets=None):
    tensors, evaluations = table[name]
    return Case(
        "schedulers",
        name + (" seed" if seed is not None else ""),
        shape,
        partial(_setup, name, shape, evaluations, seed),
        bytes=4 * tensors * torch.Size(shape).numel(),
        targets=targets or {},
        note=note,
    )


CASES = [
    _case(name, shape, DETERMINISTIC, targets={"diffusers": least})
    for shape, least in ((SMALL, 8.0), (LARGE, 5.0))
    for name in DETERMINISTIC
]
CASES += [
    _case(name, shape, STOCHASTIC, seed, note)
    for shape in (SMALL, LARGE)
    for name in STOCHASTIC
    for seed, note in ((None, "torch noise"), (7, "genfast noise"))
]
