"""GPT: a causal decoder, from GPT-2's parts (learned positions, LayerNorm, GELU) to those of LLaMA
(rotary positions, RMSNorm, SwiGLU, grouped keys and values).

    p(x_1 ... x_S) = prod_s softmax(W_v norm(h_s))[x_s+1],  h = blocks(embed(x))

Radford et al., "Language models are unsupervised multitask learners", 2019 (pre-norm, init);
Touvron et al., "LLaMA", 2023. Letters as in `blocks`. No dropout: early stopping regularises here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast.models import _inputs
from genfast.models.transformer import blocks
from genfast.models.transformer.blocks import Attention, Block, FeedForward, Rotary
from genfast.models.transformer.cache import KVCache
from genfast.models.transformer.generation import generate
from genfast.nn.linear import Linear
from genfast.ops import _check
from genfast.ops.linear import linear

POSITIONS = ("rotary", "learned")


class GPT(nn.Module):
    """vocab V, d, layers L, heads H, kv_heads (default H), hidden: inner width (default 4 d, gated
    8 d / 3), context: longest sequence. positions: rotary or learned. norm, activation: rows of
    `blocks.NORMS`, `blocks.ACTIVATIONS`; eps: added to the norms' variance. bias: of linear layers
    and norms. rotary_base: of the rotary positions. tied: W_v is the embedding (Press & Wolf 2017).
    """

    def __init__(
        self,
        vocab: int,
        d: int = 256,
        layers: int = 6,
        heads: int = 8,
        kv_heads: int | None = None,
        hidden: int | None = None,
        context: int = 1024,
        positions: str = "rotary",
        norm: str = "rms",
        activation: str = "swiglu",
        bias: bool = False,
        tied: bool = True,
        eps: float = 1e-5,
        rotary_base: float = 10000.0,
    ):
        super().__init__()
        self.config = blocks.arguments(locals())
        _check.counts(vocab=vocab, d=d, layers=layers, heads=heads, context=context)
        if positions not in POSITIONS:
            raise ValueError(
                f"positions: expected one of {', '.join(POSITIONS)}, got {positions!r}"
            )
        gated = blocks.row("activation", activation, blocks.ACTIVATIONS).gated
        hidden = hidden or (8 * d // 3 + 7) // 8 * 8 if gated else hidden or 4 * d
        self.vocab, self.context = vocab, context
        self.embed = nn.Embedding(vocab, d)
        self.positions = nn.Embedding(context, d) if positions == "learned" else None

        def block():
            return Block(
                Attention(d, heads, kv_heads, bias=bias),
                FeedForward(d, hidden, activation, bias),
                blocks.norm(norm, d, eps, bias),
                blocks.norm(norm, d, eps, bias),
            )

        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm = blocks.norm(norm, d, eps, bias)
        self.head = None if tied else Linear(d, vocab, bias=False)
        D = self.blocks[0].attention.head_dim
        self.rotary = Rotary(context, D, rotary_base) if positions == "rotary" else None
        blocks.initialise(self, layers)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, S) int64 -> logits of the next token at every place, (B, S, V)."""
        _inputs.ids("ids", ids, self.vocab, self.context)
        x, S, turn = self.embed(ids), ids.shape[1], None
        if self.positions is not None:
            x = x + self.positions.weight[:S]
        else:
            turn = self.rotary.tables(x.device)[2][:S]
        for block in self.blocks:
            x = block(x, causal=True, turn=turn)
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return linear(h, self.embed.weight) if self.head is None else self.head(h)

    def nll(self, ids: Tensor) -> Tensor:
        """-ln p(ids[b, s] | ids[b, :s]) for s >= 1, (B, S - 1), nats. ids (B, S) int64."""
        _inputs.ids("ids", ids, self.vocab, self.context + 1, least=2)
        logits = self(ids[:, :-1]).flatten(0, 1)
        nll = F.cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="none")
        return nll.view(len(ids), ids.shape[1] - 1)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean nll of a token, (), nats. ids (B, S) int64 with 2 <= S <= context + 1."""
        _inputs.ids("ids", ids, self.vocab, self.context + 1, least=2)
        _inputs.some("ids", ids)
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())

    # ---- generation -----------------------------------------------------------------------------

    def cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens, at most the context."""
        _check.counts(batch=batch)
        _check.integer("capacity", capacity, low=1, high=self.context)
        a = self.blocks[0].attention
        rotary = (
            (None, None) if self.rotary is None else self.rotary.tables(a.out.weight.device)[:2]
        )
        return KVCache.empty(
            len(self.blocks), batch, a.groups[1], capacity, a.head_dim, a.out.weight, rotary
        )

    @torch.no_grad()
    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Appends ids (B, S) int64 to a cache of B rows with room for them (ValueError); the logits
        behind the last of them, (B, V)."""
        _inputs.ids("ids", ids, self.vocab, self.context, least=1)
        if len(ids) != len(cache.lengths):
            raise ValueError(
                f"ids: expected a row for each of the cache's {len(cache.lengths)}, got {len(ids)}"
            )
        x = self.embed(ids)
        if self.positions is not None:
            at = cache.lengths[:, None] + torch.arange(ids.shape[1], device=ids.device)
            x = x + self.positions(at)
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x = block(x, cache=layer)
        cache.lengths += ids.shape[1]
        return self.logits(x[:, -1])

    def generate(self, prompts, tokens: int, **settings) -> list[Tensor]:
        """`generation.generate` of this model."""
        return generate(self, prompts, tokens, **settings)
