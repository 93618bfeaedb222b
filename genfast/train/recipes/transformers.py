"""The rows of the transformers in `RECIPES`."""

from genfast.train.recipe import Recipe
from genfast.train.recipes.bert import BERTRecipe
from genfast.train.recipes.gpt import GPTRecipe
from genfast.train.recipes.t5 import T5Recipe
from genfast.train.recipes.vit import ViTRecipe

TRANSFORMERS: dict[str, Recipe] = {
    "gpt": GPTRecipe(),
    "bert": BERTRecipe(),
    "t5": T5Recipe(),
    "vit": ViTRecipe(),
}
