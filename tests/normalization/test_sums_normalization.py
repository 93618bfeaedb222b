"""layer_norm and rms_norm of a sum x + gate add, against the reference in fp64."""

import pytest
import torch
from tolerances import REORDERED, on_both_roads, yardstick
from torch.autograd import gradcheck, gradgradcheck

import genfast
import genfast.nn
from genfast.reference import normalization as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = {"layer": genfast.layer_norm, "rms": genfast.rms_norm}
NAMES = ("x", "add", "gate", "weight", "scale", "shift")
GIVEN = {
    "plain": ("x", "add"), "affine": ("x", "add", "weight"),
    "modulated": ("x", "add", "scale", "shift"), "gated": ("x", "add", "gate"),
    "all": NAMES,
}  # fmt: skip
SHAPES = {
    "tokens": (3, 9, 20), "threads": (4, 70, 130), "parts": (1, 1400, 96), "one row": (5, 24),
    "wide": (2, 3, 5000), "four": (2, 3, 5, 8), "no samples": (0, 5, 8), "no rows": (2, 0, 8),
}  # fmt: skip


def randn(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(shape, given, dtype=torch.float32):
    C = shape[-1]
    parts = randn(shape[0], 3 * C, seed=4, dtype=dtype).chunk(3, 1)
    all_of = {
        "x": 2 * randn(*shape, dtype=dtype) + 1, "add": randn(*shape, seed=2, dtype=dtype),
        "weight": randn(C, seed=3, dtype=dtype),
        **dict(zip(("gate", "scale", "shift"), parts, strict=True)),
    }  # fmt: skip
    return {name: all_of[name] for name in NAMES if name in given}


def ours(kind, eps=1e-5, **tensors):
    return KINDS[kind](tensors.pop("x"), eps=eps, **tensors)


def truth(kind, eps=1e-5, *, x, add, gate=None, **tensors):
    total = reference.gated_sum(x, add, gate)
    return total, reference.normalize(total, **tensors, rms=kind == "rms", eps=eps)


def run(function, kind, tensors, grads, dtype):
    """sum, y and every gradient; grads: of sum and y, None where its output is not used."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
    found = on_both_roads(function, kind, **leaves)
    used = [(o, g.to(dtype)) for o, g in zip(found, grads, strict=True) if g is not None]
    gradients = torch.autograd.grad(
        [o for o, _ in used], list(leaves.values()), [g for _, g in used], allow_unused=True
    )
    return [*(o.detach() for o in found), *gradients]


def grads_of(shape, use=(True, True)):
    return [randn(*shape, seed=5 + i) if used else None for i, used in enumerate(use)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients(kind, given, dtype):
    shape = (3, 50, 20)
    tensors, grads = inputs(shape, GIVEN[given], dtype), grads_of(shape)
    got, eager, exact = (
        run(f, kind, tensors, grads, at)
        for f, at in ((ours, dtype), (truth, dtype), (truth, torch.float64))
    )
    for i, values in enumerate(zip(got, eager, exact, strict=True)):
        assert values[0].dtype == dtype
        yardstick(f"{kind} tensor {i}", *values, kind="gradient" if i > 1 else "output")


@pytest.mark.parametrize("use", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("given", ["plain", "all"])
def test_shapes_and_outputs_in_use(given, name, use):
    shape = SHAPES[name]
    tensors, grads = inputs(shape, GIVEN[given]), grads_of(shape, use)
    exact = run(truth, "layer", tensors, grads, torch.float64)
    apart = dict(tensors, add=tensors["add"].movedim(0, -1).contiguous().movedim(-1, 0))
    for laid in (tensors, apart):
        got = run(ours, "layer", laid, grads, torch.float32)
        for a, e in zip(got, exact, strict=True):
            assert (a is None) == (e is None)
            if a is not None and a.numel():
                e = e.nan_to_num()
                scale = max(1.0, e.abs().max().item())
                torch.testing.assert_close(a / scale, (e / scale).float(), rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
def test_no_samples_of_any_strides(kind, grad):
    """torch calls every empty tensor contiguous."""
    x, add = (torch.randn(0, 1, 4)[..., ::2].requires_grad_(grad) for _ in range(2))
    for given in ({}, {"add": add}, {"add": add, "gate": torch.randn(0, 2, requires_grad=grad)}):
        found = KINDS[kind](x, **given)
        for y in found if given else (found,):
            assert y.shape == x.shape and y.requires_grad == grad
            if grad:
                assert torch.autograd.grad(y.sum(), x, retain_graph=True)[0].shape == x.shape


def test_no_grad_is_the_same_and_writes_no_input():
    tensors = inputs((4, 70, 130), NAMES)
    before = {name: t.clone() for name, t in tensors.items()}
    a = ours("layer", **tensors)
    b = ours("layer", **{name: t.clone().requires_grad_() for name, t in tensors.items()})
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert all(torch.equal(t, before[name]) for name, t in tensors.items())
    with genfast.backend("reference"):
        other = ours("layer", **tensors)
    for p, q in zip(a, other, strict=True):
        torch.testing.assert_close(p, q, **REORDERED[torch.float32])


@pytest.mark.parametrize("name", ["threads", "parts"])
def test_threads_change_no_bit(name):
    shape, found = SHAPES[name], []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(ours, "layer", inputs(shape, NAMES), grads_of(shape), torch.float32))
    for other in found[1:]:
        assert all(torch.equal(p, q) for p, q in zip(found[0], other, strict=True))


def test_only_the_wanted_gradients():
    tensors, grads = inputs((3, 9, 20), NAMES), grads_of((3, 9, 20))
    whole = run(ours, "layer", tensors, grads, torch.float32)[2:]
    for learned in (["x"], ["add"], ["gate"], ["weight", "add"], ["shift"]):
        leaves = {name: t.detach().requires_grad_(name in learned) for name, t in tensors.items()}
        pairs = zip(ours("layer", **leaves), grads, strict=True)
        outputs, given = zip(*((o, g) for o, g in pairs if o.requires_grad), strict=True)
        found = torch.autograd.grad(outputs, [leaves[name] for name in learned], given)
        for name, d in zip(learned, found, strict=True):
            assert torch.equal(d, whole[NAMES.index(name)])


# ---- gradients of any order, transforms, tracing -------------------------------------------------


@pytest.mark.parametrize("given", ["plain", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_in_fp64(kind, given):
    tensors = inputs((2, 3, 8), GIVEN[given])
    leaves = [t.double().requires_grad_() for t in tensors.values()]

    def f(*leaves):
        return ours(kind, **dict(zip(tensors, leaves, strict=True)))

    assert gradcheck(f, leaves, check_forward_ad=True)
    assert gradgradcheck(f, leaves)


@pytest.mark.parametrize("given", ["plain", "all"])
def test_second_order_of_the_kernel(given):
    tensors, grads = inputs((2, 5, 16), GIVEN[given]), grads_of((2, 5, 16))

    def orders(f, dtype):
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
        found = f("layer", **leaves)
        first = torch.autograd.grad(
            found, list(leaves.values()), [g.to(dtype) for g in grads], create_graph=True
        )
        total = sum(d.square().sum() for d in first)
        second = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return [*(d.detach() for d in first), *second]

    for a, e in zip(orders(ours, torch.float32), orders(truth, torch.float64), strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            scale = max(1.0, e.abs().max().item())
            torch.testing.assert_close(a.double() / scale, e / scale, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("given", GIVEN)
def test_compile_is_the_same_with_its_gradients(given):
    torch.compiler.reset()  # of the other cases: each is compiled twice, with a graph and without
    tensors, grads = inputs((2, 5, 12), GIVEN[given]), grads_of((2, 5, 12))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for use in (grads, [grads[0], None], [None, grads[1]]):
        for a, b in zip(
            run(compiled, "layer", tensors, use, torch.float32),
            run(ours, "layer", tensors, use, torch.float32), strict=True,
        ):  # fmt: skip
            if b is None:  # compiled, an input without influence gets zeros
                assert a is None or not a.any()
            else:
                torch.testing.assert_close(a, b, **REORDERED[torch.float32])


def test_opcheck():
    t = {name: t.requires_grad_() for name, t in inputs((2, 3, 8), NAMES).items()}
    for gate in (t["gate"].detach().clone().requires_grad_(), None):
        torch.library.opcheck(
            torch.ops.genfast.normalize.default,
            (t["x"], t["weight"], None, None, None, t["add"], gate, 0, False, 0, 1e-5),
        )


@pytest.mark.parametrize("given", ["plain", "gated"])
def test_batched_gradients(given):
    leaves = {n: t.requires_grad_() for n, t in inputs(SHAPES["tokens"], GIVEN[given]).items()}
    total, y = ours("layer", **leaves)
    some = [torch.stack([g, 2 * g]) for g in (randn(*y.shape, seed=7), randn(*y.shape, seed=8))]
    wanted = list(leaves.values())
    got = torch.autograd.grad((total, y), wanted, some, is_grads_batched=True, retain_graph=True)
    want = torch.autograd.grad((total, y), wanted, [g[1] for g in some])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[1], b, rtol=1e-4, atol=1e-4)


def test_vmap():
    t = inputs((3, 5, 16), ("x", "add", "weight"))
    f = lambda x, h: genfast.layer_norm(x, t["weight"], add=h)  # noqa: E731
    for a, b in zip(torch.vmap(f)(t["x"], t["add"]), f(t["x"], t["add"]), strict=True):
        torch.testing.assert_close(a, b, **REORDERED[torch.float32])


# ---- modules, wrong input ------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [genfast.nn.LayerNorm, genfast.nn.RMSNorm])
def test_modules(norm):
    x, h, gate = randn(2, 3, 4, 5), randn(2, 3, 4, 5, seed=2), randn(2, 5, seed=3)
    m = norm(5)
    total, y = m(x, add=h, gate=gate)
    torch.testing.assert_close(total, x + gate[:, None, None] * h)
    torch.testing.assert_close(y, m(total))
    m = norm((4, 5))
    total, y = m(x, add=h)
    torch.testing.assert_close(total, x + h)
    torch.testing.assert_close(y, m(total))


X = torch.zeros(2, 8, 5)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "add: ", lambda: genfast.layer_norm(X, add=1.0)),
        (ValueError, r"add: expected x's shape \(2, 8, 5\)",
         lambda: genfast.layer_norm(X, add=X[:1])),
        (ValueError, "gate: expected None without add",
         lambda: genfast.rms_norm(X, gate=torch.zeros(2, 5))),
        (ValueError, r"gate: expected shape \(2, 5\)",
         lambda: genfast.rms_norm(X, add=X, gate=torch.zeros(5))),
        (ValueError, "x: expected at least 2",
         lambda: genfast.layer_norm(X[0, 0], add=X[0, 0], gate=torch.zeros(1, 5))),
        (ValueError, "one device", lambda: genfast.layer_norm(X, add=X.to("meta"))),
    ],
)  # fmt: skip
def test_wrong_input_names_the_argument(error, message, call):
    with pytest.raises(error, match=message):
        call()
