"""`genfast evaluate --from DIR`."""

from __future__ import annotations

import json

from genfast._extras import need
from genfast.cli._args import (
    add_options,
    chosen,
    flag,
    folder,
    output_file,
    positive,
    seed,
    threads,
)
from genfast.train.recipes import RECIPES, load_trained

OPTIONS = {name: recipe.sample_options for name, recipe in RECIPES.items()}


def add(commands) -> None:
    p = commands.add_parser("evaluate", help="metrics of a trained model on the test part")
    p.add_argument("--from", dest="folder", required=True, type=folder, metavar="DIR",
                   help="what `genfast train` wrote")  # fmt: skip
    p.add_argument("--data", dest="data_name", help="another data set (default: the run's own)")
    p.add_argument("--seed", type=seed, default=0, help="of everything drawn (default: 0)")
    p.add_argument("--count", type=positive, default=500,
                   help="samples drawn to judge generation (default: 500)")  # fmt: skip
    p.add_argument("--threads", type=threads, help="of torch")
    p.add_argument(
        "--json", type=output_file(".json"), metavar="F.json", help="write the metrics there too"
    )
    add_options(p.add_argument_group("options of the models"), OPTIONS)
    p.set_defaults(run=run)


def run(args) -> None:
    need("safetensors")
    import torch

    from genfast._files import write_atomic
    from genfast.train import provenance

    if args.threads:
        torch.set_num_threads(args.threads)
    model, about = load_trained(args.folder)
    recipe, given = RECIPES[about["model"]], chosen(args, about["model"], OPTIONS)
    for name in set(given) & set(recipe.unread(model)):
        raise ValueError(f"{flag(name)}: no option here; nothing that judges this model reads it")
    options = recipe.sample_defaults(model, given) | given
    name = args.data_name or about.get("data")
    if name is None:  # `genfast.train.loop.train` without notes
        raise ValueError(f"--data: expected a data set, as {args.folder} names none")
    defaults = {key: option.default for key, option in recipe.options.items()}
    data = recipe.load(name, defaults | about.get("options", {}))
    shapes = [x.get("shape") for x in (about, data.about)]
    if None not in shapes and shapes[0] != shapes[1]:
        raise ValueError(f"--data: expected images of {shapes[0]}, the model's, got {shapes[1]}")
    found = recipe.evaluate(model, data, args.seed, args.count, options)
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value:.4f}")
    if args.json:
        facts = provenance.facts(args.folder, about, args.seed, args.count, options)
        text = json.dumps({**facts, "metrics": found}, indent=1)
        write_atomic(args.json, lambda p: p.write_text(text + "\n"))
