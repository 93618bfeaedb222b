"""GELU (Hendrycks & Gimpel 2016) and the logistic function, for the families that have activations:
the lines of csrc/math/gelu.h and csrc/math/exp2.h.

EXACT: where products are rounded one by one, with rounded divisions too; else with the special
function units.
"""

import triton
import triton.language as tl

from .rng import bits, from_bits

LOG2_E = tl.constexpr(1.4426950408889634)
INV_SQRT_2, INV_SQRT_2_PI = tl.constexpr(0.7071067811865475), tl.constexpr(0.3989422804014327)
TWICE, CUBE = tl.constexpr(1.5957691216057308), tl.constexpr(0.044715)  # of the fast form
THREE_CUBES = tl.constexpr(3 * 0.044715)


@triton.jit
def exp2_of(x, EXACT: tl.constexpr):
    """2^x for x <= 126, 0 from -127 down: half the operations of exp_of, which goes further."""
    if EXACT:
        c = tl.where(-127.0 > x, -127.0, x)
        z = c + 12582912.0  # 1.5 * 2^23: the low bits are round(c)
        f = c - (z - 12582912.0)
        p = f * 0.001326465280726552 + 0.009671511128544807
        p = p * f + 0.05550733953714371
        p = p * f + 0.24022242426872253
        p = p * f + 0.6931470036506653
        p = p * f + 1.0
        return p * from_bits((bits(z) << 23) + 0x3F800000)
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x, EXACT: tl.constexpr):
    if EXACT:
        return tl.div_rn(1.0, x)
    else:
        return 1.0 / x


@triton.jit
def logistic(z, EXACT: tl.constexpr):
    """s = 1 / (1 + e^-z) and 1 - s without its cancellation; cut where e^-z were infinite."""
    t = z * -LOG2_E
    e = exp2_of(tl.where(126.0 < t, 126.0, t), EXACT)
    s = reciprocal(1.0 + e, EXACT) - 1.1754943508222875e-38  # 2^-126: 0 from the cut on
    return s, e * s


@triton.jit
def normality(z, EXACT: tl.constexpr):
    """P(N(0, 1) <= z) and e^(-z^2 / 2): Abramowitz & Stegun 7.1.26, absolute error <= 2e-7."""
    x = tl.where(z < 0.0, -z, z) * INV_SQRT_2
    e = exp2_of(x * x * -LOG2_E, EXACT)
    t = reciprocal(x * 0.3275911 + 1.0, EXACT)
    p = t * 1.061405429 + -1.453152027
    p = p * t + 1.421413741
    p = p * t + -0.284496736
    p = p * t + 0.254829592
    upper = p * t * e * 0.5
    return tl.where(z < 0.0, upper, 1.0 - upper), e


@triton.jit
def gelu_of(z, EXACT: tl.constexpr):
    below, density = normality(z, EXACT)
    return z * below


@triton.jit
def gelu_slope(z, EXACT: tl.constexpr):
    below, density = normality(z, EXACT)
    return below + z * (density * INV_SQRT_2_PI)


@triton.jit
def gelu_tanh_of(z, EXACT: tl.constexpr):
    s, rest = logistic(z * TWICE * (z * z * CUBE + 1.0), EXACT)
    return z * s


@triton.jit
def gelu_tanh_slope(z, EXACT: tl.constexpr):
    t = z * z
    s, rest = logistic(z * TWICE * (t * CUBE + 1.0), EXACT)
    return s * (z * rest * (TWICE * (t * THREE_CUBES + 1.0)) + 1.0)
