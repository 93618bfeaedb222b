"""Drop-in modules, thin over `genfast.ops`."""

from genfast.nn.attention import MultiheadAttention
from genfast.nn.sampling import (
    DiagonalGaussianDistribution,
    GaussianReparameterize,
    GumbelSoftmax,
    Normal,
)
from genfast.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "DiagonalGaussianDistribution",
    "GaussianReparameterize",
    "GumbelSoftmax",
    "MultiheadAttention",
    "Normal",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
