"""Tolerances that test files share, and how results are judged by them.

The yardstick rule: the truth is the reference in fp64; a kernel may be off by at most FACTOR times
what plain PyTorch in the kernel's own dtype is off, plus a floor of a few ulp of the largest value.
Of a few sums that cancel, PyTorch's error may be 0 by luck: there the floor is of what is summed.
"""

from __future__ import annotations

import math

import torch

FACTOR = {"output": 2.0, "gradient": 3.0}
# Gradients: three more roundings (g * sigma * eps / 2); with 2 ulp a single element (shape (1,),
# fp32) fails on d_logvar with 2.3 ulp where torch happened to be off by 0.3.
FLOOR_ULP = {"output": 2.0, "gradient": 3.0}

# Largest error in ulp of the approximations, as their headers state (csrc/math/{rng,sampling}.h).
# name: (lowest argument, highest argument, ulp)
APPROXIMATIONS = {
    "log": [(2.0**-126, 3.4e38, 0.9)],
    "exponential": [(2.0**-33, 0.29, 0.8), (0.29, 0.6, 2.5), (0.6, 1.0, 0.8)],
    "sincos": [(0, 2**32, 2.5)],
    "exp": [(2.0**-30, 88.7, 1.0)],
    "tanh": [(2.0**-60, 0.25, 0.7), (0.25, 12.0, 2.5)],
    "sigmoid": [(-80.0, 20.0, 2.5)],
}
SINCOS_ABSOLUTE = 1.1e-7
EXP_SUBNORMAL = 1.0  # in units of 2^-149

# Statistics: a correct generator fails one check in a million. Seeds are fixed, so a failure says
# that the mapping changed, never that luck was bad.
Z = 4.9
P = 1e-6

# A different order of the same fp32 operations (backend="reference", compiled code).
REORDERED = {
    torch.float64: dict(rtol=1e-12, atol=1e-12),
    torch.float32: dict(rtol=2e-5, atol=2e-6),
    torch.float16: dict(rtol=2e-3, atol=1e-3),
    torch.bfloat16: dict(rtol=1.6e-2, atol=8e-3),
}


def error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return (x.double() - truth.double()).abs().max().item() if truth.numel() else 0.0


def yardstick(what, got, eager, truth, kind="output", summed=0.0):
    """Asserts the rule; `eager` is PyTorch in the dtype of `got`, `truth` the reference in fp64,
    `summed` the largest sum of its terms' sizes."""
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(truth.shape)}"
    if not truth.numel():
        return
    assert torch.isfinite(got).all(), f"{what}: not finite"
    ulp = torch.finfo(got.dtype).eps * max(truth.double().abs().max().item(), summed)
    allowed = FACTOR[kind] * error(eager, truth) + FLOOR_ULP[kind] * ulp
    found = error(got, truth)
    own = error(eager, truth)
    assert found <= allowed, f"{what}: {kind} error {found:.3g} > {allowed:.3g} (torch {own:.3g})"


def ulps(got, exact):
    """|got - exact| in fp32 ulp of exact; numpy arrays, exact in fp64."""
    import numpy as np

    size = np.maximum(np.abs(exact), 2.0**-126)
    return np.abs(got.astype(np.float64) - exact) / 2.0 ** (np.floor(np.log2(size)) - 23)


def poisson_bounds(mean: float) -> tuple[float, float]:
    from scipy.stats import poisson

    return poisson.ppf(P / 2, mean), poisson.ppf(1 - P / 2, mean)


def two_sided(z: float) -> bool:
    return math.isfinite(z) and abs(z) < Z


def on_both_roads(function, *tensors, **options):
    """What a call gives with a graph, as it came; without one it gives the same bits."""
    outputs = function(*tensors, **options)
    with torch.no_grad():
        alone = function(*tensors, **options)
    torch.testing.assert_close(alone, outputs, rtol=0, atol=0, equal_nan=True)
    return outputs
