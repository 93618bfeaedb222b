"""The noise contract on Triton: the bits of the numpy reference."""

import pytest
import torch

from genfast import _C
from genfast.ops.rng import DISTRIBUTIONS
from genfast.reference import rng as reference

SEED, STREAM = 2**63 + 7, 2**40 + 3

# size, offset, one seed per row; the word says what the case is there for
CASES = {
    "one": ((1,), 0, False),
    "odd-shifted": ((333,), 3, False),  # a Philox block begins before the tensor
    "aligned": ((2, 64), 4, False),  # 16-byte stores
    "second-tile": ((1030,), 2**34 + 1, False),  # block number above 32 bits
    "rows": ((5, 7), 1, True),  # several rows a program, each with its own seed
    "long-rows": ((2, 1025), 2, True),
    "rows-3d": ((3, 2, 9), 0, True),
}


@pytest.fixture
def random(device):
    from genfast.kernels import rng

    def run(out, distribution, seed, seeds, stream, offset, *range_of):
        assert rng.random(out, DISTRIBUTIONS[distribution], seed, seeds, stream, offset, *range_of)
        return out.cpu()

    return run


@pytest.mark.parametrize("distribution", reference.DISTRIBUTIONS)
def test_bits_of_the_reference(random, device, distribution):
    for name, (size, offset, per_row) in CASES.items():
        seeds = torch.arange(size[0]) * 3 - 2 if per_row else None
        out = torch.full(size, float("nan"), device=device)
        on_device = None if seeds is None else seeds.to(device)
        got = random(out, distribution, SEED, on_device, STREAM, offset)
        want = reference.random(
            size, distribution, SEED if seeds is None else seeds, STREAM, offset
        )
        assert torch.equal(got, want), name


def test_known_answers_of_random123(random, device):
    ones = 2**64 - 1
    out = torch.zeros(4, dtype=torch.int32, device=device)
    got = random(out, "bits", 0, None, 0, 0)
    assert [x % 2**32 for x in got.tolist()] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    # Key and stream of all ones; the block number has 60 bits here, so the reference takes over.
    got = random(out, "bits", ones, None, ones, 2**62 - 4)
    want = reference.words(4, ones, ones, 2**62 - 4)
    assert [x % 2**32 for x in got.tolist()] == want.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_dtypes(random, device, interpreted, dtype, distribution):
    got = random(torch.empty(500, dtype=dtype, device=device), distribution, 5, None, 1, 0)
    want = reference.random((500,), distribution, 5, 1, dtype=dtype)
    if interpreted and dtype == torch.bfloat16 and distribution == "normal":
        # The interpreter truncates where hardware rounds: one step of 2^-7 at most.
        assert ((got.float() - want.float()).abs() <= want.float().abs() * 2.0**-7).all()
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("low, span", [(-5, 17), (-(2**31), 2**32)])
def test_integers(random, device, dtype, low, span):
    got = random(torch.empty(101, dtype=dtype, device=device), "integer", 9, None, 2, 5, low, span)
    assert torch.equal(got, reference.randint((101,), low, low + span, 9, 2, 5).to(dtype))


LAYOUTS = {
    "transposed": lambda x: x.view(6, 10, 2).permute(2, 1, 0),
    "half-of-rows": lambda x: x.view(3, 40)[:, 20:],
    "channels-last": lambda x: x.view(2, 3, 5, 4).permute(0, 3, 1, 2),
    "every-second": lambda x: x[::2],
    "scalar": lambda x: x[7],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(random, device, layout):
    memory = torch.full((120,), 7.0, device=device)
    view = LAYOUTS[layout](memory)
    got = random(view, "normal", 5, None, 1, 3)
    assert torch.equal(got, reference.random(view.shape, "normal", 5, 1, 3))
    view.fill_(7.0)
    assert (memory == 7.0).all()  # nothing was written outside the view


def test_refusals(device):
    from genfast.kernels import rng

    out = torch.empty(4, 3, device=device)
    normal = DISTRIBUTIONS["normal"]
    assert not rng.random(out, normal, 0, torch.arange(5, device=device), 0, 0)
    assert not rng.random(out, normal, 0, None, 0, -1)
    assert not rng.random(out, DISTRIBUTIONS["integer"], 0, None, 0, 0)
    assert not rng.random(out.long(), normal, 0, None, 0, 0)
    assert rng.random(out[:0], normal, 0, None, 0, 0)


def test_arguments_are_those_of_the_native_entry_point(random, device):
    ours = random(torch.empty(9, device=device), "gumbel", 3, None, 4, 5)
    native = torch.empty(9)
    assert _C.random(native, DISTRIBUTIONS["gumbel"], 3, None, 4, 5, 0, 1)
    assert torch.equal(ours, native)
