"""`RECIPES`: the table behind `genfast train NAME`, and what it has trained."""

from dataclasses import asdict
from pathlib import Path

from torch import nn

from genfast.train import checkpoint
from genfast.train.recipe import Batch, Option, Part, Player, Recipe, Split
from genfast.train.recipes.autoencoder import AutoencoderRecipe
from genfast.train.recipes.clip import CLIPRecipe
from genfast.train.recipes.cyclegan import CycleGANRecipe
from genfast.train.recipes.diffusion import DiffusionRecipe
from genfast.train.recipes.gan import GANS
from genfast.train.recipes.latent import DiTRecipe, LatentDiffusionRecipe, PriorRecipe
from genfast.train.recipes.stylegan import StyleGAN2Recipe
from genfast.train.recipes.transformers import TRANSFORMERS
from genfast.train.recipes.vae import ConvVAERecipe, VAERecipe
from genfast.train.recipes.vae_gan import VAEGANRecipe
from genfast.train.settings import Settings
from genfast.train.state import Progress

RECIPES: dict[str, Recipe] = {
    "vae": VAERecipe(),
    "conv-vae": ConvVAERecipe(),
    "diffusion": DiffusionRecipe(),
    **GANS,
    "stylegan2": StyleGAN2Recipe(),
    "cyclegan": CycleGANRecipe(),
    "vae-gan": VAEGANRecipe(),
    **TRANSFORMERS,
    "clip": CLIPRecipe(),
    "autoencoder": AutoencoderRecipe(),
    "dit": DiTRecipe(),
    "latent-diffusion": LatentDiffusionRecipe(),
    "prior": PriorRecipe(),
}


def load_trained(folder: Path) -> tuple[nn.Module, dict]:
    """The model in a folder that `genfast train` wrote, in eval mode, and the facts kept with it;
    BadCheckpoint otherwise."""
    model, about = checkpoint.load(folder, {name: r.model for name, r in RECIPES.items()})
    check_facts(folder / checkpoint.CHECKPOINT, about)
    return model, about


def check_facts(path: Path, about: dict) -> None:
    """BadCheckpoint where a fact in a file of a model of RECIPES is none that `genfast train` keeps
    there. What is absent is a matter of who needs it."""
    options = {key: option.default for key, option in RECIPES[about["model"]].options.items()}
    kept = {
        "data": "", "captions": "", "shape": [1, 1, 1], "options": options,
        "settings": asdict(Settings()), "progress": asdict(Progress()),
    }  # fmt: skip
    for key, like in kept.items():
        if key in about and not _alike(about[key], like):
            got = repr(about[key])
            raise checkpoint.BadCheckpoint(
                f"{path}: {key}: expected that of a {about['model']}, as `genfast train` writes "
                f"it, got {got if len(got) <= 200 else got[:197] + '...'}"
            )


def _alike(value, like) -> bool:
    """Of like's type, with none but its names (of {}: with any) or with as many entries, each
    alike. None: of any type."""
    if like and isinstance(like, dict) and isinstance(value, dict):
        return all(k in like and _alike(v, like[k]) for k, v in value.items())
    if isinstance(like, list) and isinstance(value, list):
        return len(value) == len(like) and all(map(_alike, value, like))
    return like is None or type(value) is type(like) or (type(like), type(value)) == (float, int)


__all__ = [
    "RECIPES",
    "Batch",
    "Option",
    "Part",
    "Player",
    "Recipe",
    "Split",
    "check_facts",
    "load_trained",
]
