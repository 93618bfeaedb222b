"""What the recipes of image models share: data, PNG grids, pictures."""

from __future__ import annotations

from pathlib import Path

import torch

from genfast.train import data, images
from genfast.train.recipe import Recipe, Split


class ImageRecipe(Recipe):
    data = tuple(data.DATASETS)
    suffix = ".png"

    def load(self, name: str, options: dict) -> Split:
        return data.split(data.load(name))

    def write(self, samples: list, out: Path | None, about: dict, provenance: dict) -> str:
        if out is None:
            return ""
        pixels = torch.cat(samples).view(-1, *about["shape"])
        images.save_png(out, images.grid(pixels), provenance)
        return f"wrote {out}"
