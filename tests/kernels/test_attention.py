"""attention on Triton: outputs, LSE and every gradient against the reference in fp64, for all
options at odd sizes; dropout with the very mask of the CPU."""

import math

import pytest
import torch
from draws import draw

import genfast
from genfast import _C
from genfast.ops._backend import backend
from genfast.ops.attention.core import Options, _keep
from genfast.reference import attention as reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# fp32: sums in another order. 16 bit: P and dS are rounded before the second product.
CLOSE = {F32: (2e-5, 2e-5), F16: (4e-3, 4e-3), BF16: (3e-2, 3e-2)}


@pytest.fixture
def kernels(device):
    from genfast.kernels import attention

    return attention


def close(got, want, dtype=F32, factor=1.0):
    rtol, atol = (factor * t for t in CLOSE[dtype])
    torch.testing.assert_close(got.cpu().double(), want.double(), rtol=rtol, atol=atol)


# B, Hq, Hkv, Sq, Sk, D, Dv, options; the word says what the case is there for
DENSE = {
    "plain": (2, 2, 2, 5, 9, 16, 16, {}),
    "odd-dims": (1, 2, 2, 7, 33, 24, 40, {}),
    "tiny": (1, 1, 1, 1, 1, 1, 3, {}),
    "many-blocks": (1, 1, 1, 140, 150, 16, 16, {}),
    "causal": (1, 2, 2, 140, 140, 16, 16, {"right": 0}),
    "causal-wide": (1, 2, 1, 9, 33, 16, 16, {"right": 0}),
    "bottom-right": (1, 2, 1, 9, 200, 16, 16, {"right": 0, "bottom_right": True}),
    "bottom-right-tall": (1, 1, 1, 20, 7, 16, 16, {"right": 0, "bottom_right": True}),
    # Blocks of keys larger than the tile of rows, and tiles that see no key.
    "bottom-right-taller": (1, 1, 1, 60, 7, 72, 72,
                            {"right": 0, "bottom_right": True, "softcap": 5.0}),
    "window": (1, 2, 2, 150, 150, 16, 8, {"left": 9, "right": 4}),
    "window-left": (1, 1, 1, 30, 200, 16, 16, {"left": 50, "bottom_right": True}),
    "grouped": (2, 6, 2, 11, 70, 16, 16, {"right": 0}),
    "grouped-decode": (2, 8, 2, 1, 90, 16, 16, {"right": 0, "bottom_right": True}),
    "boolean-mask": (2, 2, 1, 9, 20, 16, 16, {"mask": ("bool", (2, 1, 9, 20))}),
    "padding-mask": (2, 2, 2, 9, 20, 16, 16, {"mask": ("bool", (2, 1, 1, 20)), "right": 0}),
    "bias": (2, 3, 3, 9, 20, 16, 16, {"mask": ("float", (2, 3, 9, 20))}),
    "bias-of-heads": (2, 4, 2, 9, 70, 16, 16, {"mask": ("float", (4, 9, 70)), "right": 0}),
    "bias-of-keys": (2, 2, 2, 80, 9, 16, 16, {"mask": ("float", (2, 1, 1, 9))}),
    "bias-of-rows": (2, 2, 2, 9, 80, 16, 16, {"mask": ("float", (9, 1)), "sinks": True}),
    "bias-half": (1, 2, 2, 9, 20, 16, 16, {"mask": ("half", (1, 2, 9, 20))}),
    "alibi": (2, 2, 2, 9, 20, 16, 16, {"alibi": (2,), "right": 0, "bottom_right": True}),
    "alibi-batched": (2, 4, 2, 9, 20, 16, 16, {"alibi": (2, 4)}),
    "softcap": (1, 2, 2, 9, 70, 16, 16, {"softcap": 1.5, "mask": ("float", (9, 70))}),
    "sinks": (2, 2, 1, 9, 20, 16, 16, {"sinks": True, "right": 0}),
    "scale": (1, 1, 1, 5, 6, 16, 16, {"scale": 0.9}),
    "dropout": (2, 2, 1, 9, 20, 16, 16, {"p": 0.4}),
    "dropout-odd": (1, 2, 2, 7, 71, 16, 16, {"p": 0.4, "right": 0, "seeds": True}),
    "dropout-all": (1, 1, 1, 5, 8, 16, 16, {"p": 1.0}),
    "everything": (
        2, 4, 2, 9, 72, 20, 12,
        {"p": 0.3, "left": 30, "right": 3, "bottom_right": True, "alibi": (4,), "softcap": 2.0,
         "sinks": True, "mask": ("float", (1, 4, 9, 72))},
    ),
    "half": (1, 2, 2, 20, 70, 32, 32, {"dtype": F16, "right": 0}),
    "bfloat": (1, 2, 1, 20, 70, 32, 32, {"dtype": BF16}),
    "split-keys": (1, 2, 2, 3, 1100, 16, 16, {"sinks": True}),
    "split-window": (1, 2, 1, 2, 1100, 16, 16, {"left": 300, "right": 0, "bottom_right": True}),
    "wide": (1, 1, 1, 5, 20, 160, 96, {}),
    "no-keys": (1, 2, 2, 4, 0, 16, 16, {"sinks": True}),
}  # fmt: skip


def options_of(o, D):
    seeds = torch.tensor([77]) if o.get("seeds") else None
    return Options(
        5, seeds, 3, o.get("scale"), o.get("softcap", 0.0), o.get("left", -1), o.get("right", -1),
        o.get("bottom_right", False), o.get("p", 0.0),
    )  # fmt: skip


def moved(options, device):
    return options._replace(seeds=None if options.seeds is None else options.seeds.to(device))


def to(device, *tensors):
    return [None if t is None else t.to(device) for t in tensors]


@pytest.mark.parametrize("case", DENSE)
def test_dense(kernels, device, interpreted, case):
    B, Hq, Hkv, Sq, Sk, D, Dv, o = DENSE[case]
    dtype = o.get("dtype", F32)
    if interpreted and dtype == BF16:
        pytest.skip("the interpreter's dot multiplies the bits of bfloat16 as integers")
    q = draw(B, Sq, Hq, D, dtype=dtype).transpose(1, 2)
    k, v = draw(B, Hkv, Sk, D, seed=1, dtype=dtype), draw(B, Hkv, Sk, Dv, seed=2, dtype=dtype)
    dout, dlse = draw(B, Hq, Sq, Dv, seed=3, dtype=dtype), draw(B, Hq, Sq, seed=4)
    mask = None
    if "mask" in o:
        kind, shape = o["mask"]
        mask = draw(*shape, seed=5, dtype=F16 if kind == "half" else F32)
        if kind == "bool":
            mask = mask > 0
            mask[(0,) * (mask.dim() - 1)] = False  # a row that sees no key, or all of batch 0
    alibi = draw(*o["alibi"], seed=6).abs() if "alibi" in o else None
    sinks = draw(Hq, seed=7) if o.get("sinks") else None
    options = options_of(o, D)

    ours = to(device, q, k, v, mask, alibi, sinks)
    out = torch.full((B, Hq, Sq, Dv), math.nan, dtype=dtype, device=device)
    lse = torch.full((B, Hq, Sq), math.nan, device=device)
    tail = (*ours[3:4], None, None, 0, 0, *ours[4:], *moved(options, device))
    assert kernels.attention_forward(*ours[:3], out, lse, *tail)

    learned = [x.double().requires_grad_() for x in (q, k, v)]
    bias = mask if mask is None or mask.dtype == torch.bool else mask.double().requires_grad_()
    heads = None if sinks is None else sinks.double().requires_grad_()
    want, want_lse = reference.attention(
        *learned, mask=bias, window=(options.left, options.right),
        offset=Sk - Sq if options.bottom_right else 0, scale=options.scale,
        softcap=options.softcap, alibi_slopes=alibi, sinks=heads,
        keep=_keep((B, Hq, Sq, Sk), options, "cpu"), dropout_p=options.dropout_p,
    )  # fmt: skip
    close(out, want, dtype)
    close(lse, want_lse, dtype)

    grads = [torch.full_like(x, math.nan) for x in ours[:3]]
    dmask = None
    if bias is not None and bias.requires_grad:
        dmask = torch.full(mask.shape, math.nan, device=device)
    dsinks = None if sinks is None else torch.full((Hq,), math.nan, device=device)
    given = (*to(device, dout, dlse), *grads, dmask, dsinks)
    assert kernels.attention_backward(*given, *ours[:3], out, lse, *tail)
    seen = want_lse > -math.inf
    total = (want * dout).sum() + (want_lse * dlse)[seen].sum()
    total.backward()
    for g, x in zip(grads, learned, strict=True):
        close(g, x.grad, dtype, 4.0)
    if dmask is not None:
        close(dmask, bias.grad, dtype, 4.0)
    if dsinks is not None:
        close(dsinks, heads.grad, dtype, 4.0)


def test_a_large_score_of_a_wide_head(kernels, device):
    """q k = 104.5 over 256 products, where an ulp is 8e-6: one chain of products on the tensor
    cores of an H100 leaves the output 1.9e-6 from fp64, sums of 64 at a time 4e-7 (6.02e-7 on an
    H200, by Triton 3.6)."""
    q, k, v = (genfast.randn((1, 4, 2048, 256), seed=7, stream=i)[:, 1:2] for i in range(3))
    q = q[:, :, 815:816]
    out = torch.empty(q.shape, device=device)
    tail = (None, None, None, 0, 0, None, None, *options_of({}, 256))
    assert kernels.attention_forward(*to(device, q, k, v), out, None, *tail)
    want, _ = reference.attention(*(x.double() for x in (q, k, v)))
    assert (out.cpu() - want).abs().max() < 7e-7


def test_dropout_mask_is_the_cpus(kernels, device):
    """Values 1, one key dimension a key: the output shows which keys were kept."""
    for Sk in (12, 13):
        q, k = torch.zeros(2, 2, 5, 16), torch.zeros(2, 1, Sk, 16)
        v = torch.eye(16)[:Sk].expand(2, 1, Sk, 16).contiguous()
        rest = (None, None, None, None, 0, 0, None, None, 9, None, 4, None, 0.0, -1, -1, False, 0.5)
        ours, theirs = torch.empty(2, 2, 5, 16, device=device), torch.empty(2, 2, 5, 16)
        assert kernels.attention_forward(*to(device, q, k, v), ours, *rest)
        assert _C.attention_forward(q, k, v, theirs, *rest)
        assert torch.equal(ours.cpu() > 0, theirs > 0)
        assert 0 < (theirs > 0).sum() < theirs[..., :Sk].numel()


PACKED = {  # lengths of queries, of keys, options
    "causal": ([3, 0, 7], [3, 4, 9], {"right": 0, "bottom_right": True}),
    "longer-than-a-tile": ([130, 5], [130, 140], {"right": 0}),
    "options": ([4, 6], [70, 3], {"p": 0.3, "left": 20, "softcap": 2.0, "sinks": True}),
    "no-keys": ([3, 2], [0, 4], {}),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed(kernels, device, case):
    lengths_q, lengths_k, o = PACKED[case]
    Hq, Hkv, D, Dv = 4, 2, 16, 24
    cu_q, cu_k = (
        torch.tensor([1, *n]).cumsum(0).to(torch.int32) for n in (lengths_q, lengths_k)
    )  # a row before the first sequence, and below two behind the last
    Tq, Tk = int(cu_q[-1]) + 2, int(cu_k[-1]) + 2
    q, k, v = draw(Tq, Hq, D), draw(Tk, Hkv, D, seed=1), draw(Tk, Hkv, Dv, seed=2)
    dout, sinks = draw(Tq, Hq, Dv, seed=3), draw(Hq, seed=4) if o.get("sinks") else None
    options = options_of(o, D)
    max_q, max_k = max(lengths_q), max(lengths_k) + 1
    ours = to(device, q, k, v)
    out, lse = torch.full((Tq, Hq, Dv), math.nan), torch.full((Hq, Tq), math.nan)
    out, lse, cu_q_d, cu_k_d, sinks_d = to(device, out, lse, cu_q, cu_k, sinks)
    tail = (None, cu_q_d, cu_k_d, max_q, max_k, None, sinks_d, *options)
    assert kernels.attention_forward(*ours, out, lse, *tail)
    grads = [torch.full_like(x, math.nan) for x in ours]
    dsinks = None if sinks is None else torch.empty(Hq, device=device)
    given = (dout.to(device), None, *grads, None, dsinks)
    assert kernels.attention_backward(*given, *ours, out, lse, *tail)

    learned = [x.double().requires_grad_() for x in (q, k, v)]
    keep = _keep((len(lengths_q), Hq, max_q, max_k), options, "cpu")
    inner = slice(int(cu_q[0]), int(cu_q[-1]))
    want, want_lse = reference.attention_varlen(
        *learned, cu_q, cu_k, bottom_right=options.bottom_right, keep=keep, sinks=sinks,
        window=(options.left, options.right), softcap=options.softcap, dropout_p=options.dropout_p,
    )  # fmt: skip
    want.backward(dout[inner].double())
    close(out[inner], want)
    close(lse[:, inner], want_lse)
    rest = torch.ones(Tq, dtype=torch.bool)
    rest[inner] = False
    assert (out.cpu()[rest] == 0).all() and (lse.cpu()[:, rest] == -math.inf).all()
    for g, x in zip(grads, learned, strict=True):
        close(g, x.grad, factor=4.0)


CACHES = {  # paged, new rows, rotary ("", "pairs", "halves"), leftpad, batch_idx, window, Sq
    "dense": (False, 0, "", False, False, (-1, 0), 1),
    "append": (False, 2, "pairs", True, True, (-1, 0), 2),
    "halves": (False, 1, "halves", False, False, (-1, -1), 3),
    "paged": (True, 3, "halves", False, False, (40, 0), 3),
    "paged-long": (True, 0, "", True, False, (-1, -1), 1),
}


@pytest.mark.parametrize("case", CACHES)
def test_cache(kernels, device, case):
    paged, new, rotary, padded, indexed, window, Sq = CACHES[case]
    B, Hq, Hkv, D, Dv, page = 2, 4, 2, 16, 24, 8
    capacity = 700 if case == "paged-long" else 80
    lengths = torch.tensor([capacity - 5, 9], dtype=torch.int32)
    leftpad = torch.tensor([3, 0], dtype=torch.int32) if padded else None
    index = torch.tensor([2, 0], dtype=torch.int32) if indexed else None
    blocks = -(-capacity // page)
    table = None
    if paged:
        table = torch.randperm(2 * blocks, generator=torch.Generator().manual_seed(0))
        table = table.view(2, blocks).to(torch.int32)
    entries, rows = (2 * blocks, page) if paged else (3, capacity)
    k_cache, v_cache = draw(entries, Hkv, rows, D), draw(entries, Hkv, rows, Dv, seed=1)
    q = draw(B, Hq, Sq, D, seed=2)
    k = draw(B, Hkv, new, D, seed=3) if new else None
    v = draw(B, Hkv, new, Dv, seed=4) if new else None
    cos, sin = (f(draw(capacity, 6, seed=5)) for f in (torch.cos, torch.sin))
    if not rotary:
        cos = sin = None
    ours = to(device, k_cache, v_cache, q, k, v, cos, sin, lengths, leftpad, index, table)
    kc, vc, q_d, k_d, v_d, cos_d, sin_d, lengths_d, pad_d, index_d, table_d = ours
    turned = q_d
    place = (lengths_d, pad_d, index_d, table_d)
    if new or rotary:
        turned = torch.full_like(q_d, math.nan) if rotary else q_d
        assert kernels.attention_append(
            q_d, turned if rotary else None, k_d, v_d, kc, vc, *place, cos_d, sin_d,
            rotary == "pairs", window == (-1, -1),
        )  # fmt: skip
    out = torch.full((B, Hq, Sq, Dv), math.nan, device=device)
    lse = torch.full((B, Hq, Sq), math.nan, device=device)
    assert kernels.attention_cached(
        turned, kc, vc, out, lse, lengths_d, new, pad_d, index_d, table_d, None, None, None, 0.0,
        *window,
    )  # fmt: skip
    k_want, v_want = k_cache.clone(), v_cache.clone()
    want, want_lse = reference.attention_with_kvcache(
        q, k_want, v_want, k, v, cos=cos, sin=sin, interleaved=rotary == "pairs",
        cache_seqlens=lengths, cache_batch_idx=index, leftpad=leftpad, block_table=table,
        window=window,
    )  # fmt: skip
    close(kc, k_want)
    assert torch.equal(vc.cpu(), v_want)
    close(out, want)
    close(lse, want_lse)


def test_refusals(kernels, device):
    q = draw(1, 2, 3, 16).to(device)
    out, rest = torch.empty_like(q), (0, None, 0, None, 0.0, -1, -1, False, 0.0)
    tail = (None, None, None, None, 0, 0, None, None, *rest)
    forward = kernels.attention_forward
    assert not forward(q, q.half(), q, out, *tail)
    assert not forward(q, q, q[..., :2, :], out, *tail)
    assert not forward(q.double(), q.double(), q.double(), out.double(), *tail)
    assert not forward(q.mT, q, q, out, *tail)
    assert not forward(q, q, q, out[..., :8], *tail)
    assert not forward(q, q, q, out, None, q[..., 0], *tail[2:])
    assert forward(q[:0], q[:0], q[:0], out[:0], *tail)
    wide = q[:, :1, :1].expand(1, 64, 2**25, 16)  # rows of a group beyond int32
    assert not forward(wide, q[:, :1], q[:, :1], wide, *tail)


def test_public_functions_reach_the_kernels(device, monkeypatch):
    """Every face under the forced backend, against the reference."""
    q, k, v = (draw(1, 2, 9, 16, seed=s).to(device) for s in range(3))
    bias = draw(9, 9, seed=3).to(device)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    lengths = torch.tensor([5], dtype=torch.int32, device=device)

    def run():
        a, b, c, d = (x.clone().requires_grad_() for x in (q, k, v, bias))
        y = genfast.attention(a, b, c, mask=d, causal=True, dropout_p=0.2, seed=3)
        z = genfast.scaled_dot_product_attention(a, b, c, is_causal=True)
        x, y_, w = (t[0].transpose(0, 1) for t in (a, b, c))
        packed = genfast.attention_varlen(x, y_, w, cu, cu, 5, 5, causal=True)
        ((y + z) * q).sum().add(packed.square().sum()).backward()
        new = k[:, :, :2].contiguous(), v[:, :, :2].contiguous()
        cached = genfast.attention_with_kvcache(
            q[:, :, :2].contiguous(), k.clone(), v.clone(), *new, cache_seqlens=lengths, causal=True
        )
        return y, z, packed, cached, a.grad, b.grad, c.grad, d.grad

    from genfast.kernels import attention

    launched = []
    for module in (attention.forward, attention.backward, attention.cache):
        real = module.launch
        monkeypatch.setattr(
            module, "launch", lambda k, *a, real=real, **o: (launched.append(k), real(k, *a, **o))
        )
    with backend("triton"):
        ours = run()
    assert len(launched) == 16  # 4 forwards, 2 appends, 3 x 3 backwards and the bias
    with backend("reference"):
        want = run()
    for x, y in zip(ours, want, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)
