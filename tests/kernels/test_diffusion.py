"""diffusion on Triton. Everything elementwise has the bits of the CPU kernels (which are judged
against the reference in fp64 elsewhere); sums are judged against fp64."""

import itertools
import math

import pytest
import torch
from draws import draw

import genfast
from genfast import _C
from genfast.ops._backend import backend

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
X, M, X0, Z = 0, 1, 2, 9


@pytest.fixture
def kernels(device):
    from genfast.kernels import diffusion

    return diffusion


def table_of(rows=4, clip=0.7, unused=(), seed=3):
    t = draw(rows, 36, seed=seed) * 0.5
    t[:, 2] = clip
    for s in unused:
        t[:, 6:].view(rows, 3, 10)[..., s] = 0
    return t


def same(got, want, interpreted=False):
    got = got.cpu()
    if interpreted and got.dtype == BF16:  # the interpreter truncates where hardware rounds
        torch.testing.assert_close(got, want, rtol=2.0**-7, atol=1e-6)
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.signbit(), want.signbit()) or got.isnan().any()


def moved(args, device):
    """The same arguments on the device; the tensors' strides are kept."""
    if isinstance(args, torch.Tensor):
        if device.type == "cpu" or args.is_contiguous():
            return args.to(device)
        memory = args.new_empty(0).set_(args.untyped_storage()).to(device)
        return memory.as_strided(args.shape, args.stride(), args.storage_offset())
    return tuple(moved(a, device) for a in args) if isinstance(args, tuple) else args


def both(name, kernels, device, outs, args):
    """Runs the Triton kernel and the CPU's on outputs full of NaN; returns both outputs."""
    mine = tuple(None if o is None else moved(torch.full_like(o, math.nan), device) for o in outs)
    theirs = tuple(None if o is None else torch.full_like(o, math.nan) for o in outs)
    assert getattr(kernels, name)(*args(mine, lambda t: moved(t, device)))
    assert getattr(_C, name)(*args(theirs, lambda t: t))
    return mine, theirs


# ---- the step ------------------------------------------------------------------------------------

# shape, dtype, outputs, what else; the word says what the case is there for
TWO = {"models": 2, "weights": 2}
STEPS = {
    "plain": ((3, 40), F32, 1, {"unused": (X0, Z)}),
    "scalar": ((), F32, 2, {"z": True}),
    "everything-odd": ((2, 3, 7), F32, 3, {"z": True, "history": range(6), "row": 2}),
    "two-tiles": ((1, 1030), F32, 3, {"history": (0, 4), "draws": True, "offset": 3}),
    "no-clamp": ((2, 9), F32, 1, {"clip": math.inf, "draws": True}),
    "seeds": ((3, 2, 37), F32, 2, {"draws": True, "seeds": True, "offset": 2**34 + 1}),
    "per-sample": ((4, 5, 3), F32, 3, {"index": (4,), "z": True, "history": (1,)}),
    "per-token": ((2, 3, 5), F32, 1, {"index": (2, 3), "draws": True}),
    "counter": ((2, 33), F32, 1, {"index": (), "draws": True}),
    "guided": ((3, 10), F32, 1, TWO),
    "guided-3": ((3, 10), F32, 2, {"models": 3, "weights": (3, 3)}),
    "dynamic": ((3, 11), F32, 3, {"threshold": 3}),
    "dynamic-one": ((3, 11), F32, 1, {"threshold": 1, "clip": math.inf}),
    "learned-range": ((2, 3, 2, 5), F32, 1, {"draws": True, "variance": 1, **TWO}),
    "learned": ((2, 3, 10), F32, 2, {"z": True, "variance": 2}),
    "inpaint": ((2, 3, 9), F32, 2, {"draws": True, "blend": "drawn"}),
    "inpaint-given": ((2, 3, 9), F32, 1, {"z": True, "blend": "given"}),
    "inpaint-clean": ((2, 3, 9), F32, 1, {"blend": "clean"}),
    "half": ((3, 50), F16, 3, {"draws": True, "history": (2,)}),
    "bfloat": ((3, 50), BF16, 1, {"z": True, **TWO}),
    "mixed": ((2, 16), F32, 1, {"z": True, "m_dtype": F16}),
    "only-noise": ((2, 9), F32, 1, {"unused": range(9), "draws": True}),
    "no-terms": ((2, 9), F32, 3, {"unused": range(10)}),
}  # fmt: skip


def step_args(shape, dtype, outputs, o):
    batch = shape[0] if shape else 1
    models = o.get("models", 1)
    wide = list(shape)
    if o.get("variance"):
        wide[1] *= 2
    x, z = draw(*shape, seed=1, dtype=dtype), None
    ms = tuple(draw(*wide, seed=2 + j, dtype=o.get("m_dtype", dtype)) for j in range(models))
    history = tuple(
        draw(*shape, seed=20 + k, dtype=dtype) if k in o.get("history", ()) else None
        for k in range(6)
    )
    missing = [3 + k for k in range(6) if k not in o.get("history", ())]
    if o.get("z"):
        z = draw(*shape, seed=7, dtype=dtype)
    elif not o.get("draws"):
        missing.append(Z)
    table = table_of(clip=o.get("clip", 0.7), unused=[*missing, *o.get("unused", ())])
    index = None
    if "index" in o:
        index = torch.arange(math.prod(o["index"])).reshape(o["index"]) * 3 % 4
    weights = None
    if o.get("weights"):
        n = o["weights"]
        weights = draw(*((n,) if isinstance(n, int) else n), seed=8)
        weights.view(-1)[0] = 0.0
    threshold = draw(o["threshold"], seed=9).abs() + 0.3 if o.get("threshold") else None
    mask = known = known_z = level = None
    if o.get("blend"):
        mask = (draw(batch, 1, shape[-1], seed=10) > 0).float().expand(shape)
        known = draw(*shape, seed=11)
        if o["blend"] != "clean":
            level = draw(batch, 2, seed=12)
            level[0, 1] = 0.0
        known_z = draw(*shape, seed=13) if o["blend"] == "given" else None
    seeds = torch.arange(batch) * 5 if o.get("seeds") else None
    draws, row = o.get("draws", False), o.get("row", 1)
    tensors = (threshold, mask, known, known_z, level, None, None)

    def args(outs, to):
        return (
            outs, to(x), to(ms), to(weights), to(table), to(index), row, to(history), to(z), 11,
            to(seeds), 3, o.get("offset", 0), draws, (o.get("variance", 0), *to(tensors)),
        )  # fmt: skip

    return x, args


@pytest.mark.parametrize("case", STEPS)
def test_step(kernels, device, interpreted, case):
    shape, dtype, outputs, o = STEPS[case]
    x, args = step_args(shape, dtype, outputs, o)
    mine, theirs = both("diffusion_step", kernels, device, (x,) * outputs, args)
    for a, b in zip(mine, theirs, strict=True):
        same(a, b, interpreted)


@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 1030)], ids=str)
def test_in_place(kernels, device, shape):
    """x, a history slot and z are overwritten by the three outputs."""
    table = table_of(unused=(4, 5, 6, 7, 8))

    def run(function, place):
        x, m, h, z = (draw(*shape, seed=s).to(place) for s in range(4))
        tensors = (x, (m,), None, table.to(place), None, 0, (h,), z)
        assert function((x, h, z), *tensors, 0, None, 0, 0, False, None)
        return x, h, z

    ours, want = run(kernels.diffusion_step, device), run(_C.diffusion_step, "cpu")
    for a, b in zip(ours, want, strict=True):
        same(a, b)


def test_what_has_no_coefficient_is_not_read(kernels, device):
    table = table_of(1, unused=(X0, 3, Z)).to(device)
    table[0, 6 + M] = 0.0
    x, nan = draw(2, 9).to(device), torch.full((2, 9), math.nan, device=device)
    out = torch.empty(2, 9, device=device)
    args = ((nan,), None, table, None, 0, (nan,), nan, 0, None, 0, 0, False, None)
    assert kernels.diffusion_step((out,), x, *args)
    same(out, x.cpu() * table[0, 6].item())


def test_layouts(kernels, device):
    """Strides never matter, and nothing is written outside the output's view."""
    table = table_of(unused=range(3, 9)).to(device)
    x, m = draw(2, 3, 5, 4).to(device), draw(2, 3, 5, 4, seed=1).to(device)
    want = torch.empty_like(x)
    rest = (None, table, None, 0, None, None, 5, None, 1, 0, True, None)
    assert kernels.diffusion_step((want,), x, (m,), *rest)
    memory = torch.full((2, 3, 5, 8), 7.0, device=device)
    out = memory[..., ::2]
    channels_last = x.to(memory_format=torch.channels_last)
    assert kernels.diffusion_step((out,), channels_last, (m.mT.contiguous().mT,), *rest)
    same(out, want.cpu())
    assert (memory[..., 1::2] == 7.0).all()


GRADS = {
    "x": (F32, (0,), {}),
    "all": (F32, (0, 1, 2), {"index": True}),
    "guided": (F32, (0, 2), {"weights": (3, 2)}),
    "dynamic": (F32, (0,), {"threshold": True}),
    "no-clamp": (F32, (1,), {"clip": math.inf}),
    "blend": (F32, (0, 1), {"mask": True}),
    "half": (F16, (0, 1), {}),
}


@pytest.mark.parametrize("case", GRADS)
def test_step_backward(kernels, device, case):
    dtype, wanted, o = GRADS[case]
    shape, n = (3, 5, 7), 2 if "weights" in o else 1
    grads = tuple(draw(*shape, seed=i, dtype=dtype) if i in wanted else None for i in range(3))
    x, ms = draw(*shape, seed=5, dtype=dtype), tuple(draw(*shape, seed=6 + j, dtype=dtype) for j in range(n))  # noqa: E501  # fmt: skip
    weights = draw(*o["weights"], seed=9) if "weights" in o else None
    threshold = draw(3).abs() + 0.5 if o.get("threshold") else None
    mask = (draw(*shape, seed=10) > 0).float() if o.get("mask") else None
    index = torch.tensor([2, 0, 3]) if o.get("index") else None
    table = table_of(clip=o.get("clip", 0.7), unused=(4,))
    like = [x] * (1 + n) + [x] * 7

    def args(outs, to):
        d_x, d_m, d_h, d_z = outs[0], outs[1 : 1 + n], outs[1 + n : 7 + n], outs[-1]
        given = (to(grads), to(x), to(ms), to(weights), to(table), to(index), 1, to(threshold))
        return (*given, to(mask), d_x, d_m, d_h, d_z)

    mine, theirs = both("diffusion_step_backward", kernels, device, tuple(like), args)
    for a, b in zip(mine, theirs, strict=True):
        same(a, b)


@pytest.mark.parametrize("replay", [False, True])
def test_log_prob(kernels, device, replay):
    shape = (3, 5, 300)
    x, m, sample = draw(*shape), draw(*shape, seed=1), draw(*shape, seed=2) if replay else None
    table, index = table_of(unused=range(3, 9)), torch.tensor([1, 3, 0])
    seeds = torch.arange(3)

    def args(outs, to):
        extras = (0, None, None, None, None, None, to(sample), outs[1])
        noise = (5, to(seeds), 1, 0, not replay)
        given = (to(x), (to(m),), None, to(table), to(index), 0, None, None)
        return (outs[:1], *given, *noise, extras)

    mine, theirs = both("diffusion_step", kernels, device, (x, torch.empty(3)), args)
    same(mine[0], theirs[0])
    torch.testing.assert_close(mine[1].cpu(), theirs[1], rtol=1e-6, atol=1e-4)


# ---- the forward process -------------------------------------------------------------------------

MIXES = {  # shape, a, b, draws, q, signs, dtype
    "number": ((3, 40), 0.8, 0.6, False, True, (1, 1), F32),
    "drawn": ((1, 1030), 0.8, 0.6, True, False, (1, 1), F32),
    "flow": ((3, 7), None, 0.3, False, True, (1, 1), F32),
    "flow-samples": ((3, 7), None, (3,), True, False, (1, 1), F32),
    "velocity": ((3, 2, 7), (3,), (3,), False, True, (-1, 1), F32),
    "tokens": ((3, 4, 7), (3, 4), (3, 4), True, False, (1, 1), F16),
    "number-of-a-tensor": ((3, 4, 7), (), (3,), True, False, (1, 1), F32),
    "samples-and-number": ((3, 4, 7), (3,), (), False, True, (1, -1), F32),
    "scale": ((3, 7), (3,), None, False, False, (1, 1), F32),
    "fp64": ((3, 7), 0.1, (3,), True, False, (1, -1), F32),
    "bfloat": ((3, 7), 0.1, 0.9, False, True, (1, 1), BF16),
    "zeros": ((2, 5), 0.0, 0.0, True, False, (1, 1), F32),
}


@pytest.mark.parametrize("case", MIXES)
def test_mix(kernels, device, interpreted, case):
    shape, a, b, draws, given, signs, dtype = MIXES[case]
    wide = torch.float64 if case == "fp64" else F32
    a, b = (
        draw(*c, seed=4 + i).to(wide) if isinstance(c, tuple) else c for i, c in enumerate((a, b))
    )
    p, q = draw(*shape, dtype=dtype), draw(*shape, seed=1, dtype=dtype) if given else None
    seeds = torch.arange(shape[0]) if draws and shape[0] > 1 else None

    def args(outs, to):
        noise = (11, to(seeds), 2, 1, draws)
        return (outs[0], to(p), to(q), *noise, to(a), to(b), *signs, a is None)

    mine, theirs = both("diffusion_mix", kernels, device, (p,), args)
    same(mine[0], theirs[0], interpreted)


# ---- reductions ----------------------------------------------------------------------------------

OPTIONS = {"cfg": (0, 0), "rescale": (0.7, 0), "cfg_zero_star": (0, 0), "apg": (0.3, 4.0), "mag": (8.0, 0), "tcfg": (0, 0)}  # noqa: E501  # fmt: skip


@pytest.mark.parametrize("method", OPTIONS)
def test_guidance_weights(kernels, device, method):
    cond = draw(3, 2, 1100)
    uncond = cond + 0.05 * draw(3, 2, 1100, seed=1)
    for original, per_sample in ((False, True), (True, False)):
        scale = torch.tensor([2.0, 5.0, 7.5])[: 3 if per_sample else 1]
        averages = (False, True) if method == "apg" else (False,)
        for average in averages:
            third = uncond - cond if average else None
            out = torch.empty(3, 2 + average)

            def args(outs, to, third=third, scale=scale, original=original):
                tensors = (to(cond), to(uncond), to(third), to(scale), outs[0])
                return (*tensors, list(OPTIONS).index(method), original, *OPTIONS[method])

            mine, theirs = both("guidance_weights", kernels, device, (out,), args)
            torch.testing.assert_close(mine[0].cpu(), theirs[0], rtol=1e-6, atol=1e-6)


THRESHOLDS = {
    "short": (torch.randn(3, 7), 0.9),
    "long": (2.0 * draw(2, 3, 6000), 0.995),
    "equal": (torch.full((2, 40), 3.5), 0.5),
    "nan": (torch.tensor([[1.0, math.nan, 2.0], [3.0, 1.0, 2.0]]), 0.5),
    "infinite": (torch.tensor([[math.inf, math.inf, 2.0, 3.0]]), 0.7),
    "one": (torch.tensor([[4.0], [0.2]]), 0.3),
    "largest": (draw(2, 50) * 4, 1.0),
    "half": (draw(2, 50).half() * 4, 0.31),
}


@pytest.mark.parametrize("case", THRESHOLDS)
def test_dynamic_threshold(kernels, device, case):
    x, ratio = THRESHOLDS[case]
    m, table, index = draw(*x.shape, seed=1), table_of(), torch.arange(x.shape[0])
    for convert, i in ((False, None), (True, None), (True, index)):

        def args(outs, to, convert=convert, i=i):
            extra = (to(m), outs[0], to(table), to(i)) if convert else (None, outs[0], None, None)
            return (to(x), *extra, 2, ratio, 3.0)

        mine, theirs = both("dynamic_threshold", kernels, device, (torch.empty(x.shape[0]),), args)
        same(mine[0], theirs[0])


# ---- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction, weighting", list(itertools.product(range(4), (0, 1, 7))))
def test_loss(kernels, device, prediction, weighting):
    loss_case(kernels, device, prediction, weighting)


@pytest.mark.parametrize("weighting", [2, 3, 4, 5, 6])
def test_loss_weights(kernels, device, weighting):
    loss_case(kernels, device, 2, weighting)


def loss_case(kernels, device, prediction, weighting):
    shape = (3, 5, 230)
    output, x0 = draw(*shape), draw(*shape, seed=1)
    sigma = torch.tensor([0.3, 0.7, 0.9]).double()
    alpha = None if prediction == 3 else (1 - sigma**2).sqrt()
    weight = torch.tensor([0.5, 2.0, 1.5]) if weighting == 7 else None
    z = draw(*shape, seed=2) if weighting == 1 else None
    seeds, grad = torch.arange(3), torch.tensor([0.7])

    def args(outs, to):
        given = (to(output), to(x0), to(z), 3, to(seeds), 1, 5, to(alpha), to(sigma), to(weight))
        numbers = (prediction, weighting, 5.0, 1.5)
        return (*given, *numbers, *outs[:2], 1 / 3, to(grad), outs[2])

    likes = (torch.empty(3), torch.empty(()), output)
    mine, theirs = both("denoising_loss", kernels, device, likes, args)
    torch.testing.assert_close(mine[0].cpu(), theirs[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mine[1].cpu(), theirs[1], rtol=1e-6, atol=1e-7)
    if weighting == 2:  # a power in fp64: the scale may round the other way
        torch.testing.assert_close(mine[2].cpu(), theirs[2], rtol=2.0**-22, atol=0)
    else:
        same(mine[2], theirs[2])


# ---- the public functions ------------------------------------------------------------------------


def test_refusals(kernels, device):
    x, table = draw(2, 3).to(device), table_of().to(device)
    out = torch.empty_like(x)
    rest = (0, None, None, 0, None, 0, 0, False, None)
    good = ((x,), None, table, None)
    assert not kernels.diffusion_step((out.double(),), x, *good, *rest)
    assert not kernels.diffusion_step((out,), x, (x, x), None, table, None, *rest)
    assert not kernels.diffusion_step((out,), x, (x,), None, table, None, 4, *rest[1:])
    assert not kernels.diffusion_step((out, out), x, *good, *rest)
    shifted = torch.empty(10, device=device)
    first, second = shifted[:6].view(2, 3), shifted[2:8].view(2, 3)
    assert not kernels.diffusion_step((first,), second, *good, *rest)
    assert not kernels.diffusion_mix(out, x[:1], None, 0, None, 0, 0, False, 1.0, None, 1, 1, False)
    assert kernels.diffusion_step((out[:0],), x[:0], (x[:0],), None, table, None, *rest)
    assert kernels.diffusion_step((out[:0], out[:0]), x[:0], (x[:0],), None, table, None, *rest)


def test_public_functions_reach_the_kernels(device, monkeypatch):
    """Each function under the forced backend, with gradients, against the reference."""
    x, m = draw(3, 2, 10).to(device), draw(3, 2, 10, seed=1).to(device)
    table = table_of(unused=range(3, 9)).to(device)
    sigma = torch.tensor([0.3, 0.5, 0.8], device=device)
    alpha = (1 - sigma**2).sqrt()

    def run():
        a, b = x.clone().requires_grad_(), m.clone().requires_grad_()
        y = genfast.diffusion_step(a, (b, a), table, 2, seed=5, weights=3.0)
        y = (
            y
            + genfast.add_noise(a, alpha, sigma, seed=4)
            + genfast.velocity(b, alpha, sigma, seed=4)
        )
        loss = genfast.denoising_loss(b, x, alpha, sigma, seed=4, weighting="min_snr")
        (y * m).sum().add(loss).backward()
        s = genfast.dynamic_threshold(x, 0.9, 2.0)
        bounded = genfast.diffusion_step(x, m, table, torch.tensor(1, device=device), seed=1,
                                         threshold=s)  # fmt: skip
        guided = genfast.guide(x, m, 4.0, method="apg")
        sample, log_prob = genfast.step_log_prob(x, m, table, 1, seed=3)
        return y, loss, a.grad, b.grad, s, bounded, guided, sample, log_prob

    from genfast.kernels import diffusion

    launched = set()
    names = ("step", "forward", "loss", "reduce")
    for module in (getattr(diffusion, n) for n in names):
        real = module.launch
        monkeypatch.setattr(
            module, "launch", lambda k, *a, real=real, **o: (launched.add(k), real(k, *a, **o))
        )
    with backend("triton"):
        ours = run()
    assert len(launched) == 10
    with backend("reference"):
        want = run()
    for u, v in zip(ours, want, strict=True):
        torch.testing.assert_close(u, v, rtol=1e-5, atol=1e-5)
