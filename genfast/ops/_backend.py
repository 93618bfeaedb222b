"""Which implementation runs. `auto`: the native kernel where one exists and PyTorch is not faster,
then on a GPU the Triton kernel, else the composite; `cuda`: as `auto`, but CUDA tensors take the
CUDA C++ kernels first, which `auto` does not choose before benchmarks/results holds a run of them
on a GPU; `triton`: Triton kernels, an error where Triton cannot run, the composite for what it
lacks; `reference`: plain PyTorch for everything (the noise stays the contract's).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch

from genfast._native import _C
from genfast.ops._scratch import with_scratch

BACKENDS = ("auto", "cuda", "triton", "reference")
_HAVE_CUDA = _C.build_info()["cuda"]
_GPU = torch.version.cuda is not None or torch.version.hip is not None
_HAVE_TRITON = importlib.util.find_spec("triton") is not None
# Decides at the first import of the kernels, for good: they then run on the CPU, for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_state = {"name": "auto"}

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
    "upfirdn2d": None,
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


def _triton(name: str):
    if _TRITON[name] is None:
        return lambda *args: False

    def run(*args):
        x = next(a for a in args if isinstance(a, torch.Tensor))
        if not triton_runs(x.device):
            if _state["name"] == "triton":
                raise RuntimeError(
                    f'backend: "triton" was set, and Triton does not run on {x.device.type} tensors'
                    " here; move them to a GPU, set TRITON_INTERPRET=1 before the import, or "
                    'genfast.set_backend("auto")'
                )
            return _REFUSED.get(name, False)
        module = importlib.import_module(f"genfast.kernels.{_TRITON[name]}")
        return getattr(module, name)(*args)

    return run


def _native(name: str):
    return with_scratch(name, getattr(_C, name)) if _GPU else getattr(_C, name)


def _both(name: str):
    native, portable, refused = _native(name), _triton(name), _REFUSED.get(name, False)

    def run(*args):
        done = native(*args)
        return done if done != refused else portable(*args)

    return run


def _choose(name: str) -> None:
    make = _triton if name == "triton" else _both if _GPU and _HAVE_TRITON else _native
    for entry in _TRITON:
        setattr(kernels, entry, make(entry))


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
    _C.enable_cuda(name == "cuda")


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
        return device.type == "cpu" and _state["name"] != "triton"
    if _state["name"] == "triton":
        return triton_runs(device)
    return device.type == "cpu" or (
        device.type == "cuda" and (_HAVE_TRITON or _state["name"] == "cuda")
    )


if os.environ.get("GENFAST_BACKEND"):
    set_backend(os.environ["GENFAST_BACKEND"])
