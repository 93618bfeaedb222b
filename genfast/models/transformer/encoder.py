"""BERT: a bidirectional encoder with a masked-language-model head.

Devlin et al., "BERT: pre-training of deep bidirectional transformers", 2019 (post-norm blocks,
GELU, learned positions; 15 % of the tokens are predicted: 80 % of them hidden, 10 % replaced, 10 %
kept). Letters as in `blocks`.
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
from genfast.ops.linear import linear
from genfast.ops.rng import rand, randint

# Streams of a sample's seed in `mask_tokens`.
CHOICE, REPLACEMENT = 0, 1
SHARE, HIDDEN, REPLACED = 0.15, 0.8, 0.1


class BERT(nn.Module):
    """vocab V, d, layers L, heads H, hidden: inner width (default 4 d), context: longest sequence,
    types: segment types. activation: a row of `blocks.ACTIVATIONS`; eps: added to the norms'
    variance. mlm: with the head behind `logits`; pooler: with the one behind `pool`.
    """

    def __init__(
        self,
        vocab: int,
        d: int = 256,
        layers: int = 4,
        heads: int = 8,
        hidden: int | None = None,
        context: int = 512,
        types: int = 2,
        activation: str = "gelu",
        eps: float = 1e-12,
        mlm: bool = True,
        pooler: bool = False,
    ):
        super().__init__()
        self.config = blocks.arguments(locals())
        _check.counts(vocab=vocab, d=d, layers=layers, heads=heads, context=context, types=types)
        self.vocab, self.context, self.types = vocab, context, types
        self.embed = nn.Embedding(vocab, d)
        self.positions = nn.Embedding(context, d)
        self.segments = nn.Embedding(types, d)
        self.norm = LayerNorm(d, eps)

        def block():
            return Block(
                Attention(d, heads),
                FeedForward(d, hidden or 4 * d, activation),
                LayerNorm(d, eps),
                LayerNorm(d, eps),
                pre_norm=False,
            )

        self.blocks = nn.ModuleList(block() for _ in range(layers))
        of_head = blocks.row("activation", activation, blocks.ACTIVATIONS)
        if mlm and of_head.gated:
            raise ValueError(
                f"activation: expected one without a gate for the head, got {activation!r}; take "
                "mlm=False"
            )
        self.f = of_head.f
        self.head = Linear(d, d) if mlm else None
        self.head_norm = LayerNorm(d, eps) if mlm else None
        self.head_bias = nn.Parameter(torch.zeros(vocab)) if mlm else None
        self.pooler = Linear(d, d) if pooler else None
        blocks.initialise(self, layers)

    def forward(
        self, ids: Tensor, seen: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Hidden states (B, S, d) of ids (B, S) int64. seen: (B, S) bool, false = padding.
        segments: (B, S) int64, default 0.
        """
        _inputs.ids("ids", ids, self.vocab, self.context)
        for name, given, dtype in (("seen", seen, torch.bool), ("segments", segments, torch.int64)):
            if given is not None and (given.shape != ids.shape or given.dtype != dtype):
                raise ValueError(
                    f"{name}: expected {dtype} of ids' shape {tuple(ids.shape)}, got {given.dtype} "
                    f"{tuple(given.shape)}"
                )
        if segments is not None:
            _inputs.ids("segments", segments, self.types)
        S = ids.shape[1]
        kind = self.segments.weight[0] if segments is None else self.segments(segments)
        x = self.norm(self.embed(ids) + kind + self.positions.weight[:S])
        mask = None if seen is None else seen[:, None, None]
        for block in self.blocks:
            x = block(x, mask=mask)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the tokens themselves, (..., V), out of hidden states (..., d)."""
        if self.head is None:
            raise ValueError("logits: this model has no head; build BERT(mlm=True)")
        h = self.head_norm(self.f(self.head(hidden)))
        return linear(h, self.embed.weight, self.head_bias)

    def pool(self, hidden: Tensor) -> Tensor:
        """tanh(W h_0) of the first token, (B, d)."""
        if self.pooler is None:
            raise ValueError("pool: this model has no pooler; build BERT(pooler=True)")
        return torch.tanh(self.pooler(hidden[:, 0]))

    def sentence(self, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        """Mean of the hidden states, normalised to length 1, (B, d): Reimers & Gurevych,
        "Sentence-BERT", 2019; what MiniLM's sentence models are trained for."""
        h = self(ids, seen)
        if seen is None:
            return F.normalize(h.mean(1), dim=-1)
        weight = seen[..., None].to(h.dtype)
        return F.normalize((h * weight).sum(1) / weight.sum(1).clamp_min(1e-9), dim=-1)

    def loss(self, ids: Tensor, mask_id: int, seeds: Tensor, ordinary: int | None = None) -> Tensor:
        """Mean cross-entropy of the chosen tokens, (), nats; see `mask_tokens`. mask_id: the token
        that hides; ordinary: default V."""
        _check.integer("mask_id", mask_id, low=0, high=self.vocab - 1)
        _inputs.some("ids", ids)
        if ordinary is not None:
            _check.integer("ordinary", ordinary, low=1, high=self.vocab)
        given, chosen = mask_tokens(
            ids, mask_id, seeds, self.vocab if ordinary is None else ordinary
        )
        return F.cross_entropy(self.logits(self(given)[chosen]).float(), ids[chosen])


def mask_tokens(ids: Tensor, mask_id: int, seeds: Tensor, ordinary: int) -> tuple[Tensor, Tensor]:
    """(what the encoder sees (B, S), which tokens are predicted (B, S) bool).

    ids (B, S) int64; seeds (B,) int64: row b is a function of seeds[b] alone. Replacements are ids
    below `ordinary`; the row's lowest draw is always chosen, so that every row has a loss.
    """
    u = rand(tuple(ids.shape), seed=seeds, stream=CHOICE, device=ids.device)
    chosen = (u < SHARE) | (u == u.amin(1, keepdim=True))
    other = randint(
        0, ordinary, tuple(ids.shape), seed=seeds, stream=REPLACEMENT, device=ids.device
    )
    given = ids.masked_fill(u < SHARE * HIDDEN, mask_id)
    given = torch.where((u >= SHARE * HIDDEN) & (u < SHARE * (HIDDEN + REPLACED)), other, given)
    return given, chosen
