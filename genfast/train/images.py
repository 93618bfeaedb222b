"""PNG grids."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from genfast._extras import need
from genfast._files import write_atomic
from genfast.models import _inputs
from genfast.ops import _check


def to_bytes(x: Tensor) -> Tensor:
    """[0, 1] -> uint8, rounded to nearest."""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Tensor:
    """images: (N, C, H, W) in [0, 1], C 1 or 3 -> rows of them with gaps, uint8 (H', W')
    or (H', W', 3). columns: default as many as rows. gap: pixels.
    """
    _inputs.floats("images", images)
    if images.dim() != 4 or not len(images) or images.shape[1] not in (1, 3):
        raise ValueError(
            "images: expected (N, C, H, W) with N >= 1 and one or three channels, got shape "
            f"{tuple(images.shape)}"
        )
    if columns is not None:
        _check.counts(columns=columns)
    _check.integer("gap", gap, low=0)
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = torch.zeros(rows * (h + gap) + gap, columns * (w + gap) + gap, c, dtype=torch.uint8)
    for i, image in enumerate(to_bytes(images).permute(0, 2, 3, 1)):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        canvas[top : top + h, left : left + w] = image
    return canvas.squeeze(-1)


def save_png(path: Path, picture: Tensor, about: dict | None = None) -> None:
    """picture: (H, W) or (H, W, 3) uint8. about: kept as JSON in the PNG text field `genfast`."""
    need("PIL")
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    if about is not None:
        text.add_text("genfast", json.dumps(about))
    image = Image.fromarray(picture.numpy())
    write_atomic(path, lambda p: image.save(p, format="PNG", pnginfo=text))
