"""PyTorch's own attention, for the calls where the table of _choice.py has it as the faster one.

Its gradient has no gradient. Asked for a differentiable one, a hook on its node of the graph gives
the composite's instead; a hook costs 2.6 us a training step (3.9 when each call makes its own), a
Function around the call 40. What the node saved may be unpacked once alone under hooks on saved
tensors (checkpoints), so there a Function behind it saves the operands once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn.functional import (
    scaled_dot_product_attention as torch_sdpa,  # kept before any reroute
)

from genfast.ops._choice import ATTENTION_BY_TORCH, ATTENTION_CALLS, WIDE_HEAD
from genfast.ops._force import get_backend
from genfast.ops._road import wants_graph

_DECODE, _TRAINING, _WIDE_TRAINING = map(
    ATTENTION_CALLS.index, ("decode", "training", "wide training")
)
_MASKS = (torch.bool, torch.float32)  # in any dtype
_NODE = "ScaledDotProduct"  # what the names of PyTorch's fused nodes begin with


def chosen(call: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """The table gives a call (place in ATTENTION_CALLS) of these sizes to PyTorch, which would
    broadcast no batch of it, and the mask's result is ours: in 16 bit it is not, cuDNN's rows that
    see no key are not 0."""
    sizes = ATTENTION_BY_TORCH[q.is_cuda].get(q.dtype)
    if sizes is None:
        return False
    if call == _TRAINING and q.shape[-1] > WIDE_HEAD:
        call = _WIDE_TRAINING
    given = sizes[call]
    if not given or get_backend() != "auto":
        return False
    size = k.numel() if call == _DECODE else q.numel() * k.shape[2]
    if size not in given or k.shape != v.shape or q.shape[0] != k.shape[0]:
        return False
    return mask is None or (
        q.dtype is torch.float32 and not q.is_cpu and not causal and mask.dtype in _MASKS
    )


def _takes(q: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Asked for by name, as PyTorch has it; its derivatives of forward mode are few."""
    if forward_ad._current_level >= 0:
        return False
    return mask is None or (mask.dim() >= 2 and not causal and mask.dtype in (*_MASKS, q.dtype))


def settings(call: int | None, q: Tensor, k: Tensor, v: Tensor, mask, options) -> dict | None:
    """Arguments of PyTorch's attention for a call that the table gives to it (call None: for any);
    None when the table says ours, or PyTorch's would mean another."""
    if q.dim() != 4 or k.dim() != 4:
        return None
    causal = options.right == 0
    if not (_takes(q, mask, causal) if call is None else chosen(call, q, k, v, mask, causal)):
        return None
    (B, Hq, Sq, D), (Bk, Hkv, Sk, Dk) = q.shape, k.shape
    same = (
        (options.softcap, options.left, options.dropout_p) == (0.0, -1, 0.0)
        and (options.scale is None or math.isfinite(options.scale))
        and (options.right == -1 or (causal and (not options.bottom_right or Sq == Sk)))
        and q.dtype is k.dtype is v.dtype
        and (k.shape == v.shape or (call is None and k.shape[:-1] == v.shape[:-1]))
        and (B, D) == (Bk, Dk)
        and q.device == k.device == v.device
    )
    if not same or not Hkv or Hq % Hkv:
        return None
    return {"is_causal": causal, "scale": options.scale, "enable_gqa": Hq != Hkv}


class Twice:
    """The hook. gradients(q, k, v, causal, scale, dout): the composite's, part of the graph.

    It holds no tensor but a mask: those saved by the node are freed with it. operands: q, k and v
    that _Keep has unpacked for the one call that follows.
    """

    __slots__ = ("gradients", "operands")

    def __init__(self, gradients: Callable):
        self.gradients, self.operands = gradients, None

    def __call__(self, grad_inputs, grad_outputs):
        if not wants_graph() or grad_outputs[0] is None:
            return None
        node = torch._C._current_autograd_node()
        operands, self.operands = self.operands, None
        if operands is None:
            operands = node._saved_query, node._saved_key, node._saved_value
        found = self.gradients(*operands, node._saved_is_causal, node._saved_scale, grad_outputs[0])
        wanted = zip(grad_inputs, found, strict=False)  # a mask may stand behind the three
        return (*(None if old is None else new for old, new in wanted), *grad_inputs[len(found) :])


class _Keep(Function):
    """The attention's result as it is, and its operands for a differentiable backward."""

    @staticmethod
    def forward(ctx, out, q, k, v, twice):
        ctx.save_for_backward(q, k, v)
        ctx.twice = twice
        return out.view_as(out)

    @staticmethod
    def backward(ctx, g):
        if wants_graph():
            ctx.twice.operands = ctx.saved_tensors
        return g, None, None, None, None


def _hooked() -> bool:
    """Hooks on saved tensors are in force."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def differentiable(q: Tensor, k: Tensor, v: Tensor, twice: Twice, **arguments) -> Tensor:
    """PyTorch's attention, twice differentiable."""
    out = torch_sdpa(q, k, v, **arguments)
    if torch.compiler.is_dynamo_compiling():  # a compiled graph is differentiated once
        return out
    node = out.grad_fn
    # Heads that it pads stand in a slice of its result. Composed of matrix products, which have
    # gradients of any order, there is no such node.
    for _ in range(2):
        if node is None or type(node).__name__.startswith(_NODE):
            break
        node = node.next_functions[0][0] if node.next_functions else None
    else:
        node = None
    if node is None:
        return out
    if hooked := _hooked():
        twice = Twice(twice.gradients)  # operands are one call's
    node.register_hook(twice)
    return _Keep.apply(out, q, k, v, twice) if hooked else out
