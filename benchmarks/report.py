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
from genfast._files import write_atomic
from genfast.benchmarks.harness import Row, Settings, short
from genfast.ops._choice import processor

SCHEMA = 1
NOISY = 0.25  # quartile range over median; beyond it the machine was doing something else


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


def machine(settings: Settings) -> dict:
    from genfast._native import _C

    info = _C.build_info()
    return {
        "cpu": processor(),
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
    text = json.dumps(as_dict(rows, settings), indent=1) + "\n"
    write_atomic(path, lambda p: p.write_text(text))


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


def _limits(limits: dict[str, float]) -> str:
    units = {"gbps": "GB/s", "gflops": "GFLOP/s"}
    parts = (name.split("_") for name in limits)
    return ", ".join(f"{what} {limits[f'{what}_{unit}']:.3g} {units[unit]}" for what, unit in parts)


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
        f"{torch.__version__}. In this run: {_limits(limits)}. "
        "Ratios: rival time / our time; red: below target."
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
        colour = "[yellow]" if row.ours.spread > NOISY else ""
        table.add_row(
            escape(row.case.name),
            str(row.case.shape).replace(" ", ""),
            short(row.case.dtype),
            seconds(row.ours.median),
            f"{colour}{row.ours.spread:.0%}",
            f"{row.gbps:.3g}" if row.case.bytes else "-",
            f"{row.gflops:.3g}" if row.case.flops else "-",
            f"{share:.0%} {limit}" if row.case.bytes or row.case.flops else "-",
            *(_ratio(row, rival) for rival in rivals),
        )
    console.print(table)
    noisy = sum(row.ours.spread > NOISY for row in rows)
    if noisy:
        line = f"noisy: {noisy} of {len(rows)} cases have an IQR above {NOISY:.0%}; run it alone"
        console.print(line, style="yellow", highlight=False)
    reasons = {f"{rival}: {why}" for row in rows for rival, why in row.skipped.items()}
    for reason in sorted(reasons):
        console.print(f"skipped {reason}", style="dim", markup=False, highlight=False)
    for row in rows:
        for rival, target in row.missed.items():
            line = f"below target: {row.case.id} {row.ratios[rival]:.2f}x {rival}, wanted {target}x"
            console.print(line, style="red", markup=False, highlight=False)
    if missed := sum(bool(row.missed) for row in rows):
        line = f"below target: {missed} of {len(rows)} cases"
        console.print(line, style="red", markup=False, highlight=False)


def plot(path: Path, rows: Sequence[Row], settings: Settings) -> None:
    """Bars of rival time / our time, a group per case, on a log axis with a line at 1."""
    need("matplotlib")
    from matplotlib.figure import Figure

    rivals = _rivals(rows)
    colours = {rival: f"C{i}" for i, rival in enumerate(rivals)}
    bars = [  # (position, ratio, rival): a row's bars share the row's unit of height
        (n + (i + 0.5) / len(row.rivals), row.ratios[rival], rival)
        for n, row in enumerate(rows)
        for i, rival in enumerate(row.rivals)
    ]
    figure = Figure(figsize=(10, 1.5 + 0.28 * max(len(bars), len(rows))), layout="constrained")
    axes = figure.add_subplot()
    for rival in rivals:
        own = [(at, ratio) for at, ratio, name in bars if name == rival]
        heights = [0.8 / len(rows[int(at)].rivals) for at, _ in own]
        drawn = axes.barh(
            [at for at, _ in own], [r - 1 for _, r in own], heights, left=1,
            color=colours[rival], label=f"vs {rival}",
        )  # fmt: skip
        axes.bar_label(drawn, [f"{r:.2g}x" for _, r in own], padding=3, fontsize=8)
    labels = [f"{r.case.name}  {r.case.shape}  {short(r.case.dtype)}" for r in rows]
    axes.set_yticks([n + 0.5 for n in range(len(rows))], labels, fontsize=8)
    axes.set_ylim(len(rows), 0)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("rival time / genfast time (log scale; right of 1 genfast is faster)")
    where = machine(settings)
    axes.set_title(
        f"{where['gpu'] or where['cpu']}, {settings.threads} threads, torch {torch.__version__}",
        fontsize=9,
    )
    if rivals:
        axes.legend(fontsize=8)
    write_atomic(path, lambda p: figure.savefig(p, dpi=120, format="png"))
