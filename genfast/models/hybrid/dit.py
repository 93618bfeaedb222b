"""DiT: diffusion whose denoiser is a transformer over patches.

    c = W t + W y (+ W z);  (gamma, beta, alpha)_1,2 = W SiLU(c)        adaLN-Zero, W = 0 at first
    h = h + alpha_1 attention((1 + gamma_1) norm(h) + beta_1)
    h = h + cross-attention(norm(h), tokens)                            with text
    h = h + alpha_2 feed_forward((1 + gamma_2) norm(h) + beta_2)

Peebles & Xie, "Scalable diffusion models with transformers", 2023, section 3.2; cross-attention to
tokens: Rombach et al. 2022, section 3.3; norms of q and k: Dehghani et al., "Scaling vision
transformers to 22 billion parameters", 2023, section 2. The variance is learned between its bounds:
Nichol & Dhariwal, "Improved DDPM", 2021, eq. 15 and 16. Letters: x (B, C, H, W); P pixels along a
patch's side, S patches, d width of the model; t (B,) int; y (B,) labels; z (B, e) an embedding of
the whole; tokens (B, S', w), seen (B, S') bool: which of them are text.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast.models import _inputs
from genfast.models.transformer import blocks
from genfast.models.transformer.blocks import FeedForward, Residual
from genfast.models.unet import timestep_embedding, zeroed
from genfast.nn._tables import Tables
from genfast.nn.linear import Linear
from genfast.nn.normalization import LayerNorm, RMSNorm
from genfast.ops.attention import attention
from genfast.ops.attention.parts import apart


class Conditions(NamedTuple):
    """What a sample is drawn for, each None where the model knows none; see the module's head."""

    y: Tensor | None = None
    z: Tensor | None = None
    tokens: Tensor | None = None
    seen: Tensor | None = None


NOTHING = Conditions()


def places(rows: int, columns: int, d: int) -> Tensor:
    """Fixed positions of a grid, (rows columns, d): cos and sin of the row in the first half of the
    channels, of the column in the second (He et al., "MAE", 2022)."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([timestep_embedding(n.flatten(), d // 2) for n in (y, x)], 1)


class Attention(nn.Module):
    """Of x (B, S, d) to itself, or to memory (B, S', w) under the mask `seen` (B, S')."""

    def __init__(self, d: int, heads: int, memory: int | None = None, qk_norm: bool = False):
        super().__init__()
        self.heads, self.head_dim = heads, blocks.divides("heads", heads, "d", d)
        self.q = Linear(d, d) if memory else None
        self.kv = Linear(memory, 2 * d) if memory else None
        self.qkv = None if memory else Linear(d, 3 * d)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim, 1e-6) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.out = Linear(d, d)

    def forward(self, x: Tensor, memory: Tensor | None = None, seen: Tensor | None = None):
        of = (-1, self.head_dim)
        if self.qkv is not None:
            q, k, v = apart(self.qkv(x).unflatten(-1, of), [self.heads] * 3)
        else:
            q = self.q(x).unflatten(-1, of).transpose(1, 2)
            k, v = apart(self.kv(memory).unflatten(-1, of), [self.heads] * 2)
        mask = None if seen is None else seen[:, None, None]
        out = attention(self.q_norm(q), self.k_norm(k), v, mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """See the module's head. tokens: their width, 0 without cross-attention."""

    def __init__(self, d: int, heads: int, tokens: int, qk_norm: bool):
        super().__init__()
        self.norm1, self.norm2 = (LayerNorm(d, 1e-6, elementwise_affine=False) for _ in "12")
        self.attention = Attention(d, heads, qk_norm=qk_norm)
        self.feed_forward = FeedForward(d, 4 * d, "gelu_tanh")
        self.norm3 = LayerNorm(d, 1e-6) if tokens else None
        self.cross = Attention(d, heads, tokens, qk_norm) if tokens else None
        self.modulation = Linear(d, 6 * d)

    def forward(self, h: Residual, c: Tensor, given: Conditions) -> Residual:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, 1)
        x, y = blocks.added(self.norm1, h, scale1, shift1)
        h = Residual(x, self.attention(y), gate1)
        if self.cross is not None:
            x, y = blocks.added(self.norm3, h)
            h = Residual(x, self.cross(y, given.tokens, given.seen))
        x, y = blocks.added(self.norm2, h, scale2, shift2)
        return Residual(x, self.feed_forward(y), gate2)


class DiT(Tables):
    """x (B, C, H, W), t (B,), conditions -> (B, outputs, H, W). The network alone; with its noise
    schedule: `DiTDiffusion`, and on latents `LatentDiffusion`.

    shape: (C, H, W), H and W divisible by `patch`. outputs: channels, twice C with a learned
    variance. qk_norm: RMS norm of queries and keys. classes, z, tokens: number of labels, widths of
    the embedding and of the tokens, 0 for none of them. In place of a condition that is dropped
    stands a learned one.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        outputs: int,
        patch: int = 2,
        d: int = 96,
        layers: int = 4,
        heads: int = 4,
        classes: int = 0,
        z: int = 0,
        tokens: int = 0,
        qk_norm: bool = False,
    ):
        super().__init__()
        C, H, W = self.shape = _inputs.image_shape(shape)
        self.grid = tuple(blocks.divides("patch", patch, "H, W", n) for n in (H, W))
        if d % 8:
            raise ValueError(f"d: expected a multiple of 8 (of the fixed positions), got {d}")
        self.patch, self.d, self.classes, self.z, self.tokens = patch, d, classes, z, tokens
        self.enter = Linear(C * patch * patch, d)
        with torch.device("cpu"):  # values, in a model built on the meta device too
            fixed = places(*self.grid, d)
        self.set_tables(places=fixed)
        self.time = nn.Sequential(Linear(256, d), nn.SiLU(), Linear(d, d))
        self.label = nn.Embedding(classes + 1, d) if classes else None
        self.of_z = nn.Sequential(Linear(z, d), nn.SiLU(), Linear(d, d)) if z else None
        self.no_z = nn.Parameter(torch.zeros(d)) if z else None
        self.no_token = nn.Parameter(torch.zeros(tokens)) if tokens else None
        self.blocks = nn.ModuleList(Block(d, heads, tokens, qk_norm) for _ in range(layers))
        self.norm = LayerNorm(d, 1e-6, elementwise_affine=False)
        self.modulation = Linear(d, 2 * d)
        self.leave = Linear(d, outputs * patch * patch)
        self._initialise()

    def _initialise(self) -> None:
        """Peebles & Xie's: Xavier's uniform widths, N(0, 0.02) of the time's; 0 where a block shall
        start as the identity, and in the last layer. Labels are N(0, 1), theirs N(0, 0.02), of
        which a network of this width sees little at first: the validation loss after 250 steps on
        the latents of 4,000 digits was 0.739, not 0.767; after 900 it was the same."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for m in (self.time[0], self.time[2]):
            nn.init.normal_(m.weight, std=0.02)
        for block in self.blocks:
            zeroed(block.modulation)
            if block.cross is not None:
                zeroed(block.cross.out)
        zeroed(self.modulation)
        zeroed(self.leave)

    def patches(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, S, C P P)."""
        if x.dim() != 4 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x: expected (B, *{self.shape}), got {tuple(x.shape)}")
        P = self.patch
        x = x.unflatten(3, (-1, P)).unflatten(2, (-1, P))  # (B, C, rows, P, columns, P)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def image(self, patches: Tensor) -> Tensor:
        """The inverse, of any number of channels."""
        P = self.patch
        x = patches.unflatten(2, (-1, P, P)).unflatten(1, self.grid)  # (B, rows, columns, C, P, P)
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def forward(
        self, x: Tensor, t: Tensor, given: Conditions = NOTHING, drop: Tensor | None = None
    ) -> Tensor:
        """drop: (B,) bool, the samples that get no condition."""
        self._check(given)
        c, given = self._condition(t, given, drop, x.dtype)
        h = Residual(self.enter(self.patches(x)) + self.places.to(x.dtype))
        for block in self.blocks:
            h = block(h, c, given)
        shift, scale = self.modulation(c).chunk(2, 1)
        return self.image(self.leave(blocks.added(self.norm, h, scale, shift)[1]))

    def _check(self, given: Conditions) -> None:
        for name, width in (("y", self.classes), ("z", self.z), ("tokens", self.tokens)):
            value = getattr(given, name)
            if (value is None) == bool(width):
                want = f"a tensor (the model has {width})" if width else "None"
                got = "None" if value is None else f"shape {tuple(value.shape)}"
                raise ValueError(f"{name}: expected {want}, got {got}")

    def _condition(self, t, given, drop, dtype):
        """SiLU(c), and the conditions with what is dropped replaced."""
        c = self.time(timestep_embedding(t, 256).to(dtype))
        y, z, tokens, seen = given
        if y is not None:
            c = c + self.label(y if drop is None else torch.where(drop, self.classes, y))
        if z is not None:
            e = self.of_z(z)
            c = c + (e if drop is None else torch.where(drop[:, None], self.no_z, e))
        if tokens is not None and drop is not None:
            tokens = torch.where(drop[:, None, None], self.no_token, tokens)
        return F.silu(c), Conditions(y, z, tokens, seen)


def learned_range(alpha_bar: Tensor) -> dict[str, Tensor]:
    """Of each t (T,), float64: of_x0, the factor of x0 in the posterior's mean (Ho et al. 2020, eq.
    7); low and high, ln of the posterior's variance and of beta, the ends of the learned variance.
    The posterior's variance at t = 0 is 0; as in Nichol & Dhariwal's code, t = 1's stands for it.
    """
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    tilde = beta * (1 - before) / (1 - alpha_bar)
    tilde[0] = tilde[1]
    of_x0 = before.sqrt() * beta / (1 - alpha_bar)
    return {"of_x0": of_x0, "low": tilde.log(), "high": beta.log()}


def variational_bound(error: Tensor, v: Tensor, of_x0: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """KL(q(x_(t-1) | x_t, x0) || N(mean, e^logvar)), bits a dimension, (B,): Nichol & Dhariwal
    2021, eq. 4 to 6 and 15, in letters of `learned_range`.

    error (B, ...): predicted x0 minus x0, without gradient: L_vlb shall train the variance alone.
    v like error. The term of t = 0 is the KL too, not the likelihood of 8-bit values: latents have
    none.
    """
    wide = (-1, *[1] * (error.dim() - 1))
    of_x0, low, high = (a.view(wide) for a in (of_x0, low, high))
    share = (v + 1) / 2
    logvar = share * high + (1 - share) * low
    squared = (of_x0 * error.detach()).square()
    kl = 0.5 * (logvar - low - 1 + torch.exp(low - logvar) + squared * torch.exp(-logvar))
    return kl.flatten(1).mean(1) / math.log(2)
