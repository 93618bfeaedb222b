"""gan, dcgan, wgan, wgan-gp: `genfast.models.GAN`, `DCGAN`, `WGAN`, `WGANGP` on images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from genfast.metrics import images as metrics
from genfast.models import DCGAN, GAN, WGAN, WGANGP
from genfast.models.gan import Adversarial
from genfast.train import images
from genfast.train.recipe import Option, Part, Player, Split
from genfast.train.recipes.images import ImageRecipe

# Of the run, not of the model.
GAME = {
    "n_critic": Option(1, "moves of the discriminator for one of the generator"),
    "d_lr": Option(1.0, "learning rate of the discriminator over the generator's (TTUR)"),
}
PENALTIES = {
    "r1": Option(0.0, "weight of the R1 penalty (Mescheder et al. 2018)"),
    "noise": Option(0.0, "instance noise on all that the discriminator sees, at first"),
    "noise_steps": Option(1000, "steps until it is gone"),
}
NORMED = {"spectral_norm": Option(False, "of the discriminator (Miyato et al. 2018)")}
LATENT = {"z_dim": Option(100, "latent dimensions")}
CONVOLUTIONS = {
    "width": Option(32, "channels of the discriminator's first convolution"),
    "levels": Option(2, "halvings of the image's sides"),
}
OBJECTIVE = {
    "objective": Option(
        "non-saturating", "non-saturating, minimax, least-squares, hinge or wasserstein"
    )
}


class AdversarialRecipe(ImageRecipe):
    """A generator and a discriminator. Which epoch is best says the FID in the features of a
    classifier of the training part: the losses cannot. optimizer: of both players."""

    best = "classifier_fid"
    optimizer: dict = {"arguments": {"betas": (0.5, 0.999)}}  # Radford et al. 2016

    def build(self, about: dict, options: dict) -> nn.Module:
        return self.model(about["shape"], **{k: v for k, v in options.items() if k not in GAME})

    def players(self, model: Adversarial, options: dict) -> tuple[Player, ...]:
        return (
            Player(
                "discriminator",
                lambda m, batch, seeds, step: m.d_loss(batch[0], seed=seeds, step=step),
                ("D",), lr=options["d_lr"], averaged=False, after=lambda m: m.clip_weights(),
                **self.optimizer,
            ),
            Player(
                "generator",
                lambda m, batch, seeds, step: m.g_loss(len(seeds), seed=seeds, step=step),
                ("G",), every=options["n_critic"], **self.optimizer,
            ),
        )  # fmt: skip

    def watch(self, model: Adversarial, data: Split, part: Part, seed: int) -> dict[str, float]:
        x, _ = part[torch.arange(len(part))]
        drawn = model.sample(len(x), seed)
        real, fake = model.accuracy(x.to(drawn.device), drawn)
        drawn, judge = drawn.cpu(), metrics.classifier_of(data)
        quality = metrics.precision_recall_density_coverage(judge(x), judge(drawn))
        labels = judge.logits(drawn).argmax(1)
        return {
            "classifier_fid": metrics.frechet_distance(judge, x, drawn),
            "precision": quality["precision"],
            "coverage": quality["coverage"],
            "classes": metrics.classes_covered(labels, data.about["classes"]),
            "accuracy_real": real,
            "accuracy_fake": fake,
        }

    def sample(self, model: Adversarial, about, count, seed, start, options) -> Tensor:
        return model.sample(count, seed, start)

    def evaluate(self, model: Adversarial, data: Split, seed, count, options) -> dict[str, float]:
        x, _ = data.test[torch.arange(len(data.test))]
        drawn = self.sample(model, data.about, count, seed, 0, options)
        real, fake = model.accuracy(x, drawn)
        accuracies = {"discriminator accuracy, real": real, "discriminator accuracy, drawn": fake}
        return {**accuracies, **self.judge(drawn, data, seed)}

    def finish(self, model: Adversarial, data: Split, seed: int, out: Path) -> list[str]:
        images.save_png(out / "samples.png", images.grid(model.sample(80, seed), columns=10))
        return ["samples.png"]


# Of all of them, for minutes on one core. With few steps an epoch the average lags behind: a run
# covers nothing before some 15 epochs (GAN), 5 (WGANs), which is no collapse yet.
COMMON = {"batch_size": 64, "schedule": "constant", "ema": 0.995, "patience": 100}


class GANRecipe(AdversarialRecipe):
    model = GAN
    settings = {**COMMON, "epochs": 100, "lr": 5e-4, "alarm_after": 20}
    options = LATENT | {"h_dim": Option(256, "width of the hidden layers")} | OBJECTIVE
    options |= NORMED | PENALTIES | GAME


class DCGANRecipe(AdversarialRecipe):
    model = DCGAN
    settings = {**COMMON, "epochs": 20, "lr": 5e-4}
    options = LATENT | CONVOLUTIONS | OBJECTIVE
    options |= {"batch_norm": Option(True, "in the discriminator too")} | NORMED | PENALTIES | GAME


# Narrower, and fewer moves of the critic than the papers' 5: more of the generator in the same time
CRITIC = LATENT | CONVOLUTIONS | GAME | {"width": CONVOLUTIONS["width"]._replace(default=16)}


class WGANRecipe(AdversarialRecipe):
    model = WGAN
    settings = {**COMMON, "epochs": 60, "lr": 1e-3, "alarm_after": 10}
    optimizer = {"optimizer": "rmsprop"}  # Arjovsky et al. 2017, algorithm 1
    options = CRITIC | {"n_critic": GAME["n_critic"]._replace(default=3)}
    options |= {"clip_weight": Option(0.01, "largest weight of the critic")}


class WGANGPRecipe(AdversarialRecipe):
    model = WGANGP
    settings = {**COMMON, "epochs": 36, "lr": 1e-3, "alarm_after": 10}
    optimizer = {"arguments": {"betas": (0.0, 0.9)}}  # Gulrajani et al. 2017, algorithm 1
    options = CRITIC | {"n_critic": GAME["n_critic"]._replace(default=2)}
    options |= {"penalty": Option(10.0, "weight of the gradient penalty")}


GANS: dict[str, AdversarialRecipe] = {
    "gan": GANRecipe(),
    "dcgan": DCGANRecipe(),
    "wgan": WGANRecipe(),
    "wgan-gp": WGANGPRecipe(),
}
