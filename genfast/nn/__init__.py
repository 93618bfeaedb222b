"""Drop-in modules, thin over `genfast.ops`."""

from genfast.nn.sampling import (
    DiagonalGaussianDistribution,
    GaussianReparameterize,
    GumbelSoftmax,
    Normal,
)

__all__ = ["DiagonalGaussianDistribution", "GaussianReparameterize", "GumbelSoftmax", "Normal"]
