"""sampling in Triton; each launcher takes the arguments of the native entry point of its name."""

from .bernoulli import bernoulli_nll, bernoulli_nll_backward
from .gaussian import reparameterize, reparameterize_backward
from .gumbel import gumbel_softmax, gumbel_softmax_backward, relaxed_bernoulli
from .tokens import categorical

__all__ = [
    "bernoulli_nll",
    "bernoulli_nll_backward",
    "categorical",
    "gumbel_softmax",
    "gumbel_softmax_backward",
    "relaxed_bernoulli",
    "reparameterize",
    "reparameterize_backward",
]
