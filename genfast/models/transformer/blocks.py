"""Parts of every transformer here: norms, feed-forward, attention, residual block.

Letters: B batch, S tokens, d width of the model, H heads (Hkv of keys and values), D width of a
head, V vocabulary, L layers; x (B, S, d). Vaswani et al., "Attention is all you need", 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast.models._bare import LINEAR, bare
from genfast.models.transformer.cache import LayerCache
from genfast.nn.linear import Linear
from genfast.nn.normalization import LayerNorm, RMSNorm
from genfast.ops.attention import attention, attention_with_kvcache
from genfast.ops.attention.parts import apart
from genfast.ops.filtering import bias_act, gated_act
from genfast.ops.filtering.feed_forward import feed_forward

# 3 to 4x as fast as PyTorch's on a CPU, forward and backward; its exact GELU is as fast as ours.
_gelu_tanh = partial(bias_act, act="gelu_tanh", gain=1.0)


class Activation(NamedTuple):
    """gated: W_2 (f(W_g x) * W_u x), Shazeer, "GLU variants improve transformer", 2020; f takes
    both in one tensor. act: f's name in `feed_forward`, if it has one."""

    gated: bool
    f: Callable[[Tensor], Tensor]
    act: str | None = None


ACTIVATIONS = {
    "relu": Activation(False, F.relu),
    "gelu": Activation(False, F.gelu, "gelu"),
    "gelu_tanh": Activation(False, _gelu_tanh, "gelu_tanh"),
    "swiglu": Activation(True, partial(gated_act, act="swish")),
    "geglu": Activation(True, partial(gated_act, act="gelu_tanh")),
}
# rms: Zhang & Sennrich 2019; layer: Ba et al. 2016.
NORMS = {
    "rms": lambda d, eps, bias: RMSNorm(d, eps),
    "layer": lambda d, eps, bias: LayerNorm(d, eps, bias=bias),
}


def row(argument: str, name: str, table: dict):
    if name not in table:
        raise ValueError(f"{argument}: expected one of {', '.join(table)}, got {name!r}")
    return table[name]


def norm(kind: str, d: int, eps: float = 1e-5, bias: bool = True) -> nn.Module:
    return row("norm", kind, NORMS)(d, eps, bias)


class Residual(NamedTuple):
    """x + gate add, not added up yet: the norm behind does it in its own pass. add None: x alone;
    gate (B, d), None: 1."""

    x: Tensor
    add: Tensor | None = None
    gate: Tensor | None = None


def added(norm: nn.Module, h: Residual, *condition: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of h, and its norm under a condition (scale, shift)."""
    if h.add is None:
        return h.x, norm(h.x, *condition)
    if isinstance(norm, (LayerNorm, RMSNorm)):
        return norm(h.x, *condition, add=h.add, gate=h.gate)
    gated = h.add if h.gate is None else h.gate[:, None] * h.add
    x = h.x + gated  # a norm that somebody put in place of ours
    return x, norm(x, *condition)


def divides(name: str, part: int, whole_name: str, whole: int) -> int:
    """whole // part, or an error that names both."""
    if part < 1 or whole % part:
        raise ValueError(
            f"{name}: expected a divisor of {whole_name} = {whole}, got {part}; change one of them"
        )
    return whole // part


class FeedForward(nn.Module):
    """W_2 f(W_1 x), or gated; gate and up are one product, in this order."""

    def __init__(self, d: int, hidden: int, activation: str = "gelu", bias: bool = True):
        super().__init__()
        gated, self.f, self.act = row("activation", activation, ACTIVATIONS)
        self.up = Linear(d, hidden * (2 if gated else 1), bias=bias)
        self.down = Linear(hidden, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.act is None or not (bare(self.up, LINEAR) and bare(self.down, LINEAR)):
            return self.down(self.f(self.up(x)))
        up, down = self.up, self.down
        return feed_forward(x, up.weight, up.bias, down.weight, down.bias, act=self.act)


class Rotary:
    """Rotary positions: pair (2r, 2r + 1) of a head at position s turns by s base^(-2r / D).

    Su et al., "RoFormer", 2021, eq. 34. Tables in float32 whatever the model's dtype: at position
    4,000 a bfloat16 angle is off by up to 8 radians. Made on first use for each device.
    """

    def __init__(self, positions: int, head_dim: int, base: float = 10000.0):
        if head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for rotary, got {head_dim}")
        self.positions, self.head_dim, self.base = positions, head_dim, base
        self._tables: dict = {}

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """cos, sin (positions, D / 2) and e^(i angle) (positions, 1, D / 2)."""
        if device not in self._tables:
            r = torch.arange(0, self.head_dim, 2, dtype=torch.float64)
            angle = torch.arange(self.positions)[:, None] * self.base ** (-r / self.head_dim)
            cos, sin = (f(angle).float().to(device) for f in (torch.cos, torch.sin))
            self._tables[device] = cos, sin, torch.complex(cos, sin)[:, None]
        return self._tables[device]


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """x (B, S, H, D) by turn (S, 1, D / 2): one complex product, 4x faster than by cos and sin."""
    pairs = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """W_o concat_h softmax(scale q_h k_h^T + mask) v_h; q, k and v are one product, in this order.

    Queries share keys and values in groups when kv_heads < heads (Ainslie et al., "GQA", 2023).
    """

    def __init__(
        self,
        d: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        scale: float | None = None,
    ):
        super().__init__()
        kv_heads = kv_heads or heads
        divides("kv_heads", kv_heads, "heads", heads)
        self.head_dim = head_dim or divides("heads", heads, "d", d)
        self.groups = heads, kv_heads, kv_heads
        self.scale = scale
        self.qkv = Linear(d, sum(self.groups) * self.head_dim, bias=bias)
        self.out = Linear(heads * self.head_dim, d, bias=bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        turn: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """(B, S, d) -> (B, S, d). mask: as in `genfast.attention`. turn: of `Rotary`, rows of these
        positions. cache: x continues what it holds, and turns by the cache's tables; with a mask
        (B|1, H|1, S, length with x) all rows have this length.
        """
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B, S, H + 2 Hkv, D)
        if turn is not None:
            qk, v = heads.split((sum(self.groups[:2]), self.groups[2]), 2)
            q, k = rotate(qk, turn).split(self.groups[:2], 2)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        else:
            q, k, v = apart(heads, self.groups)
        if cache is not None and mask is not None:
            k, v = cache.append(k, v, mask.shape[-1])
            causal = False
        if cache is None or mask is not None:
            out = attention(q, k, v, mask=mask, causal=causal, scale=self.scale)
        else:
            out = attention_with_kvcache(
                q, cache.k, cache.v, k, v, cache_seqlens=cache.lengths, rotary_cos=cache.cos,
                rotary_sin=cache.sin, causal=True, scale=self.scale,
            )  # fmt: skip
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm1(x)), then + feed_forward(norm2(.)); post-norm (BERT): norm(x + f(x))."""

    def __init__(
        self,
        attention: Attention,
        feed_forward: FeedForward,
        norm1: nn.Module,
        norm2: nn.Module,
        pre_norm: bool = True,
    ):
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward
        self.norm1, self.norm2, self.pre_norm = norm1, norm2, pre_norm

    def forward(self, x: Tensor, **options) -> Tensor:
        """options: of `Attention.forward`."""
        if self.pre_norm:
            x, y = added(self.norm2, Residual(x, self.attention(self.norm1(x), **options)))
            return x + self.feed_forward(y)
        _, x = added(self.norm1, Residual(x, self.attention(x, **options)))
        return added(self.norm2, Residual(x, self.feed_forward(x)))[1]


def initialise(model: nn.Module, layers: int, std: float = 0.02) -> None:
    """N(0, std) weights and zero biases; what is added to the residual, std / sqrt(2 layers).

    Radford et al. (GPT-2), "Language models are unsupervised multitask learners", 2019, 2.3.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            last = name.endswith((".attention.out", ".feed_forward.down"))
            nn.init.normal_(module.weight, std=std / math.sqrt(2 * layers) if last else std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


def arguments(scope: dict) -> dict:
    """The constructor's arguments out of its locals(): a model's `config`."""
    return {k: v for k, v in scope.items() if k not in ("self", "__class__")}
