"""rng: genfast.rand / randn against torch's, and one seed per row against one generator per row."""

from __future__ import annotations

from functools import partial

import torch

import genfast
from genfast.benchmarks.harness import Case, Work, assert_bitwise
from genfast.reference import rng as reference

SEED, STREAM = 1234, 5
PROOF = 4096  # elements compared at either end: the reference is numpy


def _proof(ours, distribution, n, dtype):
    x = ours(n, seed=SEED, stream=STREAM, dtype=dtype)
    for offset in {0, max(n - PROOF, 0)}:
        part = slice(offset, offset + PROOF)
        want = reference.random(x[part].shape, distribution, SEED, STREAM, offset, dtype)
        assert_bitwise(f"elements from {offset}", x[part], want)


def _fill(name, n, dtype, device):
    ours, theirs = getattr(genfast, name), getattr(torch, name)
    distribution = {"rand": "uniform", "randn": "normal"}[name]
    return Work(
        ours=partial(ours, n, seed=SEED, dtype=dtype, device=device),
        rivals={"eager": partial(theirs, n, dtype=dtype, device=device)},
        proof=partial(_proof, partial(ours, device=device), distribution, n, dtype),
    )


def _rows(shape, device):
    """A batch whose row b depends on seed b alone; the usual way is one torch.Generator a row."""
    seeds = torch.arange(shape[0], device=device)
    generators = [torch.Generator(device).manual_seed(b) for b in range(shape[0])]

    ours = partial(genfast.randn, shape, seed=seeds, device=device)

    def theirs():
        return torch.stack([torch.randn(shape[1:], generator=g, device=device) for g in generators])

    def proof():
        got = ours()
        for b in (0, shape[0] - 1):
            want = reference.random(got[b].shape, "normal", b, 0, 0, torch.float32)
            assert_bitwise(f"row {b}", got[b], want)

    return Work(ours=ours, rivals={"eager": theirs}, proof=proof)


def _case(name, n, dtype=torch.float32, **more):
    return Case(
        "rng", name, (n,), partial(_fill, name, n, dtype), dtype, bytes=n * dtype.itemsize, **more
    )


CASES = [
    _case("randn", 2**24, targets={"eager": 3.5}),
    _case("rand", 2**24, targets={"eager": 3.5}),
    _case("randn", 2**20),
    _case("rand", 2**20),
    _case("randn", 1000, note="overhead of a call"),
    _case("rand", 1000, note="overhead of a call"),
    _case("randn", 2**24, torch.bfloat16),
    Case(
        "rng",
        "randn seed per row",
        (16, 4, 64, 64),
        partial(_rows, (16, 4, 64, 64)),
        bytes=4 * 16 * 4 * 64 * 64,
    ),
]
