"""Text as bytes: the tokenizer, data sets installed with Python itself, files, windows and pairs.

Tokens are bytes + 3 behind three special ones, as in ByT5 (Xue et al. 2022): no vocabulary to
train, any language, and bits per byte that compare across models.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from genfast.ops import _check
from genfast.ops.rng import rand
from genfast.train.recipe import Batch, Split

PAD, EOS, MASK, BYTES = 0, 1, 2, 3
VOCAB = BYTES + 256
TEXT_SUFFIX = ".txt"


def encode(text: str) -> list[int]:
    if not isinstance(text, str):
        raise TypeError(f"text: expected a str, got {_check.describe(text)}")
    return [b + BYTES for b in text.encode()]


def decode(ids: Iterable[int] | Tensor) -> str:
    """Special tokens are left out; bytes that are no UTF-8 become U+FFFD."""
    ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    for i in ids:
        _check.integer("ids", i, low=0, high=VOCAB - 1)
    return bytes(i - BYTES for i in ids if i >= BYTES).decode(errors="replace")


# ---- data sets ----------------------------------------------------------------------------------


@lru_cache(1)
def _docstrings() -> list[list[tuple[str, str]]]:
    """(name, docstring) of the functions and classes of each module of the standard library."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # templates of lib2to3 and the like
        nodes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        of_nodes = ((n.name, ast.get_docstring(n)) for n in ast.walk(tree) if isinstance(n, nodes))
        found.append(
            [("", ast.get_docstring(tree) or "")] + [(name, d) for name, d in of_nodes if d]
        )
    return found


def _pydoc() -> list[str]:
    """What `pydoc` shows: the language's topics and the docstrings of the standard library's
    modules, a document each; every paragraph once, because topics quote each other."""
    from pydoc_data.topics import topics

    documents = [topics[k] for k in sorted(topics)]
    documents += ["\n\n".join(d for _, d in module) for module in _docstrings()]
    seen: set[str] = set()
    kept = []
    for document in documents:
        paragraphs = []
        for p in re.split(r"\n\s*\n", document):
            if (words := " ".join(p.split())) and words not in seen:
                seen.add(words)
                paragraphs.append(p.strip("\n"))
        if paragraphs:
            kept.append("\n\n".join(paragraphs) + "\n")
    return kept


TEXTS: dict[str, Callable[[], list[str]]] = {"pydoc": _pydoc}


def documents(name: str) -> list[str]:
    """The documents of a data set, or of a UTF-8 file: its text in pieces of about 4,000
    characters, cut between paragraphs or lines. ValueError where there is neither."""
    if name in TEXTS:
        return TEXTS[name]()
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"data: expected {', '.join(TEXTS)} or a text file, got {name!r}")
    text = _read(path)
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        for at in range(0, len(line), 8000):  # a whole text may be one line
            piece += line[at : at + 8000]
            if len(piece) > 4000 and (not line.strip() or len(piece) > 8000):
                pieces, piece = [*pieces, piece], ""
    return [p for p in (*pieces, piece) if p.strip()]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors begin with U+FEFF
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path}: expected UTF-8 text ({error})") from None


def digest(texts: Sequence) -> str:
    """What tells a resumed run that a file still holds the text that it began with."""
    return hashlib.sha256(repr(list(texts)).encode()).hexdigest()[:16]


def parted(
    items: Sequence, shares: tuple[float, float] = (0.05, 0.05), seed: int = 0
) -> list[list]:
    """items in three lists, train, validation and test: whole items, the same for the same seed."""
    order = torch.argsort(rand(len(items), seed=seed), stable=True).tolist()
    counts = [max(1, round(len(items) * s)) for s in shares]
    if len(items) <= sum(counts):
        raise ValueError(
            f"data: expected more than {sum(counts)} pieces of text to part, got {len(items)}; "
            "give a longer text (a few thousand characters at least)"
        )
    ends = [len(items) - sum(counts), len(items) - counts[1], len(items)]
    return [[items[i] for i in order[a:b]] for a, b in zip([0, *ends], ends, strict=False)]


# ---- parts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """Sample i: tokens i S ... i S + S of one long row of documents, (S + 1,); each text byte is a
    target once. size: S."""

    ids: Tensor
    size: int

    @classmethod
    def of(cls, documents: Sequence[str], size: int) -> Windows:
        _check.integer("context", size, low=1)
        ids = [EOS]
        for document in documents:
            ids += [*encode(document), EOS]
        short = -(len(ids) - 1) % size
        return cls(torch.tensor(ids + [PAD] * short), size)

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.size

    def __getitem__(self, index: Tensor) -> Batch:
        return (self.ids[index[:, None] * self.size + torch.arange(self.size + 1)],)


def windows(name: str, size: int) -> Split:
    found = documents(name)
    parts = [Windows.of(p, size) for p in parted(found)]
    return Split(*parts, {"vocab": VOCAB, "context": size, "digest": digest(found)})


@dataclass(frozen=True)
class Pairs:
    """Sample i: source (S,), target (T,), both ended by EOS and filled up with PAD."""

    source: Tensor
    target: Tensor
    texts: list[tuple[str, str]]

    @classmethod
    def of(cls, texts: list[tuple[str, str]], sizes: tuple[int, int]) -> Pairs:
        source, target = (
            torch.tensor([padded(encode(t[i])[: size - 1] + [EOS], size) for t in texts])
            for i, size in enumerate(sizes)
        )
        return cls(source, target, texts)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Tensor) -> Batch:
        return self.source[index], self.target[index]


def padded(ids: list[int], size: int) -> list[int]:
    return ids + [PAD] * (size - len(ids))


def _summaries() -> list[tuple[str, str]]:
    """(docstring, its first sentence), spaces collapsed, of docstrings that go on behind it."""
    found = {}
    for module in _docstrings():
        for _, docstring in module:
            text = " ".join(docstring.split())
            first = re.split(r"(?<=[.!?])\s|\n\s*\n", docstring, maxsplit=1)[0]
            first = " ".join(first.split())
            if 12 <= len(first) <= 60 and len(text) >= len(first) + 20:
                found[text[:120]] = first
    return list(found.items())


PAIRS: dict[str, Callable[[], list[tuple[str, str]]]] = {"summaries": _summaries}


def pairs(name: str, sizes: tuple[int, int]) -> Split:
    """ValueError for a name that is neither in PAIRS nor a file of `source TAB target` lines."""
    if name in PAIRS:
        found = PAIRS[name]()
    elif Path(name).is_file():
        lines = _read(Path(name)).split("\n")  # splitlines() ends a line at U+2028 too
        found = [tuple(line.split("\t", 1)) for line in lines if "\t" in line]
    else:
        raise ValueError(
            f"data: expected {', '.join(PAIRS)} or a file of lines `source TAB target`, "
            f"got {name!r}"
        )
    if len(found) < 3:
        raise ValueError(
            f"data: expected 3 lines `source TAB target` at least, got {len(found)} in {name!r}"
        )
    parts = [Pairs.of(p, sizes) for p in parted(found)]
    return Split(*parts, {"vocab": VOCAB, "sizes": list(sizes), "digest": digest(found)})
