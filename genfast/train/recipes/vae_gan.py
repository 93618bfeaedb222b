"""vae-gan: `genfast.models.hybrid.VAEGAN` on images."""

from __future__ import annotations

from pathlib import Path

import torch

from genfast.metrics import images as metrics
from genfast.models.hybrid import VAEGAN
from genfast.train import images
from genfast.train.recipe import Option, Part, Player, Split
from genfast.train.recipes.gan import COMMON, CONVOLUTIONS, GAME, AdversarialRecipe


class VAEGANRecipe(AdversarialRecipe):
    model = VAEGAN
    settings = {**COMMON, "epochs": 20, "lr": 1e-3}
    options = CONVOLUTIONS | GAME | {
        "z_dim": Option(32, "latent dimensions"),
        "width": CONVOLUTIONS["width"]._replace(default=16),
        "gamma": Option(1e-3, "weight of the features' likelihood for the decoder"),
    }  # fmt: skip

    def players(self, model: VAEGAN, options: dict) -> tuple[Player, ...]:
        """Algorithm 1 of the paper, one after another: encoder, decoder, discriminator."""
        d, g = super().players(model, options)
        e = Player(
            "encoder", lambda m, batch, seeds, step: m.e_loss(batch[0], seed=seeds, step=step),
            ("E",), **self.optimizer,
        )  # fmt: skip
        g = Player(
            "decoder", lambda m, batch, seeds, step: m.g_loss(batch[0], seed=seeds, step=step),
            ("G",), every=options["n_critic"], **self.optimizer,
        )  # fmt: skip
        return e, g, d

    def watch(self, model: VAEGAN, data: Split, part: Part, seed: int) -> dict[str, float]:
        x, _ = part[torch.arange(len(part))]
        x = x.to(next(model.parameters()).device)
        psnr = metrics.psnr(model.reconstruct(x), x).item()
        return {**super().watch(model, data, part, seed), "reconstruction_psnr": psnr}

    def evaluate(self, model: VAEGAN, data: Split, seed, count, options) -> dict[str, float]:
        x, _ = data.test[torch.arange(len(data.test))]
        psnr = metrics.psnr(model.reconstruct(x), x).item()
        found = super().evaluate(model, data, seed, count, options)
        return {"reconstruction PSNR, dB": psnr, **found}

    def finish(self, model: VAEGAN, data: Split, seed: int, out: Path) -> list[str]:
        x, _ = data.test[torch.arange(min(40, len(data.test)))]
        pairs = torch.stack([x, model.reconstruct(x)], 1).flatten(0, 1)
        images.save_png(out / "reconstructions.png", images.grid(pairs, columns=10))
        return ["reconstructions.png", *super().finish(model, data, seed, out)]
