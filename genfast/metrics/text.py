"""Metrics of text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from genfast._extras import need


def perplexity(nll: float, tokens: int) -> float:
    """e^(nll / tokens). nll: the sum of -ln p(token) over `tokens` tokens."""
    if tokens < 1:
        raise ValueError(f"tokens: expected an int >= 1, got {tokens}")
    return math.exp(nll / tokens)


def bits_per_byte(nll: float, text: str) -> float:
    """-log2 p(text) over its UTF-8 length: comparable between vocabularies."""
    if not text:
        raise ValueError("text: expected at least one byte, got none")
    return nll / math.log(2) / len(text.encode())


TOKENS = 257  # bytes and an end


def pair_bits(training: Sequence[Sequence[int]], test: Sequence[Sequence[int]]) -> float:
    """Bits a token of `test` under the frequencies of pairs of neighbours in `training`: what a
    model must beat that has learned more than spelling. Witten & Bell 1991: a pair's frequency and
    its second token's are weighed by how many tokens follow the first, those by how many there are.
    The first token of a sequence follows -1.
    """
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
    if not found:
        raise ValueError("test: expected at least one token, got none")
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
