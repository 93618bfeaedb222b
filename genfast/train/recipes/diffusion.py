"""diffusion: `genfast.models.Diffusion` on images, on request guided by a CLIP."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from genfast.metrics import images as metrics
from genfast.models import CLIP, Diffusion
from genfast.models.diffusion import hole, shrink
from genfast.models.hybrid import CLIPGuide
from genfast.ops.rng import rand
from genfast.train import captions, images
from genfast.train.recipe import Batch, Option, Split
from genfast.train.recipes.images import ImageRecipe
from genfast.train.recipes.parts import part


def numbers(text: str) -> list[int]:
    """ "16,32,64" -> [16, 32, 64]; "" -> []."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"expected whole numbers such as 16,32,64, got {text!r}") from None


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
        "plan": Option("ddpm", "a solver of genfast.models.diffusion.PLANS"),
        "steps": Option(100, "of the solver"),
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
        widths, attention = numbers(o.pop("widths")), numbers(o.pop("attention"))
        classes = about["classes"] if o.pop("labels") else 0
        return Diffusion(
            about["shape"], widths, attention=attention, classes=classes, T=o.pop("timesteps"),
            schedule=o.pop("noise_schedule"), **o,
        )  # fmt: skip

    def loss(self, model: Diffusion, batch: Batch, seeds: Tensor) -> Tensor:
        x, y = batch
        return model.loss(x, y if model.classes else None, seed=seeds)

    def sample(self, model: Diffusion, about, count, seed, start, options) -> Tensor:
        o = options
        plan = model.plan(o["plan"], o["steps"])
        y = None
        if o["label"] >= 0:
            y = torch.full((count,), o["label"])
        if o["label"] >= max(model.classes, 0) and o["label"] >= 0:
            raise ValueError(
                f"label: expected a class in 0 ... {model.classes - 1}, got {o['label']}"
                if model.classes else "label: expected none, the model was trained without labels"
            )  # fmt: skip
        more = {"plan": plan, "y": y, "guidance": o["guidance"], **self.guide(about, o)}
        if model.task == "generate":
            return model.sample(count, seed, start, **more)
        test = self.load(o["given"] or about["data"], {}).test
        x, labels = test[torch.arange(start, start + count) % len(test)]
        if model.classes and y is None:
            more["y"] = labels
        return self.complete(model, x, seed, start, **more)[-1]

    def guide(self, about: dict, options: dict) -> dict:
        """Arguments of `Diffusion.sample` that make a CLIP guide it; none without --clip."""
        if not options["clip"]:
            if options["prompt"]:
                raise ValueError("--prompt: expected --clip DIR beside it, the clip that reads it")
            return {}
        ids = captions.wanted(options["prompt"], about.get("captions", about.get("data", "")))
        clip = part("--clip", options["clip"], CLIP, "clip")
        return {"guide": CLIPGuide(clip, ids), "guide_scale": options["clip_scale"]}

    def complete(self, model: Diffusion, x: Tensor, seed: int, start: int = 0, **more):
        """What is given of images x, and what the model makes of it."""
        if model.task == "inpaint":
            u = rand(len(x), 4, seed=seed, stream=1 << 40, offset=4 * start)
            known = hole(u, *x.shape[2:])
            return x * known, model.inpaint(x, known, seed, start, **more)
        low = shrink(x, model.factor)
        given = low.repeat_interleave(model.factor, 2).repeat_interleave(model.factor, 3)
        return given, model.super_resolve(low, seed, start, **more)

    @torch.no_grad()
    def evaluate(self, model: Diffusion, data: Split, seed, count, options) -> dict[str, float]:
        x, y = data.test[torch.arange(len(data.test))]
        labels = y if model.classes else None
        if model.task != "generate":
            x = x[:count]
            plan = model.plan(options["plan"], options["steps"])
            given, found = self.complete(
                model, x, seed, y=y[:count] if model.classes else None, plan=plan,
                guidance=options["guidance"],
            )  # fmt: skip
            return {
                "PSNR, dB": metrics.psnr(found, x).item(),
                "PSNR of what was given, dB": metrics.psnr(given, x).item(),
            }
        drawn = self.sample(model, data.about, count, seed, 0, options)
        bound = model.bound(x, labels, seed=seed).mean().item()
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
