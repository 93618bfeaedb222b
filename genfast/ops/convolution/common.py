"""What the functions share: which tensors were measured, and the checks that name an argument."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.ops import _check
from genfast.ops._force import forced_reference
from genfast.ops._road import transforming


def quick(x: Tensor) -> bool:
    """Of a kind that was measured."""
    return (
        not transforming()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and not forced_reference()
    )


def check(x: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, ...]) -> int:
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
