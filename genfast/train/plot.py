"""The picture of a run's losses."""

from __future__ import annotations

import math
from pathlib import Path

from genfast._extras import need
from genfast._files import write_atomic

PLOT = "loss.png"


def losses(records: list[dict], path: Path, best: str = "loss") -> list[str]:
    """records: the lines of log.jsonl; without any there is no picture. best: `Recipe.best`, under
    the losses if it is none. Returns the names of the files."""
    if not records:
        return []
    need("matplotlib")
    from matplotlib.figure import Figure

    # Of all records: the first may be an older version's, with other columns.
    panels = [[k for k in dict.fromkeys(k for r in records for k in r) if k.endswith("_loss")]]
    if best != "loss":
        panels.append([f"validation_{best}"])
    figure = Figure(figsize=(6, 3.5 if len(panels) == 1 else 5), layout="constrained")
    epochs = [r["epoch"] for r in records]
    for axes, names in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for name in names:
            values = [_number(r.get(name)) for r in records]
            axes.plot(epochs, values, label=name.removesuffix("_loss"), marker=".")
        axes.grid(alpha=0.3)
        axes.legend()
        axes.set_ylabel("loss" if names == panels[0] else best)
    axes.set_xlabel("epoch")
    write_atomic(path, lambda p: figure.savefig(p, format="png", dpi=120))
    return [path.name]


def _number(value) -> float:
    """A gap where there is none."""
    return value if isinstance(value, (int, float)) else math.nan
