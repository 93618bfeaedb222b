"""Norms on Triton, against the reference in fp64; statistics against the CPU kernel's."""

import math

import pytest
import torch
from draws import draw
from tolerances import yardstick

import genfast
from genfast import _C
from genfast.ops._backend import backend
from genfast.reference import normalization as reference
from genfast.reference.normalization import ACTIVATIONS

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LINEAR, SILU, GELU, GELU_TANH = range(4)
NAMES = ("x", "w", "b", "scale", "shift", "add", "gate")


@pytest.fixture
def kernels(device):
    from genfast.kernels import normalization

    return normalization


def channels_last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def inputs(shape, groups, given, dtype=F32, rest=F32, last=False):
    """Those of NAMES that are given, else None; the conditions are slices of one tensor."""
    C = shape[1 if groups else -1]
    rows = draw(shape[0], 3 * C, seed=4, dtype=rest).chunk(3, 1) if len(shape) > 1 else (None,) * 3
    x = 2 * draw(*shape, dtype=dtype) + 1
    w, b = draw(C, seed=1, dtype=rest), draw(C, seed=2, dtype=rest)
    tensors = (channels_last(x) if last else x, w, b, *rows[:2], draw(*shape, seed=3), rows[2])
    return [t if n == "x" or n in given.split() else None
            for n, t in zip(NAMES, tensors, strict=True)]  # fmt: skip


def run(f, device, tensors, g, g_sum, rest, wanted=NAMES):
    """The sum, y, statistics and gradients of f.normalize and f.normalize_backward."""

    def on_device(t):
        if t is not None:
            to = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
            return to.copy_(t)

    def out(t, *shape, name="x"):
        if t is not None and name in wanted:
            of = torch.empty(shape, device=device) if shape else torch.empty_like(t)
            return of.fill_(math.nan)

    groups, rms = rest[:2]
    x, w, b, scale, shift, add, gate = (on_device(t) for t in tensors)
    C, B = x.shape[1 if groups else -1], x.shape[0]
    count = B * groups if groups else math.prod(x.shape[:-1])
    y, total, statistics = out(x), None if add is None else out(x), out(x, count * (2 - rms))
    assert f.normalize(y, statistics, total, x, w, b, scale, shift, add, gate, *rest)

    source, add = x if total is None else total, None if gate is None else add
    grads = (
        out(x), out(w, C, name="w"), out(b, C, name="b"), out(scale, B, C, name="scale"),
        out(shift, B, C, name="shift"), out(add), out(gate, B, C),
    )  # fmt: skip
    g, g_sum = (t if t is None else torch.empty_like(x, dtype=t.dtype).copy_(t) for t in (g, g_sum))
    given = (statistics, source, w, b, scale, shift, add, gate, *rest)
    assert f.normalize_backward(g, g_sum, *grads, *given)
    found = {"total": total, "y": y, "statistics": statistics}
    found |= {"d_" + n: d for n, d in zip(NAMES, grads, strict=True)}
    return {n: t.cpu() for n, t in found.items() if t is not None}


def truth(tensors, g, g_sum, rest, dtype):
    (groups, rms, act, eps), outs = rest, {}
    leaves = {n: t.to(dtype).requires_grad_()
              for n, t in zip(NAMES, tensors, strict=True) if t is not None}  # fmt: skip
    x, w, b, scale, shift, add, gate = (leaves.get(n) for n in NAMES)
    if add is not None:
        x = outs["total"] = reference.gated_sum(x, add, gate)
    kind = {"groups": groups, "rms": rms, "act": list(ACTIVATIONS)[act], "eps": eps}
    outs["y"] = reference.normalize(x, w, b, scale, shift, **kind)
    pairs = [(outs["y"], g)] + ([] if g_sum is None else [(outs["total"], g_sum)])
    of, grads = zip(*((o, d.to(dtype)) for o, d in pairs), strict=True)
    found = torch.autograd.grad(of, list(leaves.values()), grads)
    found = {"d_" + n: d for n, d in zip(leaves, found, strict=True)}
    return {n: t.detach() for n, t in outs.items()} | found


def check(kernels, device, tensors, rest, grad=F32):
    x, summed = tensors[0], tensors[5] is not None
    g = draw(*x.shape, seed=5, dtype=grad)
    g_sum = draw(*x.shape, seed=6, dtype=grad) if summed else None
    got = run(kernels, device, tensors, g, g_sum, rest)
    theirs = run(_C, "cpu", tensors, g, g_sum, rest)
    assert got.keys() == theirs.keys()
    tol = 2e-2 if summed and x.dtype != F32 else 1e-5  # the interpreter cuts sums, not rounds
    torch.testing.assert_close(got["statistics"], theirs["statistics"], rtol=tol, atol=tol)
    eager, exact = (truth(tensors, g, g_sum, rest, d) for d in (x.dtype, torch.float64))
    for name in got.keys() - {"statistics"}:
        kind = "gradient" if name.startswith("d_") else "output"
        yardstick(name, got[name].to(x.dtype), eager[name], exact[name], kind)


ALL, GROUP = "w b scale shift add gate", "w b scale shift"
# shape, groups, rms, act, given, channels last
CASES = {
    "odd": ((3, 5, 37), 0, False, GELU, ALL, False),
    "plain": ((40,), 0, False, LINEAR, "", False),
    "vector": ((2, 9), 0, True, SILU, "w scale", False),
    "rms": ((2, 20, 64), 0, True, GELU_TANH, "w shift add", False),
    "one-column": ((2, 3, 1), 0, False, LINEAR, "w b", False),
    "parts": ((1, 80, 257), 0, False, SILU, "w b", False),
    "gated": ((2, 2, 264), 0, False, SILU, "b add gate", False),
    "wide": ((2, 1, 4104), 0, False, SILU, "", False),
    "long": ((1, 2, 8200), 0, False, LINEAR, ALL, False),
    "long-rms": ((2, 1, 8203), 0, True, SILU, "add", False),
    "planes": ((2, 12, 5, 7), 4, False, SILU, GROUP, False),
    "planes-tiles": ((1, 6, 5, 600), 2, False, GELU, "w scale", False),
    "one-group": ((2, 37, 9), 1, False, LINEAR, "w b", False),
    "one-place": ((2, 12), 4, False, GELU_TANH, "b shift", False),
    "last": ((2, 12, 5, 7), 4, False, GELU_TANH, GROUP, True),
    "last-tiles": ((1, 40, 30, 11), 2, False, GELU, "b", True),
    "each-channel": ((2, 8, 6, 4), 8, False, SILU, "w b", True),
}


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(kernels, device, case):
    shape, *rest, given, last = CASES[case]
    check(kernels, device, inputs(shape, rest[0], given, last=last), (*rest, 1e-5))


# of x, of the others, of the gradient
@pytest.mark.parametrize("dtypes", [(F16, F16, F16), (BF16, BF16, BF16), (F32, F16, BF16)], ids=str)
@pytest.mark.parametrize("case", ["odd", "rms", "planes", "last"])
def test_16_bit(kernels, device, case, dtypes):
    shape, *rest, given, last = CASES[case]
    tensors = inputs(shape, rest[0], given, *dtypes[:2], last=last)
    check(kernels, device, tensors, (*rest, 1e-5), dtypes[2])


@pytest.mark.parametrize("last", [False, True])
def test_parts_of_groups(kernels, device, monkeypatch, last):
    monkeypatch.setattr(kernels.layout, "_PART", 1024)
    shape = (1, 16, 30, 20) if last else (1, 2, 3, 3000)
    check(kernels, device, inputs(shape, 2, GROUP, last=last), (2, False, SILU, 1e-5))


# shape, groups, channels last
LAYOUTS = {
    "rows": ((3, 64), 0, False), "long": ((2, 8200), 0, False), "planes": ((2, 4, 900), 2, False),
    "last": ((2, 4, 900), 2, True), "parts": ((1, 16, 600), 1, True),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_means_constants_and_overflow(kernels, device, monkeypatch, layout):
    monkeypatch.setattr(kernels.layout, "_PART", 1024 if layout == "parts" else 2**20)
    shape, groups, last = LAYOUTS[layout]

    def y_of(x):
        x = (channels_last(x) if last else x).to(device)
        y = torch.full_like(x, math.nan)
        assert kernels.normalize(y, None, None, x, *[None] * 6, groups, False, LINEAR, 1e-5)
        return y.cpu()

    x = draw(*shape) + 1000
    assert (y_of(x) - reference.normalize(x.double(), groups=groups)).abs().max() < 2e-4
    assert y_of(torch.full(shape, 3.3)).abs().max() < 1e-3
    assert y_of(1e25 * x).isnan().all()  # not zeros


def test_only_the_wanted_gradients(kernels, device):
    tensors, g, rest = inputs((2, 5, 20), 0, GROUP), draw(2, 5, 20, seed=5), (0, False, SILU, 1e-5)
    whole = run(kernels, device, tensors, g, None, rest)
    for wanted in (("x",), ("x", "w"), ("x", "b", "shift"), ("x", "scale")):
        some = run(kernels, device, tensors, g, None, rest, wanted)
        assert {n for n in some if n.startswith("d_")} == {"d_" + n for n in wanted}
        assert all(torch.equal(d, whole[n]) for n, d in some.items())


EMPTY = [((0, 4, 6), 0), ((2, 0, 6), 0), ((3, 4, 0), 0), ((0, 4), 2), ((2, 4, 0), 2)]


@pytest.mark.parametrize(("shape", "groups"), EMPTY)
def test_empty(kernels, device, shape, groups):
    rest = (groups, False, SILU, 1e-5)
    found = run(kernels, device, inputs(shape, groups, GROUP), torch.empty(shape), None, rest)
    assert not any(d.any() for n, d in found.items() if n.startswith("d_"))


def test_refusals(kernels, device):
    x = torch.zeros(2, 8, 4, device=device)
    c, rows, s = x.new_zeros(4), x.new_zeros(2, 4), x.new_zeros(32)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)

    def forward(y=x, s=s, total=None, x=x, w=None, b=None, scale=None, shift=None, add=None,
                gate=None, groups=0, rms=False, act=0, eps=1e-5):  # fmt: skip
        given = (x, w, b, scale, shift, add, gate, groups, rms, act, eps)
        return kernels.normalize(y, s, total, *given)

    def backward(dx=x, dw=None, d_scale=None, d_add=None, d_gate=None, s=s, add=None, gate=None,
                 g_sum=None, groups=0, scale=None):  # fmt: skip
        given = (s, x, None, None, scale, None, add, gate, groups, False, 0, 1e-5)
        return kernels.normalize_backward(
            x, g_sum, dx, dw, None, d_scale, None, d_add, d_gate, *given
        )

    assert forward() and forward(s=None) and forward(total=x.clone(), add=x, gate=rows)
    for options in (
        {"y": x.half()}, {"y": x[:, :4]}, {"y": turned}, {"x": turned, "y": turned},
        {"x": x.double(), "y": x.double()}, {"s": s[:31]}, {"s": s.double()}, {"w": s[:8]},
        {"w": c.double()}, {"b": c[:3]}, {"w": s[:8:2]}, {"scale": c}, {"shift": rows[:1]},
        {"scale": x.new_zeros(4, 2).t()}, {"gate": rows}, {"add": x}, {"total": x},
        {"add": x, "total": x.half()}, {"add": x[:, :4], "total": x}, {"act": 4}, {"eps": -1.0},
        {"eps": math.nan}, {"groups": 3, "s": None}, {"groups": 2, "rms": True, "s": None},
        {"groups": 2, "add": x, "total": x, "s": None}, {"w": c.to("meta")},
    ):  # fmt: skip
        assert not forward(**options), options
    assert backward() and backward(dw=c, d_scale=rows, scale=rows)
    for options in (
        {"s": None}, {"dx": x.half()}, {"dx": turned}, {"dw": c.half()}, {"dw": s[:8]},
        {"d_scale": rows}, {"scale": rows, "d_scale": x.new_zeros(2, 8)[:, ::2]},
        {"add": x, "gate": rows}, {"d_gate": rows}, {"g_sum": x[:1]},
        {"groups": 2, "g_sum": x, "s": s[:8]},
        {"add": x, "gate": rows, "d_add": x.half(), "d_gate": rows},
    ):  # fmt: skip
        assert not backward(**options), options


def test_public_functions_reach_the_kernels(device):
    leaves = (draw(2, 6, 20), draw(2, 6, 20, seed=1), draw(20, seed=2), draw(2, 20, seed=3))
    a, b, v, s = leaves = [t.to(device).requires_grad_() for t in leaves]
    found = []
    for name in ("triton", "reference"):
        with backend(name):
            total, y = genfast.layer_norm(a, v, scale=s, act="silu", add=b, gate=s)
            z = genfast.group_norm(y, 3, act="gelu") + genfast.rms_norm(total, v)
            found.append([y, z, *torch.autograd.grad((z, y), leaves, (a, b))])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
