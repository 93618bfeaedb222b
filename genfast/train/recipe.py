"""What `genfast train`, `generate` and `evaluate` need to know of a model: one `Recipe` each.

The loop, the checkpoints and the commands are the same for all of them. A new model is a subclass
here and a row in `RECIPES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

Batch = tuple[Tensor, ...]  # each (B, ...)


class Part(Protocol):
    """One part of a data set, on the CPU."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> Batch:
        """The samples of index (B,) int64."""


@dataclass(frozen=True)
class Split:
    """about: JSON facts that a checkpoint keeps, so that generation needs no data: the shape of an
    image, a vocabulary."""

    train: Part
    validation: Part
    test: Part
    about: dict = field(default_factory=dict)


class Option(NamedTuple):
    """A flag of a model: its default, whose type is the flag's (None: a text), and its help."""

    default: Any
    help: str


class Recipe(ABC):
    """The class attributes are tables; the methods hold no state.

    model: the class. It has `config`, the dict of its constructor's JSON arguments.
    data: names of its data sets, for messages and --help.
    settings: defaults of `genfast.train.loop.Settings` that differ for this model.
    options, sample_options: flag -> `Option`, of `train` (architecture, loss) and of `generate`.
    suffix: of the file that `generate` writes; other_suffixes: what it writes too if asked for.
    """

    model: type[nn.Module]
    data: Sequence[str]
    settings: dict[str, Any] = {}
    options: dict[str, Option] = {}
    sample_options: dict[str, Option] = {}
    suffix: str
    other_suffixes: tuple[str, ...] = ()

    @abstractmethod
    def load(self, data: str, options: dict) -> Split:
        """The data set of that name (ValueError naming the table otherwise)."""

    @abstractmethod
    def build(self, about: dict, options: dict) -> nn.Module:
        """A fresh model for data of these facts (`Split.about`)."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, seeds: Tensor) -> Tensor:
        """Mean over the batch's samples, (). seeds (B,) int64: sample b draws all its noise from
        seeds[b], so neither batch size nor number of processes changes it."""

    @abstractmethod
    def sample(
        self, model: nn.Module, about: dict, count: int, seed: int, start: int, options: dict
    ) -> Any:
        """Samples start ... start + count - 1 of `seed`: sample i has the same bits however the
        samples are cut into calls. about: the checkpoint's facts. Returns a list or a tensor."""

    @abstractmethod
    def write(self, samples: list, out: Path | None, about: dict, provenance: dict) -> str:
        """Writes what the calls of `sample` gave, with its provenance; out None: stdout, or
        nothing. Returns a line for the user."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, data: Split, seed: int, count: int, options: dict
    ) -> dict[str, float]:
        """Metrics on the test part; count: samples drawn for those that judge generation."""

    def finish(self, model: nn.Module, data: Split, seed: int, out: Path) -> list[str]:
        """After training: pictures or texts for the eye. Returns the names of the files."""
        return []
