"""`genfast train MODEL --data NAME --out DIR`. Everything may also stand in --config FILE."""

from __future__ import annotations

import argparse
import difflib
import sys
from dataclasses import fields
from pathlib import Path

from genfast._extras import need
from genfast.cli._args import add_options, chosen, flag, folder, integer, one_of, threads
from genfast.train.recipe import Option
from genfast.train.recipes import RECIPES, check_facts
from genfast.train.settings import CHOICES, Settings, read_config

SETTINGS = {f.name: Option(f.default, f.metadata["help"]) for f in fields(Settings)}
OPTIONS = {name: recipe.options for name, recipe in RECIPES.items()}
WITH_RESUME = {"out", "resume", "threads", "device", "command", "run"}


def add(commands) -> None:
    unset = argparse.SUPPRESS
    p = commands.add_parser(
        "train",
        help="train a model on real data",
        epilog="Several processes: torchrun --nproc-per-node N -m genfast.cli train … (which takes "
        "--d for an option of its own: put that in --config), or, on GPUs, accelerate launch -m "
        "genfast.cli train ….",
    )
    p.add_argument("model", nargs="?", default=unset, help=", ".join(RECIPES))
    data = "; ".join(f"{name}: {', '.join(r.data)}" for name, r in RECIPES.items())
    p.add_argument("--data", default=unset, help=data)
    p.add_argument("--out", type=folder, default=unset, metavar="DIR", help="folder to write to")
    p.add_argument("--config", type=Path, default=unset, metavar="FILE",
                   help="TOML or YAML with these names; flags win")  # fmt: skip
    p.add_argument("--resume", action="store_true", default=unset,
                   help="go on with the run in --out, with its settings")  # fmt: skip
    p.add_argument(
        "--device", choices=("auto", "cpu"), default=unset, help="auto: a GPU where there is one"
    )
    p.add_argument("--threads", type=threads, default=unset, help="of torch")
    own = "; ".join(
        f"{name}: {', '.join(f'{flag(k)} {v}' for k, v in recipe.settings.items())}"
        for name, recipe in RECIPES.items() if recipe.settings
    )  # fmt: skip
    add_options(
        p.add_argument_group("settings", f"with defaults of their own: {own}"), {"": SETTINGS}
    )
    add_options(p.add_argument_group("options of the models"), OPTIONS)
    p.set_defaults(run=lambda args: run(configured(p, args)))


def configured(parser, args):
    """args, completed from --config. ValueError for a name that is no flag, or a wrong value."""
    if "config" not in args:
        return args
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    for name, value in read_config(args.config).items():
        if name not in actions:
            known, near = ", ".join(sorted(actions)), difflib.get_close_matches(name, actions, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{args.config}: {name}: expected one of {known}{meant}")
        if name in args:
            continue
        try:
            setattr(args, name, typed(actions[name], value))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{args.config}: {name}: {error}") from None
    return args


def typed(action: argparse.Action, value):
    """A value of a config file as its flag would read it; a list is a text with commas. YAML reads
    the word off as false, which stands for it again where it is a choice."""
    if value is None:
        raise ValueError("expected a value, got none")
    if isinstance(value, bool) and "off" in CHOICES.get(action.dest, ()):
        value = "on" if value else "off"
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {value!r}")
        return value
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if action.choices and text not in action.choices:
        raise ValueError(f"expected one of {', '.join(action.choices)}, got {value!r}")
    try:
        return action.type(text) if action.type else text
    except ValueError:
        kind = {integer: "a whole number", float: "a number"}.get(action.type, "another value")
        raise ValueError(f"expected {kind}, got {value!r}") from None


def run(args) -> None:
    if "out" not in args:
        raise ValueError("--out: expected the folder to write to; pass --out DIR")
    if getattr(args, "resume", False):
        resume(args)
        return
    for name, say in (("model", "MODEL: expected one of " + ", ".join(RECIPES)),
                      ("data", "--data: expected the name of a data set")):  # fmt: skip
        if name not in args:
            raise ValueError(say)
    name = one_of("model", args.model, RECIPES)
    given = {key: getattr(args, key) for key in SETTINGS if key in args}
    settings = Settings(**{**RECIPES[name].settings, **given})
    options = {key: option.default for key, option in OPTIONS[name].items()}
    follow(args, name, settings, options | chosen(args, name, OPTIONS), args.data)


def resume(args) -> None:
    """The settings of the run, and no others: only then is the continuation the same run. Flags and
    a config file may repeat them."""
    from genfast.train import state

    about = state.about(args.out)
    one_of("model", about["model"], RECIPES)
    check_facts(args.out / state.STATE, about)
    if absent := [key for key in ("data", "options", "settings") if key not in about]:
        raise ValueError(
            f"--resume: {args.out} names no {' and no '.join(absent)}; it goes on by "
            "`genfast.train.loop.train(..., resume=True)`, which began it"
        )
    own = {**about["settings"], **about["options"], "model": about["model"], "data": about["data"]}
    more = set(vars(args)) - WITH_RESUME - {"config"}
    other = [flag(name) for name in sorted(more) if getattr(args, name) != own.get(name)]
    if other:
        raise ValueError(
            f"--resume: goes on with the settings of the run ({about['model']}); leave "
            f"{', '.join(other)} away"
        )
    follow(args, about["model"], Settings(**about["settings"]), about["options"], about["data"])


def follow(args, name: str, settings: Settings, options: dict, data_name: str) -> None:
    """Trains under a progress bar and says what came of it."""
    need("rich", "safetensors", "PIL", "matplotlib", "accelerate")
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from genfast.train import checkpoint, loop, plot

    recipe = RECIPES[name]
    if "threads" in args:
        torch.set_num_threads(args.threads)
    data = recipe.load(data_name, options)
    args.out.mkdir(parents=True, exist_ok=True)
    model = checkpoint.initialised(lambda: recipe.build(data.about, options), settings.seed)
    columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), Remaining(compact=True))
    bar = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True),
                   disable=not sys.stderr.isatty())  # fmt: skip
    with bar:
        task = bar.add_task("", total=settings.epochs, epoch=1)
        per_epoch = -(-len(data.train) // settings.batch_size)

        def show(progress, record) -> None:
            bar.update(task, completed=progress.step / per_epoch, epoch=progress.epoch)
            if record:
                losses = [k for k in record if k.endswith("_loss")]
                best = f"validation_{recipe.best}"
                shown = {k.removesuffix("_loss"): record[k] for k in dict.fromkeys([*losses, best])}
                text = (f"{k} {v:.4g}" for k, v in shown.items() if v is not None)
                bar.update(task, description="  ".join(text))

        summary = loop.train(
            name, recipe, model, data, settings, args.out, {"data": data_name, "options": options},
            show, getattr(args, "resume", False), getattr(args, "device", "auto"),
        )  # fmt: skip
    if not summary["main"]:
        return
    best = recipe.best
    files = plot.losses(loop.records(args.out / loop.LOG), args.out / plot.PLOT, best)
    files += recipe.finish(model.cpu().eval(), data, settings.seed, args.out)
    print(
        f"best epoch {summary['best_epoch']} of {summary['epochs']} in {summary['seconds']:.1f} s: "
        f"{best} {summary[f'validation_{best}']:.4g} on the validation part, "
        f"{summary[f'test_{best}']:.4g} on the test part ({len(data.test)} samples)"
    )
    print(f"wrote {', '.join((checkpoint.CHECKPOINT, loop.LOG, *files))}: {args.out}")
