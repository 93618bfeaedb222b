"""Zero-insertion, padding, a filter and decimation of images in one pass.

Linear in x, and its gradient is the same function with up and down exchanged and the filter turned
around, so gradients of any order are the same kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genfast.ops import _check
from genfast.ops._backend import kernels, under
from genfast.ops._common import full_precision, on_kernel, wide_dtype
from genfast.ops._force import forced_reference, may_compose
from genfast.ops._road import (
    DIRECT,
    GRAD,
    Node,
    define,
    gate,
    is_compiling,
    plain,
    taken,
    transforming,
    wants_graph,
)
from genfast.reference import filtering as reference

_MOST = 2**31  # of up, down and padding: sizes stay within 64 bits


def _out_shape(x, f, up, down, padding):
    """(N, C, OH, OW); a size < 1 where the filter does not fit."""
    fh, fw = f.shape[0], f.shape[-1]
    sizes = [
        (n * u + before + after - k) // d + 1
        for n, u, d, before, after, k in (
            (x.shape[2], up[1], down[1], padding[2], padding[3], fh),
            (x.shape[3], up[0], down[0], padding[0], padding[1], fw),
        )
    ]
    return (*x.shape[:2], *sizes)


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _native(x, f, up, down, padding, flip, gain):
    order = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    y = torch.empty(
        _out_shape(x, f, up, down, padding), dtype=x.dtype, device=x.device, memory_format=order
    )
    if kernels.upfirdn2d(y, x, f, *up, *down, *padding, flip, gain):
        return y
    return None


@full_precision
def _composite(x, f, up, down, padding, flip, gain):
    may_compose("upfirdn2d", x, lacks="a gradient by f" if f.requires_grad else None)
    wide = wide_dtype(x)
    return reference.upfirdn2d(x.to(wide), f.to(wide), up, down, padding, flip, gain).to(x.dtype)


def _impl(x, f, up, down, padding, flip, gain):
    y = None
    if on_kernel("upfirdn2d", x):
        y = _native(x, f, up, down, padding, flip, gain)
    if y is None:
        y = _composite(x, f, up, down, padding, flip, gain)
        order = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
        y = torch.empty_like(y, memory_format=order).copy_(y)
    return y


def _fake(x, f, up, down, padding, flip, gain):
    order = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    return torch.empty(
        _out_shape(x, f, up, down, padding), dtype=x.dtype, device=x.device, memory_format=order
    )


def _save(ctx, inputs, output):
    x, f, *rest = inputs
    ctx.save_for_backward(f)
    ctx.rest, ctx.shape, ctx.out_shape = rest, x.shape, output.shape


def _transposed(ctx):
    """(up, down, padding, flip, gain) of the gradient."""
    (f,) = ctx.saved_tensors
    up, down, padding, flip, gain = ctx.rest
    fh, fw = f.shape[0], f.shape[-1]
    (H, W), (OH, OW) = ctx.shape[2:], ctx.out_shape[2:]
    before_x, before_y = padding[0], padding[2]
    back = [
        fw - before_x - 1,
        W * up[0] - OW * down[0] + before_x - up[0] + 1,
        fh - before_y - 1,
        H * up[1] - OH * down[1] + before_y - up[1] + 1,
    ]
    return f, down, up, back, not flip, gain


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _gradient(ctx, g, first_order):
    """first_order: of the op itself the op, which tracers see; of a node the kernel."""
    f, *rest = _transposed(ctx)
    if is_compiling():
        return _op(g, f, *rest)
    if not (plain(g) and on_kernel("upfirdn2d", g)):
        return _composite(g, f, *rest)
    g = _dense(g)
    return _Upfirdn.apply(g, f, *rest) if wants_graph() else first_order(g, f, *rest)


_op = define(
    "upfirdn2d(Tensor x, Tensor f, int[] up, int[] down, SymInt[] padding, bool flip, float gain) "
    "-> Tensor",
    _impl,
    _fake,
    lambda ctx, g: (_gradient(ctx, g, _op), *[None] * 6),
    _save,
)


class _Upfirdn(Node):
    @staticmethod
    def forward(ctx, x, f, *rest):
        y = taken(_native(x, f, *rest))
        _save(ctx, (x, f, *rest), y)
        return y

    @staticmethod
    def backward(ctx, g):
        return (_gradient(ctx, g, _impl), *[None] * 6)


# ---- the road ----------------------------------------------------------------------------------


def _pair(name: str, value) -> tuple[int, int]:
    """(along W, along H) of an int or of two."""
    if type(value) is not int and isinstance(value, Sequence) and not isinstance(value, str):
        values = tuple(value)
        if len(values) != 2:
            raise ValueError(f"{name}: expected an int or two, (along W, along H), got {value!r}")
    else:
        values = (value, value)
    for v in values:
        _check.integer(name, v, low=1, high=_MOST)
    return values


def _quad(value) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) of an int, of two (W, H), or of four."""
    several = type(value) is not int and isinstance(value, Sequence) and not isinstance(value, str)
    values = tuple(value) if several else (value,)
    for v in values:
        _check.integer("padding", v, low=-_MOST, high=_MOST)
    if len(values) not in (1, 2, 4):
        raise ValueError(
            "padding: expected an int, two (along W, along H) or four (left, right, top, bottom), "
            f"got {value!r}"
        )
    if len(values) == 4:
        return values
    return tuple(v for v in (values * 2)[:2] for _ in range(2))


def filter_size(f: Tensor | None) -> tuple[int, int]:
    """(width, height) of a checked filter; None is the identity."""
    if f is None:
        return 1, 1
    _check_filter(f)
    return f.shape[-1], f.shape[0]


def _check_filter(f) -> None:
    _check.tensor("f", f, (torch.float32, torch.float64))
    if f.dim() not in (1, 2) or f.numel() == 0:
        raise ValueError(
            "f: expected shape (fh, fw), or (n,) for the same filter along both axes, with "
            f"elements, got {tuple(f.shape)}; make it with genfast.setup_filter"
        )


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    *,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Up-samples by zeros, pads, filters and down-samples images in one pass.

    x: (N, C, H, W), float32, float16, bfloat16 (fp32 inside) or float64. f: (fh, fw) or (n,) for
    the same along both axes, float32 (see `setup_filter`); None: no filter. up, down: an int or
    (along W, along H), >= 1: up - 1 zeros after each sample; every down-th is kept. padding: of the
    up-sampled image: an int, (W, H) or (left, right, top, bottom); negative crops. flip_filter:
    False convolves, True correlates. gain: factor of the result. backend: one for this call and
    its gradient, as `genfast.set_backend`.
    Returns (N, C, (H up + top + bottom - fh) // down + 1, ...), channels_last like x. A filter of
    rank one runs as two passes of one dimension. Differentiable in x any number of times, and in f.
    Raises TypeError / ValueError naming the argument. Karras et al. 2020, appendix B; NVlabs'
    torch_utils.ops.upfirdn2d, whose results these are.
    """
    if backend is not None:
        return under(upfirdn2d, locals())
    if (
        type(up) is int and type(down) is int and up >= 1 and down >= 1
        and type(flip_filter) is bool and type(gain) in (float, int) and isinstance(f, Tensor)
        and not is_compiling()
    ):  # fmt: skip
        try:
            padding4 = _quad(padding)
            road = gate(x, f)
            args = (x, f, (up, up), (down, down), padding4, flip_filter, float(gain))
            if road == DIRECT:
                y = _native(*args)
                if y is not None:
                    return y
            elif road == GRAD and not f.requires_grad and (x.is_cpu or on_kernel("upfirdn2d", x)):
                return _Upfirdn.quick(*args)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            pass  # the checks below name the argument
    return _slow(x, f, up, down, padding, flip_filter, gain)


def _slow(x, f, up, down, padding, flip_filter, gain):
    _check.tensor("x", x)
    if x.dim() != 4 or min(x.shape[1:]) < 1:
        raise ValueError(
            f"x: expected images (N, C, H, W) with elements, got {_check.describe(x)}; reshape it"
        )
    up, down, padding = _pair("up", up), _pair("down", down), _quad(padding)
    if not isinstance(flip_filter, bool):
        raise TypeError(f"flip_filter: expected a bool, got {_check.describe(flip_filter)}")
    if isinstance(gain, Tensor):
        raise TypeError(f"gain: expected a number, got {_check.describe(gain)}; pass gain.item()")
    _check.number("gain", gain)
    if f is None:
        f = torch.ones(1, 1, dtype=torch.float32, device=x.device)
    _check_filter(f)
    _check.same_device(x=x, f=f)
    shape = _out_shape(x, f, up, down, padding)
    if min(shape[2:]) < 1:
        raise ValueError(
            f"padding: expected the padded image to hold the filter {tuple(f.shape)}, got x "
            f"{tuple(x.shape)} with up {up}, padding {padding} (left, right, top, bottom); pad more"
        )
    args = (x, f, up, down, padding, flip_filter, float(gain))
    learned = f.requires_grad and torch.is_grad_enabled()
    if (
        forced_reference()
        or x.dtype == torch.float64
        or transforming()
        or learned
        or not on_kernel("upfirdn2d", x)
    ):
        return _composite(*args)
    x, f = _dense(x), f.to(torch.float32).contiguous()
    args = (x, f, *args[2:])
    if not is_compiling() and gate(x, f) == GRAD:
        return _Upfirdn.apply(*args)
    return _op(*args)
