"""Which modules a faster road may read the weights of, instead of calling them."""

from __future__ import annotations

from torch import nn

from genfast.nn.convolution import Conv2d
from genfast.nn.linear import Linear

LINEAR = (Linear, nn.Linear)
CONV = (Conv2d, nn.Conv2d)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def bare(layer: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """One of these kinds and nothing else: no wrapper (LoRA), no forward of its own (offloading),
    and no hooks, which see the whole layer and may make its weight (pruning, weight_norm)."""
    own = vars(layer)
    return type(layer) in kinds and "forward" not in own and not any(own[h] for h in _HOOKS)
