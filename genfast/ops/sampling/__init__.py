"""sampling: reparameterized Gaussians, the Gumbel family, categorical and token sampling."""

from genfast.ops.sampling.bernoulli import bernoulli_nll
from genfast.ops.sampling.gaussian import gaussian_kl, log_normal, reparameterize, tanh_normal
from genfast.ops.sampling.gumbel import gumbel_softmax, relaxed_bernoulli
from genfast.ops.sampling.tokens import sample_categorical, sample_tokens

__all__ = [
    "bernoulli_nll",
    "gaussian_kl",
    "gumbel_softmax",
    "log_normal",
    "relaxed_bernoulli",
    "reparameterize",
    "sample_categorical",
    "sample_tokens",
    "tanh_normal",
]
