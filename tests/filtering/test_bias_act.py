"""bias_act against its reference in fp64: values, gradients of any order, noise, errors."""

import math

import pytest
import torch
from tolerances import REORDERED, on_both_roads, yardstick
from torch.autograd import gradcheck, gradgradcheck

import genfast
from genfast.reference import filtering as reference
from genfast.reference.filtering import ACTIVATIONS

SEED = 11
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# shape, dim, and why it is there
SHAPES = {
    "images": ((2, 5, 7, 9), 1),
    "rows": ((3, 17), 1),
    "channels last": ((2, 3, 4, 6), 3),
    "channels first": ((4, 30), 0),
    "threads": ((4, 8, 65, 33), 1),
    "one": ((1, 1, 1, 1), 1),
    "no samples": ((0, 3, 4, 4), 1),
}


def randn(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def defaults(act, **given):
    found = ACTIVATIONS[act]
    return {"act": act, "alpha": found.alpha, "gain": found.gain, "clamp": None} | given


def run(function, tensors, grad, dtype, **options):
    """y and the gradients by every tensor."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    y = on_both_roads(function, *leaves, **options)
    given = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, given, grad.to(y.dtype))]


def ours(x, b, noise=None, strength=None, **options):
    return genfast.bias_act(x, b, noise=noise, strength=strength, **options)


def truth(x, b, noise=None, strength=1.0, **options):
    return reference.bias_act(x, b, noise, strength, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("clamp", [None, 0.7])
def test_value_and_gradients(act, dtype, clamp):
    tensors = [randn(4, 6, 9, 11, dtype=dtype), randn(6, seed=2, dtype=dtype)]
    grad = randn(4, 6, 9, 11, seed=3, dtype=dtype)
    options = defaults(act, dim=1, clamp=clamp)
    got = run(ours, tensors, grad, dtype, **options)
    eager = run(truth, tensors, grad, dtype, **options)
    exact = run(truth, tensors, grad, torch.float64, **options)
    for name, kind, *values in zip(
        ("y", "dx", "db"), ("output", "gradient", "gradient"), got, eager, exact, strict=True
    ):
        if clamp is not None and dtype != torch.float32 and name != "y":
            continue  # at the bound the sides differ by rounding: see the next test
        yardstick(f"{act} {name}", *values, kind=kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_clamped_element_has_no_gradient(dtype):
    x = torch.tensor([[-3.0, -0.5, 0.25, 0.5, 3.0]], dtype=dtype).requires_grad_()
    y = genfast.bias_act(x, dim=1, act="linear", gain=2.0, clamp=1.0)
    assert torch.equal(y.detach(), torch.tensor([[-1.0, -1.0, 0.5, 1.0, 1.0]], dtype=dtype))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.tensor([[0.0, 0.0, 2.0, 0.0, 0.0]], dtype=dtype))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_shapes_and_memory_orders(name, act):
    shape, dim = SHAPES[name]
    options = defaults(act, dim=dim)
    x, b, grad = randn(*shape), randn(shape[dim], seed=2), randn(*shape, seed=3)
    orders = [x, torch.stack([x, x], -1)[..., 0]]
    if len(shape) == 4:
        orders.append(x.contiguous(memory_format=torch.channels_last))
    exact = run(truth, [x, b], grad, torch.float64, **options)
    for laid in orders:
        got = run(ours, [laid, b], grad, torch.float32, **options)
        for a, e in zip(got, exact, strict=True):
            torch.testing.assert_close(a, e.float(), rtol=2e-5, atol=2e-5)
    assert genfast.bias_act(orders[-1], b, dim=dim).stride() == orders[-1].stride() or name in (
        "rows", "channels first", "channels last", "one",
    )  # fmt: skip


def test_relu_lets_the_gradient_of_nan_through():
    """As PyTorch's does."""
    x = torch.tensor([[math.nan, -1.0, 2.0]], requires_grad=True)
    genfast.bias_act(x, act="relu", gain=1.0).sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_bias_alone_is_pytorchs_sum(dim, dtype):
    """As far as that has no other result: not of two dtypes, nor with a gain, nor on demand."""
    order = torch.channels_last if dim == 1 else torch.contiguous_format
    x = randn(6, 5, 3, 4, dtype=dtype).contiguous(memory_format=order).requires_grad_()
    b = randn(x.shape[dim], seed=2, dtype=dtype).requires_grad_()
    y, kernels = genfast.bias_act(x, b, dim=dim), genfast.bias_act(x, b, dim=dim, backend="cpu")
    assert torch.equal(y, kernels) and y.stride() == x.stride()
    others = [genfast.bias_act(x, b, dim=dim, gain=2.0), genfast.bias_act(x, b.double(), dim=dim)]
    sums = ["Add" in type(t.grad_fn).__name__ for t in (y, kernels, *others)]
    assert sums == [True, False, False, False] and all(t.dtype == dtype for t in others)
    with pytest.raises(TypeError, match="alpha"):
        genfast.bias_act(x, b, dim=dim, alpha="0.2")


def test_threads_change_no_bit():
    shape, dim = SHAPES["threads"]
    x, b = randn(*shape), randn(shape[dim], seed=2)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(ours, [x, b], x, torch.float32, **defaults("lrelu")))
    for other in found[1:]:
        assert all(torch.equal(p, q) for p, q in zip(found[0], other, strict=True))


# ---- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 1, 5, 6), (1, 1, 5, 6), (5, 6), (3, 1, 1, 1)])
@pytest.mark.parametrize("act", ["lrelu", "tanh"])
def test_given_noise(shape, act):
    tensors = [randn(3, 4, 5, 6), randn(4, seed=2), randn(*shape, seed=4), torch.tensor(0.3)]
    grad, options = randn(3, 4, 5, 6, seed=3), defaults(act)
    got = run(ours, tensors, grad, torch.float32, **options)
    exact = run(truth, tensors, grad, torch.float64, **options)
    for a, e in zip(got, exact, strict=True):
        torch.testing.assert_close(a, e.float(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("act", ["lrelu", "tanh"])
@pytest.mark.parametrize("seed", [SEED, "one a sample"])
def test_drawn_noise_is_the_contracts(act, seed):
    """As with genfast.randn's tensor; the gradient of the strength too."""
    if seed != SEED:
        seed = torch.tensor([5, 2**40, 7])
    tensors = [randn(3, 4, 5, 6), randn(4, seed=2), torch.tensor(0.3)]
    grad = randn(3, 4, 5, 6, seed=3)
    noise = genfast.randn(3, 1, 5, 6, seed=seed, stream=9)

    def drawn(x, b, strength):
        return genfast.bias_act(x, b, act=act, strength=strength, seed=seed, stream=9)

    def given(x, b, strength):
        return genfast.bias_act(x, b, act=act, strength=strength, noise=noise)

    for a, b in zip(
        run(drawn, tensors, grad, torch.float32), run(given, tensors, grad, torch.float32),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_samples_noise_depends_on_its_seed_alone():
    x, seeds = randn(4, 3, 5, 5), torch.tensor([3, 1, 4, 15])
    whole = genfast.bias_act(x, strength=0.5, seed=seeds)
    order = torch.tensor([2, 0, 3])
    assert torch.equal(genfast.bias_act(x[order], strength=0.5, seed=seeds[order]), whole[order])


def test_without_a_seed_torchs_generator_draws():
    x = randn(2, 3, 5, 5)
    torch.manual_seed(1)
    first = genfast.bias_act(x, strength=1.0)
    assert not torch.equal(genfast.bias_act(x, strength=1.0), first)
    torch.manual_seed(1)
    assert torch.equal(genfast.bias_act(x, strength=1.0), first)


# ---- gradients of any order ----------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck_in_fp64(act):
    x, b = randn(2, 3, 4).double().requires_grad_(), randn(3, seed=2).double().requires_grad_()
    s = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def f(x, b, s):
        return genfast.bias_act(x, b, act=act, strength=s, seed=SEED)

    assert gradcheck(f, (x, b, s), check_forward_ad=True)
    assert gradgradcheck(f, (x, b, s))


@pytest.mark.parametrize("act", ["linear", "relu", "swish"])
@pytest.mark.parametrize("shape", [(3,), (0,), (1,)])
def test_a_differentiable_gradient_of_channels_alone(shape, act):
    x, b = (randn(*shape, seed=i).requires_grad_() for i in (1, 2))
    y = genfast.bias_act(x, b, dim=0, act=act)
    want = torch.autograd.grad(y, (x, b), torch.ones_like(y), retain_graph=True)
    got = torch.autograd.grad(y, (x, b), torch.ones_like(y), create_graph=True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("clamp", [None, 0.9])
def test_second_and_third_order_of_the_kernel(act, clamp):
    """fp32 on the kernel against the reference in fp64, by the same three sums."""
    tensors = [randn(2, 3, 4, 5), randn(3, seed=2), torch.tensor(0.4)]
    noise = genfast.randn(2, 1, 4, 5, seed=SEED)
    weights = randn(2, 3, 4, 5, seed=7)

    def orders(f, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        g = weights.to(dtype).requires_grad_()
        y = f(*leaves)
        found = []
        grads = torch.autograd.grad(y, leaves, g, create_graph=True)
        for _ in range(2):
            found += [d.detach() for d in grads]
            total = sum(d.square().sum() for d in grads)
            grads = torch.autograd.grad(
                total, [*leaves, g], create_graph=True, allow_unused=True, materialize_grads=True
            )
        return found + [d.detach() for d in grads]

    def kernel(x, b, s):
        return genfast.bias_act(x, b, act=act, strength=s, seed=SEED, clamp=clamp)

    def exact(x, b, s):
        return reference.bias_act(x, b, noise.double(), s, **defaults(act, clamp=clamp))

    for i, (a, e) in enumerate(
        zip(orders(kernel, torch.float32), orders(exact, torch.float64), strict=True)
    ):
        scale = max(1.0, e.abs().max().item())
        torch.testing.assert_close(a.double() / scale, e / scale, rtol=1e-4, atol=2e-5, msg=str(i))


def test_forward_mode_and_vmap():
    x, b, t = randn(2, 3, 4), randn(3, seed=2), randn(2, 3, 4, seed=4)
    f = lambda x: genfast.bias_act(x, b, act="lrelu")  # noqa: E731
    _, dy = torch.func.jvp(f, (x,), (t,))
    slope = torch.where(x + b[:, None] > 0, 1.0, 0.2) * 2**0.5
    torch.testing.assert_close(dy, slope * t)
    torch.testing.assert_close(torch.vmap(f)(torch.stack([x, t])), torch.stack([f(x), f(t)]))


# ---- tracing -------------------------------------------------------------------------------------


def test_compile_is_the_same_with_its_gradients():
    tensors, grad = [randn(3, 4, 5, 6), randn(4, seed=2), torch.tensor(0.3)], randn(3, 4, 5, 6)

    def f(x, b, s):
        return genfast.bias_act(x, b, act="lrelu", strength=s, seed=SEED)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        run(compiled, tensors, grad, torch.float32), run(f, tensors, grad, torch.float32),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, **REORDERED[torch.float32])


def test_opcheck():
    x, b = randn(2, 3, 4).requires_grad_(), randn(3, seed=2).requires_grad_()
    s = torch.tensor(0.5, requires_grad=True)
    args = (x, b, None, s, None, 3, 0, 0, True, 1, 2, 0.2, 1.4, -1.0)
    torch.library.opcheck(torch.ops.genfast.bias_act.default, args)


def test_reference_backend_and_autocast_agree():
    x, b = randn(2, 3, 4, 5), randn(3, seed=2)
    y = genfast.bias_act(x, b, act="swish", strength=0.2, seed=3)
    with genfast.backend("reference"):
        other = genfast.bias_act(x, b, act="swish", strength=0.2, seed=3)
    torch.testing.assert_close(y, other, **REORDERED[torch.float32])
    with torch.autocast("cpu", torch.bfloat16):
        half = genfast.bias_act(x.bfloat16(), b, act="swish")
    assert half.dtype == torch.bfloat16


# ---- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (TypeError, "x: ", ([1.0],), {}),
        (TypeError, "x: ", (torch.zeros(2, 3, dtype=torch.int64),), {}),
        (ValueError, "act: expected", (torch.zeros(2, 3),), {"act": "mish"}),
        (ValueError, "dim: ", (torch.zeros(2, 3),), {"dim": 2}),
        (ValueError, r"b: expected shape \(3,\)", (torch.zeros(2, 3), torch.zeros(2)), {}),
        (ValueError, r"b: expected shape \(4,\)", (torch.zeros(2, 4), torch.zeros(2, 2)), {}),
        (ValueError, "clamp: ", (torch.zeros(2, 3),), {"clamp": -1.5}),
        (ValueError, "clamp: ", (torch.zeros(2, 3),), {"clamp": -1.0}),
        (ValueError, "gain: ", (torch.zeros(2, 3),), {"gain": float("nan")}),
        (ValueError, "alpha: ", (torch.zeros(2, 3),), {"alpha": float("inf"), "act": "lrelu"}),
        (ValueError, "strength: ", (torch.zeros(2, 3),), {"strength": float("nan"), "seed": 1}),
        (TypeError, "gain: ", (torch.zeros(2, 3),), {"gain": "2"}),
        (TypeError, "alpha: ", (torch.zeros(2, 3),), {"alpha": torch.tensor(0.2)}),
        (ValueError, "noise: expected", (torch.zeros(2, 3, 4),), {"noise": torch.zeros(2, 3, 4)}),
        (ValueError, "seed: has no effect", (torch.zeros(2, 3),), {"seed": 3}),
        (ValueError, "seed", (torch.zeros(2, 3),),
         {"strength": 1.0, "seed": torch.tensor([1, 2, 3])}),
    ],
)  # fmt: skip
def test_wrong_input_names_the_argument(error, message, args, options):
    with pytest.raises(error, match=message):
        genfast.bias_act(*args, **options)
