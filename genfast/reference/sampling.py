"""Reparameterized sampling in plain PyTorch, noise as an argument: the truth of the family.

Every function differentiates any number of times, runs in any dtype and under any transform.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def reduce_samples(x: Tensor, reduction: str) -> Tensor:
    """x: (B, ...). none -> (B,), sum -> (), mean over elements -> (), batchmean -> sum / B."""
    if reduction == "none":
        return x.flatten(1).sum(1) if x.dim() > 1 else x
    total = x.sum()
    if reduction == "mean":
        return total / max(x.numel(), 1)
    if reduction == "batchmean":
        return total / max(x.shape[0], 1) if x.dim() else total
    return total


def gaussian_kl(mu: Tensor, logvar: Tensor, reduction: str = "batchmean") -> Tensor:
    """KL(N(mu, e^logvar) || N(0, 1)), Kingma & Welling 2014, appendix B."""
    return reduce_samples(0.5 * (mu**2 - 1 + logvar.exp() - logvar), reduction)


def bernoulli_nll(logits: Tensor, x: Tensor) -> Tensor:
    """-ln p(x | logits), (B, ...) -> (B,)."""
    nll = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return reduce_samples(nll, "none")


# T and ln T' of y = T(z).
TRANSFORMS = {
    "none": (lambda z: z, torch.zeros_like),
    "tanh": (torch.tanh, lambda z: 2 * (math.log(2) - z - F.softplus(-2 * z))),
    "exp": (torch.exp, lambda z: z),
}


def reparameterize(mu: Tensor, logvar: Tensor, eps: Tensor, transform: str = "none") -> Tensor:
    """y = T(mu + e^(logvar/2) eps), Kingma & Welling 2014, section 2.4. All (B, ...)."""
    return TRANSFORMS[transform][0](mu + torch.exp(0.5 * logvar) * eps)


def log_prob(mu: Tensor, logvar: Tensor, eps: Tensor, transform: str = "none") -> Tensor:
    """ln q(y) per sample, (B,), of the draw above; change of variables by ln T'."""
    z = mu + torch.exp(0.5 * logvar) * eps
    terms = -0.5 * (eps**2 + logvar + math.log(2 * math.pi)) - TRANSFORMS[transform][1](z)
    return reduce_samples(terms, "none")


def gumbel_softmax(logits: Tensor, gumbel: Tensor, tau, hard: bool = False) -> Tensor:
    """softmax((logits + g) / tau) over the last dimension; hard: one-hot forward, soft backward.

    Jang et al. 2017; Maddison et al. 2017.
    """
    soft = torch.softmax((logits + gumbel) / tau, -1)
    if not hard or not soft.numel():
        return soft
    index = (logits + gumbel).argmax(-1, keepdim=True)
    one_hot = torch.zeros_like(soft).scatter(-1, index, 1.0)
    return one_hot + (soft - soft.detach())  # + 0: exactly one-hot


def relaxed_bernoulli(logits: Tensor, logistic: Tensor, tau, hard: bool = False) -> Tensor:
    """sigmoid((logits + l) / tau); hard: 1[logits + l > 0] forward, soft backward."""
    soft = torch.sigmoid((logits + logistic) / tau)
    if not hard:
        return soft
    return (logits + logistic > 0).to(soft.dtype) + (soft - soft.detach())


def filter_logits(logits: Tensor, top_k=None, top_p=None, min_p=None) -> Tensor:
    """-inf outside the k largest (ties kept), then outside the smallest set of mass top_p, then
    below min_p times the largest probability. logits: (B, V), already divided by the temperature.
    """
    out = logits.clone()
    for b in range(logits.shape[0]):
        row = out[b]
        k = int(top_k[b]) if top_k is not None else 0
        if 0 < k < row.numel():
            row[row < row.topk(k).values[-1]] = -math.inf
        p = float(top_p[b]) if top_p is not None else 1.0
        if p < 1:
            order = torch.sort(row, descending=True, stable=True)
            mass = torch.softmax(order.values.double(), 0).cumsum(0)
            keep = int((mass < p).sum()) + 1
            row[order.indices[keep:]] = -math.inf
        m = float(min_p[b]) if min_p is not None else 0.0
        if m > 0:
            row[row < row.max() + math.log(m)] = -math.inf
    return out


def sample_categorical(logits: Tensor, gumbel: Tensor) -> Tensor:
    """Gumbel-max (Gumbel 1954): argmax(logits + g) over the last dimension, (...)."""
    return (logits + gumbel).argmax(-1)
