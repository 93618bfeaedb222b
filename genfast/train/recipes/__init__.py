"""`RECIPES`: the table behind `genfast train NAME`."""

from genfast.train.recipe import Batch, Option, Part, Player, Recipe, Split
from genfast.train.recipes.diffusion import DiffusionRecipe
from genfast.train.recipes.gan import GANS
from genfast.train.recipes.transformers import TRANSFORMERS
from genfast.train.recipes.vae import ConvVAERecipe, VAERecipe

RECIPES: dict[str, Recipe] = {
    "vae": VAERecipe(),
    "conv-vae": ConvVAERecipe(),
    "diffusion": DiffusionRecipe(),
    **GANS,
    **TRANSFORMERS,
}

__all__ = ["RECIPES", "Batch", "Option", "Part", "Player", "Recipe", "Split"]
