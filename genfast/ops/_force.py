"""Which backend was asked for: by the process, by a block of one thread, or by an argument.

`auto`: the table of _choice.py decides. `cpu`, `cuda`, `triton`: these kernels; `torch`: PyTorch's
own attention; `reference`: plain PyTorch for everything (the noise stays the contract's). Asked for
by name, a backend does the call or raises with the reason: of what has kernels for more than one
device, no composite stands in for a forward. Not so what has CPU kernels alone (filtering,
normalization, convolution, linear, bernoulli_nll): models mix these with the others, and on a GPU
PyTorch does them. Nor does `cuda`, set for a process or a block, mean tensors on the CPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator

import torch
from torch.autograd import forward_ad

from genfast._native import _C

HAVE_TRITON = importlib.util.find_spec("triton") is not None
# Decides at the first import of the kernels, for good: they then run on the CPU, for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ("auto", "cpu", "cuda", "triton", "torch", "reference")
# own: the block that was entered last in any thread, or "none" behind one; dynamo guards a
# dictionary, and not what a thread has of its own.
_state = {"name": "auto", "own": ""}


# What the gate makes of a block (csrc/gate.h): a slow road that looks, but for "auto"; "cpu" lets
# what has no registered op run as ever. A process's "cpu" and "cuda" need no look either.
_NOTHING, _CPU_BLOCK, _OTHER = range(3)
_BLOCK = {"auto": _NOTHING, "cpu": _CPU_BLOCK}
_PROCESS = dict.fromkeys(("auto", "cpu", "cuda"), _NOTHING)


class _Own(threading.local):
    def __init__(self):  # an attribute of the class would have no guard of dynamo's
        self.name: str | None = None
        self.depth = 0  # blocks around the current call


_own = _Own()


def get_backend() -> str:
    """What is in force in this thread."""
    return (_state["own"] and _own.name) or _state["name"]


def forced_reference() -> bool:
    """PyTorch does every family that has CPU kernels alone, and composes the others."""
    return get_backend() in ("reference", "torch")


def process_backend() -> str:
    return _state["name"]


def set_process_backend(name: str) -> None:
    _state["name"] = name
    _C.asked(_PROCESS.get(name, _OTHER))


def _enter(name: str | None) -> None:
    _own.name, _state["own"] = name, name or "none"
    _C.asked_here(-1 if name is None else _BLOCK.get(name, _OTHER), 1 if name == "cuda" else -1)


class _Blocks:
    """Those open in all threads. `switch()` is called at the first and behind the last."""

    def __init__(self):
        self.open, self.lock = 0, threading.Lock()
        self.switch: Callable[[], None] = lambda: None  # _backend.py has it
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        """The other threads and their blocks are gone."""
        self.open, self.lock = _own.depth, threading.Lock()
        self.switch()

    def _count(self, step: int) -> None:
        with self.lock:
            before, self.open = self.open, self.open + step
            if (before == 0) != (self.open == 0):
                self.switch()
        _own.depth += step

    @contextlib.contextmanager
    def enter(self, name: str | None) -> Iterator[None]:
        """In this thread, until its end. But for "auto" calls take the slow road, through the
        registered op (9 to 28 us): it keeps the name for the gradient, which may run in another
        thread."""
        before = _own.name
        self._count(1)
        try:
            _enter(name)
            yield
        finally:
            _enter(before)
            self._count(-1)


blocks = _Blocks()


def remembering(setup_context: Callable) -> Callable:
    """A setup_context that keeps the block's backend for `resumed`; not in a compiled graph, which
    has traced both away."""

    def run(ctx, inputs, output):
        ctx.backend = _own.name
        setup_context(ctx, inputs, output)

    return run


def resumed(backward: Callable) -> Callable:
    """A backward that runs on the backend that its forward was asked for in a block."""

    def run(ctx, *grads):
        if ctx.backend is None:
            return backward(ctx, *grads)
        with blocks.enter(ctx.backend):
            return backward(ctx, *grads)

    return run


def triton_runs(device: torch.device) -> bool:
    """Triton kernels can run on tensors of `device`."""
    return HAVE_TRITON and (device.type == "cuda" or (device.type == "cpu" and _INTERPRETED))


def no_triton(device: torch.device) -> str:
    return (
        f'backend: "triton" was asked for, and Triton does not run on {device.type} tensors here; '
        "move them to a GPU, set TRITON_INTERPRET=1 before the import, or "
        'genfast.set_backend("auto")'
    )


def may_compose(entry: str, *operands: torch.Tensor | None, lacks: str | None = None) -> None:
    """Asked wherever a composite is about to do a call of `entry`: RuntimeError where the backend
    in force was asked for by name. Within a backward, and for calls without elements, it may.
    lacks: what about the call the kernels have not got, where that is known."""
    name = get_backend()
    if name in ("auto", "reference"):
        return
    given = [x for x in operands if x is not None]
    if torch._C._current_graph_task_id() != -1 or any(x.numel() == 0 for x in given):
        return
    device = given[0].device.type
    if name == "cuda" and device != "cuda":
        return
    if name == "triton" and not triton_runs(given[0].device):
        raise RuntimeError(no_triton(given[0].device))
    if name == "torch":
        why = "PyTorch has attention alone, of four dimensions and without options of ours"
    elif name in ("cpu", "cuda") and device != name:
        why = f"the tensors are on {device}"
    elif any(x.dtype is torch.float64 for x in given):
        why = "float64 has no kernels"
    elif forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None:
        why = "function transforms and forward-mode gradients have no kernels"
    else:
        why = f"{lacks or 'this memory order, or these sizes,'} has no kernels"
    raise RuntimeError(
        f'backend: "{name}" was asked for, and it cannot do this call of {entry}: {why}; '
        'genfast.set_backend("auto") lets PyTorch compose it'
    )
