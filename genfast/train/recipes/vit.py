"""vit: `genfast.models.ViT`, a classifier of images."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.models.transformer import ViT
from genfast.train.recipe import Batch, Option, Split
from genfast.train.recipes.images import ImageRecipe


class ViTRecipe(ImageRecipe):
    model = ViT
    settings = {"epochs": 15, "batch_size": 64, "lr": 1e-3, "clip": 1.0, "weight_decay": 0.05}
    options = {
        "patch": Option(4, "pixels along a patch's side"),
        "d": Option(96, "width of the model"),
        "layers": Option(4, "blocks"),
        "heads": Option(4, "attention heads"),
    }

    def build(self, about: dict, options: dict) -> ViT:
        channels, height, width = about["shape"]
        return ViT((height, width), channels=channels, classes=about["classes"], **options)

    def loss(self, model: ViT, batch: Batch, seeds: Tensor) -> Tensor:
        return model.loss(*batch)

    def sample(self, model: ViT, about, count, seed, start, options):
        raise ValueError("--from: vit classifies images and draws none; see `genfast evaluate`")

    @torch.no_grad()
    def evaluate(self, model: ViT, data: Split, seed, count, options) -> dict[str, float]:
        index = torch.arange(len(data.test)).split(256)
        batches = [data.test[i] for i in index]
        right = sum(int((model(x).argmax(-1) == y).sum()) for x, y in batches)
        return {"accuracy": right / len(data.test)}
