"""attention against torch.nn.functional.scaled_dot_product_attention, in the same run.

FLOP convention of the field: forward 4 B H Sq Sk D (half when causal), forward + backward 3.5 times
that. Decode rows count the bytes of the key/value cache, read once.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import genfast
from genfast.benchmarks.compare import step
from genfast.benchmarks.harness import Case, Work, assert_judged
from genfast.reference import attention as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def _randn(stream, shape, dtype, device):
    return genfast.randn(shape, seed=7, stream=stream, dtype=dtype, device=device)


def _heads(x, n):
    return x.repeat_interleave(n // x.shape[1], 1)


def _prove(ours, rival, leaves, truth, grad):
    """Outputs (2x) and gradients (3x the rival's own error) on the first batch row and heads."""

    def run(call, dtype=None):
        own = [x.detach().to(dtype or x.dtype).requires_grad_(grad is not None) for x in leaves]
        out = call(*own)
        if grad is None:
            return (out,)
        return (out, *torch.autograd.grad(out, own, grad.to(out.dtype)))

    names = ("out", "dq", "dk", "dv")
    for name, a, b, c in zip(names, run(ours), run(rival), run(truth, torch.float64), strict=False):
        assert_judged(name, a, b, c, 2.0 if name == "out" else 3.0)


# Switches of PyTorch's kernels; the context manager sdpa_kernel takes as long as a short call.
_SWITCHES = {
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
    "flash": torch.backends.cuda.enable_flash_sdp,
    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "math": torch.backends.cuda.enable_math_sdp,
}
_FUSED = ("cudnn", "flash")


def _sdpa_by(name, *tensors, **options):
    others = [switch for other, switch in _SWITCHES.items() if other != name]
    for switch in others:
        switch(False)
    try:
        return F.scaled_dot_product_attention(*tensors, **options)
    finally:
        for switch in others:
            switch(True)


def _as_rows(q, k, v):
    """One query of grouped heads, those of a group as its rows: enable_gqa repeats k and v."""
    rows = q.view(*k.shape[:2], -1, q.shape[-1])
    return F.scaled_dot_product_attention(rows, k, v).reshape(q.shape)


def _fused_rivals(leaves, grad, options):
    """PyTorch's fused kernels by name, those that take these tensors."""
    found = {}
    for name in _FUSED if leaves[0].is_cuda else ():
        call = step(partial(_sdpa_by, name, **options), leaves, grad)
        try:
            call()
        except RuntimeError:  # "No available kernel": dtype, head dim or GPU
            continue
        found[name] = call
    return found


def _dense(B, Hq, Hkv, Sq, Sk, D, dtype, causal, backward, device):
    q, k, v = (
        _randn(i, (B, H, S, D), dtype, device)
        for i, (H, S) in enumerate([(Hq, Sq), (Hkv, Sk), (Hkv, Sk)])
    )
    grad = _randn(3, (B, Hq, Sq, D), dtype, device) if backward else None
    options = {"is_causal": causal, "enable_gqa": Hq != Hkv}

    def truth(q, k, v):
        return reference.attention(q, k, v, window=(-1, 0 if causal else -1))[0]

    ours = partial(genfast.scaled_dot_product_attention, **options)
    rival = partial(F.scaled_dot_product_attention, **options)
    few = (slice(0, 1), slice(0, max(1, 2 * Hkv // Hq)))  # of keys and values

    def proof():
        heads = few[1].stop * Hq // Hkv
        leaves = q[:1, :heads], k[few], v[few]
        _prove(ours, rival, leaves, truth, None if grad is None else grad[:1, :heads])

    return Work(
        ours=step(ours, (q, k, v), grad),
        rivals={
            "F.sdpa": step(rival, (q, k, v), grad),
            **({"rows": partial(_as_rows, q, k, v)} if Sq == 1 and Hq != Hkv else {}),
            **_fused_rivals((q, k, v), grad, options),
        },
        proof=proof,
    )


def _case(name, B, Hq, Sq, D, *, Hkv=None, Sk=None, dtype=F32, causal=False, backward=False,
          target=1.0, device=""):  # fmt: skip
    Hkv, Sk = Hkv or Hq, Sk or Sq
    flops = 4 * B * Hq * Sq * Sk * D // (2 if causal else 1)
    flops = flops * 7 // 2 if backward else flops
    item = torch.finfo(dtype).bits // 8
    size = item * B * D * (2 * Hq * Sq + 2 * Hkv * Sk)
    name += (" causal" if causal else "") + (" fwd+bwd" if backward else "")
    return Case(
        "attention",
        name,
        (B, Hq, Sq, D) if Sq == Sk else (B, Hq, Sq, Sk, D),
        partial(_dense, B, Hq, Hkv, Sq, Sk, D, dtype, causal, backward),
        dtype=dtype,
        bytes=size,
        flops=flops,
        reads=Sq == 1,
        targets={"F.sdpa": target},
        device=device,
    )


LENGTHS = (37, 512, 128, 300, 64, 211, 400, 90)


def _varlen(backward, dtype, device):
    """Eight sequences of 37 to 512 tokens: packed, against a loop and against tensors that were
    padded before, with a mask."""
    H, D, total = 8, 64, sum(LENGTHS)
    q, k, v = (_randn(i, (total, H, D), dtype, device) for i in range(3))
    grad = _randn(3, (total, H, D), dtype, device) if backward else None
    cu = torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()

    def ours(q, k, v):
        return genfast.attention_varlen(q, k, v, cu, cu, max(LENGTHS), max(LENGTHS))

    def loop(q, k, v):
        parts = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in three))
            for three in zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True)
        ]
        return torch.cat([x[0].transpose(0, 1) for x in parts])

    seen = torch.arange(max(LENGTHS), device=device) < torch.tensor(LENGTHS, device=device)[:, None]

    def pad(x):
        rows = torch.nn.utils.rnn.pad_sequence(x.split(LENGTHS), batch_first=True)
        return rows.transpose(1, 2).contiguous()

    padded = partial(F.scaled_dot_product_attention, attn_mask=seen[:, None, None])
    wide, wide_grad = [pad(x) for x in (q, k, v)], None if grad is None else pad(grad)
    rows = padded(*wide).transpose(1, 2)[seen]
    torch.testing.assert_close(rows, ours(q, k, v), rtol=2e-2, atol=2e-2)

    def truth(q, k, v):
        return reference.attention_varlen(q, k, v, cu, cu)[0]

    return Work(
        ours=step(ours, (q, k, v), grad),
        rivals={"F.sdpa": step(loop, (q, k, v), grad), "padded": step(padded, wide, wide_grad)},
        proof=lambda: _prove(ours, loop, (q, k, v), truth, grad),
    )


def _varlen_case(backward, dtype=F32):
    flops = sum(4 * 8 * n * n * 64 for n in LENGTHS)
    return Case(
        "attention",
        "varlen" + (" fwd+bwd" if backward else ""),
        (sum(LENGTHS), 8, 64),
        partial(_varlen, backward, dtype),
        dtype=dtype,
        bytes=4 * sum(LENGTHS) * 8 * 64 * torch.finfo(dtype).bits // 8,
        flops=flops * 7 // 2 if backward else flops,
    )


LENGTHS_OF_A_BATCH = (256, 200, 128, 64, 60, 40, 30, 20)  # of 256


def _key_mask(B, H, S, dtype, device):
    """Of a padded batch of texts, as transformers hands it over; half of it is padding or more."""
    lengths = torch.tensor(LENGTHS_OF_A_BATCH, device=device).repeat(B // 8) * S // 256
    return (torch.arange(S, device=device) < lengths[:, None])[:, None, None]


def _mask(B, H, S, dtype, device):
    """Nine of ten pairs, other ones for each sequence."""
    return genfast.rand(B, 1, S, S, seed=7, stream=4, device=device) < 0.9


def _bias(B, H, S, dtype, device):
    """Of relative positions, as in T5: for each head."""
    return _randn(4, (1, H, S, S), dtype, device)


MASKS = {"key padding": _key_mask, "mask": _mask, "bias": _bias}


def _masked(name, B, H, S, D, backward, dtype, device):
    q, k, v = (_randn(i, (B, H, S, D), dtype, device) for i in range(3))
    grad = _randn(3, (B, H, S, D), dtype, device) if backward else None
    mask = MASKS[name](B, H, S, dtype, device)
    ours, rival = (
        partial(f, attn_mask=mask)
        for f in (genfast.scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    few = slice(0, 8)  # of the batch

    def proof():
        part = mask if mask.shape[0] == 1 else mask[few]
        wide = part if part.dtype == torch.bool else part.double()
        _prove(
            partial(genfast.scaled_dot_product_attention, attn_mask=part),
            partial(F.scaled_dot_product_attention, attn_mask=part),
            [x[few] for x in (q, k, v)],
            lambda *x: reference.attention(*x, mask=wide)[0],
            grad if grad is None else grad[few],
        )

    return Work(
        ours=step(ours, (q, k, v), grad),
        rivals={"F.sdpa": step(rival, (q, k, v), grad)},
        proof=proof,
    )


def _masked_case(name, B, H, S, D, *, backward=False, dtype=F32, device=""):
    seen = sum(LENGTHS_OF_A_BATCH) / 2048 if name == "key padding" else 1
    flops = int(4 * B * H * S * S * D * seen)  # all queries, the keys that are seen
    return Case(
        "attention",
        name + (" fwd+bwd" if backward else ""),
        (B, H, S, D),
        partial(_masked, name, B, H, S, D, backward, dtype),
        dtype=dtype,
        bytes=4 * B * H * S * D * torch.finfo(dtype).bits // 8,
        flops=flops * 7 // 2 if backward else flops,
        device=device,
    )


def _append(B, Hq, Hkv, S, D, dtype, device):
    """One generated token: write its key and value, attend to the whole cache."""
    caches = [_randn(i, (B, Hkv, S, D), dtype, device) for i in range(2)]
    q = _randn(2, (B, Hq, 1, D), dtype, device)
    k, v = (_randn(i, (B, Hkv, 1, D), dtype, device) for i in (3, 4))
    n = torch.full((B,), S - 1, dtype=torch.int32, device=device)

    def ours():
        return genfast.attention_with_kvcache(q, *caches, k, v, cache_seqlens=n)

    def rival(q=q, k=k, v=v, caches=caches):
        caches[0][:, :, S - 1 : S] = k
        caches[1][:, :, S - 1 : S] = v
        return F.scaled_dot_product_attention(q, *caches, enable_gqa=Hq != Hkv)

    def by_rows():
        caches[0][:, :, S - 1 : S] = k
        caches[1][:, :, S - 1 : S] = v
        return _as_rows(q, *caches)

    def proof():
        wide = [x.double() for x in (q, k, v)]
        truth = rival(*wide, [x.double() for x in caches])
        assert_judged("out", ours(), rival(), truth)
        torch.testing.assert_close(by_rows(), rival(), rtol=2e-2, atol=2e-2)

    grouped = {"rows": by_rows} if Hq != Hkv else {}
    return Work(ours=ours, rivals={"F.sdpa": rival, **grouped}, proof=proof)


def _append_case(B, Hq, Hkv, S, D, dtype, target):
    return Case(
        "attention",
        "append+decode",
        (B, Hq, Hkv, S, D),
        partial(_append, B, Hq, Hkv, S, D, dtype),
        dtype=dtype,
        bytes=2 * B * Hkv * S * D * torch.finfo(dtype).bits // 8,
        reads=True,
        targets={"F.sdpa": target},
    )


def _wins(dtype, backward, causal):
    """What the project promises for long self attention."""
    if dtype == F32:
        return 1.8 if causal else (1.3 if backward else 1.25)
    return 4.0 if backward else 1.3


_SELF = [
    _case("self", 1, 8, 1024, D, dtype=dtype, causal=causal, backward=backward,
          target=_wins(dtype, backward, causal))
    for D in (64, 128)
    for dtype in (F32, BF16)
    for causal in (False, True)
    for backward in (False, True)
]  # fmt: skip

_LONG = [
    _case("self", 1, 16, 16384, 128, dtype=BF16, causal=causal, backward=backward, device="cuda")
    for causal in (False, True)
    for backward in (False, True)
]

CASES = [
    *_SELF,
    *_LONG,
    _case("decode gqa", 16, 32, 1, 128, Hkv=8, Sk=32768, dtype=BF16, device="cuda"),
    _case("self", 1, 8, 1024, 64, dtype=F16, target=1.3),
    _case("self", 1, 8, 1024, 64, dtype=F16, backward=True, target=4.0),
    _case("self", 1, 4, 2048, 256),
    _case("self", 1, 4, 1024, 256, backward=True),
    _case("self", 1, 8, 2048, 40),
    _case("self", 1, 8, 1024, 80),
    _case("self", 1, 8, 1024, 80, dtype=BF16, backward=True, target=4.0),
    _case("gqa", 1, 16, 1024, 64, Hkv=4, causal=True, target=1.8),
    _case("cross", 2, 8, 4096, 40, Sk=77, target=1.6),
    _case("cross", 2, 8, 4096, 40, Sk=77, dtype=BF16, target=1.6),
    _case("cross", 2, 8, 1024, 64, Sk=77, backward=True),
    _case("tiny", 1, 1, 16, 32, target=1.0),
    _case("tiny", 1, 1, 16, 32, backward=True, target=1.0),
    _case("short", 64, 4, 16, 32, target=3.0),
    _case("short", 64, 4, 16, 32, dtype=BF16, target=3.0),
    _case("short", 64, 4, 16, 32, backward=True),
    _case("vit", 8, 12, 197, 64, target=1.5),
    _case("vit", 8, 12, 197, 64, dtype=BF16, target=1.3),
    _case("vit", 8, 12, 197, 64, backward=True),
    _case("decode", 1, 32, 1, 128, Sk=8192, target=2.0),
    _case("decode", 1, 32, 1, 128, Sk=8192, dtype=BF16, target=6.0),
    _case("decode gqa", 1, 32, 1, 128, Hkv=8, Sk=8192, target=4.0),
    _case("decode gqa", 1, 32, 1, 128, Hkv=8, Sk=8192, dtype=BF16, target=4.0),
    _case("decode", 4, 8, 1, 64, Sk=512),
    _append_case(2, 32, 8, 2048, 128, BF16, 4.0),
    _varlen_case(False),
    _varlen_case(True),
    _varlen_case(False, BF16),
    _masked_case("key padding", 8, 12, 256, 64),
    _masked_case("key padding", 8, 12, 256, 64, dtype=BF16),
    _masked_case("key padding", 8, 12, 256, 64, dtype=BF16, backward=True),
    _masked_case("key padding", 32, 12, 512, 64, dtype=BF16, device="cuda"),
    _masked_case("key padding", 32, 12, 512, 64, dtype=BF16, backward=True, device="cuda"),
    _masked_case("mask", 2, 16, 1024, 64, dtype=BF16, device="cuda"),
    _masked_case("mask", 2, 16, 1024, 64, dtype=BF16, backward=True, device="cuda"),
    _masked_case("bias", 2, 16, 1024, 64, dtype=BF16, device="cuda"),
]
