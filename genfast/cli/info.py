"""`genfast info`."""

from __future__ import annotations

import json


def add(commands) -> None:
    p = commands.add_parser("info", help="what is built, and which backends are usable here")
    p.add_argument("--backends", action="store_true",
                   help="the table by which the automatic choice is made")  # fmt: skip
    p.add_argument("--json", action="store_true", help="machine-readable")
    p.set_defaults(run=run)


def run(args) -> None:
    from genfast.info import choices, collect, lines

    if args.backends:
        rows = choices()
        if args.json:
            print(json.dumps(rows, indent=1))
            return
        widths = [max(len(row[key]) for row in rows) for key in rows[0]]
        for row in ({key: key for key in rows[0]}, *rows):
            print(
                "  ".join(f"{v:<{w}}" for v, w in zip(row.values(), widths, strict=True)).rstrip()
            )
        return
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    rows = lines(facts)
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        print(f"{label:<{width}}  {text}")
