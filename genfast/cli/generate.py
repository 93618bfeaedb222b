"""`genfast generate --from DIR --seed S`."""

from __future__ import annotations

from pathlib import Path

from genfast._extras import need
from genfast.cli._args import output_file, positive, seed


def add(commands) -> None:
    p = commands.add_parser("generate", help="draw from a trained model: a PNG grid")
    p.add_argument("--from", dest="folder", required=True, type=Path, metavar="DIR",
                   help="what `genfast train` wrote")  # fmt: skip
    p.add_argument("--seed", required=True, type=seed, help="same seed, same pixels")
    p.add_argument("--count", type=positive, default=64, help="images (default: 64)")
    p.add_argument(
        "--batch-size", type=positive, default=64, help="images at a time; never changes a pixel"
    )
    p.add_argument("--out", type=output_file(".png"), metavar="F.png",
                   help="default: DIR/generated-SEED.png")  # fmt: skip
    p.set_defaults(run=run)


def run(args) -> None:
    import torch

    from genfast.train import checkpoint, images

    need("safetensors", "PIL")
    model, about = checkpoint.load(args.folder)
    height, width = about.get("shape") or (1, model.x_dim)
    x = torch.cat(
        [
            model.sample(min(args.batch_size, args.count - at), args.seed, at)
            for at in range(0, args.count, args.batch_size)
        ]
    ).view(-1, height, width)
    out = args.out or args.folder / f"generated-{args.seed}.png"
    provenance = {
        "model": about["model"],
        "checkpoint_sha256": checkpoint.digest(args.folder / checkpoint.CHECKPOINT),
        "seed": args.seed,
        "count": args.count,
    }
    images.save_png(out, images.grid(x), provenance)
    print(f"wrote {out}")
