"""`genfast bench`: proofs, then a table against PyTorch."""

from __future__ import annotations

import difflib
import sys

from genfast._extras import need
from genfast.cli._args import flag, output_file, shape, threads

DTYPES = ("float32", "bfloat16", "float16")


def add(commands) -> None:
    p = commands.add_parser(
        "bench", help="time the kernels against PyTorch on this machine, each proved first"
    )
    p.add_argument("family", nargs="*", help="rng, sampling, ... (default: all)")
    p.add_argument("--shape", action="append", type=shape, metavar="AxBxC", default=[],
                   help="not the grid, but all ops that take this shape; repeatable")  # fmt: skip
    p.add_argument("--sweep", action="store_true",
                   help="as --shape, of 16 shapes that are on no grid")  # fmt: skip
    p.add_argument("--dtype", choices=DTYPES, help="of --shape and --sweep (default: float32)")
    p.add_argument("--channels-last", action="store_true",
                   help="of --shape and --sweep: images with their channels inside")  # fmt: skip
    p.add_argument("--quick", action="store_true", help="short readings, no torch.compile")
    p.add_argument("--only", metavar="TEXT", help="cases whose id contains TEXT")
    p.add_argument("--list", action="store_true", help="print the ids of the cases and stop")
    p.add_argument("--threads", type=threads, default=2, metavar="N", help="default: 2")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--json", type=output_file(".json"), metavar="F.json")
    p.add_argument("--plot", type=output_file(".png"), metavar="F.png")
    p.add_argument("--calibrate", action="store_true",
                   help="measure which backend is faster here and keep the table")  # fmt: skip
    p.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    p.set_defaults(run=run)


def run(args) -> int:
    from genfast.benchmarks import harness

    if args.calibrate:
        return calibrate(args)
    cases = shaped(args) if args.shape or args.sweep else grid(args)
    if args.only:
        chosen = [case for case in cases if args.only in case.id]
        if not chosen:
            near = difflib.get_close_matches(args.only, [case.id for case in cases], 3, 0.0)
            raise ValueError(
                f"--only: none of {len(cases)} case ids contains {args.only!r}; the closest are "
                f"{', '.join(near)}; --list prints all"
            )
        cases = chosen
    if args.list:
        print("\n".join(case.id for case in cases))
        return 0
    need("rich", *(["matplotlib"] if args.plot else []))
    check_device(args)
    return measure(cases, harness.Settings(args.threads, args.quick, args.device), args)


def grid(args) -> list:
    from genfast.benchmarks import harness

    for name in ("dtype", "channels_last"):
        if getattr(args, name):
            raise ValueError(f"{flag(name)}: of --shape and --sweep; the grid has its own cases")
    cases = harness.load_cases(args.family, args.device)
    if not cases:
        raise ValueError(
            f"family: expected one with cases on {args.device} here, got {', '.join(args.family)}; "
            "schedulers needs diffusers (genfast[diffusers])"
        )
    return cases


def shaped(args) -> list:
    import torch

    from genfast.benchmarks import shapes

    sweep = [s for s in shapes.SWEEP if shapes.images(s) or not args.channels_last]
    return shapes.cases(
        [*args.shape, *(sweep if args.sweep else ())],
        args.family,
        getattr(torch, args.dtype or DTYPES[0]),
        args.channels_last,
    )


def check_device(args) -> None:
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here; `genfast info` says why")


def calibrate(args) -> int:
    from genfast.benchmarks import calibrate as calibration
    from genfast.ops._choice import ALL_SIZES

    check_device(args)
    unused = ("family", "shape", "sweep", "dtype", "channels_last", "quick", "only", "list",
              "json", "plot", "check")  # fmt: skip
    if more := [name for name in unused if getattr(args, name)]:
        raise ValueError(
            f"--calibrate: measures all that the table chooses, got {', '.join(more)} too; leave "
            "that out"
        )
    rows, path = [], calibration.place()
    for row in calibration.calibrate(args.threads, args.device):
        rows.append(row)
        sizes = "" if row.below == ALL_SIZES else f" below {row.below:.2g}"
        print(
            f"{row.family} {row.feature} {row.dtype}{sizes}: {row.backend}; {row.why}", flush=True
        )
    path = calibration.save(rows, path, args.device)
    print(f"wrote {path}; `genfast info --backends` shows the table in force")
    return 0


def measure(cases, settings, args) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from genfast.benchmarks import harness, report

    errors = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=errors,
        transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip
    rows, stopped = [], False
    try:
        with bar:
            task = bar.add_task("limits of this machine", total=len(cases) + 1)
            for row in harness.run(cases, settings):
                if row is not None:
                    rows.append(row)
                upcoming = cases[len(rows)].id if len(rows) < len(cases) else "done"
                bar.update(task, advance=1, description=upcoming)
    except harness.ProofFailed as failure:
        errors.print(f"proof failed: {failure}", style="bold red", markup=False, highlight=False)
        errors.print("no times are shown after a wrong answer", style="red")
        return 1
    except KeyboardInterrupt:  # what was measured stays measured
        if not rows:
            raise
        stopped = True
        errors.print(f"stopped after {len(rows)} of {len(cases)} cases", style="yellow")
    report.show(rows, settings)
    if args.json:
        report.write_json(args.json, rows, settings)
    if args.plot:
        report.plot(args.plot, rows, settings)
    return 130 if stopped else int(args.check and any(row.missed for row in rows))
