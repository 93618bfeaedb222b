"""What `genfast bench` shows and writes: a table, JSON rows with their conditions, a chart."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from genfast._extras import need
from genfast.benchmarks.harness import Row, Settings, short

SCHEMA = 1


def git_commit() -> str | None:
    """Commit of the checkout these files are tracked in, "-dirty" when it was edited, or None."""
    here = Path(__file__).resolve()

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here.parent), *args], capture_output=True, text=True, timeout=10
        )
        if done.returncode:
            raise OSError(done.stderr)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        edited = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if edited else "")
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(settings: Settings) -> dict:
    from genfast._native import _C

    info = _C.build_info()
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "isa": info["isa"],
        "gpu": torch.cuda.get_device_name() if settings.device == "cuda" else None,
        "os": f"{platform.system()} {platform.release()}",
        "compiler": info["compiler"],
        "threads": settings.threads,
        "device": settings.device,
    }


def versions() -> dict:
    import numpy

    import genfast

    return {
        "genfast": genfast.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "commit": git_commit(),
    }


def as_dict(rows: Sequence[Row], settings: Settings) -> dict:
    return {
        "schema": SCHEMA,
        "machine": machine(settings),
        "versions": versions(),
        "quick": settings.quick,
        "limits": rows[0].limits if rows else {},
        "rows": [row.as_dict() for row in rows],
    }


def write_json(path: Path, rows: Sequence[Row], settings: Settings) -> None:
    path.write_text(json.dumps(as_dict(rows, settings), indent=1) + "\n")


def seconds(t: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if t >= scale:
            return f"{t / scale:.3g} {unit}"
    return f"{t * 1e9:.3g} ns"


def _rivals(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.rivals))


def _ratio(row: Row, rival: str) -> str:
    if rival not in row.rivals:
        return "[dim]-[/]"
    colour = "red" if rival in row.missed else "green"
    return f"[{colour}]{row.ratios[rival]:.2f}x[/]"


def show(rows: Sequence[Row], settings: Settings, console=None) -> None:
    need("rich")
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # Without a terminal (a pipe, a log) nothing is cut.
    console = console or Console(width=None if sys.stdout.isatty() else 160)
    where, limits = machine(settings), rows[0].limits
    caption = (
        f"{where['gpu'] or where['cpu']}, isa {where['isa']}, {settings.threads} threads, torch "
        f"{torch.__version__}. In this run: copy {limits['copy_gbps']:.1f} GB/s, matmul "
        f"{limits['matmul_gflops']:.0f} GFLOP/s. Ratios: rival time / our time; red: below target."
    )
    table = Table(title="genfast bench", caption=caption, title_justify="left")
    for heading in ("case", "shape", "dtype"):
        table.add_column(heading, no_wrap=True)
    rivals = _rivals(rows)
    for heading in ("time", "IQR", "GB/s", "GFLOP/s", "share", *(f"vs {r}" for r in rivals)):
        table.add_column(heading, justify="right", no_wrap=True)
    family = rows[0].case.family
    for row in rows:
        if row.case.family != family:
            table.add_section()
            family = row.case.family
        share, limit = row.share
        spread = (row.ours.q3 - row.ours.q1) / row.ours.median
        table.add_row(
            escape(row.case.name),
            str(row.case.shape).replace(" ", ""),
            short(row.case.dtype),
            seconds(row.ours.median),
            f"{spread:.0%}",
            f"{row.gbps:.3g}" if row.case.bytes else "-",
            f"{row.gflops:.3g}" if row.case.flops else "-",
            f"{share:.0%} {limit}" if row.case.bytes or row.case.flops else "-",
            *(_ratio(row, rival) for rival in rivals),
        )
    console.print(table)
    reasons = {f"{rival}: {why}" for row in rows for rival, why in row.skipped.items()}
    for reason in sorted(reasons):
        console.print(f"skipped {reason}", style="dim", markup=False, highlight=False)
    for row in rows:
        for rival, target in row.missed.items():
            line = f"below target: {row.case.id} {row.ratios[rival]:.2f}x {rival}, wanted {target}x"
            console.print(line, style="red", markup=False, highlight=False)


def plot(path: Path, rows: Sequence[Row], settings: Settings) -> None:
    """Bars of rival time / our time, a group per case, on a log axis with a line at 1."""
    need("matplotlib")
    from matplotlib.figure import Figure

    rivals = _rivals(rows)
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(rows) * max(len(rivals), 1)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / max(len(rivals), 1)
    for i, rival in enumerate(rivals):
        at = [n + i * height for n, row in enumerate(rows) if rival in row.rivals]
        ratios = [row.ratios[rival] for row in rows if rival in row.rivals]
        bars = axes.barh(at, ratios, height, label=f"vs {rival}")
        axes.bar_label(bars, [f"{r:.1f}x" for r in ratios], padding=3, fontsize=8)
    labels = [f"{r.case.name}  {r.case.shape}  {short(r.case.dtype)}" for r in rows]
    axes.set_yticks([n + 0.4 - height / 2 for n in range(len(rows))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("rival time / genfast time (log scale; right of the line genfast is faster)")
    where = machine(settings)
    axes.set_title(
        f"{where['gpu'] or where['cpu']}, {settings.threads} threads, torch {torch.__version__}",
        fontsize=9,
    )
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
