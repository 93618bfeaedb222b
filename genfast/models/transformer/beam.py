"""Beam search; with one beam, greedy decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genfast.ops import _check

Step = Callable[[Tensor, int, Tensor | None], Tensor]


def beam_search(
    step: Step,
    first: Tensor,
    sources: int,
    beams: int,
    tokens: int,
    eos: int,
    length_penalty: float,
) -> list[Tensor]:
    """The sequence y (T <= tokens) of each source that maximises ln p(y) / T^length_penalty among
    those that the search meets; eos is part of y. Wu et al., "GNMT", 2016, section 7.

    step(last (sources * beams,), t, parents): logits (sources * beams, V) behind the t-th token of
    each beam; parents: which row each beam continues, None at the start. A source is done when
    `beams` sequences have ended and none that runs can still beat the worst of them at its length.
    """
    _check.number("length_penalty", length_penalty)
    device = first.device
    rows = torch.arange(sources, device=device)[:, None] * beams
    total = torch.full((sources, beams), -torch.inf, device=device)
    total[:, 0] = 0.0  # the others are copies of it
    written = torch.zeros(sources, beams, 0, dtype=torch.int64, device=device)
    ended: list[list[tuple[float, Tensor]]] = [[] for _ in range(sources)]
    done = [False] * sources
    last, parents = first, None
    for t in range(tokens):
        logp = torch.log_softmax(step(last, t, parents).float(), -1)
        V = logp.shape[-1]
        scores = (total[..., None] + logp.view(sources, beams, V)).flatten(1)
        # 2 K candidates hold K that go on, however many of them end here.
        total, index = scores.topk(min(2 * beams, scores.shape[1]))
        parent, token = index // V, index % V
        norm = (t + 1) ** length_penalty
        for b, (s, p, y) in enumerate(zip(total.tolist(), parent.tolist(), token.tolist(),
                                          strict=True)):  # fmt: skip
            if done[b]:
                continue
            last_step = t + 1 == tokens
            for k in range(beams):
                if (y[k] == eos or last_step) and s[k] > -torch.inf:
                    tail = written.new_tensor([y[k]])
                    ended[b].append((s[k] / norm, torch.cat([written[b, p[k]], tail])))
            ended[b] = sorted(ended[b], key=lambda e: -e[0])[:beams]
            done[b] = len(ended[b]) == beams and ended[b][-1][0] >= s[0] / norm
        if all(done):
            break
        # Those that end sort behind all that go on, in the order of their scores.
        goes_on = (token == eos).to(torch.int8).argsort(dim=1, stable=True)[:, :beams]
        total, parent, token = (x.gather(1, goes_on) for x in (total, parent, token))
        total = total.masked_fill(token == eos, -torch.inf)
        written = torch.cat([written[rows // beams, parent], token[..., None]], -1)
        last, parents = token.flatten(), (rows + parent).flatten()
    return [e[0][1] for e in ended]
