"""What the recipes of text models share: windows of bytes, and text on stdout."""

from __future__ import annotations

import json
from pathlib import Path

from genfast._files import write_atomic
from genfast.train import text
from genfast.train.recipe import Option, Recipe, Split

LENGTHS = {"context": Option(256, "tokens of a training window, and the longest sequence")}
# Of the architecture.
SIZES = {
    "d": Option(192, "width of the model"),
    "layers": Option(4, "blocks"),
    "heads": Option(6, "attention heads"),
}


class TextRecipe(Recipe):
    data = (*text.TEXTS, "FILE")
    suffix = text.TEXT_SUFFIX
    options = LENGTHS | SIZES

    def load(self, name: str, options: dict) -> Split:
        return text.windows(name, options["context"])

    def write(self, samples: list, out: Path | None, about: dict, provenance: dict) -> str:
        """Samples with a line of dashes between them. A file has its provenance beside it, in
        FILE.json; on stdout the text is alone."""
        written = ("\n" + "-" * 40 + "\n").join(t for call in samples for t in call)
        if out is None:
            return written
        write_atomic(out, lambda p: p.write_text(written + "\n", encoding="utf-8"))
        beside = out.with_suffix(out.suffix + ".json")
        write_atomic(beside, lambda p: p.write_text(json.dumps(provenance, indent=1) + "\n"))
        return f"wrote {out} and {beside.name}"
