"""cyclegan: `genfast.models.CycleGAN` between two sets of images without pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from genfast.metrics import images as metrics
from genfast.models import CycleGAN
from genfast.ops.rng import rand
from genfast.train import data, images
from genfast.train.data import Images, Unpaired
from genfast.train.recipe import Option, Player, Split
from genfast.train.recipes.images import ImageRecipe


def labelled(split: Split) -> Split:
    """The two domains as one data set, labels 0 and 1: for the classifier that judges."""
    parts = [
        Images(torch.cat([part.x, part.y]), torch.arange(2).repeat_interleave(len(part)))
        for part in (split.train, split.validation, split.test)
    ]
    return Split(*parts, {**split.about, "classes": 2})


class CycleGANRecipe(ImageRecipe):
    """Which epoch is best says how near translated images come to real ones of the domain, in the
    features of a classifier of the two domains: that needs no pairs."""

    model = CycleGAN
    data = tuple(data.DOMAINS)
    settings = {"epochs": 6, "batch_size": 16, "lr": 1e-3, "schedule": "linear", "ema": 0.995,
                "patience": 60}  # fmt: skip
    best = "classifier_fid"
    options = {
        "width": Option(8, "channels of a generator's first convolution"),
        "d_width": Option(16, "channels of a discriminator's first convolution"),
        "blocks": Option(3, "residual blocks of a generator"),
        "cycle": Option(10.0, "weight of the round trips"),
        "identity": Option(0.5, "weight of leaving the own domain alone, times that"),
        "d_lr": Option(1.0, "learning rate of the discriminators over the generators'"),
    }
    sample_options = {
        "to": Option("Y", "the domain to translate to: Y, the second, or X, the first"),
        "given": Option("", "another data set whose test part is translated"),
    }

    def load(self, name: str, options: dict) -> Split:
        return data.split_unpaired(data.load(name, data.DOMAINS))

    def build(self, about: dict, options: dict) -> CycleGAN:
        return CycleGAN(about["shape"], **{k: v for k, v in options.items() if k != "d_lr"})

    def players(self, model: CycleGAN, options: dict) -> tuple[Player, ...]:
        arguments = {"betas": (0.5, 0.999)}  # Zhu et al., section 4
        return (
            Player("generators", lambda m, batch, seeds, step: m.g_loss(*batch), ("G", "F"),
                   arguments=arguments),
            Player("discriminators", lambda m, batch, seeds, step: m.d_loss(*batch),
                   ("D_X", "D_Y"), lr=options["d_lr"], arguments=arguments, averaged=False),
        )  # fmt: skip

    def watch(self, model: CycleGAN, data: Split, part: Unpaired, seed: int) -> dict[str, float]:
        device = next(model.parameters()).device
        x, y = part.x.to(device), part.y.to(device)
        Gx, Fy = model.translate(x), model.translate(y, "X")
        judge = metrics.classifier_of(data, labelled=labelled)
        fids = [metrics.frechet_distance(judge, real, drawn.cpu())
                for real, drawn in ((part.y, Gx), (part.x, Fy))]  # fmt: skip
        back = model.translate(Gx, "X"), model.translate(Fy, "Y")
        real, fake = model.accuracy(x, y)
        found = {
            "classifier_fid": sum(fids) / 2,
            "round_trip_error": error(back, (x, y)),
            "accuracy_real": real,
            "accuracy_fake": fake,
        }
        if part.truths:
            truths = [t.to(device) for t in part.truths]
            found["translation_error"] = error((Gx, Fy), truths)
            found["identity_error"] = error((x, y), truths)
        return found

    def sample(self, model: CycleGAN, about, count, seed, start, options) -> Tensor:
        """Translations of test images, in an order of `seed`, round and round."""
        part = self.load(options["given"] or about["data"], {}).test
        given = part.y if options["to"] == "X" else part.x
        order = torch.argsort(rand(len(given), seed=seed), stable=True)
        index = order[torch.arange(start, start + count) % len(given)]
        # One tile for every image: its bits do not depend on its neighbours in any case.
        return model.translate(given[index], options["to"])

    def unread(self, model: CycleGAN) -> Sequence[str]:
        return tuple(self.sample_options)

    @torch.no_grad()
    def evaluate(self, model: CycleGAN, data: Split, seed, count, options) -> dict[str, float]:
        return self.watch(model, data, data.test, seed)

    def finish(self, model: CycleGAN, data: Split, seed: int, out: Path) -> list[str]:
        """Rows of: an image, its translation, that one's way back."""
        n, test, picture = min(12, len(data.test)), data.test, []
        for given, to, fro in ((test.x[:n], "Y", "X"), (test.y[:n], "X", "Y")):
            there = model.translate(given, to)
            picture += [given, there, model.translate(there, fro)]
        images.save_png(out / "translations.png", images.grid(torch.cat(picture), columns=n))
        return ["translations.png"]


def error(found, wanted) -> float:
    """Mean |found - wanted| of both domains; pixels in [0, 1]."""
    pairs = zip(found, wanted, strict=True)
    return sum((a - b).abs().mean().item() for a, b in pairs) / len(found)
