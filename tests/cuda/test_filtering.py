"""Every CUDA kernel of filtering, executed, against the CPU kernel of the same name.

Values and dz are the same bits, but for gelu, whose reciprocals a CPU with AVX-512 approximates;
sums and filters are added up in another order.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from genfast.ops._scratch import ROOM
from genfast.reference.filtering import ACTIVATIONS

from .helpers import FLOATS, both, data, exact, seeds_of

NAMES = list(ACTIVATIONS)
LAST = "channels last"
# shape, dim, memory order: and what it is there for
SHAPES = {
    "eights": ((3, 16, 8, 8), 1, "dense"),
    "odd rows": ((2, 5, 7, 9), 1, "dense"),
    "long rows": ((2, 9, 33, 40), 1, "dense"),  # cut, 8 channels at a time
    "odd long rows": ((1, 3, 23, 53), 1, "misaligned"),
    "eights inside": ((2, 16, 6, 7), 1, LAST),
    "odd inside": ((2, 5, 6, 7), 1, LAST),
    "matrix": ((5, 1040), 1, "dense"),  # chunks of channels
    "odd matrix": ((3, 601), 1, "misaligned"),
    "dim 0": ((9, 4, 3), 0, "dense"),
    "dim 2": ((2, 3, 4, 40), 2, "dense"),
    "one channel": ((2, 1, 5, 300), 1, "dense"),
    "no rows": ((0, 3, 4, 4), 1, "dense"),
    "no places": ((2, 3, 0), 1, "dense"),
    "no channels": ((2, 0, 3), 1, "dense"),
}
NOISES = (None, "given", "shared", "int", "one", "rows")


def tensor(shape, dtype, salt, order):
    if order == LAST:
        return data(shape, dtype, salt).contiguous(memory_format=torch.channels_last)
    return data(shape, dtype, salt, order)


def noise_arguments(shape, dim, kind, dtype, offset=0):
    """noise, strength, seeds, seed, stream, offset, draws, dim"""
    if kind is None:
        return None, None, None, 0, 0, 0, False, dim
    one = [1 if i == dim else n for i, n in enumerate(shape)]
    strength = torch.tensor([0.6])
    if kind in ("given", "shared"):
        places = one if kind == "given" else one[dim:]
        return data(places, dtype, 21), strength, None, 0, 0, 0, False, dim
    seed, seeds = seeds_of(kind, one)
    return None, strength, seeds, seed, 2**40 + 3, offset, True, dim


def check(pairs, act):
    if not act.startswith("gelu"):
        return exact(pairs)
    for gpu, cpu in pairs:
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if cpu.dtype == torch.float32 else {}
        torch.testing.assert_close(gpu, cpu, equal_nan=True, **tolerance)


def turns(*sequences):
    """Their elements in step, again and again."""
    return zip(*map(itertools.cycle, sequences), strict=False)


@pytest.mark.parametrize("name", SHAPES)
def test_bias_act(cuda, name):
    shape, dim, order = SHAPES[name]
    settings = turns(FLOATS, NAMES[1:9], (0, 5, 2**33 + 3, 6), (-1.0, 0.4), (True, True, False))
    for kind, (dtype, act, offset, clamp, biased) in zip(NOISES * 2, settings, strict=False):
        x = tensor(shape, dtype, 1, order)
        b = data((shape[dim],), FLOATS[1 - FLOATS.index(dtype)], 2) if biased else None
        noise = noise_arguments(shape, dim, kind, dtype, offset)
        call = (torch.empty_like(x), x, b, *noise, NAMES.index(act), 0.25, 1.5, clamp)
        exact(both(cuda, "bias_act", [0], *call))


SUMS = {
    "both": (True, True),
    "bias": (True, False),
    "strength": (False, True),
    "none": (False,) * 2,
}


def backward(cuda, name, kind, dtype, act, sums, *, from_y=False, clamp=-1.0, parts=0, offset=0):
    shape, dim, order = SHAPES[name] if isinstance(name, str) else name
    source, grad = tensor(shape, dtype, 1, order), tensor(shape, dtype, 3, order)
    channels = shape[dim]
    db = torch.empty(channels) if SUMS[sums][0] else None
    d_strength = torch.empty(()) if SUMS[sums][1] and kind is not None else None
    call = (grad, torch.empty_like(grad), db, d_strength, source, from_y,
            data((channels,), torch.float32, 2), *noise_arguments(shape, dim, kind, dtype, offset),
            NAMES.index(act), 0.25, 1.5, clamp)  # fmt: skip
    scratch = ROOM["bias_act_backward"](*call)
    if parts:
        scratch = torch.empty(parts * 2 * channels, dtype=torch.float64)
    if scratch is not None:
        scratch.fill_(torch.nan)
    outputs = [t for t in call[1:4] if t is not None]
    (dz, *pairs) = both(cuda, "bias_act_backward", outputs, *call, scratch)
    check([dz], act)
    terms = grad.numel() / max(channels, 1) if d_strength is None else grad.numel()
    for gpu, cpu in pairs:
        torch.testing.assert_close(gpu, cpu, rtol=1e-6, atol=1e-6 * (1 + terms) ** 0.5)
    return [gpu for gpu, _ in pairs]


@pytest.mark.parametrize("name", SHAPES)
def test_bias_act_backward(cuda, name):
    settings = turns(NOISES[::-1], FLOATS, SUMS, (0, 3), NAMES[3:9], (False, False, True))
    for i, (kind, dtype, sums, parts, act, from_y) in zip(range(12), settings, strict=False):
        act = NAMES[i % 3] if from_y else act
        clamp = 0.5 if i % 4 == 0 else -1.0
        backward(
            cuda, name, kind, dtype, act, sums, from_y=from_y, clamp=clamp, parts=parts, offset=i
        )


@pytest.mark.parametrize("sums", SUMS)
def test_sums(cuda, sums):
    """Any number of parts, or none: the same sums but for a rounding."""
    for name, kind in (("eights", "rows"), ("odd inside", "shared"), ("matrix", "int")):
        for from_y in (False, True):
            found = [
                backward(cuda, name, kind, torch.float32, "lrelu", sums, from_y=from_y, parts=n)
                for n in (0, 1, 2, 50)
            ]
            for other in found[1:]:
                for a, b in zip(found[0], other, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("act", NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_activations(cuda, act, dtype):
    x = data((2, 3, 4, 24), dtype, 1) * 3
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 88.9, -104.0, 1e-6])
    x.view(-1)[:8] = special.to(dtype)
    for clamp in (-1.0, 0.7):
        rest = (*noise_arguments(x.shape, 1, None, dtype), NAMES.index(act), 0.2, 1.25, clamp)
        check(both(cuda, "bias_act", [0], torch.empty_like(x), x, None, *rest), act)
        call = (data(x.shape, dtype, 2), torch.empty_like(x), None, None, x, False, None, *rest)
        check(both(cuda, "bias_act_backward", [1], *call), act)


def test_large_boxes(cuda):
    """From 2^21 elements on: four groups a thread, sums of many boxes in a block."""
    for shape, dim in (((1, 130, 127, 128), 1), ((2, 8070, 130), 2)):
        name = (shape, dim, "dense")
        x, noise = (
            tensor(shape, torch.float16, 1, "dense"),
            noise_arguments(shape, dim, "int", None),
        )
        call = (torch.empty_like(x), x, None, *noise, 2, 0.2, 1.0, -1.0)
        exact(both(cuda, "bias_act", [0], *call))
        backward(cuda, name, "int", torch.float16, "lrelu", "both")


GATES = [
    ((3, 2, 16), "dense"),
    ((5, 74), "dense"),
    ((2, 64), "misaligned"),
    ((1, 2 * 999), "dense"),
    ((6,), "dense"),
    ((0, 8), "dense"),
    ((3, 0), "dense"),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("act", NAMES)
def test_gated_act(cuda, act, dtype):
    for shape, layout in GATES:
        x = data(shape, dtype, 1, layout) * 2
        y, dx = torch.empty((*shape[:-1], shape[-1] // 2), dtype=dtype), torch.empty_like(x)
        check(both(cuda, "gated_act", [0], y, x, NAMES.index(act)), act)
        grad = data(y.shape, dtype, 2, layout)
        check(both(cuda, "gated_act_backward", [1], grad, dx, x, NAMES.index(act)), act)


FILTERS = [
    # x, filter, (up, down) along W and H, padding (left, right, top, bottom), flip, gain
    ((2, 3, 8, 9), (4, 4), (2, 2), (1, 1), (2, 1, 2, 1), False, 4.0),
    ((2, 16, 9, 8), (4,), (1, 1), (2, 2), (1, 1, 1, 1), True, 1.0),
    ((3, 8, 7, 5), (3, 5), (3, 1), (2, 3), (-1, 4, 3, -2), False, -0.5),
    ((1, 10, 6, 6), (12,), (2, 2), (2, 2), (5, 6, 7, 4), False, 2.0),
    ((2, 24, 1, 1), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), False, 1.0),
    ((1, 2, 5, 5), (2, 3), (4, 5), (1, 1), (-7, 2, -3, 9), True, 1.0),
    ((2, 9, 4, 4), (2,), (7, 1), (3, 5), (9, 9, 8, 8), False, 1.0),  # places without a sample
    ((1, 2, 12, 12), (80, 80), (1, 1), (1, 2), (35, 35, 36, 35), False, 0.01),  # not in shared
    ((1, 8, 9, 9), (79,), (2, 2), (3, 3), (40, 40, 40, 40), True, 0.01),
    ((0, 3, 4, 4), (2, 2), (1, 1), (1, 1), (0, 0, 0, 0), False, 1.0),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("order", ["dense", LAST, "misaligned"])
def test_upfirdn2d(cuda, order, dtype):
    for shape, of, up, down, padding, flip, gain in FILTERS:
        x, f = tensor(shape, dtype, 1, order), data(of, torch.float32, 2)
        spans = zip((shape[3], shape[2]), up, down, padding[::2], padding[1::2], strict=True)
        OW, OH = (
            (n * u + before + after - taps) // d + 1
            for (n, u, d, before, after), taps in zip(spans, (of[-1], of[0]), strict=True)
        )
        y = tensor((*shape[:2], OH, OW), dtype, 3, LAST if order == LAST else "dense")
        ((gpu, cpu),) = both(cuda, "upfirdn2d", [0], y, x, f, *up, *down, *padding, flip, gain)
        most = max(1.0, cpu.abs().max().item()) if cpu.numel() else 1.0
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(gpu, cpu, rtol=eps, atol=max(eps, 8e-7) * most)
