"""What is trained before, and read from its folder by the recipe that builds on it."""

from __future__ import annotations

from pathlib import Path

from torch import nn


def part(option: str, folder: str, kind: type[nn.Module], name: str) -> nn.Module:
    """The trained model in a folder that an option names; ValueError where it is another."""
    from genfast.train import checkpoint

    if not folder:
        raise ValueError(f"{option}: expected the folder of a trained {name}, got none; train one "
                         f"with `genfast train {name} … --out DIR`")  # fmt: skip
    model, about = checkpoint.load(Path(folder))
    if not isinstance(model, kind):
        raise ValueError(f"{option}: expected the folder of a trained {name}, got one of "
                         f"{about['model']}: {folder}")  # fmt: skip
    return model
