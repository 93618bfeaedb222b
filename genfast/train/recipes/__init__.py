"""`RECIPES`: the table behind `genfast train NAME`."""

from genfast.train.recipe import Batch, Option, Part, Recipe, Split
from genfast.train.recipes.autoencoder import AutoencoderRecipe
from genfast.train.recipes.clip import CLIPRecipe
from genfast.train.recipes.diffusion import DiffusionRecipe
from genfast.train.recipes.latent import DiTRecipe, LatentDiffusionRecipe, PriorRecipe
from genfast.train.recipes.transformers import TRANSFORMERS
from genfast.train.recipes.vae import ConvVAERecipe, VAERecipe

RECIPES: dict[str, Recipe] = {
    "vae": VAERecipe(),
    "conv-vae": ConvVAERecipe(),
    "diffusion": DiffusionRecipe(),
    **TRANSFORMERS,
    "clip": CLIPRecipe(),
    "autoencoder": AutoencoderRecipe(),
    "dit": DiTRecipe(),
    "latent-diffusion": LatentDiffusionRecipe(),
    "prior": PriorRecipe(),
}

__all__ = ["RECIPES", "Batch", "Option", "Part", "Recipe", "Split"]
