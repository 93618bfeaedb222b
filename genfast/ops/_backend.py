"""Which kernel an op calls: of the backend in force (_force.py), or by the table (_choice.py).

`auto`: the native kernel where one exists and PyTorch is not faster, then on a GPU the Triton
kernel (first where the table says so, and alone on a GPU that the package holds no code for), else
the composite.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from genfast._archs import covers
from genfast._native import _C
from genfast.ops import _force
from genfast.ops._choice import (
    ALL_SIZES,
    ANY,
    WIDE_BACKWARD,
    arch,
    gpu_backend,
    table,
    triton_from,
)
from genfast.ops._force import HAVE_TRITON as _HAVE_TRITON
from genfast.ops._force import get_backend, no_triton, triton_runs
from genfast.ops._scratch import with_scratch

_P, _R = ParamSpec("_P"), TypeVar("_R")
_HAVE_CUDA = _C.build_info()["cuda"]
_GPU = torch.version.cuda is not None or torch.version.hip is not None
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Whether `auto` takes the CUDA kernels; None: not known before the first CUDA tensor, because
# asking for the GPU starts CUDA, and a process that has started it cannot be forked.
_cuda_covers = {"gpus": None if _HAVE_CUDA and _GPU else False}

# Native entry point -> module of its Triton twin, which takes the same arguments; None: there is
# none, nor a CUDA kernel, and a GPU takes the composite.
_TRITON = {
    "random": "rng",
    "reparameterize": "sampling",
    "reparameterize_backward": "sampling",
    "gumbel_softmax": "sampling",
    "gumbel_softmax_backward": "sampling",
    "relaxed_bernoulli": "sampling",
    "categorical": "sampling",
    "bernoulli_nll": "sampling",
    "bernoulli_nll_backward": "sampling",
    "diffusion_step": "diffusion",
    "diffusion_step_backward": "diffusion",
    "diffusion_mix": "diffusion",
    "guidance_weights": "diffusion",
    "dynamic_threshold": "diffusion",
    "denoising_loss": "diffusion",
    "attention_forward": "attention",
    "attention_backward": "attention",
    "attention_cached": "attention",
    "attention_append": "attention",
    "bias_act": "filtering",
    "bias_act_backward": "filtering",
    "gated_act": "filtering",
    "gated_act_backward": "filtering",
    "upfirdn2d": "filtering",
    "normalize": "normalization",
    "normalize_backward": "normalization",
    "linear": None,
    "linear_weight": None,
    "conv2d": None,
    "conv2d_weight": None,
}
# Families that are PyTorch's on a GPU where the table says so.
_COMPOSED = ("filtering", "normalization")
_REFUSED = {"categorical": -1}  # what "not handled" is; False elsewhere


class _Kernels:
    """The entry points as the ops call them. On a torch without GPU support they are the native
    functions themselves, so that the choice costs nothing."""


kernels = _Kernels()


def _triton(name: str, forced: bool = True):
    refused = _REFUSED.get(name, False)
    if _TRITON[name] is None:
        return lambda *args: refused

    def run(*args):
        x = next(_tensors(args))
        if not triton_runs(x.device):
            if forced:
                raise RuntimeError(no_triton(x.device))
            return refused
        module = importlib.import_module(f"genfast.kernels.{_TRITON[name]}")
        return getattr(module, name)(*args)

    return run


def _native(name: str):
    return with_scratch(name, getattr(_C, name)) if _GPU else getattr(_C, name)


def _settle() -> None:
    """At the first CUDA tensor: are there CUDA kernels for all GPUs of this machine?"""
    gpus = range(torch.cuda.device_count())
    archs = _C.build_info()["cuda_archs"]
    _cuda_covers["gpus"] = torch.version.cuda is not None and all(
        covers(archs, torch.cuda.get_device_capability(i)) for i in gpus
    )
    _allow_cuda()
    _functions.cache_clear()
    _composes.cache_clear()
    _force.blocks.follow()


def _settles(args: tuple) -> bool:
    first = _cuda_covers["gpus"] is None and next(_tensors(args)).is_cuda
    if first:
        _settle()
    return first


def _cpu(name: str):
    native, refused = getattr(_C, name), _REFUSED.get(name, False)
    return lambda *args: refused if next(_tensors(args)).is_cuda else native(*args)


def _any(name: str):
    """Where all is composed these draw noise, whose bits are the same everywhere."""
    native, portable, refused = _native(name), _triton(name, False), _REFUSED.get(name, False)

    def run(*args):
        done = native(*args)
        if done != refused:
            return done
        return run(*args) if _settles(args) else portable(*args)

    return run


@functools.cache
def _composes(entry: str, feature: str) -> bool:
    if _TRITON.get(entry) not in _COMPOSED:
        return False
    if _cuda_covers["gpus"] is None:
        _settle()
    usable = {"reference", *["triton"] * _HAVE_TRITON, *["cuda"] * bool(_cuda_covers["gpus"])}
    rows = table(gpu=True)
    return gpu_backend(rows, _TRITON[entry], feature, usable, arch("cuda")) == "reference"


def composes(entry: str, feature: str) -> bool:
    """`auto` leaves such a call on a GPU to PyTorch: asked with the first CUDA tensor at hand."""
    return _composes(entry, feature)


# What torch.compiler.assume_constant_result does, without the second that importing Dynamo takes:
# it asks while it traces, instead of tracing how the table's file is read.
composes._dynamo_marked_constant = True


def _auto(name: str):
    """What the table gives to PyTorch is refused; but for gradients, whose forward was not."""
    run, refused = _by_size(name), _REFUSED.get(name, False)
    if _TRITON[name] not in _COMPOSED or name.endswith("_backward"):
        return run

    def unless_composed(*args):
        # With statistics, which a gradient wants, the table has been asked before.
        asked = name == "normalize" and args[1] is not None
        if (
            not asked
            and next(_tensors(args)).is_cuda
            and composes(name, _feature_and_size(name, args)[0])
        ):
            return refused
        return run(*args)

    return unless_composed


def _by_size(name: str):
    """CUDA, then Triton; the other way round from the table's sizes on."""
    native, portable, refused = _native(name), _triton(name, False), _REFUSED.get(name, False)

    def run(*args):
        done = native(*args)
        if done != refused:
            return done
        return run(*args) if _settles(args) else portable(*args)

    settled = bool(_cuda_covers["gpus"])
    if settled:
        run = native  # what it refuses Triton does too; a layer less spares 0.5 us

    rows, here = table(gpu=settled), arch("cuda") if settled else ANY
    limits = {
        (feature, t): triton_from(rows, _TRITON[name], feature, _name(t), here)
        for feature in _features(name)
        for t in _FLOATS
    }
    if not _HAVE_TRITON or min(limits.values()) == ALL_SIZES:
        return run

    def portable_first(*args):
        x = next(_tensors(args))
        if x.is_cuda:
            feature, size = _feature_and_size(name, args)
            if size >= limits.get((feature, x.dtype), ALL_SIZES):
                done = portable(*args)
                if done != refused:
                    return done
        return run(*args)

    return portable_first


def _tensors(args: tuple) -> Iterator[torch.Tensor]:
    return (a for a in args if isinstance(a, torch.Tensor))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _features(entry: str) -> tuple[str, ...]:
    """Of the table's rows for an entry point."""
    kind = {"attention_backward": "wide", "normalize": "plain"}.get(entry)
    return (entry,) if kind is None else (entry, f"{kind} {entry}")


def _feature_and_size(entry: str, args: tuple) -> tuple[str, int]:
    """The size is B Hq Sq Sk D of a backward call (dO, dLSE, five gradients, q, k, v, ...), -1 of
    heads for which Triton's may not find the room; elements elsewhere."""
    if entry == "normalize":
        *_, scale, shift, add, _, _, _, act, _ = args
        return norm_feature(scale, shift, add, act), args[0].numel()
    if entry != "attention_backward":
        return entry, next(_tensors(args)).numel()
    q, k, v = args[7:10]
    widest = max(q.shape[-1], v.shape[-1])
    size = q.numel() * k.shape[-2] if widest <= 256 else -1
    return _features(entry)[widest > WIDE_BACKWARD], size


def norm_feature(scale, shift, add, act: int, training: bool = False) -> str:
    """PyTorch has kernels of its own for a plain norm, and a node of C++ for its gradient; several
    passes for the others."""
    if not (scale is shift is add is None and act == 0):
        return "normalize"
    return "plain training" if training else "plain normalize"


# Backend -> what makes the function of an entry point, on a torch with GPU support.
_MAKERS: dict[str, Callable] = {
    "auto": _auto,
    "cpu": _cpu,
    "cuda": _native,
    "triton": _triton,
    "torch": _any,
    "reference": _any,
}


@functools.cache
def _functions(backend: str) -> dict[str, Callable]:
    """Entry point -> what does it."""
    make = _MAKERS[backend] if _GPU or backend == "triton" else _native
    return {entry: make(entry) for entry in _TRITON}


def _by_thread(entry: str):
    return lambda *args: _functions(get_backend())[entry](*args)


_SWITCHES = {entry: _by_thread(entry) for entry in _TRITON}


def _allow_cuda() -> None:
    name, covered = _force.process_backend(), bool(_cuda_covers["gpus"])
    _C.enable_cuda(name == "cuda" or (name == "auto" and covered), covered)


def _follow() -> None:
    """The kernels of the process's backend; each thread's own while blocks are open."""
    name = _force.process_backend()
    vars(kernels).update(_SWITCHES if _force.blocks.open else _functions(name))


_force.blocks.switch = lambda: _follow()
_force.blocks.follow()


def _usable(name: str) -> None:
    if name not in _force.BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(_force.BACKENDS)}, got {name!r}")
    if name == "cuda" and not _HAVE_CUDA:
        raise ValueError(
            'backend: "cuda" needs a package built with CUDA, and this one is for the CPU; '
            "rebuild it with GENFAST_CUDA=ON and nvcc on the PATH"
        )
    if name == "triton" and not _HAVE_TRITON:
        raise ValueError("backend: triton is not installed; pip install genfast[triton]")


def set_backend(name: str) -> None:
    """Forces every genfast function of the process to one backend: "auto" (none), "cpu", "cuda",
    "triton" (these kernels), "torch" (PyTorch's own attention) or "reference" (plain PyTorch).

    ValueError for another name, for "cuda" where the package was built without CUDA, and for
    "triton" where that package is missing. A call, or a gradient, that the backend cannot do raises
    RuntimeError with the reason; gradients of gradients are plain PyTorch's under every name.

    The environment variable GENFAST_BACKEND sets the same at import.
    """
    _usable(name)
    with _force.blocks.lock:
        _force.blocks.set_process(name)
        _allow_cuda()


class backend(contextlib.AbstractContextManager):
    """`with genfast.backend("reference"): ...`: as `set_backend`, for the calls of this thread.

    The gradient of an eager call runs where its block said, whenever and wherever it is taken; that
    of a call made in no block, in the one around the backward. A compiled function follows the
    block it is called in, but the kernels of its backward, and all that a checkpoint computes
    again, the block around the backward: take those gradients within it (behind it, a checkpoint of
    another backend's tensors is an error).

    A block is its thread's, like torch.no_grad(): what runs there while a generator or a coroutine
    keeps it open is in it too. Blocks may end in any order, by any thread. Also a decorator of
    functions, not of generators and coroutines (TypeError).
    """

    def __init__(self, name: str):
        _usable(name)
        self.name, self.entered = name, []

    def __enter__(self) -> None:
        block = _force.blocks.enter(self.name)
        self.entered.append((threading.get_ident(), block))
        block.__enter__()

    def __exit__(self, *error) -> None:
        mine = [entry for entry in self.entered if entry[0] == threading.get_ident()]
        entry = (mine or self.entered)[-1]
        self.entered.remove(entry)
        entry[1].__exit__(*error)

    def __call__(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        """A function with a block around each of its calls."""
        if any(kind(function) for kind in _SUSPENDED):
            raise TypeError(
                "backend: expected a function that is done when it returns, got a generator or "
                "coroutine; write `with genfast.backend(...)` around the calls in it"
            )

        @functools.wraps(function)
        def run(*args, **kwargs):
            with backend(self.name):
                return function(*args, **kwargs)

        return run


_SUSPENDED = (
    inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction,
)  # fmt: skip


def _device(given: dict[str, Any]) -> torch.device:
    if given.get("device") is not None:
        return torch.device(given["device"])
    for name, value in given.items():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, torch.Tensor) and name != "seed":  # seeds follow the call
                return x.device
    return torch.get_default_device()


_signature = functools.cache(inspect.signature)


def under(function: Callable, given: dict[str, Any]):
    """The argument `backend` of a public function: `function` once more, with its locals."""
    name = given.pop("backend")
    # `is_compiling` is of the process: true in an eager thread while another one compiles.
    if torch.compiler.is_dynamo_compiling() or get_proxy_mode() is not None:
        raise RuntimeError(
            f"backend: expected no argument inside a traced function, got {name!r}; its graph "
            "asks when it runs: genfast.set_backend, or `with genfast.backend(...)` around it"
        )
    _usable(name)
    with _force.blocks.enter(name):
        device = _device(given)
        if name in ("cpu", "cuda") and device.type != name:
            raise RuntimeError(
                f'backend: "{name}" was asked for, and these tensors are on {device}; move them, '
                'or ask for "auto"'
            )
        bound = inspect.BoundArguments(_signature(function), given)
        return function(*bound.args, **bound.kwargs)


@functools.cache
def _too_old(device: torch.device) -> bool:
    """Neither CUDA's attention nor Triton's runs on NVIDIA's GPUs before sm_80."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) < (8, 0)


def has_kernels(device: torch.device, name: str = "random", feature: str | None = None) -> bool:
    """The backend in force has a kernel of this entry point for tensors on `device`, and, left to
    choose, takes it. feature: of the table's rows, where an entry point has several."""
    forced = get_backend()
    if forced == "auto" and device.type == "cpu":
        return True  # each entry point has one there
    if _TRITON[name] is None:
        if forced == "triton" and device.type == "cpu" and not triton_runs(device):
            raise RuntimeError(no_triton(device))  # like the families that have Triton kernels
        return device.type == "cpu" and forced in ("auto", "cpu", "cuda")
    if forced == "triton":
        return triton_runs(device)
    if forced == "cpu":
        return device.type == "cpu"
    if device.type == "cuda" and forced == "auto":
        if composes(name.removesuffix("_backward"), (feature or name).removesuffix("_backward")):
            return False
        if _TRITON[name] == "attention" and _too_old(device):
            return False
    if device.type == "cuda" and not _HAVE_TRITON and forced == "auto":
        if _cuda_covers["gpus"] is None:
            _settle()
        return _cuda_covers["gpus"]
    return device.type in ("cpu", "cuda")


if os.environ.get("GENFAST_BACKEND"):
    try:
        set_backend(os.environ["GENFAST_BACKEND"])
    except ValueError as error:
        raise ValueError(f"GENFAST_BACKEND: {error}") from None
