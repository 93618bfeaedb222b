"""sampling in Triton; each launcher takes the arguments of the native entry point of its name."""

from .gaussian import reparameterize, reparameterize_backward
from .gumbel import gumbel_softmax, gumbel_softmax_backward, relaxed_bernoulli
from .tokens import categorical

__all__ = [
    "categorical",
    "gumbel_softmax",
    "gumbel_softmax_backward",
    "relaxed_bernoulli",
    "reparameterize",
    "reparameterize_backward",
]
