"""Guidance, dynamic thresholding and log-probabilities against the reference. About 10 s."""

import math

import pytest
import torch
from draws import draw
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import schedulers as S
from genfast.ops.diffusion import guidance
from genfast.reference import diffusion as R

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
METHODS = {
    "cfg": dict(method="cfg"),
    "rescale": dict(method="rescale", rescale=0.7),
    "cfg_zero_star": dict(method="cfg_zero_star"),
    "apg": dict(method="apg", eta=0.3, norm_threshold=2.5),
    "apg free": dict(method="apg", eta=0.0),
    "mag": dict(method="mag", alpha=1.5),
    "tcfg": dict(method="tcfg"),
}


def pair(dtype, shape=(3, 4, 33, 5)):
    """cond and uncond as a model gives them: close to each other."""
    c = draw(*shape, seed=1)
    return c.to(dtype), (c * 0.8 + 0.3 * draw(*shape, seed=2)).to(dtype)


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_guide(name, original):
    for dtype in FLOATS:
        c, u = pair(dtype)
        for scale in (4.5, torch.tensor([1.0, 3.0, 7.5])):
            kw = dict(METHODS[name], original=original)
            got = genfast.guide(c, u, scale, **kw)
            wide_scale = scale if isinstance(scale, float) else scale.double()
            truth = R.guide(c.double(), u.double(), wide_scale, **kw)
            size = 8 * (c.double().abs() + u.double().abs())
            assert got.dtype == dtype
            allowed = 2 * torch.finfo(dtype).eps * torch.maximum(truth.abs(), size)
            assert ((got.double() - truth).abs() <= allowed).all()
            with genfast.backend("reference"):
                again = genfast.guide(c, u, scale, **kw)
            assert ((again.double() - truth).abs() <= 2 * allowed).all()


@pytest.mark.parametrize("name", [n for n in METHODS if n != "rescale"])  # no deviation of one
def test_guide_of_numbers_alone(name):
    c, u = pair(torch.float32, (5,))
    got = genfast.guide(c, u, 4.5, **METHODS[name])
    with genfast.backend("reference"):
        want = genfast.guide(c, u, 4.5, **METHODS[name])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("shape", [(300, 2), (4, 700), (3,)], ids=str)
def test_guide_by_sample(shape, original):
    """A scale of each sample gives the bits of that number."""
    cond, uncond = draw(*shape, seed=1), draw(*shape, seed=2)
    scale = draw(shape[0], seed=3) * 4
    scale[0] = 0.0
    whole = genfast.guide(cond, uncond, scale, original=original)
    weights = genfast.guidance_weights(cond, uncond, scale, original=original)
    for b in range(0, shape[0], 37):
        at = slice(b, b + 1)
        alone = genfast.guide(cond[at], uncond[at], scale[b].item(), original=original)
        assert torch.equal(alone[0], whole[b])
        assert torch.equal(
            weights[b],
            genfast.guidance_weights(cond[at], uncond[at], scale[at], original=original)[0],
        )


def test_apg_with_momentum():
    c, u = pair(torch.float32)
    average = 0.5 * draw(*c.shape, seed=3)
    for original in (False, True):
        kw = dict(method="apg", eta=0.2, norm_threshold=3.0, original=original)
        got = genfast.guide(c, u, 5.0, average=average, **kw)
        truth = R.guide(c.double(), u.double(), 5.0, average=average.double(), **kw)
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)


def test_apg_has_no_direction_at_a_cond_of_zeros():
    u = pair(torch.float32)[1]
    c, kw = torch.zeros_like(u), dict(method="apg", eta=0.3, norm_threshold=2.5)
    want = R.guide(c.double(), u.double(), 2.0, **kw)
    assert want.isfinite().all()
    torch.testing.assert_close(genfast.guide(c, u, 2.0, **kw).double(), want, rtol=1e-5, atol=1e-5)
    w = genfast.guidance_weights(c, u, 2.0, **kw)
    with genfast.backend("reference"):
        torch.testing.assert_close(w, genfast.guidance_weights(c, u, 2.0, **kw))


@pytest.mark.parametrize("original", [False, True])
def test_tcfg_without_a_first_singular_vector(original):
    """Both all zero, or orthogonal and of one length: as where cond is that vector."""
    c = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 2.0]])
    u = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, -2.0]])
    want = (4.0 if original else 3.0) * c
    for road in ("auto", "reference"):
        with genfast.backend(road):
            assert torch.equal(genfast.guide(c, u, 3.0, method="tcfg", original=original), want)
            w = genfast.guidance_weights(c, u, 3.0, method="tcfg", original=original)
            assert w.tolist() == [[4.0 if original else 3.0, 0.0]] * 3
    c[0, 0] = math.nan
    assert genfast.guide(c, u, 3.0, method="tcfg").isnan().any(1).tolist() == [True, False, False]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("original", [False, True])
def test_weights_are_exact_and_independent_of_the_batch(name, original):
    kw = dict(METHODS[name], original=original)
    c, u = pair(torch.float32, (5, 3, 40, 41))
    w = genfast.guidance_weights(c, u, 5.0, **kw)
    assert w.shape == (5, 2) and w.dtype == torch.float32
    one = genfast.guidance_weights(c[2:3], u[2:3], 5.0, **kw)
    assert torch.equal(one[0], w[2])
    torch.set_num_threads(1)
    assert torch.equal(w, genfast.guidance_weights(c, u, 5.0, **kw))
    torch.set_num_threads(2)
    with genfast.backend("reference"):
        plain = genfast.guidance_weights(c, u, 5.0, **kw)
    torch.testing.assert_close(w, plain, rtol=2e-7, atol=1e-7)
    guided = w[:, 0].view(5, 1, 1, 1).double() * c + w[:, 1].view(5, 1, 1, 1).double() * u
    truth = R.guide(c.double(), u.double(), 5.0, **kw)
    torch.testing.assert_close(guided, truth, rtol=1e-6, atol=2e-6)


def test_guidance_in_the_step():
    c, u = pair(torch.float32)
    x = draw(*c.shape, seed=7)
    table = torch.tensor(S.ddim_plan(8).table, dtype=torch.float32)
    w = genfast.guidance_weights(c, u, 5.0, method="rescale", rescale=0.6)
    fused = genfast.diffusion_step(x, (c, u), table, 3, weights=w)
    guided = genfast.guide(c, u, 5.0, method="rescale", rescale=0.6)
    assert torch.equal(fused, genfast.diffusion_step(x, guided, table, 3))


def test_guide_differentiates():
    c, u = (t.double()[:2, :2, :2, :2].clone().requires_grad_() for t in pair(torch.float32))
    for kw in METHODS.values():
        f = lambda c, u, kw=kw: genfast.guide(c, u, 3.0, **kw)  # noqa: E731
        assert torch.autograd.gradcheck(f, (c, u))
    assert torch.autograd.gradgradcheck(
        lambda c, u: genfast.guide(c, u, 3.0, **METHODS["mag"]), (c, u)
    )
    a, b = (t.detach().float().requires_grad_() for t in (c, u))
    got = torch.autograd.grad(genfast.guide(a, b, 3.0).sum(), (a, b))
    assert (got[0] == 3).all() and (got[1] == -2).all()
    assert genfast.guide(a) is a


# ---- dynamic thresholding ------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 3, 40, 41), (1, 70000)], ids=str)
def test_threshold_is_the_quantile(shape, ratio):
    for dtype in FLOATS:
        x = draw(*shape, seed=1, dtype=dtype) * 3
        s = genfast.dynamic_threshold(x, ratio, 50.0)
        q = torch.quantile(x.double().flatten(1).abs(), ratio, dim=1).clamp(1.0, 50.0)
        assert s.dtype == torch.float32
        torch.testing.assert_close(s.double(), q, rtol=2.4e-7, atol=0)
        last = genfast.dynamic_threshold(x.mT.contiguous().mT, ratio, 50.0)
        assert torch.equal(last, s)


def test_threshold_of_strange_numbers():
    x = torch.full((4, 100), 2.0)  # many ties
    x[1, 3], x[2, :50], x[3] = math.nan, math.inf, 0.0
    s = genfast.dynamic_threshold(x, 0.5, 9.0)
    assert s[0] == 2 and s[1].isnan() and s[2] == 9 and s[3] == 1
    assert genfast.dynamic_threshold(x[:1] * 1e38, 0.5, 9.0) == 9
    rising = torch.tensor([[1.0, 2.0, 3.0, math.inf]])
    for ratio, want in ((0.5, 2.5), (2 / 3, 3.0), (0.9, 9.0), (1.0, 9.0)):
        for backend in ("auto", "reference"):
            with genfast.backend(backend):
                assert genfast.dynamic_threshold(rising, ratio, 9.0) == want
    huge = torch.ones(1, 2**24 + 5)  # torch.quantile refuses this
    huge[0, :9] = 3.0
    assert genfast.dynamic_threshold(huge, 1 - 4 / huge.numel(), 5.0) == 3


def test_threshold_of_numbers_alone():
    x = torch.tensor([0.5, -3.0, 20.0])  # (B,): one element a sample
    want = torch.tensor([1.0, 3.0, 10.0])
    assert torch.equal(genfast.dynamic_threshold(x, 0.5, 10.0), want)
    with genfast.backend("reference"):
        assert torch.equal(genfast.dynamic_threshold(x, 0.5, 10.0), want)


def test_threshold_of_a_row():
    x, m = draw(3, 4, 50, seed=1), draw(3, 4, 50, seed=2)
    table = torch.tensor(S.ddim_plan(8).table, dtype=torch.float32)
    got = genfast.dynamic_threshold(x, 0.9, 10.0, m=m, table=table, row=2)
    x0 = table[2, 0].double() * x.double() + table[2, 1].double() * m.double()
    want = torch.quantile(x0.flatten(1).abs(), 0.9, dim=1).clamp(1, 10)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@given(st.integers(1, 400), st.floats(0, 1), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_threshold(n, ratio, seed):
    x = draw(2, n, seed=seed)
    x = torch.where(x.abs() < 0.5, torch.ones(()), x * 4)  # ties too
    q = torch.quantile(x.double().abs(), ratio, dim=1).clamp(1.0, 8.0)
    torch.testing.assert_close(
        genfast.dynamic_threshold(x, ratio, 8.0).double(), q, rtol=2.4e-7, atol=0
    )


# ---- log-probability -----------------------------------------------------------------------------


def ddim_table():
    return torch.tensor(S.ddim_plan(8, eta=1.0).table, dtype=torch.float32)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_log_prob(dtype):
    x, m = draw(3, 4, 65, seed=1, dtype=dtype), draw(3, 4, 65, seed=2, dtype=dtype)
    table = ddim_table()
    y, log_prob = genfast.step_log_prob(x, m, table, 3, seed=5, stream=2)
    assert torch.equal(y, genfast.diffusion_step(x, m, table, 3, seed=5, stream=2))
    again, replay = genfast.step_log_prob(x, m, table, 3, sample=y)
    assert torch.equal(again, y) and torch.equal(replay, log_prob)
    coef = table[3].double()
    mean = R.diffusion_step(x.double(), m.double(), coef, n_out=1)[0]
    std = coef[15].abs()
    normal = torch.distributions.Normal(mean, std)
    truth = normal.log_prob(y.double()).flatten(1).sum(1)
    torch.testing.assert_close(log_prob.double(), truth, rtol=1e-5, atol=1e-3)
    mean_log_prob = genfast.step_log_prob(x, m, table, 3, sample=y, reduction="mean")[1]
    torch.testing.assert_close(mean_log_prob, log_prob / 260)
    rows = torch.tensor([1, 3, 4])
    y, each = genfast.step_log_prob(x, m, table, rows, seed=5, stream=2)
    for b in range(3):
        alone = genfast.step_log_prob(x, m, table, int(rows[b]), sample=y)[1]
        assert torch.equal(alone[b], each[b])


def test_log_prob_gradient():
    x, m = draw(2, 3, 20, seed=1), draw(2, 3, 20, seed=2)
    table = ddim_table()
    y = genfast.diffusion_step(x, m, table, 3, seed=5)

    def truth(m):
        mean = R.diffusion_step(x.double(), m, table[3].double(), n_out=1)[0]
        return torch.distributions.Normal(mean, table[3, 15].double()).log_prob(y.double()).sum()

    a = m.double().requires_grad_()
    (want,) = torch.autograd.grad(truth(a), a)
    b = m.clone().requires_grad_()
    drawn, log_prob = genfast.step_log_prob(x, b, table, 3, seed=5)
    assert torch.equal(drawn, y) and not drawn.requires_grad
    (got,) = torch.autograd.grad(log_prob.sum(), b)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    wide = table.double()
    f = lambda m: genfast.step_log_prob(x.double(), m, wide, 3, sample=y.double())[1]  # noqa: E731
    assert torch.autograd.gradcheck(f, (a,)) and torch.autograd.gradgradcheck(f, (a,))


def test_compile_and_opcheck():
    c, u = pair(torch.float32, (2, 3, 4, 4))
    x = draw(2, 3, 4, 4, seed=7)
    table = ddim_table()

    def f(x, c, u):
        m = genfast.guide(c, u, 5.0, method="mag")
        s = genfast.dynamic_threshold(x, 0.9, 3.0, m=m, table=table, row=2)
        y = genfast.diffusion_step(x, m, table, 2, threshold=s, seed=1)
        return y, genfast.step_log_prob(y, m, table, 3, seed=4)[1]

    for got, want in zip(torch.compile(f, fullgraph=True)(x, c, u), f(x, c, u), strict=True):
        torch.testing.assert_close(got, want)
    b = c.clone().requires_grad_()
    g = lambda b: genfast.step_log_prob(x, b, table, 3, seed=4)[1].sum()  # noqa: E731
    (want,) = torch.autograd.grad(g(b), b)
    (got,) = torch.autograd.grad(torch.compile(g, fullgraph=True)(b), b)
    torch.testing.assert_close(got, want)
    ops = torch.ops.genfast
    torch.library.opcheck(
        ops.guidance_weights, (c, u, None, torch.tensor([3.0]), 4, False, 8.0, 0.0)
    )
    torch.library.opcheck(ops.dynamic_threshold, (x, c, table, 1, 0.9, 2.0))
    empty = [None] * 13
    args = (None, x, c, None, None, None, table, None, *empty, 3, 5, 0, 0, True, 0, 1)
    torch.library.opcheck(ops.step_log_prob, args)


X = torch.zeros(2, 3, 4)
TABLE = ddim_table()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("method", ["cfg", "rescale", "cfg_zero_star", "apg", "mag", "tcfg"])
def test_outputs_that_are_zero_or_constant(method, backend):
    """What a network with a zero last layer gives: nothing to divide by, and no NaN."""
    zero, ones = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    options = {"rescale": 0.7} if method == "rescale" else {}
    with genfast.backend(backend):
        assert not genfast.guide(zero, zero, 5.0, method=method, **options).any()
        got = genfast.guide(ones * 0.3, ones * 0.3, 5.0, method=method, **options)
        torch.testing.assert_close(got, ones * 0.3)
        for pair in ((ones, zero), (zero, ones), (ones[..., :1], -ones[..., :1])):
            assert genfast.guide(*pair, 5.0, method=method, **options).isfinite().all()


IDENTITY = torch.tensor([guidance._IDENTITY])  # out_0 = m

BAD = [
    ("cond no tensor", TypeError, "cond:", lambda: genfast.guide(1.0, X)),
    ("uncond of another shape", ValueError, "uncond:", lambda: genfast.guide(X, X[0])),
    ("unknown method", ValueError, "method:", lambda: genfast.guide(X, X, method="x")),
    (
        "option of another method",
        TypeError,
        "eta:",
        lambda: genfast.guide(X, X, method="mag", eta=1.0),
    ),
    ("scale of another batch", ValueError, "scale:", lambda: genfast.guide(X, X, torch.ones(3))),
    ("no batch", ValueError, "cond:", lambda: genfast.guide(X.sum(), X.sum(), torch.ones(1))),
    ("a list", TypeError, "cond:", lambda: genfast.guide([1.0], X, torch.ones(1))),
    ("scale a list", TypeError, "scale:", lambda: genfast.guide(X, X, [1.0, 2.0])),
    ("scale complex", TypeError, "scale:", lambda: genfast.guide(X, X, 5 + 0j)),
    ("scale NaN", ValueError, "scale:", lambda: genfast.guide(X, X, math.nan)),
    ("average without apg", TypeError, "average:", lambda: genfast.guide(X, X, average=X)),
    ("x0 empty", ValueError, "x0:", lambda: genfast.dynamic_threshold(X[:, :0])),
    ("ratio above 1", ValueError, "ratio:", lambda: genfast.dynamic_threshold(X, 1.5)),
    ("max below 1", ValueError, "max_value:", lambda: genfast.dynamic_threshold(X, 0.5, 0.5)),
    ("max a text", TypeError, "max_value:", lambda: genfast.dynamic_threshold(X, 0.5, "2")),
    ("m alone", ValueError, "m, table:", lambda: genfast.dynamic_threshold(X, m=X)),
    ("table alone", ValueError, "m, table:", lambda: genfast.dynamic_threshold(X, table=TABLE)),
    ("half a row", TypeError, "row:", lambda: genfast.dynamic_threshold(X, row=1.5)),
    ("ratio 3", ValueError, "ratio:", lambda: genfast.dynamic_threshold(X, torch.tensor(3.0))),
    ("max 0.5", ValueError, "max", lambda: genfast.dynamic_threshold(X, 1.0, torch.tensor(0.5))),
    ("no method", ValueError, "method:", lambda: genfast.guide(X, X, method=[])),
    ("no noise to judge", ValueError, "noise:", lambda: genfast.step_log_prob(X, X, TABLE, 1)),
    (
        "row without noise",
        ValueError,
        "row:",
        lambda: genfast.step_log_prob(X, X, TABLE, 7, seed=1),
    ),
    (
        "sample of another shape",
        ValueError,
        "sample:",
        lambda: genfast.step_log_prob(X, X, TABLE, 1, sample=X[0]),
    ),  # noqa: E501
    (
        "unknown reduction",
        ValueError,
        "reduction:",
        lambda: genfast.step_log_prob(X, X, TABLE, 1, seed=1, reduction="max"),
    ),  # noqa: E501
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("error, name, call", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(error, name, call, backend):
    with genfast.backend(backend), pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(name), caught.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("scale", [0, 1, True, 0.1, 7.5, -2.0, 1e30])
def test_a_number_is_a_scale_of_each_sample(scale, original, dtype):
    """The same bits, and those of a solver step with weights."""
    c, u = (torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(i)).to(dtype)
            for i in range(2))  # fmt: skip
    each = torch.full((3,), float(scale))
    for got in (genfast.guide(c, u, each, original=original),
                genfast.diffusion_step(c, (c, u), IDENTITY, weights=genfast.guidance_weights(
                    c, u, scale, original=original))):  # fmt: skip
        want = genfast.guide(c, u, scale, original=original)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
