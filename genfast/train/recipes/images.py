"""What the recipes of image models share: data, PNG grids, judging what was drawn."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from genfast._files import write_tensors
from genfast.metrics import images as metrics
from genfast.train import data, images
from genfast.train.checkpoint import BadCheckpoint
from genfast.train.recipe import Recipe, Split


class ImageRecipe(Recipe):
    data = tuple(data.DATASETS)
    suffix = ".png"
    other_suffixes = (".safetensors",)

    def load(self, name: str, options: dict) -> Split:
        return data.split(data.load(name))

    def write(self, samples: list, out: Path | None, about: dict, provenance: dict) -> str:
        if out is None:
            return ""
        pixels, shape = torch.cat(samples), about.get("shape")
        if shape is None or math.prod(shape) != pixels[0].numel():
            raise BadCheckpoint(
                f"shape: expected that of the model's images, {pixels[0].numel()} values, among "
                f"the facts of its checkpoint, got {shape}"
            )
        pixels = pixels.view(-1, *shape)
        if out.suffix.lower() == self.suffix:
            images.save_png(out, images.grid(pixels), provenance)
        else:
            write_tensors(out, {"images": pixels}, provenance)
        return f"wrote {out}"

    def judge(
        self, drawn: Tensor, data: Split, seed: int, asked: Tensor | None = None
    ) -> dict[str, float]:
        """Drawn images (N, C, H, W) against the test part, in the features of a classifier trained
        on the training part; asked (N,): the classes that they were drawn for."""
        if len(drawn) <= metrics.NEIGHBOURS:
            raise ValueError(
                f"count: expected more than {metrics.NEIGHBOURS} samples to judge by, got "
                f"{len(drawn)}"
            )
        features = metrics.classifier_of(data, seed)
        real = data.test[torch.arange(len(data.test))][0]
        labels = features.logits(drawn).argmax(1)
        found = {}
        if asked is not None:
            found["asked-for class"] = (labels == asked).float().mean().item()
        return found | {
            f"{features.kind} accuracy": features.accuracy,
            f"{features.kind} FID": metrics.frechet_distance(features, real, drawn),
            "classes covered": metrics.classes_covered(labels, data.about["classes"]),
            **metrics.precision_recall_density_coverage(features(real), features(drawn)),
        }
