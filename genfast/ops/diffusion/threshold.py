"""Dynamic thresholding: the exact per-sample quantile of |x0| by selection, without a sort and
without torch.quantile's limit of 2^24 elements."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genfast.ops import _check
from genfast.ops._backend import kernels, under
from genfast.ops._force import forced_reference, may_compose
from genfast.ops._road import DIRECT, define, gate, is_compiling, transforming
from genfast.ops.diffusion import _common
from genfast.ops.diffusion.step import COLUMNS
from genfast.reference import diffusion as reference


def _native(x, m, table, row, ratio, max_value):
    s = torch.empty(x.shape[:1], dtype=torch.float32, device=x.device)
    return s if kernels.dynamic_threshold(x, m, s, table, None, row, ratio, max_value) else None


def _composite(x, m, table, row, ratio, max_value):
    learned = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, m, table)
    )
    may_compose("dynamic_threshold", x, m, lacks="a gradient" if learned else None)
    if m is not None:
        dtype = _common.wide_dtype(x, m)
        coef = table[row].to(dtype)
        x = coef[0] * x.to(dtype) + coef[1] * m.to(dtype)
    return reference.dynamic_threshold(x, ratio, max_value)


def _impl(x, m, table, row, ratio, max_value):
    s = _native(x, m, table, row, ratio, max_value) if _common.on_kernel(x, m) else None
    return _composite(x, m, table, row, ratio, max_value) if s is None else s


_op = define(
    "dynamic_threshold(Tensor x, Tensor? m, Tensor? table, SymInt row, float ratio, "
    "float max_value) -> Tensor",
    _impl,
    lambda x, m, *rest: x.new_empty(x.shape[:1], dtype=_common.wide_dtype(x, m)),
)


def dynamic_threshold(
    x0: Tensor,
    ratio: float = 0.995,
    max_value: float = 1.0,
    *,
    m: Tensor | None = None,
    table: Tensor | None = None,
    row: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Bound s (B,) = clamp(quantile(|x0|, ratio), 1, max_value); x0 = clamp(x0, +-s) / s follows in
    `diffusion_step(..., threshold=s)`.

    x0: (B, ...), not empty; fp32 result (fp64 for float64). ratio in [0, 1], max_value >= 1. With m
    and a solver plan's table (`SolverPlan.table_on(device)`), x0 = d_x x + d_m m of that row is
    formed on the fly from x (the first argument) and m. Linear interpolation as torch.quantile,
    towards an infinity too; NaN anywhere gives NaN. Differentiable through plain PyTorch.
    backend: as `genfast.set_backend`. Raises TypeError / ValueError naming the argument.
    Saharia et al. 2022, section 2.3.
    """
    if backend is not None:
        return under(dynamic_threshold, locals())
    if (m is None) == (table is None) and type(row) is int and not is_compiling():
        try:
            if (
                isinstance(x0, Tensor)
                and 1.0 <= max_value < math.inf
                and gate(x0, m, table) == DIRECT
            ):
                found = _native(x0, m, table, row, ratio, max_value)
                if found is not None:
                    return found
        except (TypeError, ValueError):
            pass  # the checks below name the argument
    _check.tensor("x0", x0)
    if x0.dim() == 0 or x0.numel() == 0:
        raise ValueError(f"x0: expected shape (B, ...) with elements, got {tuple(x0.shape)}")
    _check.number("ratio", ratio, low=0.0, high=1.0)
    _check.number("max_value", max_value, low=1.0)
    if (m is None) != (table is None):
        raise ValueError("m, table: expected both or neither, got one")
    if m is not None:
        _check.tensor("m", m)
        _check.same_shape("m", m, "x0", x0)
        _check.tensor("table", table)
        if table.dim() != 2 or table.shape[1] != COLUMNS:
            raise ValueError(f"table: expected shape (R, {COLUMNS}), got {tuple(table.shape)}")
        _check.same_device(x0=x0, m=m, table=table)
    _check.integer("row", row, low=0, high=None if table is None else table.shape[0] - 1)
    needs = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x0, m, table)
    )
    wide = _common.wide_dtype(x0, m) == torch.float64
    args = (x0, m, table, row, float(ratio), float(max_value))
    if needs or wide or forced_reference() or transforming():
        return _composite(*args)
    if table is not None:
        table = table.to(torch.float32).contiguous()
    return _op(x0, m, table, *args[3:])
