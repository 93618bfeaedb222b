"""StyleGAN's filtering ops in plain PyTorch: the truth of the family.

Every function differentiates any number of times, runs in any dtype and under any transform.
Sources: Karras et al., "Analyzing and improving the image quality of StyleGAN", 2020, and the
public definitions of NVlabs' torch_utils.ops (bias_act, upfirdn2d).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """value(z, alpha), and the defaults of alpha and gain. by_sign: the slope depends on the sign
    of z alone, and so of y, where alpha >= 0 and gain > 0."""

    value: Callable[[Tensor, float], Tensor]
    alpha: float = 0.0
    gain: float = 1.0
    by_sign: bool = False


# In the order of the native enum.
ACTIVATIONS = {
    "linear": Activation(lambda z, alpha: z, by_sign=True),
    "relu": Activation(lambda z, alpha: F.relu(z), gain=math.sqrt(2), by_sign=True),
    "lrelu": Activation(
        lambda z, alpha: F.leaky_relu(z, alpha), alpha=0.2, gain=math.sqrt(2), by_sign=True
    ),
    "tanh": Activation(lambda z, alpha: torch.tanh(z)),
    "sigmoid": Activation(lambda z, alpha: torch.sigmoid(z)),
    "elu": Activation(lambda z, alpha: F.elu(z)),
    "selu": Activation(lambda z, alpha: F.selu(z)),
    "softplus": Activation(lambda z, alpha: F.softplus(z)),
    "swish": Activation(lambda z, alpha: torch.sigmoid(z) * z, gain=math.sqrt(2)),
    "gelu": Activation(lambda z, alpha: F.gelu(z)),
    "gelu_tanh": Activation(lambda z, alpha: F.gelu(z, approximate="tanh")),
}


def over_channels(b: Tensor, x: Tensor, dim: int) -> Tensor:
    """(C,) shaped to broadcast along dimension dim of x."""
    return b.reshape([-1 if i == dim else 1 for i in range(x.dim())])


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | float = 1.0,
    *,
    dim: int = 1,
    act: str = "linear",
    alpha: float,
    gain: float,
    clamp: float | None = None,
) -> Tensor:
    """clamp(act(x + strength noise + b) gain, +-clamp). x: (B, ...), C = x.shape[dim]; b: (C,);
    noise broadcasts to x."""
    if noise is not None:
        x = x + strength * noise
    if b is not None:
        x = x + over_channels(b, x, dim)
    y = ACTIVATIONS[act].value(x, alpha)
    y = y if gain == 1 else y * gain
    if clamp is None:
        return y
    return torch.where(y.abs() < clamp, y, y.detach().clamp(-clamp, clamp))


# act of `gated_act`: Dauphin et al. 2017 (sigmoid) and Shazeer 2020.
GATES = ("linear", "relu", "sigmoid", "swish", "gelu", "gelu_tanh")


def gated_act(x: Tensor, *, act: str = "sigmoid") -> Tensor:
    """act(gate) up of the halves of x (..., 2 H)."""
    gate, up = x.chunk(2, -1)
    value = F.silu if act == "swish" else partial(ACTIVATIONS[act].value, alpha=0.0)
    return value(gate) * up


def slope_by_sign(
    grad: Tensor, y: Tensor, *, act: str, alpha: float, gain: float, clamp: float | None
) -> Tensor:
    """grad dy/dz of `bias_act`, from y alone (Activation.by_sign)."""
    below = {"linear": 1.0, "relu": 0.0, "lrelu": alpha}[act]
    slope = torch.where(y > 0, gain, gain * below)
    if clamp is not None:
        slope = torch.where(y.abs() < clamp, slope, 0.0)
    return grad * slope.to(grad.dtype)


def upfirdn2d(
    x: Tensor,
    f: Tensor,
    up: tuple[int, int] = (1, 1),
    down: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """up - 1 zeros after every sample, padding (negative: cropping), the filter, every down-th
    sample. x: (N, C, H, W). f: (fh, fw), or (n,) along both axes; a convolution, or with
    flip_filter a correlation. up, down: along (W, H). padding: (left, right, top, bottom).
    """
    (up_x, up_y), (down_x, down_y) = up, down
    N, C, H, W = x.shape
    x = x.reshape(N, C, H, 1, W, 1)
    x = F.pad(x, [0, up_x - 1, 0, 0, 0, up_y - 1]).reshape(N, C, H * up_y, W * up_x)
    x = F.pad(x, [max(n, 0) for n in padding])
    x = F.pad(x, [min(n, 0) for n in padding])  # crops, of the padding too
    if not flip_filter:
        f = f.flip(list(range(f.dim())))
    scaled, f = (f * gain).to(x.dtype), f.to(x.dtype)
    if f.dim() == 2:
        x = F.conv2d(x, scaled.expand(C, 1, *f.shape), groups=C)
    else:  # all of gain in one pass: a negative one has no root
        x = F.conv2d(x, scaled.reshape(1, 1, -1, 1).expand(C, 1, -1, 1), groups=C)
        x = F.conv2d(x, f.reshape(1, 1, 1, -1).expand(C, 1, 1, -1), groups=C)
    # Of nothing to leave out a slice is an alias, which batched gradients do not know.
    return x if max(down) == 1 else x[:, :, ::down_y, ::down_x]
