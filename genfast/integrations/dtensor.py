"""Norms, activations and attention on DTensors, as tensor and sequence parallel models hold them.

    import genfast.integrations.dtensor as door
    door.register()

Each process runs the kernel on what it has of a tensor: norms and activations where any dimension
but the one they look along is sharded (group norms: the batch), attention where the batch or the
heads are. Other layouts are redistributed first, as PyTorch does for its own ops; gradients of
weights, of a broadcast mask and of sinks are partial sums, which DTensor adds up. What draws noise
is refused, as a process knows its own part of a tensor and not where it lies: make the noise with
`genfast.randn(..., offset=)` and give it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

_OPS = torch.ops.genfast
_WHOLE = Replicate()


def _none(t, placement):
    return None if t is None else placement


def _refuse_noise(what: str, remedy: str):
    raise ValueError(f"{what} on DTensors, whose processes would all draw the same; {remedy}")


def _norm_ways(x, weight, bias, scale, shift, add, gate, groups, *options):
    """(placement of x, of one number a row of x, of a sample's rows, of what is summed over them,
    the inputs) for each way to cut x."""
    cuts: list[tuple] = [(_WHOLE,) * 5]
    for d in range(1 if groups else x.ndim - 1):
        of_samples, d_samples = (Shard(0), Shard(0)) if d == 0 else (_WHOLE, Partial())
        cuts.append((Shard(d), Shard(d + 1), of_samples, Partial(), d_samples))
    for p, rows, of_samples, of_channels, d_samples in cuts:
        inputs = [
            p, _none(weight, _WHOLE), _none(bias, _WHOLE), _none(scale, of_samples),
            _none(shift, of_samples), _none(add, p), _none(gate, of_samples), *[None] * 4,
        ]  # fmt: skip
        yield p, rows, of_channels, d_samples, inputs


def _normalize(*args):
    return [
        ([p, rows, _WHOLE if args[5] is None else p], inputs)
        for p, rows, _, _, inputs in _norm_ways(*args)
    ]


def _normalize_backward(g, g_sum, statistics, *args):
    _, weight, bias, scale, shift, add, gate = args[:7]
    ways = []
    for p, rows, of_channels, d_samples, inputs in _norm_ways(*args):
        sums = [of_channels, of_channels, d_samples, d_samples, p, d_samples]
        given = (weight, bias, scale, shift, None if gate is None else add, gate)
        # One of no elements stands for None.
        found = [_WHOLE if t is None else d for t, d in zip(given, sums, strict=True)]
        ways.append(([p, *found], [p, _none(g_sum, p), rows, *inputs]))
    return ways


def _attention_ways(q, k, v, mask, alibi, sinks, cu_q, cu_k, *options):
    """(placement of q, of lse, of the mask's gradient, of the sinks', the inputs)."""
    if options[-1]:
        _refuse_noise("dropout_p: expected 0", "drop after the attention")
    rest = [*(_none(t, _WHOLE) for t in (cu_q, cu_k)), *[None] * len(options)]
    inputs = [_WHOLE, _WHOLE, _WHOLE, *(_none(t, _WHOLE) for t in (mask, alibi, sinks)), *rest]
    yield _WHOLE, _WHOLE, _WHOLE, _WHOLE, inputs
    packed = cu_q is not None
    n, head = q.mesh.size(), 1
    for d in (1,) if packed else (0, 1):
        if d == head and (q.shape[head] % n or k.shape[head] % n):
            continue  # a process's queries would lie on another's keys
        p, of_mask, of_alibi, of_sinks = Shard(d), _WHOLE, _WHOLE, _WHOLE
        d_mask, d_sinks = Partial(), Partial()
        at = None if mask is None else d + mask.ndim - 4  # it broadcasts from the right
        if at is not None and at >= 0 and mask.shape[at] != 1:
            of_mask = d_mask = Shard(at)
        if d == head:
            of_sinks = d_sinks = Shard(0)
        if alibi is not None and (d == head or alibi.ndim == 2):
            of_alibi = Shard(0) if alibi.ndim == 1 else Shard(d)
        others = (_none(mask, of_mask), _none(alibi, of_alibi), _none(sinks, of_sinks))
        yield p, Shard(0) if packed else p, d_mask, d_sinks, [p, p, p, *others, *rest]


def _attention(*args):
    return [([p, lse], inputs) for p, lse, _, _, inputs in _attention_ways(*args)]


def _attention_backward(
    dout, dlse, q, k, v, out, lse, mask, alibi, sinks, of_mask, of_sinks, *args
):
    ways = []
    for p, rows, d_mask, d_sinks, inputs in _attention_ways(q, k, v, mask, alibi, sinks, *args):
        qkv, others, rest = inputs[:3], inputs[3:6], inputs[6:]
        found = [d_mask if of_mask else _WHOLE, d_sinks if of_sinks else _WHOLE]
        saved = [_none(dout, p), _none(dlse, rows), *qkv, p, rows, *others, None, None, *rest]
        ways.append(([p, p, p, *found], saved))
    return ways


def _act_ways(x, b, noise, strength, seeds, seed, stream, offset, draws, dim, *options):
    """(placement of x, of b, of b's gradient, the inputs)."""
    if draws:
        _refuse_noise(
            "noise: expected a tensor or None", "draw it with genfast.randn(..., offset=)"
        )
    rest = [_none(seeds, _WHOLE), *[None] * (5 + len(options))]
    more = [_none(t, _WHOLE) for t in (noise, strength)]
    yield _WHOLE, _WHOLE, _WHOLE, [_WHOLE, _none(b, _WHOLE), *more, *rest]
    if noise is None:
        for d in range(x.ndim):
            of_b, d_b = (Shard(0), Shard(0)) if d == dim else (_WHOLE, Partial())
            yield Shard(d), of_b, d_b, [Shard(d), _none(b, of_b), *more, *rest]


def _bias_act(*args):
    return [([p], inputs) for p, _, _, inputs in _act_ways(*args)]


def _bias_act_backward(g, source, from_y, b, *args):
    return [
        ([p, _WHOLE if b is None else d_b, _WHOLE], [p, p, None, *inputs[1:]])
        for p, _, d_b, inputs in _act_ways(source, b, *args)
    ]


def _rows(n: int) -> Callable:
    """Of ops of n tensors alike that look along the last dimension."""

    def ways(x, *args):
        placements = (_WHOLE, *(Shard(d) for d in range(x.ndim - 1)))
        return [([p], [*[p] * n, None]) for p in placements]

    return ways


_WAYS = {
    "normalize": _normalize,
    "normalize_backward": _normalize_backward,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "bias_act": _bias_act,
    "bias_act_backward": _bias_act_backward,
    "gated_act": _rows(1),
    "gated_act_backward": _rows(2),
}


def register() -> None:
    """Tells DTensor how it may cut what these ops take. Again does nothing new."""
    known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    for name, ways in _WAYS.items():
        op = getattr(_OPS, name).default
        register_sharding(op)(ways)
        # It remembers the ways of a call by its tensors and the arguments from here on: None for a
        # weight, or dropout, is not to be taken for what the call before had there.
        known[op].static_argnum = 0
