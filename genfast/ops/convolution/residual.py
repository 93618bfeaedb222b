"""The end of a residual block in the convolution's own output: on the kernel of 3 x 3, whose last
step adds what is there, or behind oneDNN's products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast.ops import _check
from genfast.ops._road import GRAD, SLOW, cpu_gate, is_compiling
from genfast.ops.convolution import common, winograd
from genfast.reference import convolution as reference


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) with the channels inside -> (B H W, C), the same memory."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """(B H W, C) -> (B, C, H, W) with the channels inside, the same memory."""
    return rows.unflatten(0, (len(like), *like.shape[2:])).movedim(-1, 1)


def _fits(x, weight, bias, projection, projection_bias) -> bool:
    """What would broadcast, or be read as another shape, is left to the checks."""
    (*outputs, _, K, L), C = weight.shape, x.shape[1]
    projected = projection is not None and projection.shape == (*outputs, C, 1, 1)
    return (
        K == L
        and K % 2 == 1
        and (projected if projection is not None else projection_bias is None)
        and all(b is None or b.shape == (*outputs,) for b in (bias, projection_bias))
    )


def _joined(h, x, weight, bias, projection, projection_bias) -> Tensor | None:
    """x into the convolution's own output, or None where that was not measured. Any exception says
    that the arguments do not fit together."""
    given = (h, x, weight, bias, projection, projection_bias)
    road = cpu_gate(*given) if common.quick(h) and common.quick(x) else SLOW
    if road == SLOW or any(t is not None and t.dtype != h.dtype for t in given):
        return None
    if not _fits(*given[1:]):
        return None
    if projection is not None and projection_bias is not None:
        bias = projection_bias if bias is None else bias + projection_bias
    y = winograd.convolved(h, weight, bias, x, projection)
    if y is not None:
        return y
    taps = None if projection is None else projection.flatten(1).T
    y = F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2)
    C = x.shape[1] if taps is not None else y.shape[1]
    if x.shape != (len(y), C, *y.shape[2:]):
        return None
    if taps is None:
        return y.add_(x)
    y = y.contiguous(memory_format=torch.channels_last)
    if road == GRAD:  # the same bits; in place, the graph would copy the gradient
        return _image(torch.addmm(_rows(y), _rows(x), taps), y)
    _rows(y).addmm_(_rows(x), taps)
    return y


def residual_conv2d(
    h: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    projection: Tensor | None = None,
    projection_bias: Tensor | None = None,
) -> Tensor:
    """conv(h; weight) + bias + x, or in x's place conv(x; projection) + projection_bias: the end of
    a residual block.

    h: (B, I, H, W); weight: (O, I, K, K), K odd, the padding K // 2; bias: (O,). x: (B, O, H, W),
    or (B, C, H, W) with projection (O, C, 1, 1) and projection_bias (O,). Returns (B, O, H, W).
    x goes into the convolution's own output, the projection as one matrix product: no pass for the
    sum, no memory for its terms. The same bits with a graph and without. Differentiable any number
    of times. Raises TypeError / ValueError naming the argument.
    He et al., "Deep residual learning for image recognition", 2016, section 3.2.
    """
    given = (h, x, weight, bias, projection, projection_bias)
    if not is_compiling():
        try:
            y = _joined(*given)
            if y is not None:
                return y
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            pass  # the checks below name the argument
    common.check(h, weight, bias, ("h", "weight", "bias"))
    _check.tensor("x", x)
    outputs, C = len(weight), x.shape[1] if x.dim() == 4 else 0
    if projection is None and projection_bias is not None:
        raise ValueError("projection_bias: expected beside a projection, got it alone")
    if projection is not None:
        common.check(x, projection, projection_bias, ("x", "projection", "projection_bias"))
        if projection.shape != (outputs, C, 1, 1):
            raise ValueError(
                f"projection: expected shape ({outputs}, {C}, 1, 1), got {tuple(projection.shape)}"
            )
    want = (h.shape[0], outputs if projection is None else C, *h.shape[2:])
    if x.shape != want:
        raise ValueError(f"x: expected shape {want}, got {tuple(x.shape)}")
    return reference.residual_conv2d(*given)
