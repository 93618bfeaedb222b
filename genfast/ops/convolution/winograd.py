"""3 x 3 convolutions of stride 1 in 16 of their 36 products, by Winograd's F(2 x 2, 3 x 3).

Of an image that is enlarged by nearest in 9 of 36; of up to four channels on one side, the ends of
a network, in all of them, by kernels that read and write once. Saved for backward: x and the
weight, and of a projected term both. The gradient by x is the same kernel with the weight turned
round; the gradients by weight and bias have their own. A differentiable backward goes through the
reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast._native import VECTOR_BITS
from genfast.ops._backend import kernels
from genfast.ops._road import (
    DIRECT,
    SLOW,
    Node,
    cpu_gate,
    differentiable_backward,
    is_compiling,
    plain,
    ran,
    taken,
    wants_graph,
)
from genfast.reference import convolution as reference

_INNER = torch.channels_last
# Weights go into Winograd's domain at each call, sixteen numbers for nine. On two Zen 5 cores
# 512 -> 512 channels at 8 x 8 took 1.14 times oneDNN's time and 1280 -> 1280 twice (16 and 32
# tiles); 128 -> 128 at 8 x 8 takes 0.48 and 512 -> 512 at 32 x 32 0.56.
_LEAST_TILES, _MOST_WEIGHTS_A_TILE = 8, 1024
# The weight's gradient reads and writes its sums once a block of tiles; beyond the second-level
# cache oneDNN is faster: 256 -> 256 channels, 256 tiles, 0.76 of its speed, 128 -> 128 1.4.
_MOST_SUMS, _MOST_SUMS_A_TILE = 1 << 14, 256
# Channels on one side for which oneDNN has no kernel of its own: 16 -> 1 at 28 x 28 takes 4.2 times
# the time of ours, its gradients 1.8 and 5; 4 -> 320 at 64 x 64 1.06, 2.7 and 1.6; AVX2 the same.
_NARROW = 4
# Without fused multiply-adds nothing was measured.
_MEASURED = VECTOR_BITS >= 256


def _tiles(x: Tensor, enlarged: bool) -> int:
    B, _, H, W = x.shape
    return B * H * W if enlarged else B * ((H + 1) // 2) * ((W + 1) // 2)


def _narrow(weight: Tensor) -> bool:
    """Of up to four channels on one side: the kernels of a network's ends."""
    few, many = sorted(weight.shape[:2])
    return 0 < few <= _NARROW and many % 16 == 0


def _outer(x: Tensor, weight: Tensor) -> bool:
    """One channel has one memory, and PyTorch's result then follows these strides: those of
    (B, 1, H, W) made without a format, and a weight's as well, mean channels outside."""
    return x.stride(1) != 1 and weight.stride(1) != 1


def takes(x: Tensor, weight: Tensor, enlarged: bool = False, alone: bool = True) -> bool:
    """A kernel is the faster one. alone: no term is wanted. RuntimeError or ValueError where the
    shapes are no convolution's."""
    outputs, inputs, *sides = weight.shape
    tiles = _tiles(x, enlarged)
    if inputs % 16 or outputs % 16:
        fits = alone and not enlarged and _narrow(weight)
    else:
        fits = outputs * inputs <= _MOST_WEIGHTS_A_TILE * tiles
    return (
        sides == [3, 3]
        and fits
        and tiles >= _LEAST_TILES
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and _MEASURED
        and x.is_contiguous(memory_format=_INNER)
        and not (inputs == 1 and _outer(x, weight))
        and not torch.is_autocast_enabled("cpu")
    )


def _native(x, weight, bias, term, projection, enlarged) -> Tensor | None:
    B, _, H, W = x.shape
    times = 2 if enlarged else 1
    size = (B, len(weight), times * H, times * W)
    y = torch.empty(size, dtype=x.dtype, memory_format=_INNER)
    return y if kernels.conv2d(y, x, weight, bias, term, projection, enlarged, False) else None


class _Convolve(Node):
    @staticmethod
    def forward(ctx, *inputs):
        y = taken(_native(*inputs))
        x, weight, _, term, projection, ctx.enlarged = inputs
        ctx.save_for_backward(x, weight, *((None, None) if projection is None else inputs[3:5]))
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, term, projection = ctx.saved_tensors
        of_x, of_weight, of_bias, of_term, of_projection, _ = ctx.needs_input_grad
        if wants_graph() or not plain(g):
            by = reference.upsampled_conv2d if ctx.enlarged else reference.conv2d
            dx, dw = differentiable_backward(by, (x, weight), (g,))
            db = g.sum((0, 2, 3)) if of_bias else None
            dt, dp = g, None
            if projection is not None:
                dt, dp = differentiable_backward(F.conv2d, (term, projection), (g,))
        else:
            # A hook on saved tensors (save_on_cpu, a file) may give x back in another memory order.
            g, x = (t.contiguous(memory_format=_INNER) for t in (g, x))
            dx = _of_input(g, x, weight, ctx.enlarged) if of_x else None
            dw = db = None
            if of_weight or of_bias:
                dw, db = _of_weight(g, x, weight, of_bias, ctx.enlarged)
            dt, dp = g, None
            if projection is not None:
                dt, dp, _ = _by_torch(g, term, projection, 0, (of_term, of_projection, False))
        return (
            dx if of_x else None, dw if of_weight else None, db, dt if of_term else None,
            dp if of_projection else None, None,
        )  # fmt: skip


def _of_input(g, x, weight, enlarged):
    dx = torch.empty_like(x)
    ran(kernels.conv2d(dx, g, weight, None, None, None, enlarged, True))
    return dx


def _of_weight(g, x, weight, of_bias, enlarged):
    sums = weight.shape[0] * weight.shape[1]
    if _narrow(weight) or sums <= min(_MOST_SUMS, _MOST_SUMS_A_TILE * _tiles(x, enlarged)):
        dw, db = torch.empty_like(weight), g.new_empty(len(weight)) if of_bias else None
        if kernels.conv2d_weight(dw, db, g, x, enlarged):
            return dw, db
    if enlarged:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return _by_torch(g, x, weight, 1, (False, True, of_bias))[1:]


def _by_torch(g, x, weight, padding, wanted):
    return torch.ops.aten.convolution_backward(
        g, x, weight, [len(weight)], [1, 1], [padding, padding], [1, 1], False, [0, 0], 1, wanted
    )


def convolved(x, weight, bias=None, term=None, projection=None, enlarged=False) -> Tensor | None:
    """x (B, I, H, W) by weight (O, I, 3, 3) with padding 1, plus bias (O,), plus term (B, O, H, W);
    or term (B, C, H, W) by projection (O, C, 1, 1). enlarged: x is enlarged twice by nearest first.
    None where the kernel does not take the tensors or was not measured to be faster."""
    if is_compiling():
        return None
    try:
        if not x.is_contiguous(memory_format=_INNER):  # first: the rest takes 6 us
            return None
        road = cpu_gate(x, weight, bias, term, projection)
        if road == SLOW or not takes(x, weight, enlarged, term is None):
            return None
        call = _native if road == DIRECT else _Convolve.quick
        return call(x, weight, bias, term, projection, enlarged)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return None  # PyTorch names the argument


def _one(setting) -> bool:
    """1 for both axes, of the types that F.conv2d takes: True and arrays are its errors."""
    if type(setting) in (tuple, list):
        return len(setting) == 2 and all(type(n) is int and n == 1 for n in setting)
    return type(setting) is int and setting == 1


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """F.conv2d, its arguments and results.

    input: (B, I, H, W), weight: (O, I / groups, K, L), bias: (O,). A kernel of 3 x 3 with stride 1
    and padding 1, on fp32 CPU tensors with the channels inside
    (`memory_format=torch.channels_last`), takes 16 of its 36 products between multiples of 16
    channels, forward and backward, and with up to four channels on one side has kernels of its own.
    Everything else is PyTorch's, and so are the errors. The error against fp64 is PyTorch's or
    less; between multiples of 16 channels an input that is infinite or NaN makes all outputs of its
    tile NaN (2 x 2, and those of the tiles that see it). Differentiable any number of times; the
    same bits from any number of threads.
    Lavin & Gray, "Fast algorithms for convolutional neural networks", 2016, F(2 x 2, 3 x 3).
    """
    around = padding == "same" if type(padding) is str else _one(padding)
    if around and _one(stride) and _one(dilation) and type(groups) is int and groups == 1:
        y = convolved(input, weight, bias)
        if y is not None:
            return y
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
