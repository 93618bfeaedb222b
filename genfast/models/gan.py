"""Generative adversarial networks: MLP, convolutional, Wasserstein; and CycleGAN between two sets.

    min_G max_D  E ln s(D(x)) + E ln(1 - s(D(G(z)))),  z ~ N(0, 1),  s the sigmoid

Goodfellow et al., "Generative adversarial nets", 2014 (eq. 1; the generator's own loss: section 3);
Radford et al., "DCGAN", 2016; Arjovsky et al., "Wasserstein GAN", 2017; Gulrajani et al., "Improved
training of Wasserstein GANs", 2017; Zhu et al., "CycleGAN", 2017. Letters: x (B, C, H, W) in
[-1, 1] inside, images in [0, 1] outside; z (B, z_dim); G the generator; D the discriminator or
critic, x -> (B,) or (B, patches). seed: int, or int64 (B,) of one per sample: sample b draws its
z, its noise and its place in a penalty from seed[b].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from genfast.models import _inputs
from genfast.models._seeds import evaluating, in_tiles, sample_seeds
from genfast.ops import _check
from genfast.ops._noise import Seed
from genfast.ops.rng import rand, randn

# Images of one call of the generator in `sample`, see `in_tiles`.
TILE = 64
LATENT, REAL, FAKE, MIX = range(4)  # streams of a sample's seed
LEAK = 0.2  # of LeakyReLU (Radford et al. 2016)


# ---- what the players lessen ---------------------------------------------------------------------


class Objective(NamedTuple):
    """D(real, fake), G(fake): losses of each output of the discriminator, of their shape. middle:
    the output between real and fake, for the discriminator's accuracy."""

    D: Callable[[Tensor, Tensor], Tensor]
    G: Callable[[Tensor], Tensor]
    middle: Callable[[Tensor, Tensor], Tensor | float]


def _cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    return F.softplus(-real) + F.softplus(fake)


OBJECTIVES: dict[str, Objective] = {
    "non-saturating": Objective(
        _cross_entropy, lambda fake: F.softplus(-fake), lambda real, fake: 0.0
    ),
    "minimax": Objective(_cross_entropy, lambda fake: -F.softplus(fake), lambda real, fake: 0.0),
    "least-squares": Objective(  # Mao et al. 2017, with a = 0, b = c = 1
        lambda real, fake: 0.5 * ((real - 1).square() + fake.square()),
        lambda fake: 0.5 * (fake - 1).square(), lambda real, fake: 0.5,
    ),
    "hinge": Objective(  # Miyato et al. 2018, eq. 16
        lambda real, fake: F.relu(1 - real) + F.relu(1 + fake), lambda fake: -fake,
        lambda real, fake: 0.0,
    ),
    "wasserstein": Objective(
        lambda real, fake: fake - real, lambda fake: -fake,
        lambda real, fake: 0.5 * (real.mean() + fake.mean()),
    ),
}  # fmt: skip


def slopes(D: nn.Module, x: Tensor) -> Tensor:
    """The gradient of each D(x) by its x, (B, C H W), which itself has a gradient."""
    x = x.detach().requires_grad_(True)
    (g,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    return g.flatten(1)


def gradient_penalty(D: nn.Module, x: Tensor, fake: Tensor, seed: Seed) -> Tensor:
    """Mean (|grad D| - 1)^2 at a random place between x and fake, (). Gulrajani et al., eq. 3."""
    u = rand(len(x), 1, 1, 1, seed=seed, stream=MIX, device=x.device, dtype=x.dtype)
    norm = slopes(D, torch.lerp(fake, x, u)).square().sum(1).add(1e-12).sqrt()
    return (norm - 1).square().mean()


def r1_penalty(D: nn.Module, x: Tensor) -> Tensor:
    """Mean |grad D(x)|^2 / 2, (). Mescheder et al., "Which training methods for GANs do actually
    converge?", 2018, eq. 9."""
    return 0.5 * slopes(D, x).square().sum(1).mean()


# ---- networks ------------------------------------------------------------------------------------


def generator(shape: tuple[int, int, int], z_dim: int, width: int, levels: int) -> nn.Sequential:
    """z -> x: a linear layer to the smallest places, then transposed convolutions of stride 2 with
    BatchNorm and ReLU (Radford et al. 2016)."""
    C, H, W = shape
    c, h, w = width << (levels - 1), H >> levels, W >> levels
    layers: list[nn.Module] = [
        nn.Linear(z_dim, c * h * w, bias=False), nn.Unflatten(1, (c, h, w)), nn.BatchNorm2d(c),
        nn.ReLU(),
    ]  # fmt: skip
    for _ in range(levels - 1):
        layers += [nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(c // 2)]
        layers += [nn.ReLU()]
        c //= 2
    return nn.Sequential(*layers, nn.ConvTranspose2d(c, C, 4, 2, 1), nn.Tanh())


def normed(layer: nn.Module, spectral: bool) -> nn.Module:
    """With spectral norm, if so wanted (Miyato et al. 2018)."""
    return parametrizations.spectral_norm(layer) if spectral else layer


def features(
    shape: tuple[int, int, int], width: int, levels: int, batch_norm: bool, spectral: bool
) -> nn.Sequential:
    """x -> (B, (width 2^(levels - 1)) H W / 4^levels): convolutions of stride 2 and LeakyReLU, with
    BatchNorm after all but the first (Radford et al. 2016), spectral norm (Miyato et al. 2018), or
    both."""
    layers, c = [], shape[0]
    for i in range(levels):
        batch = batch_norm and i > 0
        layers += [normed(nn.Conv2d(c, width << i, 4, 2, 1, bias=not batch), spectral)]
        c = width << i
        layers += [nn.BatchNorm2d(c), nn.LeakyReLU(LEAK)] if batch else [nn.LeakyReLU(LEAK)]
    return nn.Sequential(*layers, nn.Flatten())


def discriminator(
    shape: tuple[int, int, int], width: int, levels: int, batch_norm: bool, spectral: bool
) -> nn.Sequential:
    """`features` and a linear layer, x -> (B,)."""
    last = nn.Linear((width << (levels - 1)) * (shape[1] >> levels) * (shape[2] >> levels), 1)
    body = features(shape, width, levels, batch_norm, spectral)
    return nn.Sequential(*body, normed(last, spectral), nn.Flatten(0))


def narrow(model: nn.Module, std: float = 0.02) -> None:
    """Weights from N(0, std), those of BatchNorm around 1 (Radford et al. 2016, section 4)."""
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            # Under spectral norm the weight is what is left of the original one.
            given = getattr(m, "parametrizations", None)
            nn.init.normal_(given.weight.original if given else m.weight, 0.0, std)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, std)


def from_unit(x: Tensor, shape: tuple[int, ...], name: str = "x") -> Tensor:
    """Images in [0, 1] -> [-1, 1]."""
    _inputs.images(name, x, shape)
    return 2 * x - 1


# ---- the game of a generator and a discriminator -------------------------------------------------


class Adversarial(nn.Module):
    """Everything but the two networks: a subclass defines G, D and config.

    objective: a key of OBJECTIVES. penalty: weight of the `gradient_penalty`; r1: of the
    `r1_penalty`. noise: standard deviation of the instance noise on all that D sees, falling to 0
    over noise_steps steps (Sonderby et al., "Amortised MAP inference", 2017). clip_weight: the
    largest of D, 0: none (Arjovsky et al. 2017).
    """

    G: nn.Module
    D: nn.Module

    def __init__(
        self, shape: tuple[int, int, int], z_dim: int, objective: str, penalty: float = 0.0,
        r1: float = 0.0, noise: float = 0.0, noise_steps: int = 1000, clip_weight: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        if objective not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise ValueError(f"objective: expected one of {known}, got {objective!r}")
        _check.counts(z_dim=z_dim, noise_steps=noise_steps)
        _inputs.image_shape(shape)
        numbers = {"penalty": penalty, "r1": r1, "noise": noise, "clip_weight": clip_weight}
        for name, value in numbers.items():
            _check.number(name, value, low=0.0)
        self.x_shape, self.z_dim, self.objective = tuple(shape), z_dim, objective
        self.penalty, self.r1, self.clip_weight = penalty, r1, clip_weight
        self.noise, self.noise_steps = noise, noise_steps

    def latent(self, n: int, seed: Seed) -> Tensor:
        """z (n, z_dim)."""
        if n < 1:
            raise ValueError(f"n: expected at least one sample in a batch, got {n}")
        weight = next(self.G.parameters())
        z = randn(n, self.z_dim, seed=seed, stream=LATENT, device=weight.device)
        return z.to(weight.dtype)

    def forward(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1]."""
        if z.dim() != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"z: expected (B, {self.z_dim}), got shape {tuple(z.shape)}")
        return (self.G(z) + 1) * 0.5

    def fake(self, z: Tensor) -> Tensor:
        """G(z) in z's dtype, also under autocast."""
        return self.G(z).to(z.dtype)

    def judged(self, x: Tensor) -> Tensor:
        """D(x) likewise."""
        return self.D(x).to(x.dtype)

    def noisy(self, x: Tensor, seed: Seed, stream: int, step: int) -> Tensor:
        """x with the instance noise of a step."""
        sigma = self.noise * max(0.0, 1 - step / self.noise_steps)
        if sigma == 0:
            return x
        return x + sigma * randn(x.shape, seed=seed, stream=stream, device=x.device, dtype=x.dtype)

    def d_loss(self, x: Tensor, *, seed: Seed, step: int = 0) -> Tensor:
        """Of the discriminator on images x (B, C, H, W) in [0, 1], mean over the batch, (). step:
        of the training, for the instance noise."""
        x = from_unit(x, self.x_shape)
        with torch.no_grad():
            fake = self.fake(self.latent(len(x), seed))
        x, fake = self.noisy(x, seed, REAL, step), self.noisy(fake, seed, FAKE, step)
        loss = OBJECTIVES[self.objective].D(self.judged(x), self.judged(fake)).mean()
        return loss + self.penalties(x, [fake], seed)

    def penalties(self, x: Tensor, fakes: Sequence[Tensor], seed: Seed) -> Tensor | float:
        """`gradient_penalty` (the mean over kinds of fakes) and `r1_penalty` by their weights, ();
        0 without."""
        found = 0.0
        if self.penalty:
            each = (gradient_penalty(self.D, x, fake, seed) for fake in fakes)
            found = found + self.penalty / len(fakes) * sum(each)
        if self.r1:
            found = found + self.r1 * r1_penalty(self.D, x)
        return found

    def g_loss(self, n: int, *, seed: Seed, step: int = 0) -> Tensor:
        """Of the generator on n samples of its own, mean, ()."""
        fake = self.noisy(self.fake(self.latent(n, seed)), seed, FAKE, step)
        return OBJECTIVES[self.objective].G(self.judged(fake)).mean()

    @torch.no_grad()
    def clip_weights(self) -> None:
        """After each step of the critic (Arjovsky et al. 2017, alg. 1)."""
        if self.clip_weight:
            for p in self.D.parameters():
                p.clamp_(-self.clip_weight, self.clip_weight)

    @torch.no_grad()
    def accuracy(self, x: Tensor, fake: Tensor) -> tuple[float, float]:
        """Shares of x and of fake (B, C, H, W) in [0, 1] that D takes for what they are. As in
        training, BatchNorm takes the statistics of each batch. 1/2 both: D can only guess."""
        D = copy.deepcopy(self.D).train()
        real, fake = (D(from_unit(images, self.x_shape)) for images in (x, fake))
        middle = OBJECTIVES[self.objective].middle(real, fake)
        return (real > middle).float().mean().item(), (fake <= middle).float().mean().item()

    @torch.no_grad()
    def sample(self, n: int, seed: int, start: int = 0) -> Tensor:
        """Images start ... start + n - 1 of `seed`, (n, C, H, W) in [0, 1]. The same bits for image
        i however the images are cut into calls (see TILE); BatchNorm keeps its running statistics.
        """
        device = next(self.G.parameters()).device

        def tile(first: int) -> Tensor:
            return self(self.latent(TILE, sample_seeds(TILE, seed, start=first, device=device)))

        with evaluating(self):
            return in_tiles(tile, n, start, TILE)


class GAN(Adversarial):
    """Linear layers z_dim - h_dim - C H W with ReLU, and back to 1 with LeakyReLU. Goodfellow et
    al. 2014, whose experiments on MNIST had such networks."""

    def __init__(
        self, shape: tuple[int, int, int] = (1, 28, 28), z_dim: int = 100, h_dim: int = 256,
        objective: str = "non-saturating", spectral_norm: bool = False, **penalties,
    ):  # fmt: skip
        super().__init__(shape, z_dim, objective, **penalties)
        _check.counts(h_dim=h_dim)
        self.config = {
            "shape": list(shape), "z_dim": z_dim, "h_dim": h_dim, "objective": objective,
            "spectral_norm": spectral_norm, **penalties,
        }  # fmt: skip
        x_dim = math.prod(shape)
        self.G = nn.Sequential(
            nn.Linear(z_dim, h_dim), nn.ReLU(), nn.Linear(h_dim, x_dim), nn.Tanh(),
            nn.Unflatten(1, tuple(shape)),
        )  # fmt: skip
        self.D = nn.Sequential(
            nn.Flatten(), normed(nn.Linear(x_dim, h_dim), spectral_norm), nn.LeakyReLU(LEAK),
            normed(nn.Linear(h_dim, 1), spectral_norm), nn.Flatten(0),
        )  # fmt: skip


class DCGAN(Adversarial):
    """`generator` and `discriminator` with BatchNorm in both, in the discriminator's if batch_norm,
    and with spectral norm if spectral_norm (Miyato et al. 2018). Radford et al. 2016; width:
    channels of the discriminator's first convolution; levels: halvings of H and W, 2 for 28 x 28
    where the paper has 4 for 64 x 64."""

    def __init__(
        self, shape: tuple[int, int, int] = (1, 28, 28), z_dim: int = 100, width: int = 32,
        levels: int = 2, objective: str = "non-saturating", batch_norm: bool = True,
        spectral_norm: bool = False, **penalties,
    ):  # fmt: skip
        _check.counts(levels=levels, width=width)
        super().__init__(_inputs.image_shape(shape, levels), z_dim, objective, **penalties)
        self.config = {
            "shape": list(shape), "z_dim": z_dim, "width": width, "levels": levels,
            "objective": objective, "batch_norm": batch_norm, "spectral_norm": spectral_norm,
            **penalties,
        }  # fmt: skip
        self.G = generator(self.x_shape, z_dim, width, levels)
        self.D = discriminator(self.x_shape, width, levels, batch_norm, spectral_norm)
        # Without BatchNorm to widen them again, N(0, 0.02) leaves a discriminator nearly flat.
        narrow(self if batch_norm else self.G)


class WGAN(DCGAN):
    """DCGAN's networks with a critic whose weights are clipped. Arjovsky et al. 2017."""

    def __init__(
        self, shape: tuple[int, int, int] = (1, 28, 28), z_dim: int = 100, width: int = 32,
        levels: int = 2, clip_weight: float = 0.01,
    ):  # fmt: skip
        super().__init__(shape, z_dim, width, levels, "wasserstein", clip_weight=clip_weight)
        self.config = {
            "shape": list(shape), "z_dim": z_dim, "width": width, "levels": levels,
            "clip_weight": clip_weight,
        }  # fmt: skip


class WGANGP(DCGAN):
    """A critic without BatchNorm, whose gradient is held near 1. Gulrajani et al. 2017."""

    def __init__(
        self, shape: tuple[int, int, int] = (1, 28, 28), z_dim: int = 100, width: int = 32,
        levels: int = 2, penalty: float = 10.0,
    ):  # fmt: skip
        super().__init__(shape, z_dim, width, levels, "wasserstein", False, penalty=penalty)
        self.config = {
            "shape": list(shape), "z_dim": z_dim, "width": width, "levels": levels,
            "penalty": penalty,
        }  # fmt: skip


# ---- CycleGAN ------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Reflection, convolution, InstanceNorm, ReLU; the same without ReLU; plus the input."""

    def __init__(self, c: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(c, c, 3, bias=False), nn.InstanceNorm2d(c), nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(c, c, 3, bias=False), nn.InstanceNorm2d(c),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def translator(channels: int, width: int, blocks: int) -> nn.Sequential:
    """c7s1-k, d2k, d4k, R4k x blocks, u2k, uk, c7s1-C in the words of Zhu et al., section 7.2."""
    layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(channels, width, 7, bias=False)]
    layers += [nn.InstanceNorm2d(width), nn.ReLU()]
    for c in (width, 2 * width):
        layers += [nn.Conv2d(c, 2 * c, 3, 2, 1, bias=False), nn.InstanceNorm2d(2 * c), nn.ReLU()]
    layers += [ResidualBlock(4 * width) for _ in range(blocks)]
    for c in (4 * width, 2 * width):
        layers += [nn.ConvTranspose2d(c, c // 2, 3, 2, 1, output_padding=1, bias=False)]
        layers += [nn.InstanceNorm2d(c // 2), nn.ReLU()]
    layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, channels, 7), nn.Tanh()]
    return nn.Sequential(*layers)


def patch_discriminator(channels: int, width: int) -> nn.Sequential:
    """x -> (B, patches): one output for each of the overlapping patches of 22 x 22. Ck, C2k and a
    convolution to 1: the paper's 70 x 70 patches have two more layers."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(LEAK),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.InstanceNorm2d(2 * width),
        nn.LeakyReLU(LEAK), nn.Conv2d(2 * width, 1, 4, 1, 1), nn.Flatten(),
    )  # fmt: skip


class CycleGAN(nn.Module):
    """G: X -> Y and F: Y -> X from unpaired images, with D_X, D_Y. Zhu et al. 2017.

    width: channels of a generator's first convolution; d_width: of a discriminator's; blocks: the
    residual ones. cycle: weight lambda of |F(G(x)) - x| + |G(F(y)) - y| (eq. 2); identity: of
    |G(y) - y| + |F(x) - x|, times lambda (section 5.2). The adversarial losses are least squares.
    Without noise: an image has one translation.
    """

    def __init__(
        self, shape: tuple[int, int, int] = (1, 28, 28), width: int = 8, d_width: int = 16,
        blocks: int = 3, cycle: float = 10.0, identity: float = 0.5,
    ):  # fmt: skip
        super().__init__()
        _check.counts(width=width, d_width=d_width, blocks=blocks)
        # InstanceNorm needs more than one place
        self.x_shape = _inputs.image_shape(shape, 2, least=8)
        for name, value in {"cycle": cycle, "identity": identity}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        self.config = {
            "shape": list(shape), "width": width, "d_width": d_width, "blocks": blocks,
            "cycle": cycle, "identity": identity,
        }  # fmt: skip
        self.cycle, self.identity = cycle, identity
        self.objective = "least-squares"
        C = shape[0]
        self.G, self.F = translator(C, width, blocks), translator(C, width, blocks)
        self.D_X, self.D_Y = patch_discriminator(C, d_width), patch_discriminator(C, d_width)
        narrow(self)

    def _pair(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for name, images in {"x": x, "y": y}.items():
            _inputs.some(name, images)
        return from_unit(x, self.x_shape, "x"), from_unit(y, self.x_shape, "y")

    def g_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Of both generators on images x of X and y of Y (B, C, H, W) in [0, 1], no pairs; mean,
        (). Eq. 3."""
        x, y = self._pair(x, y)
        Gx, Fy = self.G(x).to(x.dtype), self.F(y).to(y.dtype)
        won = OBJECTIVES[self.objective].G
        loss = won(self.D_Y(Gx)).mean() + won(self.D_X(Fy)).mean()
        back = F.l1_loss(self.F(Gx), x) + F.l1_loss(self.G(Fy), y)
        loss = loss + self.cycle * back
        if self.identity:
            same = F.l1_loss(self.G(y), y) + F.l1_loss(self.F(x), x)
            loss = loss + self.cycle * self.identity * same
        return loss

    def d_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Of both discriminators, mean, ()."""
        x, y = self._pair(x, y)
        with torch.no_grad():
            Gx, Fy = self.G(x).to(x.dtype), self.F(y).to(y.dtype)
        told = OBJECTIVES[self.objective].D
        return told(self.D_X(x), self.D_X(Fy)).mean() + told(self.D_Y(y), self.D_Y(Gx)).mean()

    def forward(self, x: Tensor, to: str = "Y") -> Tensor:
        """Images (B, C, H, W) in [0, 1] of X as ones of Y; to "X": of Y as ones of X."""
        if to not in ("X", "Y"):
            raise ValueError(f"to: expected X or Y, got {to!r}")
        translate = self.G if to == "Y" else self.F
        return (translate(from_unit(x, self.x_shape)) + 1) * 0.5

    @torch.no_grad()
    def translate(self, x: Tensor, to: str = "Y") -> Tensor:
        """`forward` with the same bits for an image in any batch: every call has TILE images."""
        n = len(x)

        def tile(first: int) -> Tensor:
            part = x.new_zeros(TILE, *x.shape[1:])
            part[: n - first] = x[first : first + TILE]
            return self(part, to)

        return in_tiles(tile, n, 0, TILE)

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Shares of the patches of real and of translated images that D_X and D_Y take for what
        they are; x, y: of X and of Y."""
        fake_x, fake_y = self.translate(y, "X"), self.translate(x, "Y")
        (x, y), (fake_x, fake_y) = self._pair(x, y), self._pair(fake_x, fake_y)
        real = torch.cat([self.D_X(x), self.D_Y(y)])
        fake = torch.cat([self.D_X(fake_x), self.D_Y(fake_y)])
        middle = OBJECTIVES[self.objective].middle(real, fake)
        return (real > middle).float().mean().item(), (fake <= middle).float().mean().item()
