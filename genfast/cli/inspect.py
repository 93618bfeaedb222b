"""`genfast inspect FILE`."""

from __future__ import annotations

import json
from pathlib import Path


def add(commands) -> None:
    p = commands.add_parser("inspect", help="where a generated file or a checkpoint comes from")
    p.add_argument("file", type=Path, help="a PNG, safetensors or JSON file of genfast")
    p.add_argument("--json", action="store_true", help="machine-readable")
    p.set_defaults(run=run)


def run(args) -> None:
    from genfast.train import provenance

    found = provenance.read(args.file)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    rows = []
    for name, value in found.items():
        if isinstance(value, dict):
            rows += [(f"{name}.{key}", v) for key, v in value.items()]
        else:
            rows.append((name, value))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        text = value if isinstance(value, str) else json.dumps(value)
        print(f"{name:<{width}}  {text if len(text) <= 200 else text[:197] + '...'}")
