"""Which implementation runs. `auto`: the native kernel where one exists and PyTorch is not faster,
then on a GPU the Triton kernel (first where the table of _choice.py says so, and alone on a GPU
that the package holds no code for), else the composite; `cuda`: CUDA tensors always take the CUDA
C++ kernels first; `triton`: Triton kernels, an error where Triton cannot run, the composite for
what it lacks; `reference`: plain PyTorch for everything (the noise stays the contract's).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch

from genfast._archs import covers
from genfast._native import _C
from genfast.ops._choice import ALL_SIZES, follow_table, table, triton_from
from genfast.ops._scratch import with_scratch

BACKENDS = ("auto", "cuda", "triton", "reference")
_HAVE_CUDA = _C.build_info()["cuda"]
_GPU = torch.version.cuda is not None or torch.version.hip is not None
_HAVE_TRITON = importlib.util.find_spec("triton") is not None
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Decides at the first import of the kernels, for good: they then run on the CPU, for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_state = {"name": "auto"}
# Whether `auto` takes the CUDA kernels; None: not known before the first CUDA tensor, because
# asking for the GPU starts CUDA, and a process that has started it cannot be forked.
_cuda_covers = {"gpus": None if _HAVE_CUDA and _GPU else False}

# Native entry point -> module of its Triton twin, which takes the same arguments; None: there is
# none, nor a CUDA kernel, and a GPU takes the composite, "cuda" and "triton" forced or not: models
# mix these families with those that have kernels.
_TRITON = {
    "random": "rng",
    "reparameterize": "sampling",
    "reparameterize_backward": "sampling",
    "gumbel_softmax": "sampling",
    "gumbel_softmax_backward": "sampling",
    "relaxed_bernoulli": "sampling",
    "categorical": "sampling",
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
    "bias_act": None,
    "bias_act_backward": None,
    "gated_act": None,
    "gated_act_backward": None,
    "upfirdn2d": None,
    "bernoulli_nll": None,
    "bernoulli_nll_backward": None,
    "normalize": None,
    "normalize_backward": None,
    "linear": None,
    "linear_weight": None,
    "conv2d": None,
    "conv2d_weight": None,
}
_REFUSED = {"categorical": -1}  # what "not handled" is; False elsewhere


class _Kernels:
    """The entry points as the ops call them. On a torch without GPU support they are the native
    functions themselves, so that the choice costs nothing."""


kernels = _Kernels()


def triton_runs(device: torch.device) -> bool:
    """Triton kernels can run on tensors of `device`."""
    if device.type == "cpu":
        return _INTERPRETED and _HAVE_TRITON
    return _HAVE_TRITON and device.type == "cuda"


def _no_triton(device: torch.device) -> RuntimeError:
    return RuntimeError(
        f'backend: "triton" was set, and Triton does not run on {device.type} tensors here; move '
        "them to a GPU, set TRITON_INTERPRET=1 before the import, or "
        'genfast.set_backend("auto")'
    )


def _triton(name: str):
    if _TRITON[name] is None:
        return lambda *args: False

    def run(*args):
        x = next(a for a in args if isinstance(a, torch.Tensor))
        if not triton_runs(x.device):
            if _state["name"] == "triton":
                raise _no_triton(x.device)
            return _REFUSED.get(name, False)
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
    if _state["name"] == "auto":
        _C.enable_cuda(_cuda_covers["gpus"])
        _choose("auto")


def _both(name: str):
    """CUDA, then Triton; under `auto` the other way round from the table's sizes on."""
    native, portable, refused = _native(name), _triton(name), _REFUSED.get(name, False)

    def run(*args):
        done = native(*args)
        if done != refused:
            return done
        if _cuda_covers["gpus"] is None and next(_tensors(args)).is_cuda:
            _settle()
            return run(*args)
        return portable(*args)

    if _state["name"] == "auto" and _cuda_covers["gpus"]:
        run = native  # what it refuses Triton does too; a layer less spares 0.5 us

    rows = table()
    limits = {dtype: triton_from(rows, _TRITON[name], name, _name(dtype)) for dtype in _FLOATS}
    if not _HAVE_TRITON or _state["name"] != "auto" or min(limits.values()) == ALL_SIZES:
        return run

    def portable_first(*args):
        x = next(_tensors(args))
        if x.is_cuda and _size(name, args) >= limits.get(x.dtype, ALL_SIZES):
            done = portable(*args)
            if done != refused:
                return done
        return run(*args)

    return portable_first


def _tensors(args: tuple) -> Iterator[torch.Tensor]:
    return (a for a in args if isinstance(a, torch.Tensor))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(name: str, args: tuple) -> int:
    """B Hq Sq Sk D of a backward call (dO, dLSE, five gradients, q, k, ...); elements elsewhere."""
    if name == "attention_backward":
        q, k = args[7:9]
        return q.numel() * k.shape[-2]
    return next(_tensors(args)).numel()


def _choose(name: str) -> None:
    make = _triton if name == "triton" else _both if _GPU else _native
    for entry in _TRITON:
        setattr(kernels, entry, make(entry))
    follow_table(name == "auto")


_choose("auto")


def set_backend(name: str) -> None:
    """Forces every genfast function to one backend: "auto", "cuda", "triton" or "reference".

    ValueError for another name, for "cuda" where the package was built without CUDA, and for
    "triton" where that package is missing.

    The environment variable GENFAST_BACKEND sets the same at import.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "cuda" and not _HAVE_CUDA:
        raise ValueError(
            'backend: "cuda" needs a package built with CUDA, and this one is for the CPU; '
            "rebuild it with GENFAST_CUDA=ON and nvcc on the PATH"
        )
    if name == "triton" and not _HAVE_TRITON:
        raise ValueError("backend: triton is not installed; pip install genfast[triton]")
    _state["name"] = name
    _choose(name)
    # So that the fast roads never have to look.
    _C.force_slow_road(name in ("triton", "reference"))
    _C.enable_cuda(name == "cuda" or (name == "auto" and bool(_cuda_covers["gpus"])))


def get_backend() -> str:
    return _state["name"]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """`with genfast.backend("reference"): ...`"""
    before = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def forced_reference() -> bool:
    return _state["name"] == "reference"


def has_kernels(device: torch.device, name: str = "random") -> bool:
    """There is a kernel, native or Triton, of this entry point for tensors on `device`."""
    if _TRITON[name] is None:
        if _state["name"] == "triton" and device.type == "cpu" and not triton_runs(device):
            raise _no_triton(device)  # like the families that have Triton kernels
        return device.type == "cpu" and _state["name"] != "triton"
    if _state["name"] == "triton":
        return triton_runs(device)
    if device.type == "cuda" and not _HAVE_TRITON and _state["name"] == "auto":
        if _cuda_covers["gpus"] is None:
            _settle()
        return _cuda_covers["gpus"]
    return device.type in ("cpu", "cuda")


if os.environ.get("GENFAST_BACKEND"):
    try:
        set_backend(os.environ["GENFAST_BACKEND"])
    except ValueError as error:
        raise ValueError(f"GENFAST_BACKEND: {error}") from None
