"""Checkpoints: one safetensors file, the model's name and configuration in its metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from genfast._extras import need
from genfast._files import write_tensors
from genfast.train.recipes import RECIPES

CHECKPOINT = "model.safetensors"
FORMAT = 1


class BadCheckpoint(ValueError):
    pass


def facts(name: str, model: nn.Module) -> dict:
    """What every file of a model says first."""
    return {"format": FORMAT, "model": name, "config": model.config}


def save(folder: Path, name: str, model: nn.Module, notes: dict) -> Path:
    """Writes folder/model.safetensors. notes: JSON values kept beside the configuration."""
    path = folder / CHECKPOINT
    write_tensors(path, model.state_dict(), {**facts(name, model), **notes})
    return path


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a safetensors file of genfast, and its facts; BadCheckpoint otherwise."""
    need("safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("genfast", "null"))
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise BadCheckpoint(f"{path}: not a readable safetensors file ({error})") from None
    except json.JSONDecodeError as error:
        raise BadCheckpoint(f"{path}: its genfast metadata is no JSON ({error})") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise BadCheckpoint(f"{path}: not a genfast checkpoint of format {FORMAT}")
    if about.get("model") not in RECIPES:
        known = ", ".join(RECIPES)
        raise BadCheckpoint(f"{path}: model: expected one of {known}, got {about.get('model')!r}")
    return tensors, about


def load(folder: Path) -> tuple[nn.Module, dict]:
    """The model in eval mode, and what `save` was told; BadCheckpoint otherwise."""
    path = folder / CHECKPOINT
    if not path.is_file():
        raise BadCheckpoint(
            f"{folder}: expected a folder that holds {CHECKPOINT}, as `genfast train` writes it"
        )
    tensors, about = read(path)
    config = about.get("config")
    try:
        model = RECIPES[about["model"]].model(**config)
    except (TypeError, ValueError) as error:
        raise BadCheckpoint(
            f"{path}: config: expected that of a {about['model']}, got {config} ({error})"
        ) from None
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        what = str(error)[:500]  # of a U-Net every line would fill a screen
        raise BadCheckpoint(f"{path}: not the weights of its config: {what} ...") from None
    return model.eval(), about


def check_kept(folder: Path, name: str, model: nn.Module) -> None:
    """BadCheckpoint where the folder holds the checkpoint of another model: a resumed run ends with
    it."""
    _, about = load(folder)
    got, want = ((n, json.loads(json.dumps(c))) for n, c in (
        (about["model"], about["config"]), (name, model.config)))  # fmt: skip
    if got != want:
        raise BadCheckpoint(
            f"{folder / CHECKPOINT}: expected the best epoch of the run that {folder} resumes, a "
            f"{name}, got another run's {got[0]}; start again without --resume"
        )


def digest(path: Path) -> str:
    """sha256 of a file, hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def initialised(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """build() with torch's default initialisation from `seed`; torch's generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
