"""upsampled_conv2d and residual_conv2d against the reference in fp64, on each of their roads."""

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
# channels of h, of x, of the result, side of the kernel; whether x is projected
BLOCKS = {
    "identity": (16, 16, 16, 3, False), "projected": (16, 48, 16, 3, True),
    "to one": (16, 8, 1, 3, True), "wide kernel": (8, 12, 20, 5, True),
}  # fmt: skip


def randn(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def upsampled(shape, outputs, layout=INNER, dtype=torch.float32):
    x = randn(*shape, dtype=dtype).contiguous(memory_format=layout)
    weight = randn(outputs, shape[1], 3, 3, seed=2, dtype=dtype)
    return x, weight.contiguous(memory_format=layout), randn(outputs, seed=3, dtype=dtype)


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


def test_the_fewer_products_are_taken(monkeypatch):
    """And neither by the reference, nor in the layout and the dtypes that were not measured."""
    seen = []
    monkeypatch.setattr(
        upsampled_op.F, "conv_transpose2d", lambda *a, **k: seen.append(1) or torch.zeros(1)
    )
    x, weight, bias = upsampled(*SHAPES["images"])
    genfast.upsampled_conv2d(x, weight, bias)
    assert seen == [1]
    with genfast.backend("reference"):
        genfast.upsampled_conv2d(x, weight, bias)
    genfast.upsampled_conv2d(x.contiguous(), weight, bias)
    genfast.upsampled_conv2d(x.double(), weight.double(), bias.double())
    genfast.upsampled_conv2d(*upsampled(*SHAPES["small"]))
    with torch.autocast("cpu", torch.bfloat16):
        genfast.upsampled_conv2d(x, weight, bias)
    assert seen == [1]


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
    ],
)  # fmt: skip
def test_errors_of_residual(change, message):
    given = dict(zip(("h", "x", "weight", "bias"), residual("identity"), strict=True))
    with pytest.raises(ValueError, match=message):
        genfast.residual_conv2d(**{**given, **change})
