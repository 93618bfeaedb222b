"""Drop-in modules, thin over `genfast.ops`."""

from genfast.nn.attention import MultiheadAttention
from genfast.nn.convolution import Conv2d
from genfast.nn.filtering import BiasAct, Downsample2d, Upsample2d
from genfast.nn.linear import Linear
from genfast.nn.normalization import GroupNorm, LayerNorm, RMSNorm
from genfast.nn.sampling import (
    DiagonalGaussianDistribution,
    GaussianReparameterize,
    GumbelSoftmax,
    Normal,
)
from genfast.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "BiasAct",
    "Conv2d",
    "DiagonalGaussianDistribution",
    "Downsample2d",
    "GaussianReparameterize",
    "GroupNorm",
    "GumbelSoftmax",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "Normal",
    "RMSNorm",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "Upsample2d",
]
