"""Seeds per sample, and calls in tiles: what makes sample i the same in any batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from genfast.ops._check import integer
from genfast.ops.rng import randint


def sample_seeds(n: int, seed: int, stream: int = 0, start: int = 0, device=None) -> Tensor:
    """Seeds of samples start ... start + n - 1, (n,) int64 in [0, 2**62): functions of (seed,
    stream, index) alone."""
    if isinstance(seed, Tensor):
        raise TypeError(
            f"seed: expected an int, from which every sample's seed is made, got a tensor of "
            f"shape {tuple(seed.shape)}; `start` is the first sample's index"
        )
    integer("seed", seed)
    words = randint(0, 2**31, (n, 2), seed=seed, stream=stream, offset=2 * start, device=device)
    return words[:, 0] << 31 | words[:, 1]


def in_tiles(call: Callable[[int], Tensor], n: int, start: int, tile: int) -> Tensor:
    """Rows start ... start + n - 1, where call(first) gives the `tile` rows from first on.

    A matrix product or convolution may take another code path, and round otherwise, for another
    number of rows. Here row i always stands at place i % tile of a call of `tile` rows, so its bits
    do not depend on how the rows are cut into calls.
    """
    integer("n", n)
    integer("start", start)
    if n < 0 or start < 0:
        raise ValueError(f"n, start: expected ints >= 0, got {n} and {start}")
    first = start // tile * tile
    rows = [call(at) for at in range(first, max(start + n, first + 1), tile)]
    found = rows[0] if len(rows) == 1 else torch.cat(rows)  # of one tile it would be a copy
    return found[start - first : start - first + n]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode within: BatchNorm then makes of a row the same in any batch."""
    before = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
