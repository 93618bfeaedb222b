"""bert: `genfast.models.BERT` on the bytes of a text, by predicting hidden ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genfast.models._seeds import sample_seeds
from genfast.models.transformer import BERT
from genfast.models.transformer.encoder import mask_tokens
from genfast.train import text
from genfast.train.recipe import Batch, Option, Split
from genfast.train.recipes.text import TextRecipe


class BERTRecipe(TextRecipe):
    model = BERT
    settings = {"epochs": 10, "batch_size": 32, "lr": 1e-3, "clip": 1.0, "weight_decay": 0.01}
    options = TextRecipe.options | {"context": Option(128, "tokens of a window")}
    sample_options = {"prompt": Option("", "text whose underscores are filled in")}

    def build(self, about: dict, options: dict) -> BERT:
        return BERT(about["vocab"], **options)

    def loss(self, model: BERT, batch: Batch, seeds: Tensor) -> Tensor:
        return model.loss(batch[0][:, :-1], text.MASK, seeds)

    def terms(self, batch: Batch, seeds: Tensor) -> int:
        return int(mask_tokens(batch[0][:, :-1], text.MASK, seeds, text.BYTES)[1].sum())

    @torch.no_grad()
    def sample(self, model: BERT, about, count, seed, start, options) -> list[str]:
        """The prompt with the likeliest byte for every underscore: the same for every sample."""
        hidden = text.encode("_")[0]
        ids = torch.tensor([text.EOS, *text.encode(options["prompt"])])
        holes = ids == hidden
        logits = model.logits(model(ids.masked_fill(holes, text.MASK)[None]))[0]
        ids[holes] = text.BYTES + logits[holes][:, text.BYTES :].argmax(-1)
        return [text.decode(ids.tolist())] * count

    def unread(self, model: BERT) -> Sequence[str]:
        return tuple(self.sample_options)

    @torch.no_grad()
    def evaluate(self, model: BERT, data: Split, seed, count, options) -> dict[str, float]:
        """Accuracy and bits of the bytes that are predicted, 15 % of the test part."""
        right, nats, n = 0, 0.0, 0
        seeds = sample_seeds(len(data.test), seed)
        for index in torch.arange(len(data.test)).split(64):
            ids = data.test[index][0][:, :-1]
            given, chosen = mask_tokens(ids, text.MASK, seeds[index], model.vocab)
            logits, true = model.logits(model(given)[chosen]), ids[chosen]
            right += int((logits.argmax(-1) == true).sum())
            nats += torch.nn.functional.cross_entropy(logits, true, reduction="sum").item()
            n += len(true)
        return {"accuracy": right / n, "bits_per_token": nats / n / math.log(2)}
