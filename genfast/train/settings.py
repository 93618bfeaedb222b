"""The settings of a run, its learning-rate schedules, and the file they may come from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genfast._extras import need
from genfast.ops import _check

# name -> share of the peak at progress p in [0, 1] after the warm-up.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),  # Loshchilov & Hutter 2017
    "linear": lambda p: 1 - p,
    "constant": lambda p: 1.0,
}
PRECISIONS = ("fp32", "bf16", "fp16")
ON_ALARM = ("warn", "stop", "off")
#: setting -> what it may be
CHOICES = {"schedule": tuple(SCHEDULES), "precision": PRECISIONS, "alarm": ON_ALARM}


def _setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    epochs: int = _setting(60, "passes over the training part, at most")
    batch_size: int = _setting(128, "samples a step, over all processes")
    lr: float = _setting(3e-3, "peak of the learning-rate schedule")
    schedule: str = _setting("cosine", f"after the warm-up: {', '.join(SCHEDULES)}")
    warmup: float = _setting(0.05, "share of all steps spent rising to the peak")
    weight_decay: float = _setting(0.0, "of the optimizer (AdamW: Loshchilov & Hutter 2019)")
    clip: float = _setting(50.0, "largest norm of the gradient")
    ema: float = _setting(0.0, "decay of the average of the weights that is evaluated and kept")
    patience: int = _setting(8, "epochs without a better one, as validation says, before stopping")
    coverage_floor: float = _setting(0.05, "watched coverage under which a run has collapsed")
    accuracy_ceiling: float = _setting(
        0.99, "watched accuracy of a discriminator, on real and on fake, above which it has won"
    )
    alarm_after: int = _setting(5, "epochs in a row beyond such a limit before the alarm")
    alarm: str = _setting("warn", f"what it does: {', '.join(ON_ALARM)}")
    precision: str = _setting("fp32", f"of the forward pass: {', '.join(PRECISIONS)}")
    save_every: int = _setting(0, "steps between states to resume from; 0: every epoch")
    seed: int = _setting(0, "of weights, data order and noise")

    def __post_init__(self):
        for name in ("epochs", "batch_size", "patience", "alarm_after"):
            _check.integer(name, getattr(self, name), low=1)
        _check.integer("save_every", self.save_every, low=0)
        for name in ("lr", "clip", "warmup", "ema"):
            _check.number(name, getattr(self, name))
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        _check.number("weight_decay", self.weight_decay, low=0.0)
        for name, table in CHOICES.items():
            if getattr(self, name) not in table:
                raise ValueError(
                    f"{name}: expected one of {', '.join(table)}, got {getattr(self, name)!r}"
                )
        for name in ("warmup", "coverage_floor", "accuracy_ceiling"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected a decay in [0, 1), got {self.ema}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an int in [0, 2**63), got {self.seed}")

    def lr_at(self, step: int, steps: int) -> float:
        """Of step (0 is the first) of `steps`: a linear rise, then the schedule."""
        warmup = round(self.warmup * steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * SCHEDULES[self.schedule]((step - warmup) / max(steps - warmup, 1))


def read_config(path: Path) -> dict[str, Any]:
    """The table of a TOML or YAML file, names with _ for -; ValueError for anything else."""
    readers = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml}
    if path.suffix not in readers:
        raise ValueError(f"config: expected a file in {', '.join(readers)}, got {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"config: expected a file that exists, got {str(path)!r}")
    try:
        found = readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a table of names and values, got {found!r}")
    spelled: dict[str, list[str]] = {}
    for name in map(str, found):
        spelled.setdefault(name.replace("-", "_"), []).append(name)
    if twice := [names for names in spelled.values() if len(names) > 1]:
        names = " and ".join(map(repr, twice[0]))
        raise ValueError(f"{path}: expected each name once, got {names}; leave one away")
    return {str(name).replace("-", "_"): value for name, value in found.items()}


def _toml(path: Path) -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        raise ValueError(f"{path}: TOML needs Python 3.11; write the same in YAML") from None
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not readable TOML ({error})") from None


def _yaml(path: Path) -> Any:
    need("yaml")
    import yaml

    class Loader(yaml.SafeLoader):
        """A name twice is an error, as in TOML; YAML's own loader takes the last."""

        def construct_mapping(self, node, deep=False):
            names = [key.value for key, _ in node.value]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{', '.join(map(str, twice))} twice", node.start_mark
                )
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable YAML ({error})") from None
