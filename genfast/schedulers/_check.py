"""Argument checks of the schedulers: the message names the argument, what was expected and what
came.
"""

from __future__ import annotations

import math
import operator


def choice(name: str, value, table: dict):
    """table[value], or a ValueError that lists the keys."""
    try:
        return table[value]
    except (KeyError, TypeError):
        raise ValueError(
            f"{name}: expected one of {', '.join(map(repr, table))}, got {value!r}"
        ) from None


def positive(name: str, value) -> int:
    """value as an int >= 1."""
    n = whole(name, value)
    if n < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {n}")
    return n


def whole(name: str, value) -> int:
    """value as an int."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {value!r}") from None


def rows_from(begin, n: int) -> range:
    """Rows begin ... n - 1 of a grid; a negative one would be counted from the end."""
    first = whole("begin", begin)
    if not 0 <= first < n:
        raise ValueError(f"begin: expected a row of the grid, 0..{n - 1}, got {first}")
    return range(first, n)


def _float(name: str, value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name}: expected a number within float64, got {value!r}") from None


def number(name: str, value, low: float, high: float) -> float:
    """value as a float in [low, high]."""
    v = _float(name, value)
    if not low <= v <= high:
        raise ValueError(f"{name}: expected a number in [{low}, {high}], got {value!r}")
    return v


def finite(name: str, value, *, above: bool = False) -> float:
    """value as a finite float >= 0, or > 0 (above)."""
    v = _float(name, value)
    if not (0 < v if above else 0 <= v) or v == math.inf:
        raise ValueError(
            f"{name}: expected a finite number {'>' if above else '>='} 0, got {value!r}"
        )
    return v


def churn(s_churn, s_tmin, s_tmax, s_noise) -> dict[str, float]:
    """The settings of Karras et al. 2022, alg. 2, as floats. The ends of the range in which noise
    is added may lie anywhere: with s_tmin > s_tmax there is none.
    """
    return dict(
        s_churn=number("s_churn", s_churn, 0.0, math.inf),
        s_tmin=number("s_tmin", s_tmin, -math.inf, math.inf),
        s_tmax=number("s_tmax", s_tmax, -math.inf, math.inf),
        s_noise=finite("s_noise", s_noise),
    )


def sigma_range(sigma_min, sigma_max, rho) -> None:
    """Ends and exponent of a ramp of Karras et al. 2022, eq. 5."""
    if not 0 <= sigma_min <= sigma_max < math.inf:
        raise ValueError(
            "sigma_min, sigma_max: expected finite numbers, 0 <= sigma_min <= sigma_max, got "
            f"{sigma_min!r} and {sigma_max!r}"
        )
    finite("rho", rho, above=True)


def threshold(value) -> tuple[float, float]:
    """(ratio, max) of dynamic thresholding, as `genfast.dynamic_threshold` takes them."""
    try:
        ratio, most = map(float, value)
    except (TypeError, ValueError):
        raise TypeError(f"threshold: expected (ratio, max) or None, got {value!r}") from None
    if not (0 <= ratio <= 1 and 1 <= most < math.inf):
        raise ValueError(
            f"threshold: expected (ratio, max), ratio in [0, 1] and max finite and >= 1, got "
            f"{value!r}"
        )
    return ratio, most
