"""`RECIPES`: the table behind `genfast train NAME`, and what it has trained."""

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
    return checkpoint.load(folder, {name: recipe.model for name, recipe in RECIPES.items()})


__all__ = ["RECIPES", "Batch", "Option", "Part", "Player", "Recipe", "Split", "load_trained"]
