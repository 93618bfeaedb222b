"""stylegan2: `genfast.models.StyleGAN2` on images."""

from __future__ import annotations

from torch import Tensor, nn

from genfast.models import StyleGAN2
from genfast.train.recipe import Option, Player
from genfast.train.recipes.gan import COMMON, AdversarialRecipe


class StyleGAN2Recipe(AdversarialRecipe):
    """Two players, with Adam's betas of Karras et al. 2020. Lazy regularisation: at every
    r1_every-th and path_every-th step their losses have the penalty, times that interval.

    For small images and few steps: no style mixing, no path length, two layers of mapping, as
    Karras et al. 2020 ("limited data", appendix D) have it for 32 x 32. On mnist5k all ten classes
    are covered after 750 steps; with width 12, mixing 0.9, path 0.5 and R1 0.1 it was one of them
    after 2750, and the discriminator was always right."""

    model = StyleGAN2
    settings = {**COMMON, "batch_size": 16, "epochs": 14, "lr": 4e-3}
    options = {
        "width": Option(24, "channels at the last size, twice as many at each one before"),
        "z_dim": Option(16, "latent dimensions"),
        "w_dim": Option(64, "dimensions of a style"),
        "mapping_layers": Option(2, "of the mapping network"),
        "mixing": Option(0.0, "share of style mixing"),
        "r1": Option(1.0, "gamma of the R1 penalty; 0: none"),
        "r1_every": Option(16, "steps between two R1 penalties"),
        "path": Option(0.0, "weight of the path-length penalty; 0: none"),
        "path_every": Option(8, "steps between two path-length penalties"),
    }
    sample_options = {"psi": Option(1.0, "truncation: 1 none, 0 the mean image")}

    def build(self, about: dict, options: dict) -> nn.Module:
        return self.model(about["shape"], **options)

    def players(self, model: StyleGAN2, options: dict) -> tuple[Player, ...]:
        betas = {"betas": (0.0, 0.99)}
        return (
            Player(
                "discriminator",
                lambda m, batch, seeds, step: m.d_loss(batch[0], seed=seeds, step=step),
                ("D",), arguments=betas, averaged=False,
            ),
            Player(
                "generator",
                lambda m, batch, seeds, step: m.g_loss(seed=seeds, step=step),
                ("G",), arguments=betas,
            ),
        )  # fmt: skip

    def sample(self, model: StyleGAN2, about, count, seed, start, options) -> Tensor:
        return model.sample(count, seed, start, options["psi"])
