"""Reparameterized draws, the Gumbel family, categorical and token sampling against the reference.

The noise of every expected value is the contract's own, so values compare one by one.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from tolerances import REORDERED, P, two_sided, yardstick

import genfast
from genfast.reference import rng as noise
from genfast.reference import sampling as reference

SEED = 77
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GAUSSIAN = {
    "none": lambda m, v, **k: genfast.reparameterize(m, v, **k),
    "tanh": lambda m, v, **k: genfast.tanh_normal(m, v, **k),
    "exp": lambda m, v, **k: genfast.log_normal(m, v, **k),
}
RELAXED = {"gumbel_softmax": "gumbel", "relaxed_bernoulli": "logistic"}
REDUCTIONS = ("none", "sum", "mean", "batchmean")

# shape and why it is there
SHAPES = {
    "one": (1,),
    "odd": (3, 5),
    "one chunk and a bit": (2, 1025),
    "4-d": (3, 5, 7, 9),
    "threads": (5, 4001),
    "0-dim": (),
    "no rows": (0, 4),
    "empty rows": (3, 0),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "gaps": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}


def randn(*shape, dtype=torch.float32, scale=1.0, seed=1):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def contract(shape, distribution, seed=SEED, dtype=torch.float64):
    return noise.random(tuple(shape), distribution, seed, dtype=torch.float32).to(dtype)


def leaf(x, dtype=None):
    return x.detach().to(dtype or x.dtype).requires_grad_()


def close(got, expected, dtype=None):
    torch.testing.assert_close(got, expected, **REORDERED[dtype or got.dtype])


# ---- Gaussians: values and gradients ----------------------------------------------------------


def gaussian_case(mu, logvar, transform, side, reduction, seed=SEED):
    """(y, side, d_mu, d_logvar) of genfast, of PyTorch in the same dtype, and of fp64."""
    shape = torch.broadcast_shapes(mu.shape, logvar.shape)
    grad_y = randn(*shape, seed=9)

    def run(function, dtype):
        m, v = leaf(mu, dtype), leaf(logvar, dtype)
        y, total = function(m, v)
        loss = (y * grad_y.to(y.dtype)).sum()
        if total is not None:
            loss = loss + (total * torch.arange(1, total.numel() + 1).view(total.shape)).sum()
        return (y, total, *torch.autograd.grad(loss, (m, v)))

    def ours(m, v):
        if not side:
            return GAUSSIAN[transform](m, v, seed=seed), None
        if transform == "none":
            return genfast.reparameterize(m, v, seed=seed, return_kl=True, kl_reduction=reduction)
        return GAUSSIAN[transform](m, v, seed=seed, return_log_prob=True)

    def plain(m, v):
        m, v = torch.broadcast_tensors(m, v)
        eps = contract(shape, "normal", seed, m.dtype)
        y = reference.reparameterize(m, v, eps, transform)
        wide = torch.promote_types(m.dtype, torch.float32)
        if not side:
            return y, None
        if transform == "none":
            return y, reference.gaussian_kl(m.to(wide), v.to(wide), reduction)
        return y, reference.log_prob(m.to(wide), v.to(wide), eps.to(wide), transform)

    return run(ours, mu.dtype), run(plain, mu.dtype), run(plain, torch.float64)


def check_gaussian(*case):
    names = ("y", "side", "d_mu", "d_logvar")
    for name, got, eager, truth in zip(names, *gaussian_case(*case), strict=True):
        if truth is not None:
            yardstick(name, got, eager, truth, "gradient" if name[0] == "d" else "output")


@pytest.mark.parametrize("transform", GAUSSIAN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_gaussian_shapes(transform, dtype, shape):
    mu, logvar = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=2, scale=0.7)
    if transform == "exp":
        mu = mu - 3  # the largest of 20,000 draws must fit in fp16
    for side in (False, True):
        check_gaussian(mu, logvar, transform, side, "none")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_kl_reductions(reduction, shape):
    mu, logvar = randn(*shape), randn(*shape, seed=2)
    check_gaussian(mu, logvar, "none", True, reduction)
    expected = reference.gaussian_kl(mu.double(), logvar.double(), reduction).float()
    close(genfast.gaussian_kl(mu, logvar, reduction=reduction), expected)
    m = leaf(mu)
    genfast.gaussian_kl(m, logvar, reduction=reduction).sum().backward()
    d = leaf(mu, torch.float64)
    reference.gaussian_kl(d, logvar.double(), reduction).sum().backward()
    close(m.grad, d.grad.float())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_layouts(layout, dtype):
    mu = LAYOUTS[layout](randn(3, 5, 7, 11, dtype=dtype))
    logvar = randn(3, 5, 7, 11, dtype=dtype, seed=2)
    check_gaussian(mu, logvar, "tanh", True, "none")
    check_gaussian(logvar, mu, "none", True, "batchmean")
    if layout == "channels_last":
        assert genfast.reparameterize(mu, mu, seed=1).is_contiguous(
            memory_format=torch.channels_last
        )


@pytest.mark.parametrize(
    "a, b", [((3, 1, 5), (4, 1)), ((5,), (3, 5)), ((3, 5), ()), ((1,), (3, 0)), ((), ())]
)
def test_gaussian_broadcasts(a, b):
    check_gaussian(randn(*a), randn(*b, seed=2), "none", True, "batchmean")
    check_gaussian(randn(*a), randn(*b, seed=2), "exp", True, "none")


@pytest.mark.parametrize("transform", GAUSSIAN)
def test_gaussian_far_values(transform):
    """Large |mu| and logvar: saturation and overflow as in PyTorch, tails of log q exact."""
    mu = torch.tensor([[-30.0, -9.0, -1e-3, 0.0, 1e-3, 9.0, 30.0, 80.0]])
    for logvar in (-40.0, -10.0, 0.0, 3.0):
        check_gaussian(
            mu[:, : 8 if transform != "exp" else 6], torch.tensor(logvar), transform, True, "none"
        )


def test_mixed_dtypes_promote():
    mu, logvar = randn(3, 5, dtype=torch.bfloat16), randn(3, 5, seed=2)
    for m, v in ((mu, logvar), (logvar, mu), (mu, mu.half())):
        m, v = leaf(m), leaf(v)
        z, kl = genfast.reparameterize(m, v, seed=3, return_kl=True)
        assert z.dtype == torch.float32 and kl.dtype == torch.float32
        expected = genfast.reparameterize(m.double(), v.double(), seed=3)
        close(z, expected.float())
        (z.sum() + kl).backward()
        assert m.grad.dtype == m.dtype and v.grad.dtype == v.dtype
    z, kl = genfast.reparameterize(mu.double(), logvar, seed=3, return_kl=True)
    assert z.dtype == kl.dtype == torch.float64


def test_log_probabilities_equal_torch_distributions():
    mu, logvar = randn(6, 11).double(), randn(6, 11, seed=2).double()
    eps = contract((6, 11), "normal")
    normal = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    z = mu + (0.5 * logvar).exp() * eps
    tanh = torch.distributions.transforms.TanhTransform()
    expected = (normal.log_prob(z) - tanh.log_abs_det_jacobian(z, z.tanh())).sum(1)
    y, log_prob = genfast.tanh_normal(mu.float(), logvar.float(), seed=SEED, return_log_prob=True)
    close(y, z.tanh().float())
    close(log_prob, expected.float())
    log_normal = torch.distributions.LogNormal(mu, (0.5 * logvar).exp())
    y, log_prob = genfast.log_normal(mu.float(), logvar.float(), seed=SEED, return_log_prob=True)
    close(y, z.exp().float())
    close(log_prob, log_normal.log_prob(z.exp()).sum(1).float())


# ---- Gumbel family ----------------------------------------------------------------------------


def relaxed_case(name, logits, tau, hard):
    distribution = RELAXED[name]
    grad = randn(*logits.shape, seed=9)

    def run(function, dtype):
        x = leaf(logits, dtype)
        y = function(x)
        return y, *torch.autograd.grad((y * grad.to(y.dtype)).sum(), x)

    return (
        run(lambda x: getattr(genfast, name)(x, tau, hard, seed=SEED), logits.dtype),
        *(
            run(
                lambda x: getattr(reference, name)(
                    x, contract(x.shape, distribution, SEED, x.dtype), tau, hard
                ),
                dtype,
            )
            for dtype in (logits.dtype, torch.float64)
        ),
    )


@pytest.mark.parametrize("name", RELAXED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1,), (7,), (3, 1), (3, 33), (5, 4, 1027), (2, 5003), (0, 4), (3, 0), (2, 3, 0, 5)]
)
def test_relaxed_shapes(name, dtype, shape):
    for tau in (1.0, 0.3):
        got, eager, truth = relaxed_case(name, randn(*shape, dtype=dtype, scale=3), tau, False)
        yardstick("y", got[0], eager[0], truth[0])
        yardstick("d_logits", got[1], eager[1], truth[1], "gradient")


@pytest.mark.parametrize("name", RELAXED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_relaxed_layouts(name, layout):
    logits = LAYOUTS[layout](randn(3, 5, 7, 11))
    got, eager, truth = relaxed_case(name, logits, 0.7, False)
    yardstick("y", got[0], eager[0], truth[0])
    yardstick("d_logits", got[1], eager[1], truth[1], "gradient")


@pytest.mark.parametrize("name", RELAXED)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("road", ["auto", "reference"])
def test_hard_samples_are_exact_with_the_soft_gradient(name, dtype, road):
    logits = leaf(randn(64, 129, dtype=dtype))
    with genfast.backend(road):
        hard = getattr(genfast, name)(logits, 0.5, True, seed=4)
        soft = getattr(genfast, name)(logits, 0.5, seed=4)
    assert ((hard == 0) | (hard == 1)).all()
    if name == "gumbel_softmax":
        assert (hard.sum(-1) == 1).all()
        top = soft.max(-1).values  # rounding may make several soft values equal
        assert torch.equal((hard * soft).sum(-1), top)
    else:
        decided = soft != 0.5
        assert torch.equal(hard[decided], (soft[decided] > 0.5).to(dtype))
    weight = randn(64, 129, dtype=dtype, seed=5)
    a, b = (torch.autograd.grad((y * weight).sum(), logits)[0] for y in (hard, soft))
    close(a, b)


def test_gumbel_softmax_of_any_dimension():
    x = randn(4, 5, 6)
    for dim in (0, 1, 2, -1, -2, -3):
        y = genfast.gumbel_softmax(x, 0.7, dim=dim, seed=2)
        moved = genfast.gumbel_softmax(x.movedim(dim, -1).contiguous(), 0.7, seed=2)
        assert torch.equal(y, moved.movedim(-1, dim))
        close(y.sum(dim), torch.ones_like(y.sum(dim)))


def test_tau_as_a_tensor_has_a_gradient():
    for name in RELAXED:
        x, tau = leaf(randn(5, 7)), torch.tensor(0.7, requires_grad=True)
        y = getattr(genfast, name)(x, tau, seed=3)
        close(y, getattr(genfast, name)(x, 0.7, seed=3))
        got = torch.autograd.grad((y * x.detach()).sum(), (x, tau))
        x64, tau64 = leaf(x, torch.float64), leaf(tau, torch.float64)
        y = getattr(genfast, name)(x64, tau64, seed=3)
        expected = torch.autograd.grad((y * x64.detach()).sum(), (x64, tau64))
        for a, b in zip(got, expected, strict=True):
            close(a, b.float())


def test_masked_logits():
    x = randn(3, 9)
    x[0, 4:] = -math.inf
    x[1] = -math.inf
    x[2, 3] = math.nan
    for hard in (False, True):
        y = genfast.gumbel_softmax(x, 1.0, hard, seed=1)
        assert torch.isfinite(y[0]).all() and (y[0, 4:] == 0).all()
        assert y[1:].isnan().all()  # never a number for a row that has no answer
    assert genfast.relaxed_bernoulli(torch.tensor([math.inf, -math.inf]), 1.0, seed=1).tolist() == [
        1,
        0,
    ]


@pytest.mark.parametrize("road", ["auto", "reference"])
@pytest.mark.parametrize("name", RELAXED)
def test_tau_beyond_fp32(name, road):
    """Counts as its largest number; refused where it has no reciprocal."""
    function, x = getattr(genfast, name), torch.tensor([[1.0, 2.0, -math.inf]])
    with genfast.backend(road):
        assert function(x, 1e300, seed=1).tolist() == [[0.5, 0.5, 0.0]]
        assert torch.equal(function(x, 1e300, True, seed=1), function(x, 1.0, True, seed=1))
        for tau in (1e-40, 1e-300):
            with pytest.raises(ValueError, match=f"tau: expected at least 1.2e-38.*got {tau}"):
                function(x, tau, seed=1)


# ---- categorical and tokens -------------------------------------------------------------------


def expected_tokens(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, seed=SEED):
    """fp32 reference with the contract's noise; per-row settings as lists."""
    rows = logits.shape[0]
    spread = lambda v: None if v is None else torch.as_tensor(v).reshape(-1).expand(rows)  # noqa: E731
    gumbel = contract(logits.shape, "gumbel", seed, torch.float32)
    t = spread(temperature).float()
    scaled = logits.float() * (1 / torch.where(t > 0, t, 1.0))[:, None]
    kept = reference.filter_logits(scaled, spread(top_k), spread(top_p), spread(min_p))
    drawn = reference.sample_categorical(kept, gumbel)
    return torch.where(t > 0, drawn, logits.argmax(-1))


FILTERS = [
    dict(),
    dict(temperature=0.3),
    dict(temperature=0.0),
    dict(top_k=1),
    dict(top_k=7),
    dict(top_k=10**6),
    dict(top_p=0.0),
    dict(top_p=0.4),
    dict(top_p=0.999),
    dict(top_p=1.0),
    dict(min_p=0.0),
    dict(min_p=0.05),
    dict(min_p=1.0),
    dict(temperature=1.7, top_k=40, top_p=0.8, min_p=0.01),
]


@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: ",".join(map(str, f.items())) or "none")
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_equal_the_reference(filters, dtype):
    for vocabulary in (1, 5, 1500):
        logits = randn(37, vocabulary, dtype=dtype, scale=4)
        got = genfast.sample_tokens(logits, **filters, seed=SEED)
        assert torch.equal(got, expected_tokens(logits, **filters))
        with genfast.backend("reference"):
            assert torch.equal(genfast.sample_tokens(logits, **filters, seed=SEED), got)
        double = genfast.sample_tokens(logits.double(), **filters, seed=SEED)
        assert (double == got).float().mean() > 0.95  # fp64 sums: only near ties may differ


LOGITS = {
    "spread": lambda x: 10 * x,
    "close": lambda x: 0.01 * x,
    "equal": torch.zeros_like,
    "ties": lambda x: (4 * x).round() / 4,
    "masked": lambda x: x.index_fill(1, torch.arange(1, x.shape[1], 3), -math.inf),
    "one far ahead": lambda x: x.index_fill(1, torch.tensor([x.shape[1] // 2]), 200.0),
}


@pytest.mark.parametrize("kind", LOGITS)
def test_nucleus_of_wide_rows(kind):
    """Whole rows are not sorted there: of equal numbers the first stay, as in the reference."""
    for classes in (65, 300, 20000):
        logits = LOGITS[kind](randn(2, classes, scale=1))
        for p in (0.0, 1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 1e-7):
            kept = reference.filter_logits(logits, None, torch.tensor([p, p]))
            for seed in range(3):
                got = genfast.sample_tokens(logits, top_p=p, seed=seed)
                assert torch.equal(got, genfast.sample_categorical(kept, seed=seed)), (classes, p)


def test_settings_per_row():
    logits = randn(6, 300, scale=3)
    settings = dict(
        temperature=torch.tensor([0.0, 0.5, 1.0, 2.0, 1e-40, 1.0]),
        top_k=torch.tensor([0, 1, 5, 0, 0, 300]),
        top_p=torch.tensor([0.1, 1.0, 0.5, 0.9, 1.0, 1.5]),
        min_p=torch.tensor([0.0, 0.5, 0.01, 0.0, 0.0, 1.0]),
    )
    seeds = torch.tensor([3, -1, 2**40, 3, 0, 9])
    got = genfast.sample_tokens(logits, **settings, seed=seeds)
    for b in range(6):
        alone = {k: v[b].item() for k, v in settings.items()}
        row = genfast.sample_tokens(logits[b : b + 1], **alone, seed=seeds[b].item())
        assert row == got[b], f"row {b}"
    assert got[0] == logits[0].argmax() and got[4] == logits[4].argmax()
    order = torch.tensor([5, 3, 0, 1, 4, 2])
    permuted = genfast.sample_tokens(
        logits[order], **{k: v[order] for k, v in settings.items()}, seed=seeds[order]
    )
    assert torch.equal(permuted, got[order])


def test_top_k_keeps_ties_and_masks_stay_masked():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]]).expand(400, 5)
    got = genfast.sample_tokens(logits, top_k=2, seed=torch.arange(400))
    assert set(got.tolist()) == {1, 2, 3}
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]]).expand(400, 4)
    for filters in (dict(), dict(top_k=3), dict(top_p=0.99), dict(min_p=0.1)):
        got = genfast.sample_tokens(logits, **filters, seed=torch.arange(400))
        assert set(got.tolist()) == {0, 2}


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("road", ["auto", "reference"])
def test_rows_without_an_answer_raise(dtype, road):
    logits = randn(5, 7, dtype=dtype)
    for bad in (math.nan, math.inf):
        broken = logits.clone()
        broken[1, 2] = broken[3, 0] = bad
        with genfast.backend(road):
            for f in (genfast.sample_categorical, genfast.sample_tokens):
                with pytest.raises(ValueError, match=r"logits: .*finite maximum.*2 row\(s\)"):
                    f(broken, seed=1)
    with genfast.backend(road), pytest.raises(ValueError, match=r"logits: .*1 row\(s\)"):
        genfast.sample_tokens(logits.index_fill(0, torch.tensor([2]), -math.inf), 0.7, seed=1)


def test_categorical_follows_softmax():
    """2^20 draws of 40 classes, of any road: chi-square at 1e-6."""
    logits = randn(40, scale=1.5)
    p = torch.softmax(logits.double(), 0).numpy()
    n = 1 << 20
    rows = logits.expand(n, 40)
    for i, draw in enumerate((
        lambda: genfast.sample_categorical(rows, seed=5),
        lambda: genfast.sample_tokens(rows, 1.0, seed=6),
        lambda: genfast.gumbel_softmax(rows[: n // 4], 0.5, True, seed=7).argmax(-1),
        lambda: genfast.sample_categorical(rows[: n // 8], seed=torch.arange(n // 8)),
    )):  # fmt: skip
        counts = np.bincount(draw().numpy(), minlength=40)
        assert stats.chisquare(counts, p * counts.sum()).pvalue > P, i


def test_relaxed_bernoulli_follows_the_sigmoid():
    logits = torch.tensor([-3.0, -0.5, 0.0, 2.0]).expand(1 << 18, 4)
    mean = genfast.relaxed_bernoulli(logits, 0.1, True, seed=3).double().mean(0)
    p = torch.sigmoid(logits[0].double())
    for z in ((mean - p) / (p * (1 - p) / (1 << 18)).sqrt()).tolist():
        assert two_sided(z)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_nested_tensors_are_refused_by_name():
    """They have no shape that a message could show."""
    x = torch.nested.nested_tensor([torch.zeros(2, 3, 4), torch.zeros(2, 1, 4)])
    for call in (
        lambda: genfast.reparameterize(x, x), lambda: genfast.sample_categorical(x),
        lambda: genfast.sample_tokens(x), lambda: genfast.gumbel_softmax(x),
        lambda: genfast.randn_like(x), lambda: genfast.layer_norm(x),
        lambda: genfast.gaussian_kl(x, x), lambda: genfast.scaled_dot_product_attention(x, x, x),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="expected a dense tensor, got a nested one"):
            call()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", [1.0, math.nan]), ("temperature", [1.0, -1.0]), ("top_k", [1, -1]),
     ("temperature", [1.0, math.inf]), ("top_p", [0.5, math.nan]), ("min_p", [0.5, 1.5]),
     ("top_k", 2**63)],
)  # fmt: skip
def test_settings_of_tokens_are_checked(name, value, backend):
    value = value if isinstance(value, int) else torch.tensor(value)
    with genfast.backend(backend), pytest.raises(ValueError, match=f"^{name}: "):
        genfast.sample_tokens(torch.zeros(2, 5), **{name: value}, seed=1)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_settings_beyond_fp32(backend):
    hidden = torch.tensor([0.0, -math.inf] * 4).repeat(100, 1)
    with genfast.backend(backend):
        flat = genfast.sample_tokens(torch.randn(100, 8), 1e300, seed=1)
        for logits in (hidden, hidden.double()):
            hot = torch.tensor([1e300], dtype=torch.float64)
            assert (genfast.sample_tokens(logits, hot, seed=1) % 2 == 0).all()
        y = genfast.gumbel_softmax(torch.randn(3, 8), 1e300, seed=1)
    assert len(flat.unique()) > 4  # as of equal logits
    torch.testing.assert_close(y, torch.full_like(y, 1 / 8))


# ---- seeds ------------------------------------------------------------------------------------

BATCHED = {
    "reparameterize": lambda x, **k: genfast.reparameterize(x, -x, **k),
    "tanh_normal": lambda x, **k: genfast.tanh_normal(x, -x, **k),
    "log_normal": lambda x, **k: genfast.log_normal(x, -x, **k),
    "gumbel_softmax": lambda x, **k: genfast.gumbel_softmax(x, 0.7, **k),
    "relaxed_bernoulli": lambda x, **k: genfast.relaxed_bernoulli(x, 0.7, **k),
    "sample_categorical": genfast.sample_categorical,
    "sample_tokens": lambda x, **k: genfast.sample_tokens(x, 0.8, top_k=20, **k),
}


@pytest.mark.parametrize("name", BATCHED)
def test_batch_order_and_size_never_matter(name):
    f, x = BATCHED[name], randn(5, 3, 1030)
    seeds = torch.tensor([4, -9, 2**62, 4, 0])
    whole = f(x, seed=seeds, stream=2, offset=3)
    order = torch.tensor([2, 4, 0, 3, 1])
    assert torch.equal(f(x[order], seed=seeds[order], stream=2, offset=3), whole[order])
    for b in range(5):
        one = f(x[b : b + 1], seed=seeds[b].item(), stream=2, offset=3)
        assert torch.equal(one[0], whole[b])
    torch.set_num_threads(1)
    assert torch.equal(f(x, seed=seeds, stream=2, offset=3), whole)


@pytest.mark.parametrize("cols", [1, 7, 20, 508])
def test_short_rows_are_as_alone(cols):
    """Several in one chunk: draws, the sum of each row and every gradient, to the bit."""
    mu, logvar, g = randn(130, cols), randn(130, cols) - 1, randn(130, cols)
    seeds, g_kl = torch.arange(130) * 2**40 - 9, randn(130)
    for seed, row in ((seeds, lambda b: (seeds[b : b + 1], 0)), (3, lambda b: (3, b * cols))):

        def run(at, seed, offset):
            inputs = [x[at].clone().requires_grad_() for x in (mu, logvar)]
            outs = genfast.reparameterize(
                *inputs, seed=seed, offset=offset, return_kl=True, kl_reduction="none"
            )
            return *outs, *torch.autograd.grad(outs, inputs, (g[at], g_kl[at]))

        whole = run(slice(None), seed, 0)
        for b in (0, 1, 41, 42, 129):
            for a, c in zip(run(slice(b, b + 1), *row(b)), whole, strict=True):
                assert torch.equal(a[0], c[b])


@pytest.mark.parametrize("classes", [1, 2, 10, 16, 33, 64, 65])
def test_short_rows_of_classes_are_as_alone(classes):
    """Several in one chunk, a NaN and one without a finite logit among them."""
    logits, g = randn(130, classes), randn(130, classes)
    logits[3, classes // 2], logits[8] = math.nan, -math.inf
    seeds = torch.arange(130) * 2**40 - 9
    for seed, row in (
        (seeds, lambda b: (seeds[b : b + 1], 0)),
        (seeds[0].item(), lambda b: (seeds[0].item(), b * classes)),
    ):

        def run(at, seed, offset):
            x = logits[at].clone().requires_grad_()
            outs = []
            for hard in (False, True):
                y = genfast.gumbel_softmax(x, tau=0.7, hard=hard, seed=seed, offset=offset)
                outs += y, *torch.autograd.grad(y, x, g[at])
            return outs

        whole = run(slice(None), seed, 0)
        for b in (0, 1, 3, 8, 41, 129):
            for alone, all_of_them in zip(run(slice(b, b + 1), *row(b)), whole, strict=True):
                assert torch.equal(alone[0].nan_to_num(9), all_of_them[b].nan_to_num(9))
        finite = torch.arange(130).remainder(11) > 2
        finite[3], finite[8] = False, False
        for f in (genfast.sample_categorical, partial(genfast.sample_tokens, temperature=0.8)):
            whole = f(logits[finite], seed=seed if isinstance(seed, int) else seed[finite])
            for i, b in enumerate(finite.nonzero().flatten().tolist()[:20]):
                own = seed if isinstance(seed, int) else seeds[b : b + 1]
                offset = i * classes if isinstance(seed, int) else 0
                assert f(logits[b : b + 1], seed=own, offset=offset)[0] == whole[i]


@pytest.mark.parametrize("name", BATCHED)
def test_seeds_come_from_torch_when_none_are_given(name):
    f, x = BATCHED[name], randn(3, 50)
    draws = []
    for _ in range(2):
        torch.manual_seed(6)
        draws.append([f(x), f(x), f(leaf(x))])
    for a, b in zip(*draws, strict=True):
        assert torch.equal(a, b)
    if name != "sample_tokens":
        assert not torch.equal(draws[0][0], draws[0][1])
    a, b = (f(x, generator=torch.Generator().manual_seed(8)) for _ in range(2))
    assert torch.equal(a, b)


def test_a_shard_draws_its_slice():
    x = randn(4, 300)
    for name in ("reparameterize", "relaxed_bernoulli", "gumbel_softmax", "sample_categorical"):
        whole = BATCHED[name](x, seed=5)
        assert torch.equal(BATCHED[name](x[1:3], seed=5, offset=300), whole[1:3])


@pytest.mark.parametrize("name", BATCHED)
def test_reference_backend_is_close(name):
    for dtype in DTYPES:
        x = randn(6, 40, dtype=dtype)
        native = BATCHED[name](x, seed=3)
        with genfast.backend("reference"):
            plain = BATCHED[name](x, seed=3)
        assert plain.dtype == native.dtype
        if native.is_floating_point():
            close(plain, native)
        else:
            assert torch.equal(plain, native)


# ---- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, tensors",
    [("reparameterize", 2), ("tanh_normal", 2), ("gumbel_softmax", 2), ("relaxed_bernoulli", 1)],
)
@pytest.mark.parametrize("hard", [False, True])
def test_backward_stores_no_noise(name, tensors, hard):
    saved = []
    x, y = leaf(randn(50, 100)), leaf(randn(50, 100, seed=2))

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if name == "reparameterize":
            out, _ = genfast.reparameterize(x, y, seed=1, return_kl=True)
        elif name == "tanh_normal":
            out, _ = genfast.tanh_normal(x, y, seed=1, return_log_prob=True)
        else:
            out = getattr(genfast, name)(x, 1.0, hard, seed=1)
    large = {t.data_ptr() for t in saved if t.numel() > 1}
    assert len(large) == (1 if hard and name == "gumbel_softmax" else tensors)
    owned = {x.data_ptr(), y.data_ptr(), out.data_ptr()}
    assert large <= owned  # nothing is kept alive that the caller does not hold already
    out.sum().backward()
