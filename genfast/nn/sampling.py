"""Modules and distributions over the sampling family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genfast.ops import _check
from genfast.ops._noise import Seed
from genfast.ops.rng import randn
from genfast.ops.sampling import gaussian_kl, gumbel_softmax, reparameterize


class GaussianReparameterize(nn.Module):
    """z, or (z, kl), from mu and logvar (B, ...); in eval mode z = mu unless `sample_in_eval`.

    return_kl, kl_reduction, stream: as in `genfast.reparameterize`.
    """

    def __init__(
        self,
        return_kl: bool = False,
        kl_reduction: str = "batchmean",
        stream: int = 0,
        sample_in_eval: bool = False,
    ):
        super().__init__()
        self.return_kl = return_kl
        self.kl_reduction = kl_reduction
        self.stream = stream
        self.sample_in_eval = sample_in_eval

    def forward(self, mu: Tensor, logvar: Tensor, seed: Seed | None = None) -> Tensor | Any:
        if self.training or self.sample_in_eval:
            return reparameterize(
                mu,
                logvar,
                seed=seed,
                stream=self.stream,
                return_kl=self.return_kl,
                kl_reduction=self.kl_reduction,
            )
        if self.return_kl:
            return mu, gaussian_kl(mu, logvar, reduction=self.kl_reduction)
        return mu

    def extra_repr(self) -> str:
        return f"return_kl={self.return_kl}, kl_reduction={self.kl_reduction!r}"


class GumbelSoftmax(nn.Module):
    """`genfast.gumbel_softmax` with its settings held; `tau` may be annealed between calls."""

    def __init__(self, tau: float = 1.0, hard: bool = False, dim: int = -1, stream: int = 0):
        super().__init__()
        self.tau, self.hard, self.dim, self.stream = tau, hard, dim, stream

    def forward(self, logits: Tensor, seed: Seed | None = None) -> Tensor:
        return gumbel_softmax(logits, self.tau, self.hard, self.dim, seed=seed, stream=self.stream)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, hard={self.hard}, dim={self.dim}"


class Normal(torch.distributions.Normal):
    """torch.distributions.Normal whose `rsample` and `sample` draw from the noise contract.

    Same constructor, shapes and gradients; `seed` and `stream` are optional extras of the draws.
    """

    def rsample(
        self, sample_shape: Sequence[int] = (), *, seed: Seed | None = None, stream: int = 0
    ) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        eps = randn(
            tuple(shape), seed=seed, stream=stream, dtype=self.loc.dtype, device=self.loc.device
        )
        return torch.addcmul(self.loc, self.scale, eps)

    def sample(
        self, sample_shape: Sequence[int] = (), *, seed: Seed | None = None, stream: int = 0
    ) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape, seed=seed, stream=stream)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Normal:
        new = self._get_checked_instance(Normal, _instance)
        return super().expand(batch_shape, _instance=new)


class DiagonalGaussianDistribution:
    """diffusers' posterior of an autoencoder, on the fused draw.

    parameters: (B, 2C, ...): mean and logvar stacked along dim 1; logvar is clamped to [-30, 20].
    Attributes and methods as in diffusers (`mean`, `logvar`, `std`, `var`, `sample`, `kl`, `nll`,
    `mode`), with `seed=` and `stream=` beside `generator=`; `sample` is differentiable.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False):
        if not isinstance(parameters, Tensor):
            _check.tensor("parameters", parameters)
        if parameters.dim() < 2 or parameters.shape[1] % 2:
            raise ValueError(
                "parameters: expected (B, 2C, ...), mean and logvar stacked along dim 1, "
                f"got shape {tuple(parameters.shape)}"
            )
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.deterministic = deterministic
        if deterministic:
            self.var = self.std = torch.zeros_like(self.mean)
        else:
            self.std = torch.exp(0.5 * self.logvar)
            self.var = torch.exp(self.logvar)

    def sample(
        self, generator: torch.Generator | None = None, *, seed: Seed | None = None, stream: int = 0
    ) -> Tensor:
        """A draw of the posterior, (B, C, ...); the mean when deterministic."""
        if self.deterministic:
            return self.mean
        return reparameterize(self.mean, self.logvar, seed=seed, stream=stream, generator=generator)

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Per-sample KL to N(0, 1), or to another posterior, (B,), float32 (or wider)."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        if other is None:
            return gaussian_kl(self.mean, self.logvar, reduction="none")
        terms = (
            (self.mean - other.mean) ** 2 / other.var
            + self.var / other.var
            - 1.0
            - self.logvar
            + other.logvar
        )
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """-ln q(sample), summed over dims."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        log_two_pi = 1.8378770664093453
        terms = log_two_pi + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * torch.sum(terms, dim=list(dims))

    def mode(self) -> Tensor:
        return self.mean
