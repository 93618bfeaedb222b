"""`genfast train MODEL --data NAME --out DIR`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from genfast._extras import need
from genfast.cli._args import add_options, chosen, one_of, positive, seed
from genfast.train.recipes import RECIPES

OPTIONS = {name: recipe.options for name, recipe in RECIPES.items()}


def add(commands) -> None:
    p = commands.add_parser("train", help="train a model on real data")
    p.add_argument("model", help=", ".join(RECIPES))
    data = "; ".join(f"{name}: {', '.join(r.data)}" for name, r in RECIPES.items())
    p.add_argument("--data", required=True, help=data)
    p.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    unset = argparse.SUPPRESS
    p.add_argument("--epochs", type=positive, default=unset)
    p.add_argument("--batch-size", type=positive, default=unset)
    p.add_argument("--lr", type=float, default=unset, help="peak of the schedule")
    p.add_argument("--warmup", type=float, default=unset, help="share of the steps")
    p.add_argument("--clip", type=float, default=unset, help="largest norm of the gradient")
    p.add_argument("--patience", type=positive, default=unset, help="epochs without improvement")
    p.add_argument("--seed", type=seed, default=unset)
    p.add_argument("--threads", type=positive, default=unset, help="of torch")
    add_options(p.add_argument_group("options of the models"), OPTIONS)
    p.set_defaults(run=run)


def run(args) -> None:
    import torch

    from genfast.train import checkpoint, loop

    name = one_of("model", args.model, RECIPES)
    recipe, options = RECIPES[name], chosen(args, name, OPTIONS)
    need("rich", "safetensors", "PIL")
    given = {f.name: getattr(args, f.name) for f in fields(loop.Settings) if f.name in args}
    settings = loop.Settings(**{**recipe.settings, **given})
    if hasattr(args, "threads"):
        torch.set_num_threads(args.threads)
    data = recipe.load(args.data, options)
    args.out.mkdir(parents=True, exist_ok=True)
    model = checkpoint.initialised(lambda: recipe.build(data.about, options), settings.seed)
    summary = follow(name, settings, model, data, args)
    files = recipe.finish(model.eval(), data, settings.seed, args.out)
    print(
        f"best epoch {summary['best_epoch']} of {summary['epochs']} in {summary['seconds']:.1f} s: "
        f"loss {summary['validation_loss']:.4g} on the validation part, "
        f"{summary['test_loss']:.4g} on the test part ({len(data.test)} samples)"
    )
    print(f"wrote {', '.join((checkpoint.CHECKPOINT, loop.LOG, *files))}: {args.out}")


def follow(name, settings, model, data, args) -> dict:
    """Trains under a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from genfast.train import loop

    columns = (TextColumn("epoch"), BarColumn(), MofNCompleteColumn(), Remaining(compact=True))
    bar = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True),
                   disable=not sys.stderr.isatty())  # fmt: skip
    with bar:
        task = bar.add_task("", total=settings.epochs)

        def show(record: dict) -> None:
            text = f"train {record['train_loss']:.4g}  validation {record['validation_loss']:.4g}"
            bar.update(task, advance=1, description=text)

        notes = {"data": args.data}
        return loop.train(name, RECIPES[name], model, data, settings, args.out, notes, show)
