"""What the benchmarks of ops share: drawn tensors, a call with its gradient, and one op against the
PyTorch lines that it replaces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import genfast
from genfast.benchmarks.harness import Work, assert_judged

SEED = 1234


def draw(shape, stream: int, device, dtype=torch.float32) -> Tensor:
    return genfast.randn(shape, seed=SEED, stream=stream, device=device).to(dtype)


def step(forward: Callable, leaves: Sequence[Tensor], grads) -> Callable:
    """A call that runs forward and backward; grads None: forward alone."""
    if grads is None:
        return partial(forward, *leaves)
    leaves = [x.detach().requires_grad_() for x in leaves]
    return lambda: torch.autograd.grad(forward(*leaves), leaves, grads)


def compare(ours, plain, leaves, backward: bool) -> Work:
    """ours and plain: functions of `leaves`, to a tensor or several; plain in any dtype. The proof
    takes the road that is timed: without a graph where nothing goes backward."""
    found = ours(*leaves)
    found = found if isinstance(found, tuple) else (found,)
    grads = [torch.empty_like(y).copy_(draw(y.shape, 9 + i, y.device))
             for i, y in enumerate(found)]  # fmt: skip

    def calls(function):
        return step(function, leaves, grads if backward else None)

    def proof():
        def values(function, dtype):
            given = [x.detach().to(dtype).requires_grad_(backward) for x in leaves]
            y = function(*given)
            y = y if isinstance(y, tuple) else (y,)
            if not backward:
                return y
            gradients = torch.autograd.grad(y, given, [g.to(dtype) for g in grads])
            return *(t.detach() for t in y), *gradients

        dtype = found[0].dtype
        three = values(ours, dtype), values(plain, dtype), values(plain, torch.float64)
        for i, (a, b, c) in enumerate(zip(*three, strict=True)):
            assert_judged(f"tensor {i}", a, b, c, 2.0 if i < len(grads) else 3.0)

    return Work(
        ours=calls(ours),
        rivals={"eager": calls(plain)},
        late={"compile": lambda: calls(torch.compile(plain, dynamic=False))},
        proof=proof,
    )
