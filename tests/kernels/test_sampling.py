"""sampling on Triton. Elementwise results have the bits of the CPU kernels; sums have their own
order, so they are judged against fp64."""

import math

import pytest
import torch

import genfast
from genfast import _C
from genfast.ops._backend import backend
from genfast.reference import rng as noise
from genfast.reference import sampling as reference

NONE, TANH, EXP = range(3)
NO_SIDE, KL, LOG_PROB = range(3)


@pytest.fixture
def kernels(device):
    from genfast.kernels import sampling

    return sampling


def pair(shape, device, generator=0):
    """mu and logvar as the halves of one tensor's last dim: rows with a stride."""
    g = torch.Generator().manual_seed(generator)
    both = torch.randn(*shape[:-1], 2 * shape[-1], generator=g).to(device)
    return both.chunk(2, -1)


def same(got, want):
    torch.testing.assert_close(got.cpu(), want.cpu(), rtol=0, atol=0, equal_nan=True)


# transform, side, shape, one sum per sample, one seed per sample
GAUSSIAN = {
    "draw-only": (NONE, NO_SIDE, (3, 40), False, False),
    "vector": (NONE, KL, (7,), False, False),
    "kl-aligned": (NONE, KL, (2, 1024), True, False),
    "kl-two-tiles": (NONE, KL, (1, 2050), False, True),
    "kl-seeds": (NONE, KL, (3, 2, 37), True, True),
    "kl-seeds-one-sum": (NONE, KL, (3, 2, 37), False, True),
    "tanh": (TANH, LOG_PROB, (4, 9), True, True),
    "tanh-one-sum": (TANH, LOG_PROB, (4, 9), False, False),
    "exp": (EXP, LOG_PROB, (2, 33), True, False),
    "normal-log-prob": (NONE, LOG_PROB, (2, 33), True, False),
}


@pytest.mark.parametrize("case", GAUSSIAN)
def test_reparameterize(kernels, device, case):
    transform, side, shape, per_sample, many = GAUSSIAN[case]
    mu, logvar = pair(shape, device)
    seeds = torch.arange(shape[0]) * 5 if many else None
    on_device = None if seeds is None else seeds.to(device)
    y, total = torch.full(shape, math.nan, device=device), None
    if side:
        total = torch.full(shape[:1] if per_sample else (), math.nan, device=device)
    rest = (3, 5, transform, side, 0.25)
    assert kernels.reparameterize(mu, logvar, y, total, 11, on_device, *rest)

    mu_c, logvar_c = mu.cpu(), logvar.cpu()
    y_c, total_c = torch.empty(shape), None if total is None else torch.empty(total.shape)
    assert _C.reparameterize(mu_c, logvar_c, y_c, total_c, 11, seeds, *rest)
    same(y, y_c)
    if side:
        # Both against fp64: the sums' only difference is their order.
        eps = noise.random(shape, "normal", 11 if seeds is None else seeds, 3, 5).double()
        wide = mu_c.double(), logvar_c.double()
        if side == KL:
            terms = 0.5 * (wide[0] ** 2 - 1 + wide[1].exp() - wide[1])
            terms = terms.flatten(1).sum(1) if len(shape) > 1 else terms
        else:
            terms = reference.log_prob(*wide, eps, ("none", "tanh", "exp")[transform])
        want = 0.25 * (terms if per_sample else terms.sum())
        torch.testing.assert_close(total.cpu().double(), want, rtol=2e-6, atol=1e-5)

    grad_y = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    grad_side = torch.ones(total.shape) * 0.3 if side else None
    grads = [torch.full(shape, math.nan, device=device) for _ in range(2)]
    grads_c = [torch.empty(shape) for _ in range(2)]
    given = (grad_y.to(device), None if grad_side is None else grad_side.to(device))
    assert kernels.reparameterize_backward(*given, mu, logvar, *grads, 11, on_device, *rest)
    args = (grad_y, grad_side, mu_c, logvar_c, *grads_c, 11, seeds, *rest)
    assert _C.reparameterize_backward(*args)
    same(grads[0], grads_c[0])
    same(grads[1], grads_c[1])


def test_kl_without_a_draw_and_many_partial_sums(kernels, device):
    mu, logvar = pair((5, 3), device)
    total = torch.empty((), device=device)
    assert kernels.reparameterize(mu, logvar, None, total, 0, None, 0, 0, NONE, KL, 1.0)
    want = reference.gaussian_kl(mu.cpu().double(), logvar.cpu().double(), "sum")
    torch.testing.assert_close(total.cpu().double(), want, rtol=1e-6, atol=1e-6)

    from genfast.kernels.sampling import gaussian

    partial = torch.rand(2 * 20000, device=device)  # three programs a row, then one
    out = torch.empty(2, device=device)
    gaussian.sum_rows(partial, out, 0.5)
    want = 0.5 * partial.cpu().double().view(2, -1).sum(1)
    torch.testing.assert_close(out.cpu().double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit(kernels, device, interpreted, dtype):
    mu, logvar = (x.to(dtype) for x in pair((3, 50), device))
    y, y_c = torch.empty(3, 50, dtype=dtype, device=device), torch.empty(3, 50, dtype=dtype)
    assert kernels.reparameterize(mu, logvar, y, None, 1, None, 0, 0, NONE, NO_SIDE, 1.0)
    assert _C.reparameterize(mu.cpu(), logvar.cpu(), y_c, None, 1, None, 0, 0, NONE, NO_SIDE, 1.0)
    if interpreted and dtype == torch.bfloat16:  # the interpreter truncates
        torch.testing.assert_close(y, y_c, rtol=2.0**-7, atol=1e-6)
    else:
        same(y, y_c)


@pytest.mark.parametrize("mode", ["soft", "hard", "backward"])
def test_relaxed_bernoulli(kernels, device, mode):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 37, generator=g) * 5
    logits[0, 0] = math.nan
    grad = torch.randn(3, 37, generator=g) if mode == "backward" else None
    tau, y, y_c = torch.tensor(0.7), torch.empty(3, 37, device=device), torch.empty(3, 37)
    args = (7, None, 1, 2, mode == "hard")
    given = None if grad is None else grad.to(device)
    assert kernels.relaxed_bernoulli(logits.to(device), y, tau.to(device), given, *args)
    assert _C.relaxed_bernoulli(logits, y_c, tau, grad, *args)
    same(y, y_c)


# Shape, of the second tensor another memory order, dtype.
LIKELIHOODS = {
    "vector": ((5,), False, torch.float32),
    "aligned": ((3, 64), False, torch.float32),
    "two-tiles": ((2, 1030), False, torch.float32),
    "orders": ((3, 4, 30), True, torch.float32),
    "half": ((4, 70), False, torch.float16),
    "empty": ((3, 0), False, torch.float32),
}


@pytest.mark.parametrize("case", LIKELIHOODS)
def test_bernoulli_nll(kernels, device, case):
    shape, turned, dtype = LIKELIHOODS[case]
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=g) * 5).to(dtype)
    x = torch.rand(shape, generator=g).to(dtype)
    if turned:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    logits.flatten()[:2], x.flatten()[:2] = 1e4, 1  # a term of 0, and no overflow
    on_device, grad = (logits.to(device), x.to(device)), torch.linspace(-1, 2, shape[0])
    nll = torch.full(shape[:1], math.nan, device=device)
    assert kernels.bernoulli_nll(nll, *on_device)
    want = reference.bernoulli_nll(logits.double(), x.double())
    torch.testing.assert_close(nll.cpu().double(), want, rtol=1e-6, atol=1e-5)

    for of_logits, of_x in ((True, True), (True, False), (False, True)):
        wanted = [torch.full_like(t, math.nan) if w else None
                  for t, w in zip(on_device, (of_logits, of_x), strict=True)]  # fmt: skip
        assert kernels.bernoulli_nll_backward(grad.to(device), *wanted, *on_device)
        native = [None if w is None else torch.empty_like(t)
                  for t, w in zip((logits, x), wanted, strict=True)]  # fmt: skip
        assert _C.bernoulli_nll_backward(grad, *native, logits, x)
        for a, b in zip(wanted, native, strict=True):
            if a is not None:
                torch.testing.assert_close(a.cpu(), b)


def test_bernoulli_nll_refuses_what_would_be_garbage(kernels, device):
    a, b = torch.zeros(3, 4, device=device), torch.zeros(4, 3, device=device)
    rows = torch.zeros(3, device=device)
    assert not kernels.bernoulli_nll(rows, a, b)
    assert not kernels.bernoulli_nll(rows[:1], a, a)
    assert not kernels.bernoulli_nll_backward(rows.double(), a, None, a, a)


# shape, one seed per sample
ROWS = {
    "one-row": ((7,), False),
    "many-rows-a-program": ((5, 3), True),
    "aligned": ((2, 64), False),
    "middle": ((2, 2, 300), True),
    "loop": ((2, 4200), False),  # longer than a tile: two passes
}


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("rows", ROWS)
def test_gumbel_softmax(kernels, device, rows, hard):
    shape, many = ROWS[rows]
    g = torch.Generator().manual_seed(0)
    logits, grad = (torch.randn(shape, generator=g) * s for s in (4, 1))
    if len(shape) > 1:
        logits[0, ..., :2] = -math.inf
        logits[-1, ...] = -math.inf if len(shape) == 3 else logits[-1, ...]
    tau = torch.tensor(0.7)
    seeds = torch.arange(shape[0]) if many else None
    args = (7, None if seeds is None else seeds.to(device), 1, 2)
    y = torch.empty(shape, device=device)
    assert kernels.gumbel_softmax(logits.to(device), y, tau.to(device), *args, hard)
    y_c = torch.empty(shape)
    assert _C.gumbel_softmax(logits, y_c, tau, 7, seeds, 1, 2, hard)
    if hard:
        same(y, y_c)
    else:
        g_noise = noise.random(shape, "gumbel", 7 if seeds is None else seeds, 1, 2)
        want = reference.gumbel_softmax(logits.double(), g_noise.double(), 0.7)
        torch.testing.assert_close(y.cpu().double(), want, rtol=3e-6, atol=1e-7, equal_nan=True)

    d, d_c = torch.empty(shape, device=device), torch.empty(shape)
    saved = (None, logits.to(device)) if hard else (y, None)
    saved_c = (None, logits) if hard else (y_c, None)
    on_device = (grad.to(device), *saved, tau.to(device), d)
    assert kernels.gumbel_softmax_backward(*on_device, *args)
    assert _C.gumbel_softmax_backward(grad, *saved_c, tau, d_c, 7, seeds, 1, 2)
    torch.testing.assert_close(d.cpu(), d_c, rtol=1e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("rows", [*ROWS, "split"])
def test_categorical(kernels, device, rows):
    shape, many = ROWS.get(rows, ((1, 9000), False))  # nine tiles: nine programs, then one
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4
    if len(shape) == 3:
        logits[0, 0], logits[0, 1, 5], logits[1, 0, 7] = -math.inf, math.nan, math.inf
    seeds = torch.arange(shape[0]) if many else None
    on_device = None if seeds is None else seeds.to(device)
    index = torch.full(shape[:-1], -7, device=device)
    given = logits.to(device), index, None, None, None, None
    assert kernels.categorical(*given, 7, on_device, 1, 2) == 0
    index_c = torch.empty(shape[:-1], dtype=torch.int64)
    assert _C.categorical(logits, index_c, None, None, None, None, 7, seeds, 1, 2) >= 0
    same(index, index_c)


ALL = "temperature", "top_k", "top_p", "min_p"
# columns, dtype, settings: a number for all rows or one per row
TOKENS = {
    "temperature": (50, torch.float32, {"temperature": [1.0, 0.0, 1e-42, 0.3]}),
    "top-k": (700, torch.float32, {"top_k": [1, 30, 0, 9000]}),
    "top-k-ties": (700, torch.bfloat16, {"top_k": [3]}),
    "top-p": (700, torch.float32, {"top_p": [0.9, 0.0, 1.0, 0.3]}),
    "top-p-ties": (700, torch.bfloat16, {"top_p": [0.9, 0.5, 0.05, 0.999]}),
    "min-p": (50, torch.float32, {"min_p": [0.1, 0.0, 1.0, 0.5]}),
    "all": (
        2100,
        torch.float16,
        {"temperature": [0.8], "top_k": [40], "top_p": [0.9, 0.5, 0.99, 1.0], "min_p": [0.02]},
    ),
}


@pytest.mark.parametrize("case", TOKENS)
def test_token_filters(kernels, device, case):
    cols, dtype, settings = TOKENS[case]
    logits = (torch.randn(4, cols, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    filters = [
        torch.tensor(settings[k], dtype=torch.int64 if k == "top_k" else torch.float32)
        if k in settings
        else None
        for k in ALL
    ]
    on_device = [None if f is None else f.to(device) for f in filters]
    for seed in range(3):
        index, index_c = torch.full((4,), -7, device=device), torch.empty(4, dtype=torch.int64)
        assert kernels.categorical(logits.to(device), index, *on_device, seed, None, 0, 0) == 0
        assert _C.categorical(logits, index_c, *filters, seed, None, 0, 0) == 0
        same(index, index_c)


def test_filtered_rows_without_a_maximum(kernels, device):
    logits = torch.zeros(3, 20, device=device)
    logits[0], logits[1, 3], logits[2, 4] = -math.inf, math.nan, math.inf
    index = torch.full((3,), -7, device=device)
    t = torch.ones(1, device=device)
    assert kernels.categorical(logits, index, t, None, None, None, 0, None, 0, 0) == 0
    assert index.tolist() == [-1, -1, -1]


def test_public_functions_reach_the_kernels(device, monkeypatch):
    """Forward and backward of each function under the forced backend, against the reference."""
    mu, logvar = (x.detach().clone().contiguous() for x in pair((3, 20), device))

    def run():
        a, b = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
        z, kl = genfast.reparameterize(a, b, seed=4, return_kl=True)
        y = genfast.gumbel_softmax(a, 0.5, seed=3) + genfast.relaxed_bernoulli(b, 0.5, seed=3)
        y = y + genfast.gumbel_softmax(b, 0.5, hard=True, seed=torch.arange(3, device=device))
        ((z + y) * logvar).sum().add(kl).backward()
        tokens = genfast.sample_tokens(mu, 0.7, top_k=10, top_p=0.9, seed=1)
        return z, kl, y, a.grad, b.grad, tokens, genfast.randn(7, seed=1, device=device)

    from genfast.kernels import _launch, sampling

    launched = []
    real = _launch.launch
    for module in (sampling.gaussian, sampling.gumbel, sampling.tokens):
        monkeypatch.setattr(
            module, "launch", lambda k, *a, **o: (launched.append(k), real(k, *a, **o))
        )
    with backend("triton"):
        ours = run()
    assert len(launched) == 9  # 4 forwards, 4 backwards, the tokens
    with backend("reference"):
        want = run()
    for x, y in zip(ours, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
