"""bernoulli_nll against F.binary_cross_entropy_with_logits in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import REORDERED, on_both_roads, yardstick
from torch.autograd import gradcheck, gradgradcheck

import genfast

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def draw(*shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    return (3 * torch.randn(shape, generator=g)).to(dtype), torch.rand(shape, generator=g).to(dtype)


def truth(logits, x):
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)


def run(function, tensors, grad, dtype):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    y = on_both_roads(function, *leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(128, 784), (3, 1, 28, 28), (5, 3), (2, 40000), (1, 1)])
def test_value_and_gradients(shape, dtype):
    tensors, grad = draw(*shape, dtype=dtype), torch.linspace(-1, 2, shape[0])
    got = run(genfast.bernoulli_nll, tensors, grad, dtype)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    wide = [t.float() for t in tensors]
    eager = run(truth, wide, grad, torch.float32)
    exact = run(truth, wide, grad, torch.float64)
    for i, values in enumerate(zip(got, eager, exact, strict=True)):
        yardstick(f"tensor {i}", *values, kind="gradient" if i else "output")


def test_sums_of_long_samples():
    """Of equal terms each partial sum rounds the same way: in fp32 2^22 of them were 2e-5 off."""
    logits, n = torch.zeros(1, 1).expand(2, 1 << 22), 1 << 22
    found = genfast.bernoulli_nll(logits, logits).double()
    assert ((found / (n * math.log(2)) - 1).abs() < 1e-6).all()


@pytest.mark.parametrize("pixels", [1, 7, 16, 33, 508, 600])
def test_short_samples_are_as_alone(pixels):
    logits, x = draw(1100, pixels)
    g, _ = draw(1100)

    def run(at):
        inputs = [t[at].clone().requires_grad_() for t in (logits, x)]
        nll = genfast.bernoulli_nll(*inputs)
        return nll, *torch.autograd.grad(nll, inputs, g[at])

    whole = run(slice(None))
    for b in (0, 1, 41, 1023, 1024, 1099):
        for alone, all_of_them in zip(run(slice(b, b + 1)), whole, strict=True):
            assert torch.equal(alone[0], all_of_them[b])


def test_strides_and_extremes():
    logits, x = draw(6, 40)
    want = genfast.bernoulli_nll(logits, x)
    torch.testing.assert_close(genfast.bernoulli_nll(logits.T.contiguous().T, x), want)
    far = torch.tensor([[1e4, -1e4], [1e4, -1e4]])
    assert genfast.bernoulli_nll(far, torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist() == [0.0, 2e4]
    never = torch.tensor([[float("inf")]] * 2)  # e^-inf of x = 0, and of a half
    assert genfast.bernoulli_nll(never, torch.tensor([[0.0], [0.5]])).tolist() == [float("inf")] * 2
    assert genfast.bernoulli_nll(torch.full((1, 2), float("nan")), torch.zeros(1, 2)).isnan().all()
    of_gpu = torch.tensor([[0x7FFFFFFF, 0]], dtype=torch.int32).view(torch.float32).requires_grad_()
    nll = genfast.bernoulli_nll(of_gpu, torch.zeros(1, 2))
    assert nll.isnan().all() and torch.autograd.grad(nll, of_gpu)[0].isnan().tolist() == [
        [True, False]
    ]
    assert genfast.bernoulli_nll(logits[:0], x[:0]).shape == (0,)
    assert genfast.bernoulli_nll(logits[:, :0], x[:, :0]).tolist() == [0.0] * 6


def test_threads_change_no_bit():
    tensors, found = draw(64, 784), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(genfast.bernoulli_nll, tensors, torch.ones(64), torch.float32))
    for other in found[1:]:
        assert all(torch.equal(p, q) for p, q in zip(found[0], other, strict=True))


def test_gradients_of_any_order():
    tensors = [t.double().requires_grad_() for t in draw(3, 4)]
    assert gradcheck(genfast.bernoulli_nll, tensors, check_forward_ad=True)
    assert gradgradcheck(genfast.bernoulli_nll, tensors)

    def second(f, dtype):
        logits, x = (t.to(dtype).requires_grad_() for t in draw(4, 30))
        (d,) = torch.autograd.grad(f(logits, x).sum(), logits, create_graph=True)
        return torch.autograd.grad(d.square().sum(), (logits, x))

    for a, e in zip(
        second(genfast.bernoulli_nll, torch.float32), second(truth, torch.float64), strict=True
    ):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


def test_tracing_and_backends():
    tensors, grad = draw(4, 30), torch.linspace(-1, 2, 4)
    compiled = torch.compile(genfast.bernoulli_nll, fullgraph=True, backend="aot_eager")
    want = run(genfast.bernoulli_nll, tensors, grad, torch.float32)
    with genfast.backend("reference"):
        plain = run(genfast.bernoulli_nll, tensors, grad, torch.float32)
    for got in (run(compiled, tensors, grad, torch.float32), plain):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, **REORDERED[torch.float32])
    torch.library.opcheck(
        torch.ops.genfast.bernoulli_nll.default, tuple(t.requires_grad_() for t in tensors)
    )


@pytest.mark.parametrize(
    ("error", "message", "args"),
    [
        (TypeError, "logits: ", ([1.0], torch.zeros(1))),
        (TypeError, "x: ", (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64))),
        (ValueError, "x: expected the shape of logits", (torch.zeros(2, 3), torch.zeros(3))),
        (ValueError, "logits: ", (torch.zeros(()), torch.zeros(()))),
    ],
)
def test_wrong_input_names_the_argument(error, message, args):
    with pytest.raises(error, match=message):
        genfast.bernoulli_nll(*args)
