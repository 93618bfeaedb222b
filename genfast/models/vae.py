"""Variational autoencoders: one hidden layer (784-400-20), and convolutional.

    q(z|x) = N(mu(x), e^logvar(x)),  p(z) = N(0, 1),  p(x|z) = Bernoulli(sigmoid(decode(z)))
    elbo(x) = ln p(x|z) - KL(q(z|x) || p(z)),  z = mu + e^(logvar/2) eps

Kingma & Welling, "Auto-encoding variational Bayes", 2014, appendix C.1 and B. Letters: x in [0, 1],
(B, x_dim) or (B, C, H, W); z, mu, logvar (B, z_dim); beta of the loss ln p(x|z) - beta KL: Higgins
et al., "beta-VAE", 2017. seed, stream: as in `genfast.reparameterize`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from genfast.models import _inputs
from genfast.models._seeds import in_tiles, sample_seeds
from genfast.nn.linear import Linear
from genfast.ops import _check
from genfast.ops._noise import Seed
from genfast.ops.rng import randn
from genfast.ops.sampling import bernoulli_nll, reparameterize

# Rows of one decoding in `sample`, see `in_tiles`: the bits of sample i are a function of (weights,
# seed, i). 64 rows cost 0.4 ms on one core: the smallest tile that keeps the product efficient.
TILE = 64


class GaussianVAE(nn.Module):
    """Everything but the two networks: a subclass defines `encode`, `decode` and x_shape."""

    x_shape: tuple[int, ...]
    z_dim: int
    beta: float

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu, logvar of q(z|x), each (B, z_dim)."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Logits of p(x|z), (B, *x_shape)."""
        raise NotImplementedError

    def _shaped(self, x: Tensor) -> Tensor:
        """Samples of x_shape, or flat; of any shape where x_shape is flat -> (B, *x_shape)."""
        _inputs.floats("x", x)
        values = math.prod(self.x_shape)
        flat = x.dim() == 2 or len(self.x_shape) == 1
        fits = math.prod(x.shape[1:]) == values if flat else x.shape[1:] == self.x_shape
        if x.dim() < 2 or not fits:
            raise ValueError(
                f"x: expected (B, {', '.join(map(str, self.x_shape))}) or {values} values a "
                f"sample, got shape {tuple(x.shape)}; resize the images or build the model for "
                "this size"
            )
        return x.reshape(len(x), *self.x_shape)

    def forward(
        self, x: Tensor, *, seed: Seed | None = None, stream: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Logits of p(x|z) (B, *x_shape) of one draw z ~ q(z|x), and the KL of each sample (B,)."""
        mu, logvar = self.encode(x)
        z, kl = reparameterize(
            mu, logvar, seed=seed, stream=stream, return_kl=True, kl_reduction="none"
        )
        return self.decode(z), kl

    def _nll(self, logits: Tensor, x: Tensor) -> Tensor:
        """-ln p(x|z), (B,)."""
        return bernoulli_nll(logits, self._shaped(x))

    def elbo(self, x: Tensor, *, seed: Seed | None = None, stream: int = 0) -> Tensor:
        """One-draw estimate of the evidence lower bound of each sample, (B,), nats."""
        logits, kl = self(x, seed=seed, stream=stream)
        return -self._nll(logits, x) - kl

    def loss(self, x: Tensor, *, seed: Seed | None = None, stream: int = 0) -> Tensor:
        """Mean of -ln p(x|z) + beta KL over the batch, (), nats a sample; -elbo when beta is 1."""
        _inputs.some("x", x)
        logits, kl = self(x, seed=seed, stream=stream)
        return (self._nll(logits, x) + self.beta * kl).mean()

    @torch.no_grad()
    def bound(self, x: Tensor, draws: int = 50, *, seed: int = 0) -> Tensor:
        """Lower bound on ln p(x) of each sample, (B,), nats, tighter than the elbo:
        ln 1/K sum_k p(x, z_k) / q(z_k|x). Burda et al., "Importance weighted autoencoders", 2016.
        """
        _check.counts(draws=draws)
        mu, logvar = self.encode(x)
        seeds = sample_seeds(len(x), seed, device=mu.device)
        total = torch.full(mu.shape[:1], -math.inf, device=mu.device, dtype=mu.dtype)
        for k in range(draws):
            z = reparameterize(mu, logvar, seed=seeds, stream=k)
            eps2 = (z - mu).square() / logvar.exp()
            ratio = 0.5 * (logvar + eps2 - z.square()).sum(1)  # ln p(z) - ln q(z|x)
            total = torch.logaddexp(total, ratio - self._nll(self.decode(z), x))
        return total - math.log(draws)

    def anomaly_score(self, x: Tensor, draws: int = 16, *, seed: int = 0) -> Tensor:
        """-bound(x), (B,), nats: large for what the training data did not hold."""
        return -self.bound(x, draws, seed=seed)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Mean of p(x|z) at z = mu(x), (B, *x_shape) in [0, 1]."""
        return torch.sigmoid(self.decode(self.encode(x)[0]))

    def prior(self, n: int, seed: int, start: int = 0) -> Tensor:
        """Latents of samples start ... start + n - 1, (n, z_dim): row i depends on (seed, i) alone.

        All samples share one stream of noise; sample i owns its elements i z_dim ... (i+1) z_dim.
        """
        weight = next(self.parameters())
        return randn(n, self.z_dim, seed=seed, offset=start * self.z_dim, device=weight.device).to(
            weight.dtype
        )

    @torch.no_grad()
    def sample(self, n: int, seed: int, start: int = 0) -> Tensor:
        """Means of p(x|z) for samples start ... start + n - 1 of the prior, (n, *x_shape) in
        [0, 1]. The same bits for sample i however the samples are cut into calls (see TILE).
        """
        _check.integer("seed", seed)
        return in_tiles(
            lambda at: torch.sigmoid(self.decode(self.prior(TILE, seed, at))), n, start, TILE
        )

    @torch.no_grad()
    def interpolate(self, x0: Tensor, x1: Tensor, steps: int = 8) -> Tensor:
        """Means of p(x|z) on the straight line between mu(x0) and mu(x1), (B, steps, *x_shape)."""
        _check.integer("steps", steps, low=2)
        _check.same_shape("x1", x1, "x0", x0)
        z0, z1 = self.encode(x0)[0], self.encode(x1)[0]
        t = torch.linspace(0, 1, steps, dtype=z0.dtype, device=z0.device)[:, None]
        z = torch.lerp(z0[:, None], z1[:, None], t)
        return torch.sigmoid(self.decode(z.flatten(0, 1))).unflatten(0, (-1, steps))


class VAE(GaussianVAE):
    """Sizes and state-dict keys (fc1, fc21, fc22, fc3, fc4) are those of the VAE of
    pytorch/examples, so its checkpoints load here and the other way round.
    """

    def __init__(self, x_dim: int = 784, h_dim: int = 400, z_dim: int = 20, beta: float = 1.0):
        super().__init__()
        _check.counts(x_dim=x_dim, h_dim=h_dim, z_dim=z_dim)
        _check.number("beta", beta, low=0.0)
        self.config = {"x_dim": x_dim, "h_dim": h_dim, "z_dim": z_dim, "beta": beta}
        self.x_shape, self.z_dim, self.beta = (x_dim,), z_dim, beta
        self.fc1 = Linear(x_dim, h_dim, act="relu")
        self.fc21 = Linear(h_dim, z_dim)  # mu
        self.fc22 = Linear(h_dim, z_dim)  # logvar
        self.fc3 = Linear(z_dim, h_dim, act="relu")
        self.fc4 = Linear(h_dim, x_dim)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.fc1(self._shaped(x))
        return self.fc21(h), self.fc22(h)

    def decode(self, z: Tensor) -> Tensor:
        return self.fc4(self.fc3(z))


class ConvVAE(GaussianVAE):
    """Two convolutions of stride 2 (C -> width -> 2 width), a linear layer to mu and logvar, and
    the same back with transposed convolutions. shape: (C, H, W), H and W multiples of 4.

    SiLU next to a linear layer acts on flat features: on images its gradient would come in another
    memory order than its input, which took 0.5 of 15 ms a training step.
    """

    def __init__(
        self, shape: tuple[int, int, int] = (1, 28, 28), width: int = 32, z_dim: int = 20,
        beta: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        _check.counts(width=width, z_dim=z_dim)
        _check.number("beta", beta, low=0.0)
        shape = _inputs.image_shape(shape, 2)
        self.config = {"shape": list(shape), "width": width, "z_dim": z_dim, "beta": beta}
        self.x_shape, self.z_dim, self.beta = tuple(shape), z_dim, beta
        C, H, W = shape
        self.inner = (2 * width, H // 4, W // 4)
        features = math.prod(self.inner)
        self.encoder = nn.Sequential(
            nn.Conv2d(C, width, 4, 2, 1), nn.SiLU(), nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.Flatten(), nn.SiLU(),
        )  # fmt: skip
        self.to_posterior = Linear(features, 2 * z_dim)  # mu, then logvar
        self.from_z = Linear(z_dim, features)
        self.decoder = nn.Sequential(
            nn.SiLU(), nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(width, C, 4, 2, 1),
        )  # fmt: skip
        self.to(memory_format=torch.channels_last)  # 14% of a training step on two cores

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.to_posterior(self.encoder(self._shaped(x))).chunk(2, 1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        h = self.decoder[0](self.from_z(z)).unflatten(1, self.inner)
        return self.decoder[1:](h.contiguous(memory_format=torch.channels_last))
