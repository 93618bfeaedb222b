"""The sampling loop, and the explicit state a plan is executed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from genfast.ops import _check, _noise
from genfast.ops._road import _C, DIRECT, gate, transforming
from genfast.ops.diffusion import (
    diffusion_step,
    dynamic_threshold,
    guidance_weights,
    scale_model_input,
)
from genfast.ops.rng import randn, randn_like

from .plan import D_M, D_X, VARIANCE, SolverPlan

_VARIANCE_NAMES = tuple(VARIANCE)
_empty_like, _step_row = torch.empty_like, _C.step_row
_is_traced = torch.compiler.is_dynamo_compiling  # other tracers are seen by the gate
_LEARNED = tuple((code, *[None] * 7) if code else None for code in VARIANCE.values())


@dataclass(slots=True)
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
    m: torch.Tensor | tuple,
    *,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    stream: int = 0,
    weights=None,
    denoised: bool = False,
    recycle: bool = False,
) -> SolverState:
    """Advance ``state`` by one row, given the model output m (B, ...). Returns a new state; the old
    one stays valid.

    m: guided already, or a tuple of model outputs with the weights of `genfast.diffusion_step`.
    noise: N(0, 1) like x, needed where plan.needs_noise(state.row); or seed, stream: the row draws
        its noise of (seed, stream + row) in the same pass.
    denoised: also compute the estimate of x0.
    recycle: new history entries may overwrite the old state's, which is then no longer valid; its x
        stays. Saves fresh memory, most of a step's time on tensors of many MB.
    """
    r, x, history = state.row, state.x, state.history
    steps = plan._steps or plan.steps
    if r.__class__ is not int:
        _check.integer("state.row", r)
    if not 0 <= r < len(steps):
        raise ValueError(f"state.row: expected 0..{len(plan) - 1}, got {r}; the plan is finished")
    outputs, more, place, writes, read, variance, noisy, _, _, table = row = steps[r]
    held = ()
    if not noisy:
        noise = seed = None
    elif noise is None and seed is None:
        raise ValueError(
            f"noise: row {r} of {plan.name} needs a tensor of shape {tuple(x.shape)}, got None; "
            "pass noise= or seed="
        )
    if read:
        if len(history or ()) != plan.slots:
            raise ValueError(
                f"state.history: expected {plan.slots} places for {plan.name}, got "
                f"{len(history or ())}; start with SolverState.start(plan, x_T)"
            )
        held = tuple(history)  # what the row does not read has the coefficient 0
    if denoised:
        outputs = more
    outs = None
    if weights is None and plan.threshold is None and not _is_traced():
        try:  # the kernel without ceremony; it refuses other devices and anything unusual
            if x.is_cuda and type(x) is torch.Tensor and not transforming():  # it keeps the table
                table = plan.table_on(x.device)
            if recycle and writes:
                outs = _recycling(row, table, r, outputs, x, m, history, held, noise, seed, stream)
            else:
                outs = _step_row(
                    table, r, outputs, x, m, held, noise, seed, stream + r, _LEARNED[variance], 0
                )
        except (TypeError, ValueError, AttributeError):
            pass  # the public function names the argument
    if outs is None:
        read = tuple([h if used else None for h, used in zip(held, read, strict=True)])
        outs = _public(plan, r, row, x, m, read, noise, seed, stream, weights, outputs)
    if writes:
        history = [*history]
        for output, slot in writes:
            history[slot] = outs[output]
    return SolverState(outs[0], history, r + 1, outs[place] if denoised and place >= 0 else None)


def _recycling(row, table, r, outputs, x, m, history, held, noise, seed, stream):
    """Outputs by the kernel, new history entries in the memory of those that they replace."""
    if gate(x, m, noise, *held) != DIRECT:
        return None
    slots, outs = dict(row.writes), [_empty_like(x)]
    for output in range(1, outputs):
        old = history[slots[output]] if output in slots else None
        if old is None or old.dtype != x.dtype or old.is_inference():
            old = _empty_like(x)
        else:
            torch.autograd.graph.increment_version(old)  # autograd must see the overwrite
        outs.append(old)
    outs = tuple(outs)
    number, seeds = (0, seed) if isinstance(seed, torch.Tensor) else (seed or 0, None)
    done = _C.diffusion_step(
        outs, x, (m,), None, table, None, r, held, noise, number, seeds, stream + r, 0,
        seed is not None, _LEARNED[row.variance],
    )  # fmt: skip
    return outs if done else None


def _public(plan, r, row, x, m, read, noise, seed, stream, weights, outputs):
    _check.tensor("state.x", x)
    _check.integer("stream", stream)
    wide = x.dtype == torch.float64
    table = plan.table_on(x.device, torch.float64 if wide else torch.float32)
    threshold = None
    if plan.threshold is not None:
        threshold = _threshold(plan, table, r, row, x, m, weights)
    outs = diffusion_step(
        x, m, table, r, history=read, noise=noise, seed=seed, stream=stream + r, weights=weights,
        threshold=threshold, variance=_VARIANCE_NAMES[row.variance], outputs=outputs,
    )  # fmt: skip
    return outs if outputs > 1 else (outs,)


def _threshold(plan, table, r, row, x, m, weights):
    """Bound of the predicted x0 of this row."""
    models = m if isinstance(m, (tuple, list)) else (m,)
    if row.variance:
        models = [part[:, : x.shape[1]] for part in models]
    if weights is None:
        return dynamic_threshold(x, *plan.threshold, m=models[0], table=table, row=r)
    # the guided x0 itself: a row whose only output is x0, unclamped
    x0_row = torch.zeros_like(table[:1])
    x0_row[0, 6], x0_row[0, 7] = table[r, D_X], table[r, D_M]
    x0 = diffusion_step(x, tuple(models), x0_row, weights=weights)
    return dynamic_threshold(x0, *plan.threshold)


def step_batch(
    plans: Sequence[SolverPlan],
    states: Sequence[SolverState],
    m: torch.Tensor,
    *,
    seeds: Sequence[int] | None = None,
    stream: int = 0,
    denoised: bool = False,
) -> list[SolverState]:
    """One kernel call for requests that stand at different rows, or even run different plans.

    states: one per request, x (1, ...) or (n, ...) each, all of one shape after dim 0. m: the model
    outputs, concatenated over dim 0. seeds: one int per request; its row k adds the noise of
    (seed, stream + k), as it would alone. Plans with dynamic thresholding or a learned variance are
    stepped alone. Returns the new states, views of shared outputs.
    """
    if len(plans) != len(states) or (seeds is not None and len(seeds) != len(states)):
        raise ValueError(
            f"plans, states, seeds: expected one of each per request, got {len(plans)}, "
            f"{len(states)} and {len(states) if seeds is None else len(seeds)}"
        )
    rows = []
    for k, (plan, state) in enumerate(zip(plans, states, strict=True)):
        if not 0 <= state.row < len(plan):
            raise ValueError(f"states[{k}].row: expected 0..{len(plan) - 1}, got {state.row}")
        rows.append(plan.steps[state.row])
        if plan.threshold is not None or rows[-1].variance:
            raise ValueError(f"plans[{k}]: {plan.name} must be stepped alone, with `step`")
        if rows[-1].needs_noise and seeds is None:
            raise ValueError(f"seeds: row {state.row} of plans[{k}] ({plan.name}) adds noise")
    sizes = [s.x.shape[0] for s in states]
    x = torch.cat([s.x for s in states])
    if m.shape[0] != x.shape[0]:
        raise ValueError(
            f"m: expected {x.shape[0]} samples for {len(states)} requests, got {m.shape[0]}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)  # as `step`: nothing is rounded to 16 bit
    tables = [p.table_on(x.device, wide) for p in plans]
    table = torch.cat([t[s.row : s.row + 1] for t, s in zip(tables, states, strict=True)])
    index = torch.repeat_interleave(
        torch.arange(len(states), device=x.device), torch.tensor(sizes, device=x.device)
    )
    empty = None
    history = []
    for slot in range(max((len(r.reads) for r in rows), default=0)):
        used = [bool(r.reads) and slot < len(r.reads) and r.reads[slot] for r in rows]
        if not any(used):
            history.append(None)
            continue
        parts = []
        for state, size, use in zip(states, sizes, used, strict=True):
            if not use and empty is None:
                empty = torch.zeros((), dtype=x.dtype, device=x.device)
            parts.append(state.history[slot] if use else empty.expand(size, *x.shape[1:]))
        history.append(torch.cat(parts))
    noise = None
    if any(r.needs_noise for r in rows):
        noise = torch.empty_like(x, dtype=wide)
        parts = noise.split(sizes)
        for part, row, state, seed in zip(parts, rows, states, seeds, strict=True):
            if row.needs_noise:
                randn(seed=seed, stream=stream + state.row, out=part)
            else:
                part.zero_()  # its coefficient is 0, and 0 times what was there may be NaN
    outputs = max(r.outputs_denoised if denoised else r.outputs for r in rows)
    outs = diffusion_step(
        x, m, table, index, history=tuple(history), noise=noise, outputs=outputs
    )  # fmt: skip
    outs = [o.split(sizes) for o in (outs if outputs > 1 else (outs,))]
    new = []
    for k, (row, state) in enumerate(zip(rows, states, strict=True)):
        kept = list(state.history)
        for output, slot in row.writes:
            kept[slot] = outs[output][k]
        estimate = outs[row.denoised][k] if denoised and row.denoised >= 0 else None
        new.append(SolverState(outs[0][k], kept, state.row + 1, estimate))
    return new


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
    guidance: float | Sequence[float] | dict | None = None,
    callback: Callable[[int, SolverState], SolverState | None] | None = None,
    progress: bool = False,
    state: SolverState | None = None,
) -> torch.Tensor:
    """Run a plan: x_T (B, ...) to the sample, same shape and dtype.

    model: called as model(x, t) with x scaled for it and t an int (or float, if the plan says so);
        returns m like x. With guidance it is called as model(x, t) and must return (cond, uncond),
        or as many outputs as `guidance` has weights.
    seed, stream: row k adds the noise of (seed, stream + k), the same on every machine; an int64
        tensor (B,) seeds each sample by itself.
    generator (or a list, one per sample): draw from torch instead, in number and order as diffusers
        does. Neither seed nor generator: torch's default generator.
    guidance: scale, or a dict of arguments of `genfast.guide` such as
        dict(scale=5.0, method="apg"), or the weights g_j of m = sum_j g_j m_j, a number per output:
        (w, 1 - w, s) adds a classifier's gradient to classifier-free guidance.
    callback: called after each row with (row, state), state.denoised included; may return a changed
        state.
    progress: show a tqdm bar. state: continue from here instead of x_T at row 0.
    """
    if seed is not None and generator is not None:
        raise ValueError("seed, generator: expected at most one of them, got both")
    _check.tensor("x_T", x_T)
    if not isinstance(plan, SolverPlan):
        raise TypeError(
            f"plan: expected a SolverPlan, such as ddim_plan(50), got {_check.describe(plan)}"
        )
    if isinstance(generator, (list, tuple)) and len(generator) != len(x_T):
        raise ValueError(
            f"generator: expected one, or a list of one per sample ({len(x_T)}), got "
            f"{len(generator)}"
        )
    for g in generator if isinstance(generator, (list, tuple)) else (generator,):
        if g is not None and not isinstance(g, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {_check.describe(g)}")
    if not callable(model):
        raise TypeError(f"model: expected a callable model(x, t), got {_check.describe(model)}")
    _noise.check(seed, stream, 0, None, x_T.shape, x_T.device)
    _check.integer("stream", stream, high=2**64 - len(plan))  # row k has stream + k
    given = tuple(guidance) if isinstance(guidance, (tuple, list)) else None
    options = guidance if isinstance(guidance, dict) else dict(scale=guidance)
    private = callback is None and state is None  # nobody else holds the history
    if state is None:
        state = SolverState.start(plan, x_T)
    _check_state("state", state)
    rows = range(state.row, len(plan))
    if progress:
        from tqdm.auto import tqdm

        rows = tqdm(rows, desc=plan.name)
    for r in rows:
        row = plan.steps[r]
        x = state.x
        m = model(
            x if row.input_scale == 1.0 else scale_model_input(x, row.input_scale), row.timestep
        )
        weights = None
        if given is not None:
            if not (isinstance(m, (tuple, list)) and len(m) == len(given)):
                raise TypeError(
                    f"model: with {len(given)} weights of guidance expected it to return as many "
                    f"outputs, got {len(m) if isinstance(m, (tuple, list)) else type(m).__name__}"
                )
            weights, m = given, tuple(m)
        elif guidance is not None:
            if not (isinstance(m, (tuple, list)) and len(m) == 2):
                raise TypeError(
                    f"model: with guidance expected it to return (cond, uncond), got "
                    f"{type(m).__name__}"
                )
            weights = _weights(m, x, row, options)
            m = tuple(m)
            if options.get("average") is not None:
                m = (*m, options["average"])
        # with a generator, also where the coefficient is 0 but the peer draws
        noise = None
        if seed is None and (row.needs_noise or (generator is not None and plan.draws_noise(r))):
            noise = _draw(x, r, seed, stream, generator)
        state = step(
            plan, state, m, noise=noise, seed=seed, stream=stream, weights=weights,
            denoised=callback is not None, recycle=private,
        )  # fmt: skip
        if callback is not None:
            state = callback(r, state) or state
            _check_state("callback", state)
    return state.x


def _check_state(name, state):
    if not isinstance(state, SolverState):
        raise TypeError(
            f"{name}: expected a SolverState or None, got {_check.describe(state)}; start one with "
            "SolverState.start(plan, x_T)"
        )


def _weights(m, x, row, options):
    """Weights of (cond, uncond): numbers for plain guidance, per sample otherwise. With a learned
    variance only the first half of the channels is guided.
    """
    scale = options.get("scale", 1.0)
    plain = (
        set(options) <= {"scale", "method", "original"} and options.get("method", "cfg") == "cfg"
    )
    if plain and isinstance(scale, (int, float)):
        w = float(scale)
        return (1.0 + w, -w) if options.get("original") else (w, 1.0 - w)
    parts = [part[:, : x.shape[1]] for part in m] if row.variance else m
    return guidance_weights(*parts, **options)
