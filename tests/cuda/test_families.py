"""Every CUDA kernel of rng and sampling, executed, against the CPU kernel of the same name.

Elementwise results and indices: the same bits. Sums: the order differs, so a few ulp.
"""

from __future__ import annotations

import pytest
import torch

from genfast._native import _C
from genfast.ops.rng import DISTRIBUTIONS

from .helpers import FLOATS, both, data, exact, laid_out, seeds_of

RANDOM = [
    # shape, layout, seeds, offset
    ((1,), "dense", "int", 0),
    ((4099,), "dense", "int", 0),
    ((4096,), "misaligned", "int", 0),
    ((777,), "dense", "one", 2**33 + 3),
    ((5, 301), "dense", "rows", 0),
    ((3, 7, 32), "dense", "rows", 6),
    ((6, 5, 9), "transposed", "rows", 1),
    ((33, 65), "sliced", "int", 2),
    ((2, 0, 3), "dense", "int", 0),
]


@pytest.mark.parametrize("shape, layout, seeds, offset", RANDOM, ids=lambda v: str(v))
def test_random_floats(cuda, shape, layout, seeds, offset):
    for dtype in (*FLOATS, torch.float64):
        for kind in ("uniform", "normal", "exponential", "gumbel", "logistic"):
            out = laid_out(torch.empty(shape, dtype=dtype), layout)
            seed, rows = seeds_of(seeds, shape)
            exact(both(cuda, "random", [0], out, DISTRIBUTIONS[kind], seed, rows, 9, offset, 0, 1))


@pytest.mark.parametrize("shape, layout, seeds, offset", RANDOM[:6], ids=lambda v: str(v))
def test_random_integers(cuda, shape, layout, seeds, offset):
    seed, rows = seeds_of(seeds, shape)
    for dtype, low, span in ((torch.int64, -5, 2**32), (torch.int32, -7, 13)):
        out = laid_out(torch.empty(shape, dtype=dtype), layout)
        exact(
            both(
                cuda, "random", [0], out, DISTRIBUTIONS["integer"], seed, rows, 0, offset, low, span
            )
        )
    bits = torch.empty(shape, dtype=torch.int32)
    exact(both(cuda, "random", [0], bits, DISTRIBUTIONS["bits"], seed, rows, 0, offset, 0, 1))


GAUSSIAN = [
    # shape, layout, seeds, offset, side rows per sample
    ((1030,), "dense", "int", 0, False),
    ((3, 21, 5), "dense", "rows", 5, True),
    ((4, 17), "transposed", "int", 3, True),
    ((2, 6000), "dense", "int", 1, True),
    ((2, 512), "misaligned", "rows", 0, False),
]


@pytest.mark.parametrize("shape, layout, seeds, offset, per_row", GAUSSIAN, ids=lambda v: str(v))
def test_reparameterize(cuda, shape, layout, seeds, offset, per_row):
    seed, rows = seeds_of(seeds, shape)
    for transform in range(3):
        for side_kind, parts in ((0, 1), (1, 1), (2, 3)):
            dtype = FLOATS[(transform + side_kind) % 3]
            mu, logvar = (data(shape, dtype, i, layout) for i in (1, 2))
            y = torch.empty_like(mu)
            n_side = shape[0] if per_row else 1
            side = torch.empty(shape[:1] if per_row else (), dtype=torch.float32)
            side = side if side_kind else None
            scratch = torch.full((n_side * parts,), torch.nan, dtype=torch.float64)
            call = (
                mu,
                logvar,
                y,
                side,
                seed,
                rows,
                3,
                offset,
                transform,
                side_kind,
                0.25,
                scratch if parts > 1 else None,
            )
            pairs = both(cuda, "reparameterize", [2, 3] if side_kind else [2], *call)
            exact(pairs[:1])
            for gpu, cpu in pairs[1:]:
                torch.testing.assert_close(gpu, cpu, rtol=1e-6, atol=1e-5)
            # gradients
            grad_y = data(shape, dtype, 4, layout)
            grad_side = data(side.shape, torch.float32, 5) if side_kind else None
            d_mu, d_logvar = torch.empty_like(mu), torch.empty_like(mu)
            for g in (grad_y, None) if side_kind else (grad_y,):
                exact(
                    both(
                        cuda,
                        "reparameterize_backward",
                        [4, 5],
                        g,
                        grad_side,
                        mu,
                        logvar,
                        d_mu,
                        d_logvar,
                        seed,
                        rows,
                        3,
                        offset,
                        transform,
                        side_kind,
                        0.25,
                    )
                )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("shape", "layout", "parts"),
    [((5,), "dense", 1), ((4, 784), "dense", 1), ((3, 21, 5), "transposed", 2),
     ((2, 6001), "misaligned", 3), ((3, 0), "dense", 1), ((0, 4), "dense", 1)],
    ids=str,
)  # fmt: skip
def test_bernoulli_nll(cuda, shape, layout, parts, dtype):
    logits, x = data(shape, dtype, 1, layout), data(shape, torch.float32, 2).abs()
    nll, grad = torch.empty(shape[0]), data(shape[:1], torch.float32, 3)
    scratch = torch.full((shape[0] * parts,), torch.nan, dtype=torch.float64)
    call = (nll, logits, x, scratch if parts > 1 else None)
    for gpu, cpu in both(cuda, "bernoulli_nll", [0], *call):
        torch.testing.assert_close(gpu, cpu, rtol=1e-6, atol=1e-5)
    d_logits, d_x = torch.empty_like(logits), torch.empty_like(x)
    for wanted in ((d_logits, d_x), (d_logits, None), (None, d_x)):
        places = [i + 1 for i, d in enumerate(wanted) if d is not None]
        call = (grad, *wanted, logits, x)
        for gpu, cpu in both(cuda, "bernoulli_nll_backward", places, *call):
            torch.testing.assert_close(gpu, cpu)


def test_side_alone_and_parts_agree(cuda):
    """Without y nothing is drawn; the number of partial sums moves only the rounding."""
    mu, logvar = data((3, 5001), torch.float32, 1), data((3, 5001), torch.float32, 2)
    sums = []
    for parts in (1, 2, 40):
        side = torch.empty(3)
        scratch = torch.empty(3 * parts, dtype=torch.float64)
        sums += cuda.call(
            "reparameterize", [side], mu, logvar, None, side, 0, None, 0, 0, 0, 1, 1.0, scratch
        )
    truth = 0.5 * (mu.double() ** 2 - 1 + logvar.double().exp() - logvar.double()).sum(1)
    for s in sums:
        torch.testing.assert_close(s.double(), truth, rtol=2e-7, atol=0)


ROWS = [
    # shape, layout, seeds, offset
    ((1, 1), "dense", "int", 0),
    ((5, 10), "dense", "rows", 3),
    ((3, 4, 77), "dense", "rows", 0),
    ((9, 1024), "dense", "int", 0),
    ((2, 1027), "transposed", "int", 1),
    ((2, 8200), "misaligned", "rows", 0),
    ((1, 26000), "dense", "int", 2),
]


@pytest.mark.parametrize("shape, layout, seeds, offset", ROWS, ids=lambda v: str(v))
def test_gumbel_softmax(cuda, shape, layout, seeds, offset):
    seed, rows = seeds_of(seeds, shape)
    tau = torch.tensor(0.7)
    for dtype in FLOATS:
        logits, grad = (data(shape, dtype, i, layout) for i in (1, 2))
        y, d = torch.empty_like(logits), torch.empty_like(logits)
        tolerance = {"rtol": 2e-6, "atol": 1e-7} if dtype == torch.float32 else {}
        noise = (seed, rows, 1, offset)
        for gpu, cpu in both(cuda, "gumbel_softmax", [1], logits, y, tau, *noise, False):
            torch.testing.assert_close(gpu, cpu, **tolerance)
        soft = y.clone()
        for given in (soft, None):
            source = None if given is not None else logits
            pair = both(cuda, "gumbel_softmax_backward", [4], grad, given, source, tau, d, *noise)
            torch.testing.assert_close(*pair[0], **tolerance)
        exact(both(cuda, "gumbel_softmax", [1], logits, y, tau, *noise, True))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_rows_without_a_maximum(cuda, poison):
    logits = data((4, 50), torch.float32, 1)
    logits[1, 7] = poison
    logits[2] = poison
    y, tau = torch.empty_like(logits), torch.tensor(1.0)
    exact(both(cuda, "gumbel_softmax", [1], logits, y, tau, 3, None, 0, 0, True))
    for gpu, cpu in both(cuda, "gumbel_softmax", [1], logits, y, tau, 3, None, 0, 0, False):
        torch.testing.assert_close(gpu, cpu, equal_nan=True, rtol=2e-6, atol=1e-7)
    index = torch.empty(4, dtype=torch.int64)
    one = torch.tensor([1.0])
    for filters in ((None,) * 4, (one, torch.tensor([20]), one * 0.9, one * 0.01)):
        found = cuda.call("categorical", [index], logits, index, *filters, 3, None, 0, 0)[0]
        _C.categorical(logits, index, *filters, 3, None, 0, 0)
        assert torch.equal(found, index)
        assert found[2] == -1


@pytest.mark.parametrize("shape, layout, seeds, offset", ROWS[:6], ids=lambda v: str(v))
def test_relaxed_bernoulli(cuda, shape, layout, seeds, offset):
    seed, rows = seeds_of(seeds, shape)
    for dtype in FLOATS:
        logits, grad = (data(shape, dtype, i, layout) for i in (1, 2))
        y, tau = torch.empty_like(logits), torch.tensor(0.4)
        for g, hard in ((None, False), (None, True), (grad, False)):
            exact(
                both(cuda, "relaxed_bernoulli", [1], logits, y, tau, g, seed, rows, 1, offset, hard)
            )


FILTERS = {
    # temperature, top_k, top_p, min_p
    "plain": (None, None, None, None),
    "temperature": (0.7, None, None, None),
    "greedy": (0.0, 5, 0.5, None),
    "top_k": (1.0, 7, None, None),
    "top_p": (1.3, None, 0.6, None),
    "min_p": (1.0, None, None, 0.2),
    "all": (0.8, 20, 0.7, 0.01),
    "tiny_p": (1.0, None, 0.0, None),
}


@pytest.mark.parametrize("shape, layout, seeds, offset", ROWS, ids=lambda v: str(v))
def test_categorical(cuda, shape, layout, seeds, offset):
    seed, rows = seeds_of(seeds, shape)
    for i, (name, values) in enumerate(FILTERS.items()):
        logits = data(shape, FLOATS[i % 3], 11, layout) * 2  # 16-bit logits hold many ties
        logits = laid_out(logits, layout)
        index = torch.empty(shape[:-1], dtype=torch.int64)
        filters = [
            None if v is None else torch.tensor([v], dtype=torch.int64 if j == 1 else torch.float32)
            for j, v in enumerate(values)
        ]
        pairs = both(cuda, "categorical", [1], logits, index, *filters, seed, rows, 1, offset)
        assert torch.equal(*pairs[0]), name


def test_nucleus_cuts_ties_by_column(cuda):
    """Equal logits at the edge of the nucleus: the lower columns stay, as in the reference."""
    logits = torch.zeros(64, 40)
    logits[:, 10] = 1.0
    index = torch.empty(64, dtype=torch.int64)
    top_p = torch.tensor([0.3])
    pairs = both(cuda, "categorical", [1], logits, index, None, None, top_p, None, 1, None, 0, 0)
    assert torch.equal(*pairs[0])
    mass = torch.softmax(logits[0].double(), 0)
    n = int((mass[10] + mass[0] * torch.arange(41) < 0.3).sum())
    assert set(index.tolist()) == {10, *range(n)}


def test_settings_per_row(cuda):
    logits = data((6, 100), torch.float32, 3)
    index = torch.empty(6, dtype=torch.int64)
    filters = (
        torch.linspace(0, 2, 6),
        torch.tensor([0, 1, 2, 50, 100, 200]),
        torch.linspace(0.1, 1, 6),
        torch.linspace(0, 0.5, 6),
    )
    for seed in range(8):
        pairs = both(cuda, "categorical", [1], logits, index, *filters, seed, None, 0, 0)
        assert torch.equal(*pairs[0])
