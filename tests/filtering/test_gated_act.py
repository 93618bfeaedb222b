"""gated_act against the reference in fp64: values, gradients of any order, transforms, errors."""

import pytest
import torch
from tolerances import REORDERED, yardstick
from torch.autograd import gradcheck, gradgradcheck

import genfast
from genfast.reference import filtering as reference
from genfast.reference.filtering import GATES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rows of whole vectors and not, longer than a piece of 1024, enough for two threads; nothing.
SHAPES = {
    "vectors": (3, 5, 64), "odd": (7, 2 * 33), "one": (2,), "long": (3, 2 * 1500),
    "threads": (300, 2 * 384), "no rows": (0, 8), "no channels": (3, 0),
}  # fmt: skip


def randn(*shape, seed=1, dtype=torch.float32):
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def run(function, x, act, dtype):
    """The value without a graph, the same with one, and the gradient."""
    leaf = x.to(dtype).requires_grad_()
    with torch.no_grad():
        alone = function(leaf, act=act)
    y = function(leaf, act=act)
    return alone, y.detach(), *torch.autograd.grad(y, leaf, randn(*y.shape, seed=2).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", GATES)
@pytest.mark.parametrize("name", SHAPES)
def test_value_and_gradient(name, act, dtype):
    x = randn(*SHAPES[name], dtype=dtype)
    got = run(genfast.gated_act, x, act, dtype)
    eager = run(reference.gated_act, x, act, dtype)
    exact = run(reference.gated_act, x, act, torch.float64)
    assert torch.equal(got[0], got[1]) and got[0].dtype == dtype
    for i, values in enumerate(zip(got, eager, exact, strict=True)):
        yardstick(f"{name} {act} {i}", *values, kind="output" if i < 2 else "gradient")


@pytest.mark.parametrize("half", [1, 4, 16, 63, 64, 65, 1025])
def test_short_rows_are_as_alone(half):
    x, g = randn(700, 2 * half), randn(700, half, seed=2)

    def run(at):
        given = x[at].clone().requires_grad_()
        y = genfast.gated_act(given)
        return y, *torch.autograd.grad(y, given, g[at])

    whole = run(slice(None))
    for b in (0, 1, 41, 511, 512, 699):
        for alone, all_of_them in zip(run(slice(b, b + 1)), whole, strict=True):
            assert torch.equal(alone[0], all_of_them[b])


def test_far_arguments_stay_finite():
    x = torch.tensor([-1e4, -200.0, 200.0, 1e4, 1.0, 2.0, 3.0, 1.0]).requires_grad_()
    for act in ("sigmoid", "swish", "gelu", "gelu_tanh"):
        y = genfast.gated_act(x, act)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert y.isfinite().all() and dx.isfinite().all(), act
        torch.testing.assert_close(y, reference.gated_act(x, act=act))


def test_silu_is_swish():
    x = randn(3, 8)
    assert torch.equal(genfast.gated_act(x, "silu"), genfast.gated_act(x, "swish"))


def test_threads_change_no_bit():
    x, found = randn(*SHAPES["threads"]), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(genfast.gated_act, x, "gelu_tanh", torch.float32))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("act", GATES)
def test_gradients_of_any_order(act):
    x = randn(3, 8).double().requires_grad_()
    assert gradcheck(lambda x: genfast.gated_act(x, act), x, check_forward_ad=True)
    assert gradgradcheck(lambda x: genfast.gated_act(x, act), x)


def test_the_kernels_gradient_has_a_gradient():
    x = randn(4, 64).requires_grad_()
    ours, plain = (
        torch.autograd.grad(
            torch.autograd.grad(f(x, act="swish").square().sum(), x, create_graph=True)[0].sum(), x
        )[0]
        for f in (genfast.gated_act, reference.gated_act)
    )
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_strides_transforms_and_compiled():
    x = randn(4, 6, 64)
    want = reference.gated_act(x, act="gelu")
    torch.testing.assert_close(
        genfast.gated_act(x.mT.contiguous().mT, "gelu"), want, **REORDERED[torch.float32]
    )
    torch.testing.assert_close(
        torch.vmap(lambda v: genfast.gated_act(v, "gelu"))(x), want, **REORDERED[torch.float32]
    )
    leaf = x.clone().requires_grad_()
    y = torch.compile(lambda v: genfast.gated_act(v, "gelu"), fullgraph=True)(leaf)
    torch.testing.assert_close(y, want, **REORDERED[torch.float32])
    (got,) = torch.autograd.grad(y.sum(), leaf)
    (plain,) = torch.autograd.grad(reference.gated_act(leaf, act="gelu").sum(), leaf)
    torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(torch.ops.genfast.gated_act.default, (leaf, 9))


def test_errors():
    with pytest.raises(TypeError, match="x: expected a torch.Tensor"):
        genfast.gated_act([1.0, 2.0])
    with pytest.raises(TypeError, match="x: expected dtype"):
        genfast.gated_act(torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x: expected \(\.\.\., 2 H\), .* got shape \(3, 5\)"):
        genfast.gated_act(torch.ones(3, 5))
    with pytest.raises(ValueError, match="x: expected"):
        genfast.gated_act(torch.ones(()))
    with pytest.raises(ValueError, match="act: expected one of"):
        genfast.gated_act(torch.ones(4), "lrelu")
