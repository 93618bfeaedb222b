"""The CUDA kernels of attention, executed, behind the public functions and judged by the fp64
reference as the CPU kernels are: tests/test_attention.py has the rule, the options, the shapes.

Every call runs under three schedules of threads, which must agree bit for bit.
"""

from __future__ import annotations

import pytest
import torch
from test_attention import CU_K, CU_Q, inputs, judge, naive, options_of, truth
from tolerances import REORDERED, yardstick

import genfast
from genfast.ops import _backend, _scratch
from genfast.ops._scratch import ROOM

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def splits():
    return 0  # as the op would


@pytest.fixture
def warpgroups(request):
    return "hopper" in request.fixturenames


@pytest.fixture(autouse=True)
def emulated(cuda, monkeypatch, splits, warpgroups):
    """The entry points of attention run on the emulated GPU, with the scratch that the ops give
    them there; `splits` asks for another number of blocks per row."""

    monkeypatch.setattr(_scratch, "adds_queries", lambda q: warpgroups)

    def room(name, arguments):
        scratch = ROOM[name](*arguments)
        if splits and name != "attention_backward":
            q, out = arguments[0], arguments[3]
            rows = splits * q.shape[:3].numel()
            scratch = torch.empty(rows * (out.shape[-1] + 2)) if splits > 1 else None
        return None if scratch is None else scratch.fill_(torch.nan)

    def forward(*arguments):
        scratch = room("attention_forward", arguments)
        run("attention_forward", arguments[3:5], *arguments, scratch)
        return True

    def cached(*arguments):
        scratch = room("attention_cached", arguments)
        run("attention_cached", arguments[3:5], *arguments, scratch)
        return True

    def backward(*arguments):
        scratch = room("attention_backward", arguments)
        run("attention_backward", arguments[2:7], *arguments, scratch)
        return True

    def append(*arguments):  # writes a few rows of a cache: nothing may be filled in before
        return cuda.module.attention_append(*arguments)

    def run(name, outputs, *arguments):
        outputs = [o for o in outputs if o is not None]
        added = outputs[:1] if warpgroups and name == "attention_backward" else ()
        found = cuda.call(name, outputs, *arguments, added=added)
        for out, value in zip(outputs, found, strict=True):
            out.copy_(value)

    for name, call in (
        ("forward", forward), ("backward", backward), ("cached", cached), ("append", append),
    ):  # fmt: skip
        monkeypatch.setattr(_backend.kernels, f"attention_{name}", call)


@pytest.mark.parametrize("name", options_of(None, 1, 1, 1, 1))
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_options(name, dtype):
    B, Hq, Hkv, Sq, Sk = 1, 4, 2, 33, 47
    tensors = inputs(B, Hq, Hkv, Sq, Sk, 40, dtype=dtype)
    options = options_of(name, B, Hq, Sq, Sk)
    if name == "bias per query":  # a row's bias cancels: without a sink its gradient is 0 + noise
        options["sinks"] = torch.randn(Hq)
    judge(tensors, options, name, seed=11 if "dropout_p" in options else None)


SHAPES = [
    # B, Hq, Hkv, Sq, Sk, D, Dv: odd sizes, several tiles and key blocks, D != Dv, GQA, widths
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 1, 7, 5, 3, 9),
    (1, 2, 2, 70, 13, 17, 17),
    (1, 2, 1, 66, 130, 64, 64),
    (1, 1, 1, 70, 70, 128, 96),
    (1, 2, 1, 9, 40, 200, 72),
    (1, 1, 1, 12, 40, 512, 512),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_shapes(shape, dtype):
    judge(inputs(*shape, dtype=dtype), {"causal": True, "align": "bottom_right"}, str(shape))


@pytest.mark.parametrize("rows", [1, 17], ids=["decode", "forward"])
def test_a_large_score_of_a_wide_head(rows):
    """q k = 104.5 over 256 products, where an ulp is 8e-6: one chain of them leaves the output
    1.1e-6 from fp64, as PyTorch's on the CPU; sums of 64 at a time 3e-7."""
    q, k, v = (genfast.randn((1, 4, 2048, 256), seed=7, stream=i)[:, 1:2] for i in range(3))
    q = q[:, :, 815 : 815 + rows]
    want = truth(*(x.double() for x in (q, k, v)))[0]
    assert (genfast.attention(q, k, v) - want).abs().max() < 6e-7


WARPGROUP_SHAPES = [
    # B, Hq, Hkv, Sq, Sk, D, Dv: several blocks of keys and rows on both sides; one panel, two, four
    (1, 2, 1, 90, 300, 64, 64),
    (2, 1, 1, 150, 140, 128, 72),
    (1, 3, 1, 70, 130, 96, 128),
    (1, 2, 2, 40, 390, 8, 128),
    (1, 1, 1, 140, 150, 256, 200),
]


@pytest.mark.parametrize("shape", WARPGROUP_SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True, "align": "bottom_right"}, {"window": (60, 20)}],
    ids=["all", "causal", "window"],
)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_warpgroups(hopper, shape, options, dtype):
    launched = hopper.count("products")
    judge(inputs(*shape, dtype=dtype), options, str(shape))
    assert hopper.count("products") > launched


MASKS = {
    "keys": lambda B, H, Sq, Sk, dtype: torch.rand(B, 1, 1, Sk) < 0.7,
    "side by side": lambda B, H, Sq, Sk, dtype: torch.rand(B, H, Sq, Sk) < 0.7,
    "from an odd place": lambda B, H, Sq, Sk, dtype: (torch.rand(B, H, Sq, Sk + 2) < 0.7)[
        ..., 1:-1
    ],
    "across": lambda B, H, Sq, Sk, dtype: (torch.rand(B, 1, Sk, Sq) < 0.7).mT,
    "float32": lambda B, H, Sq, Sk, dtype: torch.randn(1, H, Sq, Sk),
    "own dtype": lambda B, H, Sq, Sk, dtype: torch.randn(H, Sq, Sk).to(dtype),
    "own dtype, every second key": lambda B, H, Sq, Sk, dtype: torch.randn(B, 1, Sq, 2 * Sk).to(
        dtype
    )[..., ::2],
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_masks(cuda, kind, dtype, causal):
    """By mma and by warpgroups; odd and even numbers of keys, short and long rows."""
    torch.manual_seed(0)
    for B, H, Sq, Sk, D in ((2, 2, 70, 133, 64), (1, 2, 66, 194, 128), (2, 1, 20, 70, 200)):
        mask = MASKS[kind](B, H, Sq, Sk, dtype)
        judge(inputs(B, H, H, Sq, Sk, D, dtype=dtype), {"mask": mask, "causal": causal}, kind)


@pytest.mark.parametrize("warpgroups_too", [False, True], ids=["mma", "warpgroups"])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_the_lowest_value_of_a_dtype_masks(cuda, D, warpgroups_too):
    """transformers' masks: padding on the left fills whole blocks, and rows, with it."""
    if warpgroups_too:
        cuda.library.simt_device(9, 228)
    try:
        for dtype in (F32, F16, BF16):
            q, k, v = inputs(1, 1, 1, 70, 200, D, dtype=BF16)
            mask = torch.zeros(1, 1, 70, 200, dtype=dtype)
            mask[..., :130] = torch.finfo(dtype).min
            if dtype != F16:  # its lowest is a number like others in fp32
                mask[:, :, :9] = torch.finfo(dtype).min
            out, lse = genfast.attention(q, k, v, mask=mask, return_lse=True)
            want, want_lse = truth(*(x.double() for x in (q, k, v)), mask=mask.double())
            seen = slice(9, None) if dtype != F16 else slice(None)
            assert (out - want)[:, :, seen].abs().max() < 0.01
            assert (lse - want_lse)[:, :, seen].abs().max() < 1e-3
            if dtype != F16:
                assert not out[:, :, :9].any() and (lse[:, :, :9] == -torch.inf).all()
    finally:
        cuda.library.simt_device(8, 164)


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_warpgroups(hopper, kind):
    torch.manual_seed(0)
    for B, H, Sq, Sk, D in ((2, 2, 70, 133, 64), (1, 2, 66, 194, 128), (1, 1, 20, 70, 104)):
        mask, launched = MASKS[kind](B, H, Sq, Sk, BF16), hopper.count("products")
        judge(inputs(B, H, H, Sq, Sk, D, dtype=BF16), {"mask": mask}, kind)
        assert hopper.count("products") > launched


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_split_keys(splits, dtype):
    """Few rows, many keys: blocks share a row's keys, and their sums are merged."""
    q, k, v = inputs(1, 8, 1, 3, 530, 32, 16, dtype=dtype)
    options = {"window": (300, 0), "align": "bottom_right", "sinks": torch.randn(8)}
    out, lse = genfast.attention(q, k, v, return_lse=True, **options)
    exact, exact_lse = truth(q.double(), k.double(), v.double(), **options)
    yardstick("split", out, naive(q, k, v, **options), exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


FEW_ROWS = [
    # B, Hq, Hkv, Sq, Sk, D, Dv: one row and up to 16, of one width of the kernels each; odd ends
    (2, 1, 1, 1, 75, 64, 40),
    (1, 3, 1, 1, 70, 40, 64),
    (1, 2, 2, 1, 131, 128, 128),
    (1, 8, 1, 2, 66, 128, 72),
    (1, 16, 1, 1, 90, 256, 200),
]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", FEW_ROWS, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_few_rows(shape, dtype, splits):
    """Decoding: keys in blocks of their own, of which the last is not full."""
    q, k, v = inputs(*shape, dtype=dtype)
    options = {"causal": True, "align": "bottom_right", "softcap": 4.0}
    out, lse = genfast.attention(q, k, v, return_lse=True, **options)
    exact, exact_lse = truth(q.double(), k.double(), v.double(), **options)
    yardstick("few rows", out, naive(q, k, v, **options), exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "layout", ["(B, S, H, D)", "misaligned", "broadcast"], ids=lambda x: x.replace(" ", "")
)
def test_layouts(layout, dtype):
    """Rows that start anywhere, heads that share memory: the same values from other places."""
    tensors = inputs(2, 2, 2, 20, 30, 24, dtype=dtype)
    if layout == "misaligned":
        moved = [torch.cat([x, x[..., :3]], -1)[..., 1:-2].contiguous() for x in tensors]
        views = [torch.cat([x[..., :1], x], -1)[..., 1:] for x in moved]
        tensors = moved
    elif layout == "broadcast":
        tensors[1] = tensors[1][:, :1].expand_as(tensors[1])
        views = tensors
    else:
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    plain = [x.contiguous() for x in tensors]
    got, want = genfast.attention(*views, causal=True), genfast.attention(*plain, causal=True)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_rows_that_see_nothing(dtype):
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 2, 40, 10, 16, dtype=dtype))
    options = {"causal": True, "align": "bottom_right"}
    out, lse = genfast.attention(q, k, v, return_lse=True, **options)
    assert (out[:, :, :30] == 0).all() and (lse[:, :, :30] == -torch.inf).all()
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(torch.isfinite(g).all() for g in grads) and (grads[0][:, :, :30] == 0).all()


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"window": (7, 2)}, {"dropout_p": 0.2, "seed": 1}], ids=str
)
def test_packed(options, dtype):
    q = torch.randn(77, 4, 32).to(dtype).requires_grad_()
    k = torch.randn(100, 2, 32).to(dtype).requires_grad_()
    v = torch.randn(100, 2, 24).to(dtype).requires_grad_()
    out, lse = genfast.attention_varlen(q, k, v, CU_Q, CU_K, return_lse=True, **options)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), grad)
    with genfast.backend("reference"):
        want, want_lse = genfast.attention_varlen(q, k, v, CU_Q, CU_K, return_lse=True, **options)
        wanted = torch.autograd.grad(want, (q, k, v), grad)
    torch.testing.assert_close(out, want, **REORDERED[dtype])
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-2 if dtype == F16 else 1e-4,
                                   atol=1e-2 if dtype == F16 else 1e-5)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"window": (7, 2)}], ids=str)
def test_packed_by_warpgroups(hopper, options):
    test_packed(options, F16)


def test_rows_that_see_nothing_by_warpgroups(hopper):
    test_rows_that_see_nothing(F16)


@pytest.mark.parametrize("B, Hq", [(0, 2), (1, 0)])
def test_gradients_of_no_row_are_zeros(B, Hq):
    """No block writes them, and their memory is not new."""
    q, k = torch.randn(B, Hq, 4, 16), torch.randn(B, 1, 4, 16)
    mask, sinks = torch.randn(1, Hq, 4, 4), torch.randn(Hq)
    grads = [torch.full_like(x, torch.nan) for x in (q, k, k, mask, sinks)]
    ROOM["attention_backward"](q, None, *grads, q, k, k, mask, None, sinks, None, None, None)
    assert all((grad == 0).all() for grad in grads)


CACHES = [
    # paged, rotary, options, dtype, splits
    (False, None, {}, F32, 1),
    (True, "interleaved", {"causal": True}, F16, 1),
    (True, None, {"window": (5, 0), "softcap": 3.0}, BF16, 3),
    (False, "halves", {"causal": True}, F32, 3),
]


@pytest.mark.parametrize("paged, rotary, options, dtype, splits", CACHES, ids=str)
def test_cache(paged, rotary, options, dtype, splits):
    B, Hq, Hkv, D, new = 3, 4, 2, 32, 3
    k_cache = torch.randn(12 if paged else 5, Hkv, 16 if paged else 64, D).to(dtype)
    v_cache = torch.randn_like(k_cache)
    q, k, v = inputs(B, Hq, Hkv, new, new, D, dtype=dtype)
    more = dict(options, cache_seqlens=torch.tensor([10, 0, 50], dtype=torch.int32))
    if paged:
        more["block_table"] = torch.randperm(12).reshape(3, 4).int()
    else:
        more["cache_batch_idx"] = torch.tensor([4, 0, 2], dtype=torch.int32)
    if rotary:
        more["rotary_cos"], more["rotary_sin"] = torch.rand(2, 64, 8).to(dtype).unbind(0)
        more["rotary_interleaved"] = rotary == "interleaved"
    else:
        more["cache_leftpad"] = torch.tensor([2, 0, 7], dtype=torch.int32)
    ours, theirs = (k_cache.clone(), v_cache.clone()), (k_cache.clone(), v_cache.clone())
    out = genfast.attention_with_kvcache(q, *ours, k, v, **more)
    with genfast.backend("reference"):
        want = genfast.attention_with_kvcache(q, *theirs, k, v, **more)
    torch.testing.assert_close(out, want, **REORDERED[dtype])
    assert torch.equal(ours[1], theirs[1]) and not torch.equal(ours[1], v_cache)
    torch.testing.assert_close(ours[0], theirs[0], **REORDERED[dtype])


def test_bad_lengths_stay_inside(cuda):
    """Nobody can check values on a device: whatever they are, nothing outside is touched."""
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in inputs(1, 2, 2, 30, 30, 16, dtype=F16))
    out, lse = torch.empty_like(q), torch.empty(2, 30)
    head = (q, k, v, out, lse, None)
    tail = (None, None, 0, None, 0, None, 0.0, -1, 0, True, 0.0)
    for cu in ([0, 50, 10, 99], [-9, 2**31 - 1, -(2**31), 30]):
        rows = torch.tensor(cu, dtype=torch.int32)
        cuda.call("attention_forward", [out, lse], *head, rows, rows.flip(0), 30, 30, *tail)
    pages = torch.tensor([[-1, 10**6], [7, 0]], dtype=torch.int32)
    cache = torch.randn(3, 2, 16, 16).half()
    q, out = torch.randn(2, 2, 4, 16).half(), torch.empty(2, 2, 4, 16).half()
    for length in ([-5, 10**6], [40, 3]):
        lengths = torch.tensor(length, dtype=torch.int32)
        rest = (lengths, 9, lengths, None, pages, None, None, None, 0.0, -1, -1)
        cuda.call("attention_cached", [out], q, cache, cache, out, None, *rest)
        where = (lengths, lengths, None, pages)
        assert cuda.module.attention_append(
            q, None, q, q, cache, cache, *where, None, None, False, False
        )
