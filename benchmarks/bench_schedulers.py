"""schedulers: one step of the drop-in schedulers against diffusers, with its default config.

Two-stage solvers run a whole step, both evaluations. Classes that draw noise have three rows:
"torch noise" follows torch's generator draw by draw, which is most of the time (torch.randn alone:
about 45 us for a 64 KiB latent); "given noise" is the same step with the draw taken out on both
sides; "seed" is genfast's noise, made inside the kernel, against diffusers with torch's.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import partial

import torch

import genfast
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
    "DPMSolverSinglestep": (9, 2),
    "DEISMultistep": (5, 1),
    "UniPCMultistep": (8, 1),
    "EDMEuler": (4, 1),
    "EDMDPMSolverMultistep": (5, 1),
    "FlowMatchEulerDiscrete": (3, 1),
    "FlowMatchHeunDiscrete": (8, 2),
}
#: the same with given noise
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
#: PNDM starts with 12 Runge-Kutta evaluations
START = {"PNDM": 16}
_MOVING = ("_step_index", "counter", "dt", "sample")


def _call(scheduler, x, m, evaluations, start=AT, draw=None):
    """One step in the middle of a run, as often as one likes.

    draw: (module, function) takes the place of its randn_tensor.
    """
    scheduler.set_timesteps(STEPS)
    if hasattr(scheduler, "is_scale_input_called"):
        scheduler.is_scale_input_called = True
    times = list(scheduler.timesteps)
    torch.manual_seed(0)  # the same noise so far in both
    for t in times[:start]:
        scheduler.step(m, t, x)
    variables = vars(scheduler)
    state = {name: variables[name] for name in _MOVING if name in variables}
    # lists that grow or are shifted at every step
    lists = {n: list(variables[n]) for n in ("ets", "timestep_list") if variables.get(n)}
    now = times[start : start + evaluations]

    def call():
        variables.update(state)
        for name, before in lists.items():
            variables[name] = before.copy()
        for t in now:
            out = scheduler.step(m, t, x)
        return out

    if draw is None:
        return call
    module, drawn = draw
    original = module.randn_tensor

    def call_without_draw():
        module.randn_tensor = drawn
        try:
            return call()
        finally:
            module.randn_tensor = original

    return call_without_draw


def _setup(name, shape, evaluations, noise, device):
    import diffusers

    from genfast.integrations import diffusers as dropin
    from genfast.integrations.diffusers import base

    # Not from torch's generator: after a seed of 0 these would be the noise that diffusers draws.
    x, m, z = (genfast.randn(shape, seed=n, device=device) for n in (1, 2, 3))
    calls = []
    for library in (dropin, diffusers):
        scheduler = getattr(library, f"{name}Scheduler")()
        draw = None
        if noise == "given":
            peer = getattr(diffusers, f"{name}Scheduler").__module__
            draw = base if library is dropin else sys.modules[peer], lambda *_, **__: z
        elif noise == "seed" and library is dropin:
            scheduler.genfast_seed = 7
        calls.append(_call(scheduler, x, m, evaluations, START.get(name, AT), draw))
    ours, theirs = calls

    def proof():
        if noise == "seed":  # other noise, same size
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


#: noise -> (what the case's name ends in, tensors less than with given noise, note)
NOISES = {
    None: ("", 0, ""),
    "torch": ("", 0, "torch noise"),
    "given": (" given noise", 0, "the draw taken out on both sides"),
    "seed": (" seed", 1, "genfast noise in the kernel; diffusers draws torch's"),
}


def _case(name, shape, table, noise, targets):
    tensors, evaluations = table[name]
    suffix, fewer, note = NOISES[noise]
    return Case(
        "schedulers",
        name + suffix,
        shape,
        partial(_setup, name, shape, evaluations, noise),
        bytes=4 * (tensors - fewer) * torch.Size(shape).numel(),
        targets=targets,
        note=note,
    )


def _forward(name, shape, device):
    """add_noise of a batch at random timesteps."""
    import diffusers

    from genfast.integrations import diffusers as dropin

    x, z = torch.randn(shape, device=device), torch.randn(shape, device=device)
    at = torch.randint(0, 1000, shape[:1], generator=torch.Generator().manual_seed(0))
    calls = []
    for library in (dropin, diffusers):
        scheduler = getattr(library, f"{name}Scheduler")()
        if name != "DDPM":
            scheduler.set_timesteps(1000)
        t = at if name == "DDPM" else scheduler.timesteps[at]
        add = scheduler.scale_noise if name.startswith("Flow") else scheduler.add_noise
        calls.append(partial(add, x, t, z) if name.startswith("Flow") else partial(add, x, z, t))
    ours, theirs = calls

    def proof():
        error = (ours() - theirs()).abs().max() / theirs().abs().max()
        if not error < 1e-5:
            raise AssertionError(f"{name}: {error:.1e} from diffusers")

    return Work(ours=ours, rivals={"diffusers": theirs}, proof=proof)


def _forward_case(name, shape):
    return Case(
        "schedulers",
        f"{name} add_noise",
        shape,
        partial(_forward, name, shape),
        bytes=12 * torch.Size(shape).numel(),
    )


CASES = [
    _case(name, shape, table, noise, {"diffusers": 1.0 if noise == "torch" else least})
    for shape, least in ((SMALL, 8.0), (LARGE, 5.0))
    for table, noises in ((DETERMINISTIC, (None,)), (STOCHASTIC, ("torch", "given", "seed")))
    for name in table
    for noise in noises
]
CASES += [
    _forward_case(name, shape)
    for shape in (SMALL, LARGE)
    for name in ("DDPM", "EulerDiscrete", "FlowMatchEulerDiscrete")
]
if not importlib.util.find_spec("diffusers"):
    CASES = []  # nothing to compare with, and nothing of ours without it
