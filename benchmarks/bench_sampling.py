"""sampling: the fused draws against the PyTorch lines that they replace, eager and compiled."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import genfast
from genfast.benchmarks.compare import SEED, step
from genfast.benchmarks.harness import Case, Work, assert_bitwise, assert_judged
from genfast.models._seeds import sample_seeds
from genfast.reference import rng as noise
from genfast.reference import sampling as reference


def _inputs(count, shape, device):
    return [
        genfast.randn(shape, seed=SEED, stream=100 + i, device=device) * 0.5 for i in range(count)
    ]


def _first(shape, limit):
    """Rows of dim 0 that a proof in float64 looks at: about `limit` elements."""
    row = max(int(torch.Size(shape[1:]).numel()), 1)
    return max(1, min(shape[0], limit // row))


# ---- reparameterize ------------------------------------------------------------------------------


def _eager_reparameterize(mu, logvar):
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    kl = 0.5 * (mu.pow(2) + logvar.exp() - 1 - logvar).sum() / mu.shape[0]
    return z, kl


def _fused_reparameterize(mu, logvar, seed=None):
    return genfast.reparameterize(mu, logvar, seed=seed, return_kl=True)


def _prove_reparameterize(mu, logvar, grads=None, kl=True):
    """By the road that is timed: grads of z and the KL, None where nothing goes backward."""
    n = _first(mu.shape, 2**16)
    eps = noise.random(mu[:n].shape, "normal", SEED).to(mu.device)

    def values(dtype, fused):
        x = [v[:n].to(dtype, copy=True).requires_grad_(grads is not None) for v in (mu, logvar)]
        if fused:
            out = genfast.reparameterize(*x, seed=SEED, return_kl=kl)
            out = out if kl else (out,)
        else:
            out = reference.reparameterize(*x, eps.to(dtype)), reference.gaussian_kl(*x)
        if grads is None:
            return out
        dz, dkl = grads
        return *out, *torch.autograd.grad(out, x, (dz[:n].to(dtype), dkl.to(dtype)))

    got, eager = values(torch.float32, True), values(torch.float32, False)
    names = ("z", "kl", "d_mu", "d_logvar")
    for name, *three in zip(names, got, eager, values(torch.float64, False), strict=False):
        assert_judged(name, *three, 3.0 if name.startswith("d_") else 2.0)


def _reparameterize(shape, backward, device):
    mu, logvar, dz = _inputs(3, shape, device)
    dkl = torch.tensor(0.7, device=device)
    calls = {}
    for name, make in (
        ("ours", lambda: _fused_reparameterize),
        ("eager", lambda: _eager_reparameterize),
        ("compile", lambda: torch.compile(_eager_reparameterize, dynamic=False)),
    ):
        if backward:
            calls[name] = lambda make=make: step(make(), (mu, logvar), (dz, dkl))
        else:
            calls[name] = lambda make=make: partial(make(), mu, logvar)
    return Work(
        ours=calls["ours"](),
        rivals={"eager": calls["eager"]()},
        late={"compile": calls["compile"]},
        proof=partial(_prove_reparameterize, mu, logvar, (dz, dkl) if backward else None),
    )


def _each_by_its_seed(shape, device):
    """Training of a VAE: every sample has its own seed and its own KL."""
    mu, logvar, dz = _inputs(3, shape, device)
    seeds, dkl = sample_seeds(len(mu), SEED, device=device), dz[:, 0].contiguous()
    eps = [noise.random(shape[1:], "normal", seed) for seed in seeds.tolist()]

    def fused(mu, logvar):
        return genfast.reparameterize(mu, logvar, seed=seeds, return_kl=True, kl_reduction="none")

    def eager(mu, logvar):
        kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)
        return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu), kl

    def proof():
        def values(dtype, forward):
            x = [v.to(dtype, copy=True).requires_grad_() for v in (mu, logvar)]
            out = forward(*x)
            return *out, *torch.autograd.grad(out, x, (dz.to(dtype), dkl.to(dtype)))

        def plain(mu, logvar):
            z = reference.reparameterize(mu, logvar, torch.stack(eps).to(mu))
            return z, reference.gaussian_kl(mu, logvar, reduction="none")

        three = (torch.float32, fused), (torch.float32, plain), (torch.float64, plain)
        for name, *found in zip(
            ("z", "kl", "d_mu", "d_logvar"), *(values(*v) for v in three), strict=True
        ):
            assert_judged(name, *found, 3.0 if name.startswith("d_") else 2.0)

    call = partial(step, leaves=(mu, logvar), grads=(dz, dkl))
    return Work(
        ours=call(fused),
        rivals={"eager": call(eager)},
        late={"compile": lambda: call(torch.compile(eager, dynamic=False))},
        proof=proof,
    )


def _overhead(device):
    """1,000 elements: a call must not cost more than two eager ops."""
    mu, logvar = _inputs(2, (1000,), device)

    def two_ops():
        torch.exp(logvar)
        return mu + logvar

    return Work(
        ours=lambda: genfast.reparameterize(mu, logvar, seed=SEED),
        rivals={
            "two ops": two_ops,
            "eager": lambda: mu + torch.exp(0.5 * logvar) * torch.randn_like(mu),
        },
        proof=partial(_prove_reparameterize, mu, logvar, kl=False),
    )


def _gaussian(shape, backward, **more):
    n = torch.Size(shape).numel()
    # Forward: read mu, logvar, write z. Backward: read mu, logvar, dz, write d_mu, d_logvar.
    name = "reparameterize+kl" + (" fwd+bwd" if backward else "")
    return Case(
        "sampling",
        name,
        shape,
        partial(_reparameterize, shape, backward),
        bytes=4 * n * (8 if backward else 3),
        **more,
    )


# ---- the Gumbel family ---------------------------------------------------------------------------


def _eager_gumbel(logits, hard=False):
    return F.gumbel_softmax(logits, tau=0.7, hard=hard)


def _eager_bernoulli(logits, hard=False):
    u = torch.rand_like(logits).clamp_(1e-7, 1 - 1e-7)
    soft = torch.sigmoid((logits + torch.log(u) - torch.log1p(-u)) / 0.7)
    return (soft > 0.5).to(soft.dtype) - soft.detach() + soft if hard else soft


# name -> public function, the usual PyTorch lines, reference, distribution of its noise.
RELAXED = {
    "gumbel_softmax": (
        genfast.gumbel_softmax,
        _eager_gumbel,
        reference.gumbel_softmax,
        "gumbel",
    ),
    "relaxed_bernoulli": (
        genfast.relaxed_bernoulli,
        _eager_bernoulli,
        reference.relaxed_bernoulli,
        "logistic",
    ),
}


def _relaxed(name, shape, hard, backward, device):
    ours, eager, plain, distribution = RELAXED[name]
    logits, dy = _inputs(2, shape, device)

    def proof():
        n = _first(shape, 2**16)
        g = noise.random((n, *shape[1:]), distribution, SEED).to(device)
        found = []
        for dtype, fused in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
            x = logits[:n].to(dtype, copy=True).requires_grad_(backward)
            y = ours(x, 0.7, hard, seed=SEED) if fused else plain(x, g.to(dtype), 0.7, hard)
            dx = torch.autograd.grad(y, x, dy[:n].to(dtype)) if backward else ()
            found.append((y.detach(), *dx))
        (y, *dx), (y32, *dx32), (y64, *dx64) = found
        if hard:  # one-hot: the choice is exact
            assert_bitwise("y", y.round(), y64.round().float())
        else:
            assert_judged("y", y, y32, y64)
        if backward:
            assert_judged("d_logits", *dx, *dx32, *dx64, 3.0)

    calls = {}
    for who, make in (
        ("ours", lambda: lambda x: ours(x, 0.7, hard)),
        ("eager", lambda: partial(eager, hard=hard)),
        ("compile", lambda: torch.compile(partial(eager, hard=hard), dynamic=False)),
    ):
        if backward:
            calls[who] = lambda make=make: step(make(), (logits,), (dy,))
        else:
            calls[who] = lambda make=make: partial(make(), logits)
    return Work(
        ours=calls["ours"](),
        rivals={"eager": calls["eager"]()},
        late={"compile": calls["compile"]},
        proof=proof,
    )


def _relax(name, shape, hard=False, backward=False, **more):
    n = torch.Size(shape).numel()
    label = name + (" hard" if hard else "") + (" fwd+bwd" if backward else "")
    return Case(
        "sampling",
        label,
        shape,
        partial(_relaxed, name, shape, hard, backward),
        bytes=4 * n * (5 if backward else 2),
        **more,
    )


# ---- the Bernoulli likelihood --------------------------------------------------------------------


def _likelihood(shape, backward, device):
    logits, x = _inputs(2, shape, device)
    x, grad = torch.sigmoid(x), torch.linspace(0.5, 1.5, shape[0], device=device)

    def proof():
        n = _first(shape, 2**16)
        found = []
        for f, dtype in (
            (genfast.bernoulli_nll, torch.float32),
            (reference.bernoulli_nll, torch.float32),
            (reference.bernoulli_nll, torch.float64),
        ):
            leaf = logits[:n].to(dtype, copy=True).requires_grad_(backward)
            nll = f(leaf, x[:n].to(dtype))
            d = torch.autograd.grad(nll, leaf, grad[:n].to(dtype)) if backward else ()
            found.append((nll.detach(), *d))
        for name, values in zip(("nll", "d_logits"), zip(*found, strict=True), strict=False):
            assert_judged(name, *values)

    def call(f):
        if not backward:
            return partial(f, logits, x)
        return step(lambda leaf: f(leaf, x), (logits,), (grad,))

    return Work(
        ours=call(genfast.bernoulli_nll),
        rivals={"eager": call(reference.bernoulli_nll)},
        late={"compile": lambda: call(torch.compile(reference.bernoulli_nll, dynamic=False))},
        proof=proof,
    )


def _bernoulli(shape, backward=False):
    n = torch.Size(shape).numel()
    return Case(
        "sampling",
        "bernoulli_nll" + (" fwd+bwd" if backward else ""),
        shape,
        partial(_likelihood, shape, backward),
        bytes=4 * n * (5 if backward else 2),
    )


# ---- categorical and tokens ----------------------------------------------------------------------


def _prove_draw(draw, filtered, logits):
    """The draw is the argmax of the filtered logits + the contract's Gumbel noise, in float64;
    rows whose two best candidates are within rounding are not judged (there are hardly any)."""
    got = draw()
    rows = min(got.numel(), 64)
    gumbel = noise.random(logits.shape, "gumbel", SEED).double()[:rows]
    keys = filtered(logits[:rows].cpu()).double() + gumbel
    best = keys.topk(2, -1)
    clear = best.values[:, 0] - best.values[:, 1] > 1e-4
    if clear.sum() < 0.9 * rows:
        raise AssertionError("too few clear rows: the proof would show nothing")
    assert_bitwise("index", got[:rows].cpu()[clear], best.indices[clear, 0])


def _categorical(shape, device):
    (logits,) = _inputs(1, shape, device)
    return Work(
        ours=lambda: genfast.sample_categorical(logits),
        rivals={"eager": lambda: torch.multinomial(torch.softmax(logits, -1), 1)},
        late={
            "compile": lambda: torch.compile(
                lambda: torch.multinomial(torch.softmax(logits, -1), 1), dynamic=False
            )
        },
        proof=partial(
            _prove_draw,
            lambda: genfast.sample_categorical(logits, seed=SEED),
            lambda x: x,
            logits,
        ),
    )


def torch_sample_tokens(logits, temperature, top_k, top_p):
    """The composition found in generation loops: top-k, sort, softmax, cumsum, multinomial."""
    x = logits / temperature
    if top_k:
        x = x.masked_fill(x < torch.topk(x, top_k).values[..., -1:], -torch.inf)
    if top_p is not None:
        values, order = torch.sort(x, descending=True)
        mass = torch.softmax(values, -1).cumsum(-1)
        drop = mass - torch.softmax(values, -1) >= top_p
        x = x.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return torch.multinomial(torch.softmax(x, -1), 1)


def _tokens(shape, temperature, top_k, top_p, device):
    logits = _inputs(1, shape, device)[0] * 6  # peaked like a language model's
    ours = partial(genfast.sample_tokens, logits, temperature, top_k, top_p)

    def filtered(x):
        rows = x.shape[0]
        return reference.filter_logits(
            x.float() / temperature,
            [top_k or 0] * rows,
            [1.0 if top_p is None else top_p] * rows,
        )

    return Work(
        ours=ours,
        rivals={"eager": partial(torch_sample_tokens, logits, temperature, top_k, top_p)},
        late={
            "compile": lambda: partial(
                torch.compile(torch_sample_tokens, dynamic=False),
                logits,
                temperature,
                top_k,
                top_p,
            )
        },
        proof=partial(_prove_draw, partial(ours, seed=SEED), filtered, logits),
    )


def _draw_tokens(name, top_k, top_p):
    shape = (8, 50257)
    return Case(
        "sampling",
        name,
        shape,
        partial(_tokens, shape, 0.8, top_k, top_p),
        bytes=4 * 8 * 50257,
    )


CASES = [
    _gaussian((16, 4, 64, 64), True, targets={"eager": 6.0, "compile": 4.0}),
    _gaussian((64, 16, 128, 128), True, targets={"eager": 6.0, "compile": 4.0}),
    _gaussian((128, 20), True, note="the latent of the 784-400-20 VAE"),
    Case(
        "sampling",
        "reparameterize+kl of each sample fwd+bwd",
        (128, 20),
        partial(_each_by_its_seed, (128, 20)),
        bytes=4 * 128 * 20 * 8,
    ),
    _gaussian((16, 4, 64, 64), False),
    Case(
        "sampling",
        "reparameterize",
        (1000,),
        _overhead,
        bytes=4 * 3000,
        note="overhead of a call without gradients, against exp(logvar) and mu + logvar",
    ),
    _relax("gumbel_softmax", (4096, 1024), targets={"eager": 4.0}),
    _relax("gumbel_softmax", (4096, 1024), backward=True),
    _relax("gumbel_softmax", (4096, 1024), hard=True),
    *(
        _relax("gumbel_softmax", (3840, 10), hard, backward, note="30 variables of 10 classes")
        for hard, backward in ((False, False), (False, True), (True, True))
    ),
    _relax("relaxed_bernoulli", (4096, 1024)),
    _relax("relaxed_bernoulli", (4096, 1024), backward=True),
    _bernoulli((128, 784)),
    _bernoulli((128, 784), backward=True),
    _bernoulli((64, 3, 128, 128), backward=True),
    *(
        Case(
            "sampling",
            "sample_categorical",
            shape,
            partial(_categorical, shape),
            bytes=4 * shape[0] * shape[1],
        )
        for shape in ((4096, 1024), (3840, 10))
    ),
    _draw_tokens("sample_tokens", None, None),
    _draw_tokens("sample_tokens top_k=50", 50, None),
    _draw_tokens("sample_tokens top_p=0.9", None, 0.9),
    _draw_tokens("sample_tokens top_k=50 top_p=0.9", 50, 0.9),
]
