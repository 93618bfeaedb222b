"""Metrics of images (N, C, H, W) in [0, 1].

Distances between sets of images are measured in the features of a small classifier that is trained
here, on the labels of the data set itself. They compare models trained on the same data; they are
not comparable with the FID of the literature, whose features are Inception-v3's, and are never
called by its name alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast._extras import need
from genfast.models import _inputs
from genfast.ops import _check
from genfast.ops.rng import rand

if TYPE_CHECKING:
    from genfast.train.recipe import Split


def psnr(x: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of the whole set, dB, (). x, truth: of one shape."""
    _inputs.floats("x", x)
    _inputs.floats("truth", truth)
    if x.shape != truth.shape:
        raise ValueError(f"truth: expected {tuple(x.shape)}, x's, got {tuple(truth.shape)}")
    return -10 * (x - truth).square().mean().log10()


# ---- features ------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Two convolutions and two linear layers. forward: features (N, width), float32, what
    torchmetrics' FrechetInceptionDistance wants of its feature extractor. kind: what metrics in
    these features are called.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int = 64):
        super().__init__()
        C, H, W = shape
        self.body = nn.Sequential(
            nn.Conv2d(C, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * (H // 4) * (W // 4), width), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(width, classes)
        self.num_features = width  # torchmetrics asks for it
        self.kind = "digit-classifier" if classes == 10 else "label-classifier"
        self.accuracy = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.float())

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self(x))


def trained_classifier(data: Split, seed: int = 0, steps: int = 400) -> Classifier:
    """A `Classifier` of the training part's labels; its accuracy on the test part is kept in it.

    The same bits for the same seed: Adam, batches of 64 in an order of contract noise.
    """
    if not data.about.get("classes") or not len(data.train):
        raise ValueError("data: expected labelled images to learn from, got none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(tuple(data.about["shape"]), data.about["classes"])
    n = len(data.train)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with torch.enable_grad():
        for step in range(steps):
            at = step * 64 % n
            if at < 64:  # a new pass
                order = torch.argsort(rand(n, seed=seed, stream=step), stable=True)
            x, y = data.train[order[at : at + 64]][:2]
            optimizer.zero_grad()
            F.cross_entropy(model.logits(x), y).backward()
            optimizer.step()
    model.eval().requires_grad_(False)
    x, y = data.test[torch.arange(len(data.test))][:2]
    model.accuracy = (model.logits(x).argmax(1) == y).float().mean().item()
    return model


def as_it_is(data: Split) -> Split:
    return data


_last: list[tuple] = []  # of `classifier_of`, at most one: data, seed, labelled, classifier


def classifier_of(
    data: Split, seed: int = 0, labelled: Callable[[Split], Split] = as_it_is
) -> Classifier:
    """`trained_classifier`, kept until another is asked for: a run judges every epoch with it.
    labelled: makes a data set with labels of `data`."""
    for of, its_seed, its_labels, classifier in _last[:]:  # a copy: another thread may replace it
        if of is data and its_seed == seed and its_labels is labelled:
            return classifier
    classifier = trained_classifier(labelled(data), seed)
    _last[:] = [(data, seed, labelled, classifier)]
    return classifier


# ---- distances -----------------------------------------------------------------------------------


def frechet_distance(features: nn.Module, real: Tensor, drawn: Tensor) -> float:
    """Squared Frechet distance of two Gaussians fitted to the features: torchmetrics' FID with
    another extractor (Heusel et al. 2017). real, drawn: images (N, C, H, W) in [0, 1]."""
    for name, x in (("real", real), ("drawn", drawn)):
        _inputs.floats(name, x)
        if x.shape[1:] != real.shape[1:] or len(x) < 2 or not x.isfinite().all():
            raise ValueError(
                f"{name}: expected two or more finite images of one size, got {_check.describe(x)}"
            )
    need("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance

    # Of this process alone: in a run of several the others may not take part.
    fid = FrechetInceptionDistance(feature=features, normalize=True, sync_on_compute=False)
    for batch, is_real in ((real, True), (drawn, False)):
        for part in batch.split(500):
            fid.update(part, real=is_real)
    return fid.compute().item()


def classes_covered(labels: Tensor, classes: int, share: float = 0.01) -> int:
    """How many classes have at least this share of the labels (N,) int64 of drawn images: all of
    them unless a generator has lost modes."""
    _inputs.labels("labels", labels, len(labels), classes)
    return int((labels.bincount(minlength=classes) >= max(share * len(labels), 1)).sum())


NEIGHBOURS = 5  # Naeem et al. 2020


def precision_recall_density_coverage(
    real: Tensor, drawn: Tensor, k: int = NEIGHBOURS
) -> dict[str, float]:
    """Naeem et al., "Reliable fidelity and diversity metrics for generative models", 2020;
    precision and recall: Kynkaanniemi et al. 2019. real (N, F), drawn (M, F): features; k < N, M.

    B(x, r): the ball to x's k-th nearest neighbour in its own set.
    precision: share of drawn in some real ball. recall: of real in some drawn ball.
    density: mean number of real balls that hold a drawn sample, over k. coverage: share of real
    balls that hold a drawn one.
    """
    _check.counts(k=k)
    for name, x in (("real", real), ("drawn", drawn)):
        if x.dim() != 2 or len(x) <= k or x.shape[1] != real.shape[1]:
            raise ValueError(
                f"{name}: expected more than k = {k} rows of one width, got {tuple(x.shape)}"
            )
        if not x.isfinite().all():  # comparisons with NaN would all be false: a precision of 0
            raise ValueError(f"{name}: expected finite features, got NaN or infinite ones")
    real, drawn = real.double(), drawn.double()

    def radii(x: Tensor) -> Tensor:
        return distances(x, x).kthvalue(k + 1, dim=1).values  # the nearest is x itself

    between = distances(real, drawn)
    r_real, r_drawn = radii(real), radii(drawn)
    in_real = between < r_real[:, None]
    return {
        "precision": in_real.any(0).double().mean().item(),
        "recall": (between < r_drawn).any(1).double().mean().item(),
        "density": in_real.sum(0).double().mean().item() / k,
        "coverage": (between.min(1).values < r_real).double().mean().item(),
    }


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, (len(a), len(b))."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
