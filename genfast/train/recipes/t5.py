"""t5: `genfast.models.T5` from text to text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genfast.metrics.text import bleu, pair_bits
from genfast.models.transformer import T5
from genfast.train import text
from genfast.train.recipe import Batch, Option, Split
from genfast.train.recipes.text import SIZES, TextRecipe

SOURCE, TARGET = 128, 64  # bytes, the end included


class T5Recipe(TextRecipe):
    model = T5
    data = (*text.PAIRS, "FILE")
    settings = {"epochs": 20, "batch_size": 32, "lr": 2e-3, "clip": 1.0, "patience": 3}
    options = SIZES | {
        "layers": Option(3, "blocks of the encoder, and of the decoder"),
        "activation": Option("geglu", "geglu, swiglu, gelu, gelu_tanh or relu"),
    }
    sample_options = {
        "prompt": Option("", "the source text"),
        "tokens": Option(TARGET, "bytes to write, at most"),
        "beams": Option(4, "of the search; 1: greedy"),
        "length_penalty": Option(1.0, "power of the length that divides ln p"),
    }

    def load(self, name: str, options: dict) -> Split:
        return text.pairs(name, (SOURCE, TARGET))

    def build(self, about: dict, options: dict) -> T5:
        return T5(about["vocab"], pad=text.PAD, eos=text.EOS, **options)

    def loss(self, model: T5, batch: Batch, seeds: Tensor) -> Tensor:
        return model.loss(*batch)

    def terms(self, batch: Batch, seeds: Tensor) -> int:
        return int((batch[1] != text.PAD).sum())

    def _answer(self, model: T5, ids: Tensor, options: dict) -> list[str]:
        options = {k: v for k, v in options.items() if k != "prompt"}
        return [text.decode(y.tolist()) for y in model.generate(ids, **options)]

    def sample(self, model: T5, about, count, seed, start, options) -> list[str]:
        """The best answer that the search finds: the same for every sample."""
        ids = torch.tensor([text.encode(options["prompt"]) + [text.EOS]])
        return self._answer(model, ids, options) * count

    def unread(self, model: T5) -> Sequence[str]:
        return ("prompt",)

    def evaluate(self, model: T5, data: Split, seed, count, options) -> dict[str, float]:
        """On `count` test pairs: bits a byte of the answers (their end is one) beside those of
        `pair_bits`, which sees no source; BLEU (Papineni et al. 2002, by sacrebleu) beside that of
        the source's first bytes, as many as a training answer has on average; exact answers."""
        n = min(count, len(data.test))
        answers, nll, tokens = [], 0.0, 0
        for index in torch.arange(n).split(32):
            source, target = data.test[index]
            answers += self._answer(model, source, options)
            of_batch = int((target != text.PAD).sum())
            nll += self.loss(model, (source, target), index).item() * of_batch
            tokens += of_batch
        lead = round(sum(map(len, _rows(data.train.target))) / len(data.train)) - 1
        leads = [text.decode(row[:lead]) for row in data.test.source[:n].tolist()]
        truths = [target for _, target in data.test.texts[:n]]
        return {
            "bits_per_byte": nll / math.log(2) / tokens,
            "bits_per_byte of byte pairs": pair_bits(
                _rows(data.train.target), _rows(data.test.target[:n])
            ),
            "bleu": bleu(answers, truths),
            f"bleu of the first {lead} bytes": bleu(leads, truths),
            "exact": sum(a == b for a, b in zip(answers, truths, strict=True)) / n,
            "pairs": n,
        }


def _rows(ids: Tensor) -> list[list[int]]:
    """Without what fills them up."""
    return [[i for i in row if i != text.PAD] for row in ids.tolist()]
