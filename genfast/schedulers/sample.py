"""The sampling loop, and the explicit state a plan is executed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from genfast.ops.rng import randn_like
from genfast.reference.diffusion import diffusion_step, dynamic_threshold, guide

from .plan import D_M, D_X, DENOISED, INPUT_SCALE, VARIANCE_MODE, WRITE_1, WRITE_2, SolverPlan


@dataclass
class SolverState:
    """All that moves while a plan is run; the plan itself never changes.

    x: (B, ...) current sample. history: one tensor like x per slot, None while empty.
    row: next row of the plan. denoised: latest estimate of x0, if one was asked for.
    """

    x: torch.Tensor
    history: list = field(default_factory=list)
    row: int = 0
    denoised: torch.Tensor | None = None

    @classmethod
    def start(cls, plan: SolverPlan, x_T: torch.Tensor) -> SolverState:
        return cls(x_T, [None] * plan.slots)


def step(
    plan: SolverPlan,
    state: SolverState,
    m: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    denoised: bool = False,
) -> SolverState:
    """Advance ``state`` by one row, given the (guided) model output m (B, ...). Returns a new
    state; the old one stays valid.

    noise: N(0, 1) like x, needed where plan.needs_noise(state.row).
    denoised: also compute the estimate of x0.
    """
    r = state.row
    if not 0 <= r < len(plan):
        raise ValueError(f"state.row: expected 0..{len(plan) - 1}, got {r}; the plan is finished")
    if noise is None and plan.needs_noise(r):
        raise ValueError(
            f"noise: row {r} of {plan.name} needs a tensor of shape {tuple(state.x.shape)}, got "
            f"None"
        )
    index, coef = plan.index[r], plan.table[r]
    threshold = None
    if plan.threshold is not None:
        eps_or_x0 = m[:, : state.x.shape[1]] if index[VARIANCE_MODE] else m
        threshold = dynamic_threshold(coef[D_X] * state.x + coef[D_M] * eps_or_x0, *plan.threshold)
    reads = {s - 3 for s in plan.sources(r)}
    outs = diffusion_step(
        state.x,
        m,
        coef,
        history=[h if k in reads else None for k, h in enumerate(state.history)],
        noise=noise,
        threshold=threshold,
        variance_mode=int(index[VARIANCE_MODE]),
        n_out=3 if denoised or index[WRITE_2] else 2 if index[WRITE_1] else 1,
    )
    history = list(state.history)
    for col, out in zip((WRITE_1, WRITE_2), outs[1:], strict=False):
        if index[col]:
            history[index[col] - 1] = out
    place = index[DENOISED]
    return SolverState(outs[0], history, r + 1, outs[place] if denoised and place >= 0 else None)


def _draw(x, row, seed, stream, generator):
    """Noise of one row: contract noise of (seed, stream + row), or torch's, drawn as diffusers
    does.
    """
    if seed is not None:
        return randn_like(x, seed=seed, stream=stream + row)
    if isinstance(generator, (list, tuple)):  # one per sample
        return torch.cat(
            [_draw(x[b : b + 1], row, None, stream, g) for b, g in enumerate(generator)]
        )
    # a CPU generator also serves a sample on another device
    where = x.device if generator is None else generator.device
    return torch.randn(x.shape, dtype=x.dtype, device=where, generator=generator).to(x.device)


def sample(
    model: Callable,
    plan: SolverPlan,
    x_T: torch.Tensor,
    *,
    seed: int | torch.Tensor | None = None,
    stream: int = 0,
    generator: torch.Generator | list | None = None,
    guidance: float | dict | None = None,
    callback: Callable[[int, SolverState], SolverState | None] | None = None,
    progress: bool = False,
    state: SolverState | None = None,
) -> torch.Tensor:
    """Run a plan: x_T (B, ...) to the sample, same shape and dtype.

    model: called as model(x, t) with x scaled for it and t an int (or float, if the plan says so);
        returns m like x. With guidance it is called as model(x, t) and must return (cond, uncond).
    seed, stream: row k adds the noise of (seed, stream + k), the same on every machine; an int64
        tensor (B,) seeds each sample by itself.
    generator (or a list, one per sample): draw from torch instead, in number and order as diffusers
        does. Neither seed nor generator: torch's default generator.
    guidance: scale, or a dict of arguments of `genfast.reference.diffusion.guide` such as
        dict(scale=5.0, method="apg").
    callback: called after each row with (row, state), state.denoised included; may return a changed
        state.
    progress: show a tqdm bar. state: continue from here instead of x_T at row 0.
    """
    if seed is not None and generator is not None:
        raise ValueError("seed, generator: expected at most one of them, got both")
    if not x_T.is_floating_point():
        raise TypeError(f"x_T: expected a floating point tensor, got {x_T.dtype}")
    options = guidance if isinstance(guidance, dict) else dict(scale=guidance)
    state = state or SolverState.start(plan, x_T)
    rows = range(state.row, len(plan))
    if progress:
        from tqdm.auto import tqdm

        rows = tqdm(rows, desc=plan.name)
    for r in rows:
        scale = plan.table[r, INPUT_SCALE]
        x = state.x if scale == 1.0 else state.x * float(scale)
        m = model(x, plan.timestep(r))
        if guidance is not None:
            if not (isinstance(m, (tuple, list)) and len(m) == 2):
                raise TypeError(
                    f"model: with guidance expected it to return (cond, uncond), got "
                    f"{type(m).__name__}"
                )
            m = guide(*m, **options)
        # with a generator, also where the coefficient is 0 but the peer draws
        wants = plan.needs_noise(r) or (generator is not None and plan.draws_noise(r))
        noise = _draw(state.x, r, seed, stream, generator) if wants else None
        state = step(
            plan, state, m, noise=noise, denoised=callback is not None
        )  # the native op's place
        if callback is not None:
            state = callback(r, state) or state
    return state.x
