"""conv2d, upsampled_conv2d and residual_conv2d against the reference in fp64, on each road."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerances import REORDERED, yardstick
from torch.autograd import gradcheck, gradgradcheck

import genfast
from genfast.ops.convolution import common, winograd
from genfast.ops.convolution import upsampled as upsampled_op
from genfast.reference import convolution as reference

INNER, OUTER = torch.channels_last, torch.contiguous_format
# x of upsampled_conv2d, and output channels; "small" has too few products for the other weights
SHAPES = {
    "images": ((8, 32, 14, 14), 32), "wider": ((8, 24, 9, 20), 40), "few": ((64, 16, 12, 15), 8),
    "small": ((2, 8, 4, 4), 8), "one place": ((32, 192, 1, 1), 192), "none": ((0, 8, 4, 4), 8),
}  # fmt: skip
# x of conv2d, and output channels
CONVOLUTIONS = {
    "even": ((4, 16, 8, 12), 32), "odd": ((5, 16, 9, 7), 32), "rows": ((3, 48, 1, 14), 16),
    "columns": ((3, 32, 21, 1), 64), "two blocks": ((2, 128, 20, 22), 80),
    "none": ((0, 16, 8, 8), 16), "many weights": ((1, 256, 16, 15), 240),
    "from one": ((5, 1, 9, 7), 16), "from four": ((2, 4, 33, 40), 48),
    "to one": ((4, 16, 20, 23), 1), "to two, a row": ((16, 48, 1, 9), 2),
    "to three": ((1, 32, 70, 41), 3), "none to one": ((0, 16, 8, 8), 1),
}  # fmt: skip
# channels of h, of x, of the result, side of the kernel; whether x is projected
BLOCKS = {
    "identity": (16, 16, 16, 3, False), "projected": (16, 48, 16, 3, True),
    "projected to more": (32, 7, 48, 3, True), "to one": (16, 8, 1, 3, True),
    "wide kernel": (8, 12, 20, 5, True),
}  # fmt: skip


def randn(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def upsampled(shape, outputs, layout=INNER, dtype=torch.float32):
    x = randn(*shape, dtype=dtype).contiguous(memory_format=layout)
    weight = randn(outputs, shape[1], 3, 3, seed=2, dtype=dtype)
    return x, weight.contiguous(memory_format=layout), randn(outputs, seed=3, dtype=dtype)


def convolution(name, layout=INNER, dtype=torch.float32):
    return upsampled(*CONVOLUTIONS[name], layout, dtype)


def residual(name, layout=INNER, dtype=torch.float32, size=(10, 13)):
    of_h, of_x, outputs, K, projected = BLOCKS[name]
    h, x = (
        randn(4, c, *size, seed=n, dtype=dtype).contiguous(memory_format=layout)
        for n, c in ((1, of_h), (2, of_x))
    )
    weights = [randn(outputs, of_h, K, K, seed=3, dtype=dtype), randn(outputs, seed=4, dtype=dtype)]
    if projected:
        weights += [randn(outputs, of_x, 1, 1, seed=5, dtype=dtype)]
        weights += [randn(outputs, seed=6, dtype=dtype)]
    return h, x, *weights


def run(function, tensors, dtype):
    """The value without a graph, the same with one, and the gradients by every tensor."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    with torch.no_grad():
        alone = function(*leaves)
    y = function(*leaves)
    grad = randn(*y.shape, seed=9).to(dtype)
    return [alone, y.detach(), *torch.autograd.grad(y, leaves, grad)]


def judge(name, ours, plain, tensors):
    three = (
        run(ours, tensors, tensors[0].dtype), run(plain, tensors, tensors[0].dtype),
        run(plain, tensors, torch.float64),
    )  # fmt: skip
    for i, values in enumerate(zip(*three, strict=True)):
        yardstick(f"{name}, tensor {i}", *values, kind="output" if i < 2 else "gradient")


@pytest.mark.parametrize("layout", [INNER, OUTER], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_upsampled(name, layout):
    tensors = upsampled(*SHAPES[name], layout)
    judge(name, genfast.upsampled_conv2d, reference.upsampled_conv2d, tensors)


@pytest.mark.parametrize("layout", [INNER, OUTER], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_residual(name, layout):
    tensors = residual(name, layout)
    judge(name, genfast.residual_conv2d, reference.residual_conv2d, tensors)
    alone, with_graph, *_ = run(genfast.residual_conv2d, tensors, torch.float32)
    assert torch.equal(alone, with_graph) and alone.stride() == with_graph.stride()


def count(monkeypatch, owner, name) -> list:
    """A list that grows by one at each call of `owner.name`."""
    calls, found = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: calls.append(1) or found(*a, **k))
    return calls


def test_the_fewer_products_are_taken(monkeypatch):
    """And neither by the reference, nor in the layout and the dtypes that were not measured."""
    transposed = count(monkeypatch, upsampled_op.F, "conv_transpose2d")
    x, weight, bias = upsampled(*SHAPES["wider"])
    genfast.upsampled_conv2d(x, weight, bias)
    assert transposed == [1]
    with genfast.backend("reference"):
        genfast.upsampled_conv2d(x, weight, bias)
    genfast.upsampled_conv2d(x.contiguous(), weight, bias)
    genfast.upsampled_conv2d(x.double(), weight.double(), bias.double())
    genfast.upsampled_conv2d(*upsampled(*SHAPES["small"]))
    with torch.autocast("cpu", torch.bfloat16):
        genfast.upsampled_conv2d(x, weight, bias)
    assert transposed == [1]


def test_the_kernel_is_taken(monkeypatch):
    if not winograd._MEASURED:
        pytest.skip("this instruction set was not measured")
    forward = count(monkeypatch, winograd.kernels, "conv2d")
    of_weight = count(monkeypatch, winograd.kernels, "conv2d_weight")
    x, weight, bias = convolution("even")
    genfast.conv2d(x, weight, bias, padding=1)
    genfast.conv2d(x, weight, bias, (1, 1), "same")
    genfast.conv2d(x.requires_grad_(), weight, bias, padding=1).sum().backward()
    x = x.detach()
    assert (len(forward), len(of_weight)) == (4, 0)  # nothing but x wants a gradient
    genfast.conv2d(x, weight.requires_grad_(), bias, padding=1).sum().backward()
    weight = weight.detach()
    assert (len(forward), len(of_weight)) == (5, 1)
    genfast.upsampled_conv2d(*upsampled(*SHAPES["images"]))
    genfast.residual_conv2d(*residual("identity"))
    genfast.residual_conv2d(*residual("projected"))
    genfast.residual_conv2d(*residual("projected to more"))
    assert len(forward) == 9
    # Other settings, dtypes, layouts, channels and sizes are PyTorch's.
    genfast.conv2d(x, weight, bias)
    genfast.conv2d(x, weight, bias, stride=2, padding=1)
    genfast.conv2d(x, weight, bias, padding=2, dilation=2)
    genfast.conv2d(x, weight[:, :8], bias, padding=1, groups=2)
    genfast.conv2d(x.contiguous(), weight, bias, padding=1)
    genfast.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    genfast.conv2d(x, weight[:20], bias[:20], padding=1)
    genfast.conv2d(x, weight[:5], bias[:5], padding=1)
    genfast.residual_conv2d(x, x[:, :1], weight[:1], bias[:1])
    genfast.conv2d(x[:1, :, :4, :4], weight, bias, padding=1)
    genfast.conv2d(x[0].contiguous(), weight, bias, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        genfast.conv2d(x, weight, bias, padding=1)
    with genfast.backend("reference"):
        genfast.conv2d(x, weight, bias, padding=1)
    assert len(forward) == 9


@pytest.mark.parametrize("layout", [INNER, OUTER], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d(name, layout):
    tensors = convolution(name, layout)
    judge(name, partial(genfast.conv2d, padding=1), reference.conv2d, tensors)
    alone, with_graph, *_ = run(partial(genfast.conv2d, padding=1), tensors, torch.float32)
    assert torch.equal(alone, with_graph) and alone.stride() == with_graph.stride()


def calls_of_all():
    """name: a function of (x, term) and its other arguments, on the kernel."""
    x, weight, bias = convolution("odd")
    term = randn(len(x), len(weight), *x.shape[2:], seed=7).contiguous(memory_format=INNER)
    projection = randn(len(weight), len(weight), 1, 1, seed=8)
    return x, term, {
        "conv2d": lambda x, term: genfast.conv2d(x, weight, bias, padding=1),
        "upsampled": lambda x, term: genfast.upsampled_conv2d(x, weight, bias),
        "identity": lambda x, term: genfast.residual_conv2d(x, term, weight, bias),
        "projected": lambda x, term: genfast.residual_conv2d(x, term, weight, bias, projection),
    }  # fmt: skip


def test_a_sample_is_its_own_and_threads_change_no_bit():
    x, term, calls = calls_of_all()
    before = torch.get_num_threads()
    for name, call in calls.items():
        seen = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                leaf = x.detach().requires_grad_()
                y = call(leaf, term)
                seen.append([y.detach(), *torch.autograd.grad(y.square().sum(), [leaf])])
            finally:
                torch.set_num_threads(before)
        assert all(torch.equal(*pair) for s in seen[1:] for pair in zip(s, seen[0], strict=True)), (
            name
        )
        assert torch.equal(call(x[2:4], term[2:4]), seen[0][0][2:4]), name
    _, weight, bias = convolution("odd")
    sums = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = [weight.detach().requires_grad_(), bias.detach().requires_grad_()]
        y = genfast.conv2d(x, *leaves, padding=1)
        sums.append(torch.autograd.grad(y.square().sum(), leaves))
    torch.set_num_threads(before)
    assert all(torch.equal(*pair) for s in sums[1:] for pair in zip(s, sums[0], strict=True))


def test_a_gradient_of_any_layout():
    """Expanded, with the channels outside, negative, batched."""
    x, weight, bias = (t.requires_grad_() for t in convolution("odd"))
    y = genfast.conv2d(x, weight, bias, padding=1)
    plain = reference.conv2d(x, weight, bias)
    g = randn(*y.shape, seed=4)
    negative = torch._neg_view(g)
    for grad in (torch.ones(()).expand_as(y), g, g.contiguous(memory_format=INNER), negative):
        got, want = (torch.autograd.grad(t, (x, weight, bias), grad, retain_graph=True)
                     for t in (y, plain))  # fmt: skip
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    some = torch.stack([g, 2 * g])
    got, want = (
        torch.autograd.grad(t, (x, weight, bias), some, is_grads_batched=True, retain_graph=True)
        for t in (y, plain)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["conv2d", "upsampled", "identity", "projected"])
def test_second_derivatives_on_the_kernel(name):
    x, term, calls = calls_of_all()

    def second(call):
        leaves = [t.detach().requires_grad_() for t in (x, term)]
        first = torch.autograd.grad(
            call(*leaves).square().sum(), leaves, create_graph=True, allow_unused=True
        )
        first = [g for g in first if g is not None]
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves[0])

    (got,) = second(calls[name])
    with genfast.backend("reference"):
        (want,) = second(calls[name])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_hooks_on_saved_tensors_may_change_their_memory_order():
    """As torch.autograd.graph.save_on_cpu and hooks that write a file do."""
    x, term, calls = calls_of_all()
    for name, call in calls.items():
        leaves = [t.detach().requires_grad_() for t in (x, term)]
        want = torch.autograd.grad(call(*leaves).square().sum(), leaves, allow_unused=True)
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.detach().contiguous(), lambda t: t
        )
        with hooks:
            y = call(*leaves)
        got = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        for a, b in zip(got, want, strict=True):
            assert (a is None and b is None) or torch.equal(a, b), name


def test_the_module_is_torchs():
    ours, torchs = genfast.nn.Conv2d(16, 32, 3, padding=1), torch.nn.Conv2d(16, 32, 3, padding=1)
    torchs.load_state_dict(ours.state_dict())
    x = convolution("odd")[0]
    torch.testing.assert_close(ours(x), torchs(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(x[0]), torchs(x[0]), rtol=1e-4, atol=1e-4)
    assert repr(ours) == repr(torchs)
    options = dict(padding=1, padding_mode="reflect")
    ours, torchs = genfast.nn.Conv2d(16, 32, 3, **options), torch.nn.Conv2d(16, 32, 3, **options)
    torchs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), torchs(x))


@pytest.mark.parametrize(
    "change",
    [{"input": None}, {"input": randn(3)}, {"weight": randn(32, 8, 3, 3)}, {"bias": randn(31)},
     {"weight": randn(32)}, {"bias": 1.0}, {"input": randn(4, 16, 6, 6, dtype=torch.float64)},
     {"bias": randn(32, 1)}],
    ids=lambda change: "-".join(change),
)  # fmt: skip
def test_errors_of_conv2d_are_torchs(change):
    given = dict(zip(("input", "weight", "bias"), convolution("odd"), strict=True)) | change
    with pytest.raises((TypeError, RuntimeError)) as want:
        F.conv2d(**given, padding=1)
    with pytest.raises(want.type) as got:
        genfast.conv2d(**given, padding=1)
    first = str(want.value).split(" - got")[0]  # of keywords or places, then
    assert str(got.value).startswith(first)


@pytest.mark.parametrize("setting", [True, np.array([1, 1]), (1, 1, 1), "1", None], ids=str)
@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "groups"])
def test_wrong_settings_of_conv2d_are_torchs_errors(name, setting):
    given = dict(padding=1) | {name: setting}
    with pytest.raises((TypeError, RuntimeError)) as want:
        F.conv2d(*convolution("odd"), **given)
    with pytest.raises(want.type):
        genfast.conv2d(*convolution("odd"), **given)


@torch.no_grad()
def test_what_is_given_stays_as_it_was():
    for name in BLOCKS:
        tensors = residual(name)
        before = [t.clone() for t in tensors]
        genfast.residual_conv2d(*tensors)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_the_references(dtype):
    tensors = residual("projected", dtype=dtype)
    assert torch.equal(genfast.residual_conv2d(*tensors), reference.residual_conv2d(*tensors))
    x, weight, bias = upsampled(*SHAPES["images"], dtype=dtype)
    got, want = (f(x, weight, bias) for f in (genfast.upsampled_conv2d, reference.upsampled_conv2d))
    assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.parametrize("without", [(3,), (5,), (3, 5)], ids=str)
def test_without_biases(without):
    tensors = [None if i in without else t for i, t in enumerate(residual("projected"))]
    got, want = genfast.residual_conv2d(*tensors), reference.residual_conv2d(*tensors)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    x, weight, _ = upsampled(*SHAPES["images"])
    got, want = (f(x, weight) for f in (genfast.upsampled_conv2d, reference.upsampled_conv2d))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_gradients_of_any_order(monkeypatch):
    """The sums of taps in fp64, where they are taken only here."""
    monkeypatch.setattr(common, "quick", lambda x: True)
    monkeypatch.setattr(upsampled_op, "_LEAST", 0)
    monkeypatch.setattr(upsampled_op, "_TAPS", upsampled_op._TAPS.double())
    tensors = [t.double().requires_grad_() for t in upsampled((1, 2, 3, 4), 3)]
    assert gradcheck(genfast.upsampled_conv2d, tensors)
    assert gradgradcheck(genfast.upsampled_conv2d, tensors)
    torch.testing.assert_close(
        genfast.upsampled_conv2d(*tensors), reference.upsampled_conv2d(*tensors),
        **REORDERED[torch.float64],
    )  # fmt: skip


def test_under_transforms_and_compiled():
    x, weight, bias = upsampled(*SHAPES["images"])
    some = torch.stack([x, 2 * x])
    got = torch.vmap(genfast.upsampled_conv2d, (0, None, None))(some, weight, bias)
    want = torch.stack([reference.upsampled_conv2d(v, weight, bias) for v in some])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    given = residual("projected")
    _, tangent = torch.func.jvp(
        lambda x: genfast.residual_conv2d(given[0], x, *given[2:]), given[1:2], given[1:2]
    )
    torch.testing.assert_close(tangent, F.conv2d(given[1], given[4]), rtol=1e-4, atol=1e-4)

    def both(x, weight, bias, *given):
        return genfast.upsampled_conv2d(x, weight, bias), genfast.residual_conv2d(*given)

    with torch.no_grad():
        got = torch.compile(both, fullgraph=True)(x, weight, bias, *given)
        want = both(x, weight, bias, *given)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": randn(2, 8, 5)}, "x: expected"), ({"weight": randn(8, 9, 3, 3)}, "weight: expected"),
        ({"weight": randn(8, 8, 5, 5)}, "weight: expected"), ({"bias": randn(7)}, "bias: expected"),
        ({"weight": randn(8)}, "weight: expected"),
    ],
)  # fmt: skip
def test_errors_of_upsampled(change, message):
    given = dict(zip(("x", "weight", "bias"), upsampled((2, 8, 4, 4), 8), strict=True))
    with pytest.raises(ValueError, match=message):
        genfast.upsampled_conv2d(**{**given, **change})
    with pytest.raises(TypeError, match="x: expected a torch.Tensor"):
        genfast.upsampled_conv2d(None, *list(given.values())[1:])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": randn(4, 16, 10, 12)}, "x: expected shape"), ({"x": randn(4)}, "x: expected"),
        ({"projection": randn(16, 16, 3, 3)}, "projection: expected shape"),
        ({"projection": randn(15, 16, 1, 1)}, "projection: expected shape"),
        ({"weight": randn(16, 16, 2, 2)}, "weight: expected .* K odd"),
        ({"projection": randn(16, 16, 1, 1), "projection_bias": randn(3)}, "projection_bias"),
        ({"projection": randn(16, 4, 2, 2)}, "projection: expected"),
        ({"projection": randn(16, 16)}, "projection: expected"),
        ({"projection": randn(16, 16, 1, 1), "projection_bias": randn(1)}, "projection_bias"),
        ({"projection_bias": randn(16)}, "projection_bias: expected beside a projection"),
        ({"bias": randn(1)}, "bias: expected"), ({"weight": randn(16, 16, 1, 3)}, "weight: exp"),
    ],
)  # fmt: skip
def test_errors_of_residual(change, message):
    given = dict(zip(("h", "x", "weight", "bias"), residual("identity"), strict=True))
    with pytest.raises(ValueError, match=message):
        genfast.residual_conv2d(**{**given, **change})


def test_an_image_of_one_channel_keeps_its_order():
    """It is of both orders at once: by strides, as PyTorch decides, a `view` of the result too."""
    for x in (randn(8, 1, 28, 28), randn(8, 1, 28, 28).to(memory_format=INNER)):
        for weight in (randn(16, 1, 3, 3), randn(16, 1, 3, 3).to(memory_format=INNER)):
            got, want = (f(x, weight, padding=1) for f in (genfast.conv2d, F.conv2d))
            assert got.stride() == want.stride()
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="bias"):
        genfast.conv2d(randn(2, 16, 9, 9).to(memory_format=INNER), randn(1, 16, 3, 3),
                       torch.tensor(1.0), padding=1)  # fmt: skip
