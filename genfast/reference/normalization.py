"""Group, layer and RMS norm in plain PyTorch: the truth of the family.

Every function differentiates any number of times, runs in any dtype and under any transform.
Sources: Wu & He, "Group normalization", 2018; Ba et al., "Layer normalization", 2016; Zhang &
Sennrich, "Root mean square layer normalization", 2019; modulation by a condition: Perez et al.,
"FiLM", 2018, Dhariwal & Nichol 2021 (AdaGN), Peebles & Xie 2023 (adaLN).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def _silu(z: Tensor) -> Tensor:
    """z is this module's own: in its place where no gradient is recorded, because a sampling step
    spends as long on fetching fresh memory as on the values."""
    return F.silu(z, inplace=not torch.is_grad_enabled())


# In the order of the native enum.
ACTIVATIONS = {
    "linear": lambda z: z,
    "silu": _silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def of_samples(s: Tensor, x: Tensor, groups: int) -> Tensor:
    """(B, C) shaped to broadcast to x: along its dimension 1 for a group norm, else its last."""
    ones = [1] * (x.dim() - 2)
    return s.reshape([*s.shape, *ones] if groups else [len(s), *ones, s.shape[1]])


def gated_sum(x: Tensor, add: Tensor, gate: Tensor | None = None) -> Tensor:
    """x + gate add along the last dimension; gate: (B, C)."""
    # addcmul's gradient takes two passes more
    return x + (add if gate is None else of_samples(gate, x, 0) * add)


def normalize(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    groups: int = 0,
    rms: bool = False,
    act: str = "linear",
    eps: float = 1e-5,
) -> Tensor:
    """act(((x - mean) / sqrt(var + eps) weight + bias) (1 + scale) + shift). groups > 0: group norm
    over dimension 1; 0: layer norm over the last, or with rms x / sqrt(mean(x^2) + eps).
    weight, bias: (C,); scale, shift: (B, C)."""
    if groups:
        if x.device.type == "cpu" and torch.is_grad_enabled() and not x.requires_grad:
            # PyTorch 2.13's gradients by weight and bias alone end the process with channels last.
            x = x.contiguous()
        alone = weight is None and bias is not None  # PyTorch has no gradient of a bias alone
        z = torch.group_norm(x, groups, weight, None if alone else bias, eps)
        z = z + bias.reshape(-1, *[1] * (x.dim() - 2)) if alone else z
    elif rms:
        z = F.rms_norm(x, x.shape[-1:], weight, eps)
        z = z if bias is None else z + bias
    else:
        z = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if scale is not None and shift is not None:
        z = torch.addcmul(of_samples(shift, x, groups), z, 1 + of_samples(scale, x, groups))
    elif scale is not None:
        z = z * (1 + of_samples(scale, x, groups))
    elif shift is not None:
        z = z + of_samples(shift, x, groups)
    return ACTIVATIONS[act](z)
