"""Models on plain PyTorch: the names by which layers and models call genfast's ops, bound to the
lines that a PyTorch user would write. What has no line here runs on the backend "reference", whose
checks cost up to 0.1 ms a call: for all ops that made the U-Net's rival 5 to 7 % slower.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType

import torch
import torch.nn.functional as F

import genfast
from genfast.ops.convolution import residual_conv2d, upsampled_conv2d
from genfast.ops.filtering.feed_forward import feed_forward
from genfast.reference import attention as written
from genfast.reference import convolution
from genfast.reference.normalization import ACTIVATIONS, gated_sum, normalize

_WRITTEN = written.attention


def _by_sdpa(q, k, v, *, mask=None, offset=0, keep=None, window=(-1, -1), scale=None, **options):
    """`reference.attention`, which is written to be read, as PyTorch's users call theirs."""
    given = {name for name, value in options.items() if value is not None and value != 0}
    causal = window[1] == 0
    if causal and offset:  # of a cache's proof; the rival there has words of its own
        return _WRITTEN(q, k, v, mask=mask, offset=offset, window=window, scale=scale)
    if given or keep is not None or window[0] != -1 or window[1] > 0:
        raise ValueError(f"attention: expected what F.sdpa has, got {window}, {offset}, {given}")
    out = _attention(q, k, v, mask=mask, causal=causal, scale=scale)
    return out, out.new_empty(0)  # nobody reads the log of its sums


def _attention(q, k, v, *, mask=None, causal=False, scale=None, dropout_p=0.0):
    if causal and mask is not None:
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
        causal = False
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, causal, scale=scale, enable_gqa=grouped
    )


def _group_norm(x, groups, *tensors, eps=1e-5, **options):
    return normalize(x, *tensors, groups=groups, eps=eps, **options)


def _last_norm(rms: bool, least: float) -> Callable:
    def norm(x, weight=None, bias=None, *, add=None, gate=None, eps=None, **options):
        total = x if add is None else gated_sum(x, add, gate)
        eps = least if eps is None else eps
        y = normalize(total, weight, bias, rms=rms, eps=eps, **options)
        return y if add is None else (total, y)

    return norm


def _linear(x, weight, bias=None, *, act="linear"):
    y = F.linear(x, weight, bias)
    return F.relu(y) if act == "relu" else y


def _feed_forward(x, w1, b1, w2, b2, *, act="gelu"):
    return F.linear(ACTIVATIONS[act](F.linear(x, w1, b1)), w2, b2)


LINES = {
    genfast.attention: _attention,
    genfast.group_norm: _group_norm,
    genfast.layer_norm: _last_norm(False, 1e-5),
    genfast.rms_norm: _last_norm(True, torch.finfo(torch.float32).eps),
    genfast.linear: _linear,
    genfast.conv2d: F.conv2d,
    feed_forward: _feed_forward,
    residual_conv2d: convolution.residual_conv2d,
    upsampled_conv2d: convolution.upsampled_conv2d,
}


def _places() -> Iterator[tuple[ModuleType, str, Callable]]:
    """Where layers and models have a name of an op of `LINES`, and the op."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(("genfast.nn", "genfast.models")):
            for name, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and value in LINES:
                    yield module, name, value


def on_reference(call: Callable) -> Callable:
    """The call on plain PyTorch."""

    def run(*args):
        places = list(_places())
        written.attention = _by_sdpa
        try:
            for module, name, op in places:
                setattr(module, name, LINES[op])
            with genfast.backend("reference"):
                return call(*args)
        finally:
            written.attention = _WRITTEN
            for module, name, op in places:
                setattr(module, name, op)

    return run
