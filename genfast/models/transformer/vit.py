"""ViT: an image as a sequence of patches.

Dosovitskiy et al., "An image is worth 16x16 words", 2021 (pre-norm blocks, GELU, a class token,
learned positions). Letters as in `blocks`; P pixels along a patch's side, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast.models import _inputs
from genfast.models.transformer import blocks
from genfast.models.transformer.blocks import Attention, Block, FeedForward
from genfast.nn.linear import Linear
from genfast.nn.normalization import LayerNorm
from genfast.ops import _check


class ViT(nn.Module):
    """image: (H, W) or one int for a square; patch P; channels C; classes: of the head.
    hidden: inner width (default 4 d); activation: a row of `blocks.ACTIVATIONS`; eps: added to the
    norms' variance."""

    def __init__(
        self,
        image: int | tuple[int, int],
        patch: int,
        channels: int,
        classes: int,
        d: int = 192,
        layers: int = 6,
        heads: int = 6,
        hidden: int | None = None,
        activation: str = "gelu",
        eps: float = 1e-12,
    ):
        super().__init__()
        self.config = blocks.arguments(locals())
        _check.counts(channels=channels, classes=classes, d=d, layers=layers, heads=heads)
        self.size = (image, image) if isinstance(image, int) else tuple(image)
        for n in self.size:
            _check.integer("image", n, low=1)
        self.patch, self.channels = patch, channels
        rows, columns = (blocks.divides("patch", patch, "image", n) for n in self.size)
        self.embed = Linear(channels * patch * patch, d)
        self.first = nn.Parameter(torch.zeros(1, d))
        self.positions = nn.Parameter(torch.empty(1 + rows * columns, d))

        def block():
            return Block(
                Attention(d, heads),
                FeedForward(d, hidden or 4 * d, activation),
                LayerNorm(d, eps),
                LayerNorm(d, eps),
            )

        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm = LayerNorm(d, eps)
        self.head = Linear(d, classes)
        # Xavier's of the d x 4 d products, as in the paper's code: 0.02 is for widths near 800.
        blocks.initialise(self, layers, std=(2 / (5 * d)) ** 0.5)
        nn.init.normal_(self.positions, std=0.02)

    def patches(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H W / P^2, C P P), row by row."""
        _inputs.floats("x", x)
        if x.dim() != 4 or tuple(x.shape[1:]) != (self.channels, *self.size):
            raise ValueError(
                f"x: expected (B, C, H, W) = (B, {self.channels}, {self.size[0]}, {self.size[1]}), "
                f"got {tuple(x.shape)}; resize the images or build ViT(image=...)"
            )
        P = self.patch
        x = x.unflatten(3, (-1, P)).unflatten(2, (-1, P))  # (B, C, rows, P, columns, P)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def hidden(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1 + patches, d), the class token first."""
        x = self.embed(self.patches(x))
        x = torch.cat([self.first.expand(len(x), 1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes, (B, classes)."""
        return self.head(self.hidden(x)[:, 0])

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy, (), nats. labels (B,) int64 in [0, classes)."""
        _inputs.some("x", x)
        _inputs.labels("labels", labels, len(x), self.head.out_features)
        return F.cross_entropy(self(x).float(), labels)
