"""What `genfast train`, `generate` and `evaluate` need to know of a model: one `Recipe` each.

The loop, the checkpoints and the commands are the same for all of them. A new model is a subclass
here and a row in `RECIPES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from genfast.ops import _check

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


OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


@dataclass(frozen=True)
class Player:
    """One side of a game between parts of a model. A model with one loss is a game of one.

    In a step every player, in order, makes a move on the step's batch: a step of its own optimizer
    along the gradient of its own loss, of its own parameters only; the others stand still.

    loss(model, batch, seeds, step): the mean over the batch's samples, (). seeds (B,) int64: as in
    `Recipe.loss`, different ones for each player. step: of the run, for what a loss adds at every
    k-th step only (lazy regularisation).
    moves: beginnings of the names of its parameters: "G" is G itself and all of G.*; "": all. No
    parameter has two players; what has none stays as it is.
    optimizer: a key of OPTIMIZERS; arguments: more of its arguments (betas). lr: multiple of the
    run's (TTUR, Heusel et al. 2017). every: moves at each k-th step, k - 1 the first, so that the
    others see k batches meanwhile (n_critic). averaged: `Settings.ema` averages what it moves.
    after(model): after each of its moves, without gradients (WGAN clips its critic's weights).
    """

    name: str
    loss: Callable[[nn.Module, Batch, Tensor, int], Tensor]
    moves: tuple[str, ...] = ("",)
    optimizer: str = "adamw"
    arguments: dict[str, Any] = field(default_factory=dict)
    lr: float = 1.0
    every: int = 1
    averaged: bool = True
    after: Callable[[nn.Module], None] = lambda model: None

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            known = ", ".join(OPTIMIZERS)
            raise ValueError(f"optimizer: expected one of {known}, got {self.optimizer!r}")
        _check.counts(every=self.every)
        if not self.lr > 0:
            raise ValueError(f"lr: expected a multiple > 0, got {self.lr}")

    def owns(self, parameter: str) -> bool:
        """parameter: its name in the model."""
        return any(m in ("", parameter) or parameter.startswith(m + ".") for m in self.moves)


class Recipe(ABC):
    """The class attributes are tables; the methods hold no state.

    model: the class. It has `config`, the dict of its constructor's JSON arguments.
    data: names of its data sets, for messages and --help.
    settings: defaults of `genfast.train.loop.Settings` that differ for this model.
    options, sample_options: flag -> `Option`, of `train` (architecture, loss) and of `generate`.
    suffix: of the file that `generate` writes; other_suffixes: what it writes too if asked for.
    best: what is least at the epoch that is kept: "loss", or a name of `watch`.
    """

    model: type[nn.Module]
    data: Sequence[str]
    settings: dict[str, Any] = {}
    options: dict[str, Option] = {}
    sample_options: dict[str, Option] = {}
    suffix: str
    other_suffixes: tuple[str, ...] = ()
    best: str = "loss"

    @abstractmethod
    def load(self, data: str, options: dict) -> Split:
        """The data set of that name (ValueError naming the table otherwise)."""

    @abstractmethod
    def build(self, about: dict, options: dict) -> nn.Module:
        """A fresh model for data of these facts (`Split.about`)."""

    def loss(self, model: nn.Module, batch: Batch, seeds: Tensor) -> Tensor:
        """Mean over the batch's `terms`, (). seeds (B,) int64: sample b draws all its noise from
        seeds[b], so neither batch size nor number of processes changes it."""
        raise NotImplementedError(f"{type(self).__name__}: define `loss`, or `players` and `best`")

    def terms(self, batch: Batch, seeds: Tensor) -> int:
        """How many numbers the mean of `loss` is over: samples, or tokens where those count."""
        return len(seeds)

    def players(self, model: nn.Module, options: dict) -> Sequence[Player]:
        """Who moves what, in order; one player that lessens `loss` unless told otherwise. options:
        of the run, as in `build`."""
        return (Player("", lambda model, batch, seeds, step: self.loss(model, batch, seeds)),)

    def watch(self, model: nn.Module, data: Split, part: Part, seed: int) -> dict[str, float]:
        """Metrics of a model in eval mode on a part of `data`, for the log of every epoch; the same
        for the same seed. `genfast.train.alarms` knows some of the names."""
        return {}

    def sample_defaults(self, model: nn.Module, given: dict) -> dict[str, Any]:
        """The values of `sample_options` where a user gives only `given`."""
        return {name: option.default for name, option in self.sample_options.items()}

    @abstractmethod
    def sample(
        self, model: nn.Module, about: dict, count: int, seed: int, start: int, options: dict
    ) -> Any:
        """Samples start ... start + count - 1 of `seed`: sample i has the same bits however the
        samples are cut into calls. about: the checkpoint's facts. options: a value of each of
        `sample_options`. Returns a list or a tensor."""

    @abstractmethod
    def write(self, samples: list, out: Path | None, about: dict, provenance: dict) -> str:
        """Writes what the calls of `sample` gave, with its provenance; out None: stdout, or
        nothing. Returns a line for the user."""

    def unread(self, model: nn.Module) -> Sequence[str]:
        """The `sample_options` that `evaluate` does not read."""
        return ()

    @abstractmethod
    def evaluate(
        self, model: nn.Module, data: Split, seed: int, count: int, options: dict
    ) -> dict[str, float]:
        """Metrics on the test part; count: samples drawn for those that judge generation."""

    def finish(self, model: nn.Module, data: Split, seed: int, out: Path) -> list[str]:
        """After training: pictures or texts for the eye. Returns the names of the files."""
        return []
