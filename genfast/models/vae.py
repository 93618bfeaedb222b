"""The variational autoencoder with one hidden layer, 784-400-20.

    q(z|x) = N(mu(x), e^logvar(x)),  p(z) = N(0, 1),  p(x|z) = Bernoulli(sigmoid(decode(z)))
    elbo(x) = ln p(x|z) - KL(q(z|x) || p(z)),  z = mu + e^(logvar/2) eps

Kingma & Welling, "Auto-encoding variational Bayes", 2014, appendix C.1 and B. Letters: x (B, x_dim)
in [0, 1]; z, mu, logvar (B, z_dim). Sizes and state-dict keys (fc1, fc21, fc22, fc3, fc4) are those
of the VAE of pytorch/examples, so its checkpoints load here and the other way round.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast.models._seeds import in_tiles
from genfast.ops.rng import randn
from genfast.ops.sampling import reparameterize

# Rows of one decoding in `sample`, see `in_tiles`: the bits of sample i are a function of (weights,
# seed, i). 64 rows cost 0.4 ms on one core: the smallest tile that keeps the product efficient.
TILE = 64


class VAE(nn.Module):
    def __init__(self, x_dim: int = 784, h_dim: int = 400, z_dim: int = 20):
        super().__init__()
        self.x_dim, self.h_dim, self.z_dim = x_dim, h_dim, z_dim
        self.fc1 = nn.Linear(x_dim, h_dim)
        self.fc21 = nn.Linear(h_dim, z_dim)  # mu
        self.fc22 = nn.Linear(h_dim, z_dim)  # logvar
        self.fc3 = nn.Linear(z_dim, h_dim)
        self.fc4 = nn.Linear(h_dim, x_dim)

    @property
    def config(self) -> dict[str, int]:
        """The constructor's arguments."""
        return {"x_dim": self.x_dim, "h_dim": self.h_dim, "z_dim": self.z_dim}

    def _flat(self, x: Tensor) -> Tensor:
        """(B, ...) of x_dim values a sample -> (B, x_dim)."""
        if x.dim() < 2 or x[0].numel() != self.x_dim:
            raise ValueError(
                f"x: expected (B, ...) with {self.x_dim} values a sample, got shape "
                f"{tuple(x.shape)}; resize the images or build VAE(x_dim=...)"
            )
        return x.flatten(1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu, logvar of q(z|x), each (B, z_dim)."""
        h = F.relu(self.fc1(self._flat(x)))
        return self.fc21(h), self.fc22(h)

    def decode(self, z: Tensor) -> Tensor:
        """Logits of p(x|z), (B, x_dim)."""
        return self.fc4(F.relu(self.fc3(z)))

    def forward(self, x: Tensor, *, seed=None, stream: int = 0) -> tuple[Tensor, Tensor]:
        """Logits of p(x|z) (B, x_dim) of one draw z ~ q(z|x), and the KL of each sample (B,).

        seed, stream: as in `genfast.reparameterize`.
        """
        mu, logvar = self.encode(x)
        z, kl = reparameterize(
            mu, logvar, seed=seed, stream=stream, return_kl=True, kl_reduction="none"
        )
        return self.decode(z), kl

    def elbo(self, x: Tensor, *, seed=None, stream: int = 0) -> Tensor:
        """One-draw estimate of the evidence lower bound of each sample, (B,), nats."""
        logits, kl = self(x, seed=seed, stream=stream)
        nll = F.binary_cross_entropy_with_logits(logits, self._flat(x), reduction="none").sum(1)
        return -nll - kl

    def loss(self, x: Tensor, *, seed=None, stream: int = 0) -> Tensor:
        """-elbo averaged over the batch, (), nats a sample."""
        return -self.elbo(x, seed=seed, stream=stream).mean()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Mean of p(x|z) at z = mu(x), (B, x_dim) in (0, 1)."""
        return torch.sigmoid(self.decode(self.encode(x)[0]))

    def prior(self, n: int, seed: int, start: int = 0) -> Tensor:
        """Latents of samples start ... start + n - 1, (n, z_dim): row i depends on (seed, i) alone.

        All samples share one stream of noise; sample i owns its elements i z_dim ... (i+1) z_dim.
        """
        weight = self.fc3.weight
        return randn(n, self.z_dim, seed=seed, offset=start * self.z_dim, device=weight.device).to(
            weight.dtype
        )

    @torch.no_grad()
    def sample(self, n: int, seed: int, start: int = 0) -> Tensor:
        """Means of p(x|z) for samples start ... start + n - 1 of the prior, (n, x_dim) in (0, 1).

        The same bits for sample i however the samples are cut into calls (see TILE).
        """
        return in_tiles(
            lambda at: torch.sigmoid(self.decode(self.prior(TILE, seed, at))), n, start, TILE
        )

    @torch.no_grad()
    def interpolate(self, x0: Tensor, x1: Tensor, steps: int = 8) -> Tensor:
        """Means of p(x|z) on the straight line between mu(x0) and mu(x1), (B, steps, x_dim)."""
        if steps < 2:
            raise ValueError(f"steps: expected an int >= 2, got {steps}")
        z0, z1 = self.encode(x0)[0], self.encode(x1)[0]
        t = torch.linspace(0, 1, steps, dtype=z0.dtype, device=z0.device)[:, None]
        return torch.sigmoid(self.decode(torch.lerp(z0[:, None], z1[:, None], t)))
