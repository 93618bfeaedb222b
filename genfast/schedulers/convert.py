"""What a model output says about x0 and eps, as linear forms in x and m.

| prediction      | x0                       | eps                 |
|-----------------|--------------------------|---------------------|
| epsilon         | (x - sigma m) / alpha    | m                   |
| sample          | m                        | (x - alpha m)/sigma |
| v_prediction    | alpha x - sigma m        | alpha m + sigma x   |
| flow_prediction | x - sigma m              | x + (1 - sigma) m   |

v_prediction needs alpha^2 + sigma^2 = 1 (Salimans & Ho 2022, app. D); flow_prediction, where
m = eps - x0, needs alpha = 1 - sigma.
"""

from __future__ import annotations

import math

from ._check import choice
from .plan import Lin, M, X

#: prediction -> (x0, eps) of x = alpha x0 + sigma eps
_VP = {
    "epsilon": lambda a, s: ((X - s * M) / a, M),
    "sample": lambda a, s: (M, (X - a * M) / s),
    "v_prediction": lambda a, s: (a * X - s * M, a * M + s * X),
    "flow_prediction": lambda a, s: (X - s * M, X + (1 - s) * M),
}

#: prediction -> x0 of x = x0 + sigma eps, the model seeing x / sqrt(sigma^2 + 1)
_VE = {
    "epsilon": lambda s: X - s * M,
    "sample": lambda s: M,
    "original_sample": lambda s: M,
    "v_prediction": lambda s: X / (s**2 + 1) - (s / math.sqrt(s**2 + 1)) * M,
}

#: prediction -> sign of c_out in x0 = c_skip x + c_out m (Karras et al. 2022, table 1)
_EDM = {"epsilon": 1.0, "v_prediction": -1.0}


def vp(prediction: str, alpha: float, sigma: float) -> tuple[Lin, Lin]:
    """(x0, eps) for x = alpha x0 + sigma eps."""
    if prediction == "flow_prediction" and abs(alpha + sigma - 1) > 1e-6:
        raise ValueError(
            "prediction: flow_prediction needs alpha = 1 - sigma, got "
            f"{alpha:.6g} and {sigma:.6g}; take a flow grid (use_flow_sigmas)"
        )
    return choice("prediction", prediction, _VP)(float(alpha), float(sigma))


def ve(prediction: str, sigma: float) -> Lin:
    """x0 for x = x0 + sigma eps, from a model trained on the variance-preserving x."""
    return choice("prediction", prediction, _VE)(float(sigma))


def edm(prediction: str, sigma: float, sigma_data: float = 0.5) -> Lin:
    """x0 = c_skip x + c_out m."""
    r = math.hypot(sigma, sigma_data)
    return (sigma_data / r) ** 2 * X + choice(
        "prediction", prediction, _EDM
    ) * sigma * sigma_data / r * M


def convert(
    kind: str, prediction: str, alpha: float, sigma: float, sigma_data: float = 0.5
) -> tuple[Lin, Lin]:
    """(x0, eps) for a grid of this kind; alpha and sigma as in x = alpha x0 + sigma eps."""
    if kind == "edm":
        x0 = edm(prediction, sigma, sigma_data)
        return x0, (X - x0) / sigma
    return vp(prediction, alpha, sigma)


def input_scale(kind: str, sigma: float, sigma_data: float = 0.5) -> float:
    """c_in: the model sees c_in x. "ve" is x = x0 + sigma eps with a variance-preserving model."""
    scale = {"ve": 1.0, "edm": sigma_data}
    return 1 / math.hypot(sigma, scale[kind]) if kind in scale else 1.0
