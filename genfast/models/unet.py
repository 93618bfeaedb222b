"""The U-Net of diffusion models: ResBlocks on several levels, attention on some.

Ho et al., "Denoising diffusion probabilistic models", 2020, appendix B; Dhariwal & Nichol,
"Diffusion models beat GANs", 2021 (the scale-shift ResBlock). Letters: x (B, C, H, W); t (B,) int;
y (B,) class labels; e (B, ...) the embedding of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast.models._bare import CONV, LINEAR, bare
from genfast.nn.convolution import Conv2d
from genfast.nn.linear import Linear
from genfast.nn.normalization import GroupNorm
from genfast.ops.attention import attention
from genfast.ops.convolution import residual_conv2d, upsampled_conv2d
from genfast.ops.linear import linear


def timestep_embedding(t: Tensor, width: int, longest: float = 10_000.0) -> Tensor:
    """cos and sin of t at width / 2 frequencies from 1 on towards 1 / longest, which is left out
    (Vaswani et al. 2017); t (B,) -> (B, width) float32, width even."""
    half = width // 2
    ramp = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angle = t.float()[:, None] * torch.exp(-math.log(longest) * ramp)
    return torch.cat([angle.cos(), angle.sin()], 1)


class ResBlock(nn.Module):
    """norm, SiLU, conv; norm scaled and shifted by the embedding, SiLU, conv; plus the input.
    x (B, inputs, H, W), e (B, 2 outputs): `emb` of the embedding, which the U-Net makes of all its
    blocks at once."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float):
        super().__init__()
        self.norm1 = GroupNorm(groups(inputs), inputs, act="silu")
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.emb = Linear(embedding, 2 * outputs)
        self.norm2 = GroupNorm(groups(outputs), outputs, act="silu")
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.dropout(self.norm2(h, *e.chunk(2, 1)))  # scale and shift
        conv, skip = self.conv2, self.skip
        if not (bare(conv, CONV) and bare(skip, (*CONV, nn.Identity))):
            return conv(h) + skip(x)
        projection = () if isinstance(skip, nn.Identity) else (skip.weight, skip.bias)
        return residual_conv2d(h, x, conv.weight, conv.bias, *projection)


class AttentionBlock(nn.Module):
    """Self-attention over the H W places, plus the input."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.heads = max(channels // head_dim, 1)
        if channels % self.heads:
            raise ValueError(
                f"widths: expected multiples of {self.heads} heads where the U-Net attends, got "
                f"{channels}; take a multiple of head_dim = {head_dim}"
            )
        self.norm = GroupNorm(groups(channels), channels)
        self.qkv = Linear(channels, 3 * channels)
        self.out = zeroed(Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        tokens = self.norm(x).flatten(2).mT  # (B, H W, C)
        qkv = self.qkv(tokens).unflatten(-1, (3, self.heads, C // self.heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, H W, C / heads)
        h = attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(h).mT.unflatten(2, (H, W))


class Up(nn.Conv2d):
    """x (B, C, H, W) -> (B, C, 2 H, 2 W)."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return upsampled_conv2d(x, self.weight, self.bias)


def groups(channels: int) -> int:
    """32 as in the papers, fewer for few channels: at least 4 a group."""
    return math.gcd(32, channels // 4 or 1, channels)


def check_levels(widths: tuple[int, ...], attention: tuple[int, ...]) -> None:
    if not widths or any(width < 2 or width % 2 for width in widths):
        raise ValueError(
            "widths: expected an even number of channels >= 2 for every level, such as 16,32,64, "
            f"got {','.join(map(str, widths)) or 'none'}"
        )
    if any(not 0 <= level < len(widths) for level in attention):
        raise ValueError(
            f"attention: expected levels in 0 ... {len(widths) - 1}, counted along widths, got "
            f"{','.join(map(str, attention))}"
        )


def zeroed(layer: nn.Module) -> nn.Module:
    """A block that starts as the identity (Goyal et al. 2017; Ho et al. 2020's last layer)."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class UNet(nn.Module):
    """x (B, inputs, H, W), t (B,), y (B,) or None -> (B, outputs, H, W).

    widths: channels of each level, halving H and W in between. blocks: ResBlocks a level (one more
    on the way up). attention: the levels, counted from 0, that attend, next to the middle, which
    always does. head_dim: least width of an attention head. dropout: before each ResBlock's second
    convolution, in training. classes: y is in 0 ... classes, where `classes` itself means none
    given; 0: no y.
    """

    def __init__(
        self, inputs: int, outputs: int, widths: tuple[int, ...] = (32, 64, 64), blocks: int = 1,
        attention: tuple[int, ...] = (), classes: int = 0, head_dim: int = 32, dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        first, embedding = widths[0], 4 * widths[0]
        self.first = first
        self.time = nn.Sequential(Linear(first, embedding), nn.SiLU(), Linear(embedding, embedding))
        self.label = nn.Embedding(classes + 1, embedding) if classes else None
        self.enter = Conv2d(inputs, first, 3, padding=1)

        def block(c_in: int, c_out: int, level: int) -> nn.ModuleList:
            res = ResBlock(c_in, c_out, embedding, dropout)
            attends = level in attention
            return nn.ModuleList([res, AttentionBlock(c_out, head_dim)] if attends else [res])

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, c = [first], first
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.down.append(block(c, width, level))
                c = width
                skips.append(c)
            if level < len(widths) - 1:
                self.down.append(nn.ModuleList([nn.Conv2d(c, c, 3, stride=2, padding=1)]))
                skips.append(c)
        self.middle = nn.ModuleList([
            ResBlock(c, c, embedding, dropout), AttentionBlock(c, head_dim),
            ResBlock(c, c, embedding, dropout),
        ])  # fmt: skip
        for level in reversed(range(len(widths))):
            for i in range(blocks + 1):
                layers = block(c + skips.pop(), widths[level], level)
                c = widths[level]
                if i == blocks and level:
                    layers.append(Up(c))
                self.up.append(layers)
        self.leave = nn.Sequential(
            GroupNorm(groups(c), c, act="silu"),
            nn.Identity(),  # SiLU's place in old state dicts
            zeroed(Conv2d(c, outputs, 3, padding=1)),
        )
        # The convolutions' layout: x follows the weights. 10% of a training step and of a sampling
        # step on two cores, where each convolution would else reorder what it reads and writes.
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        e = self.time(timestep_embedding(t, self.first).to(x.dtype))
        if self.label is not None:
            e = e + self.label(y)
        of_block = iter(self._of_blocks(F.silu(e)))

        def through(layers: nn.ModuleList, h: Tensor) -> Tensor:
            for layer in layers:
                h = layer(h, next(of_block)) if isinstance(layer, ResBlock) else layer(h)
            return h

        hs = [self.enter(x)]
        for layers in self.down:
            hs.append(through(layers, hs[-1]))
        h = through(self.middle, hs[-1])
        for layers in self.up:
            h = through(layers, torch.cat([h, hs.pop()], 1))
        return self.leave(h)

    def _of_blocks(self, e: Tensor) -> Sequence[Tensor]:
        """`emb` of each ResBlock in turn, as one product: between the convolutions each small one
        took 50 us, 2.4 of the 92 ms of four sampling steps."""
        levels = (*self.down, self.middle, *self.up)
        embs = [m.emb for layers in levels for m in layers if isinstance(m, ResBlock)]
        if not all(bare(m, LINEAR) for m in embs):
            return [m(e) for m in embs]
        weight, bias = (torch.cat([getattr(m, n) for m in embs]) for n in ("weight", "bias"))
        return linear(e, weight, bias).split([m.out_features for m in embs], 1)
