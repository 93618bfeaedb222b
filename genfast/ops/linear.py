"""linear: act(x weight^T + bias), by the product that is fast on this processor.

PyTorch's fp32 products are MKL's, which leaves the 512-bit units of AMD's processors alone: 180 to
210 of 490 GFLOP/s on two Zen 5 cores, and 15 to 60 GB/s of the weight for few rows. There, and from
the sizes that were measured, they are our kernels': 300 to 460 GFLOP/s, and 60 to 180 GB/s. Zen 4
has units of 256 bits, which MKL fills (ours took 0.95 to 1.2 of its time): few rows alone are ours.
With AVX2 alone (Zen 3) it fills them from 128 rows on, and up to 96 are ours.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast._native import _C, VECTOR_BITS
from genfast.ops import _check
from genfast.ops._backend import kernels
from genfast.ops._road import (
    DIRECT,
    GRAD,
    SLOW,
    Node,
    cpu_gate,
    differentiable_backward,
    is_compiling,
    plain,
    wants_graph,
)

_relu_backward = torch.ops.aten.threshold_backward.default
_unsafe_view = torch.ops.aten._unsafe_view.default
_INFO = _C.build_info()
_AMD = (
    _INFO["vendor"] == "AuthenticAMD" and VECTOR_BITS >= 256 and torch.backends.mkl.is_available()
)
_ZEN_5 = _INFO["amd_512_bit_unit"]
_WIDE = _AMD and VECTOR_BITS == 512 and _ZEN_5
# Rows up to which the kernels win. On Zen 3 the product of 17 to 64 took 0.57 to 0.87 of MKL's
# time, of 96 0.77 to 0.98, of 128 to 320 0.84 to 1.2.
_MOST = sys.maxsize if _WIDE else 96 if VECTOR_BITS == 256 else 0
# Multiplications from which the kernels win: products of 2^19 take 0.53 to 0.8 of MKL's time, but
# the call from Python makes 1.2 to 1.4 of that (2^21: 0.6 to 0.8). Larger ones take 0.41 to 0.57.
# oneDNN's take as long (0.94 to 1.09 from 32 to 25,000 rows, either order of the weight), but it
# makes and keeps code for every number of rows: 0.5 ms and 0.7 MB each, gigabytes for batches of
# changing lengths.
_LEAST = 1 << 21
# The same of a weight's gradient: of 400 x 40 over 128 rows 0.5 times MKL's time, of 400 x 20, half
# the size, 1.05 times.
_LEAST_GRADIENT = 1 << 21
# Rows up to which the kernel for few wins: of 1, 8 and 16 it takes 0.4, 0.4 and 0.5 times MKL's
# time at AVX-512, 0.4, 0.7 and 0.9 times at AVX2.
_FEW = 16
# Weights, of one row and of more, and columns from which that pays for asking. On Zen 4 one row of
# 2^15 weights took 1.6 times PyTorch's time and of 2^16 1.2, 16 rows of 64 columns 1.6 and of 128
# 1.1; from these limits on 0.23 to 1.06.
_LEAST_WEIGHTS, _LEAST_COLUMNS = ((1 << 15,) * 2, 1) if _ZEN_5 else ((1 << 17, 1 << 16), 256)


def _pays_for_few(rows: int, weights: int, columns: int) -> bool:
    return weights >= _LEAST_WEIGHTS[rows > 1] and columns >= _LEAST_COLUMNS


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """a (M, K) by b (N, K) transposed, plus bias (N,): of plain tensors, without a graph."""
    if _AMD and a.is_cpu and a.dtype == b.dtype == torch.float32:
        (M, K), N = a.shape, len(b)
        if M <= _FEW:
            own = _pays_for_few(M, N * K, K) and b.stride(1) == 1 and K % 16 == 0
        else:
            own = M <= _MOST and M * K * N >= _LEAST
        if own:
            y = a.new_empty(M, N)
            if kernels.linear(y, a, b, bias, relu):
                return y
    y = F.linear(a, b, bias)
    return y.relu_() if relu else y


def weight_gradient(
    g: Tensor, x: Tensor, of_weight: bool = True, of_bias: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by weight and bias, or None, of x (M, K) by weight (N, K) transposed, plus bias
    (N,), from g (M, N)."""
    (M, K), N = x.shape, g.shape[1]
    if of_weight and _WIDE and M * K * N >= _LEAST_GRADIENT:
        dw, db = x.new_empty(N, K), x.new_empty(N) if of_bias else None
        if kernels.linear_weight(dw, db, g, x):
            return dw, db
    return g.t() @ x if of_weight else None, g.sum(0) if of_bias else None


class _Linear(Node):
    @staticmethod
    def forward(ctx, x, weight, bias, relu):
        y = _forward(x, weight, bias, relu)
        ctx.save_for_backward(x, weight, y if relu else None)
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, y = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        if wants_graph() or not plain(g):
            g = g if y is None else torch.where(y <= 0, 0, g)
            dx, dw = differentiable_backward(F.linear, (x, weight), (g,))
            db = rows_of(g).sum(0) if of_bias else None
            return dx if of_x else None, dw if of_weight else None, db, None
        g = g if y is None else _relu_backward(g, y, 0)
        rows = rows_of(g)
        dx = like_rows_of(x, product(rows, weight.t())) if of_x else None
        gradients = weight_gradient(rows, rows_of(x), of_weight, of_bias)
        return dx, *gradients, None


def rows_of(x: Tensor) -> Tensor:
    """(..., K) -> (M, K)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def like_rows_of(x: Tensor, y: Tensor) -> Tensor:
    """(M, N) -> (..., N), and no view: of a Function's nobody may change one in place, as
    nn.ReLU(inplace=True) does."""
    return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def _forward(x, weight, bias, relu):
    return like_rows_of(x, product(rows_of(x), weight, bias, relu))


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, act: str = "linear"
) -> Tensor:
    """act(input weight^T + bias): F.linear, its arguments and results; its errors too.

    input: (..., K), weight: (N, K), bias: (N,). act: "linear" or "relu". Where that was measured to
    be faster than PyTorch's product (fp32 on an AMD processor): a kernel for up to 16 rows, as in
    decoding; from 2^21 multiplications, with AVX2 alone (Zen 3) one for up to 96, and with units of
    512 bits (Zen 5) kernels for any number and for the gradients by weight and bias.
    Differentiable any number of times. Raises ValueError for another act.
    """
    relu = act == "relu"
    if not relu and act != "linear":
        _check.choice("act", act, ("linear", "relu"))
    if _AMD and not is_compiling():
        try:
            # Sizes first: small calls are most, and asking for the road takes 0.5 us.
            K, weights = input.shape[-1], weight.numel()
            rows = input.numel() // K
            many = rows <= _MOST and rows * weights >= _LEAST
            few = (
                rows <= _FEW
                and _pays_for_few(rows, weights, K)
                and not (weight.requires_grad and torch.is_grad_enabled())  # nor for the node
            )
            fits = (
                (few or many)
                and input.is_cpu
                and weight.is_cpu
                and input.dtype == weight.dtype == torch.float32
                and (
                    bias is None
                    or (bias.dtype == torch.float32 and bias.shape == weight.shape[:1])
                    and bias.is_cpu
                )
                and K == weight.shape[1]
                and weight.dim() == 2
                and not torch.is_autocast_enabled("cpu")
            )
            road = cpu_gate(input, weight, bias) if fits else SLOW
            if road == DIRECT:
                return _forward(input, weight, bias, relu)
            if road == GRAD and many and _WIDE:
                return _Linear.apply(input, weight, bias, relu)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, ZeroDivisionError):
            pass  # PyTorch names the argument
    y = F.linear(input, weight, bias)
    return F.relu(y) if relu else y
