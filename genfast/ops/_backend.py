"""Which implementation runs. `auto`: the native kernel where one exists and PyTorch is not faster,
else the composite; `reference`: plain PyTorch for everything (the noise stays the contract's);
`cuda`: as `auto`, and CUDA tensors take the CUDA C++ kernels, which `auto` does not choose before
benchmarks/results holds a run of them on a GPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from genfast._native import _C

BACKENDS = ("auto", "reference", "cuda")
_HAVE_CUDA = _C.build_info()["cuda"]
_state = {"name": "auto"}


def set_backend(name: str) -> None:
    """Forces every genfast function to one backend: "auto", "reference" or "cuda".

    ValueError for another name, and for "cuda" where the package was built without CUDA.

    The environment variable GENFAST_BACKEND sets the same at import.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "cuda" and not _HAVE_CUDA:
        raise ValueError(
            'backend: "cuda" needs a package built with CUDA, and this one is for the CPU; '
            "rebuild it with GENFAST_CUDA=ON and nvcc on the PATH"
        )
    _state["name"] = name
    _C.force_slow_road(name == "reference")  # so that the fast roads never have to look
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


def native_device(device: torch.device) -> bool:
    """Tensors on `device` take this binary's kernels."""
    return device.type == "cpu" or (device.type == "cuda" and _state["name"] == "cuda")


if os.environ.get("GENFAST_BACKEND"):
    set_backend(os.environ["GENFAST_BACKEND"])
