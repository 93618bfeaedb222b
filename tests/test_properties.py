"""Random shapes, strides, dtypes and arguments at every op: the reference's value, or TypeError /
ValueError. Nothing else may happen, least of all to the interpreter."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tolerances import REORDERED

import genfast
from genfast.reference import rng as noise
from genfast.reference import sampling as reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ANY = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
EXAMPLES = settings(max_examples=150)

shapes = st.lists(st.integers(0, 5), max_size=6).map(tuple)
seeds = st.integers(-(2**63), 2**64 - 1)
offsets = st.one_of(st.integers(0, 9), st.integers(0, 2**62))


@st.composite
def layouts(draw, shape, dtype):
    """A tensor of this shape with values near N(0, 1), over memory of any strides."""
    kind = draw(
        st.sampled_from(["dense", "permuted", "sliced", "flipped rows", "expanded", "offset"])
    )
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dims = len(shape)
    if kind == "permuted" and dims:
        order = draw(st.permutations(range(dims)))
        x = torch.randn([shape[i] for i in order], generator=g)
        back = [order.index(i) for i in range(dims)]
        return x.to(dtype).permute(back)
    if kind == "sliced" and dims:
        steps = [draw(st.integers(1, 3)) for _ in shape]
        x = torch.randn([n * s + 1 for n, s in zip(shape, steps, strict=True)], generator=g)
        index = tuple(slice(1, 1 + n * s, s) for n, s in zip(shape, steps, strict=True))
        return x.to(dtype)[index]
    if kind == "expanded" and dims:
        keep = [n if draw(st.booleans()) else 1 for n in shape]
        return torch.randn(keep, generator=g).to(dtype).expand(shape)
    if kind == "offset":
        flat = torch.randn(math.prod(shape) + 3, generator=g)
        return flat.to(dtype)[3:].view(shape)
    x = torch.randn(shape, generator=g)
    if kind == "flipped rows" and dtype == torch.float32:  # a negative view
        return torch.complex(torch.zeros_like(x), x).conj().imag
    return x.to(dtype)


@st.composite
def tensors(draw, dtypes=FLOATS, shape=None):
    shape = draw(shapes) if shape is None else shape
    return draw(layouts(shape, draw(st.sampled_from(dtypes))))


def same(got, expected, dtype):
    limits = REORDERED[dtype] if dtype in REORDERED else {}
    torch.testing.assert_close(got, expected.to(got.dtype), equal_nan=True, **limits)


def wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def contract(x, distribution, seed, stream=0, offset=0):
    return noise.random(tuple(x.shape), distribution, seed, stream, offset, wide(x).dtype)


@EXAMPLES
@given(st.data(), shapes, st.sampled_from(FLOATS), seeds, seeds, offsets)
def test_noise(data, shape, dtype, seed, stream, offset):
    for f, name in ((genfast.rand, "uniform"), (genfast.randn, "normal")):
        expected = noise.random(shape, name, seed, stream, offset, dtype)
        got = f(shape, seed=seed, stream=stream, offset=offset, dtype=dtype)
        assert torch.equal(got, expected)
        out = data.draw(layouts(shape, dtype))
        shared = any(n > 1 and s == 0 for n, s in zip(out.shape, out.stride(), strict=True))
        if shared and out.numel():
            with pytest.raises(ValueError, match="out: expected memory of its own"):
                f(shape, seed=seed, stream=stream, offset=offset, out=out)
        else:
            assert f(shape, seed=seed, stream=stream, offset=offset, out=out) is out
            assert torch.equal(out, expected)
    if shape:
        rows = torch.tensor([(seed + 3 * i) % 2**62 for i in range(shape[0])], dtype=torch.int64)
        got = genfast.randn(shape, seed=rows, stream=stream, offset=offset)
        for b in range(shape[0]):
            one = noise.random(shape[1:], "normal", int(rows[b]), stream, offset)
            assert torch.equal(got[b], one)


@EXAMPLES
@given(st.data(), shapes, seeds, offsets, st.booleans())
def test_gaussians(data, shape, seed, offset, with_grad):
    mu, logvar = data.draw(tensors(shape=shape)), data.draw(tensors(shape=shape))
    reduction = data.draw(st.sampled_from(["none", "sum", "mean", "batchmean"]))
    dtype = torch.promote_types(mu.dtype, logvar.dtype)
    if with_grad:
        mu, logvar = mu.detach().requires_grad_(), logvar.detach().requires_grad_()
    m, v = wide(mu.detach()).double(), wide(logvar.detach()).double()
    eps = contract(m, "normal", seed, 0, offset)
    loose = dtype if dtype != torch.float64 else torch.float32  # mu may be coarser than logvar
    for name, f in (("none", None), ("tanh", genfast.tanh_normal), ("exp", genfast.log_normal)):
        if f is None:
            y, side = genfast.reparameterize(
                mu, logvar, seed=seed, offset=offset, return_kl=True, kl_reduction=reduction
            )
            expected = reference.gaussian_kl(m, v, reduction)
        else:
            y, side = f(mu, logvar, seed=seed, offset=offset, return_log_prob=True)
            expected = reference.log_prob(m, v, eps, name)
        assert y.shape == shape and y.dtype == dtype
        truth = reference.reparameterize(m, v, eps, name)
        if dtype == torch.float16:
            truth = torch.where(truth.abs() > 65000, y.double().detach(), truth)
        same(y.detach(), truth, loose)
        torch.testing.assert_close(side.detach().double(), expected, rtol=1e-3, atol=1e-3)
        if with_grad:
            grads = torch.autograd.grad(y.double().sum() + side.sum(), (mu, logvar))
            assert all(g.shape == shape for g in grads)


@EXAMPLES
@given(st.data(), shapes, seeds, st.floats(0.05, 20), st.booleans(), st.booleans())
def test_relaxed(data, shape, seed, tau, hard, with_grad):
    logits = data.draw(tensors(shape=shape))
    if with_grad:
        logits = logits.detach().requires_grad_()
    x = wide(logits.detach())
    for name, distribution in (("gumbel_softmax", "gumbel"), ("relaxed_bernoulli", "logistic")):
        if name == "gumbel_softmax" and not shape:
            with pytest.raises(ValueError, match="logits"):
                genfast.gumbel_softmax(logits, tau, hard, seed=seed)
            continue
        y = getattr(genfast, name)(logits, tau, hard, seed=seed)
        assert y.shape == shape and y.dtype == logits.dtype
        if not hard:
            truth = getattr(reference, name)(
                x.double(), contract(x.double(), distribution, seed), tau
            )
            torch.testing.assert_close(y.detach().double(), truth, rtol=2e-2, atol=1e-2)
            if logits.dtype == torch.float32:
                torch.testing.assert_close(y.detach().double(), truth, rtol=2e-4, atol=2e-5)
        elif name == "gumbel_softmax" and y.numel():
            assert (y.sum(-1) == 1).all() and ((y == 0) | (y == 1)).all()
        if with_grad:
            (grad,) = torch.autograd.grad(y.double().sum(), logits)
            assert grad.shape == shape and torch.isfinite(grad).all()


@EXAMPLES
@given(
    st.data(),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(1, 40),
    seeds,
    st.one_of(st.just(0.0), st.floats(0.01, 5)),
    st.one_of(st.none(), st.integers(0, 50)),
    st.one_of(st.none(), st.floats(0, 1.2)),
    st.one_of(st.none(), st.floats(0, 1)),
)
def test_tokens(data, lead, vocabulary, seed, temperature, top_k, top_p, min_p):
    logits = data.draw(tensors(dtypes=FLOATS[:3], shape=(*lead, vocabulary)))
    got = genfast.sample_tokens(logits, temperature, top_k, top_p, min_p, seed=seed)
    assert got.shape == tuple(lead) and got.dtype == torch.int64
    if not got.numel():
        return
    flat = wide(logits).reshape(-1, vocabulary)
    picked = got.reshape(-1)
    if temperature == 0:
        assert torch.equal(flat.gather(1, picked[:, None])[:, 0], flat.amax(1))
        return
    rows = len(flat)
    t = torch.tensor(temperature, dtype=torch.float32)
    expand = lambda v: None if v is None else torch.full((rows,), v)  # noqa: E731
    kept = reference.filter_logits(flat * (1 / t), expand(top_k), expand(top_p), expand(min_p))
    gumbel = contract(logits, "gumbel", seed).reshape(-1, vocabulary)
    score = kept + gumbel
    # The reference's choice, or one that an ulp at a filter's edge or in the sum decides.
    expected = score.argmax(1)
    unlike = picked != expected
    assert unlike.sum() <= 1
    assert torch.equal(
        genfast.sample_categorical(logits, seed=seed).reshape(-1), (flat + gumbel).argmax(1)
    )


# Anything at all at every function: a result of the promised shape, or a clear exception.
junk = st.one_of(
    tensors(dtypes=ANY),
    st.none(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-1, 3), max_size=3),
    st.sampled_from(
        [torch.float32, torch.float16, torch.int64, torch.complex64, torch.Generator()]
    ),
    st.builds(lambda x: x.to("meta"), tensors()),
    st.builds(lambda x: x.to_sparse(), tensors(shape=(2, 3))),
    st.builds(lambda x: x.detach().requires_grad_(), tensors()),
)
CALLS = {
    genfast.randn: ("seed", "stream", "offset", "generator", "dtype", "out"),
    genfast.rand: ("seed", "stream", "offset", "generator", "dtype", "out"),
    genfast.randint: ("seed", "stream", "offset", "generator", "dtype", "out"),
    genfast.randn_like: ("seed", "stream", "offset", "generator", "dtype"),
    genfast.rand_like: ("seed", "stream", "offset", "generator", "dtype"),
    genfast.bias_act: ("b", "dim", "act", "alpha", "gain", "clamp", "noise", "strength", "seed"),
    genfast.upfirdn2d: ("down", "flip_filter", "gain"),
    genfast.bernoulli_nll: ("x",),
    genfast.group_norm: ("groups", "weight", "bias", "scale", "shift", "act", "eps"),
    genfast.layer_norm: ("weight", "bias", "scale", "shift", "act", "eps", "add", "gate"),
    genfast.rms_norm: ("weight", "scale", "shift", "act", "eps", "add", "gate"),
    genfast.reparameterize: ("seed", "stream", "offset", "generator", "kl_reduction"),
    genfast.gaussian_kl: ("reduction",),
    genfast.tanh_normal: ("seed", "stream", "offset", "generator"),
    genfast.log_normal: ("seed", "stream", "offset", "generator"),
    genfast.gumbel_softmax: ("tau", "hard", "dim", "seed", "stream", "offset", "generator"),
    genfast.relaxed_bernoulli: ("tau", "hard", "seed", "stream", "offset", "generator"),
    genfast.sample_categorical: ("seed", "stream", "offset", "generator"),
    genfast.sample_tokens: (
        "temperature", "top_k", "top_p", "min_p", "seed", "stream", "offset", "generator"
    ),
}  # fmt: skip
POSITIONAL = {genfast.randint: 3, genfast.upfirdn2d: 2, genfast.reparameterize: 2,
              genfast.gaussian_kl: 2, genfast.tanh_normal: 2, genfast.log_normal: 2}  # fmt: skip


def small(x):
    """Sizes that are ints stay small: this is no test of the allocator."""
    if isinstance(x, int) and not isinstance(x, bool):
        return x if abs(x) < 2**16 else x % 7
    return x


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)
@settings(max_examples=120)
@given(st.data())
def test_anything_at_all(function, data):
    good = data.draw(tensors(shape=(2, 3)))
    count = POSITIONAL.get(function, 1)
    first = [data.draw(st.one_of(st.just(good), junk)) for _ in range(count)]
    if function in (genfast.randn, genfast.rand):
        first = [small(data.draw(st.one_of(st.just((2, 3)), junk)))]
    elif function is genfast.randint:
        first = [data.draw(st.one_of(st.just(0), junk)), data.draw(st.one_of(st.just(9), junk)),
                 small(data.draw(st.one_of(st.just((2, 3)), junk)))]  # fmt: skip
    names = data.draw(st.lists(st.sampled_from(CALLS[function]), max_size=2, unique=True))
    keywords = {name: data.draw(junk) for name in names}
    try:
        result = function(*first, **keywords)
    except (TypeError, ValueError) as error:
        assert str(error)
        return
    assert isinstance(result, torch.Tensor)
    assert result.layout is torch.strided and result.dtype in ANY[:6]
