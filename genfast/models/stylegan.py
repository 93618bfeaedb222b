"""StyleGAN2: mapping network, modulated convolutions, noise of its own for every sample.

    w = f(z),  s = A(w),  w'_ijk = s_i w_ijk,  w''_ijk = w'_ijk / sqrt(sum_ik w'_ijk^2 + eps)
    D: E[softplus(D(G(z))) + softplus(-D(x))] + gamma/2 E[|grad_x D(x)|^2]                      (R1)
    G: E[softplus(-D(G(z)))] + E[(|J_w^T y| - a)^2],  y ~ N(0, I)                     (path length)

Karras et al., "Analyzing and improving the image quality of StyleGAN", 2020 (2.2: modulation and
demodulation, 3.1: lazy regularisation, 3.2: path length, 4.1: skip generator, residual
discriminator); Karras et al., "A style-based generator architecture", 2019 (mixing, truncation);
Mescheder et al. 2018 (R1).

Letters: z (B, z_dim), w (B, w_dim), ws (B, layers, w_dim): the w of each layer; x (B, C, H, W) in
[-1, 1] inside the networks, in [0, 1] outside. seeds (B,) int64: sample b draws z and the noise of
every layer from seeds[b], so it does not depend on the batch.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast.models import _inputs
from genfast.models._seeds import in_tiles, sample_seeds
from genfast.models.gan import from_unit
from genfast.nn.filtering import BiasAct, Downsample2d, Upsample2d
from genfast.ops import _check
from genfast.ops.filtering import bias_act, upfirdn2d
from genfast.ops.rng import rand, randn

TILE = 16  # images of one call of `sample`, see `in_tiles`
# Streams of a sample's seed; layer l of the synthesis draws its noise from LAYERS + l.
Z, Z_MIX, MIX, PATH, LAYERS = 0, 1, 2, 3, 16


class Dense(nn.Module):
    """A linear layer of equalized learning rate (Karras et al. 2018, 4.1), bias and activation.

    (B, n_in) -> (B, n_out). lr: multiple of the learning rate.
    """

    def __init__(self, n_in: int, n_out: int, act: str = "linear", lr: float = 1.0, bias=0.0):
        super().__init__()
        self.act, self.lr, self.gain = act, lr, lr / math.sqrt(n_in)
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / lr)
        self.bias = nn.Parameter(torch.full((n_out,), bias / lr))

    def forward(self, x: Tensor) -> Tensor:
        return bias_act(F.linear(x, self.weight * self.gain), self.bias * self.lr, act=self.act)


class Conv(nn.Module):
    """A k x k convolution of equalized learning rate; down: half the size, filtered first."""

    def __init__(self, n_in: int, n_out: int, k: int, act: str | None = "lrelu", down=False):
        super().__init__()
        self.gain, self.down = 1 / math.sqrt(n_in * k * k), down
        self.weight = nn.Parameter(torch.randn(n_out, n_in, k, k))
        self.act = BiasAct(n_out, act) if act else None
        if down:
            self.resample = Downsample2d()

    def forward(self, x: Tensor) -> Tensor:
        weight, k = self.weight * self.gain, self.weight.shape[-1]
        if self.down and k == 1:
            x = F.conv2d(self.resample(x), weight)
        elif self.down:  # one row and column more than `Downsample2d`, which the stride drops
            x = F.conv2d(upfirdn2d(x, self.resample.f, padding=(2, 2)), weight, stride=2)
        else:
            x = F.conv2d(x, weight, padding=k // 2)
        return x if self.act is None else self.act(x)


class ModulatedConv(nn.Module):
    """The weights scaled by the style along their inputs, and demodulated along their outputs.

    Scaling x by s before, and the result by 1 / sqrt(sum (s w)^2 + eps) after, a convolution that
    all samples share is the same and needs no group a sample (Karras et al. 2020, 2.2). up: double
    the size, by a transposed convolution and the filter.
    """

    def __init__(
        self, n_in: int, n_out: int, k: int, w_dim: int, *, demodulate: bool = True, up=False
    ):
        super().__init__()
        self.demodulate, self.up, self.gain = demodulate, up, 1 / math.sqrt(n_in * k * k)
        self.weight = nn.Parameter(torch.randn(n_out, n_in, k, k))
        self.affine = Dense(w_dim, n_in, bias=1.0)
        if up:
            self.resample = Upsample2d()

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        s, weight, k = self.affine(w), self.weight * self.gain, self.weight.shape[-1]
        x = x * s[:, :, None, None]
        if self.up:
            x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
            x = upfirdn2d(x, self.resample.f, padding=1, gain=4.0)
        else:
            x = F.conv2d(x, weight, padding=k // 2)
        if self.demodulate:
            d = (F.linear(s.square(), weight.square().sum((2, 3))) + 1e-8).rsqrt()
            x = x * d[:, :, None, None]
        return x


class StyledConv(nn.Module):
    """A modulated 3 x 3 convolution, the noise of its layer, bias and leaky ReLU."""

    def __init__(self, n_in: int, n_out: int, w_dim: int, layer: int, up: bool = False):
        super().__init__()
        self.conv = ModulatedConv(n_in, n_out, 3, w_dim, up=up)
        self.act = BiasAct(n_out, noise=True, stream=LAYERS + layer)

    def forward(self, x: Tensor, w: Tensor, seeds: Tensor) -> Tensor:
        return self.act(self.conv(x, w), seed=seeds)


class Mapping(nn.Module):
    """w = f(z): z scaled to length sqrt(z_dim), then layers of leaky ReLU that learn slowly."""

    def __init__(self, z_dim: int, w_dim: int, layers: int, lr: float = 0.01):
        super().__init__()
        sizes = [z_dim] + [w_dim] * layers
        self.layers = nn.Sequential(
            *(Dense(a, b, "lrelu", lr) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        )
        self.register_buffer("w_avg", torch.zeros(w_dim))  # of training: the centre of truncation

    def forward(self, z: Tensor) -> Tensor:
        w = self.layers(z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt())
        return w.to(self.w_avg.dtype)  # of autocast's 16 bit, in which a mean would stand still


class Synthesis(nn.Module):
    """Images of styles: a learned constant, two styled convolutions a size (one at the first), and
    the sum of what each size says in pixels (skip generator)."""

    def __init__(self, channels: int, sizes: list[tuple[int, int]], widths: list[int], w_dim: int):
        super().__init__()
        self.constant = nn.Parameter(torch.randn(1, widths[0], *sizes[0]))
        self.convs, self.to_pixels = nn.ModuleList(), nn.ModuleList()
        self.biases = nn.ParameterList()
        self.upsample = Upsample2d()
        for level, width in enumerate(widths):
            before = widths[max(level - 1, 0)]
            if level:
                self.convs.append(StyledConv(before, width, w_dim, len(self.convs), up=True))
            self.convs.append(StyledConv(width, width, w_dim, len(self.convs)))
            self.to_pixels.append(ModulatedConv(width, channels, 1, w_dim, demodulate=False))
            self.biases.append(nn.Parameter(torch.zeros(channels)))
        self.layers = len(self.convs) + 1  # the last one's pixels have a w of their own

    def forward(self, ws: Tensor, seeds: Tensor) -> Tensor:
        """ws: (B, layers, w_dim); seeds: (B,) -> (B, C, H, W), about [-1, 1]."""
        x, image = self.constant.expand(len(ws), -1, -1, -1), None
        used = 0
        for level, (to_pixels, bias) in enumerate(zip(self.to_pixels, self.biases, strict=True)):
            for _ in range(2 if level else 1):
                x = self.convs[used](x, ws[:, used], seeds)
                used += 1
            y = bias_act(to_pixels(x, ws[:, used]), bias)
            image = y if image is None else y + self.upsample(image)
        return image


class Generator(nn.Module):
    """Mapping and synthesis."""

    def __init__(self, shape, sizes, widths, z_dim: int, w_dim: int, mapping_layers: int):
        super().__init__()
        self.z_dim = z_dim
        self.mapping = Mapping(z_dim, w_dim, mapping_layers)
        self.synthesis = Synthesis(shape[0], sizes, widths, w_dim)

    def styles(self, seeds: Tensor, mixing: float = 0.0) -> Tensor:
        """ws (B, layers, w_dim) of seeds. mixing: share of samples whose later layers, from a
        random one on, take the w of another z (Karras et al. 2019, 3.1)."""
        draw = partial(randn, (len(seeds), self.z_dim), seed=seeds, device=seeds.device)
        dtype = self.mapping.w_avg.dtype
        w = self.mapping(draw(stream=Z).to(dtype))
        layers = self.synthesis.layers
        ws = w[:, None].expand(-1, layers, -1)
        if mixing:
            other = self.mapping(draw(stream=Z_MIX).to(dtype))
            u = rand(len(seeds), 2, seed=seeds, stream=MIX, device=seeds.device)
            cut = torch.where(u[:, 0] < mixing, 1 + (u[:, 1] * (layers - 1)).floor(), layers)
            first = torch.arange(layers, device=seeds.device) < cut[:, None]
            ws = torch.where(first[:, :, None], ws, other[:, None])
        return ws

    def truncated(self, ws: Tensor, psi: float) -> Tensor:
        """w_avg + psi (w - w_avg): psi < 1 trades variety for quality (Karras et al. 2019, B)."""
        return ws if psi == 1 else torch.lerp(self.mapping.w_avg, ws, psi)

    def forward(self, seeds: Tensor, mixing: float = 0.0) -> Tensor:
        return self.synthesis(self.styles(seeds, mixing), seeds)


class Residual(nn.Module):
    """Two convolutions to half the size, beside a filtered 1 x 1 one; over sqrt 2."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.conv0, self.conv1 = Conv(n_in, n_in, 3), Conv(n_in, n_out, 3, down=True)
        self.skip = Conv(n_in, n_out, 1, act=None, down=True)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv1(self.conv0(x)) + self.skip(x)) * math.sqrt(0.5)


def deviation(x: Tensor, group: int) -> Tensor:
    """x with one channel more: the standard deviation over groups of samples, averaged over
    channels and places (Karras et al. 2018, 3). Sample b is in group b % (B / group)."""
    B, C, H, W = x.shape
    while B % group:
        group -= 1
    y = x.reshape(group, B // group, C, H, W)
    y = (y - y.mean(0)).square().mean(0) + 1e-8
    y = y.sqrt().mean((1, 2, 3)).repeat(group)
    return torch.cat([x, y[:, None, None, None].expand(-1, 1, H, W)], 1)


class Discriminator(nn.Module):
    """(B, C, H, W) in about [-1, 1] -> logits (B,); large for what looks real."""

    def __init__(self, shape, sizes, widths, group: int):
        super().__init__()
        self.group = group
        self.from_pixels = Conv(shape[0], widths[-1], 1)
        down = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.blocks = nn.Sequential(*(Residual(a, b) for a, b in down))
        self.conv = Conv(widths[0] + 1, widths[0], 3)
        self.dense = Dense(widths[0] * math.prod(sizes[0]), widths[0], "lrelu")
        self.head = Dense(widths[0], 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(deviation(self.blocks(self.from_pixels(x)), self.group))
        return self.head(self.dense(x.flatten(1)))[:, 0]


class StyleGAN2(nn.Module):
    """shape: (C, H, W); the first size is H, W halved while they are even and above 4 (28: 7, 32:
    4). width: channels of the last size, twice as many at each one before, at most most_width.
    mapping_layers: from z to w. r1: gamma, every r1_every steps; path: weight of the path length,
    every path_every; mixing: share of style mixing; group: of the minibatch deviation.
    """

    def __init__(
        self, shape: tuple[int, int, int] = (1, 28, 28), width: int = 16, most_width: int = 128,
        z_dim: int = 64, w_dim: int = 64, mapping_layers: int = 4, mixing: float = 0.9,
        r1: float = 1.0, r1_every: int = 16, path: float = 2.0, path_every: int = 8, group: int = 4,
    ):  # fmt: skip
        super().__init__()
        C, H, W = _inputs.image_shape(shape)
        sizes = [(H, W)]
        while all(n % 2 == 0 and n > 4 for n in sizes[0]):
            sizes.insert(0, (sizes[0][0] // 2, sizes[0][1] // 2))
        if len(sizes) < 2 or max(sizes[0]) > 16:
            raise ValueError(
                "shape: expected (C, H, W) with H and W that halve (once, at least) to 16 or less, "
                f"got {tuple(shape)}; crop or pad the images"
            )
        _check.counts(
            r1_every=r1_every, path_every=path_every, group=group, width=width, z_dim=z_dim,
            most_width=most_width, mapping_layers=mapping_layers, w_dim=w_dim,
        )  # fmt: skip
        _check.number("mixing", mixing, low=0.0, high=1.0)
        _check.number("r1", r1, low=0.0)
        _check.number("path", path, low=0.0)
        self.config = {
            "shape": list(shape), "width": width, "most_width": most_width, "z_dim": z_dim,
            "w_dim": w_dim, "mapping_layers": mapping_layers, "mixing": mixing, "r1": r1,
            "r1_every": r1_every, "path": path, "path_every": path_every, "group": group,
        }  # fmt: skip
        self.x_shape, self.mixing = tuple(shape), mixing
        self.r1, self.r1_every, self.path, self.path_every = r1, r1_every, path, path_every
        widths = [min(width << i, most_width) for i in range(len(sizes))][::-1]
        self.G = Generator(shape, sizes, widths, z_dim, w_dim, mapping_layers)
        self.D = Discriminator(shape, sizes, widths, group)
        self.register_buffer("path_mean", torch.zeros(()))  # a: the mean path length so far

    def d_loss(self, x: Tensor, *, seed: Tensor, step: int = 0) -> Tensor:
        """Loss of D on real images x in [0, 1] and as many of G, (); R1 times its interval at each
        r1_every-th step (lazy regularisation). seed: int64 (B,), one a sample."""
        real = from_unit(x, self.x_shape)
        _inputs.seeds("seed", seed, len(x))
        with torch.no_grad():
            fake = self.G(seed, self.mixing)
        lazy = self.r1 > 0 and step % self.r1_every == 0
        if lazy:
            real = real.detach().requires_grad_()
        real_logits = self.D(real)
        loss = F.softplus(self.D(fake)).mean() + F.softplus(-real_logits).mean()
        if lazy:
            (slope,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
            penalty = slope.square().sum((1, 2, 3)).mean()
            loss = loss + 0.5 * self.r1 * self.r1_every * penalty
        return loss

    def g_loss(self, *, seed: Tensor, step: int = 0) -> Tensor:
        """Loss of G on a sample of each seed, int64 (B,), (); the path length times its interval at
        each path_every-th step, on half of them. Moves w_avg and path_mean."""
        _inputs.seeds("seed", seed)
        ws = self.G.styles(seed, self.mixing)
        if self.training:
            with torch.no_grad():
                self.G.mapping.w_avg.lerp_(ws[:, 0].mean(0), 0.005)
        loss = F.softplus(-self.D(self.G.synthesis(ws, seed))).mean()
        if self.path > 0 and step % self.path_every == 0:
            loss = loss + self.path * self.path_every * self._path_penalty(seed)
        return loss

    def _path_penalty(self, seeds: Tensor) -> Tensor:
        seeds = seeds[: max(1, len(seeds) // 2)].contiguous()
        ws = self.G.styles(seeds, self.mixing)
        if not ws.requires_grad:
            ws = ws.detach().requires_grad_()
        images = self.G.synthesis(ws, seeds)
        y = randn(images.shape, seed=seeds, stream=PATH, device=images.device).to(images.dtype)
        pixels = math.sqrt(images[0, 0].numel())
        (J,) = torch.autograd.grad((images * y).sum() / pixels, ws, create_graph=True)
        lengths = J.square().sum(2).mean(1).sqrt()
        with torch.no_grad():
            # From the first mean on, not from 0: in the first 800 steps a mean that rises from 0
            # presses J to 0, and with it the variety (1 digit class of 10 after 750 steps).
            now = lengths.mean()
            mean = torch.where(self.path_mean > 0, self.path_mean.lerp(now, 0.01), now)
            if self.training:
                self.path_mean.copy_(mean)
        return (lengths - mean).square().mean()

    @torch.no_grad()
    def accuracy(self, x: Tensor, fake: Tensor) -> tuple[float, float]:
        """Shares of x and of fake (B, C, H, W) in [0, 1] that D takes for what they are; 1/2 both:
        D can only guess."""
        real, fake = (self.D(from_unit(images, self.x_shape)) for images in (x, fake))
        return (real > 0).float().mean().item(), (fake <= 0).float().mean().item()

    @torch.no_grad()
    def sample(self, n: int, seed: int, start: int = 0, psi: float = 1.0) -> Tensor:
        """Images of samples start ... start + n - 1, (n, C, H, W) in [0, 1]: the same bits for
        sample i however the samples are cut into calls (see `in_tiles`). psi: truncation."""
        _check.number("psi", psi)
        device = self.path_mean.device

        def tile(at: int) -> Tensor:
            seeds = sample_seeds(TILE, seed, start=at, device=device)
            ws = self.G.truncated(self.G.styles(seeds), psi)
            return (self.G.synthesis(ws, seeds) * 0.5 + 0.5).clamp(0, 1)

        return in_tiles(tile, n, start, TILE)

    @torch.no_grad()
    def mix(self, coarse: Tensor, fine: Tensor, cut: int) -> Tensor:
        """Images with the styles of seeds `coarse` in layers below cut, of `fine` from it on, and
        the noise of coarse; (B, C, H, W) in [0, 1]. Karras et al. 2019, figure 3."""
        _inputs.seeds("coarse", coarse)
        _inputs.seeds("fine", fine, len(coarse))
        layers = torch.arange(self.G.synthesis.layers, device=coarse.device)[:, None]
        ws = torch.where(layers < cut, self.G.styles(coarse), self.G.styles(fine))
        return (self.G.synthesis(ws, coarse) * 0.5 + 0.5).clamp(0, 1)
