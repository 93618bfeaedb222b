"""convolution: a convolution with what stands next to it, in fewer multiplications or passes.

No kernels of its own: the products stay oneDNN's and MKL's, and what is chosen is which of them.
Taken where that was measured to be faster, on CPU tensors of fp32 with the channels inside; the
reference elsewhere, whose sums differ by rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast.ops import _check
from genfast.ops._backend import forced_reference
from genfast.ops._road import GRAD, SLOW, gate, is_compiling, transforming
from genfast.reference import convolution as reference

# Of nearest enlarging, y[2 i + a] sees x[i - 1 + a] and x[i + a] alone, through sums of taps: rows
# are the taps of the transposed convolution with stride 2, columns those of the convolution.
_TAPS = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))
with torch.inference_mode(False):  # a graph may hold it, wherever the package is first imported
    _TAPS = torch.tensor(_TAPS, dtype=torch.float32, device="cpu")
    _TAPS = torch.kron(_TAPS, _TAPS)  # of both axes, (16, 9)
# Places times channels times channels from which fewer products pay for making the weights: 32
# images of 16 channels take as long either way at 8 x 8 (2^19), at 14 x 14 (1.6 2^20) 0.7 times.
_LEAST = 1 << 20


def _quick(x: Tensor) -> bool:
    """Of a kind that was measured."""
    return (
        not transforming()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and not forced_reference()
    )


def _convolves(x: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, ...]) -> int:
    """The kernel's side K. names: of the three."""
    of_x, of_weight, of_bias = names
    _check.tensor(of_x, x)
    _check.tensor(of_weight, weight)
    if x.dim() != 4:
        raise ValueError(f"{of_x}: expected (B, C, H, W), got shape {tuple(x.shape)}; reshape it")
    C, K = x.shape[1], weight.shape[-1] if weight.dim() else 0
    if weight.dim() != 4 or weight.shape[1:] != (C, K, K) or K % 2 == 0:
        raise ValueError(
            f"{of_weight}: expected (O, {C}, K, K) with K odd, for the channels of {of_x}, got "
            f"shape {tuple(weight.shape)}"
        )
    if bias is not None:
        _check.tensor(of_bias, bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{of_bias}: expected shape ({len(weight)},), one number an output channel, got "
                f"{tuple(bias.shape)}; reshape it"
            )
    return K


def upsampled_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x enlarged twice by nearest, then convolved with padding 1; in 16 of its 36 products.

    x: (B, I, H, W); weight: (O, I, 3, 3); bias: (O,); of any float dtype. Returns (B, O, 2 H, 2 W).
    Each output sees 2 x 2 places of x, through sums of the weight's taps: a transposed convolution
    of 4 x 4 with stride 2, on fp32 CPU tensors with the channels inside and from 2^20 B H W I O.
    Differentiable any number of times. Raises TypeError / ValueError naming the argument.
    Odena et al., "Deconvolution and checkerboard artifacts", 2016 (enlarge, then convolve).
    """
    if _convolves(x, weight, bias, ("x", "weight", "bias")) != 3:
        raise ValueError(f"weight: expected (O, I, 3, 3), got shape {tuple(weight.shape)}")
    outputs, inputs = weight.shape[:2]
    if not _quick(x) or weight.dtype != x.dtype or x.numel() * outputs < _LEAST:
        return reference.upsampled_conv2d(x, weight, bias)
    taps = _TAPS @ weight.permute(2, 3, 1, 0).reshape(9, inputs * outputs)
    taps = taps.view(4, 4, inputs, outputs).permute(2, 3, 0, 1)
    return F.conv_transpose2d(x, taps, bias, stride=2, padding=1)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) with the channels inside -> (B H W, C), the same memory."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _joined(h, x, weight, bias, projection, projection_bias) -> Tensor | None:
    """x into the convolution's own output, or None where that was not measured. Any exception says
    that the arguments do not fit together."""
    given = (h, x, weight, bias, projection, projection_bias)
    road = gate(*given) if _quick(h) and _quick(x) else SLOW
    if road == SLOW or any(t is not None and t.dtype != h.dtype for t in given):
        return None
    if projection is not None and projection_bias is not None:
        bias = projection_bias if bias is None else bias + projection_bias
    y = F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2)
    C = x.shape[1] if projection is not None else y.shape[1]
    if x.shape != (len(y), C, *y.shape[2:]):
        return None
    if projection is None:
        return y.add_(x)
    y = y.contiguous(memory_format=torch.channels_last)
    rows, taps = _rows(x), projection.flatten(1).T
    if road == GRAD:  # the same bits; in place, the graph would copy the gradient
        return torch.addmm(_rows(y), rows, taps).unflatten(0, (len(y), *y.shape[2:])).movedim(-1, 1)
    _rows(y).addmm_(rows, taps)
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
    _convolves(h, weight, bias, ("h", "weight", "bias"))
    _check.tensor("x", x)
    outputs, C = len(weight), x.shape[1] if x.dim() == 4 else 0
    if projection is not None:
        _convolves(x, projection, projection_bias, ("x", "projection", "projection_bias"))
        if projection.shape != (outputs, C, 1, 1):
            raise ValueError(
                f"projection: expected shape ({outputs}, {C}, 1, 1), got {tuple(projection.shape)}"
            )
    want = (len(h), outputs if projection is None else C, *h.shape[2:])
    if x.shape != want:
        raise ValueError(f"x: expected shape {want}, got {tuple(x.shape)}")
    return reference.residual_conv2d(*given)
