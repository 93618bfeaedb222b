"""linear: a linear layer against F.linear, in the sizes of the models and of a transformer of 768.

Where `genfast.linear` is F.linear itself, the ratio says what asking costs.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F

import genfast
from genfast.benchmarks.compare import compare, draw
from genfast.benchmarks.harness import Case, Work


def _linear(rows, inputs, outputs, backward, device) -> Work:
    shapes = (rows, inputs), (outputs, inputs), (outputs,)
    leaves = [draw(s, n, device) for n, s in enumerate(shapes)]
    return compare(genfast.linear, F.linear, leaves, backward)


CASES = [
    Case("linear", f"linear{name}", shape, partial(_linear, *shape, backward),
         flops=(6 if backward else 2) * shape[0] * shape[1] * shape[2])
    for shape in (
        (8, 256, 1024), (128, 400, 40), (128, 784, 400), (1568, 96, 288), (1568, 384, 96),
        (2048, 256, 1024), (1024, 768, 768), (1024, 768, 3072),
    )
    for name, backward in {"": False, " fwd+bwd": True}.items()
]  # fmt: skip
