"""The CUDA kernels of normalization, executed, against the CPU kernels of the same names.

Sums are taken in another order and products fused elsewhere: a few ulp of fp32, or one of 16 bits.
"""

from __future__ import annotations

import pytest
import torch

from genfast._native import _C
from genfast.ops._scratch import ROOM
from genfast.reference.normalization import ACTIVATIONS

from .helpers import FLOATS, data

LAST = torch.channels_last
# name -> shape, groups (0: the last dimension's), memory format, misaligned
SHAPES = {
    "rows": ((2, 5, 37), 0, None, False),
    "aligned-rows": ((3, 9, 64), 0, None, False),
    "misaligned-rows": ((3, 9, 64), 0, None, True),
    "one-channel": ((4, 1), 0, None, False),
    "a-block-a-row": ((3, 2056), 0, None, False),
    "past-the-cache": ((1, 1, 24600), 0, None, False),
    "many-rows": ((2, 70, 24), 0, None, False),
    "runs": ((2, 12, 5, 7), 4, None, False),
    "aligned-runs": ((2, 4, 8, 8), 2, None, False),
    "long-runs": ((1, 6, 33, 40), 3, None, False),
    "columns": ((2, 12, 5, 7), 4, LAST, False),
    "aligned-columns": ((2, 16, 5, 7), 2, LAST, False),
    "long-columns": ((1, 24, 10, 40), 3, LAST, False),
    "vectors": ((5, 12), 3, None, False),
    # In strips: groups too long for a block, or scattered in much memory; ends that are not whole.
    "strips": ((2, 6, 96, 104), 2, None, False),
    "odd-strips": ((1, 4, 111, 113), 2, None, False),
    "one-channel-strips": ((1, 2, 160, 160), 2, None, False),
    "scattered-strips": ((3, 40, 46, 50), 8, LAST, False),
    "odd-scattered-strips": ((1, 22, 113, 107), 11, LAST, False),
    "misaligned-strips": ((1, 8, 60, 120), 2, None, True),
    "wide-scattered-strips": ((1, 1300, 15, 14), 2, LAST, False),
}
STRIPS = [name for name in SHAPES if "strips" in name]


def given(name, dtype, *wanted, rms=False, act="linear"):
    """Arguments of the entry point after y, statistics and sum: x, ..., eps."""
    shape, groups, order, misaligned = SHAPES[name]
    C = shape[1 if groups else -1]

    def like_x(salt):
        x = data(shape, dtype, salt, "misaligned" if misaligned else "dense")
        return x if order is None else x.contiguous(memory_format=order)

    rows = data((shape[0], 3 * C), dtype, 5)
    rows = dict(zip(("scale", "shift", "gate"), rows.chunk(3, 1), strict=True))
    made = {"w": data((C,), torch.float32, 3), "b": data((C,), dtype, 4), "add": like_x(6), **rows}
    names = ("w", "b", "scale", "shift", "add", "gate")
    tensors = [made[n] if n in wanted else None for n in names]
    return [like_x(1) * 2 + 1, *tensors, groups, rms, list(ACTIVATIONS).index(act), 1e-5]


def statistics_of(x, rest):
    groups, rms = rest[6:8]
    n = x.shape[0] * groups if groups else x.numel() // max(x.shape[-1], 1)
    return torch.empty(n if rms else 2 * n)


def close(pairs, scale=1.0):
    for gpu, cpu in pairs:
        eps = torch.finfo(cpu.dtype).eps
        most = max(1.0, cpu.abs().max().item()) if cpu.numel() else 1.0
        torch.testing.assert_close(gpu, cpu, rtol=2 * eps, atol=scale * (16e-7 + 2 * eps) * most)


def forward(cuda, written, *call):
    """The outputs at these places, of the CUDA kernel with its scratch and of the CPU's."""
    outputs, scratch = [call[i] for i in written], ROOM["normalize"](*call)
    if scratch is not None:
        scratch.fill_(torch.nan)
    found = cuda.call("normalize", outputs, *call, scratch)
    assert _C.normalize(*call)
    close(zip(found, outputs, strict=True))


def check(cuda, x, *rest, parts=None):
    """Forward, and backward with every gradient that there is, on both sides."""
    w, b, scale, shift, add, gate = rest[:6]
    y, statistics = torch.empty_like(x), statistics_of(x, rest)
    total = None if add is None else torch.empty_like(x)
    written = [0, 1] if total is None else [0, 1, 2]
    forward(cuda, written, y, statistics, total, x, *rest)
    if total is not None:
        x = total
    else:
        forward(cuda, [0], y, None, None, x, *rest)

    C = x.shape[1 if rest[6] else -1]
    grad, dx = torch.empty_like(x).copy_(data(x.shape, x.dtype, 8)), torch.empty_like(x)
    grad_sum = torch.empty_like(x).copy_(data(x.shape, x.dtype, 9)) if add is not None else None
    of_channels = [torch.empty(C) for _ in range(2)]
    of_samples = [None if t is None else torch.empty(x.shape[0], C) for t in (scale, shift)]
    gated = (None, None) if gate is None else (torch.empty_like(x), torch.empty(x.shape[0], C))
    for sums in ((*of_channels, *of_samples), (None, of_channels[1], None, None), (None,) * 4):
        outs = [t for t in (dx, *sums, *gated) if t is not None]
        call = (grad, grad_sum, dx, *sums, *gated, statistics, x, *rest[:4],
                add if gate is not None else None, *rest[5:])  # fmt: skip
        scratch = ROOM["normalize_backward"](*call)
        if parts is not None and scratch is not None:
            scratch = torch.empty(parts * 3 * C)
        if scratch is not None:
            scratch.fill_(torch.nan)
        found = cuda.call("normalize_backward", outs, *call, scratch)
        assert _C.normalize_backward(*call)
        # Roundings that add up in a sum of so many terms, or that 1 / deviation enlarges.
        terms = max(1, x.numel() // max(C, 1)) ** 0.5
        close(zip(found, outs, strict=True), scale=max(terms, *statistics.abs().tolist(), 1))


EVERYTHING = ("w", "b", "scale", "shift")


@pytest.mark.parametrize("name", SHAPES)
def test_layouts(cuda, name):
    check(cuda, *given(name, torch.float32, "w", "b"))
    check(cuda, *given(name, torch.bfloat16, *EVERYTHING, act="silu"))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("name", ["aligned-rows", "aligned-runs", "columns"])
def test_activations(cuda, name, act, dtype):
    check(cuda, *given(name, dtype, "b", "scale", act=act))


@pytest.mark.parametrize(
    "wanted",
    [(), ("w",), ("shift",), (*EVERYTHING, "add"), ("add", "gate"), (*EVERYTHING, "add", "gate")],
    ids=str,
)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("name", ["rows", "aligned-rows", "many-rows", "a-block-a-row"])
def test_sums_and_gates(cuda, name, rms, wanted):
    check(cuda, *given(name, torch.float32, *wanted, rms=rms, act="gelu"))
    check(cuda, *given(name, torch.float16, *wanted, rms=rms))


@pytest.mark.parametrize("parts", [1, 3, 64])
def test_the_number_of_parts_moves_only_the_rounding(cuda, parts):
    check(cuda, *given("many-rows", torch.float32, "w", "b", act="silu"), parts=parts)


def test_a_large_mean_does_not_cancel(cuda):
    x = data((4, 2000), torch.float32, 1) + 1024
    y = torch.empty_like(x)
    (got,) = cuda.call("normalize", [y], y, None, None, x, *[None] * 6, 0, False, 0, 1e-5)
    exact = torch.nn.functional.layer_norm(x.double(), (2000,))
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", STRIPS)
def test_strips(cuda, name):
    """They are what long and scattered groups get room for; without it a block takes a group, and
    a large mean cancels in neither."""
    x, *rest = given(name, torch.float32, "w", "b")
    y, statistics = torch.empty_like(x), statistics_of(x, rest)
    call = (y, statistics, None, x + 1024, *rest)
    room = ROOM["normalize"](*call)
    assert room is not None
    exact = torch.nn.functional.group_norm(
        call[3].double(), rest[6], rest[0].double(), rest[1].double()
    )
    for scratch in (room.fill_(torch.nan), None):
        got, found = cuda.call("normalize", [y, statistics], *call, scratch)
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=4e-4)
        means = call[3].double().reshape(-1, x[0].numel() // rest[6]).mean(1)
        torch.testing.assert_close(found[: len(means)].double(), means, rtol=2e-7, atol=0)


def test_short_groups_are_a_block_each(cuda):
    for name in set(SHAPES) - set(STRIPS):
        x, *rest = given(name, torch.float32)
        assert ROOM["normalize"](torch.empty_like(x), None, None, x, *rest) is None


def test_vectors_of_groups_take_one_road(cuda):
    """Of many numbers too, with room for the sums of the backward or without: the same bits."""
    x, grad, dx, dw = (data((520, 512), torch.float32, i) for i in range(4))
    statistics = torch.empty(2 * 520 * 32)
    rest = (*[None] * 6, 32, False, 0, 1e-5)
    assert _C.normalize(torch.empty_like(x), statistics, None, x, *rest)
    found = []
    for wanted in (dw[0], None):
        call = (grad, None, dx, wanted, *[None] * 5, statistics, x, *rest)
        found += cuda.call("normalize_backward", [dx], *call, ROOM["normalize_backward"](*call))
    assert torch.equal(*found)


def test_means_whose_square_overflows_in_strips(cuda):
    x, *rest = given("strips", torch.float32)
    y, x = torch.empty_like(x), x + 3e19
    call = (y, None, None, x, *rest)
    (got,) = cuda.call("normalize", [y], *call, ROOM["normalize"](*call))
    assert _C.normalize(*call) and got.isfinite().all() and y.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_sums_of_nothing_are_zero(cuda, shape):
    x, dw, d_scale = torch.empty(shape), torch.ones(8), torch.ones(shape[0], 8)
    statistics = torch.empty(0)
    settings = (None, None, torch.ones(shape[0], 8), None, None, None, 0, False, 0, 1e-5)
    assert cuda.module.normalize(x, statistics, None, x, *settings)
    call = (x, None, x, dw, None, d_scale, *[None] * 3, statistics, x, *settings)
    assert cuda.module.normalize_backward(*call)
    assert not dw.any() and not d_scale.any()


def test_no_room_for_the_sums_is_refused(cuda):
    x = torch.ones(4, 8)
    call = (x, None, torch.empty(4, 8), torch.empty(8), *[None] * 5, torch.ones(8), x, *[None] * 6,
            0, False, 0, 1e-5)  # fmt: skip
    assert not cuda.module.normalize_backward(*call)
    assert not cuda.module.normalize_backward(*call, torch.empty(23))
