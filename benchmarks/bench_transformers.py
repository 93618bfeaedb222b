"""The transformer models on genfast's ops against the same modules on plain PyTorch, in one run.

Rivals: `reference`, the same module under genfast.backend("reference") with PyTorch's own
attention, and `compile`, that module through torch.compile; of decoding, the same weights in
PyTorch's own words, F.sdpa over static caches behind a mask. A training step is forward and
backward, gradients of all parameters; a decode step is one token of every sequence, behind 256
tokens in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import genfast
from genfast.benchmarks.bench_models import fresh, prove
from genfast.benchmarks.harness import Case, Work
from genfast.benchmarks.plain import on_reference
from genfast.models.transformer import BERT, GPT, T5, ViT

_VOCAB = 259


def _ids(*shape, device, seed=1):
    return genfast.randint(3, _VOCAB, shape, seed=seed, device=device)


def _training(build, batch, small, device) -> Work:
    """batch, small: device -> the arguments of `loss`; the proof runs on the small ones."""
    model, data, few = fresh(build, device), batch(device), small(device)

    def step(loss, params, data):
        return torch.autograd.grad(loss(*data), params)

    def compute(model):
        data = [x.to(next(model.parameters()).dtype) if x.is_floating_point() else x for x in few]
        loss = model.loss(*data)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    def compiled():
        loss = torch.compile(model.loss, dynamic=False)
        return on_reference(partial(step, loss, list(model.parameters()), data))

    ours = partial(step, model.loss, list(model.parameters()), data)
    return Work(
        ours=ours,
        rivals={"reference": on_reference(ours)},
        late={"compile": compiled},
        proof=lambda: prove(model, compute),
    )


def _forward(build, batch, device) -> Work:
    model, data = fresh(build, device).eval(), batch(device)

    def run(model, *data):
        with torch.no_grad():
            return model(*data)

    def compute(model):
        return [run(model, *(x[:2] for x in data))]

    return Work(
        ours=partial(run, model, *data),
        rivals={"reference": on_reference(partial(run, model, *data))},
        late={"compile": lambda: on_reference(partial(run, torch.compile(model), *data))},
        proof=lambda: prove(model, compute),
    )


_PAST = 256


def _decode(build, B, device) -> Work:
    model, new = fresh(build, device).eval(), _ids(B, 1, device=device)
    past = _ids(B, _PAST, device=device, seed=2)

    def prepared(model):
        cache = model.cache(B, 2 * _PAST)
        model.step(past, cache)
        return cache

    def token(step, cache):
        cache.lengths.fill_(_PAST)
        return step(new, cache)

    def compute(model):
        return [token(model.step, prepared(model))]

    def compiled():
        return _plain_decode(model, B, new, past, partial(torch.compile, dynamic=False))

    return Work(
        ours=partial(token, model.step, prepared(model)),
        rivals={"eager": _plain_decode(model, B, new, past, lambda step: step)},
        late={"compile": compiled},
        proof=lambda: prove(model, compute),
    )


def _plain_decode(model: GPT, B: int, new: Tensor, past: Tensor, compiler: Callable) -> Callable:
    """The same weights in PyTorch's own words. A tensor for each layer's cache: one for all would
    be copied by torch.compile at every write."""
    from torch.nn.functional import scaled_dot_product_attention, silu

    from genfast.reference.attention import rotary

    a = model.blocks[0].attention
    cos, sin, _ = model.rotary.tables(new.device)
    (H, Hkv, _), D, capacity = a.groups, a.head_dim, 2 * _PAST
    shape = B, Hkv, capacity, D
    k_cache, v_cache = (
        [torch.zeros(shape, device=new.device) for _ in model.blocks] for _ in range(2)
    )

    def step(ids, at):
        x, place = model.embed(ids), torch.arange(capacity, device=ids.device)
        seen = place <= at[:, None]
        for i, block in enumerate(model.blocks):
            heads = block.attention.qkv(block.norm1(x)).unflatten(-1, (-1, D)).transpose(1, 2)
            q, k, v = heads.split((H, Hkv, Hkv), 1)
            q, k = rotary(q, cos[at], sin[at], True), rotary(k, cos[at], sin[at], True)
            k_cache[i].index_copy_(2, at, k)
            v_cache[i].index_copy_(2, at, v)
            out = scaled_dot_product_attention(q, k_cache[i], v_cache[i], seen, enable_gqa=H > Hkv)
            x = x + block.attention.out(out.transpose(1, 2).flatten(2))
            gate, up = block.feed_forward.up(block.norm2(x)).chunk(2, -1)
            x = x + block.feed_forward.down(silu(gate) * up)
        return model.logits(x[:, -1])

    fast = compiler(step)
    with torch.no_grad():
        step(past, torch.arange(_PAST, device=new.device))
        want = model.step(new, _filled(model, B, past))
        at = torch.tensor([_PAST], device=new.device)
        torch.testing.assert_close(fast(new, at), want, rtol=1e-3, atol=1e-4)

    @torch.no_grad()
    def run():
        return fast(new, at)

    return run


def _filled(model, B, past):
    cache = model.cache(B, 2 * _PAST)
    model.step(past, cache)
    return cache


def _gpt(context=256):
    return GPT(_VOCAB, d=256, layers=4, heads=8, context=context)


def _minilm():
    return BERT(2000, d=384, layers=6, heads=12, hidden=1536, mlm=False)


def _vit():
    """ViT-Ti/16's sizes (Touvron et al. 2021), a third of its depth: 197 tokens an image."""
    return ViT(224, 16, 3, 10, d=192, layers=4, heads=3)


def _t5():
    return T5(_VOCAB, d=192, layers=2, heads=6, activation="geglu")


def _pictures(n, device):
    return genfast.randn(n, 3, 224, 224, seed=1, device=device), torch.arange(n, device=device) % 10


def _padded(n, S, device):
    """A batch of sentences of 1/4 S ... S tokens."""
    lengths = torch.linspace(S // 4, S, n, device=device).round()
    return _ids(n, S, device=device), torch.arange(S, device=device) < lengths[:, None]


def _pairs(n, S, T, device):
    return _ids(n, S, device=device), _ids(n, T, device=device, seed=2)


def _case(name, shape, setup, target=1.0):
    return Case("transformers", name, shape, setup, targets={"reference": target, "eager": target})


CASES = [
    _case("gpt train", (8, 256, 256), partial(
        _training, _gpt, lambda d: (_ids(8, 257, device=d),), lambda d: (_ids(1, 65, device=d),))),
    _case("gpt decode", (1, 256), partial(_decode, partial(_gpt, 512), 1)),
    _case("gpt decode", (8, 256), partial(_decode, partial(_gpt, 512), 8)),
    _case("minilm forward", (8, 128, 384), partial(
        _forward, _minilm, lambda d: _padded(8, 128, d))),
    _case("vit train", (8, 197, 192), partial(
        _training, _vit, partial(_pictures, 8), partial(_pictures, 1))),
    _case("t5 train", (4, 512, 114, 192), partial(  # the lengths of its pre-training
        _training, _t5, partial(_pairs, 4, 512, 114), partial(_pairs, 2, 40, 20))),
]  # fmt: skip
