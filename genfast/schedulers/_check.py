"""Argument checks of the schedulers: the message names the argument, what was expected and what
came.
"""

from __future__ import annotations

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
    try:
        n = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int >= 1, got {type(value).__name__}") from None
    if n < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {n}")
    return n


def rows_from(begin, n: int) -> range:
    """Rows begin ... n - 1 of a grid; a negative one would be counted from the end."""
    try:
        first = operator.index(begin)
    except TypeError:
        raise TypeError(f"begin: expected an int, got {type(begin).__name__}") from None
    if not 0 <= first < n:
        raise ValueError(f"begin: expected a row of the grid, 0..{n - 1}, got {first}")
    return range(first, n)


def number(name: str, value, low: float, high: float) -> float:
    """value as a float in [low, high]."""
    v = float(value)
    if not low <= v <= high:
        raise ValueError(f"{name}: expected a number in [{low}, {high}], got {value!r}")
    return v
