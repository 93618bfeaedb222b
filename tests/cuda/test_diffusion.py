"""Every CUDA kernel of diffusion, executed, against the CPU kernel of the same name: the same bits.

Sums over a sample are in double on both sides, in different orders: the fp32 results of these
inputs are still equal.
"""

from __future__ import annotations

import pytest
import torch

from genfast import schedulers
from genfast._native import _C

from .conftest import same_bits
from .helpers import FLOATS, both, data, exact, laid_out, seeds_of

COLUMNS, HISTORY = 36, 6
EPSILON, SAMPLE, V, FLOW = range(4)
CFG, RESCALE, ZERO_STAR, APG, MAG, TCFG = range(6)
FIXED, LEARNED_RANGE, LEARNED = range(3)


def table(rows=5, clip=0.7, without=()):
    """Every coefficient counts but those of the sources named (numbers) in `without`."""
    t = data((rows, COLUMNS), torch.float32, 3) * 0.5
    t[:, 2] = clip
    t[:, 6:].view(rows, 3, 10)[..., list(without)] = 0
    return t


def scratch(samples, parts, width=1):
    return torch.full((samples * parts * width,), torch.nan, dtype=torch.float64)


STEPS = {
    # name: shape, dtype, layout, options
    "everything": ((3, 4, 37), torch.float32, "dense", {"models": 3, "history": 6}),
    "bf16, per sample": (
        (3, 2, 40), torch.bfloat16, "dense",
        {"index": [4, 0, 2], "seeds": "rows", "offset": 6, "weights": "each", "threshold": 3},
    ),
    "per token": ((2, 5, 19), torch.float16, "transposed", {"index": "tokens", "outputs": 2}),
    "misaligned": ((1031,), torch.float32, "misaligned", {"outputs": 1, "offset": 3}),
    "strided": ((4, 3, 33), torch.bfloat16, "sliced", {"noise": "given", "clip": torch.inf}),
    "no noise": ((2, 64), torch.float32, "dense", {"noise": None, "without": [9], "history": 2}),
    "few sources": ((2, 64), torch.float16, "dense", {"without": [0, 2, 9], "noise": None}),
    "zero weight": ((2, 9), torch.float32, "dense", {"models": 2, "weights": [0.0, 1.5]}),
    "one threshold": ((2, 70), torch.float32, "dense", {"threshold": 1, "seeds": "one"}),
    "learned": ((2, 3, 5), torch.float32, "dense", {"variance": LEARNED, "weights": [1.0]}),
    "learned range": ((2, 4, 33), torch.bfloat16, "dense", {"variance": LEARNED_RANGE}),
    "inpaint": ((3, 4, 9), torch.float32, "dense", {"blend": "drawn", "level": 3, "outputs": 2}),
    "inpaint, given": ((3, 4, 9), torch.float16, "sliced", {"blend": "given", "level": 1}),
    "inpaint, clean": ((3, 40), torch.float32, "dense", {"blend": "none", "noise": "given"}),
}  # fmt: skip


def step_arguments(shape, dtype, layout, *, models=1, history=3, index=None, seeds="int", offset=0,
                   weights=None, threshold=0, outputs=3, noise="drawn", clip=0.7, without=(),
                   variance=FIXED, blend=None, level=0):  # fmt: skip
    def like_x(salt):
        return data(shape, dtype, salt, layout)

    batch = shape[0]
    outs = tuple(torch.empty_like(like_x(0)) for _ in range(outputs))
    doubled = (shape[0], 2 * shape[1], *shape[2:]) if variance else shape
    given = tuple(data(doubled, dtype, 10 + j, layout) for j in range(models))
    weights = "each" if models > 1 and weights is None else weights
    if weights == "each":
        weights = data((batch, models), torch.float32, 20)
    elif weights is not None:
        weights = torch.tensor(weights)
    if index == "tokens":
        index = torch.arange(shape[0] * shape[1]).view(shape[:2]) * 3 % 5
    elif index is not None:
        index = torch.tensor(index)
    seed, rows = seeds_of(seeds, shape)
    bound = data((threshold,), torch.float32, 30).abs() + 0.5 if threshold else None
    extras = None
    if variance or threshold or blend:
        known = blend and [like_x(31).abs().clamp(max=1), like_x(32)]
        known_z = like_x(33) if blend == "given" else None
        size = (batch, 2) if level > 1 else (2,)
        levels = data(size, torch.float32, 34) if level else None
        extras = (variance, bound, *(known or [None] * 2), known_z, levels, None, None)
    past = tuple(like_x(40 + h) for h in range(history)) + (None,) * (HISTORY - history)
    unused = [*without, *range(3 + history, 9)]
    z = like_x(50) if noise == "given" else None
    arguments = (
        outs, like_x(1), given, weights, table(clip=clip, without=unused), index, 2, past, z, seed,
        rows, 9, offset, noise == "drawn", extras,
    )  # fmt: skip
    return outs, arguments


@pytest.mark.parametrize("name", STEPS)
def test_step(cuda, name):
    shape, dtype, layout, options = STEPS[name]
    outs, arguments = step_arguments(shape, dtype, layout, **options)
    exact(both(cuda, "diffusion_step", outs, *arguments))


def test_step_in_place(cuda):
    """Outputs on top of the sample and of a history entry: a thread has read before it writes."""
    _, arguments = step_arguments((2, 3, 50), torch.float32, "dense")
    results = []
    for call in (cuda.module.diffusion_step, _C.diffusion_step):
        x, m, past = arguments[1].clone(), arguments[2][0].clone(), arguments[7]
        past = (past[0].clone(), *past[1:])
        outs = (x, past[0], m)
        assert call(outs, x, (m,), *arguments[3:7], past, *arguments[8:])
        results.append(outs)
    exact(zip(*results, strict=True))


def test_step_counter(cuda):
    """A counter on the device chooses the row; past the end it stays at the last row."""
    outs, arguments = step_arguments((2, 3, 50), torch.float32, "dense", outputs=1)
    for counter, row in ((3, 3), (77, 4), (-5, 0)):
        asked = (*arguments[:5], torch.tensor(counter), 0, *arguments[7:])
        found = cuda.call("diffusion_step", outs, *asked)[0]
        assert _C.diffusion_step(*arguments[:6], row, *arguments[7:])
        assert same_bits(found, outs[0])


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("given", [False, True])
def test_log_prob(cuda, given, parts):
    for shape, dtype, index in (((3, 1030), torch.float32, None), ((2, 4, 70), torch.bfloat16, 1)):
        rows = None if index is None else [1, 3]
        outs, arguments = step_arguments(shape, dtype, "dense", outputs=1, index=rows)
        log_prob = torch.empty(shape[0])
        sample = data(shape, dtype, 60) if given else None
        extras = (0, None, None, None, None, None, sample, log_prob)
        room = scratch(shape[0], parts) if parts > 1 else None
        exact(both(cuda, "diffusion_step", [*outs, log_prob], *arguments[:-1], extras, room))


BACKWARD = {
    # name: shape, dtype, layout, models, weights, index, threshold, mask, absent gradients
    "plain": ((3, 4, 37), torch.float32, "dense", 1, None, None, 0, False, ()),
    "guided": ((2, 40), torch.bfloat16, "dense", 3, "each", [4, 1], 2, True, (1,)),
    "strided": ((2, 3, 21), torch.float16, "transposed", 2, [0.0, 2.0], None, 1, False, (0,)),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_step_backward(cuda, name):
    shape, dtype, layout, models, weights, index, threshold, mask, absent = BACKWARD[name]
    _, a = step_arguments(
        shape, dtype, layout, models=models, weights=weights, index=index, threshold=threshold
    )
    grads = tuple(None if o in absent else data(shape, dtype, 70 + o, layout) for o in range(3))
    blend = data(shape, dtype, 80, layout).abs().clamp(max=1) if mask else None
    d_x, d_z = torch.empty_like(a[1]), torch.empty_like(a[1])
    d_models = tuple(torch.empty_like(a[1]) for _ in range(models))
    d_history = (torch.empty_like(a[1]), None, torch.empty_like(a[1]))
    outputs = [d_x, d_z, *d_models, d_history[0], d_history[2]]
    bound = a[14] and a[14][1]
    exact(
        both(
            cuda,
            "diffusion_step_backward",
            outputs,
            grads,
            *a[1:7],
            bound,
            blend,
            d_x,
            d_models,
            d_history,
            d_z,
        )  # fmt: skip
    )


MIXES = [
    # shape, dtype, layout, seeds, offset, draws, coefficients
    ((1027,), torch.float32, "misaligned", "int", 3, True, "numbers"),
    ((3, 4, 33), torch.bfloat16, "dense", "rows", 5, True, "samples"),
    ((3, 4, 33), torch.float16, "transposed", "int", 0, True, "tokens"),
    ((2, 700), torch.float32, "dense", "one", 0, False, "flow"),
    ((2, 9), torch.float32, "sliced", "int", 0, None, "numbers"),
    ((2, 0), torch.float32, "dense", "int", 0, True, "numbers"),
]


@pytest.mark.parametrize("shape, dtype, layout, seeds, offset, draws, kind", MIXES, ids=str)
def test_mix(cuda, shape, dtype, layout, seeds, offset, draws, kind):
    p = data(shape, dtype, 1, layout)
    q = data(shape, dtype, 2, layout) if draws is False else None
    out = torch.empty_like(p)
    seed, rows = seeds_of(seeds, shape)
    a, b = {
        "numbers": (0.3, 0.1 + 2**-40),
        "samples": tuple(data(shape[:1], torch.float64, i) for i in (3, 4)),
        "tokens": tuple(data(shape[:2], torch.float32, i) for i in (3, 4)),
        "flow": (None, data(shape[:1], torch.float32, 3).abs()),
    }[kind]
    noise = (seed, rows, 2, offset, draws is True)
    sign = 1.0 if kind == "numbers" else -1.0
    exact(both(cuda, "diffusion_mix", [0], out, p, q, *noise, a, b, sign, 1.0, kind == "flow"))


@pytest.mark.parametrize("method", range(6))
@pytest.mark.parametrize("parts", [1, 4])
def test_guidance(cuda, method, parts):
    options = {RESCALE: (0.7, 0.0), APG: (0.3, 5.0), MAG: (8.0, 0.0)}.get(method, (0.0, 0.0))
    for shape, dtype, layout in (((3, 1030), FLOATS[0], "dense"), ((2, 3, 9), FLOATS[2], "sliced")):
        cond, uncond = (data(shape, dtype, i, layout) for i in (1, 2))
        averages = [None, data(shape, dtype, 3, layout)] if method == APG else [None]
        for average in averages:
            width = 2 if average is None else 3
            weights = torch.empty(shape[0], width)
            scale = (
                data((shape[0],), torch.float32, 4) if layout == "dense" else torch.tensor([5.0])
            )
            room = scratch(shape[0], parts, 5) if parts > 1 else None
            exact(
                both(
                    cuda,
                    "guidance_weights",
                    [4],
                    cond,
                    uncond,
                    average,
                    scale,
                    weights,
                    method,
                    layout == "sliced",
                    *options,
                    room,
                )  # fmt: skip
            )


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.995, 1.0])
def test_threshold(cuda, ratio):
    for shape, dtype in (((3, 1), FLOATS[0]), ((2, 5003), FLOATS[0]), ((2, 3, 40), FLOATS[1])):
        x, m = data(shape, dtype, 1) * 2, data(shape, dtype, 2)
        s = torch.empty(shape[0])
        exact(both(cuda, "dynamic_threshold", [2], x, None, s, None, None, 0, ratio, 9.0))
        index = torch.arange(shape[0]) + 1
        exact(both(cuda, "dynamic_threshold", [2], x, m, s, table(), index, 0, ratio, 2.0))
    x[0, 1, 2], x[1, 0, 0] = torch.nan, torch.inf
    exact(both(cuda, "dynamic_threshold", [2], x, None, s, None, None, 0, ratio, 9.0))


ROOM = 2064  # numbers per sample that blocks share
VALUES = {
    "normal": lambda x: x,
    "ties": lambda x: (x * 2).round(),
    # the key after the wanted one: in another digit of any rank, or an infinity
    "apart": lambda x: torch.where(x < 0.7, 1.0, 1.0 + 2.0 ** (x * 8 - 12)),
    "two": lambda x: torch.where(x < 0, 1.5, 3e38),
    "infinite": lambda x: torch.where(x < 1, x, torch.inf),
    "subnormal": lambda x: x * 1e-39,
    "nan": lambda x: torch.where(x == x.amax(), -torch.nan, x),
}


@pytest.mark.parametrize("values", VALUES)
def test_threshold_of_many_blocks(cuda, values):
    """Blocks of 4096 elements that share a sample find the bits of the block that owns it."""
    cases = (
        ((2, 9001), FLOATS[0], "misaligned"),
        ((1, 3, 57, 80), FLOATS[0], "dense"),
        ((2, 3, 1500), FLOATS[1], "sliced"),
        ((3, 8192), FLOATS[2], "dense"),
    )
    for (shape, dtype, layout), ratio in zip(cases, (0.9, 0.5, 0.995, 1.0), strict=True):
        x = VALUES[values](data(shape, torch.float32, 5)).to(dtype)
        x, m = laid_out(x, layout), data(shape, dtype, 6, layout)
        s, room = torch.empty(shape[0]), scratch(shape[0], ROOM)
        index = torch.arange(shape[0]) + 1
        n = x[0].numel()
        for r in (ratio, 0.0, (n // 2) / (n - 1)):
            alone = both(cuda, "dynamic_threshold", [2], x, None, s, None, None, 0, r, 1e39)
            exact(alone)
            shared = both(cuda, "dynamic_threshold", [2], x, None, s, None, None, 0, r, 1e39, room)
            exact(shared)
            assert same_bits(alone[0][0], shared[0][0])
        exact(both(cuda, "dynamic_threshold", [2], x, m, s, table(), index, 0, ratio, 1e39, room))


@pytest.mark.parametrize("batch, n", [(1, 1), (4, 2), (3, 4096), (257, 4097)])
def test_threshold_shares_of_any_size(cuda, batch, n):
    """One part, a last part of one element; with 257 samples at most four parts."""
    x, s = data((batch, n), torch.float32, 8) * 3, torch.empty(batch)
    room = scratch(batch, ROOM)
    exact(both(cuda, "dynamic_threshold", [2], x, None, s, None, None, 0, 0.98, 9.0, room))


def test_threshold_room(cuda):
    """What Python allocates, and what the entry point refuses."""
    from genfast.ops._scratch import ROOM as rooms

    x, s = torch.ones(2, 8192), torch.empty(2)
    assert rooms["dynamic_threshold"](x, None, s).numel() == 2 * ROOM
    assert rooms["dynamic_threshold"](x[:, :-1], None, s) is None
    assert rooms["dynamic_threshold"](x[:1].expand(513, 8192), None, s) is None
    short = scratch(2, ROOM)[:-1]
    assert not cuda.module.dynamic_threshold(x, None, s, None, None, 0, 0.5, 2.0, short)


LOSSES = [
    # shape, dtype, layout, seeds, prediction, weighting, given noise, flow
    ((3, 1030), torch.float32, "dense", "rows", EPSILON, 0, False, False),
    ((2, 3, 40), torch.bfloat16, "dense", "int", V, 1, False, False),
    ((2, 77), torch.float16, "sliced", "one", SAMPLE, 2, False, False),
    ((4, 16), torch.float32, "misaligned", "int", FLOW, 5, True, True),
    ((3, 2100), torch.float32, "dense", "int", EPSILON, 7, True, False),
]


@pytest.mark.parametrize(
    "shape, dtype, layout, seeds, prediction, weighting, given, flow", LOSSES, ids=str
)
def test_loss(cuda, shape, dtype, layout, seeds, prediction, weighting, given, flow):
    output, x0 = (data(shape, dtype, i, layout) for i in (1, 2))
    z = data(shape, dtype, 3, layout) if given else None
    seed, rows = seeds_of(seeds, shape)
    sigma = torch.linspace(0.2, 0.9, shape[0], dtype=torch.float64)
    alpha = None if flow else (1 - sigma**2).sqrt()
    weight = torch.linspace(0.5, 2, shape[0]) if weighting == 7 else None
    head = (output, x0, z, seed, rows, 4, 1, alpha, sigma, weight, prediction, weighting, 5.0, 1.0)
    each, total, d = torch.empty(shape[0]), torch.empty(()), torch.empty_like(output)
    room = torch.full((shape[0] * 3,), torch.nan, dtype=torch.float64)
    for parts, both_at_once in ((1, False), (3, True)):
        some = room[: shape[0] * parts]
        outputs = [each, total, d] if both_at_once else [each, total]
        tail = (None, d if both_at_once else None, some)
        exact(both(cuda, "denoising_loss", outputs, *head, each, total, 0.25, *tail))
    for grad in (torch.tensor([1.7]), torch.linspace(-1, 1, shape[0])):
        exact(both(cuda, "denoising_loss", [d], *head, None, None, 0.25, grad, d))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("seed", [None, 5])
def test_a_whole_step_in_one_call(cuda, seed, dtype):
    """`step_row`, which the solver plans and the drop-in schedulers call, on a GPU's tensors."""
    plan = schedulers.dpm_solver_plan(20)
    x, m, h = (data((2, 3, 5, 7), dtype, salt) for salt in (1, 2, 3))
    call = (plan.table_on("cpu"), 7, 2, x, m, (h,), None, seed, 3, None, 0)
    before = cuda.count("launches")
    got, want = cuda.module.step_row(*call), _C.step_row(*call)
    assert cuda.count("launches") == before + 1
    exact(zip(got, want, strict=True))
