"""dit, latent-diffusion, prior: `genfast.models.DiTDiffusion`, `LatentDiffusion`, `DiffusionPrior`.

Parts that are trained before (an autoencoder, a CLIP) are read from their folders once; their
weights travel in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from genfast.models import CLIP, DiffusionPrior, DiTDiffusion, KLAutoencoder, LatentDiffusion
from genfast.models.hybrid.diffusion import CONDITIONS
from genfast.train import captions, images
from genfast.train.recipe import Batch, Option, Recipe, Split
from genfast.train.recipes.images import ImageRecipe
from genfast.train.recipes.parts import at_most, labels_of, part

_CLIP = Option("", "folder of a trained clip, for conditions text and image")
DECODERS = {"latent-diffusion": LatentDiffusion, "dit": DiTDiffusion}  # that can draw for a prior


class DiTRecipe(ImageRecipe):
    model = DiTDiffusion
    settings = {"epochs": 24, "batch_size": 32, "lr": 2e-3, "ema": 0.995, "clip": 1.0}
    options = {
        "patch": Option(4, "pixels (latents) along a patch's side"),
        "d": Option(96, "width of the transformer"),
        "layers": Option(4, "blocks"),
        "heads": Option(4, "attention heads"),
        "qk_norm": Option(False, "normalise queries and keys"),
        "condition": Option("class", ", ".join(CONDITIONS)),
        "clip_from": _CLIP,
        "timesteps": Option(1000, "T of the noise schedule"),
        "noise_schedule": Option("squaredcos_cap_v2", "a schedule of genfast.schedulers"),
        # After ten epochs on digits 66 % of the drawn were the asked-for one, of epsilon's 21 %.
        "prediction": Option("v_prediction", "epsilon, sample or v_prediction"),
        "learn_variance": Option(True, "the network also gives the variance"),
    }
    sample_options = {
        "plan": Option("ddpm", "a solver of genfast.models.process.PLANS"),
        "steps": Option(50, "of the solver; by default at most the timesteps trained"),
        "guidance": Option(1.5, "scale w of uncond + w (cond - uncond)"),
        "label": Option(-1, "draw this class; -1: one after another"),
        "prompt": Option("", "condition text: what to draw; several, separated by |, in turn; "
                         "none: a caption of each class in turn"),
    }  # fmt: skip

    def load(self, name: str, options: dict) -> Split:
        found = super().load(name, options)
        return captions.captioned(found, name) if name in captions.NAMES else found

    def build(self, about: dict, options: dict) -> DiTDiffusion:
        return self._build(about, options, self.model, {"shape": about["shape"]}, {})

    def _build(self, about, options, kind, first: dict, parts: dict) -> DiTDiffusion:
        o = dict(options)
        folder, condition = o.pop("clip_from"), o["condition"]
        clip = None
        if condition in ("text", "image"):
            if condition == "text":
                captions.table(about.get("captions", "one without"))
            parts = parts | {"clip": part("--clip-from", folder, {"clip": CLIP})}
            clip = parts["clip"].config
        elif folder:
            raise ValueError(f"--clip-from: expected none for condition {condition!r}")
        return kind(
            **first, clip=clip, classes=about["classes"] if condition == "class" else 0,
            T=o.pop("timesteps"), schedule=o.pop("noise_schedule"), **o,
        ).adopt(**parts)  # fmt: skip

    def loss(self, model: DiTDiffusion, batch: Batch, seeds: Tensor) -> Tensor:
        x, y, *given = batch
        c = {"class": lambda: y, "text": lambda: captions.draw(given[0], seeds)}
        return model.loss(x, c.get(model.condition, lambda: None)(), seed=seeds)

    def wanted(self, about: dict, count: int, start: int, options: dict) -> Tensor:
        """Captions (count, S) of samples start ... start + count - 1."""
        ids = captions.wanted(options["prompt"], about.get("captions", ""))
        return ids[torch.arange(start, start + count) % len(ids)]

    def sample_defaults(self, model: DiTDiffusion, given: dict) -> dict:
        return at_most(model.T, super().sample_defaults(model, given), "steps")

    def sample(self, model: DiTDiffusion, about, count, seed, start, options) -> Tensor:
        o = options
        c = labels_of(o["label"], model.classes if model.condition == "class" else 0, count)
        if o["prompt"] and model.condition != "text":
            raise ValueError(f"--prompt: expected none for condition {model.condition!r}")
        if model.condition == "text":
            c = self.wanted(about, count, start, o)
        elif model.condition == "image":
            raise ValueError("--from: this model is drawn from image embeddings; see --decoder of "
                             "prior")  # fmt: skip
        guidance = o["guidance"] if model.condition != "none" else 1.0
        return model.sample(count, seed, start, c=c, plan=model.plan(o["plan"], o["steps"]),
                            guidance=guidance)  # fmt: skip

    def variations(self, model: DiTDiffusion, data: Split, count: int, seed: int, options: dict):
        """Test images, their labels, and what condition "image" draws from their embeddings."""
        index = torch.arange(count) % len(data.test)
        x, y, *_ = data.test[index]
        z = model.clip.encode_image(x)
        plan = model.plan(options["plan"], options["steps"])
        return x, y, model.sample(count, seed, c=z, plan=plan, guidance=options["guidance"])

    def unread(self, model: DiTDiffusion) -> Sequence[str]:
        return ("label", "prompt") if model.condition == "image" else ()

    @torch.no_grad()
    def evaluate(self, model: DiTDiffusion, data: Split, seed, count, options) -> dict[str, float]:
        """asked-for class: share of drawn images that the classifier finds to be what was asked, by
        label; a prompt says no class."""
        asked = None
        if model.condition == "image":
            _, asked, drawn = self.variations(model, data, count, seed, options)
        else:
            drawn = self.sample(model, data.about, count, seed, 0, options)
            if model.condition != "none" and not options["prompt"]:
                classes = data.about["classes"]
                asked = labels_of(options["label"], classes, count)
                asked = torch.arange(count) % classes if asked is None else asked
        return self.judge(drawn, data, seed, asked)

    def finish(self, model: DiTDiffusion, data: Split, seed: int, out: Path) -> list[str]:
        options = self.sample_defaults(model, {})
        if model.condition == "image":
            x, _, drawn = self.variations(model, data, 30, seed, options)
            drawn = torch.stack([x, drawn], 1).unflatten(0, (3, 10)).transpose(1, 2).flatten(0, 2)
        else:
            drawn = self.sample(model, data.about, 60, seed, 0, options)
        images.save_png(out / "samples.png", images.grid(drawn, columns=10))
        return ["samples.png"]


class LatentDiffusionRecipe(DiTRecipe):
    model = LatentDiffusion
    options = {
        "autoencoder": Option("", "folder of a trained autoencoder"),
        **DiTRecipe.options,
        "patch": Option(1, "pixels (latents) along a patch's side"),
    }

    def build(self, about: dict, options: dict) -> LatentDiffusion:
        o = dict(options)
        stage = part("--autoencoder", o.pop("autoencoder"), {"autoencoder": KLAutoencoder})
        if list(stage.shape) != list(about["shape"]):
            raise ValueError(f"--autoencoder: expected one of {about['shape']} images, got "
                             f"{list(stage.shape)}")  # fmt: skip
        first = {"autoencoder": stage.config}
        return self._build(about, o, self.model, first, {"autoencoder": stage})


class PriorRecipe(DiTRecipe):
    model = DiffusionPrior
    data = tuple(captions.NAMES)
    settings = {"epochs": 8, "batch_size": 64, "lr": 1e-3, "ema": 0.99, "clip": 1.0}
    options = {
        "clip_from": Option("", "folder of a trained clip"),
        "d": Option(96, "width of the transformer"),
        "layers": Option(3, "blocks"),
        "heads": Option(4, "attention heads"),
        "timesteps": Option(1000, "T of the noise schedule"),
        "noise_schedule": Option("squaredcos_cap_v2", "a schedule of genfast.schedulers"),
    }
    sample_options = {
        "decoder": Option("", "folder of a latent-diffusion or dit of condition image, which draws "
                          "the images"),
        "prior_steps": Option(25, "of the prior; by default at most the timesteps trained"),
        "prior_guidance": Option(1.0, "scale of the prior's guidance"),
        "candidates": Option(2, "draws of the prior, of which the best is kept"),
        **{k: v for k, v in DiTRecipe.sample_options.items() if k != "label"},
    }  # fmt: skip

    def build(self, about: dict, options: dict) -> DiffusionPrior:
        o = dict(options)
        clip = part("--clip-from", o.pop("clip_from"), {"clip": CLIP})
        return DiffusionPrior(
            clip.config, T=o.pop("timesteps"), schedule=o.pop("noise_schedule"), **o
        ).adopt(clip)

    def loss(self, model: DiffusionPrior, batch: Batch, seeds: Tensor) -> Tensor:
        x, _, given = batch
        return model.loss(x, captions.draw(given, seeds), seed=seeds)

    def sample_defaults(self, model: DiffusionPrior, given: dict) -> dict:
        """steps are the decoder's."""
        found = Recipe.sample_defaults(self, model, given)
        if given.get("decoder") and "steps" not in given:
            found = at_most(self.decoder(given).T, found, "steps")
        return at_most(model.T, found, "prior_steps")

    def decoder(self, options: dict) -> DiTDiffusion:
        return part("--decoder", options["decoder"], DECODERS)

    def embeddings(self, model: DiffusionPrior, about, count, seed, start, options) -> Tensor:
        o = options
        return model.sample(
            count, seed, start, ids=self.wanted(about, count, start, o),
            plan=model.plan(o["prior_steps"]), guidance=o["prior_guidance"],
            candidates=o["candidates"],
        )  # fmt: skip

    def sample(self, model: DiffusionPrior, about, count, seed, start, options) -> Tensor:
        """Text -> embedding -> image."""
        decoder = self.decoder(options)
        if decoder.condition != "image":
            raise ValueError("--decoder: expected a model of condition image, got "
                             f"{decoder.condition!r}")  # fmt: skip
        ours, other = model.clip.state_dict(), decoder.clip.state_dict()
        if model.clip.config != decoder.clip.config or not all(
            torch.equal(ours[k], other[k]) for k in ours
        ):
            raise ValueError("--decoder: expected one trained with the prior's clip, got one of "
                             "another; train both with the same --clip-from")  # fmt: skip
        z = self.embeddings(model, about, count, seed, start, options)
        plan = decoder.plan(options["plan"], options["steps"])
        return decoder.sample(count, seed, start, c=z, plan=plan, guidance=options["guidance"])

    @torch.no_grad()
    def evaluate(self, model: DiffusionPrior, data: Split, seed, count, options):
        """cosine: of drawn embeddings to the mean embedding of the test images of their class;
        zero-shot: share of drawn embeddings that fit their own class's caption best. A prompt says
        no class."""
        x, y, given = data.test[torch.arange(len(data.test))]
        z_i = model.clip.encode_image(x)
        classes = data.about["classes"]
        means = torch.stack([z_i[y == k].mean(0) for k in range(classes)])
        found = {"cosine of the class's images": cosine_similarity(z_i, means[y]).mean().item()}
        asked = None
        if not options["prompt"]:
            asked = torch.arange(count) % classes
            z = self.embeddings(model, data.about, count, seed, 0, options)
            texts = captions.table(data.about["captions"], captions.HELD_BACK[:1])[:, -1]
            near = (z @ model.clip.encode_text(texts).T).argmax(1)
            found |= {
                "cosine to the class's images": cosine_similarity(z, means[asked]).mean().item(),
                "zero-shot accuracy of drawn embeddings": (near == asked).float().mean().item(),
            }
        if not options["decoder"]:
            return found
        drawn = self.sample(model, data.about, count, seed, 0, options)
        return found | self.judge(drawn, data, seed, asked)

    def finish(self, model: DiffusionPrior, data: Split, seed: int, out: Path) -> list[str]:
        return []  # images need a decoder
