"""The state that a run resumes from: one safetensors file, replaced as a whole.

Data order, noise and dropout are functions of (seed, step), so the state is weights, their average,
the optimizers' moments, and where the run stands. Tensors: `model.NAME`, `ema.NAME`,
`optimizer.NAME.MOMENT` (a parameter has one optimizer, its player's).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from genfast._files import write_tensors
from genfast.train.checkpoint import BadCheckpoint, read

STATE = "state.safetensors"


@dataclass
class Progress:
    """step: done in all; done: in this epoch. best: least validation loss, or what else the recipe
    names, so far (None: none yet). seconds: of training. scaler: fp16's.

    sums: of each player over this epoch: loss x samples, samples, gradient norms, moves.
    alarms: epochs in a row that each watched metric has been beyond its limit.
    """

    step: int = 0
    epoch: int = 1
    done: int = 0
    best: float | None = None
    best_epoch: int = 0
    seconds: float = 0.0
    finished: bool = False
    scaler: dict | None = None
    sums: dict[str, list[float]] = field(default_factory=dict)
    alarms: dict[str, int] = field(default_factory=dict)


def save(
    folder: Path, model: nn.Module, ema: dict[str, Tensor], optimizers: Sequence[Optimizer],
    progress: Progress, about: dict,
) -> None:  # fmt: skip
    """about: what a resume needs to build the same run, JSON."""
    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    tensors |= {f"ema.{name}": x for name, x in ema.items()}
    for name, p, state in _states(model, optimizers):
        tensors |= {f"optimizer.{name}.{key}": x for key, x in state.get(p, {}).items()}
    more = {"progress": asdict(progress), "tensors": _digest(tensors)}
    write_tensors(folder / STATE, tensors, {**about, **more})


def _digest(tensors: dict[str, Tensor]) -> str:
    """Of names, types and shapes. A parameter that has not moved yet has no moments, so that only
    the file itself can say whether one is missing."""
    seen = sorted((name, str(x.dtype), *x.shape) for name, x in tensors.items())
    return hashlib.sha256(repr(seen).encode()).hexdigest()


def _states(model: nn.Module, optimizers: Sequence[Optimizer]):
    """(name, parameter, the state of its optimizer) of all that an optimizer moves."""
    owners = {p: o.state for o in optimizers for group in o.param_groups for p in group["params"]}
    return [(name, p, owners[p]) for name, p in model.named_parameters() if p in owners]


def about(folder: Path) -> dict:
    """What `save` was told; BadCheckpoint where there is nothing to resume."""
    return _read(folder)[1]


def _read(folder: Path) -> tuple[dict[str, Tensor], dict]:
    if not (folder / STATE).is_file():
        raise BadCheckpoint(
            f"{folder}: nothing to resume: no {STATE} in it, which `genfast train` writes after "
            "the first epoch; start again without --resume"
        )
    return read(folder / STATE)


def check_data(folder: Path, known: dict) -> None:
    """ValueError where the data of these facts (`Split.about`) are not those of the state."""
    began = _read(folder)[1].get("digest")
    if began is not None and began != known.get("digest"):
        raise ValueError(
            f"data: expected the text with which the run in {folder} began, got another in its "
            "file; put it back, or start again without --resume"
        )


def restore(
    folder: Path, model: nn.Module, ema: dict[str, Tensor], optimizers: Sequence[Optimizer]
) -> Progress:
    """Puts a saved state back, in place; BadCheckpoint where it is not one of this model."""
    tensors, facts = _read(folder)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}

    averages = part("ema.")
    try:
        if facts["tensors"] != _digest(tensors):
            raise KeyError("tensors: other names or shapes than were written")
        model.load_state_dict(part("model."))
        progress = Progress(**facts["progress"])
        if averages.keys() != ema.keys():
            raise KeyError(f"ema: averages of {len(averages)} weights, expected {len(ema)}")
    except (RuntimeError, KeyError, TypeError) as error:
        raise BadCheckpoint(
            f"{folder / STATE}: expected the state of this run, as `genfast train` writes it; "
            f"start again without --resume ({str(error)[:300]})"
        ) from None
    for name, x in averages.items():
        ema[name].copy_(x)
    for name, p, state in _states(model, optimizers):
        moments = part(f"optimizer.{name}.")
        # Adam keeps its step count on the CPU, whatever the device; the moments lie as p does.
        state[p] = {
            key: x if key == "step" else torch.empty_like(p, dtype=x.dtype).copy_(x)
            for key, x in moments.items()
        }
    return progress
