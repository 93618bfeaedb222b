"""Argument types and checks that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genfast.train.recipe import Option

# More than processors of today have; 10**8 ended the process within OpenMP.
MOST_THREADS = 1024


def integer(text: str) -> int:
    """One that torch takes."""
    value = int(text.strip()[:40])  # of more digits than 4300 Python makes another error
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(
            f"expected an int in [-2**63, 2**63), got {text[:40]!r}{'...' * (len(text) > 40)}"
        )
    return value


def positive(text: str) -> int:
    value = integer(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an int >= 1, got {text!r}")
    return value


def threads(text: str) -> int:
    value = positive(text)
    if value > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected an int <= {MOST_THREADS}, got {text!r}")
    return value


def shape(text: str) -> tuple[int, ...]:
    """Of a tensor: 16x4x32x32, or with commas."""
    parts = text.lower().replace(",", "x").split("x")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected a shape such as 16x4x32x32, got {text!r}")
    return tuple(positive(part) for part in parts)


def seed(text: str) -> int:
    value = int(text[:40]) if text.isdecimal() else -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected an int in [0, 2**63), got {text!r}")
    return value


def output_file(*suffixes: str):
    """A path that ends in one of them, in a folder that exists: refused before the work."""

    def check(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(
                f"expected a file name in {' or '.join(suffixes)}, got {text!r}"
            )
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"expected a file, got the folder {path}")
        return path

    return check


def folder(text: str) -> Path:
    """A path that says which: an empty one would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected the name of a folder, got {text!r}")
    return Path(text)


def utf8(text: str) -> str:
    """What a model may read: bytes of the command line that are no UTF-8 arrive as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"expected UTF-8 text, got {text!r}") from None
    return text


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_options(parser, tables: dict[str, dict[str, Option]]) -> None:
    """One flag per name in the tables of the models; `chosen` says which came. A table under "" is
    everyone's."""
    users: dict[str, list[str]] = {}
    for model, table in tables.items():
        for name in table:
            users.setdefault(name, []).append(model)
    for name, models in users.items():
        option = tables[models[0]][name]
        own = type(option.default)
        kind = {str: utf8, type(None): utf8, int: integer}.get(own, own)
        said: dict[str, list[str]] = {}  # what it means and its default: the models that say so
        for model in models:
            own_help = f"{tables[model][name].help} (default: {tables[model][name].default})"
            said.setdefault(own_help.replace("%", "%%"), []).append(model)
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(
            flag(name), default=argparse.SUPPRESS, **how,
            help="; ".join(f"{', '.join(who)}: {text}" if any(who) else text
                           for text, who in said.items()),
        )  # fmt: skip


def chosen(args, model: str, tables: dict[str, dict[str, Option]]) -> dict:
    """The values of one model's options that came; ValueError for a flag of another model."""
    own = tables[model]
    for name in sorted({n for table in tables.values() for n in table} - set(own)):
        if hasattr(args, name):
            takes = ", ".join(map(flag, own)) or "none"
            raise ValueError(f"{flag(name)}: no option of {model}, which takes {takes}")
    return {name: getattr(args, name) for name in own if hasattr(args, name)}


def one_of(what: str, name: str, table: Iterable[str]) -> str:
    table = list(table)
    if name not in table:
        raise ValueError(f"{what}: expected one of {', '.join(table)}, got {name!r}")
    return name
