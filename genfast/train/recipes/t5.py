"""t5: `genfast.models.T5` from text to text."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.metrics.text import bleu
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

    def _answer(self, model: T5, ids: Tensor, options: dict) -> list[str]:
        options = {k: v for k, v in options.items() if k != "prompt"}
        return [text.decode(y.tolist()) for y in model.generate(ids, **options)]

    def sample(self, model: T5, about, count, seed, start, options) -> list[str]:
        """The best answer that the search finds: the same for every sample."""
        ids = torch.tensor([text.encode(options["prompt"]) + [text.EOS]])
        return self._answer(model, ids, options) * count

    def evaluate(self, model: T5, data: Split, seed, count, options) -> dict[str, float]:
        """BLEU (Papineni et al. 2002, by sacrebleu) and exact answers on `count` test pairs."""
        n = min(count, len(data.test))
        answers = []
        for index in torch.arange(n).split(32):
            answers += self._answer(model, data.test[index][0], options)
        truths = [target for _, target in data.test.texts[:n]]
        exact = sum(a == b for a, b in zip(answers, truths, strict=True)) / n
        return {"bleu": bleu(answers, truths), "exact": exact, "pairs": n}
