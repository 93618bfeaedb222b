"""The affine step that every solver is: one pass over what has a nonzero coefficient.

genfast/schedulers/plan.py has the row layout and the makers of tables. Saved for backward: the
inputs and the seed; z is drawn again, never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from genfast.ops import _check, _noise
from genfast.ops._backend import kernels, under
from genfast.ops._force import forced_reference, may_compose
from genfast.ops._road import (
    DIRECT,
    GRAD,
    Node,
    define,
    differentiable_backward,
    gate,
    is_compiling,
    plain,
    ran,
    readable,
    taken,
    transforming,
    wants_graph,
)
from genfast.ops.diffusion import _common
from genfast.reference import diffusion as reference

COLUMNS, SOURCES, COEF = 36, 10, 6
HISTORY, OUTPUTS, MODELS = 6, 3, 3
VARIANCE = {"fixed": 0, "learned_range": 1, "learned": 2}
_FIRST_H, _Z = 3, 9

# The op's arguments, in order. Gradients reach those marked: the kernel's, then the composite's.
_TENSORS = (
    "x", "m", "m_1", "m_2", "weights", "table", "index", "h_1", "h_2", "h_3", "h_4", "h_5", "h_6",
    "z", "seeds", "threshold", "mask", "known", "known_z", "level",
)  # fmt: skip
_AT = {name: i for i, name in enumerate(_TENSORS)}
_NATIVE = tuple(_AT[n] for n in ("x", "m", "m_1", "m_2", *_TENSORS[7:13], "z"))
_OTHERS = tuple(_AT[n] for n in ("weights", "threshold", "mask", "known", "known_z", "level"))
_INTEGERS = ("index", "seeds")
_COUNT = len(_TENSORS)


# ---- native calls -----------------------------------------------------------------------------


def _models(args) -> tuple[Tensor, ...]:
    return tuple(m for m in args[1:4] if m is not None)


def _native(args, outs=None):
    """Outputs by the kernel, or None when it does not take these tensors."""
    x, weights, table, index = args[0], args[4], args[5], args[6]
    z, seeds, threshold, mask, known, known_z, level = args[13:20]
    row, seed, stream, offset, draws, variance, outputs = args[20:]
    if outs is None:
        outs = tuple([torch.empty_like(x) for _ in range(outputs)])
    extras = None
    if variance or threshold is not None or mask is not None:
        extras = (variance, threshold, mask, known, known_z, level, None, None)
    if kernels.diffusion_step(
        outs, x, _models(args), weights, table, index, row, tuple(args[7:13]), z, seed, seeds,
        stream, offset, draws, extras,
    ):  # fmt: skip
        return outs
    return None


def _native_backward(grads, args, wanted):
    """Gradients of the tensors of `_NATIVE` (None where not wanted), by the kernel."""
    found = [torch.empty_like(args[i]) if w else None for i, w in zip(_NATIVE, wanted, strict=True)]
    ran(kernels.diffusion_step_backward(
        tuple(grads), args[0], _models(args), args[4], args[5], args[6], args[20], args[15],
        args[16], found[0], tuple(found[1:4]), tuple(found[4:10]), found[10],
    ))  # fmt: skip
    return found


# ---- composite: the reference with native noise -------------------------------------------------


def _composite(args) -> tuple[Tensor, ...]:
    learned = [_TENSORS[i] for i in _OTHERS if args[i] is not None and args[i].requires_grad]
    lacks = f"a gradient by {', '.join(learned)}" if learned else None
    may_compose("diffusion_step", *(args[i] for i in (*_NATIVE, *_OTHERS)), lacks=lacks)
    x, weights, table, index = args[0], args[4], args[5], args[6]
    z, seeds, threshold, mask, known, known_z, level = args[13:20]
    row, seed, stream, offset, draws, variance, outputs = args[20:]
    dtype = _common.wide_dtype(x, *args[1:4], *args[7:13], z)
    coef = table[row] if index is None else table[index]
    models = [m.to(dtype) for m in args[1:4] if m is not None]
    m = models[0]
    if weights is not None:
        scales = [w.to(dtype) for w in weights.unbind(-1)]
        kept = [part[:, : x.shape[1]] for part in models] if variance else models
        m = reference.combine(kept, scales)
        if variance:  # the variance is the first model output's own
            m = torch.cat([m, models[0][:, x.shape[1] :]], 1)
    if z is None and draws:
        z = _common.drawn(x, dtype, seed, seeds, stream, offset)
    outs = list(
        reference.diffusion_step(
            x.to(dtype),
            m,
            coef,
            history=args[7:13],
            noise=z,
            threshold=threshold,
            variance_mode=variance,
            n_out=outputs,
        )  # fmt: skip
    )
    if mask is not None:
        a, b = (None, None) if level is None else level.to(dtype).unbind(-1)
        noise = z if known_z is None else known_z.to(dtype)
        outs[0] = reference.blend(outs[0], mask.to(dtype), known.to(dtype), noise, a, b)
    return tuple(o.to(x.dtype) for o in outs)


def _composite_of(args, places, *tensors):
    args = list(args)
    for at, t in zip(places, tensors, strict=True):
        args[at] = t
    return _composite(args)


def _composite_gradients(args, grads):
    """Gradients of every differentiable tensor argument, by autograd through the composite."""
    places = [i for i in (*_NATIVE, *_OTHERS) if args[i] is not None]
    found = differentiable_backward(
        partial(_composite_of, args, places), [args[i] for i in places], grads
    )
    result = [None] * _COUNT
    for at, g in zip(places, found, strict=True):
        result[at] = g
    return result


# ---- the op ------------------------------------------------------------------------------------

_SCHEMA = ", ".join(
    f"Tensor{'' if n in ('x', 'm', 'table') else '?'} {n}" for n in _TENSORS
) + (
    ", SymInt row, SymInt seed, SymInt stream, SymInt offset, bool draws, int variance, int outputs"
)  # fmt: skip


def _kernel_takes(args) -> bool:
    if not _common.on_kernel(*(args[i] for i in (*_NATIVE, *_OTHERS))):
        return False
    table = args[5]
    return table.dtype == torch.float32 and table.is_contiguous()


def _padded(outs, x):
    return (*outs, *[x.new_empty((0,)) for _ in range(OUTPUTS - len(outs))])


def _impl(*args):
    outs = _native(args) if _kernel_takes(args) else None
    return _padded(_composite(args) if outs is None else outs, args[0])


def _fake(x, *rest):
    return _padded([torch.empty_like(x) for _ in range(rest[-1])], x)


def _native_gradients_serve(args) -> bool:
    return (
        _kernel_takes(args)
        and args[-2] == 0
        and not any(args[i] is not None and args[i].requires_grad for i in _OTHERS)
    )


def _backward_impl(g_0, g_1, g_2, wanted, *args):
    wants = [bool(wanted >> k & 1) for k in range(len(_NATIVE))]
    if _native_gradients_serve(args):
        detached = [a.detach() if isinstance(a, Tensor) else a for a in args]
        found = _native_backward((g_0, g_1, g_2), detached, wants)
    else:
        leaves = list(args)
        for at, w in zip(_NATIVE, wants, strict=True):
            if w:
                leaves[at] = args[at].detach().requires_grad_()
        grads = [g_0, g_1, g_2][: args[-1]]
        by_place = _composite_gradients(leaves, grads)
        found = [
            None if not w else torch.zeros_like(args[at]) if g is None else g.detach()
            for at, w, g in zip(_NATIVE, wants, [by_place[i] for i in _NATIVE], strict=True)
        ]
    return tuple(args[0].new_empty((0,)) if g is None else g for g in found)


def _backward_fake(g_0, g_1, g_2, wanted, *args):
    return tuple(
        torch.empty_like(args[at]) if wanted >> k & 1 else args[0].new_empty((0,))
        for k, at in enumerate(_NATIVE)
    )


_backward_op = define(
    f"diffusion_step_backward(Tensor? g_0, Tensor? g_1, Tensor? g_2, int wanted, {_SCHEMA}) -> ("
    + ", ".join(["Tensor"] * len(_NATIVE))
    + ")",
    _backward_impl,
    _backward_fake,
)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:_COUNT])
    ctx.rest = inputs[_COUNT:]
    ctx.set_materialize_grads(False)


def _gradients(ctx, grads, first_order):
    args = (*ctx.saved_tensors, *ctx.rest)
    grads = list(grads)[: args[-1]]
    if all(g is None for g in grads):
        return [None] * _COUNT
    compiling = is_compiling()
    if not compiling and (wants_graph() or not plain(*grads) or not _native_gradients_serve(args)):
        return _composite_gradients(args, grads)
    wants = [ctx.needs_input_grad[at] for at in _NATIVE]
    result = [None] * _COUNT
    for at, g in zip(_NATIVE, first_order(grads, args, wants), strict=True):
        result[at] = g
    return result


def _first_order_op(grads, args, wants):
    grads = [*grads, *[None] * (OUTPUTS - len(grads))]
    wanted = sum(w << k for k, w in enumerate(wants))
    found = _backward_op(*grads, wanted, *args)
    return [g if w else None for g, w in zip(found, wants, strict=True)]


def _op_backward(ctx, *grads):
    return (*_gradients(ctx, grads, _first_order_op), *[None] * 7)


_op = define(f"diffusion_step({_SCHEMA}) -> (Tensor, Tensor, Tensor)", _impl, _fake, _op_backward, _save)  # noqa: E501  # fmt: skip


class _Step(Node):
    """The GRAD road: kernel forward, kernel backward; differentiable backward on request."""

    @staticmethod
    def forward(ctx, *args):
        _save(ctx, args, None)
        return taken(_native(args))

    @staticmethod
    def backward(ctx, *grads):
        return (*_gradients(ctx, grads, _native_backward), *[None] * 7)


# ---- the road ----------------------------------------------------------------------------------


def _result(outs, outputs):
    return outs[0] if outputs == 1 else tuple(outs[:outputs])


def diffusion_step(
    x: Tensor,
    m: Tensor | Sequence[Tensor],
    table: Tensor,
    row: int | Tensor = 0,
    *,
    history: Sequence[Tensor | None] = (),
    noise: Tensor | None = None,
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    weights: float | Sequence[float] | Tensor | None = None,
    threshold: Tensor | None = None,
    variance: str = "fixed",
    mask: Tensor | None = None,
    known: Tensor | None = None,
    known_noise: Tensor | None = None,
    known_level: Sequence[float] | Tensor | None = None,
    outputs: int = 1,
    out: Tensor | Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> Tensor | Any:
    """One row of a solver plan, in one pass: m = sum_j w_j m_j, x0 = clamp(d_x x + d_m m, +-clip),
    out_i = c_i . [x, m, x0, H_1 .. H_6, z].

    x: (B, ...), float32, float16 or bfloat16 (fp32 inside), float64 on the reference.
    m: like x, or a tuple of 1 to 3 model outputs with `weights`: a guidance scale w for (cond,
        uncond), one number per output, or a tensor (n,) or (B, n). With a learned variance each has
        twice the channels (dim 1); the variance is that of the first.
    table: (R, 36) float32, `genfast.schedulers.SolverPlan.table_on(device)` (d_x d_m clip
        input_scale logvar_min logvar_max c_0 c_1 c_2). row: an int, or an int64 tensor (), (B,) or
        (B, L): a row per sample or per token of x (B, L, ...).
    history: up to six tensors like x, None where empty.
    z: `noise` like x, or drawn: seed (int, or int64 tensor of one or of B), stream, offset,
        generator as in `genfast.randn`, whose values it equals; none of them: the rows use no z.
    threshold: (B,) bound s, x0 = clamp(x0, +-s) / s (see `dynamic_threshold`).
    variance: "fixed", "learned_range" or "learned".
    mask, known: inpainting, out_0 = mask out_0 + (1 - mask) (a known + b noise): mask broadcasts to
        x (1: generated), known like x, known_level (a, b) or a tensor (2,) or (B, 2), (1, 0) by
        default; noise is known_noise, or the step's own.
    outputs: 1 to 3. out: tensor(s) to write, x itself included.
    backend: one for this call and its gradient, as `genfast.set_backend`.
    Returns out_0, or a tuple. Differentiable in x, m, history and noise, twice too. On the CPU a
    row that needs a tensor that is not given raises ValueError; on other devices the term is left
    out. Raises TypeError / ValueError naming the argument.
    """
    if backend is not None:
        return under(diffusion_step, locals())
    plain = mask is known is known_noise is known_level is threshold is None
    if plain and type(row) is type(outputs) is int and outputs <= OUTPUTS and not is_compiling():
        try:  # the kernel reads tuples
            models = (m,) if isinstance(m, Tensor) else tuple(m)
            history, scale = tuple(history), weights
            if scale is not None and not isinstance(scale, Tensor):
                scale = _common.cached(_common.weight_values(scale, len(models)), x.device)
            draws = seed is not None or generator is not None
            road = gate(x, *models, scale, noise, *history, table)
            if road == DIRECT and not (draws and noise is not None):
                int_seed, seeds = 0, None
                if draws:
                    seed, generator = _noise.drawn_once(seed, x.device, generator)
                    int_seed, seeds = _noise.resolve(seed, generator, x.device)
                outs = out if out is None or type(out) is tuple else (out,)
                if outs is None:
                    outs = tuple([torch.empty_like(x) for _ in range(outputs)])
                elif len({*map(id, outs)}) != outputs or gate(*outs) != DIRECT:
                    outs = ()
                code = VARIANCE[variance]
                extras = (code, *[None] * 7) if code else None
                if kernels.diffusion_step(
                    outs, x, models, scale, table, None, row, history, noise, int_seed, seeds,
                    stream, offset, draws, extras,
                ):  # fmt: skip
                    if out is not None:
                        _bump(outs)
                    return outs[0] if outputs == 1 else outs
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
            pass  # the checks below name the argument
    return _slow(
        x, m, table, row, history, noise, seed, stream, offset, generator, weights, threshold,
        variance, mask, known, known_noise, known_level, outputs, out,
    )  # fmt: skip


def _bump(outs):
    for o in outs:
        if not o.is_inference():
            torch.autograd.graph.increment_version(o)  # autograd must see the overwrite


def _shaped(name, t, x, channels=1):
    _check.tensor(name, t)
    shape = list(x.shape)
    if channels == 2:
        if len(shape) < 2:
            raise ValueError(
                f"x: a learned variance needs channels in dim 1, got {tuple(shape)}; add a batch "
                "dimension with x[None]"
            )
        shape[1] *= 2
    if list(t.shape) != shape:
        raise ValueError(
            f"{name}: expected shape {tuple(shape)}, got {tuple(t.shape)}; reshape or expand it"
        )


def _index(row, table, x) -> tuple[int, Tensor | None]:
    rows = table.shape[0]
    if not isinstance(row, Tensor):
        _check.integer("row", row, low=0)
        if not isinstance(row, torch.SymInt) and row >= rows:
            raise ValueError(f"row: expected an int in [0, {rows}), got {row}")
        return row, None
    if row.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"row: expected an int or an int64 tensor, got {_check.describe(row)}; "
            "convert it with .to(torch.int64)"
        )
    _check.same_device(x=x, row=row)
    if row.dim() > x.dim() or row.shape != x.shape[: row.dim()]:
        raise ValueError(
            f"row: expected shape (), (B,) or (B, L) = leading sizes of {tuple(x.shape)}, got "
            f"{tuple(row.shape)}"
        )
    if row.numel() and readable(row):
        low, high = int(row.min()), int(row.max())
        if low < 0 or high >= rows:
            raise ValueError(f"row: expected values in [0, {rows}), got {low} .. {high}")
    return 0, row.to(torch.int64).contiguous()


def _require_sources(table, row, index, history, noisy, outputs):
    """ValueError when a used row needs what is not there; CPU only: elsewhere a sync."""
    if not readable(table, index):
        return
    rows = table[row] if index is None else table[index.unique()]
    used = rows[..., COEF : COEF + outputs * SOURCES].reshape(-1, SOURCES).ne(0).any(0).tolist()
    for k in range(HISTORY):
        if used[_FIRST_H + k] and history[k] is None:
            raise ValueError(
                f"history: the row uses H_{k + 1}, got {sum(h is not None for h in history)} "
                f"tensors and none there; pass a tensor like x at place {k}"
            )
    if used[_Z] and not noisy:
        raise ValueError("noise: the row adds noise, got none; pass noise=, seed= or generator=")


def _level(level, x):
    if level is None:
        return None
    if not isinstance(level, Tensor):
        if not isinstance(level, (tuple, list)) or len(level) != 2:
            raise ValueError(f"known_level: expected (alpha, sigma), got {_check.describe(level)}")
        for value in level:
            _check.number("known_level", value)
        return _common.numbers(level, x.device)
    _check.tensor("known_level", level)
    batch = x.shape[0] if x.dim() else 1
    if tuple(level.shape) not in ((2,), (batch, 2)):
        raise ValueError(
            f"known_level: expected shape (2,) or ({batch}, 2), got {tuple(level.shape)}"
        )
    return level.to(torch.float32).contiguous()


def pack(
    x, m, table, row, history, noise, seed, stream, offset, generator, weights, threshold,
    variance, mask, known, known_noise, known_level, outputs, need_noise=True,
):  # fmt: skip
    """Checked arguments of the op; every error names the argument."""
    _check.tensor("x", x)
    models = (m,) if isinstance(m, Tensor) else m
    if not isinstance(models, (tuple, list)) or not 1 <= len(models) <= MODELS:
        raise TypeError(
            f"m: expected a tensor or a tuple of 1 to {MODELS}, got {_check.describe(m)}"
        )
    _check.choice("variance", variance, VARIANCE)
    _check.integer("outputs", outputs, low=1, high=OUTPUTS)
    for j, part in enumerate(models):
        _shaped("m" if len(models) == 1 else f"m[{j}]", part, x, 2 if variance != "fixed" else 1)
    if not isinstance(table, Tensor):
        raise TypeError(
            f"table: expected a float32 tensor (R, {COLUMNS}), got {_check.describe(table)}; "
            "pass plan.table_on(x.device)"
        )
    _check.tensor("table", table)
    if table.dim() != 2 or table.shape[1] != COLUMNS or table.shape[0] == 0:
        raise ValueError(
            f"table: expected shape (R, {COLUMNS}), got {tuple(table.shape)}; "
            "pass plan.table_on(x.device)"
        )
    if not isinstance(history, (tuple, list)) or len(history) > HISTORY:
        raise ValueError(
            f"history: expected a tuple of at most {HISTORY} tensors, got "
            f"{_check.describe(history) if not isinstance(history, (tuple, list)) else len(history)}"  # noqa: E501
        )
    history = (*history, *[None] * (HISTORY - len(history)))
    for k, h in enumerate(history):
        if h is not None:
            _shaped(f"history[{k}]", h, x)
    if noise is not None:
        _shaped("noise", noise, x)
        if seed is not None or generator is not None:
            raise ValueError("noise: expected it alone, got a seed or generator too; pass only one")
    if (mask is None) != (known is None):
        raise ValueError("mask, known: expected both or neither, got one")
    if mask is None and not known_noise is known_level is None:
        raise ValueError(
            "known_noise, known_level: expected them beside mask and known, got one without; give "
            "those too"
        )
    _check.same_device(
        x=x, m=models[0], table=table, noise=noise, mask=mask, known=known, threshold=threshold,
        **{f"history[{k}]": h for k, h in enumerate(history)},
    )  # fmt: skip
    _noise.check(seed, stream, offset, generator, x.shape, x.device)
    row, index = _index(row, table, x)
    draws = noise is None and (seed is not None or generator is not None)
    if need_noise:
        _require_sources(table, row, index, history, noise is not None or draws, outputs)
    if threshold is not None:
        _check.tensor("threshold", threshold)
        batch = x.shape[0] if x.dim() else 1
        if threshold.numel() not in (1, batch):
            raise ValueError(
                f"threshold: expected one bound per sample ({batch},), got {tuple(threshold.shape)}"
            )
        threshold = threshold.reshape(-1).to(_common.wide_dtype(threshold)).contiguous()
    level = _level(known_level, x)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = mask.to(x.dtype)
        _check.tensor("mask", mask)
        _shaped("known", known, x)
        try:
            mask = mask.expand(x.shape)
        except RuntimeError:
            raise ValueError(
                f"mask: expected a shape that broadcasts to {tuple(x.shape)}, got "
                f"{tuple(mask.shape)}"
            ) from None
        if known_noise is not None:
            _shaped("known_noise", known_noise, x)
        elif noise is not None:
            known_noise = noise
        elif level is not None and not draws:
            raise ValueError(
                "known_noise: the known part is noised too, got none; pass known_noise=, seed= or "
                "known_level=(1, 0) without noise"
            )
    int_seed, seeds = _noise.resolve(seed, generator, x.device) if draws else (0, None)
    return (
        x, *models, *[None] * (MODELS - len(models)),
        _common.weight_tensor(weights, len(models), x), table, index, *history, noise, seeds,
        threshold, mask, known, known_noise, level,
        row, _noise.signed(int_seed), _noise.signed(stream), offset, draws, VARIANCE[variance],
        outputs,
    )  # fmt: skip


def _slow(x, *rest):
    *rest, outputs, out = rest
    args = pack(x, *rest, outputs)
    needs = torch.is_grad_enabled() and any(
        args[i] is not None and args[i].requires_grad for i in (*_NATIVE, *_OTHERS)
    )
    outs_given = None
    if out is not None:
        outs_given = (out,) if isinstance(out, Tensor) else tuple(out)
        if len(outs_given) != outputs:
            raise ValueError(f"out: expected {outputs} tensors, got {len(outs_given)}")
        for o in outs_given:
            _check.tensor("out", o)
            _check.output(o, x.shape, None)
        if len({*map(id, outs_given)}) != outputs:
            raise ValueError(
                f"out: expected {outputs} different tensors, got one of them twice; pass a tensor "
                "of its own for every output"
            )
        if needs:
            raise ValueError(
                "out: expected no gradient to be wanted, got inputs that require grad; "
                "leave out= away or call it under torch.no_grad()"
            )
    outs = _run(args, needs)
    if outs_given is not None:
        for o, value in zip(outs_given, outs, strict=False):
            o.copy_(value)
        outs = outs_given
    return _result(outs, outputs)


def _run(args, needs):
    wide = _common.wide_dtype(*args[:4], *args[7:14]) == torch.float64
    others = needs and any(args[i] is not None and args[i].requires_grad for i in _OTHERS)
    if needs and args[-2]:
        may_compose("diffusion_step", *args[:4], lacks="a gradient with a learned variance")
    if forced_reference() or wide or transforming() or others:
        return _composite(args)
    table, threshold = args[5], args[15]
    if table.dtype != torch.float32 or not table.is_contiguous():
        args = (*args[:5], table.to(torch.float32).contiguous(), *args[6:])
    if args[4] is not None and args[4].dtype != torch.float32:
        args = (*args[:4], args[4].to(torch.float32), *args[5:])
    if threshold is not None and threshold.dtype != torch.float32:
        args = (*args[:15], threshold.to(torch.float32), *args[16:])
    if needs and not is_compiling() and gate(*args[:_COUNT]) == GRAD and _kernel_takes(args):
        return _Step.apply(*args)
    return _op(*args)
