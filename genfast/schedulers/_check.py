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


def number(name: str, value, low: float, high: float) -> float:
    """value as a float in [low, high]."""
    v = float(value)
    if not low <= v <= high:
        raise ValueError(f"{name}: expected a number in [{low}, {high}], got {value!r}")
    return v
