"""Checks of the slow road. Each message names the argument, what was expected, what came and what
to do. The fast roads never run them: the native side answers "not handled" and the call lands here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_DIMS = 12  # of the native tensor view
_MOST = sys.float_info.max


def describe(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        dtype = str(x.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {tuple(x.shape)} on {x.device}"
    if hasattr(x, "shape") and hasattr(x, "dtype"):  # numpy's, without its numbers
        return f"{type(x).__name__} of shape {tuple(x.shape)} and dtype {x.dtype}"
    return f"{type(x).__name__} {x!r}"


def tensor(name: str, x: Any, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor, got {describe(x)}; wrap it with torch.as_tensor"
        )
    if x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one; pad or unbind it")
    if x.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(
            f"{name}: expected dtype {names}, got {describe(x)}; convert it with .to({dtypes[0]})"
        )
    if x.layout is not torch.strided:
        raise TypeError(
            f"{name}: expected a dense (strided) tensor, got layout {x.layout}; use .to_dense()"
        )
    if x.dim() > MAX_DIMS:
        raise ValueError(
            f"{name}: expected at most {MAX_DIMS} dimensions, got {x.dim()}; flatten some"
        )


def same_device(**tensors: Any) -> None:
    devices = {k: x.device for k, x in tensors.items() if isinstance(x, torch.Tensor)}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{k} on {d}" for k, d in devices.items())
        raise ValueError(f"expected all tensors on one device, got {got}; move them with .to()")


def broadcastable(**tensors: torch.Tensor) -> None:
    try:
        torch.broadcast_shapes(*(x.shape for x in tensors.values()))
    except RuntimeError:
        got = ", ".join(f"{k} {tuple(x.shape)}" for k, x in tensors.items())
        raise ValueError(
            f"expected shapes that broadcast together, got {got}; reshape or expand one"
        ) from None


def same_shape(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if x.shape != other.shape:
        raise ValueError(
            f"{name}: expected the shape of {other_name}, {tuple(other.shape)}, "
            f"got {tuple(x.shape)}; reshape or expand it"
        )


def choice(name: str, value: Any, table: Iterable) -> None:
    table = tuple(table)
    if value not in table:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, table))}, got {value!r}")


def number(
    name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> None:
    """A finite number within [low, high]: Python's or a tensor of one element, whose value is read
    on the CPU alone."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name}: expected a number or a tensor of one element, got {describe(value)}"
            )
        value = _read(value)
        if value is None:
            return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    fits = (value > low if open_low else value >= low) and value <= high
    # Comparisons, which dynamo has for a symbol too; of an int beyond every float they are exact.
    if not (fits and -_MOST <= value <= _MOST):
        bounds = [f"{'>' if open_low else '>='} {low}"] if low > -math.inf else []
        bounds += [f"<= {high}"] if high < math.inf else []
        expected = " ".join(["a finite number", ", ".join(bounds)]).rstrip()
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _read(x: torch.Tensor) -> Real | None:
    """The value of one element, or None where that would wait for a device or there is none."""
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or not x.is_cpu:
        return None
    try:
        return x.item()
    except RuntimeError:  # a transform's
        return None


def integer(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> None:
    exact = type(value) is int  # the others' classes take 1 us to ask
    if not exact and (isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt))):
        raise TypeError(f"{name}: expected an int, got {describe(value)}")
    if low is not None and value < low:
        raise ValueError(f"{name}: expected an int >= {low}, got {value!r}")
    if high is not None and value > high:
        raise ValueError(f"{name}: expected an int <= {high}, got {value!r}")


def counts(**values: Any) -> None:
    for name, value in values.items():
        integer(name, value, low=1)


def output(out: Any, shape: Sequence[int], dtype: torch.dtype | None) -> None:
    if out.requires_grad:
        raise ValueError(
            "out: expected a tensor that does not require grad, got requires_grad=True; "
            "pass out.detach()"
        )
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"out: expected shape {tuple(shape)}, got {tuple(out.shape)}")
    if dtype is not None and out.dtype != dtype:
        raise TypeError(
            f"out: expected dtype {dtype}, got {out.dtype}; leave dtype out or match it"
        )
    own_memory("out", out)


def own_memory(name: str, x: torch.Tensor) -> None:
    """Of a tensor that is written."""
    shared = any(n > 1 and s == 0 for n, s in zip(x.shape, x.stride(), strict=True))
    if shared and x.numel():
        raise ValueError(
            f"{name}: expected memory of its own for every element, got an expanded tensor; "
            f"pass {name}.contiguous()"
        )
