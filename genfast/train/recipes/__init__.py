"""`RECIPES`: the table behind `genfast train NAME`."""

from genfast.train.recipe import Batch, Option, Part, Recipe, Split
from genfast.train.recipes.transformers import TRANSFORMERS
from genfast.train.recipes.vae import VAERecipe

RECIPES: dict[str, Recipe] = {"vae": VAERecipe(), **TRANSFORMERS}

__all__ = ["RECIPES", "Batch", "Option", "Part", "Recipe", "Split"]
