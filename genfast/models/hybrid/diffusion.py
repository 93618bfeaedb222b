"""DiTDiffusion: a `DiT` with its noise schedule, loss and sampling, on pixels.

    loss = |m - target|^2 + lambda L_vlb          Nichol & Dhariwal, "Improved DDPM", 2021, eq. 16

with classifier-free guidance (Ho & Salimans 2022) on any of CONDITIONS. `latent.LatentDiffusion` is
the same on the latents of an autoencoder. Letters: those of `dit`; c: what a sample is drawn for,
as CONDITIONS says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genfast import schedulers
from genfast.models import _inputs
from genfast.models.hybrid.clip import CLIP
from genfast.models.hybrid.dit import (
    NOTHING,
    Conditions,
    DiT,
    learned_range,
    variational_bound,
)
from genfast.models.process import NOISE, NoiseProcess
from genfast.ops import _check
from genfast.ops._noise import Seed
from genfast.ops.diffusion import denoising_loss

POSTERIOR = 3  # stream of a training sample's seed, beside `process`'s


class Condition(NamedTuple):
    """c: in words, of `sample`. check: (model, c, n) refuses another. widths: (classes, CLIP or
    None) -> arguments of `DiT`. train: (model, x, c) -> `Conditions` of images x; draw: (model, c)
    -> those of `sample`."""

    c: str
    check: Callable
    widths: Callable
    train: Callable
    draw: Callable


def _text(model, ids) -> Conditions:
    tokens, seen, z = model.clip.text_tokens(ids)
    return Conditions(z=_unit(z), tokens=tokens, seen=seen)


def _unit(z: Tensor) -> Tensor:
    """Embeddings of length 1 -> elements of deviation 1, what a network likes to see."""
    return z * math.sqrt(z.shape[-1])


CONDITIONS = {
    "none": Condition(
        "none", lambda m, c, n: None, lambda n, clip: {}, lambda m, x, c: NOTHING,
        lambda m, c: NOTHING,
    ),
    "class": Condition(
        "labels (n,) int64", lambda m, c, n: _inputs.labels("c", c, n, m.classes + 1),
        lambda n, clip: {"classes": n},
        lambda m, x, c: Conditions(y=c), lambda m, c: Conditions(y=c),
    ),
    "text": Condition(
        "token ids (n, S) int64",
        lambda m, c, n: _inputs.ids("c", c, m.clip.config["vocab"], m.clip.context),
        lambda n, clip: {"z": clip.e, "tokens": clip.d},
        lambda m, x, c: _text(m, c), _text,
    ),
    "image": Condition(
        "CLIP's image embeddings (n, e)",
        lambda m, c, n: _inputs.images("c", c, (m.clip.e,), "make them with clip.encode_image"),
        lambda n, clip: {"z": clip.e},
        lambda m, x, c: Conditions(z=_unit(m.clip.encode_image(x))),
        lambda m, c: Conditions(z=_unit(c)),
    ),
}  # fmt: skip


def frozen(build: Callable[..., nn.Module], config: dict) -> nn.Module:
    """A part that is not trained: its weights travel in the checkpoint of the whole."""
    return build(**config).requires_grad_(False)


_PARTS = ("clip", "autoencoder")


def takes_over(name: str, own: nn.Module | None, part: nn.Module) -> None:
    """Loads the weights of `part`, a model built alike, into a frozen part."""
    if own is None:
        raise TypeError(f"{name}: no part of this model")
    if not isinstance(part, type(own)):
        raise TypeError(
            f"{name}: expected a {type(own).__name__}, got {type(part).__name__}; pass the model"
        )
    theirs, ours = (json.loads(json.dumps(m.config)) for m in (part, own))  # tuples are lists
    if theirs != ours:
        other = [key for key in ours if theirs.get(key) != ours[key]]
        raise ValueError(
            f"{name}: expected one of this model's config, got other {', '.join(other)}; build the "
            f"model with {name}={name}.config"
        )
    own.load_state_dict(part.state_dict())


class DiTDiffusion(NoiseProcess):
    """shape: (C, H, W) of the images. patch, d, layers, heads, qk_norm: of the `DiT`. condition: a
    key of CONDITIONS; classes: number of labels; clip: the config of a `CLIP`, for text and image,
    whose weights are put in with `adopt`. T, schedule, prediction: of `NoiseProcess`.
    learn_variance: the network also gives the variance (for the plan "ddpm"; other solvers leave it
    unread), trained by L_vlb with the weight `vlb`. condition_dropout: share of training samples
    without their condition, for guidance.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 28, 28),
        patch: int = 4,
        d: int = 96,
        layers: int = 4,
        heads: int = 4,
        qk_norm: bool = False,
        condition: str = "class",
        classes: int = 0,
        clip: dict | None = None,
        T: int = 1000,
        schedule: str = "squaredcos_cap_v2",
        prediction: str = "epsilon",
        learn_variance: bool = True,
        vlb: float = 0.001,
        condition_dropout: float = 0.1,
    ):
        super().__init__(T, schedule, prediction)
        self.shape = _inputs.image_shape(shape)
        if condition not in CONDITIONS:
            raise ValueError(
                f"condition: expected one of {', '.join(CONDITIONS)}, got {condition!r}"
            )
        if (clip is None) == (condition in ("text", "image")):
            want = "the config of a CLIP" if clip is None else "None"
            raise ValueError(f"clip: expected {want} for condition {condition!r}")
        if condition == "class" and classes < 1:
            raise ValueError(f"classes: expected an int >= 1 for condition 'class', got {classes}")
        _check.integer("classes", classes, low=0)
        if classes and condition != "class":
            raise ValueError(f"classes: expected 0 for condition {condition!r}, got {classes}")
        _check.counts(patch=patch, d=d, layers=layers, heads=heads)
        _check.number("vlb", vlb, low=0.0)
        _check.number("condition_dropout", condition_dropout, low=0.0, high=1.0)
        if learn_variance and prediction == "sample":
            # Its x0 is not exact at small t, where L_vlb divides the error by next to nothing: in
            # ten epochs on digits v, of [-1, 1], became 34 at t = 20, and x0 worse than at t = 300.
            raise ValueError("learn_variance: expected False for prediction 'sample', got True; "
                             "predict v or epsilon to learn it")  # fmt: skip
        self.config = {
            "shape": list(shape), "patch": patch, "d": d, "layers": layers, "heads": heads,
            "qk_norm": qk_norm, "condition": condition, "classes": classes, "clip": clip, "T": T,
            "schedule": schedule, "prediction": prediction, "learn_variance": learn_variance,
            "vlb": vlb, "condition_dropout": condition_dropout,
        }  # fmt: skip
        C = shape[0]
        self.classes = classes
        self.learn_variance, self.vlb = learn_variance, vlb
        self.condition, self.condition_dropout = condition, condition_dropout
        self.clip = frozen(CLIP, clip) if clip else None
        widths = CONDITIONS[condition].widths(classes, self.clip)
        self.dit = DiT(shape, C * (1 + learn_variance), patch, d, layers, heads, qk_norm=qk_norm,
                       **widths)  # fmt: skip

    def adopt(self, **parts: nn.Module) -> DiTDiffusion:
        """Takes the weights of trained parts (clip=..., autoencoder=...) over. Returns itself."""
        for name, part in parts.items():
            takes_over(name, getattr(self, name, None) if name in _PARTS else None, part)
        return self

    def _tables_of(self, alpha_bar: Tensor) -> dict[str, Tensor]:
        return super()._tables_of(alpha_bar) | learned_range(alpha_bar)

    # ---- what latents do otherwise --------------------------------------------------------------

    def _enter(self, x: Tensor, seed: Seed) -> Tensor:
        """Images in [0, 1] -> x0 of the process."""
        _inputs.images("x", x, self.shape)
        return 2 * x - 1

    def _leave(self, x0: Tensor) -> Tensor:
        """The inverse."""
        return x0.add(1).mul_(0.5).clamp_(0, 1)

    # ---- training -------------------------------------------------------------------------------

    def losses(self, x: Tensor, c: Tensor | None = None, *, seed: Seed) -> Tensor:
        """Of each sample, (B,). x (B, C, H, W) in [0, 1]; c: labels or token ids where the
        condition is class or text; seed: int, or int64 (B,) of one per sample."""
        with torch.no_grad():
            if self.condition != "image":
                self._check(c, len(x))
            given = CONDITIONS[self.condition].train(self, x, c)
            x0 = self._enter(x, seed)
        x_t, t, alpha, sigma = self._noised(x0, seed)
        drop = None
        if self.condition != "none":
            drop = self._dropped(x, self.condition_dropout, seed)
        m, v = self._split(self.dit(x_t, t, given, drop))
        loss = denoising_loss(m, x0, alpha, sigma, seed=seed, stream=NOISE,
                              prediction=self.prediction, reduction="none")  # fmt: skip
        if v is None:
            return loss
        error = self._x0(x_t, m.detach(), alpha, sigma) - x0
        bits = variational_bound(error, v, self.of_x0[t], self.low[t], self.high[t])
        return loss + self.vlb * self.T * bits  # T: of the sum over t, of which this is one term

    def _split(self, m: Tensor) -> tuple[Tensor, Tensor | None]:
        return m.chunk(2, 1) if self.learn_variance else (m, None)

    def _check(self, c: Tensor | None, n: int) -> None:
        condition = CONDITIONS[self.condition]
        tensor = isinstance(c, Tensor) and c.dim() > 0
        if (c is None) != (self.condition == "none") or (tensor and len(c) != n):
            got = f"shape {tuple(c.shape)}" if tensor else _check.describe(c)
            raise ValueError(f"c: expected {condition.c} of {n} samples, got {got}")
        condition.check(self, c, n)

    # ---- sampling -------------------------------------------------------------------------------

    def plan(
        self, name: str = "ddpm", steps: int | None = None, **options
    ) -> schedulers.SolverPlan:
        """A solver plan on this model's schedule. steps: 1 ... T, default min(50, T). options: of
        the diffusers scheduler's config."""
        if self.learn_variance and name == "ddpm":
            options = {"variance_type": "learned_range", **options}
        return self._plan(name, steps, 50, options)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        seed: int,
        start: int = 0,
        *,
        c: Tensor | None = None,
        plan: schedulers.SolverPlan | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """Images start ... start + n - 1 of `seed`, (n, C, H, W) in [0, 1]. The same bits for image
        i however the images are cut into calls (see TILE).

        c: a row per image, see CONDITIONS; labels default to i % classes. plan: default
        `self.plan()`. guidance: scale w of uncond + w (cond - uncond), 1: none.
        """
        plan, device = self.plan() if plan is None else plan, self.alpha.device
        self._check_sampling(n, plan, guidance)
        if self.condition == "class" and c is None:
            c = torch.arange(start, start + n, device=device) % self.classes
        self._check(c, n)
        if guidance != 1 and self.condition == "none":
            raise ValueError(
                f"guidance: expected 1 for a model without conditions, got {guidance}; train it "
                "on labels or captions"
            )

        # Only a plan with a learned variance reads the second half of the channels.
        reads = slice(None) if plan.steps[0].variance else slice(self.shape[0])

        def model(x, t, *given):
            *conditions, drop = given
            return self.dit(x, t, Conditions(*conditions), drop)[:, reads]

        def call(rows: Tensor, seeds: Tensor) -> Tensor:
            given = CONDITIONS[self.condition].draw(self, None if c is None else c[rows])
            return self._leave(self._solve(
                self._denoiser(model, given, guidance), plan, self.shape, seeds,
                None if guidance == 1 else guidance,
            ))  # fmt: skip

        if not n:
            return self._leave(self.alpha.new_empty(0, *self.shape))
        return self._in_tiles(call, n, seed, start)
