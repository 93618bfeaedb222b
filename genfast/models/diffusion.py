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
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast import schedulers
from genfast.models._bare import CONV, LINEAR, bare
from genfast.models._seeds import in_tiles, sample_seeds
from genfast.nn._tables import Tables
from genfast.nn.convolution import Conv2d
from genfast.nn.linear import Linear
from genfast.nn.normalization import GroupNorm
from genfast.ops import _check
from genfast.ops._noise import Seed
from genfast.ops.attention import attention
from genfast.ops.convolution import residual_conv2d, upsampled_conv2d
from genfast.ops.diffusion import add_noise, denoising_loss
from genfast.ops.diffusion.loss import WEIGHTINGS
from genfast.ops.linear import linear
from genfast.ops.rng import rand, randn

# Images of one model call in `sample`, see `in_tiles`. 16 of 28 x 28 fill two cores; a tile that
# is only partly asked for costs as much as a full one.
TILE = 16
NOISE, TIME, DROP, TASK = range(4)  # streams of a training sample's seed
START, STEPS = 0, 1  # of a generated sample's: x_T; the solver's row k has STEPS + k


def timestep_embedding(t: Tensor, width: int, longest: float = 10_000.0) -> Tensor:
    """cos and sin of t at width / 2 frequencies from 1 to 1 / longest (Vaswani et al. 2017);
    t (B,) -> (B, width) float32."""
    half = width // 2
    ramp = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angle = t.float()[:, None] * torch.exp(-math.log(longest) * ramp)
    return torch.cat([angle.cos(), angle.sin()], 1)


class ResBlock(nn.Module):
    """norm, SiLU, conv; norm scaled and shifted by the embedding, SiLU, conv; plus the input.
    x (B, inputs, H, W), e (B, 2 outputs): `emb` of the embedding, which the U-Net makes of all its
    blocks at once."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float):
        super().__init__()
        self.norm1 = GroupNorm(groups(inputs), inputs, act="silu")
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.emb = Linear(embedding, 2 * outputs)
        self.norm2 = GroupNorm(groups(outputs), outputs, act="silu")
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.dropout(self.norm2(h, *e.chunk(2, 1)))  # scale and shift
        conv, skip = self.conv2, self.skip
        if not (bare(conv, CONV) and bare(skip, (*CONV, nn.Identity))):
            return conv(h) + skip(x)
        projection = () if isinstance(skip, nn.Identity) else (skip.weight, skip.bias)
        return residual_conv2d(h, x, conv.weight, conv.bias, *projection)


class AttentionBlock(nn.Module):
    """Self-attention over the H W places, plus the input."""

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.heads = max(channels // head_dim, 1)
        if channels % self.heads:
            raise ValueError(
                f"widths: expected multiples of {self.heads} heads where the U-Net attends, got "
                f"{channels}; take a multiple of head_dim = {head_dim}"
            )
        self.norm = GroupNorm(groups(channels), channels)
        self.qkv = Linear(channels, 3 * channels)
        self.out = zeroed(Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        tokens = self.norm(x).flatten(2).mT  # (B, H W, C)
        qkv = self.qkv(tokens).unflatten(-1, (3, self.heads, C // self.heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, H W, head_dim), a view
        h = attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(h).mT.unflatten(2, (H, W))


class Up(nn.Conv2d):
    """x (B, C, H, W) -> (B, C, 2 H, 2 W)."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return upsampled_conv2d(x, self.weight, self.bias)


def groups(channels: int) -> int:
    """32 as in the papers, fewer for few channels: at least 4 a group."""
    return math.gcd(32, channels // 4 or 1, channels)


# Of x_t, a model's output m, alpha and sigma.
_X0 = {
    "epsilon": lambda x, m, a, s: (x - s * m) / a,
    "sample": lambda x, m, a, s: m,
    "v_prediction": lambda x, m, a, s: a * x - s * m,
}


def check_process(T: int, prediction: str) -> None:
    """Of a model on a `noise_schedule`, where T = 1 has no posterior and flows no place."""
    _check.integer("T", T, low=2)
    _check.choice("prediction", prediction, _X0)


def check_levels(widths: tuple[int, ...], attention: tuple[int, ...]) -> None:
    if not widths or any(width < 2 or width % 2 for width in widths):
        raise ValueError(
            "widths: expected an even number of channels >= 2 for every level, such as 16,32,64, "
            f"got {','.join(map(str, widths)) or 'none'}"
        )
    if any(not 0 <= level < len(widths) for level in attention):
        raise ValueError(
            f"attention: expected levels in 0 ... {len(widths) - 1}, counted along widths, got "
            f"{','.join(map(str, attention))}"
        )


def zeroed(layer: nn.Module) -> nn.Module:
    """A block that starts as the identity (Goyal et al. 2017; Ho et al. 2020's last layer)."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class UNet(nn.Module):
    """x (B, inputs, H, W), t (B,), y (B,) or None -> (B, outputs, H, W).

    widths: channels of each level, halving H and W in between. blocks: ResBlocks a level (one more
    on the way up). attention: the levels, counted from 0, that attend, next to the middle, which
    always does. classes: y is in 0 ... classes, where `classes` itself means none given; 0: no y.
    """

    def __init__(
        self, inputs: int, outputs: int, widths: tuple[int, ...] = (32, 64, 64), blocks: int = 1,
        attention: tuple[int, ...] = (), classes: int = 0, head_dim: int = 32, dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        first, embedding = widths[0], 4 * widths[0]
        self.first = first
        self.time = nn.Sequential(Linear(first, embedding), nn.SiLU(), Linear(embedding, embedding))
        self.label = nn.Embedding(classes + 1, embedding) if classes else None
        self.enter = Conv2d(inputs, first, 3, padding=1)

        def block(c_in: int, c_out: int, level: int) -> nn.ModuleList:
            res = ResBlock(c_in, c_out, embedding, dropout)
            attends = level in attention
            return nn.ModuleList([res, AttentionBlock(c_out, head_dim)] if attends else [res])

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, c = [first], first
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.down.append(block(c, width, level))
                c = width
                skips.append(c)
            if level < len(widths) - 1:
                self.down.append(nn.ModuleList([nn.Conv2d(c, c, 3, stride=2, padding=1)]))
                skips.append(c)
        self.middle = nn.ModuleList([
            ResBlock(c, c, embedding, dropout), AttentionBlock(c, head_dim),
            ResBlock(c, c, embedding, dropout),
        ])  # fmt: skip
        for level in reversed(range(len(widths))):
            for i in range(blocks + 1):
                layers = block(c + skips.pop(), widths[level], level)
                c = widths[level]
                if i == blocks and level:
                    layers.append(Up(c))
                self.up.append(layers)
        self.leave = nn.Sequential(
            GroupNorm(groups(c), c, act="silu"),
            nn.Identity(),  # SiLU's place in old state dicts
            zeroed(Conv2d(c, outputs, 3, padding=1)),
        )
        # The convolutions' layout: x follows the weights. 10% of a training step and of a sampling
        # step on two cores, where each convolution would else reorder what it reads and writes.
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        e = self.time(timestep_embedding(t, self.first).to(x.dtype))
        if self.label is not None:
            e = e + self.label(y)
        of_block = iter(self._of_blocks(F.silu(e)))

        def through(layers: nn.ModuleList, h: Tensor) -> Tensor:
            for layer in layers:
                h = layer(h, next(of_block)) if isinstance(layer, ResBlock) else layer(h)
            return h

        hs = [self.enter(x)]
        for layers in self.down:
            hs.append(through(layers, hs[-1]))
        h = through(self.middle, hs[-1])
        for layers in self.up:
            h = through(layers, torch.cat([h, hs.pop()], 1))
        return self.leave(h)

    def _of_blocks(self, e: Tensor) -> Sequence[Tensor]:
        """`emb` of each ResBlock in turn, as one product: between the convolutions each small one
        took 50 us, 2.4 of the 92 ms of four sampling steps."""
        levels = (*self.down, self.middle, *self.up)
        embs = [m.emb for layers in levels for m in layers if isinstance(m, ResBlock)]
        if not all(bare(m, LINEAR) for m in embs):
            return [m(e) for m in embs]
        weight, bias = (torch.cat([getattr(m, n) for m in embs]) for n in ("weight", "bias"))
        return linear(e, weight, bias).split([m.out_features for m in embs], 1)


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

# Names for plans -> the diffusers scheduler whose steps they are, and options that keep the
# predicted x0 in [-1, 1]. Without them a small error of eps at the noisy end, where alpha is
# 5e-5, becomes an x0 of thousands: dpm-solver++ then draws white noise around the digits.
_CLIP = {"clip_sample": True}
_THRESHOLD = {"thresholding": True, "sample_max_value": 1.0}
PLANS = {
    "ddpm": ("DDPMScheduler", _CLIP),
    "ddim": ("DDIMScheduler", _CLIP),
    "heun": ("HeunDiscreteScheduler", _CLIP),
    "dpm-solver++": ("DPMSolverMultistepScheduler", _THRESHOLD),
    "unipc": ("UniPCMultistepScheduler", _THRESHOLD),
    "deis": ("DEISMultistepScheduler", _THRESHOLD),
    "pndm": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
}


class Diffusion(Tables):
    """A U-Net with its noise schedule.

    shape: (C, H, W); H and W divisible by 2^(levels - 1). widths, blocks, attention, head_dim,
    dropout, classes: of the `UNet`. T, schedule: of `schedulers.noise_schedule`. prediction,
    weighting: of `genfast.denoising_loss`. label_dropout: share of training samples without their
    label, for guidance. task: a key of TASKS; factor: of super-resolution.
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
        super().__init__()
        if task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
        check_levels(widths, attention)
        _check.counts(blocks=blocks, head_dim=head_dim, factor=factor)
        check_process(T, prediction)
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
        C, H, W = self.shape = tuple(shape)
        halvings = 2 ** (len(widths) - 1)
        step = math.lcm(halvings, factor) if task == "super-resolution" else halvings
        if H % step or W % step:
            raise ValueError(
                f"shape: expected H and W divisible by {step} for {len(widths)} levels"
                f"{'' if step == halvings else f' and factor {factor}'}, got {H} x {W}; take "
                "fewer widths, or crop or pad the images"
            )
        self.classes, self.T, self.task, self.factor = classes, T, task, factor
        self.prediction, self.weighting = prediction, weighting
        self.label_dropout = label_dropout
        extra = TASKS[task][0](C)
        self.unet = UNet(C + extra, C, tuple(widths), blocks, tuple(attention), classes, head_dim,
                         dropout)  # fmt: skip
        self.noise = schedulers.noise_schedule(schedule, T)
        alpha_bar = torch.from_numpy(self.noise.alpha_bar.copy())
        self.set_tables(alpha=alpha_bar.sqrt(), sigma=(1 - alpha_bar).sqrt())

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, c: Tensor | None = None):
        """The prediction m for x_t (B, C, H, W); c: the task's channels."""
        return self.unet(x if c is None else torch.cat([x, c], 1), t, y)

    def losses(self, x: Tensor, y: Tensor | None = None, *, seed: Seed) -> Tensor:
        """Of each sample, (B,). x in [0, 1]; y (B,) labels of a class-conditional model; seed: int,
        or int64 (B,) of one per sample. Ho et al., alg. 1.
        """
        self._check_labels(y)
        B, device = len(x), x.device
        x0 = 2 * x - 1
        t = (rand(B, seed=seed, stream=TIME, device=device) * self.T).long()
        if y is not None:
            dropped = rand(B, seed=seed, stream=DROP, device=device) < self.label_dropout
            y = torch.where(dropped & self.training, self.classes, y)
        u = rand(B, 4, seed=seed, stream=TASK, device=device)
        c = TASKS[self.task][1](self, x0, u)
        alpha, sigma = self.alpha[t], self.sigma[t]
        m = self(add_noise(x0, alpha, sigma, seed=seed, stream=NOISE), t, y, c)
        return denoising_loss(
            m, x0, alpha, sigma, seed=seed, stream=NOISE, prediction=self.prediction,
            weighting=self.weighting, reduction="none",
        )  # fmt: skip

    def loss(self, x: Tensor, y: Tensor | None = None, *, seed: Seed) -> Tensor:
        """Mean of `losses`, ()."""
        return self.losses(x, y, seed=seed).mean()

    def _check_labels(self, y: Tensor | None) -> None:
        if (y is None) == bool(self.classes):
            want = f"labels in 0 ... {self.classes - 1}" if self.classes else "none"
            raise ValueError(f"y: expected {want}, got {'none' if y is None else 'labels'}")

    def plan(
        self, name: str = "ddpm", steps: int | None = None, **options
    ) -> schedulers.SolverPlan:
        """A solver plan on this model's schedule. steps: 1 ... T, default min(100, T). options: of
        the diffusers scheduler's config.

        The predicted x0 stays in [-1, 1] where the solver can keep it there, see PLANS; prefer
        prediction "v_prediction" for the others.
        """
        if name not in PLANS:
            raise ValueError(f"plan: expected one of {', '.join(PLANS)}, got {name!r}")
        steps = min(100, self.T) if steps is None else steps
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps: expected an int in 1 ... {self.T}, got {steps}")
        scheduler, clipped = PLANS[name]
        config = {
            "num_train_timesteps": self.T, "prediction_type": self.prediction,
            "timestep_spacing": "trailing", **clipped, **options,
        }  # fmt: skip
        return schedulers.plan_from_config(
            scheduler, config, steps, alphas_cumprod=self.noise.alpha_bar
        )

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
        plan = plan or self.plan()
        device = self.alpha.device
        if self.classes and y is None:
            y = torch.arange(start, start + max(n, 0), device=device) % self.classes
        self._check_labels(y)
        _check.number("guidance", guidance)
        _check.number("guide_scale", guide_scale)
        if guidance != 1 and not self.classes:
            raise ValueError("guidance: expected 1 for a model without classes, got "
                             f"{guidance}; train it on labels")  # fmt: skip
        if (c is None) != (self.task == "generate"):
            want = "none" if self.task == "generate" else f"those of {self.task}"
            raise ValueError(f"c: expected {want}; use sample, inpaint or super_resolve")

        def of_tile(rows: Tensor | None, first: int) -> Tensor | None:
            """The tile's part of rows (n, ...); zeros for images that nobody asked for."""
            if rows is None:
                return None
            part = rows.new_zeros(TILE, *rows.shape[1:])
            low, high = max(first, start), min(first + TILE, start + n)
            part[low - first : high - first] = rows[low - start : high - start]
            return part

        def tile(first: int) -> Tensor:
            seeds = sample_seeds(TILE, seed, start=first, device=device)
            x_T = randn(TILE, *self.shape, seed=seeds, stream=START, device=device,
                        dtype=self.alpha.dtype)  # fmt: skip
            model = self._denoiser(of_tile(y, first), of_tile(c, first), guidance)
            weights = None if guidance == 1 else (guidance, 1 - guidance)
            if guide is not None:
                weights = weights or (1.0,)
                index = torch.arange(first, first + TILE, device=device)
                model = self._guided(model, weights, lambda x0: guide(x0, index))
                weights = (*weights, guide_scale)
            x = schedulers.sample(
                model, plan, plan.init_noise_sigma * x_T, seed=seeds, stream=STEPS,
                guidance=weights,
            )  # fmt: skip
            return x.add_(1).mul_(0.5).clamp_(0, 1)

        return in_tiles(tile, n, start, TILE)

    def _denoiser(self, y, c, guidance):
        """model(x, t) as `schedulers.sample` calls it; with guidance (cond, uncond) in one pass."""
        B = TILE
        if guidance != 1:
            y = torch.cat([y, torch.full_like(y, self.classes)])
            c = None if c is None else torch.cat([c, c])

        def model(x, t):
            if guidance == 1:
                return self(x, torch.full((B,), t, device=x.device), y, c)
            m = self(torch.cat([x, x]), torch.full((2 * B,), t, device=x.device), y, c)
            return m[:B], m[B:]

        return model

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
                p = log_p(self._x0(x, mixed, alpha, sigma))
                (gradient,) = torch.autograd.grad(p.sum(), x)
            factor = _GUIDED[self.prediction](alpha, sigma)[:, None, None, None]
            return (*(part.detach() for part in m), factor * gradient)

        return guided

    def inpaint(self, image: Tensor, known: Tensor, seed: int, start: int = 0, **options) -> Tensor:
        """Draws what is unknown. image (n, C, H, W) in [0, 1]; known (n, 1, H, W): 1 where the
        image is given and kept, 0 where it is drawn. options: of `sample`. Palette, 2022."""
        known = known.to(image.dtype)
        c = masked(2 * image - 1, known)
        x = self.sample(len(image), seed, start, c=c, **options)
        return torch.where(known.bool(), image, x)

    def super_resolve(self, low: Tensor, seed: int, start: int = 0, **options) -> Tensor:
        """low (n, C, H / factor, W / factor) in [0, 1] -> (n, C, H, W). options: of `sample`. SR3,
        2021."""
        C, H, W = self.shape
        want = (C, H // self.factor, W // self.factor)
        if tuple(low.shape[1:]) != want:
            raise ValueError(f"low: expected (n, {want}), got shape {tuple(low.shape)}")
        c = enlarge(2 * low - 1, self.factor)
        return self.sample(len(low), seed, start, c=c, **options)

    @torch.no_grad()
    def bound(
        self, x: Tensor, y: Tensor | None = None, draws: int = 20, *, seed: int = 0
    ) -> Tensor:
        """Unbiased estimate of the variational upper bound on -log2 p(x) of each 8-bit sample, in
        bits per dimension, (B,): L_T + sum_t L_(t-1) with the posterior's variance, t stratified
        over `draws` draws (Ho et al. 2020, eq. 5; prediction "epsilon" or any other)."""
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
            found = self._x0(x_t, self(x_t, t, y), alpha, sigma)
            squared = (found.double() - x0).square().flatten(1).sum(1)
            kl = 0.5 * of_x0[t].square() / variance[t] * squared
            first = -discrete_log_likelihood(x0, found, variance[0].sqrt().item())
            total += torch.where(t == 0, first.flatten(1).sum(1), kl) * self.T / draws
        last = alpha_bar[-1]
        l_T = 0.5 * (last * x0.double().square() - last - torch.log1p(-last)).flatten(1).sum(1)
        return (total + l_T) / (math.log(2) * x0[0].numel())

    def _x0(self, x: Tensor, m: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The predicted x0, clipped to [-1, 1]."""
        return predicted_x0(self.prediction, x, m, alpha, sigma).clamp(-1, 1)


def predicted_x0(prediction: str, x: Tensor, m: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x0 of x_t = alpha x0 + sigma eps and a model's output m; alpha, sigma (B,)."""
    return _X0[prediction](x, m, alpha[:, None, None, None], sigma[:, None, None, None])


def discrete_log_likelihood(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """ln of the mass that N(mean, std^2) gives to x's 8-bit bin, the outer bins open; float64.
    Ho et al. 2020, eq. 13."""
    upper = torch.special.ndtr(((x - mean).double() + 1 / 255) / std)
    lower = torch.special.ndtr(((x - mean).double() - 1 / 255) / std)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp_min(1e-12).log()
