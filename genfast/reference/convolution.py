"""Convolutions with what stands next to them in plain PyTorch: the truth of the family.

Every function differentiates any number of times, runs in any dtype and under any transform.
Sources: Odena et al., "Deconvolution and checkerboard artifacts", 2016 (enlarge, then convolve);
He et al., "Deep residual learning", 2016 (the projection of a shortcut).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def upsampled_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """conv(x enlarged twice by nearest; weight) + bias. x: (B, I, H, W), weight: (O, I, 3, 3),
    bias: (O,) -> (B, O, 2 H, 2 W)."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: (B, I, H, W), weight: (O, I, 3, 3), bias: (O,), padding 1 -> (B, O, H, W)."""
    return F.conv2d(x, weight, bias, padding=1)


def residual_conv2d(
    h: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    projection: Tensor | None = None,
    projection_bias: Tensor | None = None,
) -> Tensor:
    """conv(h; weight) + bias + x, or in x's place conv(x; projection) + projection_bias.
    h: (B, I, H, W), weight: (O, I, K, K) with K odd, x: (B, C, H, W), projection: (O, C, 1, 1)."""
    y = F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2)
    return (x if projection is None else F.conv2d(x, projection, projection_bias)) + y
