"""The `genfast` command: info, bench, train, generate, evaluate, inspect.

Exit codes: 0 done; 1 a proof or a run failed; 2 wrong input or a missing package, with a message
that says what to do; 130 interrupted; 141 the reader of the output has left. Each subcommand is one
module with `add(subparsers)`, which sets `run`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from genfast import __version__
from genfast._extras import MissingExtra
from genfast._memory import keep_freed_memory
from genfast.cli import bench, evaluate, generate, info, inspect, train

COMMANDS = (info, bench, train, generate, evaluate, inspect)
STEPPING = ("train", "generate", "evaluate")  # run a model step after step


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="genfast",
        description="Fast native kernels for generative models in PyTorch.",
        epilog="`genfast COMMAND --help` lists the options of a command.",
    )
    top.add_argument("--version", action="version", version=f"genfast {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.command in STEPPING:
        keep_freed_memory()
    try:
        code = args.run(args) or 0
        sys.stdout.flush()  # here, where a pipe that `head` has closed can be caught
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except (MissingExtra, ValueError, OSError) as error:
        print(f"genfast {args.command}: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, AssertionError) as error:
        print(f"genfast {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"genfast {args.command}: interrupted", file=sys.stderr)
        return 130
