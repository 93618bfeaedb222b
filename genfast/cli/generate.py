"""`genfast generate --from DIR --seed S`."""

from __future__ import annotations

from pathlib import Path

from genfast._extras import need
from genfast.cli._args import add_options, chosen, positive, seed
from genfast.train.recipes import RECIPES

OPTIONS = {name: recipe.sample_options for name, recipe in RECIPES.items()}


def add(commands) -> None:
    p = commands.add_parser("generate", help="draw from a trained model: a PNG grid, or text")
    p.add_argument("--from", dest="folder", required=True, type=Path, metavar="DIR",
                   help="what `genfast train` wrote")  # fmt: skip
    p.add_argument("--seed", required=True, type=seed, help="same seed, same samples")
    p.add_argument("--count", type=positive, default=64, help="samples (default: 64)")
    p.add_argument(
        "--batch-size", type=positive, default=64, help="samples at a time; never changes a bit"
    )
    p.add_argument("--out", type=Path, metavar="FILE",
                   help="default: DIR/generated-SEED.png; for text, stdout")  # fmt: skip
    add_options(p.add_argument_group("options of the models"), OPTIONS)
    p.set_defaults(run=run)


def run(args) -> None:
    from genfast.cli._args import output_file
    from genfast.train import checkpoint

    need("safetensors", "PIL")
    model, about = checkpoint.load(args.folder)
    recipe = RECIPES[about["model"]]
    options = chosen(args, about["model"], OPTIONS)
    out = args.out
    if out is None and recipe.suffix == ".png":
        out = args.folder / f"generated-{args.seed}.png"
    if out is not None:
        out = output_file(recipe.suffix)(str(out))
    samples = [
        recipe.sample(model, about, min(args.batch_size, args.count - at), args.seed, at, options)
        for at in range(0, args.count, args.batch_size)
    ]
    provenance = {
        "model": about["model"],
        "checkpoint_sha256": checkpoint.digest(args.folder / checkpoint.CHECKPOINT),
        "seed": args.seed,
        "count": args.count,
        **options,
    }
    print(recipe.write(samples, out, about, provenance))
