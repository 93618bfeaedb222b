"""The few special functions the planners need, in numpy float64 (scipy is not a dependency of the
core).
"""

from __future__ import annotations

import math

import numpy as np


def phi(k: int, h: float) -> float:
    """phi_k(h) = sum_n h^n / (n+k)!, the exponential-integrator functions: phi_1 = (e^h - 1)/h,
    phi_{k+1} = (phi_k - 1/k!)/h. The recurrence loses k digits-worth of h below 1, the series does
    not."""
    if abs(h) < 1.0:
        return math.fsum(h**n / math.factorial(n + k) for n in range(20))
    if math.isinf(h) and h < 0:
        # phi_k(h) ~ -1/((k-1)! h), 0 in the limit
        return 0.0
    value = math.expm1(h) / h
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / h
    return value


def _beta_cdf(x: np.ndarray, a: float, b: float) -> np.ndarray:
    """Regularised incomplete beta I_x(a, b) for x <= 1/2: the power series of DLMF 8.17.7 (x^a/a
    2F1(a, 1-b; a+1; x) / B), whose terms fall at least as fast as 2^-n."""
    term = np.ones_like(x) / a
    total = term.copy()
    for n in range(1, 60):
        # ratio of x^n (1-b)_n / (n! (a+n)) to its predecessor
        term = term * x * ((n - b) / n) * ((a + n - 1) / (a + n))
        total += term
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return x**a * total * math.exp(-log_beta)


def beta_ppf(q, a: float, b: float) -> np.ndarray:
    """Quantile function of Beta(a, b) for q in [0, 1] (any shape): bisection on the cdf, then
    Newton. Absolute error < 1e-15.
    """
    q = np.asarray(q, np.float64)
    flip = q > _beta_cdf(np.array(0.5), a, b)
    if flip.any():  # work in the lower half, where the series is quick: I_x(a,b) = 1 - I_{1-x}(b,a)
        low = beta_ppf(np.where(flip, 0.0, q), a, b)
        high = 1 - beta_ppf(np.where(flip, 1 - q, 0.0), b, a)
        return np.where(flip, high, low)
    lo, hi = np.zeros_like(q), np.full_like(q, 0.5)
    for _ in range(60):
        mid = (lo + hi) / 2
        below = _beta_cdf(mid, a, b) < q
        lo, hi = np.where(below, mid, lo), np.where(below, hi, mid)
    return np.where(q == 0, 0.0, (lo + hi) / 2)
