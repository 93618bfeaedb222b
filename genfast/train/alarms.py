"""Alarms: watched metrics (`Recipe.watch`) that say a game is lost while every loss looks well.

A GAN's losses say little of what it draws: a collapsed generator and one that improves may have the
same. What says it is how much of the real data the samples cover (Naeem et al. 2020), and a
discriminator that is nearly always right, from which a generator learns nothing more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

from genfast.train.settings import Settings


class Collapsed(RuntimeError):
    """An alarm of a run whose setting `alarm` is "stop"; the best epoch's checkpoint is kept."""


class Alarm(NamedTuple):
    """names: metrics that must all be beyond the limit, the setting of that name; says: in what
    state the run is, and the remedy."""

    names: tuple[str, ...]
    limit: str
    beyond: Callable[[float, float], bool]
    says: str


ALARMS: dict[str, Alarm] = {
    "collapse": Alarm(
        ("coverage",), "coverage_floor", lambda value, limit: value < limit,
        "the generator has collapsed: its samples cover too few of the real ones. Try a smaller "
        "lr, another seed, instance noise, or the model wgan-gp",
    ),
    "one-sided": Alarm(
        ("accuracy_real", "accuracy_fake"), "accuracy_ceiling", lambda value, limit: value > limit,
        "the discriminator has won and teaches the generator nothing. Try R1, instance noise or "
        "spectral norm, or a smaller lr of the discriminator",
    ),
}  # fmt: skip


class Found(NamedTuple):
    """on: the names of the alarms that are on; stop: why the run must end, or ""."""

    on: list[str]
    stop: str


def check(watched: dict[str, float], counts: dict[str, int], s: Settings, epoch: int) -> Found:
    """Counts each alarm's epochs in `counts` (of `Progress`), and warns at the first of one."""
    on, stop = [], ""
    for name, alarm in ALARMS.items():
        if s.alarm == "off" or not set(alarm.names) <= set(watched):
            continue
        limit, values = getattr(s, alarm.limit), [watched[n] for n in alarm.names]
        counts[name] = counts.get(name, 0) + 1 if all(alarm.beyond(v, limit) for v in values) else 0
        if counts[name] < s.alarm_after:
            continue
        on.append(name)
        shown = ", ".join(f"{n} {v:.3f}" for n, v in zip(alarm.names, values, strict=True))
        text = f"epoch {epoch}: {shown} ({alarm.limit} {limit}) for {counts[name]} epochs: "
        if s.alarm == "stop":
            stop = text + alarm.says
        elif counts[name] == s.alarm_after:
            warnings.warn(text + alarm.says, stacklevel=3)
    return Found(on, stop)
