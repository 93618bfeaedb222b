"""The state that a run resumes from: one safetensors file, replaced as a whole.

Data order, noise and dropout are functions of (seed, step), so the state is weights, their average,
the optimizer's moments, and where the run stands. Tensors: `model.NAME`, `ema.NAME`,
`optimizer.NAME.MOMENT`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from genfast._files import write_tensors
from genfast.train.checkpoint import BadCheckpoint, read

STATE = "state.safetensors"


@dataclass
class Progress:
    """step: done in all; done: in this epoch; loss, norm: their sums over this epoch.
    best: least validation loss so far (None: none yet). seconds: of training. scaler: fp16's.
    """

    step: int = 0
    epoch: int = 1
    done: int = 0
    loss: float = 0.0
    norm: float = 0.0
    best: float | None = None
    best_epoch: int = 0
    seconds: float = 0.0
    finished: bool = False
    scaler: dict | None = None


def save(
    folder: Path, model: nn.Module, ema: dict[str, Tensor], optimizer: Optimizer,
    progress: Progress, about: dict,
) -> None:  # fmt: skip
    """about: what a resume needs to build the same run, JSON."""
    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    tensors |= {f"ema.{name}": x for name, x in ema.items()}
    for name, p in model.named_parameters():
        moments = optimizer.state.get(p, {})
        tensors |= {f"optimizer.{name}.{key}": x for key, x in moments.items()}
    write_tensors(folder / STATE, tensors, {**about, "progress": asdict(progress)})


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


def restore(
    folder: Path, model: nn.Module, ema: dict[str, Tensor], optimizer: Optimizer
) -> Progress:
    """Puts a saved state back, in place."""
    tensors, facts = _read(folder)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}

    model.load_state_dict(part("model."))
    for name, x in part("ema.").items():
        ema[name].copy_(x)
    for name, p in model.named_parameters():
        moments = part(f"optimizer.{name}.")
        # Adam keeps its step count on the CPU, whatever the device.
        optimizer.state[p] = {
            key: x if key == "step" else x.to(p.device) for key, x in moments.items()
        }
    return Progress(**facts["progress"])
