"""vae, conv-vae: `genfast.models.VAE` and `ConvVAE` on images."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from genfast.metrics import images as metrics
from genfast.models import VAE, ConvVAE
from genfast.models._seeds import sample_seeds
from genfast.models.vae import GaussianVAE
from genfast.train import images
from genfast.train.recipe import Batch, Option, Split
from genfast.train.recipes.images import ImageRecipe

LATENT = {
    "z_dim": Option(20, "latent dimensions"),
    "beta": Option(1.0, "weight of the KL (Higgins et al. 2017)"),
}


class VAERecipe(ImageRecipe):
    model = VAE
    options = {"h_dim": Option(400, "width of the hidden layers"), **LATENT}

    def build(self, about: dict, options: dict) -> GaussianVAE:
        return VAE(math.prod(about["shape"]), **options)

    def loss(self, model: GaussianVAE, batch: Batch, seeds: Tensor) -> Tensor:
        return model.loss(batch[0], seed=seeds)

    def sample(self, model: GaussianVAE, about, count, seed, start, options) -> Tensor:
        return model.sample(count, seed, start)

    @torch.no_grad()
    def evaluate(self, model: GaussianVAE, data: Split, seed, count, options) -> dict[str, float]:
        x, _ = data.test[torch.arange(len(data.test))]
        elbo = model.elbo(x, seed=sample_seeds(len(x), seed))
        found = {
            "elbo, nats": elbo.mean().item(),
            "ln p(x) >= (50 draws), nats": model.bound(x, seed=seed).mean().item(),
            "reconstruction PSNR, dB": metrics.psnr(model.reconstruct(x).view_as(x), x).item(),
        }
        drawn = model.sample(count, seed).view(-1, *x.shape[1:])
        return {**found, **self.judge(drawn, data, seed)}

    def finish(self, model: GaussianVAE, data: Split, seed: int, out: Path) -> list[str]:
        shape = data.about["shape"]
        x, _ = data.test[torch.arange(min(32, len(data.test)))]
        pairs = torch.stack([x, model.reconstruct(x).view_as(x)], 1).flatten(0, 1)
        n = min(8, len(x) // 2)  # lines; a small data set has few test images
        lines = model.interpolate(x[:n], x[n : 2 * n], 8).view(-1, *shape)
        pictures = {
            "reconstructions.png": pairs,
            "interpolations.png": lines,
            "samples.png": model.sample(64, seed).view(-1, *shape),
        }
        for name, picture in pictures.items():
            images.save_png(out / name, images.grid(picture, columns=8))
        return list(pictures)


class ConvVAERecipe(VAERecipe):
    model = ConvVAE
    options = {"width": Option(32, "channels of the first convolution"), **LATENT}
    settings = {"lr": 2e-3, "epochs": 30}

    def build(self, about: dict, options: dict) -> GaussianVAE:
        return ConvVAE(about["shape"], **options)
