"""`genfast info`."""

from __future__ import annotations

import json


def add(commands) -> None:
    p = commands.add_parser("info", help="what is built, and which backends are usable here")
    p.add_argument("--json", action="store_true", help="machine-readable")
    p.set_defaults(run=run)


def run(args) -> None:
    from genfast.info import collect, lines

    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    rows = lines(facts)
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        print(f"{label:<{width}}  {text}")
