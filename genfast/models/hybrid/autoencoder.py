"""KLAutoencoder: the first stage of latent diffusion, a convolutional VAE with a spatial latent.

    q(z|x) = N(mu(x), e^logvar(x)),  z (B, c, h, w);  loss = -ln p(x|z) + beta KL(q(z|x) || N(0, 1))

Rombach et al., "High-resolution image synthesis with latent diffusion models", 2022, section 3.1
(KL-regularised, beta far below 1: the latents shall be easy to model, not normal). They add a
perceptual and an adversarial loss; on grey images of few pixels the Bernoulli likelihood of
`genfast.models.vae` serves. Letters: x (B, C, H, W) in [0, 1]; f the factor between H and h.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genfast.models import _inputs
from genfast.models.unet import groups
from genfast.nn.convolution import Conv2d
from genfast.nn.normalization import GroupNorm
from genfast.ops import _check
from genfast.ops._noise import Seed
from genfast.ops.sampling import bernoulli_nll, reparameterize

_MOMENTUM = 0.05  # of the running mean and variance of the latents: the last 20 batches


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        Conv2d(inputs, outputs, 3, padding=1), GroupNorm(groups(outputs), outputs, act="silu")
    )


class KLAutoencoder(nn.Module):
    """shape: (C, H, W), H and W divisible by f = 2^len(widths); widths: channels at H / 2, H / 4,
    ...; z_channels: c. beta: weight of the KL.

    Buffers mean, std (c,): of the latents of the last training batches; `standard` uses them
    (Rombach et al. 2022, appendix G, have one std of one batch).
    """

    def __init__(
        self, shape: tuple[int, int, int] = (1, 28, 28), widths: tuple[int, ...] = (32, 64),
        z_channels: int = 4, beta: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        self.config = {
            "shape": list(shape), "widths": list(widths), "z_channels": z_channels, "beta": beta,
        }  # fmt: skip
        _check.counts(z_channels=z_channels, **{f"widths[{i}]": w for i, w in enumerate(widths)})
        _check.number("beta", beta, low=0.0)
        C, H, W = self.shape = tuple(shape)
        f = 2 ** len(widths)
        if not widths or H % f or W % f or min(C, H, W) < 1:
            raise ValueError(
                f"shape: expected H and W divisible by {f} for widths {tuple(widths)}, got "
                f"{(C, H, W)}; take fewer widths, or crop or pad the images"
            )
        self.z_shape, self.beta = (z_channels, H // f, W // f), beta
        down, up, c = [], [], C
        for width in widths:
            down += [nn.Conv2d(c, width, 4, 2, 1), nn.SiLU(), _block(width, width)]
            up = [_block(width, width), nn.ConvTranspose2d(width, c, 4, 2, 1), nn.SiLU(), *up]
            c = width
        self.encoder = nn.Sequential(*down, nn.Conv2d(c, 2 * z_channels, 1))
        self.decoder = nn.Sequential(Conv2d(z_channels, c, 3, padding=1), *up[:-1])
        self.register_buffer("mean", torch.zeros(z_channels))
        self.register_buffer("std", torch.ones(z_channels))
        self.to(memory_format=torch.channels_last)  # the convolutions' layout, see UNet

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu, logvar of q(z|x), each (B, c, h, w)."""
        _inputs.images("x", x, self.shape)
        mu, logvar = self.encoder(2 * x - 1).chunk(2, 1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Logits of p(x|z), (B, C, H, W)."""
        return self.decoder(z)

    def standard(self, z: Tensor) -> Tensor:
        """Latents with mean 0 and deviation 1 in each channel: what the diffusion model sees."""
        return (z - self.mean[:, None, None]) / self.std[:, None, None]

    def image(self, z: Tensor) -> Tensor:
        """Means of p(x|z), in [0, 1], for standardised latents z."""
        return torch.sigmoid(self.decode(z * self.std[:, None, None] + self.mean[:, None, None]))

    def forward(
        self, x: Tensor, *, seed: Seed | None = None, stream: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Logits of one draw z ~ q(z|x), and the KL of each sample (B,)."""
        mu, logvar = self.encode(x)
        z, kl = reparameterize(
            mu, logvar, seed=seed, stream=stream, return_kl=True, kl_reduction="none"
        )
        if self.training:
            self._watch(z.detach())
        return self.decode(z), kl

    def _watch(self, z: Tensor) -> None:
        if z[:, 0].numel() < 2:  # one value has no variance
            return
        var, mean = torch.var_mean(z.to(self.mean.dtype), (0, 2, 3))  # autocast's are of 16 bits
        good = mean.isfinite() & var.isfinite()  # one bad batch would stay in them for good
        self.mean.copy_(torch.where(good, self.mean.lerp(mean, _MOMENTUM), self.mean))
        std = self.std.square().lerp(var, _MOMENTUM).sqrt()
        self.std.copy_(torch.where(good, std, self.std))

    def loss(self, x: Tensor, *, seed: Seed | None = None, stream: int = 0) -> Tensor:
        """Mean of -ln p(x|z) + beta KL over the batch, (), nats a sample."""
        _inputs.some("x", x)
        logits, kl = self(x, seed=seed, stream=stream)
        return (bernoulli_nll(logits, x) + self.beta * kl).mean()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Mean of p(x|z) at z = mu(x), (B, C, H, W) in [0, 1]."""
        return torch.sigmoid(self.decode(self.encode(x)[0]))
