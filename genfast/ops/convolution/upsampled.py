"""A convolution of an enlarged image from the image itself: on the kernel of 3 x 3, or as a
transposed convolution, whose products are oneDNN's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast.ops.convolution import common, winograd
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


def upsampled_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x enlarged twice by nearest, then convolved with padding 1; in 9 or 16 of its 36 products.

    x: (B, I, H, W); weight: (O, I, 3, 3); bias: (O,); of any float dtype. Returns (B, O, 2 H, 2 W).
    On fp32 CPU tensors with the channels inside: between multiples of 16 channels the kernel of
    `genfast.conv2d`, whose input has three different rows there, not four: 9 products. Else, from
    2^20 B H W I O, a transposed convolution of 4 x 4 with stride 2 by sums of the weight's taps,
    as each output sees 2 x 2 places of x: 16.
    Differentiable any number of times. Raises TypeError / ValueError naming the argument.
    Odena et al., "Deconvolution and checkerboard artifacts", 2016 (enlarge, then convolve).
    """
    y = winograd.convolved(x, weight, bias, enlarged=True)
    if y is not None:
        return y
    if common.check(x, weight, bias, ("x", "weight", "bias")) != 3:
        raise ValueError(f"weight: expected (O, I, 3, 3), got shape {tuple(weight.shape)}")
    outputs, inputs = weight.shape[:2]
    if not common.quick(x) or weight.dtype != x.dtype or x.numel() * outputs < _LEAST:
        return reference.upsampled_conv2d(x, weight, bias)
    taps = _TAPS @ weight.permute(2, 3, 1, 0).reshape(9, inputs * outputs)
    taps = taps.view(4, 4, inputs, outputs).permute(2, 3, 0, 1)
    return F.conv_transpose2d(x, taps, bias, stride=2, padding=1)
