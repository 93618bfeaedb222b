"""linear and nn.Linear against PyTorch in fp64, by the kernels on any processor."""

import copy
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tolerances import yardstick

import genfast
from genfast.nn import Linear

module = sys.modules["genfast.ops.linear"]  # the function of the same name hides it
# x, and output features; "little" has too few products
SHAPES = {
    "rows": ((160, 192), 144), "three": ((4, 50, 192), 112), "tall": ((4100, 40), 32),
    "small": ((20, 601), 203), "little": ((8, 20), 30), "one row": ((1, 2048), 2100),
    "vector": ((2048,), 2100), "none": ((0, 64), 32),
}  # fmt: skip


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Also where MKL would be the faster one."""
    for name, value in {
        "_AMD": True, "_WIDE": True, "_MOST": sys.maxsize, "_LEAST_WEIGHTS": (1 << 15,) * 2,
        "_LEAST_COLUMNS": 1,
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)


def randn(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def given(name, dtype=torch.float32):
    shape, outputs = SHAPES[name]
    weight = randn(outputs, shape[-1], seed=2, dtype=dtype)
    return [randn(*shape, dtype=dtype), weight, randn(outputs, seed=3, dtype=dtype)]


def run(function, tensors, dtype=torch.float32):
    """The value without a graph, the same with one, and the gradients by every tensor."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    with torch.no_grad():
        alone = function(*leaves)
    y = function(*leaves)
    return [alone, y.detach(), *torch.autograd.grad(y, leaves, randn(*y.shape, seed=9).to(dtype))]


def relu_linear(*tensors):
    return F.relu(F.linear(*tensors))


ACTS = {"linear": F.linear, "relu": relu_linear}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients(name, biased, act):
    tensors = given(name)[: 3 if biased else 2]
    ours, plain = run(partial(genfast.linear, act=act), tensors), run(ACTS[act], tensors)
    assert torch.equal(ours[0], ours[1])
    for i, three in enumerate(
        zip(ours, plain, run(ACTS[act], tensors, torch.float64), strict=True)
    ):
        assert three[0].stride() == three[1].stride()
        yardstick(f"{name}, tensor {i}", *three, kind="output" if i < 2 else "gradient")


@pytest.fixture
def taken(monkeypatch):
    """Calls of each product since it was last asked."""
    calls = {"linear": 0, "linear_weight": 0}

    def count(name):
        found = getattr(module.kernels, name)

        def call(*args):
            done = found(*args)
            calls[name] += done
            return done

        monkeypatch.setattr(module.kernels, name, call)

    for name in calls:
        count(name)

    def ask():
        found = {name: n for name, n in calls.items() if n}
        calls.update(dict.fromkeys(calls, 0))
        return found

    return ask


def test_the_faster_product_is_taken(taken, monkeypatch):
    """And not for few products, other dtypes, by the reference, or where it is off."""
    x, weight, bias = given("tall")
    genfast.linear(x, weight, bias)
    assert taken() == {"linear": 1}
    for name in ("tall", "rows", "small"):
        leaves = [t.requires_grad_() for t in given(name)]
        for act in ACTS:
            genfast.linear(*leaves, act=act).square().sum().backward()
            assert taken() == {"linear": 2, "linear_weight": 1}
    genfast.linear(*given("little"))
    genfast.linear(*given("rows", torch.float64))
    genfast.linear(*given("rows", torch.bfloat16))
    with genfast.backend("reference"):
        genfast.linear(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        genfast.linear(x, weight, bias)
    monkeypatch.setattr(module, "_WIDE", False)
    monkeypatch.setattr(module, "_MOST", 0)
    genfast.linear(x, weight, bias)
    genfast.linear(*given("rows"))
    assert taken() == {}


def test_rows_of_zen_3_have_a_limit(taken, monkeypatch):
    """Up to 96 of them, and without a graph: the node would cost what the product gains."""
    monkeypatch.setattr(module, "_WIDE", False)
    monkeypatch.setattr(module, "_MOST", 96)
    x, weight = randn(97, 256), randn(256, 256)
    for rows in (32, 96):
        yardstick("some rows", genfast.linear(x[:rows], weight), F.linear(x[:rows], weight),
                  F.linear(x[:rows].double(), weight.double()))  # fmt: skip
        assert taken() == {"linear": 1}
    genfast.linear(x, weight)
    genfast.linear(x[:31], weight)  # too little
    genfast.linear(x[:32].requires_grad_(), weight).sum().backward()
    assert taken() == {}


def test_few_rows_of_zen_4_have_limits_of_their_own(taken, monkeypatch):
    """One row has twice the weights; short columns are PyTorch's."""
    monkeypatch.setattr(module, "_LEAST_WEIGHTS", (1 << 17, 1 << 16))
    monkeypatch.setattr(module, "_LEAST_COLUMNS", 256)
    for rows, columns, outputs in ((1, 256, 512), (2, 256, 256), (16, 512, 128)):
        genfast.linear(randn(rows, columns), randn(outputs, columns))
        assert taken() == {"linear": 1}
    for rows, columns, outputs in ((1, 256, 256), (2, 240, 256), (16, 128, 512)):
        genfast.linear(randn(rows, columns), randn(outputs, columns))
        assert taken() == {}


def test_the_kernel_for_few_rows_is_taken(taken, monkeypatch):
    x, weight, bias = given("one row")
    genfast.linear(x, weight, bias)
    genfast.linear(x[0], weight)
    genfast.linear(x.expand(16, -1)[:, None], weight, act="relu")
    assert taken() == {"linear": 3}
    genfast.linear(*given("little"))
    genfast.linear(x.double(), weight.double())
    genfast.linear(x, weight[:8])
    genfast.linear(x[:, :256].requires_grad_(), weight[:, :256])  # too little for a node
    with genfast.backend("reference"):
        genfast.linear(x, weight, bias)
    monkeypatch.setattr(module, "_MOST", 0)  # Zen 4
    genfast.linear(x.expand(17, -1), weight)
    monkeypatch.setattr(module, "_AMD", False)
    genfast.linear(x, weight, bias)
    assert taken() == {}


@torch.no_grad()
@pytest.mark.parametrize("rows", [16, 90, 700])
@pytest.mark.parametrize("outputs", [2048, 2051])
def test_a_row_does_not_see_the_others(outputs, rows):
    x, weight, bias = randn(rows, 64), randn(outputs, 64, seed=2), randn(outputs, seed=3)
    whole, before = genfast.linear(x, weight, bias), torch.get_num_threads()
    three = [t.double() for t in (x, weight, bias)]
    yardstick("few rows", whole, F.linear(x, weight, bias), F.linear(*three))
    # By one kernel: the one for up to 16 rows adds in another order.
    few, many = [slice(0, 1), slice(3, 8), slice(2, 16)], [slice(0, 17), slice(9, rows)]
    for part in few if rows == 16 else many:
        for threads in (1, 2, 3, 40):  # of so many some take a part of the outputs
            torch.set_num_threads(threads)
            assert torch.equal(genfast.linear(x[part], weight, bias), whole[part])
    torch.set_num_threads(before)


def test_strides_of_every_kind():
    x, weight, bias = given("rows")
    for x_of, weight_of in (
        (x.t().contiguous().t(), weight), (x, weight.t().contiguous().t()),
        (x[::2], weight[::2]), (x[:1].expand(160, -1), weight), (x, weight[:, :1].expand(-1, 192)),
        (torch._neg_view(x), weight),
    ):  # fmt: skip
        b = bias[: len(weight_of)]
        tensors = [x_of, weight_of, b]
        for got, want in zip(run(genfast.linear, tensors), run(F.linear, tensors), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    ours, plain = genfast.linear(*leaves), F.linear(*leaves)
    for grad in (torch.ones(()).expand_as(ours), randn(144, 160).t()):
        got, want = (torch.autograd.grad(y, leaves, grad, retain_graph=True) for y in (ours, plain))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_relu_is_torchs_at_the_edges():
    """A NaN stays one, and a gradient is 0 at 0."""
    x, weight, bias = given("rows")
    x[3, 5], weight[7], bias[7] = float("nan"), 0.0, 0.0
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    pairs = run(partial(genfast.linear, act="relu"), leaves), run(relu_linear, leaves)
    for got, want in zip(*pairs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3, equal_nan=True)


def test_the_bias_may_lie_anywhere():
    """Not only side by side."""
    for name in ("tall", "rows", "small", "one row"):
        x, weight, bias = given(name)
        N = len(bias)
        for lies in (randn(N, 3)[:, 1], torch.full((1,), 0.5).expand(N), randn(2 * N)[::2],
                     torch._neg_view(bias)):  # fmt: skip
            got, want = genfast.linear(x, weight, lies), F.linear(x, weight, lies)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
        for shape in ((1,), (1, N)):  # F.linear's, which adds what broadcasts
            b = randn(*shape)
            got, want = genfast.linear(x, weight, b), F.linear(x, weight, b)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_another_device_is_torchs_error():
    """It was a result that nobody had written."""
    x, weight, bias = given("rows")
    with pytest.raises(RuntimeError, match="meta"):
        genfast.linear(x, weight, bias.to("meta"))


@torch.no_grad()
def test_batches_of_changing_lengths_keep_no_memory():
    """oneDNN keeps 0.7 MB for every number of rows."""
    resource = pytest.importorskip("resource")
    weight = randn(512, 512)
    genfast.linear(randn(900, 512), weight)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for rows in range(300, 500):
        genfast.linear(randn(rows, 512), weight)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 40_000  # KiB; there 140,000


def test_the_gradient_of_a_bias_is_exact_for_long_batches():
    g, x = randn(200_000, 16) + 1, randn(200_000, 32)
    dw, db = module.weight_gradient(g, x)
    yardstick("dw", dw, g.t() @ x, g.t().double() @ x.double(), kind="gradient")
    yardstick("db", db, g.sum(0), g.double().sum(0), kind="gradient")


def test_rows_that_overlap():
    x = randn(64, 256)
    weight = randn(776).as_strided((512, 256), (1, 1)).requires_grad_()
    got, want = (
        torch.autograd.grad(f(x, weight).sum(), weight) for f in (genfast.linear, F.linear)
    )
    torch.testing.assert_close(*got, *want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["tall", "three", "small"])
def test_the_result_may_change_in_place(name):
    """As nn.ReLU(inplace=True) does."""
    leaves, others = ([t.requires_grad_() for t in given(name)] for _ in range(2))
    with torch.no_grad():
        still = genfast.linear(*leaves)
    assert not still._is_view()
    changed = genfast.linear(*leaves).relu_()
    got = torch.autograd.grad(changed.sum(), leaves)
    want = torch.autograd.grad(F.relu(F.linear(*others)).sum(), others)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("act", ACTS)
def test_gradients_of_any_order(act):
    def second(function):
        leaves = [t.requires_grad_() for t in given("three")]
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    ours, plain = partial(genfast.linear, act=act), ACTS[act]
    for got, want in zip(second(ours), second(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    leaves = [t.requires_grad_() for t in given("rows")]
    some = torch.stack([randn(160, 144, seed=5), randn(160, 144, seed=6)])
    got, want = (
        torch.autograd.grad(function(*leaves), leaves, some, is_grads_batched=True)
        for function in (ours, plain)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_under_transforms_and_compiled():
    x, weight, bias = given("rows")
    some = torch.stack([x, 2 * x])
    call = partial(genfast.linear, weight=weight, bias=bias)
    torch.testing.assert_close(torch.vmap(call)(some), call(some), rtol=1e-4, atol=1e-4)
    _, tangent = torch.func.jvp(call, (x,), (x,))
    torch.testing.assert_close(tangent, x @ weight.t(), rtol=1e-4, atol=1e-4)
    got = torch.compile(call, fullgraph=True)(x)
    torch.testing.assert_close(got, call(x), rtol=1e-4, atol=1e-4)


def test_the_module_is_torchs():
    ours, torchs = Linear(192, 144), torch.nn.Linear(192, 144)
    torchs.load_state_dict(ours.state_dict())
    x = given("three")[0]
    torch.testing.assert_close(ours(x), torchs(x), rtol=1e-4, atol=1e-4)
    assert repr(ours) == repr(torchs)
    active = Linear(192, 144, act="relu")
    active.load_state_dict(torchs.state_dict())
    torch.testing.assert_close(active(x), torchs(x).relu(), rtol=1e-4, atol=1e-4)
    assert "act=relu" in repr(active) and torch.equal(copy.deepcopy(active)(x), active(x))
    for wrong in (Linear, partial(genfast.linear, given("little")[0])):
        with pytest.raises(ValueError, match="act: expected"):
            wrong(20, 30, act="gelu")


@pytest.mark.parametrize(
    "change",
    [{"input": None}, {"input": randn(160, 191)}, {"input": randn(160, 192, dtype=torch.float64)},
     {"weight": randn(4, 144, 192)}, {"bias": randn(143)}, {"weight": 2.0}],
    ids=lambda change: "-".join(change),
)  # fmt: skip
def test_errors_are_torchs(change):
    tensors = dict(zip(("input", "weight", "bias"), given("rows"), strict=True)) | change
    with pytest.raises((TypeError, RuntimeError)) as want:
        F.linear(*tensors.values())
    with pytest.raises(want.type) as got:
        genfast.linear(*tensors.values())
    assert str(got.value) == str(want.value)


def test_threads_change_no_bit_of_the_weights_gradient():
    x, weight, bias = given("tall")
    before, seen = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        seen.append(run(genfast.linear, [x, weight, bias])[3:])
    torch.set_num_threads(before)
    assert all(torch.equal(*pair) for s in seen[1:] for pair in zip(s, seen[0], strict=True))
