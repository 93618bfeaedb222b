"""Where a generated file comes from: written into it, and read back by `genfast inspect`.

The facts are one JSON object under the key `genfast`: a text chunk of a PNG, the metadata of a
safetensors file; of a text file they are FILE.json beside it.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path

import genfast
from genfast._extras import need
from genfast.train import checkpoint

KEY = "genfast"


class NoProvenance(ValueError):
    pass


def facts(folder: Path, about: dict, seed: int, count: int, options: dict) -> dict:
    """What is said of samples drawn from the checkpoint in `folder`."""
    return {
        "model": about["model"],
        "checkpoint_sha256": checkpoint.digest(folder / checkpoint.CHECKPOINT),
        "data": about.get("data"),
        "seed": seed,
        "count": count,
        "options": options,
        "genfast": genfast.__version__,
        "noise_version": genfast.NOISE_VERSION,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def read(path: Path) -> dict:
    """What a PNG or safetensors file of genfast says of itself; NoProvenance otherwise."""
    readers = {".png": _png, ".safetensors": _safetensors, ".json": _json}
    if path.suffix.lower() not in readers:
        raise NoProvenance(f"{path}: expected a file in {', '.join(readers)}")
    if not path.is_file():
        raise NoProvenance(f"{path}: {'a folder' if path.is_dir() else 'no such file'}")
    try:
        found = json.loads(readers[path.suffix.lower()](path) or "null")
    except (json.JSONDecodeError, RecursionError) as error:
        raise NoProvenance(f"{path}: its genfast metadata is no JSON ({error})") from None
    if not isinstance(found, dict) or "model" not in found:
        raise NoProvenance(f"{path}: says nothing of genfast; `genfast generate` writes it in")
    return found


def _json(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise NoProvenance(f"{path}: expected UTF-8 text ({error})") from None


def _png(path: Path) -> str | None:
    need("PIL")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get(KEY)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
        raise NoProvenance(f"{path}: not a readable PNG ({error})") from None


def _safetensors(path: Path) -> str | None:
    need("safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(KEY)
    except SafetensorError as error:
        raise NoProvenance(f"{path}: not a readable safetensors file ({error})") from None
