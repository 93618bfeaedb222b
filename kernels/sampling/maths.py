"""Per-element maths of reparameterized sampling: the lines of csrc/math/sampling.h.

Products are rounded one by one here too (`enable_fp_fusion=False`, `tl.div_rn`), so elementwise
results are those of the CPU bit for bit; only the order of sums differs, and it is fixed.
"""

import triton
import triton.language as tl

from ..rng import from_bits, log_positive

# Values of the native enums Transform and Side.
NONE, TANH, EXP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
KL, LOG_PROB = tl.constexpr(1), tl.constexpr(2)
LN_2 = tl.constexpr(0.6931471805599453)
LN_2_PI = tl.constexpr(1.8378770664093453)


@triton.jit
def exp_of(x):
    """e^x for every x: gradual underflow, inf above 88.72, NaN stays NaN."""
    c = tl.where(x < 89.0, x, 89.0)
    c = tl.where(c > -104.0, c, -104.0)
    n = (c * 1.44269504 + 12582912.0) - 12582912.0  # 1.5 * 2^23: round to nearest
    r = (c - n * 0.693359375) - n * -2.12194440e-4
    q = r * 0.001381459878757596 + 0.008368716575205326
    q = q * r + 0.04166838899254799
    q = q * r + 0.1666652113199234
    q = q * r + 0.4999999403953552
    y = (q * (r * r) + r) + 1.0
    k = n.to(tl.int32)
    half = k >> 1  # two factors, so that 2^128 and 2^-150 are in reach
    s0 = from_bits((half + 127).to(tl.uint32, bitcast=True) << 23)
    s1 = from_bits((k - half + 127).to(tl.uint32, bitcast=True) << 23)
    return tl.where(x == x, (y * s0) * s1, x)


@triton.jit
def sigmoid_of(x):
    return tl.div_rn(1.0, 1.0 + exp_of(-x))


@triton.jit
def tanh_of(x):
    """A series below 0.25, where 1 - e^-2|x| would cancel."""
    a = tl.where(x < 0.0, -x, x)
    e = exp_of(a * -2.0)
    t = x * x
    big = tl.div_rn(1.0 - e, 1.0 + e)
    s = t * 0.021869488536155203 + -0.05396825396825397
    s = s * t + 0.13333333333333333
    s = s * t + -0.3333333333333333
    small = (s * t) * x + x
    return tl.where(a < 0.25, small, tl.where(x < 0.0, -big, big))


@triton.jit
def softplus_of(x):
    e = exp_of(tl.where(x < 0.0, x, -x))
    return tl.where(x > 0.0, x, 0.0) + log_positive(1.0 + e)


@triton.jit
def transform_value(z, TRANSFORM: tl.constexpr):
    if TRANSFORM == TANH:
        return tanh_of(z)
    elif TRANSFORM == EXP:
        return exp_of(z)
    else:
        return z


@triton.jit
def log_slope(z, TRANSFORM: tl.constexpr):
    """ln T'(z); for tanh in the form that does not cancel."""
    if TRANSFORM == TANH:
        return ((LN_2 - z) - softplus_of(z * -2.0)) * 2.0
    elif TRANSFORM == EXP:
        return z
    else:
        return tl.zeros_like(z)


@triton.jit
def slope(y, TRANSFORM: tl.constexpr):
    """T'(z) of y."""
    if TRANSFORM == TANH:
        return 1.0 - y * y
    elif TRANSFORM == EXP:
        return y
    else:
        return tl.full(y.shape, 1.0, tl.float32)


@triton.jit
def log_slope_gradient(y, TRANSFORM: tl.constexpr):
    """d ln T'(z) / dz of y."""
    if TRANSFORM == TANH:
        return y * -2.0
    elif TRANSFORM == EXP:
        return tl.full(y.shape, 1.0, tl.float32)
    else:
        return tl.zeros_like(y)
