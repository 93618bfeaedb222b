"""filtering on Triton. bias_act has the bits of the CPU kernels where its activation is made of
IEEE operations; the GELUs and all that fuses are judged against fp64, sums by their own order."""

import math

import pytest
import torch

import genfast
from genfast import _C
from genfast.ops._backend import backend
from genfast.reference import filtering as reference
from genfast.reference.filtering import ACTIVATIONS

NAMES = list(ACTIVATIONS)
HALF, BF16 = torch.float16, torch.bfloat16
NONE, SEED, ROWS, WHOLE, INNER = "none", "one seed", "a seed per row", "given", "given for a plane"


@pytest.fixture
def kernels(device):
    from genfast.kernels import filtering

    return filtering


def randn(*shape, seed=1, dtype=torch.float32, inner=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if inner else x


def blank(x):
    return torch.full_like(x, math.nan)


def call(module, name, device, *args):
    """The entry point with copies of the tensors on `device`; the copies."""
    args = [a.detach().clone().to(device) if isinstance(a, torch.Tensor) else a for a in args]
    assert getattr(module, name)(*args)
    return [a.cpu() if isinstance(a, torch.Tensor) else a for a in args]


def same(got, want, loose=False):
    """Bit for bit, but for bfloat16 in the interpreter, which truncates where hardware rounds."""
    rtol = 2.0**-7 if loose and got.dtype == BF16 else 0
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-6 if rtol else 0, equal_nan=True)


def close(got, native, exact):
    """At most twice as far from fp64 as the CPU kernel, or 2 ulp of the largest."""
    off = (native.double() - exact).abs().max().item()
    allowed = 2 * off + 2 * torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert (got.double() - exact).abs().max().item() <= allowed


def noise_of(kind, shape, dim, dtype=torch.float32):
    """noise, strength, seeds, draws."""
    one = [1 if i == dim else n for i, n in enumerate(shape)]
    given = {WHOLE: one, INNER: shape[dim + 1 :]}.get(kind)
    seeds = torch.arange(one[0]) * 3 - 1 if kind == ROWS else None
    noise = None if given is None else randn(*given, seed=4, dtype=dtype)
    return noise, None if kind == NONE else torch.tensor(0.3), seeds, kind in (SEED, ROWS)


def both_ways(kernels, device, x, b, noise, act, offset, dim, clamp, exact=True, wants=(1, 1)):
    """bias_act and its backward against the CPU kernels; returns ours and theirs."""
    (noise, strength, seeds, draws), found = noise, ACTIVATIONS[NAMES[act]]
    rest = (noise, strength, seeds, 2**63 + 5, 2**40 + 3, offset, draws, dim, act, found.alpha,
            found.gain, clamp)  # fmt: skip
    args = (blank(x), x, b, *rest)
    ours, native = call(kernels, "bias_act", device, *args), call(_C, "bias_act", "cpu", *args)
    loose = device.type == "cpu"
    if exact:
        same(ours[0], native[0], loose)
    grad, db, ds = randn(*x.shape, seed=3), torch.full(x.shape[dim : dim + 1], math.nan), None
    grad = torch.empty_like(x).copy_(grad)
    if strength is not None and wants[1]:
        ds = torch.tensor(math.nan)
    for from_y in (False, True) if found.by_sign else (False,):
        source = native[0] if from_y else x
        args = (grad, blank(x), db if wants[0] else None, ds, source, from_y, b, *rest)
        ours_b, native_b = (
            call(kernels, "bias_act_backward", device, *args),
            call(_C, "bias_act_backward", "cpu", *args),
        )
        if exact:
            same(ours_b[1], native_b[1], loose)
        for total, want in zip(ours_b[2:4], native_b[2:4], strict=True):
            if want is not None:
                torch.testing.assert_close(total, want, rtol=2e-6, atol=1e-5, equal_nan=True)
    return (ours[0], ours_b[1]), (native[0], native_b[1])


@pytest.mark.parametrize("act", range(len(NAMES)), ids=NAMES)
def test_activations(kernels, device, act):
    """Each once in either memory order, with and without a clamp."""
    shape, clamp = (2, 5, 7, 9), -1.0 if act % 2 else 0.7
    x, b, exact = 3 * randn(*shape, inner=act % 3 == 0), randn(5, seed=2), act < NAMES.index("gelu")
    if exact:
        x[0, 0, 0, :5] = torch.tensor([0.0, -0.0, math.nan, 200.0, -200.0])
    noise = noise_of(NONE, shape, 1)
    ours, native = both_ways(kernels, device, x, b, noise, act, 0, 1, clamp, exact)
    if not exact:
        leaf = x.double().requires_grad_()
        y = reference.bias_act(leaf, b.double(), act=NAMES[act], alpha=0.0, gain=1.0,
                               clamp=None if clamp < 0 else clamp)  # fmt: skip
        (dx,) = torch.autograd.grad(y, leaf, randn(*shape, seed=3).double())
        close(ours[0], native[0], y.detach())
        close(ours[1], native[1], dx)


# shape, dim, channels last, noise, offset, dtypes of x and of b (None: no b) and the noise
PLACES = {
    "aligned": ((2, 3, 8, 8), 1, False, SEED, 4, torch.float32, BF16),
    "shifted": ((2, 3, 5, 7), 1, False, SEED, 3, HALF, torch.float32),
    "seeds": ((3, 2, 5, 7), 1, False, ROWS, 1, BF16, HALF),
    "second tile": ((1, 2, 1030), 1, False, SEED, 2**34 + 1, torch.float32, None),
    "middle": ((2, 3, 4, 5), 2, False, ROWS, 2, torch.float32, None),
    "first": ((4, 30), 0, False, SEED, 0, torch.float32, torch.float32),
    "last": ((3, 4, 20), 2, False, ROWS, 5, BF16, torch.float32),
    "channels last": ((2, 24, 5, 3), 1, True, ROWS, 1, HALF, HALF),
    "many channels": ((1, 70, 3, 7), 1, True, SEED, 0, torch.float32, torch.float32),
    "one channel": ((5, 1), 1, False, ROWS, 0, torch.float32, torch.float32),
    "given": ((2, 3, 8, 8), 1, False, WHOLE, 0, HALF, BF16),
    "given, last": ((3, 4, 20), 2, False, WHOLE, 0, torch.float32, HALF),
    "a plane": ((2, 3, 5, 7), 1, False, INNER, 0, torch.float32, torch.float32),
    "a plane, last": ((2, 3, 5, 7), 1, True, INNER, 0, BF16, torch.float32),
    "a plane, one channel": ((2, 1, 3, 3), 1, False, INNER, 0, torch.float32, None),
    "none": ((2, 3, 33), 1, False, NONE, 0, HALF, None),
    "vector": ((7,), 0, False, NONE, 0, torch.float32, torch.float32),
    "no samples": ((0, 3, 4), 1, False, SEED, 0, torch.float32, torch.float32),
    "no channels": ((2, 0, 4), 1, False, SEED, 0, torch.float32, torch.float32),
}


@pytest.mark.parametrize("case", PLACES)
def test_places(kernels, device, case, monkeypatch):
    shape, dim, inner, kind, offset, dtype, of_b = PLACES[case]
    if case in ("many channels", "second tile"):  # a program takes all of them: the loop
        monkeypatch.setitem(kernels.bias_act.__globals__, "_PROGRAMS", 1)
    x = randn(*shape, dtype=dtype, inner=inner)
    b = None if of_b is None else randn(shape[dim], seed=2, dtype=of_b)
    noise = noise_of(kind, shape, dim, of_b or torch.float32)
    both_ways(kernels, device, x, b, noise, 2, offset, dim, 1.5)


@pytest.mark.parametrize("wants", [(0, 0), (1, 0), (0, 1)], ids=str)
@pytest.mark.parametrize("inner", [False, True])
def test_sums_that_are_wanted(kernels, device, inner, wants):
    x, b = randn(2, 3, 5, 7, inner=inner), randn(3, seed=2)
    noise = noise_of(WHOLE, x.shape, 1)
    for act in (0, 1, 2, 8):
        both_ways(kernels, device, x, b, noise, act, 0, 1, -1.0, wants=wants)


def test_bias_act_refuses_what_it_cannot_do(kernels, device):
    with device:
        x, b, s, inf = torch.zeros(2, 3, 4, 5), torch.zeros(3), torch.ones(1), math.inf
        last, odd = x.contiguous(memory_format=torch.channels_last), torch.zeros(6)[::2]
        drawn, few = {"strength": s, "draws": True}, torch.arange(4)[:3]
        wrong = [
            {"x": x.double()}, {"y": x.long()}, {"y": torch.zeros(2, 3, 5, 4)}, {"dim": 4},
            {"y": last}, {"x": x.mT, "y": x.mT}, {"b": torch.zeros(4)}, {"b": b.double()},
            {"b": odd}, {"act": 11}, {"act": -1}, {"gain": inf}, {"clamp": math.nan},
            {"draws": True}, {"noise": x[:, :1]}, {"strength": s, "noise": x},
            {"strength": s, "noise": torch.zeros(5, 4).mT}, {"strength": s.double(), "draws": True},
            {"strength": torch.ones(2), "draws": True}, drawn | {"seeds": few},
            drawn | {"seeds": few[:2].int()}, drawn | {"seeds": few[::2]},
        ]  # fmt: skip
        wrong_back = [
            {"grad": x.double()}, {"dz": x.mT}, {"source": x[:1]}, {"db": torch.zeros(4)},
            {"db": b.half()}, {"db": odd}, {"d_strength": s}, {"dim": 3},
            {"d_strength": torch.ones(2), **drawn}, {"d_strength": s.double(), **drawn},
        ]  # fmt: skip
    ends = {"b": b, "noise": None, "strength": None, "seeds": None, "seed": 1, "stream": 0,
            "offset": 0, "draws": False, "dim": 1, "act": 2, "alpha": 0.2, "gain": 1.0,
            "clamp": -1.0}  # fmt: skip
    forward = {"y": x, "x": x} | ends
    backward = {"grad": x, "dz": x, "db": b.clone(), "d_strength": None, "source": x,
                "from_y": True} | ends  # fmt: skip

    def runs(name, given, changed):
        args = list((given | changed).values())
        done = getattr(kernels, name)(*args)
        if device.type == "cpu":
            assert done == getattr(_C, name)(*args), changed
        return done

    for changed in ({}, drawn):
        assert runs("bias_act", forward, changed)
        assert runs("bias_act_backward", backward, changed)
    for changed in wrong:
        assert not runs("bias_act", forward, changed), changed
    for changed in wrong_back:
        assert not runs("bias_act_backward", backward, changed), changed
    assert not kernels.bias_act(*(forward | drawn | {"offset": -1}).values())


# ---- gates ---------------------------------------------------------------------------------------

# Rows of a tile and more, aligned and not, several in a program; nothing.
GATES = {
    "rows": (5, 2 * 16), "odd": (2, 3, 2 * 33), "long": (2, 2 * 1031), "aligned": (2, 2 * 1032),
    "no rows": (0, 8), "no channels": (3, 0),
}  # fmt: skip


def gate(kernels, device, x, act):
    y, grad = blank(x[..., : x.shape[-1] // 2]), randn(*x.shape[:-1], x.shape[-1] // 2, seed=3)
    y, grad, leaf = y.contiguous(), grad.to(x.dtype), x.double().requires_grad_()
    value = ACTIVATIONS[NAMES[act]].value
    want = value(leaf[..., : y.shape[-1]], 0.0) * leaf[..., y.shape[-1] :]
    (dx,) = torch.autograd.grad(want, leaf, grad.double())
    for name, args, at, exact in (
        ("gated_act", (y, x, act), 0, want.detach()),
        ("gated_act_backward", (grad, blank(x), x, act), 1, dx),
    ):
        ours, native = (call(m, name, d, *args)[at] for m, d in ((kernels, device), (_C, "cpu")))
        if x.numel():
            close(ours, native, exact)


@pytest.mark.parametrize("case", GATES)
def test_gated_act(kernels, device, case):
    for dtype in (torch.float32, HALF):
        gate(kernels, device, randn(*GATES[case], dtype=dtype), 8)


@pytest.mark.parametrize("act", range(len(NAMES)), ids=NAMES)
def test_gates_of_all_activations(kernels, device, act):
    gate(kernels, device, 3 * randn(3, 2 * 17), act)


def test_gated_act_refuses_what_it_cannot_do(kernels, device):
    x, y = torch.zeros(3, 8, device=device), torch.zeros(3, 4, device=device)
    assert kernels.gated_act(y, x, 8) and kernels.gated_act_backward(y, x.clone(), x, 8)
    for a, b, act in (
        (y, x, 11), (y.half(), x, 8), (y.double(), x.double(), 8), (y, x[:2], 8), (x, x, 8),
        (y[0, 0], x[:0, 0], 8), (torch.zeros(4, 3, device=device).mT, x, 8), (y, x.mT, 8),
    ):  # fmt: skip
        assert not kernels.gated_act(a, b, act)
        assert not kernels.gated_act_backward(a, b.clone(), b, act)
    assert not kernels.gated_act_backward(y, x.half(), x, 8)
    assert not kernels.gated_act_backward(y, x[:2], x, 8)


# ---- images --------------------------------------------------------------------------------------

SQUARE = torch.tensor([[1.0, 2.0, 0.5], [-1.0, 3.0, 0.25]])
LINE = torch.tensor([1.0, 3.0, -2.0, 1.0])
# f, up and down along (W, H), padding, flip, channels, channels last
IMAGES = {
    "blur": (SQUARE, (1, 1), (1, 1), (1, 2, 2, 1), False, 3, False),
    "line": (LINE, (1, 1), (1, 1), (1, 2, 2, 1), True, 3, False),
    "up": (SQUARE, (2, 2), (1, 1), (2, 1, 1, 2), True, 3, False),
    "up, line": (LINE, (2, 3), (1, 1), (2, 1, 3, 2), False, 3, False),
    "down": (SQUARE, (1, 1), (2, 3), (1, 1, 0, 2), False, 3, False),
    "both": (SQUARE, (3, 1), (2, 2), (4, 5, 1, 0), False, 2, False),
    "cropped": (LINE, (2, 2), (1, 1), (-3, 4, 2, -2), False, 2, False),
    "cropped away": (SQUARE, (1, 1), (1, 1), (-30, 40, 0, 0), False, 1, False),
    "blur, last": (LINE, (1, 1), (1, 1), (1, 2, 2, 1), False, 5, True),
    "up, last": (SQUARE, (2, 2), (1, 1), (2, 1, 1, 2), False, 24, True),
    "up, line, last": (LINE, (2, 1), (1, 3), (-1, 1, 3, 2), True, 70, True),
    "wide row": (SQUARE, (1, 8), (1, 1), (60, 0, 0, 0), False, 1, False),
}


@pytest.mark.parametrize("case", IMAGES)
def test_upfirdn2d(kernels, device, case):
    f, up, down, padding, flip, channels, inner = IMAGES[case]
    for dtype in (torch.float32, HALF) if case in ("up", "up, last") else (torch.float32,):
        x = randn(2, channels, 6, 9, dtype=dtype, inner=inner)
        want = -1.5 * reference.upfirdn2d(x.double(), f.double(), up, down, padding, flip)
        y = blank(x.new_empty(want.shape).contiguous(memory_format=torch.channels_last)
                  if inner else x.new_empty(want.shape))  # fmt: skip
        args = (y, x, f, *up, *down, *padding, flip, -1.5)
        ours, native = (
            call(m, "upfirdn2d", d, *args)[0] for m, d in ((kernels, device), (_C, "cpu"))
        )
        close(ours, native, want)


def test_far_factors_and_padding(kernels, device):
    """Places in the up-sampled image that leave 32 bit, and an empty batch."""
    x, f, far = randn(2, 3, 5, 4), SQUARE, 2**31
    for y, ways, want in (
        (x, (far, far, far, far, 0, 0, 0, 0), x * f[0, 0]),
        (x[..., :4, :2], (1, 1, 1, 1, far - 9, 9 - far, 0, 0), torch.zeros(2, 3, 4, 2)),
        (
            x[..., :1, :1],
            (1, 1, far, far, 0, 0, 0, 0),
            (x[..., :2, :3] * f).sum((2, 3))[..., None, None],
        ),
    ):
        got = call(kernels, "upfirdn2d", device, blank(y.contiguous()), x, f, *ways, True, 1.0)[0]
        torch.testing.assert_close(got, want)
    call(kernels, "upfirdn2d", device, x[:0], x[:0], torch.ones(1), *[1] * 4, *[0] * 4, True, 1.0)


def test_upfirdn2d_refuses_what_it_cannot_do(kernels, device):
    x, f = torch.zeros(2, 3, 5, 4, device=device), torch.ones(2, 2, device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    ways = (1, 1, 1, 1, 1, 0, 1, 0)
    assert kernels.upfirdn2d(x, x, f, *ways, False, 1.0)
    for y, a, g, w, gain in (
        (x, x, f.double(), ways, 1.0), (x.double(), x, f, ways, 1.0), (x, x[0], f, ways, 1.0),
        (x, x, f[None], ways, 1.0), (x, x, f[:0], ways, 1.0), (x, x, f.mT, ways, 1.0),
        (x, x, f, ways, math.inf), (x, x, f, (0, *ways[1:]), 1.0), (x, x, f, (*ways[:7], 1), 1.0),
        (x, last, f, ways, 1.0), (last, x, f, ways, 1.0), (x, x.mT.contiguous().mT, f, ways, 1.0),
        (x, x[:1], f, ways, 1.0), (x, x, f, (1, 1, 1, 1, 2**31 + 1, -(2**31), 1, 0), 1.0),
    ):  # fmt: skip
        assert not kernels.upfirdn2d(y, a, g, *w, False, gain)


def test_public_functions_reach_the_kernels(device, monkeypatch):
    x, b = randn(2, 6, 5, 8).to(device), randn(6, seed=2).to(device)
    f = genfast.setup_filter([1, 3, 3, 1], device)

    def run():
        leaf, bias = x.clone().requires_grad_(), b.clone().requires_grad_()
        strength = torch.full((), 0.3, device=device, requires_grad=True)
        y = genfast.bias_act(leaf, bias, act="lrelu", strength=strength, seed=3)
        y = genfast.gated_act(genfast.upsample2d(y, f), "swish")
        y.square().sum().backward()
        return y.detach(), leaf.grad, bias.grad, strength.grad

    from genfast.kernels import filtering

    launched = []
    for name in filtering.__all__:
        real = getattr(filtering, name)
        monkeypatch.setattr(
            filtering, name, lambda *a, n=name, f=real: (launched.append(n), f(*a))[1]
        )
    with backend("triton"):
        ours = run()
    assert sorted(launched) == sorted([*filtering.__all__, "upfirdn2d"])
    with backend("reference"):
        want = run()
    for a, e in zip(ours, want, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
