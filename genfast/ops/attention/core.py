"""The attention op: roads, registration, backward. The public functions stand beside this file.

Notation: q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv); packed sequences: (T, H, D) with
cu_seqlens. The truth is `genfast.reference.attention`; it is also the composite that serves fp64,
function transforms, forward-mode AD and double backward, with the kernels' own dropout noise.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from genfast.ops import _check, _noise
from genfast.ops._backend import has_kernels, kernels, under
from genfast.ops._choice import ATTENTION_BY_TORCH, ATTENTION_CALLS
from genfast.ops._common import AUTOCAST, full_precision
from genfast.ops._force import forced_reference, get_backend, may_compose
from genfast.ops._road import (
    DIRECT,
    GRAD,
    KERNEL_DTYPES,
    Node,
    define,
    differentiable_backward,
    gate,
    is_compiling,
    plain,
    ran,
    taken,
    transforming,
    wants_graph,
)
from genfast.ops.attention import by_torch
from genfast.ops.attention.parts import empty_like_parts
from genfast.ops.rng import DISTRIBUTIONS, random_op
from genfast.reference import attention as reference

ALIGN = {"top_left": False, "bottom_right": True}
MAX_HEAD_DIM = 512  # of the kernels; wider heads run on the reference
TRITON_HEAD_BYTES = 1024  # of the Triton kernels: fp32 heads up to 256
_FLOAT = torch.float32
_MASKS = (torch.bool, *_check.FLOATS)
_BOUNDLESS = 2**62  # from here on a window is none: a position and it would not fit 64 bits
_DECODE, _FORWARD, _TRAINING = map(ATTENTION_CALLS.index, ("decode", "forward", "training"))


class Options(NamedTuple):
    """Everything that is no operand, in the order of the native call and of the op's schema."""

    seed: int = 0
    seeds: Tensor | None = None
    stream: int = 0
    scale: float | None = None
    softcap: float = 0.0
    left: int = -1
    right: int = -1
    bottom_right: bool = False
    dropout_p: float = 0.0


class Packed(NamedTuple):
    """First rows of packed sequences and their longest; all None and 0 for dense tensors."""

    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    max_q: int = 0
    max_k: int = 0


DENSE = Packed()


# ---- native calls -----------------------------------------------------------------------------


def empty_out(q: Tensor, Dv: int) -> Tensor:
    """(..., Dv) with q's order of dimensions in memory: (B, S, H, D) views stay such views."""
    if q.shape[-1] == Dv:
        out = torch.empty_like(q)
        if out.stride(-1) == 1:
            return out
    if q.dim() == 4 and q.stride(1) < q.stride(2):
        B, H, S, _ = q.shape
        return q.new_empty(B, S, H, Dv).transpose(1, 2)
    return q.new_empty(*q.shape[:-1], Dv)


def _empty_lse(q: Tensor, dtype: torch.dtype) -> Tensor:
    shape = q.shape[:3] if q.dim() == 4 else (q.shape[1], q.shape[0])
    return torch.empty(shape, dtype=dtype, device=q.device)  # new_empty takes 1 us more


def _forward(q, k, v, mask, alibi, sinks, packed, options, want_lse=True):
    """(out, lse or None) by the kernel, or None when it does not take these tensors."""
    out = empty_out(q, v.shape[-1])
    lse = _empty_lse(q, _FLOAT) if want_lse else None
    if kernels.attention_forward(q, k, v, out, lse, mask, *packed, alibi, sinks, *options):
        return out, lse
    return None


def _plain(q, k, v, lse, mask, right: int, scale) -> Tensor | None:
    out = empty_out(q, v.shape[-1])
    done = kernels.attention_forward(
        q, k, v, out, lse, mask, None, None, 0, 0, None, None, 0, None, 0, scale, 0.0, -1, right,
        False, 0.0,
    )  # fmt: skip
    return out if done else None


def plain_forward(q, k, v, mask, causal: bool, scale, grouped: bool) -> Tensor | None:
    """`_forward` of a call without options: half of what a small call costs is passing them on."""
    if by_torch.chosen(_DECODE if q.shape[2] == 1 else _FORWARD, q, k, v, mask, causal):
        return by_torch.torch_sdpa(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    if not _plain_mask(q, mask):
        return None
    return _plain(q, k, v, None, mask, 0 if causal else -1, scale)


def plain_training(q, k, v, mask, causal: bool, scale, grouped: bool) -> Tensor | None:
    """The same where a gradient is wanted."""
    if mask is None and by_torch.chosen(_TRAINING, q, k, v, None, causal):
        return by_torch.differentiable(
            q, k, v, _TWICE, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    if not _plain_mask(q, mask) or (mask is not None and mask.requires_grad):
        return None
    return _PlainAttention.quick(q, k, v, mask, 0 if causal else -1, scale)


def plain_call(q, k, v, mask, causal: bool, scale, grouped: bool) -> Tensor | None:
    """Of a call without options, by either; None where the general road has to look at it."""
    if is_compiling() or not (road := gate(q, k, v, mask)):
        return None
    try:
        if (
            q.dim() == k.dim() == 4
            and (grouped or q.shape[1] == k.shape[1])
            and not autocasting(q)
            and (scale is None or (type(scale) is float and math.isfinite(scale)))
        ):
            run = plain_forward if road == DIRECT else plain_training
            return run(q, k, v, mask, causal, scale, grouped)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        pass  # the general road's checks name the argument
    return None


def _without_options(q, k, mask, o: Options) -> bool:
    """But a scale, causal with equal ends, and a mask that wants no gradient."""
    given = o.softcap != 0 or o.dropout_p != 0 or (o.bottom_right and q.shape[2] != k.shape[2])
    fixed = mask is None or (_plain_mask(q, mask) and not mask.requires_grad)
    return fixed and not given and o.left == -1 and o.right in (-1, 0)


def _plain_mask(q, mask) -> bool:
    return mask is None or (mask.dim() >= 2 and mask.dtype in (torch.bool, q.dtype, _FLOAT))


def _unit(x: Tensor) -> Tensor:
    """Kernels read rows whose elements lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _backward(dout, dlse, q, k, v, out, lse, mask, alibi, sinks, packed, options, wants):
    """Gradients of (q, k, v, mask, sinks); wants: are the last two wanted."""
    dout = torch.zeros_like(out) if dout is None else _unit(dout)
    dq, dk, dv = (_unit(x) for x in empty_like_parts(q, k, v))
    dmask = mask.new_empty(mask.shape, dtype=_FLOAT) if wants[0] else None
    dsinks = torch.empty_like(sinks) if wants[1] else None
    # Units again: a saved-tensor hook may give another memory order back.
    ran(kernels.attention_backward(
        dout, dlse, dq, dk, dv, dmask, dsinks, _unit(q), _unit(k), _unit(v), _unit(out), lse, mask,
        *packed, alibi, sinks, *options,
    ))  # fmt: skip
    return dq, dk, dv, dmask if dmask is None else dmask.to(mask.dtype), dsinks


# ---- composite: the reference with native noise -------------------------------------------------


def _keep(shape, options: Options, device) -> Tensor | None:
    """Dropout's mask: noise words at or above the threshold are kept."""
    if options.dropout_p == 0:
        return None
    words = random_op(
        shape, DISTRIBUTIONS["bits"], _noise.signed(options.seed), options.seeds,
        _noise.signed(options.stream), 0, 0, 1, torch.int32, device,
    )  # fmt: skip
    # Unsigned comparison of int32 words: flip the sign bit of both sides.
    return words.bitwise_xor(-(2**31)) >= reference.dropout_threshold(options.dropout_p) - 2**31


@full_precision
def _composite(q, k, v, mask, alibi, sinks, packed, options):
    wide = max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM
    lacks = f"a head wider than {MAX_HEAD_DIM}" if wide else None
    if alibi is not None and alibi.requires_grad:
        lacks = "a gradient by alibi_slopes"
    may_compose("attention", q, k, v, mask, alibi, sinks, lacks=lacks)
    if k.shape[-3 if q.dim() == 4 else -2] == 0:  # no heads
        empty = q.new_empty(*q.shape[:-1], v.shape[-1]) + q.sum() + k.sum() + v.sum()
        return empty, _empty_lse(q, torch.promote_types(q.dtype, _FLOAT))
    if q.shape[-1] == 0:  # every score is 0, whatever the scale
        options = options._replace(scale=1.0)
    shared = {
        "window": (options.left, options.right),
        "scale": options.scale,
        "softcap": options.softcap,
        "alibi_slopes": alibi,
        "sinks": sinks,
        "dropout_p": options.dropout_p,
    }
    if packed.cu_q is None:
        B, Hq, Sq, _ = q.shape
        Sk = k.shape[2]
        keep = _keep((B, Hq, Sq, Sk), options, q.device)
        offset = Sk - Sq if options.bottom_right else 0
        return reference.attention(q, k, v, mask=mask, offset=offset, keep=keep, **shared)
    shape = (packed.cu_q.shape[0] - 1, q.shape[1], packed.max_q, packed.max_k)
    keep = _keep(shape, options, q.device)
    out, lse = reference.attention_varlen(
        q, k, v, packed.cu_q, packed.cu_k, bottom_right=options.bottom_right, keep=keep, **shared
    )
    before = int(packed.cu_q[0])  # rows of no sequence
    behind = q.shape[0] - before - out.shape[0]
    if before or behind:
        out = pad(out, (0, 0, 0, 0, before, behind))
        lse = pad(lse, (before, behind), value=-math.inf)
    return out, lse


def _differentiable(operands, packed, options, grads):
    """Gradients of the composite by each operand (None where there is none)."""

    def composite(*given):
        left = iter(given)
        return _composite(*(x if x is None else next(left) for x in operands), packed, options)

    given = [x for x in operands if x is not None]
    found = iter(differentiable_backward(composite, given, grads))
    return [x if x is None else next(found) for x in operands]


# ---- the op ------------------------------------------------------------------------------------

_OPERANDS = "Tensor? mask, Tensor? alibi_slopes, Tensor? sinks"
_ARGS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "SymInt seed, Tensor? seeds, SymInt stream, float? scale, float softcap, SymInt left, "
    "SymInt right, bool bottom_right, float dropout_p"
)


def _of_args(args):
    """The flat tail of the schema -> (Packed, Options)."""
    return Packed(*args[:4]), Options(*args[4:])


def _impl(q, k, v, mask, alibi, sinks, *args):
    packed, options = _of_args(args)
    if q.dtype in KERNEL_DTYPES:
        found = _forward(q, k, v, mask, alibi, sinks, packed, options)
        if found is not None:
            return found
    out, lse = _composite(q, k, v, mask, alibi, sinks, packed, options)
    laid = empty_out(q, v.shape[-1])
    return laid.copy_(out), lse.contiguous()


def _fake(q, k, v, mask, alibi, sinks, *args):
    dtype = torch.promote_types(q.dtype, _FLOAT)
    return empty_out(q, v.shape[-1]), _empty_lse(q, dtype)


def _backward_impl(dout, dlse, q, k, v, out, lse, mask, alibi, sinks, want_mask, want_sinks, *args):
    packed, options = _of_args(args)
    if _fits(q, k, v, mask, alibi, sinks, packed):
        found = _backward(
            dout, dlse, q, k, v, out, lse, mask, alibi, sinks, packed, options,
            (want_mask, want_sinks),
        )  # fmt: skip
    else:
        wanted = (True, True, True, want_mask, False, want_sinks)
        inputs = [
            x.detach().requires_grad_() if w else x
            for x, w in zip((q, k, v, mask, alibi, sinks), wanted, strict=True)
        ]
        *grads, _, dsinks = _differentiable(inputs, packed, options, [dout, dlse])
        zeros = (torch.zeros_like(x) if g is None and w else g for x, g, w in
                 zip(inputs, grads, wanted, strict=False))  # fmt: skip
        found = (*(g if g is None else g.detach() for g in zeros), dsinks)
    dq, dk, dv, dmask, dsinks = found
    empty = q.new_empty(0)
    laid = [torch.empty_like(x).copy_(g) if g.stride() != torch.empty_like(x).stride() else g
            for x, g in ((q, dq), (k, dk), (v, dv))]  # fmt: skip
    dmask = empty if dmask is None else dmask.contiguous()
    dsinks = q.new_empty(0) if dsinks is None else dsinks
    return (*laid, dmask, dsinks)


def _backward_fake(dout, dlse, q, k, v, out, lse, mask, alibi, sinks, want_mask, want_sinks, *args):
    dmask = mask.new_empty(mask.shape) if want_mask else q.new_empty(0)
    dsinks = torch.empty_like(sinks) if want_sinks else q.new_empty(0)
    return *(torch.empty_like(x) for x in (q, k, v)), dmask, dsinks


_backward_op = define(
    "attention_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_OPERANDS}, bool want_mask, bool want_sinks, {_ARGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


def _first_order_op(dout, dlse, q, k, v, out, lse, mask, alibi, sinks, packed, options, wants):
    dq, dk, dv, dmask, dsinks = _backward_op(
        dout, dlse, q, k, v, out, lse, mask, alibi, sinks, *wants, *packed, *options
    )
    return dq, dk, dv, dmask if wants[0] else None, dsinks if wants[1] else None


def _save(ctx, inputs, output):
    q, k, v, mask, alibi, sinks, cu_q, cu_k, max_q, max_k, seed, seeds, *rest = inputs
    ctx.save_for_backward(q, k, v, *output, mask, alibi, sinks, cu_q, cu_k, seeds)
    ctx.rest = (max_q, max_k, seed, *rest)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlse, first_order):
    q, k, v, out, lse, mask, alibi, sinks, cu_q, cu_k, seeds = ctx.saved_tensors
    max_q, max_k, seed, *rest = ctx.rest
    packed, options = Packed(cu_q, cu_k, max_q, max_k), Options(seed, seeds, *rest)
    nothing = [None] * 13
    if dout is None and dlse is None:
        return (*[None] * 6, *nothing)
    if wants_graph() or not (is_compiling() or plain(dout, dlse)):
        grads = _differentiable((q, k, v, mask, alibi, sinks), packed, options, [dout, dlse])
        return (*grads, *nothing)
    wants = (bool(ctx.needs_input_grad[3]), bool(ctx.needs_input_grad[5]))
    dq, dk, dv, dmask, dsinks = first_order(
        dout, dlse, q, k, v, out, lse, mask, alibi, sinks, packed, options, wants
    )
    return (dq, dk, dv, dmask, None, dsinks, *nothing)


def _op_backward(ctx, dout, dlse):
    return _gradients(ctx, dout, dlse, _first_order_op)


_op = define(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPERANDS}, {_ARGS}) -> (Tensor, Tensor)",
    _impl,
    _fake,
    _op_backward,
    _save,
)


class _Attention(Node):
    """The GRAD road: kernel forward, kernel backward; differentiable backward on request."""

    @staticmethod
    def forward(ctx, q, k, v, mask, alibi, sinks, *args):
        packed, options = _of_args(args)
        found = taken(_forward(q, k, v, mask, alibi, sinks, packed, options))
        _save(ctx, (q, k, v, mask, alibi, sinks, *args), found)
        return found

    @staticmethod
    def backward(ctx, dout, dlse):
        return _gradients(ctx, dout, dlse, _backward)


class _PlainAttention(Node):
    """The GRAD road of a call without options but a mask that wants no gradient: of a short one,
    _Attention's 13 arguments and its second output are a fifth (100 of 480 us at 64 x 4 heads of 16
    queries)."""

    @staticmethod
    def forward(ctx, q, k, v, mask, right, scale):
        lse = _empty_lse(q, _FLOAT)
        out = taken(_plain(q, k, v, lse, mask, right, scale))
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.options = right, scale
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, mask, out, lse = ctx.saved_tensors
        right, scale = ctx.options
        if wants_graph() or not plain(dout):
            found = _composite_gradients(q, k, v, right == 0, scale, dout, mask)[:3]
        else:  # `_backward` by its last line: its arguments are a tenth of a short call
            found = empty_like_parts(q, k, v)
            done = kernels.attention_backward(
                _unit(dout), None, *found, None, None, q, k, v, out, lse, mask, None, None, 0, 0,
                None, None, 0, None, 0, scale, 0.0, -1, right, False, 0.0,
            )  # fmt: skip
            if not done:  # a saved-tensor hook gave another memory order back
                options = Options(scale=scale, right=right)
                found = _backward(
                    dout, None, q, k, v, out, lse, mask, None, None, DENSE, options, (False, False)
                )[:3]
        return *found, None, None, None


def _composite_gradients(q, k, v, causal, scale, dout, mask=None):
    """Differentiable ones, of q, k, v and the mask, of a call without other options."""
    options = Options(scale=scale, right=0 if causal else -1)
    return _differentiable((q, k, v, mask, None, None), DENSE, options, [dout, None])[:4]


_TWICE = by_torch.Twice(_composite_gradients)


# ---- the road ----------------------------------------------------------------------------------


def _fits(q, k, v, mask, alibi, sinks, packed) -> bool:
    """The kernels take these operands; the shapes are assumed to agree."""
    dtype = q.dtype
    native = get_backend() == "cuda" or (q.device.type == "cpu" and get_backend() != "triton")
    widest = max(q.shape[-1], v.shape[-1])
    return (
        dtype in KERNEL_DTYPES
        and k.dtype is dtype
        and v.dtype is dtype
        and has_kernels(q.device, "attention_forward")
        and (native or widest * q.element_size() <= TRITON_HEAD_BYTES)
        and q.dim() == (4 if packed.cu_q is None else 3)
        and q.dim() == k.dim() == v.dim()
        and all(1 <= x.shape[-1] <= MAX_HEAD_DIM for x in (q, v))
        and k.shape[-3 if packed.cu_q is None else -2] > 0
        and all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (q, k, v))
        and (mask is None or mask.dtype in KERNEL_DTYPES or mask.dtype is torch.bool)
        and all(x is None or (x.dtype is _FLOAT and x.is_contiguous()) for x in (alibi, sinks))
    )


def attend(q, k, v, mask, alibi, sinks, packed: Packed, options: Options, want_lse: bool):
    """(out, lse); lse may be None where it was not asked for."""
    if not is_compiling() and (road := gate(q, k, v, mask, alibi, sinks)):
        by_torch_too = packed is DENSE and alibi is None and sinks is None and not want_lse
        if road == DIRECT:
            try:
                if by_torch_too and ATTENTION_BY_TORCH[q.is_cuda]:
                    call = _DECODE if q.shape[-2] == 1 else _FORWARD
                    given = by_torch.settings(call, q, k, v, mask, options)
                    if given is not None:
                        return by_torch.torch_sdpa(q, k, v, mask, **given), None
                found = _forward(q, k, v, mask, alibi, sinks, packed, options, want_lse)
            except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
                validate(q, k, v, mask, alibi, sinks, packed, options)
                raise
            if found is not None:
                return found
        elif road == GRAD and not (alibi is not None and alibi.requires_grad):
            try:
                if by_torch_too and mask is None and ATTENTION_BY_TORCH[q.is_cuda]:
                    given = by_torch.settings(_TRAINING, q, k, v, None, options)
                    if given is not None:
                        return by_torch.differentiable(q, k, v, _TWICE, **given), None
                if _fits(q, k, v, mask, alibi, sinks, packed):
                    if by_torch_too and _without_options(q, k, mask, options):
                        args = (q, k, v, mask, options.right, options.scale)
                        return _PlainAttention.apply(*args), None
                    return _Attention.apply(q, k, v, mask, alibi, sinks, *packed, *options)
            except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
                validate(q, k, v, mask, alibi, sinks, packed, options)
                raise
    plain = packed is DENSE and alibi is None and sinks is None and not want_lse
    if plain and get_backend() == "torch":
        validate(q, k, v, mask, alibi, sinks, packed, options)
        given = by_torch.settings(None, q, k, v, mask, options)
        if given is not None:
            twice = _TWICE
            if mask is not None:
                twice = by_torch.Twice(partial(_composite_gradients, mask=mask))
            return by_torch.differentiable(q, k, v, twice, attn_mask=mask, **given), None
    return _slow(q, k, v, mask, alibi, sinks, packed, options)


def _slow(q, k, v, mask, alibi, sinks, packed, options):
    validate(q, k, v, mask, alibi, sinks, packed, options)
    wide = q.dtype == torch.float64
    learned_slopes = alibi is not None and alibi.requires_grad and torch.is_grad_enabled()
    if forced_reference() or wide or transforming() or learned_slopes:
        return _composite(q, k, v, mask, alibi, sinks, packed, options)
    q, k, v = _unit(q), _unit(k), _unit(v)
    if mask is not None and mask.dtype == torch.float64:
        mask = mask.to(_FLOAT)
    alibi, sinks = (x if x is None else x.to(_FLOAT).contiguous() for x in (alibi, sinks))
    options = options._replace(
        seed=_noise.signed(options.seed), stream=_noise.signed(options.stream)
    )
    return _op(q, k, v, mask, alibi, sinks, *packed, *options)


# ---- checks ------------------------------------------------------------------------------------

_DENSE_LETTERS = {"q": "(B, Hq, Sq, D)", "k": "(B, Hkv, Sk, D)", "v": "(B, Hkv, Sk, Dv)"}
_PACKED_LETTERS = {"q": "(Tq, Hq, D)", "k": "(Tk, Hkv, D)", "v": "(Tk, Hkv, Dv)"}


def check_operands(letters: dict[str, str], operands: dict[str, Tensor]) -> None:
    """dtype, device, dimensions, and that q, k and v agree where the letters do."""
    for name, x in operands.items():
        _check.tensor(name, x)
        if x.dim() != letters[name].count(",") + 1:
            raise ValueError(
                f"{name}: expected shape {letters[name]}, got {tuple(x.shape)}; reshape it"
            )
    _check.same_device(**operands)
    sizes: dict[str, tuple[int, str]] = {}
    (first, q), *_ = operands.items()
    for name, x in operands.items():
        if x.dtype != q.dtype:
            raise TypeError(
                f"{name}: expected the dtype of {first}, {q.dtype}, got {x.dtype}; "
                "convert it with .to()"
            )
        for letter, n in zip(letters[name].strip("()").split(", "), x.shape, strict=True):
            known, owner = sizes.setdefault(letter, (n, name))
            if n != known:
                raise ValueError(
                    f"{name}: expected {letters[name]} with {letter} = {known} as in {owner}, "
                    f"got shape {tuple(x.shape)}; reshape or transpose it"
                )
    Hq, Hkv = sizes["Hq"][0], sizes["Hkv"][0]
    if Hq % max(Hkv, 1) != 0 or (Hkv == 0 and Hq > 0):
        raise ValueError(
            f"q: expected its heads to be a multiple of the {Hkv} key/value heads, got {Hq}; "
            "repeat heads of k and v"
        )


def check_options(B, Hq, alibi, sinks, options: Options) -> None:
    for name, x, batched in (("alibi_slopes", alibi, True), ("sinks", sinks, False)):
        if x is None:
            continue
        _check.tensor(name, x)
        fits = x.dim() == 1 or (batched and x.dim() == 2 and x.shape[0] == B)
        if not fits or x.shape[-1] != Hq:
            shapes = f"(Hq,) = ({Hq},)" + (f" or (B, Hq) = ({B}, {Hq})" if batched else "")
            raise ValueError(
                f"{name}: expected shape {shapes}, got {tuple(x.shape)}; give one number a head"
            )
    if is_compiling():  # dynamic shapes make symbols of these numbers
        return
    if options.scale is not None:
        _check.number("scale", as_scale(options.scale))
    _check.number("softcap", options.softcap, low=0.0)
    _check.number("dropout_p", options.dropout_p, low=0.0, high=1.0)


def broadcasts(x: Tensor, full: tuple[int, ...]) -> bool:
    return x.dim() <= len(full) and all(
        n == 1 or n == m for n, m in zip(reversed(x.shape), reversed(full), strict=False)
    )


def check_mask(mask: Tensor | None, full: tuple[int, ...], name: str = "mask") -> None:
    if mask is None:
        return
    _check.tensor(name, mask, _MASKS)
    if not broadcasts(mask, full):
        raise ValueError(
            f"{name}: expected a shape that broadcasts to (B, Hq, Sq, Sk) = {full}, "
            f"got {tuple(mask.shape)}; give it size 1 where it is the same for all"
        )


def validate(q, k, v, mask, alibi, sinks, packed: Packed, options: Options) -> None:
    operands = {"q": q, "k": k, "v": v}
    check_operands(_DENSE_LETTERS if packed.cu_q is None else _PACKED_LETTERS, operands)
    if packed.cu_q is None:
        B, Hq, Sq, _ = q.shape
        check_mask(mask, (B, Hq, Sq, k.shape[2]))
    else:
        B, Hq = packed.cu_q.shape[0] - 1, q.shape[1]
    check_options(B, Hq, alibi, sinks, options)
    optional = {"mask": mask, "alibi_slopes": alibi, "sinks": sinks}
    _check.same_device(q=q, **optional)


def check_align(align) -> None:
    if type(align) is not str or align not in ALIGN:
        _check.choice("align", align, ALIGN)


def windows(causal: bool, window) -> tuple[int, int]:
    """(left, right) of a window, with causal as right = 0."""
    try:
        if window == (-1, -1) or window is None:
            return -1, 0 if causal else -1
        left, right = window
    except (TypeError, ValueError):
        raise ValueError(
            f"window: expected (left, right), got {window!r}; -1 is a side without a bound"
        ) from None
    left, right = (-1 if x is None else x for x in (left, right))
    _check.integer("window", left)
    _check.integer("window", right)
    left, right = (x if 0 <= x < _BOUNDLESS else -1 for x in (left, right))
    return left, 0 if causal else right


def as_scale(scale):
    """What the kernels take: a float, or None for the default."""
    if scale is None or type(scale) is float or is_compiling():
        return scale
    if isinstance(scale, Tensor):
        raise TypeError("scale: expected a float, got a tensor; multiply q by it instead")
    _check.number("scale", scale)
    return float(scale)


def noise(dropout_p: float, seed, stream, generator, device):
    """(seed, seeds, stream) of the dropout mask; none drawn when nothing is dropped."""
    if not dropout_p:
        return 0, None, 0
    if isinstance(seed, Tensor) and seed.numel() != 1:
        raise ValueError(
            f"seed: expected one, which dropout has for the whole call, got {_check.describe(seed)}"
        )
    _noise.check(seed, stream, 0, generator, (1,), device)
    return *_noise.resolve(seed, generator, device), stream


def lower_precision(*tensors: Tensor | None) -> tuple:
    """fp32 operands in autocast's dtype when autocast is on, like torch's own attention."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x.to(dtype) if x is not None and x.dtype in KERNEL_DTYPES else x for x in tensors)


def autocasting(q: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled():  # 0.05 us; asking for the device's takes 0.4
        return False
    device = q.device.type
    return device in AUTOCAST and torch.is_autocast_enabled(device)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    align: str = "top_left",
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: _noise.Seed | None = None,
    stream: int = 0,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | Any:
    """softmax(scale q k^T + ...) v in one pass, float32 inside, O(S) memory: beside its outputs the
    forward takes 0.6 MiB a thread, the backward at most 10 KiB a query (both at D = 64).

    q: (B, Hq, Sq, D), k: (B, Hkv, Sk, D), v: (B, Hkv, Sk, Dv), Hq a multiple of Hkv (GQA, MQA);
    one dtype of float32, float16, bfloat16, float64. Any strides.
    mask: bool (true = attend) or float (added to the scores), broadcastable to (B, Hq, Sq, Sk);
    a float mask gets its gradient, and values below -2.3e38 hide a key like -inf.
    causal: key j is seen by query i when j <= i + offset. window: (left, right) keys around the
    diagonal, -1 unbounded. align: where the diagonal of causal, window and ALiBi lies: "top_left"
    (PyTorch, offset 0) or "bottom_right" (flash-attn and decoding, offset Sk - Sq).
    scale: default 1 / sqrt(D). softcap: scores become softcap * tanh(score / softcap); 0: off.
    alibi_slopes: (Hq) or (B, Hq), Press et al. 2022. sinks: (Hq) logits that join the softmax's
    denominator only. dropout_p: weights dropped by the noise contract, the same for every
    backend: seed (int, int64 tensor of one, None: drawn from torch's generator), stream.
    return_lse: also log-sum-exp of the scores (B, Hq, Sq), float32 (float64 for float64 inputs),
    natural log, differentiable, -inf for a row that sees no key.
    backend: one for this call and its gradient, as `genfast.set_backend`.
    A row that sees no key gives 0 and zero gradients. Returns (B, Hq, Sq, Dv) with q's dtype and
    q's order of dimensions in memory. Differentiable twice and in forward mode; under autocast
    the operands are cast as torch's attention does. Raises TypeError / ValueError naming the
    argument. Dao et al. 2022, "FlashAttention"; Milakov & Gimelshein 2018.
    """
    if backend is not None:
        return under(attention, locals())
    check_align(align)
    if not isinstance(q, Tensor):
        _check.tensor("q", q)
    if not (type(dropout_p) is type(softcap) is float or is_compiling()):
        _check.number("softcap", softcap, low=0.0)
        _check.number("dropout_p", dropout_p, low=0.0, high=1.0)
    plain = dropout_p == 0 and softcap == 0 and not return_lse
    if plain and mask is alibi_slopes is sinks is None and type(window) is tuple:
        if window == (-1, -1) and (not causal or align == "top_left"):
            out = plain_call(q, k, v, None, causal, scale, True)
            if out is not None:
                return out
    if autocasting(q):
        q, k, v = lower_precision(q, k, v)
    left, right = windows(causal, window)
    options = Options(
        *noise(dropout_p, seed, stream, generator, q.device), as_scale(scale), softcap, left, right,
        ALIGN[align], dropout_p,
    )  # fmt: skip
    out, lse = attend(q, k, v, mask, alibi_slopes, sinks, DENSE, options, return_lse)
    return (out, lse) if return_lse else out
