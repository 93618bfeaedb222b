"""Denoising diffusion on images: a U-Net, its loss, and sampling with any solver plan.

    q(x_t | x_0) = N(alpha_t x_0, sigma_t^2),  alpha_t^2 = alpha_bar_t,  sigma_t^2 = 1 - alpha_bar_t

Ho et al., "Denoising diffusion probabilistic models", 2020 (U-Net, loss, eq. 4 and 14); Nichol &
Dhariwal, "Improved DDPM", 2021 (cosine schedule); Dhariwal & Nichol, "Diffusion models beat GANs",
2021 (the scale-shift ResBlock); Ho & Salimans, "Classifier-free diffusion guidance", 2022; Saharia
et al., "Palette", 2022, and "SR3", 2021 (conditioning by channels); Dhariwal & Nichol, section 4
(guidance by a classifier's gradient). Letters: x (B, C, H, W) in
[-1, 1] inside, images in [0, 1] outside; t (B,) int; y (B,) class labels; eps the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast import schedulers
from genfast.models import _inputs
from genfast.models._seeds import sample_seeds
from genfast.models.process import NOISE, NoiseProcess
from genfast.models.unet import UNet, check_levels
from genfast.ops import _check
from genfast.ops._noise import Seed
from genfast.ops.diffusion import add_noise, denoising_loss
from genfast.ops.diffusion.loss import WEIGHTINGS
from genfast.ops.rng import rand

TASK = 3  # stream of a training sample's seed, beside `process`'s


# ---- conditioning by channels --------------------------------------------------------------------


def hole(u: Tensor, H: int, W: int) -> Tensor:
    """u (B, 4) uniform -> (B, 1, H, W), 0 in a box of a quarter to three quarters of each side,
    1 elsewhere: what is known."""
    h, w = (n * (0.25 + 0.5 * u[:, i]) for i, n in enumerate((H, W)))
    top, left = u[:, 2] * (H - h), u[:, 3] * (W - w)
    i = torch.arange(H, device=u.device) + 0.5
    j = torch.arange(W, device=u.device) + 0.5
    rows = (i >= top[:, None]) & (i < (top + h)[:, None])
    columns = (j >= left[:, None]) & (j < (left + w)[:, None])
    return 1.0 - (rows[:, :, None] & columns[:, None]).float()[:, None]


def shrink(x: Tensor, factor: int) -> Tensor:
    """Means of factor x factor places (B, C, H / factor, W / factor)."""
    return F.avg_pool2d(x, factor)


def enlarge(x: Tensor, factor: int) -> Tensor:
    return F.interpolate(x, scale_factor=float(factor), mode="bilinear")


# task -> extra input channels for C image channels, and their values in training from x0 in
# [-1, 1] and u (B, 4) uniform.
TASKS = {
    "generate": (lambda C: 0, lambda model, x0, u: None),
    "inpaint": (lambda C: C + 1, lambda model, x0, u: masked(x0, hole(u, *x0.shape[2:]))),
    "super-resolution": (
        lambda C: C, lambda model, x0, u: enlarge(shrink(x0, model.factor), model.factor),
    ),
}  # fmt: skip


def masked(x0: Tensor, known: Tensor) -> Tensor:
    known = known.to(x0.dtype)
    return torch.cat([x0 * known, known], 1)


# ---- guidance by a gradient ----------------------------------------------------------------------

# guide(x0 (B, C, H, W) in [-1, 1], index (B,) int64 of the images) -> ln p(wanted | x0), (B,)
Guide = Callable[[Tensor, Tensor], Tensor]
# prediction -> factor of grad ln p in the model's output: that of eps - sigma grad, in its letters.
_GUIDED = {
    "epsilon": lambda alpha, sigma: -sigma,
    "sample": lambda alpha, sigma: sigma**2 / alpha,
    "v_prediction": lambda alpha, sigma: -sigma / alpha,
}

# ---- the model -----------------------------------------------------------------------------------


class Diffusion(NoiseProcess):
    """A U-Net with its noise schedule.

    shape: (C, H, W); H and W divisible by 2^(levels - 1), and by factor for super-resolution.
    widths, blocks, attention, head_dim, dropout, classes: of the `UNet`. T, schedule, prediction:
    of `NoiseProcess`. weighting: of `genfast.denoising_loss`. label_dropout: share of training
    samples without their label, for guidance. task: a key of TASKS; factor: of super-resolution.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 28, 28),
        widths: tuple[int, ...] = (16, 32, 64),
        blocks: int = 1,
        attention: tuple[int, ...] = (),
        head_dim: int = 32,
        dropout: float = 0.0,
        classes: int = 0,
        T: int = 1000,
        schedule: str = "squaredcos_cap_v2",
        prediction: str = "epsilon",
        weighting: str = "none",
        label_dropout: float = 0.1,
        task: str = "generate",
        factor: int = 2,
    ):
        super().__init__(T, schedule, prediction)
        if task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
        self.shape = _inputs.image_shape(shape)
        check_levels(widths, attention)
        _check.counts(blocks=blocks, head_dim=head_dim, factor=factor)
        _check.choice("weighting", weighting, WEIGHTINGS[:-1])  # given: of tensors
        _check.integer("classes", classes, low=0)
        for name, share in (("dropout", dropout), ("label_dropout", label_dropout)):
            _check.number(name, share, low=0.0, high=1.0)
        self.config = {
            "shape": list(shape), "widths": list(widths), "blocks": blocks,
            "attention": list(attention), "head_dim": head_dim, "dropout": dropout,
            "classes": classes, "T": T, "schedule": schedule, "prediction": prediction,
            "weighting": weighting, "label_dropout": label_dropout, "task": task, "factor": factor,
        }  # fmt: skip
        C, H, W = self.shape
        halvings = 2 ** (len(widths) - 1)
        step = math.lcm(halvings, factor) if task == "super-resolution" else halvings
        if H % step or W % step:
            raise ValueError(
                f"shape: expected H and W divisible by {step} for {len(widths)} levels"
                f"{'' if step == halvings else f' and factor {factor}'}, got {H} x {W}; take "
                "fewer widths, or crop or pad the images"
            )
        self.classes, self.task, self.factor = classes, task, factor
        self.weighting, self.label_dropout = weighting, label_dropout
        extra = TASKS[task][0](C)
        self.unet = UNet(C + extra, C, tuple(widths), blocks, tuple(attention), classes, head_dim,
                         dropout)  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, c: Tensor | None = None):
        """The prediction m for x_t (B, C, H, W); c: the task's channels."""
        return self.unet(x if c is None else torch.cat([x, c], 1), t, y)

    def losses(self, x: Tensor, y: Tensor | None = None, *, seed: Seed) -> Tensor:
        """Of each sample, (B,). x in [0, 1]; y (B,) labels of a class-conditional model, `classes`
        for none; seed: int, or int64 (B,) of one per sample. Ho et al., alg. 1.
        """
        _inputs.images("x", x, self.shape)
        self._check_labels(y, len(x))
        x0 = 2 * x - 1
        x_t, t, alpha, sigma = self._noised(x0, seed)
        if y is not None and (drop := self._dropped(x, self.label_dropout, seed)) is not None:
            y = torch.where(drop, self.classes, y)
        u = rand(len(x), 4, seed=seed, stream=TASK, device=x.device)
        m = self(x_t, t, y, TASKS[self.task][1](self, x0, u))
        return denoising_loss(
            m, x0, alpha, sigma, seed=seed, stream=NOISE, prediction=self.prediction,
            weighting=self.weighting, reduction="none",
        )  # fmt: skip

    def _check_labels(self, y: Tensor | None, n: int) -> None:
        if (y is None) == bool(self.classes):
            want = f"labels in 0 ... {self.classes - 1}" if self.classes else "none"
            raise ValueError(f"y: expected {want}, got {'none' if y is None else 'labels'}")
        if y is not None:
            _inputs.labels("y", y, n, self.classes + 1)

    def _check_task(self, task: str, call: str) -> None:
        if self.task != task:
            raise ValueError(
                f"task: expected a model of task {task!r} for {call}, got one of {self.task!r}"
            )

    def plan(
        self, name: str = "ddpm", steps: int | None = None, **options
    ) -> schedulers.SolverPlan:
        """A solver plan on this model's schedule. steps: 1 ... T, default min(100, T). options: of
        the diffusers scheduler's config.

        The predicted x0 stays in [-1, 1] where the solver can keep it there, see PLANS; prefer
        prediction "v_prediction" for the others.
        """
        return self._plan(name, steps, 100, options)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        seed: int,
        start: int = 0,
        *,
        plan: schedulers.SolverPlan | None = None,
        y: Tensor | None = None,
        guidance: float = 1.0,
        c: Tensor | None = None,
        guide: Guide | None = None,
        guide_scale: float = 1.0,
    ) -> Tensor:
        """Images start ... start + n - 1 of `seed`, (n, C, H, W) in [0, 1]. The same bits for image
        i however the images are cut into calls (see TILE).

        plan: default `self.plan()`. y (n,): labels; default i % classes. guidance: scale w of
        uncond + w (cond - uncond), 1: none (Ho & Salimans 2022). c (n, ...): the task's channels,
        see `inpaint` and `super_resolve`. guide: eps - s sigma grad ln p for eps, s = guide_scale,
        with grad by x_t through the predicted x0 (Dhariwal & Nichol 2021, alg. 2; None: without);
        it must judge each image by itself. For plans that step from x_t and x0, such as ddpm: ddim
        takes eps before x0 is clamped, and what is left of the gradient's term then points away.
        """
        plan = self.plan() if plan is None else plan
        device = self.alpha.device
        if self.classes and y is None:
            y = torch.arange(start, start + max(n, 0), device=device) % self.classes
        self._check_sampling(n, plan, guidance)
        self._check_labels(y, n)
        _check.number("guide_scale", guide_scale)
        if guidance != 1 and not self.classes:
            raise ValueError("guidance: expected 1 for a model without classes, got "
                             f"{guidance}; train it on labels")  # fmt: skip
        if (c is None) != (self.task == "generate"):
            want = "none" if self.task == "generate" else f"those of {self.task}"
            raise ValueError(f"c: expected {want}; use sample, inpaint or super_resolve")
        if c is not None:
            _inputs.images("c", c, (TASKS[self.task][0](self.shape[0]), *self.shape[1:]))
            if len(c) != n:
                raise ValueError(f"c: expected a row for each of {n} images, got {len(c)}")

        def call(rows: Tensor, seeds: Tensor) -> Tensor:
            given = tuple(None if part is None else part[rows] for part in (y, c))
            model = self._denoiser(self._conditional, given, guidance)
            weights = None if guidance == 1 else (guidance, 1 - guidance)
            if guide is not None:
                weights = weights or (1.0,)
                index = rows + start
                model = self._guided(model, weights, lambda x0: guide(x0, index))
                weights = (*weights, guide_scale)
            x = self._solve(model, plan, self.shape, seeds, weights)
            return x.add_(1).mul_(0.5).clamp_(0, 1)

        if not n:
            return self.alpha.new_empty(0, *self.shape)
        return self._in_tiles(call, n, seed, start)

    def _conditional(self, x, t, y, c, drop):
        return self(x, t, y if drop is None else torch.where(drop, self.classes, y), c)

    def _guided(self, model, weights: tuple[float, ...], log_p: Callable[[Tensor], Tensor]):
        """model with one output more, the gradient's; weights: of the others."""

        def guided(x, t):
            at = torch.full((len(x),), round(t), device=x.device)
            alpha, sigma = self.alpha[at], self.sigma[at]
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                m = model(x, t)
                m = m if isinstance(m, tuple) else (m,)
                mixed = sum(w * part for w, part in zip(weights, m, strict=True))
                p = log_p(self._x0(x, mixed, alpha, sigma).clamp(-1, 1))
                (gradient,) = torch.autograd.grad(p.sum(), x)
            factor = _GUIDED[self.prediction](alpha, sigma)[:, None, None, None]
            return (*(part.detach() for part in m), factor * gradient)

        return guided

    def inpaint(self, image: Tensor, known: Tensor, seed: int, start: int = 0, **options) -> Tensor:
        """Draws what is unknown. image (n, C, H, W) in [0, 1]; known (n, 1, H, W): 1 where the
        image is given and kept, 0 where it is drawn. options: of `sample`. Palette, 2022."""
        self._check_task("inpaint", "inpaint")
        _inputs.images("image", image, self.shape)
        want = (len(image), 1, *self.shape[1:])
        if not isinstance(known, Tensor) or tuple(known.shape) != want:
            got = tuple(known.shape) if isinstance(known, Tensor) else type(known).__name__
            raise ValueError(f"known: expected a tensor of shape {want}, got {got}")
        known = known.to(image.dtype)
        c = masked(2 * image - 1, known)
        x = self.sample(len(image), seed, start, c=c, **options)
        return torch.where(known.bool(), image, x)

    def super_resolve(self, low: Tensor, seed: int, start: int = 0, **options) -> Tensor:
        """low (n, C, H / factor, W / factor) in [0, 1] -> (n, C, H, W). options: of `sample`. SR3,
        2021."""
        self._check_task("super-resolution", "super_resolve")
        C, H, W = self.shape
        _inputs.images("low", low, (C, H // self.factor, W // self.factor))
        c = enlarge(2 * low - 1, self.factor)
        return self.sample(len(low), seed, start, c=c, **options)

    @torch.no_grad()
    def bound(
        self, x: Tensor, y: Tensor | None = None, draws: int = 20, *, seed: int = 0
    ) -> Tensor:
        """Unbiased estimate of the variational upper bound on -log2 p(x) of each 8-bit sample, in
        bits per dimension, (B,): L_T + sum_t L_(t-1) with the posterior's variance, t stratified
        over `draws` draws (Ho et al. 2020, eq. 5; prediction "epsilon" or any other). x (B, C, H,
        W) in [0, 1]; y: the labels of a class-conditional model. Of task "generate"."""
        self._check_task("generate", "bound")
        _inputs.images("x", x, self.shape)
        self._check_labels(y, len(x))
        _check.counts(draws=draws)
        B, device = len(x), x.device
        seeds = sample_seeds(B, seed, device=device)
        x0 = 2 * x - 1
        alpha_bar = torch.from_numpy(self.noise.alpha_bar.copy()).to(device)
        before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        beta = 1 - alpha_bar / before
        variance = beta * (1 - before) / (1 - alpha_bar)
        variance[0] = variance[1]  # of t = 0, which the formula makes 0 (Ho et al. 2020)
        of_x0 = before.sqrt() * beta / (1 - alpha_bar)  # eq. 7
        total = torch.zeros(B, dtype=torch.float64, device=device)
        for k in range(draws):
            u = rand(B, seed=seeds, stream=2 * k, device=device)
            t = ((k + u) / draws * self.T).long().clamp_(max=self.T - 1)
            alpha, sigma = self.alpha[t], self.sigma[t]
            x_t = add_noise(x0, alpha, sigma, seed=seeds, stream=2 * k + 1)
            found = self._x0(x_t, self(x_t, t, y), alpha, sigma).clamp(-1, 1)
            squared = (found.double() - x0).square().flatten(1).sum(1)
            kl = 0.5 * of_x0[t].square() / variance[t] * squared
            first = -discrete_log_likelihood(x0, found, variance[0].sqrt().item())
            total += torch.where(t == 0, first.flatten(1).sum(1), kl) * self.T / draws
        last = alpha_bar[-1]
        l_T = 0.5 * (last * x0.double().square() - last - torch.log1p(-last)).flatten(1).sum(1)
        return (total + l_T) / (math.log(2) * x0[0].numel())


def discrete_log_likelihood(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """ln of the mass that N(mean, std^2) gives to x's 8-bit bin, the outer bins open; float64.
    Ho et al. 2020, eq. 13."""
    upper = torch.special.ndtr(((x - mean).double() + 1 / 255) / std)
    lower = torch.special.ndtr(((x - mean).double() - 1 / 255) / std)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp_min(1e-12).log()
