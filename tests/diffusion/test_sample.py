"""Plans executed by the kernels: the loop, its states, batches of requests. About 5 s."""

import math
from functools import partial

import pytest
import torch

import genfast
from genfast import schedulers as S
from genfast.reference import diffusion as R

PLANS = {
    "ddpm": lambda n: S.ddpm_plan(n, clip=1.0),
    "ddim": lambda n: S.ddim_plan(n, eta=0.7),
    "euler": lambda n: S.euler_plan(n),
    "ancestral": lambda n: S.euler_ancestral_plan(n),
    "heun": lambda n: S.heun_plan(n),
    "dpm": lambda n: S.dpm_solver_plan(n, order=3),
    "dpm sde": lambda n: S.dpm_solver_plan(n, algorithm="sde-dpmsolver++"),
    "unipc": lambda n: S.unipc_plan(n, order=3),
    "pndm": lambda n: S.pndm_plan(n),
    "sa": lambda n: S.sa_solver_plan(n),
    "flow": lambda n: S.flow_match_euler_plan(n),
}


def model(x, t):
    """Smooth, and not linear in x."""
    return torch.tanh(0.6 * x.roll(1, -1) + 0.001 * float(t)) + 0.2 * x


def reference_run(plan, x, seed, stream=0):
    """The plan in float64 by the reference, with the kernel's noise."""
    x, history = x.double(), [None] * plan.slots
    for r in range(len(plan)):
        row = plan.steps[r]
        noise = genfast.randn(x.shape, seed=seed, stream=stream + r).double()
        outs = R.diffusion_step(
            x, model(x * row.input_scale, row.timestep), plan.table[r], noise=noise,
            history=[h if row.reads and row.reads[k] else None for k, h in enumerate(history)],
        )  # fmt: skip
        x = outs[0]
        for output, slot in row.writes:
            history[slot] = outs[output]
    return x


@pytest.mark.parametrize("name", PLANS)
def test_loop(name):
    plan = PLANS[name](8)
    x_T = genfast.randn(2, 3, 5, 6, seed=1) * plan.init_noise_sigma
    got = genfast.schedulers.sample(model, plan, x_T, seed=5, stream=100)
    want = reference_run(plan, x_T, 5, 100)
    torch.testing.assert_close(got.double(), want, rtol=3e-5, atol=3e-5 * want.abs().max().item())
    with genfast.backend("reference"):
        slow = S.sample(model, plan, x_T, seed=5, stream=100)
    torch.testing.assert_close(got, slow, rtol=1e-4, atol=1e-4)
    seeds = torch.tensor([5, 9])
    both = S.sample(model, plan, x_T, seed=seeds)
    alone = S.sample(model, plan, x_T[1:], seed=seeds[1:])
    assert torch.equal(both[1:], alone)


def test_half_precision_stays_close():
    plan = PLANS["dpm"](8)
    x_T = genfast.randn(2, 3, 5, 6, seed=1)
    want = reference_run(plan, x_T, 5)
    got = S.sample(model, plan, x_T.bfloat16(), seed=5)
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() < 0.05 * want.abs().max()


def test_folded_table():
    plan = S.ddim_plan(20)
    table = plan.table_on(dtype=torch.float64)
    assert plan.table_on(dtype=torch.float64) is table
    x, m = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(2))
    for r in range(len(plan)):
        torch.testing.assert_close(
            R.diffusion_step(x, m, table[r])[0], R.diffusion_step(x, m, plan.table[r])[0],
            rtol=1e-12, atol=1e-12,
        )  # fmt: skip
    assert (table[:, 8] == 0).all()
    clamped = S.ddpm_plan(5, clip=1.0)
    assert (clamped.table_on()[:-1, 8] != 0).all()


@pytest.mark.parametrize("method", ["cfg", "rescale", "apg"])
def test_guided_loop(method):
    plan = S.ddim_plan(6)
    x_T = genfast.randn(2, 3, 5, 6, seed=1)
    pair = lambda x, t: (model(x, t), 0.5 * model(x, t) + 0.1)  # noqa: E731
    options = dict(scale=3.0, method=method)
    got = S.sample(pair, plan, x_T, guidance=options)
    want = S.sample(lambda x, t: R.guide(*pair(x, t), **options), plan, x_T.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    if method == "cfg":
        assert torch.equal(got, S.sample(pair, plan, x_T, guidance=3.0))


def test_learned_variance_and_thresholding():
    plan = S.ddpm_plan(6, variance="learned_range")
    x_T = genfast.randn(2, 3, 5, 6, seed=1)
    wide = lambda x, t: torch.cat([model(x, t), model(x.flip(1), t).clamp(-1, 1)], 1)  # noqa: E731
    got = S.sample(wide, plan, x_T, seed=5)
    want = S.sample(wide, plan, x_T.double(), seed=5)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    plan = S.dpm_solver_plan(6, threshold=(0.9, 1.5))
    got = S.sample(model, plan, x_T, seed=5)
    want = S.sample(model, plan, x_T.double(), seed=5)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)
    pair = lambda x, t: (model(x, t), model(x, t) * 0.5)  # noqa: E731
    got = S.sample(pair, plan, x_T, seed=5, guidance=2.0)
    want = S.sample(lambda x, t: R.guide(*pair(x, t), 2.0), plan, x_T.double(), seed=5)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


def test_recycled_histories_change_nothing():
    """The loop overwrites dead history; a loop with a callback keeps every tensor."""
    for name in ("dpm", "unipc", "sa", "pndm"):
        plan = PLANS[name](8)
        x_T = genfast.randn(2, 3, 1025, seed=1)
        kept = S.sample(model, plan, x_T, seed=5, callback=lambda r, s: None)
        assert torch.equal(S.sample(model, plan, x_T, seed=5), kept)
        half = S.SolverState.start(plan, x_T)
        for _ in range(4):
            half = S.step(plan, half, model(half.x, plan.timestep(half.row)), seed=5)
        before = [None if h is None else h.clone() for h in half.history]
        S.sample(model, plan, x_T, seed=5, state=half)
        for a, b in zip(half.history, before, strict=True):
            assert a is b is None or torch.equal(a, b)


def test_callback_gets_the_estimate():
    plan, seen = S.ddim_plan(5), []
    S.sample(
        model, plan, genfast.randn(1, 3, 4, seed=1), callback=lambda r, s: seen.append(s.denoised)
    )
    assert len(seen) == 5 and all(d is not None and d.shape == (1, 3, 4) for d in seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_requests_share_a_batch(dtype, monkeypatch):
    """Different plans at different rows: bit for bit what each gives alone, whatever was in the
    memory of the noise that some of them do not draw.
    """
    monkeypatch.setattr(torch, "empty_like", partial(torch.full_like, fill_value=math.nan))
    names = ["ddim", "dpm", "unipc", "euler", "dpm sde"]
    plans = [PLANS[n](4 + k) for k, n in enumerate(names)]
    sizes = [1, 2, 1, 1, 1]
    starts = [genfast.randn(n, 3, 40, seed=k, dtype=dtype) for k, n in enumerate(sizes)]
    seeds = [11, 12, 13, 14, 15]
    alone = [S.SolverState.start(p, x) for p, x in zip(plans, starts, strict=True)]
    for k in range(len(plans)):  # staggered
        for _ in range(k % 3):
            m = model(alone[k].x, 5)
            alone[k] = S.step(plans[k], alone[k], m, seed=seeds[k])
    together = list(alone)
    for _ in range(2):
        m = model(torch.cat([s.x for s in together]), 5)
        together = S.step_batch(plans, together, m, seeds=seeds)
        alone = [
            S.step(p, s, part, seed=seed)
            for p, s, part, seed in zip(plans, alone, m.split(sizes), seeds, strict=True)
        ]
        for a, b in zip(alone, together, strict=True):
            assert a.row == b.row and torch.equal(a.x, b.x)
            for slot, (h, g) in enumerate(zip(a.history, b.history, strict=True)):
                assert (h is None and g is None) or torch.equal(h, g), slot


def test_step_is_differentiable():
    plan = PLANS["dpm sde"](5)
    x = genfast.randn(2, 3, 4, seed=1).requires_grad_()
    state = S.SolverState.start(plan, x)
    for _ in range(3):
        state = S.step(plan, state, model(state.x, 5), seed=1)
    (g,) = torch.autograd.grad(state.x.sum(), x)
    y = x.detach().double().requires_grad_()
    state = S.SolverState.start(plan, y)
    for _ in range(3):
        state = S.step(plan, state, model(state.x, 5), seed=1)
    torch.testing.assert_close(
        g.double(), torch.autograd.grad(state.x.sum(), y)[0], rtol=1e-4, atol=1e-4
    )


BAD = [
    ("plans, states", lambda p, s, m: S.step_batch([p], [s, s], m)),
    ("seeds", lambda p, s, m: S.step_batch([p], [s], m)),
    ("m:", lambda p, s, m: S.step_batch([p], [s], m[:1], seeds=[1])),
    (
        "must be stepped alone",
        lambda p, s, m: S.step_batch([S.ddpm_plan(4, variance="learned_range")], [s], m, seeds=[1]),
    ),  # noqa: E501
    ("m:", lambda p, s, m: S.step(p, s, m[:1], seed=1)),
    ("noise:", lambda p, s, m: S.step(p, s, m)),
    ("state.row: expected an int", lambda p, s, m: S.step(p, S.SolverState(m, [], 0.5), m, seed=1)),
    ("state.history: expected", lambda p, s, m: S.step(p, S.SolverState(m, None, 2), m, seed=1)),
    ("state.x: expected", lambda p, s, m: S.step(p, S.SolverState(None, s.history), m, seed=1)),
    ("stream: expected an int", lambda p, s, m: S.step(p, s, m, seed=1, stream="a")),
    ("d: expected the keys", lambda p, s, m: S.SolverPlan.from_dict({"name": "ddim"})),
]


@pytest.mark.parametrize("message, call", BAD, ids=range(len(BAD)))
def test_bad_input(message, call):
    plan = PLANS["dpm sde"](5)
    with pytest.raises((ValueError, TypeError), match=message):
        call(plan, S.SolverState.start(plan, torch.zeros(2, 3)), torch.zeros(2, 3))
