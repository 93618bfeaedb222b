"""attention: every option, layout and road against the reference in fp64, by the yardstick rule."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import REORDERED, yardstick

import genfast
from genfast.ops.attention import core, kvcache
from genfast.reference import attention as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(B, Hq, Hkv, Sq, Sk, D, Dv=None, dtype=torch.float32):
    q, k = torch.randn(B, Hq, Sq, D), torch.randn(B, Hkv, Sk, D)
    return [x.to(dtype) for x in (q, k, torch.randn(B, Hkv, Sk, Dv or D))]


def naive(q, k, v, *, mask=None, causal=False, window=(-1, -1), align="top_left", scale=None,
          softcap=0.0, alibi_slopes=None, sinks=None, keep=None, dropout_p=0.0):  # fmt: skip
    """What a user writes in PyTorch, every step rounded to q's dtype."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    Sq, Sk, dtype = q.shape[2], k.shape[2], q.dtype
    offset = Sk - Sq if align == "bottom_right" else 0
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        i, j = torch.arange(Sq)[:, None], torch.arange(Sk)
        s = s - alibi_slopes.to(dtype).view(-1, q.shape[1], 1, 1) * (i + offset - j).abs()
    left, right = core.windows(causal, window)
    seen = reference.visible(Sq, Sk, (left, right), offset)
    if mask is not None:
        if mask.dtype == torch.bool:
            seen = seen & mask
        else:
            s = s + mask.to(dtype)
    s = s.masked_fill(~seen, -math.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(dtype).view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    empty = (s == -math.inf).all(-1, keepdim=True)
    p = s.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)[..., :Sk]
    if keep is not None:
        p = p * keep / (1 - dropout_p)
    return p @ v


def truth(q, k, v, causal=False, window=(-1, -1), align="top_left", **options):
    offset = k.shape[2] - q.shape[2] if align == "bottom_right" else 0
    return reference.attention(
        q, k, v, window=core.windows(causal, window), offset=offset, **options
    )


def leaves_of(tensors, options, dtype=None):
    """Fresh leaves, and options with the float ones (mask, sinks) as leaves of the dtype."""

    def fresh(x):
        return x.detach().clone().to(dtype or x.dtype).requires_grad_()

    tensors, options = [fresh(x) for x in tensors], dict(options)
    for name in ("mask", "sinks"):
        if name in options and options[name].is_floating_point():
            options[name] = fresh(options[name])
            tensors.append(options[name])
    return tensors, options


def judge(tensors, options, what, seed=None):
    """Output, LSE and every gradient by the yardstick rule."""
    noise = {}
    if options.get("dropout_p"):
        B, Hq, Sq, Sk = (*tensors[0].shape[:3], tensors[1].shape[2])
        drawn = core.Options(seed=seed, dropout_p=options["dropout_p"])
        noise = {"keep": core._keep((B, Hq, Sq, Sk), drawn, "cpu")}
    own, extra = leaves_of(tensors, options)
    if seed is not None:
        extra["seed"] = seed
    out, lse = genfast.attention(*own[:3], return_lse=True, **extra)
    eager, extra = leaves_of(tensors, options)
    plain = naive(*eager[:3], **extra, **noise)
    wide, extra = leaves_of(tensors, options, torch.float64)
    if extra.get("alibi_slopes") is not None:
        extra["alibi_slopes"] = extra["alibi_slopes"].double()
    exact, exact_lse = truth(*wide[:3], **extra, **noise)
    yardstick(what, out, plain, exact)
    finite = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    torch.testing.assert_close(lse[finite].double(), exact_lse[finite], rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, own, grad)
    plain = torch.autograd.grad(plain, eager, grad)
    # A sink's gradient is a sum over rows that cancels.
    terms = (exact * grad).detach().sum(-1).abs()
    exact = torch.autograd.grad(exact, wide, grad.double())
    for x, name, a, b, c in zip(own, ("dq", "dk", "dv", "dextra", "dextra"), found, plain, exact,
                                strict=False):  # fmt: skip
        summed = 0.0
        if x.dim() == 1:
            name, p = "dsinks", (x[:, None].double() - exact_lse).exp()
            summed = (p * terms).sum((0, 2)).max().item()
        yardstick(f"{what} {name}", a, b, c, "gradient", summed)


def options_of(name, B, Hq, Sq, Sk):
    table = {
        "plain": {},
        "causal": {"causal": True},
        "causal bottom right": {"causal": True, "align": "bottom_right"},
        "window": {"window": (5, 3)},
        "window bottom right": {"window": (4, 0), "align": "bottom_right"},
        "bool mask": {"mask": torch.rand(B, 1, Sq, Sk) > 0.4},
        "bias": {"mask": torch.randn(B, Hq, Sq, Sk)},
        "bias per head": {"mask": torch.randn(1, Hq, 1, Sk)},
        "bias per query": {"mask": torch.randn(Sq, 1)},
        "alibi": {"alibi_slopes": torch.rand(Hq), "causal": True},
        "alibi per batch": {"alibi_slopes": torch.rand(B, Hq), "align": "bottom_right"},
        "softcap": {"softcap": 1.5},
        "sinks": {"sinks": torch.randn(Hq)},
        "scale": {"scale": 0.3},
        "dropout": {"dropout_p": 0.25},
        "everything": {
            "mask": torch.randn(B, 1, Sq, Sk), "window": (9, 4), "align": "bottom_right",
            "softcap": 3.0, "sinks": torch.randn(Hq), "alibi_slopes": torch.rand(Hq),
            "scale": 0.2, "dropout_p": 0.1,
        },
    }  # fmt: skip
    return table[name] if name else table


NAMES = tuple(options_of(None, 1, 1, 1, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_options(name, dtype):
    B, Hq, Hkv, Sq, Sk = 2, 6, 3, 33, 47
    tensors = inputs(B, Hq, Hkv, Sq, Sk, 40, dtype=dtype)
    options = options_of(name, B, Hq, Sq, Sk)
    judge(tensors, options, name, seed=11 if "dropout_p" in options else None)


# B, Hq, Hkv, Sq, Sk, D, Dv: odd sizes, one of each, several tiles and key blocks, D != Dv, MQA.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 1, 7, 5, 3, 9),
    (1, 2, 2, 100, 13, 17, 17),
    (1, 2, 2, 130, 300, 64, 64),
    (1, 4, 2, 1, 700, 64, 64),
    (1, 8, 1, 3, 530, 32, 16),
    (1, 1, 1, 97, 97, 128, 128),
    (1, 2, 1, 33, 70, 256, 80),
    (1, 1, 1, 12, 40, 512, 512),
    (3, 2, 2, 16, 16, 8, 8),
    (1, 4, 2, 200, 250, 40, 72),  # gradients: two tiles of queries, keys one block
    (1, 2, 1, 420, 600, 20, 36),  # two chunks of queries, three blocks of keys
]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_shapes(shape, causal, dtype):
    options = {"causal": causal, "align": "bottom_right"}
    judge(inputs(*shape, dtype=dtype), options, str(shape))


@pytest.mark.parametrize("options", [
    {"window": (70, 5)},
    {"window": (120, -1), "align": "bottom_right"},
    {"window": (300, -1), "align": "bottom_right"},
    {"causal": True, "sinks": torch.tensor([0.5, 2.0])},
    {"causal": True, "scale": -0.3},  # the greatest score is the least product
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("Sq, Sk", [(16, 16), (150, 270), (300, 700)])
def test_options_without_a_row_of_scores(Sq, Sk, dtype, options):
    tensors = inputs(2, 2, 1, Sq, Sk, 24, 40, dtype=dtype)
    if "sinks" not in options:
        return judge(tensors, options, str(options))
    # Without the gradient of sinks, which judge() asks for, the others are the same.
    found = []
    for wanted in (False, True):
        leaves = [x.clone().requires_grad_() for x in tensors]
        extra = options | {"sinks": options["sinks"].clone().requires_grad_(wanted)}
        genfast.attention(*leaves, **extra).sum().backward()
        found.append([x.grad for x in leaves])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **REORDERED[dtype])


@settings(max_examples=60)
@given(
    B=st.integers(0, 3), H=st.integers(1, 3), group=st.integers(1, 3), Sq=st.integers(0, 40),
    Sk=st.integers(0, 70), D=st.integers(1, 40), Dv=st.integers(1, 40), causal=st.booleans(),
    bottom=st.booleans(), left=st.integers(-1, 9), masked=st.booleans(),
)  # fmt: skip
def test_any_size(B, H, group, Sq, Sk, D, Dv, causal, bottom, left, masked):
    tensors = inputs(B, H * group, H, Sq, Sk, D, Dv)
    options = {
        "causal": causal, "align": "bottom_right" if bottom else "top_left", "window": (left, -1),
        "mask": torch.rand(Sq, Sk) > 0.5 if masked else None,
    }  # fmt: skip
    tensors = [x.requires_grad_() for x in tensors]
    out, lse = genfast.attention(*tensors, return_lse=True, **options)
    exact, exact_lse = truth(*(x.double() for x in tensors), **options)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=2e-6)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, tensors, grad)
    want = torch.autograd.grad(exact, tensors, grad.double())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-6)


def test_masked_rows_are_zero():
    q, k, v = (x.requires_grad_() for x in inputs(2, 4, 2, 6, 9, 16))
    mask = torch.ones(2, 1, 6, 9, dtype=torch.bool)
    mask[0, :, 2] = False
    mask[1] = False
    for m in (mask, torch.zeros(mask.shape).masked_fill(~mask, -math.inf).requires_grad_()):
        out, lse = genfast.attention(q, k, v, mask=m, return_lse=True)
        assert (out[0, :, 2] == 0).all() and (out[1] == 0).all() and (out[0, :, 3] != 0).any()
        assert (lse[1] == -math.inf).all()
        leaves = (q, k, v, m) if m.requires_grad else (q, k, v)
        grads = torch.autograd.grad(out.sum() + out.square().sum(), leaves)
        assert all(g.isfinite().all() for g in grads)
        assert (grads[0][1] == 0).all() and (grads[0][0, :, 2] == 0).all()
        assert (grads[1][1] == 0).all() and (grads[2][1] == 0).all()


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"causal": True}], ids=str)
@pytest.mark.parametrize("Sq", [1, 40])
@pytest.mark.parametrize("place", range(3))
def test_a_gpus_nan_is_not_lost(place, Sq, options):
    """All its bits are set. In an exponent it became the largest number, and rows finite."""
    tensors, found = inputs(1, 2, 2, Sq, Sq, 64), []
    for nan in (0x7FFFFFFF, 0x7FC00000):
        tensors[place].view(torch.int32)[0, 0, 0, 3] = nan
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = genfast.attention(*leaves, **options)
        found.append([out, *torch.autograd.grad(out.sum(), leaves)])
    assert found[0][0].isnan().any()
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(*found, strict=True))


def test_lse_gradient():
    tensors = [x.requires_grad_() for x in inputs(1, 4, 2, 9, 13, 16)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    lse = genfast.attention(*tensors, causal=True, return_lse=True)[1]
    exact = truth(*wide, causal=True)[1]
    weights = torch.randn_like(lse)
    got = torch.autograd.grad(lse, tensors[:2], weights)
    want = torch.autograd.grad(exact, wide[:2], weights.double())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_strides(dtype):
    """Heads behind the sequence, packed qkv, expanded heads, non-unit last stride, offsets."""
    base = torch.randn(2, 21, 3, 4, 16).to(dtype)
    packed = base.permute(2, 0, 3, 1, 4).unbind(0)
    q, k, v = (x.contiguous() for x in packed)
    want = genfast.attention(q, k, v, causal=True)
    got = genfast.attention(*packed, causal=True)
    assert torch.equal(got, want)
    assert got.stride(1) < got.stride(2)  # q's order of dimensions in memory
    one = k[:, :1].expand(-1, 4, -1, -1)
    assert torch.equal(genfast.attention(q, one, v), genfast.attention(q, one.contiguous(), v))
    turned = q.mT.contiguous().mT
    assert torch.equal(genfast.attention(turned, k, v, causal=True), want)
    mask = torch.randn(21, 2 * 21)[:, ::2]
    assert torch.equal(
        genfast.attention(q, k, v, mask=mask), genfast.attention(q, k, v, mask=mask.contiguous())
    )
    leaf = base.clone().requires_grad_()
    out = genfast.attention(*leaf.permute(2, 0, 3, 1, 4).unbind(0), causal=True)
    out.sum().backward()  # an expanded gradient
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    genfast.attention(*leaves, causal=True).backward(torch.ones_like(want))
    for i, x in enumerate(leaves):
        assert torch.equal(leaf.grad.permute(2, 0, 3, 1, 4)[i], x.grad)


@pytest.mark.parametrize("shape", [(1, 3, 1, 200, 1100, 48), (8, 4, 2, 150, 260, 24)], ids=str)
@pytest.mark.parametrize("options", [
    {"causal": True, "dropout_p": 0.1, "seed": 3},
    {"causal": True},
    {"window": (75, 3)},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_bits(dtype, options, shape):
    tensors = [x.requires_grad_() for x in inputs(*shape, dtype=dtype)]
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        out = genfast.attention(*tensors, align="bottom_right", **options)
        found.append((out, *torch.autograd.grad(out, tensors, torch.ones_like(out))))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("size", [2**62, 2**63 - 1, 2**64])
def test_a_window_of_any_size_is_none(size):
    """sys.maxsize says "unbounded": added to a position it would not fit 64 bits."""
    q, k, v = inputs(2, 4, 2, 33, 47, 16)
    for align in core.ALIGN:
        want = genfast.attention(q, k, v, causal=True, align=align)
        for window in ((size, 0), (size, size)):
            causal = window[1] == size
            got = genfast.attention(q, k, v, window=window, causal=causal, align=align)
            assert torch.equal(got, want)


def test_dropout():
    q, k, v = inputs(2, 3, 3, 40, 50, 16)
    a = genfast.attention(q, k, v, dropout_p=0.4, seed=5)
    assert torch.equal(a, genfast.attention(q, k, v, dropout_p=0.4, seed=torch.tensor(5)))
    assert not torch.equal(a, genfast.attention(q, k, v, dropout_p=0.4, seed=5, stream=1))
    torch.manual_seed(3)
    b = genfast.attention(q, k, v, dropout_p=0.4)
    torch.manual_seed(3)
    assert torch.equal(b, genfast.attention(q, k, v, dropout_p=0.4))
    assert (genfast.attention(q, k, v, dropout_p=1.0, seed=1) == 0).all()
    # With v = 1 an output is the kept mass / (1 - p): its mean over many rows is 1.
    means = genfast.attention(q, k, torch.ones_like(v), dropout_p=0.4, seed=9)[..., 0]
    assert abs(means.mean() - 1) < 5 * means.std() / math.sqrt(means.numel())


# ---- packed sequences ---------------------------------------------------------------------------

CU_Q = torch.tensor([0, 5, 5, 40, 77], dtype=torch.int32)
CU_K = torch.tensor([0, 9, 20, 20, 100], dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (7, 2)}, {"sinks": True}, {"dropout_p": 0.2, "seed": 1},
     {"alibi_slopes": True, "align": "top_left"}],
    ids=str,
)  # fmt: skip
def test_varlen(options, dtype):
    options = {k: torch.rand(6) if v is True and k != "causal" else v for k, v in options.items()}
    q = torch.randn(80, 6, 32).to(dtype).requires_grad_()  # three rows of no sequence
    k = torch.randn(104, 2, 32).to(dtype).requires_grad_()
    v = torch.randn(104, 2, 24).to(dtype).requires_grad_()
    out, lse = genfast.attention_varlen(q, k, v, CU_Q, CU_K, return_lse=True, **options)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), grad)
    with genfast.backend("reference"):
        want, want_lse = genfast.attention_varlen(q, k, v, CU_Q, CU_K, return_lse=True, **options)
        want_grads = torch.autograd.grad(want, (q, k, v), grad)
    torch.testing.assert_close(out, want, **REORDERED[dtype])
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    assert (out[77:] == 0).all() and (lse[:, 77:] == -math.inf).all() and (got[0][77:] == 0).all()
    for a, b in zip(got, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-2 if dtype != torch.float32 else 1e-4,
                                   atol=1.6e-2 if dtype != torch.float32 else 1e-5)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_varlen_of_no_sequences_has_a_graph(backend, dtype):
    q, sinks = torch.randn(0, 4, 8, dtype=dtype).requires_grad_(), R((4,)).requires_grad_()
    none = torch.zeros(1, dtype=torch.int32)
    with genfast.backend(backend):
        out = genfast.attention_varlen(q, q, q, none, none, sinks=sinks)
    grad, d_sinks = torch.autograd.grad(out.sum(), (q, sinks))
    assert out.shape == grad.shape == q.shape and not d_sinks.any()


# ---- key/value cache ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("paged", [False, True], ids=["entries", "pages"])
@pytest.mark.parametrize("rotary", [None, "interleaved", "halves"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (5, 0), "softcap": 3.0}],
                         ids=str)  # fmt: skip
def test_kvcache(dtype, paged, rotary, options):
    B, Hq, Hkv, D, new = 3, 4, 2, 32, 3
    k_cache = torch.randn(12 if paged else 5, Hkv, 16 if paged else 64, D).to(dtype)
    v_cache = torch.randn_like(k_cache)
    q, k, v = (x.to(dtype) for x in inputs(B, Hq, Hkv, new, new, D))
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
    out, lse = genfast.attention_with_kvcache(q, *ours, k, v, return_lse=True, **more)
    with genfast.backend("reference"):
        want, want_lse = genfast.attention_with_kvcache(q, *theirs, k, v, return_lse=True, **more)
    torch.testing.assert_close(out, want, **REORDERED[dtype])
    torch.testing.assert_close(lse, want_lse, rtol=1e-3 if rotary else 1e-5, atol=1e-3)
    assert torch.equal(ours[1], theirs[1]) and not torch.equal(ours[1], v_cache)
    torch.testing.assert_close(ours[0], theirs[0], **REORDERED[dtype])


@pytest.mark.parametrize("options", [
    {"alibi_slopes": torch.ones(3)}, {"sinks": torch.ones(1, 4)}, {"scale": "x"},
    {"scale": math.nan}, {"softcap": "x"}, {"softcap": math.inf}, {"window": (0.5, 1)},
], ids=str)  # fmt: skip
def test_a_refused_call_leaves_the_cache_alone(options):
    q, k, v = inputs(2, 4, 2, 1, 1, 8)
    caches = [torch.zeros(2, 2, 16, 8) for _ in range(2)]
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(options))}: "):
        genfast.attention_with_kvcache(q, *caches, k, v, cache_seqlens=3, **options)
    assert all((x == 0).all() for x in caches)


def test_sinks_elsewhere_leave_the_cache_alone():
    q, k, v = inputs(2, 4, 2, 1, 1, 8)
    caches = [torch.zeros(2, 2, 16, 8) for _ in range(2)]
    with pytest.raises(ValueError, match="on one device"):
        genfast.attention_with_kvcache(
            q, *caches, k, v, cache_seqlens=3, sinks=torch.ones(4, device="meta")
        )
    assert all((x == 0).all() for x in caches)


@pytest.mark.parametrize("name", ["rotary_cos", "rotary_sin", "sinks", "alibi_slopes"])
def test_negative_views_beside_a_cache(name):
    q, k, v = inputs(2, 4, 2, 1, 1, 8)
    turn = torch.rand(9, 4)
    given = {"rotary_cos": turn.cos(), "rotary_sin": turn.sin()}
    given |= {"sinks": torch.rand(4), "alibi_slopes": torch.rand(4)}
    found = []
    for x in (-given[name], torch._neg_view(given[name])):
        caches = [torch.ones(2, 2, 16, 8) for _ in range(2)]
        out = genfast.attention_with_kvcache(
            q, *caches, k, v, cache_seqlens=3, causal=True, **{**given, name: x}
        )
        found.append(torch.cat([out.flatten(), *(c.flatten() for c in caches)]))
    torch.testing.assert_close(*found)


def test_a_rotation_of_no_dimensions():
    q, k, v = inputs(2, 4, 2, 3, 3, 8)
    caches = torch.zeros(2, 2, 2, 16, 8), torch.zeros(2, 2, 2, 16, 8)
    none = {"rotary_cos": torch.ones(9, 0), "rotary_sin": torch.ones(9, 0)}
    got, want = (
        genfast.attention_with_kvcache(q, *c, k, v, cache_seqlens=0, **turn)
        for c, turn in zip(caches, (none, {}), strict=True)
    )
    assert torch.equal(got, want) and torch.equal(*caches)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autograd_sees_what_is_appended(backend):
    """A cache that an earlier call saved for its gradient is another one now."""
    cache, new = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 1, 4)
    q = torch.randn(1, 2, 1, 4, requires_grad=True)
    out = genfast.attention(q, cache, cache.clone())
    with genfast.backend(backend):
        genfast.attention_with_kvcache(new, cache, cache.clone(), new, new, cache_seqlens=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_cache_of_an_empty_batch(backend):
    with genfast.backend(backend):
        out, lse = genfast.attention_with_kvcache(
            *(torch.zeros(0, 2, n, 8) for n in (1, 16, 16)), cache_seqlens=0, return_lse=True
        )
    assert out.shape == (0, 2, 1, 8) and lse.shape == (0, 2, 1)


def test_decoding_equals_prefill():
    q, k, v = inputs(2, 8, 2, 24, 24, 32)
    whole = genfast.attention(q, k, v, causal=True)
    k_cache, v_cache = torch.full((2, 2, 32, 32), math.nan), torch.full((2, 2, 32, 32), math.nan)
    steps = [
        genfast.attention_with_kvcache(
            q[:, :, i : i + 1], k_cache, v_cache, k[:, :, i : i + 1], v[:, :, i : i + 1],
            cache_seqlens=i,
        )
        for i in range(24)
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(steps, 2), whole, **REORDERED[torch.float32])


# ---- torch's signature --------------------------------------------------------------------------

R = torch.randn
SDPA = {
    "heads behind": lambda: (
        R(2, 5, 3, 8).mT.mT.transpose(1, 2),
        *R(2, 2, 7, 3, 8).transpose(2, 3),
    ),
    "2-D": lambda: (R(5, 8), R(7, 8), R(7, 8)),
    "3-D": lambda: (R(3, 5, 8), R(3, 7, 8), R(3, 7, 8)),
    "5-D": lambda: (R(2, 2, 3, 5, 8), R(2, 2, 3, 7, 8), R(2, 2, 3, 7, 8)),
    "5-D broadcast": lambda: (R(4, 1, 3, 5, 8), R(2, 3, 7, 8), R(1, 2, 3, 7, 8), R(2, 1, 5, 7)),
    "batch of k": lambda: (R(2, 3, 5, 8), R(1, 3, 7, 8), R(1, 3, 7, 8)),
    "batch of q": lambda: (R(1, 3, 5, 8), R(2, 3, 7, 8), R(2, 3, 7, 8)),
    "one head of k": lambda: (R(2, 3, 5, 8), R(2, 1, 7, 8), R(2, 1, 7, 8)),
    "one head of q": lambda: (R(2, 1, 5, 8), R(2, 3, 7, 8), R(2, 3, 7, 8)),
    "other rank": lambda: (R(2, 3, 5, 8), R(3, 7, 8), R(3, 7, 8)),
    "Ev": lambda: (R(2, 3, 5, 8), R(2, 3, 7, 8), R(2, 3, 7, 6)),
    "mask 2-D": lambda: (R(2, 3, 5, 8), R(2, 3, 7, 8), R(2, 3, 7, 8), R(5, 7)),
    "mask 3-D": lambda: (R(2, 3, 5, 8), R(2, 3, 7, 8), R(2, 3, 7, 8), R(3, 5, 7) > 0),
    "no keys": lambda: (R(2, 3, 5, 8), R(2, 3, 0, 8), R(2, 3, 0, 8)),
    "no queries": lambda: (R(2, 3, 0, 8), R(2, 3, 7, 8), R(2, 3, 7, 8)),
    "no batch": lambda: (R(0, 3, 5, 8), R(0, 3, 7, 8), R(0, 3, 7, 8)),
    "no dimension": lambda: (R(2, 3, 5, 0), R(2, 3, 7, 0), R(2, 3, 7, 8)),
    "wide head": lambda: (R(1, 2, 3, 600), R(1, 2, 4, 600), R(1, 2, 4, 600)),
    "fp64": lambda: tuple(R(3, 2, 3, 5, 8).double()),
}


@pytest.mark.parametrize("name", SDPA)
def test_sdpa_equals_torch(name):
    args = SDPA[name]()
    got = genfast.scaled_dot_product_attention(*args)
    want = F.scaled_dot_product_attention(*args)
    assert got.shape == want.shape and got.dtype == want.dtype
    torch.testing.assert_close(got, want, **REORDERED[torch.float32])


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.7}, {"enable_gqa": True}],
                         ids=str)  # fmt: skip
def test_sdpa_options(options):
    q, k, v = inputs(2, 4, 2 if "enable_gqa" in options else 4, 9, 9, 16)
    got = genfast.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, **options),
                               **REORDERED[torch.float32])  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "scale": 0.7}, {"enable_gqa": True}],
                         ids=str)  # fmt: skip
def test_sdpa_gradients(options):
    """The road of a training call without options: first and second gradients, shared leaves."""
    tensors = inputs(2, 4, 2 if "enable_gqa" in options else 4, 9, 9, 16)
    found = []
    for sdpa, dtype in (
        (genfast.scaled_dot_product_attention, torch.float32),
        (F.scaled_dot_product_attention, torch.float64),
    ):
        q, k, v = (x.to(dtype).requires_grad_() for x in tensors)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = sdpa(q, k, v, **options)
        first = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))
        out = sdpa(q, k, v, **options)
        (only,) = torch.autograd.grad(out.sum(), (k,))  # an expanded gradient, one operand of three
        found.append([x.detach().double() for x in (out, *first, *second, only)])
    for a, b in zip(*found, strict=True):  # second gradients: up to 13, of sums over both
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    q = tensors[0].clone().requires_grad_()
    one = genfast.scaled_dot_product_attention(q, q, q)
    three = [q.detach().clone().requires_grad_() for _ in range(3)]
    genfast.scaled_dot_product_attention(*three).sum().backward()
    (got,) = torch.autograd.grad(one.sum(), q)
    torch.testing.assert_close(got, sum(x.grad for x in three), **REORDERED[torch.float32])
    many = torch.autograd.grad(
        genfast.scaled_dot_product_attention(q, q, q), q, torch.ones(3, *q.shape),
        is_grads_batched=True,
    )  # fmt: skip
    torch.testing.assert_close(many[0], got.expand(3, *q.shape), rtol=1e-4, atol=1e-5)


def test_autocast():
    q, k, v = inputs(2, 4, 4, 9, 9, 16)
    with torch.autocast("cpu"):
        assert genfast.scaled_dot_product_attention(q, k, v, R(9, 9)).dtype == torch.bfloat16
        assert genfast.attention(q, k, v.bfloat16()).dtype == torch.bfloat16
        wide = genfast.attention(*(x.double() for x in (q, k, v)))
        half = [x.bfloat16() for x in (q, k, v)]
        by_kernel, composed = genfast.attention(*half), torch.func.vjp(genfast.attention, *half)[0]
    assert wide.dtype == torch.float64
    # Products of 16 bits, as autocast would make them of the composite's, lose 3e-2.
    torch.testing.assert_close(by_kernel, composed, rtol=8e-3, atol=4e-3)


# ---- transforms and tracing ---------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic):
    def f(q, k, v, mask):
        out, lse = genfast.attention(q, k, v, mask=mask, causal=True, softcap=2.0, return_lse=True)
        return out.sin() + lse.unsqueeze(-1)

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for S in (6, 9):
        args = (*inputs(1, 4, 2, S, S, 8), torch.randn(S, S))
        ours, theirs = ([x.clone().requires_grad_() for x in args] for _ in range(2))
        compiled(*ours).sum().backward()
        f(*theirs).sum().backward()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_compile_cache_and_dropout():
    def f(q, k_cache, v_cache, k, v, n):
        out = genfast.attention_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=n)
        return genfast.scaled_dot_product_attention(out, k, v, dropout_p=0.1), out

    q, k, v = inputs(2, 2, 2, 1, 1, 8)
    n = torch.tensor([3, 5], dtype=torch.int32)
    caches = torch.randn(2, 2, 2, 16, 8)
    a, b = caches.clone(), caches.clone()
    _, got = torch.compile(f, fullgraph=True, backend="aot_eager")(q, *a, k, v, n)
    _, want = f(q, *b, k, v, n)
    torch.testing.assert_close(got, want)
    assert torch.equal(a, b) and not torch.equal(a, caches)


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return genfast.attention(q, k, v, causal=True)

    args = tuple(inputs(1, 2, 2, 5, 7, 8))
    program = torch.export.export(Model(), args)
    assert any("genfast.attention" in str(n.target) for n in program.graph.nodes)
    torch.testing.assert_close(program.module()(*args), Model()(*args))


def op_arguments(name):
    q, k, v = (x.requires_grad_() for x in inputs(2, 4, 2, 5, 7, 8))
    tail = (7, None, 0, None, 0.0, -1, 0, True, 0.0)
    if name == "dense":
        extras = (R(1, 4, 5, 7, requires_grad=True), torch.rand(4), R(4, requires_grad=True))
        return q, k, v, *extras, None, None, 0, 0, 7, None, 0, None, 2.0, -1, 3, True, 0.25
    if name == "heads behind":
        turned = (R(2, 5, 4, 8, requires_grad=True).transpose(1, 2), k.detach(), v.detach())
        return *turned, None, None, None, None, None, 0, 0, *tail
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = (R(12, 4, 8, requires_grad=True), R(12, 2, 8), R(12, 2, 8))
    return *packed, None, None, None, cu, cu, 7, 7, *tail


@pytest.mark.parametrize("name", ["dense", "heads behind", "packed"])
def test_opcheck(name):
    torch.library.opcheck(core._op, op_arguments(name))


def test_opcheck_cache():
    n = torch.tensor([3, 5], dtype=torch.int32)
    args = (R(2, 4, 1, 8), R(2, 2, 16, 8), R(2, 2, 16, 8), R(2, 2, 1, 8), R(2, 2, 1, 8), n)
    none = (None, None, True, None, None, None, None, 0.0, None, None, -1, -1)
    torch.library.opcheck(kvcache._op, args + none)


def test_transforms():
    q, k, v = inputs(2, 2, 2, 5, 7, 8)

    def f(q):
        return genfast.attention(q, k, v, causal=True, softcap=2.0)

    many = torch.func.vmap(f)(torch.stack([q, 2 * q]))
    torch.testing.assert_close(many, torch.stack([f(q), f(2 * q)]), rtol=1e-5, atol=1e-6)
    _, tangent = torch.func.jvp(f, (q,), (torch.ones_like(q),))
    eps = 1e-6
    wide = [x.double() for x in (k, v)]
    step = [genfast.attention(q.double() + e, *wide, causal=True, softcap=2.0) for e in (eps, -eps)]
    torch.testing.assert_close(tangent.double(), (step[0] - step[1]) / (2 * eps),
                               rtol=1e-3, atol=1e-5)  # fmt: skip
    leaf = q.clone().requires_grad_()
    (want,) = torch.autograd.grad(f(leaf).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: f(x).sum())(q), want, rtol=1e-4, atol=1e-6)


def test_double_backward():
    wide = [x.double().requires_grad_() for x in inputs(1, 2, 1, 3, 4, 4)]
    sinks = R(2).double().requires_grad_()

    def f(q, k, v, sinks):
        return genfast.attention(q, k, v, causal=True, softcap=3.0, sinks=sinks)

    assert torch.autograd.gradcheck(f, (*wide, sinks))
    assert torch.autograd.gradgradcheck(f, (*wide, sinks))
    narrow = [x.detach().float().requires_grad_() for x in wide]

    def second(leaves):
        (g,) = torch.autograd.grad(
            genfast.attention(*leaves, causal=True).square().sum(), leaves[0], create_graph=True
        )
        return torch.autograd.grad(g.square().sum(), leaves)

    for a, b in zip(second(narrow), second(wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_an_empty_batch_has_zero_gradients():
    """sinks and a broadcast mask outlive the batch: their gradients are sums over nothing."""
    q, k, v = (torch.empty(0, 4, n, 8, requires_grad=True) for n in (2, 3, 3))
    sinks = torch.randn(4, requires_grad=True)
    mask = torch.randn(1, 1, 2, 3, requires_grad=True)
    genfast.attention(q, k, v, mask=mask, sinks=sinks).sum().backward()
    assert (sinks.grad == 0).all() and (mask.grad == 0).all()
