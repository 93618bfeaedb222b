"""A VAE whose decoder is a GAN's generator, and whose likelihood is that of the discriminator's
features.

    L_prior = KL(q(z|x) || p(z)),  L_like = -E ln N(D_l(x) | D_l(G(z)), 1),  z ~ q(z|x)
    L_GAN = ln s(D(x)) + ln(1 - s(D(G(z)))) + ln(1 - s(D(G(z_p)))),  z_p ~ p(z)

Larsen et al., "Autoencoding beyond pixels using a learned similarity metric", 2016, eq. 5 to 8 and
algorithm 1: the encoder lessens L_prior + L_like, the decoder gamma L_like - L_GAN, the
discriminator -L_GAN. Letters: E the encoder; G the decoder, D the discriminator, x and z as in
`genfast.models.gan`; D_l the features before D's last layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genfast.models import _inputs
from genfast.models._seeds import evaluating
from genfast.models.gan import (
    FAKE,
    LATENT,
    MIX,
    OBJECTIVES,
    REAL,
    Adversarial,
    discriminator,
    features,
    from_unit,
    generator,
    narrow,
)
from genfast.nn.linear import Linear
from genfast.ops import _check
from genfast.ops._noise import Seed
from genfast.ops.sampling import reparameterize

POSTERIOR = 1 + max(LATENT, REAL, FAKE, MIX)  # stream of z ~ q(z|x)


class VAEGAN(Adversarial):
    """width, levels: as in `DCGAN`, of all three networks. gamma: weight of L_like for the decoder.
    Instance noise, R1 and gradient penalty (of both kinds of fakes) as in `Adversarial`."""

    def __init__(
        self, shape: tuple[int, int, int] = (1, 28, 28), z_dim: int = 32, width: int = 32,
        levels: int = 2, gamma: float = 1e-3, **penalties,
    ):  # fmt: skip
        _check.counts(levels=levels, width=width)
        super().__init__(_inputs.image_shape(shape, levels), z_dim, "non-saturating", **penalties)
        _check.number("gamma", gamma, low=0.0, open_low=True)
        self.config = {
            "shape": list(shape), "z_dim": z_dim, "width": width, "levels": levels, "gamma": gamma,
            **penalties,
        }  # fmt: skip
        self.gamma = gamma
        body = features(self.x_shape, width, levels, True, False)
        inner = (width << (levels - 1)) * (shape[1] >> levels) * (shape[2] >> levels)
        self.E = nn.Sequential(*body, Linear(inner, 2 * z_dim))  # mu, then logvar
        self.G = generator(self.x_shape, z_dim, width, levels)
        self.D = discriminator(self.x_shape, width, levels, True, False)
        narrow(self)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu, logvar of q(z|x), each (B, z_dim); x (B, C, H, W) in [0, 1]."""
        mu, logvar = self.E(from_unit(x, self.x_shape)).chunk(2, 1)
        return mu, logvar

    def _drawn(self, x: Tensor, seed: Seed) -> tuple[Tensor, Tensor]:
        """z ~ q(z|x) (B, z_dim), and L_prior of each sample (B,)."""
        _inputs.some("x", x)
        mu, logvar = self.encode(x)
        return reparameterize(
            mu, logvar, seed=seed, stream=POSTERIOR, return_kl=True, kl_reduction="none"
        )

    def _unlikely(self, x: Tensor, z: Tensor) -> Tensor:
        """L_like of each sample but for its constant, (B,)."""
        body = self.D[:-2]  # without the linear layer and the flattening after it
        real, ours = body(from_unit(x, self.x_shape)), body(self.fake(z))
        return 0.5 * (real - ours).to(z.dtype).square().sum(1)

    def e_loss(self, x: Tensor, *, seed: Seed, step: int = 0) -> Tensor:
        """Of the encoder on images x (B, C, H, W) in [0, 1], mean, ()."""
        z, kl = self._drawn(x, seed)
        return (kl + self._unlikely(x, z)).mean()

    def g_loss(self, x: Tensor, *, seed: Seed, step: int = 0) -> Tensor:
        """Of the decoder, mean, (); -L_GAN in the non-saturating form, as in a GAN."""
        with torch.no_grad():
            z, _ = self._drawn(x, seed)
        game = OBJECTIVES[self.objective]
        fooled = sum(
            game.G(self.judged(self.noisy(self.fake(code), seed, FAKE, step))).mean()
            for code in (z, self.latent(len(x), seed))
        )
        return self.gamma * self._unlikely(x, z).mean() + fooled

    def d_loss(self, x: Tensor, *, seed: Seed, step: int = 0) -> Tensor:
        """Of the discriminator, mean, (): half of each kind of its fakes counts as one fake."""
        with torch.no_grad():
            codes = self._drawn(x, seed)[0], self.latent(len(x), seed)
            fakes = [self.noisy(self.fake(code), seed, FAKE, step) for code in codes]
        real = self.noisy(from_unit(x, self.x_shape), seed, REAL, step)
        judged, game = self.judged(real), OBJECTIVES[self.objective]
        loss = 0.5 * sum(game.D(judged, self.judged(fake)).mean() for fake in fakes)
        return loss + self.penalties(real, fakes, seed)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """G at z = mu(x), (B, C, H, W) in [0, 1]."""
        with evaluating(self):
            return self(self.encode(x)[0])
