"""`genfast generate --from DIR --seed S`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from genfast._extras import need
from genfast.cli._args import add_options, chosen, folder, output_file, positive, seed
from genfast.train.recipes import RECIPES, load_trained

OPTIONS = {name: recipe.sample_options for name, recipe in RECIPES.items()}


def add(commands) -> None:
    p = commands.add_parser("generate", help="draw from a trained model: a PNG grid, or text")
    p.add_argument("--from", dest="folder", required=True, type=folder, metavar="DIR",
                   help="what `genfast train` wrote")  # fmt: skip
    p.add_argument("--seed", required=True, type=seed, help="same seed, same samples")
    p.add_argument("--count", type=positive, default=64, help="samples (default: 64)")
    p.add_argument(
        "--batch-size", type=positive, default=64, help="samples at a time; never changes a bit"
    )
    p.add_argument("--out", type=Path, metavar="FILE",
                   help="images: .png (default: DIR/generated-SEED.png) or .safetensors; "
                   "text: .txt (default: stdout)")  # fmt: skip
    add_options(p.add_argument_group("options of the models"), OPTIONS)
    p.set_defaults(run=run)


def run(args) -> None:
    from genfast.train import provenance

    need("safetensors", "PIL")
    model, about = load_trained(args.folder)
    recipe = RECIPES[about["model"]]
    given = chosen(args, about["model"], OPTIONS)
    options = recipe.sample_defaults(model, given) | given
    out = args.out
    if out is None and recipe.suffix == ".png":
        out = args.folder / f"generated-{args.seed}.png"
    if out is not None:
        try:
            out = output_file(recipe.suffix, *recipe.other_suffixes)(str(out))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"--out: {error}") from None
    samples = [
        recipe.sample(model, about, min(args.batch_size, args.count - at), args.seed, at, options)
        for at in track(range(0, args.count, args.batch_size))
    ]
    facts = provenance.facts(args.folder, about, args.seed, args.count, options)
    print(recipe.write(samples, out, about, facts))


def track(batches):
    """batches, with a progress bar on a terminal."""
    if not sys.stderr.isatty():
        return batches
    need("rich")
    from rich.console import Console
    from rich.progress import track as bar

    return bar(batches, "drawing", console=Console(stderr=True), transient=True)
