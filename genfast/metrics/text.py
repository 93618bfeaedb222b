"""Metrics of text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from numbers import Real

from genfast._extras import need
from genfast.ops import _check


def _nats(nll: float) -> None:
    """NaN and inf too: of a model that has diverged."""
    if isinstance(nll, bool) or not isinstance(nll, Real):
        raise TypeError(f"nll: expected a number, got {_check.describe(nll)}")


def perplexity(nll: float, tokens: int) -> float:
    """e^(nll / tokens), inf beyond a float's range. nll: the sum of -ln p(token) over `tokens`
    tokens."""
    _nats(nll)
    _check.counts(tokens=tokens)
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def bits_per_byte(nll: float, text: str) -> float:
    """-log2 p(text) over its UTF-8 length: comparable between vocabularies."""
    _nats(nll)
    if not isinstance(text, str) or not text:
        raise ValueError(f"text: expected a str of at least one character, got {text!r}")
    return nll / math.log(2) / len(text.encode())


TOKENS = 257  # bytes and an end


def pair_bits(training: Sequence[Sequence[int]], test: Sequence[Sequence[int]]) -> float:
    """Bits a token of `test` under the frequencies of pairs of neighbours in `training`: what a
    model must beat that has learned more than spelling. Witten & Bell 1991: a pair's frequency and
    its second token's are weighed by how many tokens follow the first, those by how many there are.
    The first token of a sequence follows -1. Both of at least one token (ValueError).
    """
    for name, rows in (("training", training), ("test", test)):
        if not isinstance(rows, Sequence) or not all(isinstance(row, Sequence) for row in rows):
            raise TypeError(f"{name}: expected a sequence of sequences of tokens, got {rows!r:.80}")
        if not any(map(len, rows)):
            raise ValueError(f"{name}: expected at least one token, got none")
    pairs = Counter(p for row in training for p in pairwise([-1, *row]))
    first, second, kinds = Counter(), Counter(), Counter(a for a, _ in pairs)
    for (a, b), n in pairs.items():
        first[a] += n
        second[b] += n
    total, tokens = second.total(), len(second)

    def p(a: int, b: int) -> float:
        alone = (second[b] + tokens / TOKENS) / (total + tokens)
        return (pairs[a, b] + kinds[a] * alone) / (first[a] + kinds[a]) if a in first else alone

    found = [-math.log2(p(a, b)) for row in test for a, b in pairwise([-1, *row])]
    return sum(found) / len(found)


def bleu(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Corpus BLEU of one reference a sentence, 0 to 100, by sacrebleu (Post 2018)."""
    need("sacrebleu")
    import sacrebleu

    if len(found) != len(wanted) or not found:
        raise ValueError(
            "found, wanted: expected as many sentences in both, at least one, got "
            f"{len(found)} and {len(wanted)}"
        )
    return sacrebleu.corpus_bleu(list(found), [list(wanted)]).score
