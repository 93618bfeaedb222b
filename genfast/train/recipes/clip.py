"""clip: `genfast.models.CLIP` on images and captions made of their labels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from genfast.models.hybrid import CLIP
from genfast.train import captions, images, text
from genfast.train.recipe import Batch, Option, Split
from genfast.train.recipes.images import ImageRecipe


class CLIPRecipe(ImageRecipe):
    model = CLIP
    data = tuple(captions.NAMES)
    settings = {"epochs": 14, "batch_size": 128, "lr": 2e-3, "clip": 1.0, "weight_decay": 0.05}
    options = {
        "width": Option(32, "channels of the image encoder's first convolution"),
        "d": Option(64, "width of the text encoder"),
        "layers": Option(2, "blocks of the text encoder"),
        "heads": Option(4, "attention heads"),
        "e": Option(32, "width of the embeddings"),
        "shift": Option(2, "pixels that a training image is moved by, at most"),
        "noise": Option(0.3, "deviation of the noise on a training image, at most"),
    }

    def load(self, name: str, options: dict) -> Split:
        captions.table(name)  # refuses data without names before it is read
        return captions.captioned(super().load(name, options), name)

    def build(self, about: dict, options: dict) -> CLIP:
        return CLIP(
            about["shape"], vocab=text.VOCAB, eos=text.EOS, context=captions.LONGEST, **options
        )

    def loss(self, model: CLIP, batch: Batch, seeds: Tensor) -> Tensor:
        x, _, given = batch
        return model.loss(x, captions.draw(given, seeds), seed=seeds)

    def sample(self, model: CLIP, about, count, seed, start, options):
        raise ValueError(
            "--from: clip judges images and draws none; see `genfast evaluate`, and --clip of "
            "diffusion"
        )

    @torch.no_grad()
    def evaluate(self, model: CLIP, data: Split, seed, count, options) -> dict[str, float]:
        """Images and templates that training saw none of."""
        x, y, _ = data.test[torch.arange(len(data.test))]
        found = {}
        for name, templates in (
            ("held-back templates", captions.HELD_BACK), ("training templates", captions.TEMPLATES),
        ):  # fmt: skip
            prompts = captions.table(data.about["captions"], templates)
            right = (model.classify(x, prompts) == y).float().mean().item()
            found[f"zero-shot accuracy, {name}"] = right
        best = self._best(model, data, 10)
        found["precision at 10"] = (y[best] == torch.arange(len(best))[:, None]).float().mean()
        return {name: float(value) for name, value in found.items()}

    def _best(self, model: CLIP, data: Split, count: int) -> Tensor:
        """The test images that fit each class's first held-back caption best, (classes, count)."""
        x, _, _ = data.test[torch.arange(len(data.test))]
        prompts = captions.table(data.about["captions"], captions.HELD_BACK[:1])[:, -1]
        return model(x, prompts).topk(count, dim=0).indices.T

    @torch.no_grad()
    def finish(self, model: CLIP, data: Split, seed: int, out: Path) -> list[str]:
        """A row per class: the test images found by its caption."""
        best = self._best(model, data, 10)
        x = data.test[best.flatten()][0]
        images.save_png(out / "retrieval.png", images.grid(x, columns=10))
        return ["retrieval.png"]
