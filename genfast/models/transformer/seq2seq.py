"""T5: an encoder-decoder whose positions are a learned bias of the attention scores.

    S = q k^T + b[h, bucket(j - i)]     (no 1 / sqrt(D): it is in the initialisation)

Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer",
2020, section 2.1. The bias is the additive mask of `genfast.attention`, which returns its gradient.
Letters as in `blocks`; S tokens of the source, T of the target.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast.models import _inputs
from genfast.models.transformer import blocks
from genfast.models.transformer.beam import beam_search
from genfast.models.transformer.blocks import Attention, Block, FeedForward
from genfast.models.transformer.cache import KVCache
from genfast.nn.linear import Linear
from genfast.nn.normalization import RMSNorm
from genfast.ops import _check
from genfast.ops.attention import attention
from genfast.ops.linear import linear


def bucket(distance: Tensor, buckets: int, longest: int, both_sides: bool) -> Tensor:
    """Bucket of j - i: half of them one distance each, half logarithmic up to `longest`; the last
    holds everything beyond. both_sides: an own set of buckets for j > i, else those share one.
    """
    side = torch.zeros_like(distance)
    if both_sides:
        buckets //= 2
        side, distance = (distance > 0) * buckets, distance.abs()
    else:
        distance = (-distance).clamp_min(0)
    exact = buckets // 2
    share = (distance.clamp_min(1).float() / exact).log() / math.log(longest / exact)
    far = (exact + share * (buckets - exact)).long().clamp_max(buckets - 1)
    return side + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """b (1, H, Sq, Sk) of queries first ... first + Sq - 1 and keys 0 ... Sk - 1."""

    def __init__(self, heads: int, buckets: int, longest: int, both_sides: bool):
        super().__init__()
        if longest <= buckets // 2:
            raise ValueError(
                f"longest: expected a distance above buckets / 2 = {buckets // 2}, got {longest}"
            )
        self.buckets, self.longest, self.both_sides = buckets, longest, both_sides
        self.table = nn.Embedding(buckets, heads)

    def forward(self, Sq: int, Sk: int, first: int = 0) -> Tensor:
        # One value per distance, then Sq windows of Sk of them: backward sums over windows, where
        # a look-up of Sq Sk rows would scatter.
        distance = torch.arange(1 - Sq - first, Sk - first, device=self.table.weight.device)
        line = self.table(bucket(distance, self.buckets, self.longest, self.both_sides))
        return line.T.unfold(1, Sk, 1).flip(1)[None]


class CrossAttention(nn.Module):
    """W_o concat_h softmax(q_h k_h^T + mask) v_h: q of x (B, T, d), k and v of the memory."""

    def __init__(self, d: int, heads: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q = Linear(d, heads * head_dim, bias=False)
        self.kv = Linear(d, 2 * heads * head_dim, bias=False)
        self.out = Linear(heads * head_dim, d, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, H, S, D): once for all tokens that are generated."""
        return self._heads(self.kv(memory)).chunk(2, 1)

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        out = attention(self._heads(self.q(x)), *kv, mask=mask, scale=1.0)
        return self.out(out.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """x + attention(norm1(x)), + cross(norm2(.), memory), + feed_forward(norm3(.))."""

    def __init__(
        self, attention: Attention, cross: CrossAttention, feed_forward: FeedForward, norm
    ):
        super().__init__()
        self.attention, self.cross, self.feed_forward = attention, cross, feed_forward
        self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()

    def forward(self, x: Tensor, kv, seen: Tensor | None, **options) -> Tensor:
        x = x + self.attention(self.norm1(x), **options)
        x = x + self.cross(self.norm2(x), kv, seen)
        return x + self.feed_forward(self.norm3(x))


def _seen(seen: Tensor, shape: torch.Size) -> None:
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool or seen.shape != shape:
        raise ValueError(
            f"seen: expected bool of shape {tuple(shape)}, a value a token of the source, got "
            f"{_check.describe(seen)}"
        )


class T5(nn.Module):
    """vocab V, d, layers L of the encoder, decoder_layers (default L), heads H, head_dim D (default
    d / H), hidden: inner width (default 4 d). buckets, longest: of the relative positions.
    activation: a row of `blocks.ACTIVATIONS`; tied: logits by the embedding; eps: added to the
    norms' variance. pad, eos: token ids; decoding starts from pad, which `loss` puts in front of a
    target.
    """

    def __init__(
        self,
        vocab: int,
        d: int = 256,
        layers: int = 3,
        decoder_layers: int | None = None,
        heads: int = 8,
        head_dim: int | None = None,
        hidden: int | None = None,
        buckets: int = 32,
        longest: int = 128,
        activation: str = "relu",
        tied: bool = True,
        eps: float = 1e-6,
        pad: int = 0,
        eos: int = 1,
    ):
        super().__init__()
        self.config = blocks.arguments(locals())
        decoder_layers = layers if decoder_layers is None else decoder_layers
        _check.counts(vocab=vocab, d=d, layers=layers, decoder_layers=decoder_layers, heads=heads)
        _check.integer("buckets", buckets, low=4)
        for name, token in (("pad", pad), ("eos", eos)):
            _check.integer(name, token, low=0, high=vocab - 1)
        D, hidden = head_dim or blocks.divides("heads", heads, "d", d), hidden or 4 * d
        self.vocab, self.d, self.pad, self.eos = vocab, d, pad, eos

        def norm():
            return RMSNorm(d, eps)

        def parts():
            return (
                Attention(d, heads, head_dim=D, bias=False, scale=1.0),
                FeedForward(d, hidden, activation, bias=False),
            )

        def decoder_block():
            attention, feed_forward = parts()
            return DecoderBlock(attention, CrossAttention(d, heads, D), feed_forward, norm)

        self.embed = nn.Embedding(vocab, d)
        self.encoder_bias = RelativeBias(heads, buckets, longest, both_sides=True)
        self.encoder = nn.ModuleList(Block(*parts(), norm(), norm()) for _ in range(layers))
        self.encoder_norm = norm()
        self.decoder_bias = RelativeBias(heads, buckets, longest, both_sides=False)
        self.decoder = nn.ModuleList(decoder_block() for _ in range(decoder_layers))
        self.decoder_norm = norm()
        self.head = None if tied else Linear(d, vocab, bias=False)
        _initialise(self, D)

    def encode(self, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        """Memory (B, S, d) of ids (B, S) int64. seen: (B, S) bool, default ids != pad."""
        _inputs.ids("ids", ids, self.vocab)
        if not ids.shape[1]:
            raise ValueError("ids: expected sources of at least one token, got an empty one")
        x, S = self.embed(ids), ids.shape[1]
        bias = self.encoder_bias(S, S).to(x.dtype)
        mask = bias.masked_fill(~self._seen(ids, seen)[:, None, None], -math.inf)
        for block in self.encoder:
            x = block(x, mask=mask)
        return self.encoder_norm(x)

    def _seen(self, ids: Tensor, seen: Tensor | None) -> Tensor:
        if seen is None:
            return ids != self.pad
        _seen(seen, ids.shape)
        return seen

    def decode(self, ids: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
        """Logits of the next token at every place (B, T, V), of ids (B, T) int64 that start with
        pad. seen (B, S) bool: which of the memory's tokens are real."""
        _inputs.ids("ids", ids, self.vocab)
        _check.tensor("memory", memory)
        if memory.dim() != 3 or memory.shape[::2] != (len(ids), self.d):
            raise ValueError(
                f"memory: expected `encode`'s ({len(ids)}, S, {self.d}), got {tuple(memory.shape)}"
            )
        _seen(seen, memory.shape[:2])
        x, T = self.embed(ids), ids.shape[1]
        mask, seen = self.decoder_bias(T, T).to(x.dtype), seen[:, None, None]
        for block in self.decoder:
            x = block(x, block.cross.memory(memory), seen, mask=mask, causal=True)
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        x = self.decoder_norm(x)
        if self.head is not None:
            return self.head(x)
        return linear(x * self.d**-0.5, self.embed.weight)

    def forward(self, ids: Tensor, target: Tensor, seen: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of target (B, T) int64 given ids (B, S) int64."""
        given = F.pad(target, (1, -1), value=self.pad)
        return self.decode(given, self.encode(ids, seen), self._seen(ids, seen))

    def loss(self, ids: Tensor, target: Tensor, seen: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of the target's tokens, pad left out, (), nats."""
        _inputs.ids("target", target, self.vocab, least=1)
        _inputs.some("target", target)
        if _inputs.readable(target) and not (target != self.pad).any():
            raise ValueError(f"target: expected tokens, got nothing but pad ({self.pad})")
        logits = self(ids, target, seen).flatten(0, 1).float()
        return F.cross_entropy(logits, target.flatten(), ignore_index=self.pad)

    # ---- generation -----------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        tokens: int,
        *,
        seen: Tensor | None = None,
        beams: int = 1,
        length_penalty: float = 1.0,
    ) -> list[Tensor]:
        """The target of each source (B, S): greedy, or the best of a beam search; (T_b,) int64 with
        T_b <= tokens, ending in eos when it came. See `beam.beam_search`.
        """
        _check.counts(tokens=tokens, beams=beams)
        memory, seen = self.encode(ids, seen), self._seen(ids, seen)
        n = len(ids)
        # Every beam of a source shares its memory: the rows of a source lie side by side.
        seen = seen.repeat_interleave(beams, 0)[:, None, None]
        kvs = [
            tuple(x.repeat_interleave(beams, 0) for x in block.cross.memory(memory))
            for block in self.decoder
        ]
        a = self.decoder[0].attention
        cache = KVCache.empty(len(self.decoder), n * beams, a.groups[1], tokens, a.head_dim, memory)
        # All rows have the same length, so one line of biases serves every step.
        bias = self.decoder_bias(1, tokens, tokens - 1).to(memory.dtype)

        def step(last: Tensor, t: int, parents: Tensor | None) -> Tensor:
            if parents is not None:
                cache.reorder(parents, t)
            x = self.embed(last[:, None])
            mask = bias[..., tokens - 1 - t :]
            for block, kv, layer in zip(self.decoder, kvs, cache.layers, strict=True):
                x = block(x, kv, seen, mask=mask, cache=layer)
            return self.logits(x[:, 0])

        first = torch.full((n * beams,), self.pad, dtype=torch.int64, device=ids.device)
        return beam_search(step, first, n, beams, tokens, self.eos, length_penalty)


def _initialise(model: T5, head_dim: int) -> None:
    """Variance 1 / fan-in, and 1 / (d D) for queries, which carry attention's scale; embedding 1.

    As in the paper's code (mesh-tensorflow); tied logits are scaled by d^-0.5 instead.
    """
    heads = model.encoder_bias.table.weight.shape[1]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            rows = {"qkv": heads * head_dim, "q": heads * head_dim}.get(name.rpartition(".")[2], 0)
            with torch.no_grad():
                module.weight[:rows] *= head_dim**-0.5
    nn.init.normal_(model.embed.weight, std=1.0)
    for bias in (model.encoder_bias, model.decoder_bias):
        nn.init.normal_(bias.table.weight, std=model.d**-0.5)
