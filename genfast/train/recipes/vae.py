"""vae: `genfast.models.VAE` on images."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from genfast.models import VAE
from genfast.models._seeds import sample_seeds
from genfast.train import images
from genfast.train.recipe import Batch, Option, Split
from genfast.train.recipes.images import ImageRecipe


class VAERecipe(ImageRecipe):
    model = VAE
    options = {
        "h_dim": Option(400, "width of the hidden layers"),
        "z_dim": Option(20, "latent dimensions"),
    }

    def build(self, about: dict, options: dict) -> VAE:
        return VAE(math.prod(about["shape"]), **options)

    def loss(self, model: VAE, batch: Batch, seeds: Tensor) -> Tensor:
        return model.loss(batch[0], seed=seeds)

    def sample(self, model: VAE, about, count, seed, start, options) -> Tensor:
        return model.sample(count, seed, start)

    @torch.no_grad()
    def evaluate(self, model: VAE, data: Split, seed, count, options) -> dict[str, float]:
        x, _ = data.test[torch.arange(len(data.test))]
        elbo = model.elbo(x, seed=sample_seeds(len(x), seed))
        error = (model.reconstruct(x).view_as(x) - x).square().mean()
        return {"elbo": elbo.mean().item(), "reconstruction_mse": error.item()}

    def finish(self, model: VAE, data: Split, seed: int, out: Path) -> list[str]:
        x = data.test.images[:32]
        pairs = torch.stack([x, model.reconstruct(x).view_as(x)], 1).flatten(0, 1)
        images.save_png(out / "reconstructions.png", images.grid(pairs, columns=8))
        samples = model.sample(64, seed).view(-1, *data.about["shape"])
        images.save_png(out / "samples.png", images.grid(samples))
        return ["samples.png", "reconstructions.png"]
