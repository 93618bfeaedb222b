"""What recipes share: trained parts that are read from their folders, and the labels asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from genfast.train import checkpoint


def part(option: str, folder: str, models: Mapping[str, type[nn.Module]]) -> nn.Module:
    """The trained model in a folder that an option names; ValueError where it is none of models
    (name -> class)."""
    names = " or ".join(models)
    if not folder:
        raise ValueError(f"{option}: expected the folder of a trained {names}, got none; train one "
                         f"with `genfast train {next(iter(models))} … --out DIR`")  # fmt: skip
    try:
        return checkpoint.load(Path(folder), models)[0]
    except checkpoint.BadCheckpoint as error:
        raise ValueError(f"{option}: {error}") from None


def at_most(T: int, defaults: dict, name: str) -> dict:
    """defaults, of which the number of solver steps called `name` is within a schedule of T."""
    return defaults | {name: min(defaults[name], T)}


def labels_of(label: int, classes: int, count: int) -> Tensor | None:
    """`count` times the class that --label asks for; None for -1, every class in turn."""
    if label == -1:
        return None
    if not 0 <= label < classes:
        want = f"a class in 0 ... {classes - 1}, or -1 for every one in turn" if classes else (
            "none, the model was trained without labels")  # fmt: skip
        raise ValueError(f"--label: expected {want}, got {label}")
    return torch.full((count,), label)
