"""autoencoder: `genfast.models.KLAutoencoder`, the first stage of latent diffusion."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from genfast.metrics import images as metrics
from genfast.models.hybrid import KLAutoencoder
from genfast.train import images
from genfast.train.recipe import Batch, Option, Split
from genfast.train.recipes.diffusion import numbers
from genfast.train.recipes.images import ImageRecipe


class AutoencoderRecipe(ImageRecipe):
    model = KLAutoencoder
    settings = {"epochs": 10, "batch_size": 64, "lr": 3e-3, "ema": 0.99}
    options = {
        "widths": Option("32,64", "channels at each halving"),
        "z_channels": Option(2, "channels of the latent"),
        "beta": Option(0.01, "weight of the KL"),
    }

    def build(self, about: dict, options: dict) -> KLAutoencoder:
        o = options | {"widths": numbers("widths", options["widths"])}
        return KLAutoencoder(about["shape"], **o)

    def loss(self, model: KLAutoencoder, batch: Batch, seeds: Tensor) -> Tensor:
        return model.loss(batch[0], seed=seeds)

    def sample(self, model: KLAutoencoder, about, count, seed, start, options):
        raise ValueError(
            "--from: autoencoder has no prior to draw from; train one on its latents: genfast "
            "train latent-diffusion --autoencoder DIR"
        )

    @torch.no_grad()
    def evaluate(self, model: KLAutoencoder, data: Split, seed, count, options):
        """How much of the test part the latents keep, and whether its classes survive."""
        x, y = data.test[torch.arange(len(data.test))]
        found = model.reconstruct(x)
        features = metrics.trained_classifier(data, seed)
        z = model.standard(model.encode(x)[0])
        return {
            "reconstruction PSNR, dB": metrics.psnr(found, x).item(),
            f"{features.kind} accuracy": features.accuracy,
            "of the reconstructions": (features.logits(found).argmax(1) == y).float().mean().item(),
            f"{features.kind} FID": metrics.frechet_distance(features, x, found),
            "deviation of standardised latents": z.std().item(),
        }

    def finish(self, model: KLAutoencoder, data: Split, seed: int, out: Path) -> list[str]:
        x = data.test[torch.arange(min(40, len(data.test)))][0]
        pairs = torch.stack([x, model.reconstruct(x)], 1).flatten(0, 1)
        images.save_png(out / "reconstructions.png", images.grid(pairs, columns=10))
        return ["reconstructions.png"]
