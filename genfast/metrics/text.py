"""Metrics of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from genfast._extras import need


def perplexity(nll: float, tokens: int) -> float:
    """e^(nll / tokens). nll: the sum of -ln p(token) over `tokens` tokens."""
    if tokens < 1:
        raise ValueError(f"tokens: expected an int >= 1, got {tokens}")
    return math.exp(nll / tokens)


def bits_per_byte(nll: float, text: str) -> float:
    """-log2 p(text) over its UTF-8 length: comparable between vocabularies."""
    return nll / math.log(2) / max(len(text.encode()), 1)


def bleu(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Corpus BLEU of one reference a sentence, 0 to 100, by sacrebleu (Post 2018)."""
    need("sacrebleu")
    import sacrebleu

    if len(found) != len(wanted) or not found:
        raise ValueError(
            f"found, wanted: expected as many sentences in both, got {len(found)} and {len(wanted)}"
        )
    return sacrebleu.corpus_bleu(list(found), [list(wanted)]).score
