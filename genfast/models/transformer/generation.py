"""Sampling of token sequences from a decoder with a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genfast.models import _inputs
from genfast.models._seeds import sample_seeds
from genfast.ops import _check
from genfast.ops.sampling import sample_tokens


def _prompts(prompts, model, tokens: int) -> list[Tensor]:
    _check.integer("tokens", tokens, low=0)
    if not isinstance(prompts, Tensor | list | tuple) or getattr(prompts, "ndim", 2) != 2:
        raise TypeError(
            f"prompts: expected (B, S) or a list of (S_b,) int64, got {_check.describe(prompts)}"
        )
    found = list(prompts)
    for b, p in enumerate(found):
        name = f"prompts[{b}]"
        if not isinstance(p, Tensor) or p.dim() != 1 or not len(p):
            got = f"shape {tuple(p.shape)}" if isinstance(p, Tensor) else type(p).__name__
            raise ValueError(
                f"{name}: expected (S,) token ids with S >= 1, got {got}; "
                "start an empty prompt with the tokenizer's first token"
            )
        _inputs.ids(name, p[None], model.vocab)
        if len(p) > model.context:
            raise ValueError(
                f"{name}: expected at most {model.context} tokens (the model's context), got "
                f"{len(p)}; cut the prompt"
            )
        if len(p) + tokens > model.context:
            raise ValueError(
                f"tokens: expected at most {model.context - len(p)} behind the {len(p)} of {name} "
                f"(the model's context is {model.context}), got {tokens}"
            )
    return found


def _seeds(seed, n: int, start: int, device) -> Tensor:
    if isinstance(seed, Tensor):
        if seed.shape != (n,) or seed.dtype != torch.int64:
            raise ValueError(
                f"seed: expected an int, or int64 of shape ({n},), one per prompt, got "
                f"{seed.dtype} {tuple(seed.shape)}"
            )
        return seed
    return sample_seeds(n, seed, start=start, device=device)


@torch.no_grad()
def generate(
    model,
    prompts: Tensor | Sequence[Tensor],
    tokens: int,
    *,
    seed: int | Tensor = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    eos: int | None = None,
    start: int = 0,
    tile: int | None = None,
) -> list[Tensor]:
    """Continues each prompt by up to `tokens` tokens; returns the new tokens of each, (T_b,) int64.

    prompts: (B, S) or a list of (S_b,) int64, of any lengths. temperature 0 is greedy; temperature,
    top_k, top_p, min_p as in `genfast.sample_tokens`. eos: ends a sequence (and is its last token).
    seed: an int (sequence b draws as sample start + b of it) or one int64 seed per prompt: the
    noise of a sequence depends on nothing else. Its logits could still round otherwise in another
    batch (a matrix product may take another path for another number of rows, and a draw in a
    million flips): `tile` runs the steps in blocks of so many rows, filled up, and makes them
    bitwise the same in any batch. tile=1: best for one sequence; 8 rows cost as much as 3, and None
    (the whole batch as it is) is fastest. Raises TypeError / ValueError naming the argument.
    """
    found = _prompts(prompts, model, tokens)
    _check.integer("start", start, low=0)
    if tile is not None:
        _check.integer("tile", tile, low=1)
    if eos is not None:
        _check.integer("eos", eos)
    if not found:
        return []
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    seeds = _seeds(seed, len(found), start, found[0].device)
    size = tile or len(found)
    return [
        row
        for at in range(0, len(found), size)
        for row in _block(model, found[at : at + size], seeds[at : at + size], size, tokens, eos,
                          filters)
    ]  # fmt: skip


def _block(model, prompts, seeds, rows: int, tokens: int, eos, filters) -> list[Tensor]:
    """One block of `rows` rows; rows without a prompt only fill the matrix products."""
    n = len(prompts)
    if not tokens:
        return [p[:0] for p in prompts]
    longest = max(len(p) for p in prompts)
    cache = model.cache(rows, longest + tokens - 1)  # the last token is not fed
    # Each prompt by itself: no padding, and its bits depend on nothing else.
    logits = torch.cat([model.step(p[None], cache.row(b)) for b, p in enumerate(prompts)])
    found = logits.new_empty(tokens, rows, dtype=torch.int64).fill_(0)
    done = torch.zeros(n, dtype=torch.bool, device=logits.device)
    for t in range(tokens):
        found[t, :n] = sample_tokens(logits[:n], **filters, seed=seeds, stream=t)
        if eos is not None:
            done |= found[t, :n] == eos
            if bool(done.all()):
                break
        if t + 1 < tokens:
            logits = model.step(found[t][:, None], cache)
    found = found[: t + 1, :n].T
    if eos is None:
        return list(found)
    return [row[: _ends(row, eos)] for row in found]


def _ends(row: Tensor, eos: int) -> int:
    at = (row == eos).nonzero()
    return int(at[0]) + 1 if len(at) else len(row)
