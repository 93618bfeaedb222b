"""The picture of a run's losses."""

from __future__ import annotations

from pathlib import Path

from genfast._extras import need
from genfast._files import write_atomic

PLOT = "loss.png"


def losses(records: list[dict], path: Path) -> None:
    """records: the lines of log.jsonl."""
    need("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    epochs = [r["epoch"] for r in records]
    for name in ("train", "validation"):
        axes.plot(epochs, [r[f"{name}_loss"] for r in records], label=name, marker=".")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomic(path, lambda p: figure.savefig(p, format="png", dpi=120))
