"""Which backend was asked for: by the process, by a block of one thread, or by an argument.

`auto`: the table of _choice.py decides. `cpu`, `cuda`, `triton`: these kernels; `torch`: PyTorch's
own attention; `reference`: plain PyTorch for everything (the noise stays the contract's). Asked for
by name, a backend does the call or raises with the reason: of what has kernels for more than one
device, no composite stands in for a forward or its gradient (for a gradient's gradient one always
does). Not so what has CPU kernels alone (convolution, linear): models mix these with the others,
and on a GPU PyTorch does them. Nor does `cuda`, set for a process or a
block, mean tensors on the CPU.
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
_state = {"name": "auto"}  # in a dictionary, which Dynamo guards

# Those of csrc/gate.h, which says what they mean. A process's "cpu" and "cuda" need no look.
_NOTHING, _AUTO_BLOCK, _CPU_BLOCK, _OTHER, _CUDA_BLOCK = range(5)
_BLOCK = {"auto": _AUTO_BLOCK, "cpu": _CPU_BLOCK, "cuda": _CUDA_BLOCK}
_PROCESS = dict.fromkeys(("auto", "cpu", "cuda"), _NOTHING)


class _Thread:
    """What a thread asked for. Another one may end its blocks, so it is no thread's alone."""

    def __init__(self):
        self.open: list[_Block] = []
        self.name: str | None = None  # of the last
        self.composes = False


class _Own(threading.local):
    def __init__(self):  # an attribute of the class would have no guard of Dynamo's
        self.thread = _Thread()


_own = _Own()


def get_backend() -> str:
    """What is in force in this thread."""
    return _own.thread.name or _state["name"]


def forced_reference() -> bool:
    """PyTorch composes every family, or, by "torch", all that is not attention."""
    return get_backend() in ("reference", "torch")


def process_backend() -> str:
    return _state["name"]


def _of_process() -> int:
    return _PROCESS.get(_state["name"], _OTHER)


def _asked() -> int:
    """Where any thread has a block open."""
    thread = _own.thread
    around = {_state["name"], *(block.name for block in thread.open)}
    if thread.name is None or around == {"auto"}:
        return _of_process()
    return _BLOCK.get(thread.name, _OTHER)


_C.ask(_asked)


class _Block:
    def __init__(self, name: str):
        self.name, self.thread = name, _own.thread


class _Blocks:
    """Those open in all threads. `switch()` is called when there are some, and when none is left.

    An interrupt may come between any two lines: what is true follows from the lists, and beginning
    and ending can be repeated.
    """

    def __init__(self):
        self.open: set[_Block] = set()
        self.switched = False
        self.lock = threading.RLock()  # a signal's handler may have blocks too
        self.switch: Callable[[], None] = lambda: None  # _backend.py has it
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        """The other threads and their blocks are gone."""
        self.open, self.lock = set(_own.thread.open), threading.RLock()
        self.follow()

    def set_process(self, name: str) -> None:
        with self.lock:
            _state["name"] = name
            self.follow()

    def follow(self) -> None:
        with self.lock:
            self.switch()
            _C.asked(-1 if self.open else _of_process())
            self.switched = bool(self.open)

    def _changed(self, thread: _Thread) -> None:
        thread.name = [None, *(block.name for block in thread.open)][-1]
        if self.switched != bool(self.open):
            self.follow()

    def _begin(self, block: _Block) -> None:
        with self.lock:
            block.thread.open.append(block)
            self.open.add(block)
            self._changed(block.thread)

    def _end(self, block: _Block) -> None:
        with self.lock:
            if block in block.thread.open:
                block.thread.open.remove(block)
            self.open.discard(block)
            self._changed(block.thread)

    @contextlib.contextmanager
    def enter(self, name: str) -> Iterator[None]:
        """In this thread, until its end. But for "auto" calls take the slow road, through the
        registered op (9 to 28 us): it keeps the name for the gradient, which may run in another
        thread."""
        block = _Block(name)
        try:
            self._begin(block)
            yield
        finally:
            try:
                self._end(block)
            except BaseException:
                self._end(block)
                raise


blocks = _Blocks()


def remembering(setup_context: Callable) -> Callable:
    """A setup_context that keeps the block's backend for `resumed`; not in a compiled graph, which
    has traced both away."""

    def run(ctx, inputs, output):
        ctx.backend = _own.thread.name
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


def composed(composite: Callable, *inputs):
    """composite(*inputs), whichever backend was asked for: where a gradient's gradient is wanted,
    which no kernel has."""
    thread = _own.thread
    before, thread.composes = thread.composes, True
    try:
        return composite(*inputs)
    finally:
        thread.composes = before


def _unnamed() -> str:
    if not torch.compiler.is_dynamo_compiling() and torch._C._current_graph_task_id() != -1:
        return "this gradient"
    return "this memory order, or these sizes,"


# What PyTorch does around its attention; noise is the contract's, whatever computes with it.
_OUTSIDE_TORCH = {"random", "bias_act", "gated_act", "upfirdn2d", "normalize"}


def may_compose(entry: str, *operands: torch.Tensor | None, lacks: str | None = None) -> None:
    """Asked wherever a composite is about to do a call of `entry`, or will have to do its gradient:
    RuntimeError where the backend in force was asked for by name. Within `composed`, and for calls
    without elements, it may. lacks: what about the call the kernels have not got, if known."""
    name = get_backend()
    if name in ("auto", "reference") or (name == "torch" and entry in _OUTSIDE_TORCH):
        return
    given = [x for x in operands if x is not None]
    if _own.thread.composes or any(x.numel() == 0 for x in given):
        return
    device = given[0].device.type
    if name == "cuda" and device != "cuda":
        return
    if name == "triton" and not triton_runs(given[0].device):
        raise RuntimeError(no_triton(given[0].device))
    if name == "torch":
        why = "PyTorch has attention alone, of four dimensions and without options of ours"
        if entry == "attention" and forward_ad._current_level >= 0:
            why = "PyTorch's attention has no forward-mode gradients"
    elif name in ("cpu", "cuda") and device != name:
        why = f"the tensors are on {device}"
    elif any(x.dtype is torch.float64 for x in given):
        why = "float64 has no kernels"
    elif forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None:
        why = "function transforms and forward-mode gradients have no kernels"
    else:
        why = f"{lacks or _unnamed()} has no kernels"
    raise RuntimeError(
        f'backend: "{name}" was asked for, and it cannot do this call of {entry}: {why}; '
        'genfast.set_backend("auto") lets PyTorch compose it'
    )
