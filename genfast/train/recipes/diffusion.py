"""diffusion: `genfast.models.Diffusion` on images, on request guided by a CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from genfast.metrics import images as metrics
from genfast.models import CLIP, Diffusion
from genfast.models.diffusion import enlarge, hole, shrink
from genfast.models.hybrid import CLIPGuide
from genfast.ops.rng import rand
from genfast.train import captions, images
from genfast.train.recipe import Batch, Option, Split
from genfast.train.recipes.images import ImageRecipe
from genfast.train.recipes.parts import at_most, labels_of, part

DRAWS = 8  # whose mean stands for the posterior's in `judge_completion`


def numbers(name: str, text: str) -> list[int]:
    """ "16,32,64" -> [16, 32, 64]; "" -> []."""
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
        torch.tensor(found, dtype=torch.int64)  # no more than torch takes
    except (ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name}: expected whole numbers such as 16,32,64, got {text!r}") from None
    return found


class DiffusionRecipe(ImageRecipe):
    model = Diffusion
    settings = {"epochs": 30, "batch_size": 64, "lr": 2e-3, "ema": 0.995, "clip": 1.0}
    options = {
        "widths": Option("16,32,64", "channels of each level of the U-Net, each half as large"),
        "blocks": Option(1, "residual blocks a level"),
        "attention": Option("", "levels that attend besides the middle, counted from 0"),
        "dropout": Option(0.0, "in the residual blocks"),
        "labels": Option(True, "class-conditional, for --label and --guidance"),
        "label_dropout": Option(0.1, "share of samples trained without their label"),
        "timesteps": Option(1000, "T of the noise schedule"),
        "noise_schedule": Option("squaredcos_cap_v2", "a schedule of genfast.schedulers"),
        "prediction": Option("epsilon", "epsilon, sample or v_prediction"),
        "weighting": Option("none", "of genfast.denoising_loss: none, min_snr, …"),
        "task": Option("generate", "generate, inpaint or super-resolution"),
        "factor": Option(2, "of super-resolution"),
    }
    sample_options = {
        "plan": Option("ddpm", "a solver of genfast.models.process.PLANS"),
        "steps": Option(100, "of the solver; by default at most the timesteps trained"),
        "guidance": Option(1.0, "scale w of uncond + w (cond - uncond)"),
        "label": Option(-1, "draw this class; -1: one after another"),
        "given": Option("", "inpaint, super-resolution: data whose test part gives the known"),
        "clip": Option("", "folder of a trained clip that guides to the prompt"),
        "prompt": Option(
            "",
            "what clip guides to; several, separated by |, in turn; none: a "
            "caption of each class in turn",
        ),
        "clip_scale": Option(8.0, "scale s of clip's gradient; with plan ddpm"),
    }

    def load(self, name: str, options: dict) -> Split:
        found = super().load(name, options)
        return replace(found, about={**found.about, "captions": name})  # whose classes' names

    def build(self, about: dict, options: dict) -> Diffusion:
        o = dict(options)
        widths, attention = (numbers(name, o.pop(name)) for name in ("widths", "attention"))
        classes = about["classes"] if o.pop("labels") else 0
        return Diffusion(
            about["shape"], widths, attention=attention, classes=classes, T=o.pop("timesteps"),
            schedule=o.pop("noise_schedule"), **o,
        )  # fmt: skip

    def loss(self, model: Diffusion, batch: Batch, seeds: Tensor) -> Tensor:
        x, y = batch
        return model.loss(x, y if model.classes else None, seed=seeds)

    def sample_defaults(self, model: Diffusion, given: dict) -> dict:
        return at_most(model.T, super().sample_defaults(model, given), "steps")

    def sample(self, model: Diffusion, about, count, seed, start, options) -> Tensor:
        o = options
        plan = model.plan(o["plan"], o["steps"])
        y = labels_of(o["label"], model.classes, count)
        more = {"plan": plan, "y": y, "guidance": o["guidance"], **self.guide(about, o)}
        if model.task == "generate":
            if o["given"]:
                raise ValueError(
                    "--given: expected a model of --task inpaint or super-resolution, got one that "
                    "draws whole images"
                )
            return model.sample(count, seed, start, **more)
        test = self.load(o["given"] or about["data"], {}).test
        x, labels = test[torch.arange(start, start + count) % len(test)]
        if tuple(x.shape[1:]) != model.shape:
            raise ValueError(
                f"given: expected images of {model.shape}, the model's, got {tuple(x.shape[1:])}"
            )
        if model.classes and y is None:
            more["y"] = labels
        return self.complete(model, x, seed, start, **more)[-1]

    def guide(self, about: dict, options: dict) -> dict:
        """Arguments of `Diffusion.sample` that make a CLIP guide it; none without --clip."""
        if not options["clip"]:
            for name, use in (("prompt", "reads it"), ("clip_scale", "guides")):
                if options[name] != self.sample_options[name].default:
                    raise ValueError(
                        f"--{name.replace('_', '-')}: expected --clip DIR beside it, the clip that "
                        f"{use}"
                    )
            return {}
        ids = captions.wanted(options["prompt"], about.get("captions", about.get("data", "")))
        clip = part("--clip", options["clip"], {"clip": CLIP})
        return {"guide": CLIPGuide(clip, ids), "guide_scale": options["clip_scale"]}

    def given(self, model: Diffusion, x: Tensor, seed: int, start: int = 0) -> tuple[Tensor, ...]:
        """What is given of images x: themselves with a hole and what is known of them (B, 1, H, W),
        or themselves made small."""
        if model.task == "super-resolution":
            return (shrink(x, model.factor),)
        known = hole(rand(len(x), 4, seed=seed, stream=1 << 40, offset=4 * start), *x.shape[2:])
        return x * known, known

    def complete(self, model: Diffusion, x: Tensor, seed: int, start: int = 0, **more):
        """What is given of images x, as images, and what the model makes of it."""
        given = self.given(model, x, seed, start)
        if model.task == "inpaint":
            return given[0], model.inpaint(*given, seed, start, **more)
        shown = given[0].repeat_interleave(model.factor, 2).repeat_interleave(model.factor, 3)
        return shown, model.super_resolve(*given, seed, start, **more)

    def judge_completion(
        self, model: Diffusion, data: Split, seed: int, count: int, **more
    ) -> dict[str, float]:
        """Against the truth: the mean of DRAWS draws and one draw, beside what was given and the
        best that needs no model: the hole filled with the mean of the training images, or bilinear
        interpolation. A draw misses the posterior's mean by as much as the truth does, so the PSNR
        of one is at best 3 dB below that of many.
        """
        x, y = data.test[torch.arange(min(count, len(data.test)))]
        more["y"] = y if model.classes else None
        shown, draw = self.complete(model, x, seed, **more)
        given = self.given(model, x, seed)
        call = model.inpaint if model.task == "inpaint" else model.super_resolve
        draws = [draw, *(call(*given, seed + k, **more) for k in range(1, DRAWS))]
        if model.task == "inpaint":
            known = given[1].bool()
            mean = data.train[torch.arange(len(data.train))][0].mean(0)
            name, plain = "the training mean in the hole", torch.where(known, x, mean)
        else:
            name, plain = "bilinear interpolation", enlarge(given[0], model.factor)
        features = metrics.classifier_of(data, seed)

        def right(images: Tensor) -> float:
            return (features.logits(images).argmax(1) == y).float().mean().item()

        return {
            f"PSNR, dB, mean of {DRAWS} draws": metrics.psnr(torch.stack(draws).mean(0), x).item(),
            "PSNR, dB, one draw": metrics.psnr(draw, x).item(),
            f"PSNR, dB, {name}": metrics.psnr(plain, x).item(),
            "PSNR, dB, what was given": metrics.psnr(shown, x).item(),
            f"{features.kind} accuracy, one draw": right(draw),
            f"{features.kind} accuracy, {name}": right(plain),
            f"{features.kind} accuracy, what was given": right(shown),
            f"{features.kind} accuracy, the truth": right(x),
        }

    def unread(self, model: Diffusion) -> Sequence[str]:
        if model.task == "generate":
            return ("given",)
        return ("label", "given", "clip", "prompt", "clip_scale")

    @torch.no_grad()
    def evaluate(self, model: Diffusion, data: Split, seed, count, options) -> dict[str, float]:
        if model.task != "generate":
            plan = model.plan(options["plan"], options["steps"])
            return self.judge_completion(
                model, data, seed, count, plan=plan, guidance=options["guidance"]
            )
        x, y = data.test[torch.arange(len(data.test))]
        drawn = self.sample(model, data.about, count, seed, 0, options)
        bound = model.bound(x, y if model.classes else None, seed=seed).mean().item()
        in_turn = options["label"] < 0 and not options["prompt"]
        asked = None
        if in_turn and (model.classes or options["clip"]):
            asked = torch.arange(count) % data.about["classes"]
        return {"bits per dimension <=": bound, **self.judge(drawn, data, seed, asked)}

    def finish(self, model: Diffusion, data: Split, seed: int, out: Path) -> list[str]:
        if model.task == "generate":
            picture, columns = model.sample(80, seed), 10
        else:
            x, y = data.test[torch.arange(min(32, len(data.test)))]
            given, found = self.complete(model, x, seed, y=y if model.classes else None)
            picture, columns = torch.stack([given, found, x], 1).flatten(0, 1), 12
        images.save_png(out / "samples.png", images.grid(picture, columns))
        return ["samples.png"]
