"""Checkpoints: one safetensors file, the model's name and configuration in its metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from genfast._extras import need
from genfast._files import write_tensors

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
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadCheckpoint(f"{path}: its genfast metadata is no JSON ({error})") from None
    known = isinstance(about, dict) and about.get("format") == FORMAT
    if not known or not isinstance(about.get("model"), str):
        raise BadCheckpoint(f"{path}: not a genfast checkpoint of format {FORMAT}")
    return tensors, about


def load(folder: Path, models: Mapping[str, type[nn.Module]]) -> tuple[nn.Module, dict]:
    """The model in eval mode, and what `save` was told; BadCheckpoint where the folder holds none
    of models (name -> class)."""
    path = _path(folder)
    tensors, about = read(path)
    name, config = about["model"], about.get("config")
    if name not in models:
        raise BadCheckpoint(f"{path}: expected a trained {' or '.join(models)}, got one of {name}")
    try:
        model = models[name](**config)
    except Exception as error:  # whatever a constructor makes of another's arguments
        raise BadCheckpoint(
            f"{path}: config: expected that of a {name}, got {config} ({error})"
        ) from None
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        what = str(error)[:500]  # of a U-Net every line would fill a screen
        raise BadCheckpoint(f"{path}: not the weights of its config: {what} ...") from None
    return model.eval(), about


def _path(folder: Path) -> Path:
    path = folder / CHECKPOINT
    if not path.is_file():
        raise BadCheckpoint(
            f"{folder}: expected a folder that holds {CHECKPOINT}, as `genfast train` writes it"
        )
    return path


def check_kept(folder: Path, name: str, model: nn.Module) -> None:
    """BadCheckpoint where the folder holds the checkpoint of another model: a resumed run ends with
    it."""
    path = _path(folder)
    about, want = read(path)[1], json.loads(json.dumps(facts(name, model)))
    if any(about.get(key) != value for key, value in want.items()):
        raise BadCheckpoint(
            f"{path}: expected the best epoch of the run that {folder} resumes, a {name}, got "
            f"another run's {about['model']}; start again without --resume"
        )
    load(folder, {name: type(model)})


def digest(path: Path) -> str:
    """sha256 of a file, hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def initialised(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """build() with torch's default initialisation from `seed`; torch's generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
