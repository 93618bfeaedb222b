"""Captions of labelled images: a sentence of a table with the class's name in it, drawn by seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genfast.ops.rng import randint
from genfast.train.data import Images
from genfast.train.recipe import Batch, Split
from genfast.train.text import EOS, encode, padded

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# data set -> the names of its classes, several a class.
NAMES: dict[str, list[tuple[str, ...]]] = {
    name: [(str(i), word) for i, word in enumerate(_DIGITS)] for name in ("mnist5k", "digits")
}
TEMPLATES = (
    "{}", "a {}", "the digit {}", "a handwritten {}", "a photo of the number {}",
    "a picture of a {}", "the number {} in white on black", "this is a {}", "a {} drawn by hand",
    "an image of the digit {}", "number {}", "a drawing of the number {}", "here is a {}",
    "the handwritten digit {}", "a white {} on a black background", "someone wrote the number {}",
    "{} in handwriting", "a scan of a {}", "what you see is a {}", "one image, the digit {}",
)  # fmt: skip
A_CAPTION = "a handwritten {}"
# Never trained on: what the zero-shot accuracy is measured with.
HELD_BACK = ("the handwritten number {}", "a drawing of the digit {}", "here is the number {}")

CAPTION = 1 << 40  # stream of a sample's seed
LONGEST = 40  # tokens of a caption, the end included


def tokens(caption: str) -> list[int]:
    """Bytes, the end, padding: LONGEST ids; ValueError for a text that is longer."""
    ids = [*encode(caption), EOS]
    if len(ids) > LONGEST:
        raise ValueError(
            f"prompt: expected at most {LONGEST - 1} bytes, got {len(ids) - 1}: {caption!r}; "
            "shorten it"
        )
    return padded(ids, LONGEST)


def table(data: str, templates: tuple[str, ...] = TEMPLATES) -> Tensor:
    """All captions of each class of a data set, (classes, captions, LONGEST) int64."""
    if data not in NAMES:
        raise ValueError(
            f"data: expected a set whose classes have names, one of {', '.join(NAMES)}, got "
            f"{data!r}; add its names to genfast.train.captions.NAMES"
        )
    return torch.tensor([
        [tokens(t.format(name)) for t in templates for name in names]
        for names in NAMES[data]
    ])  # fmt: skip


@dataclass(frozen=True)
class Captioned:
    """A part of images x with labels y; sample: (x, y, all captions (P, S) of y)."""

    images: Images
    captions: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Batch:
        x, y = self.images[index]
        return x, y, self.captions[y]


def captioned(split: Split, data: str) -> Split:
    """The same parts with captions, and data's name kept as `captions`."""
    captions = table(data)
    parts = (Captioned(p, captions) for p in (split.train, split.validation, split.test))
    return Split(*parts, {**split.about, "captions": data})


def draw(captions: Tensor, seeds: Tensor) -> Tensor:
    """One of each sample's captions (B, P, S), (B, S): a function of the sample's seed alone."""
    B, P, _ = captions.shape
    pick = randint(0, P, (B, 1), seed=seeds, stream=CAPTION, device=captions.device)
    return captions[torch.arange(B, device=captions.device), pick[:, 0]]


def wanted(text: str, data: str) -> Tensor:
    """ids (P, LONGEST) of what a user asks for: the prompts of a text, separated by |; for an empty
    text a caption of each class of a data set. Sample i is drawn for prompt i % P."""
    if text:
        return torch.tensor([tokens(part.strip()) for part in text.split("|")])
    return table(data, (A_CAPTION,))[:, -1]
