"""Which implementation runs. `auto`: the native kernel where one exists and PyTorch is not faster,
else the composite; `reference`: plain PyTorch for everything (the noise stays the contract's).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from genfast._native import _C

BACKENDS = ("auto", "reference")
_HAVE_CUDA = _C.build_info()["cuda"]
_state = {"name": "auto"}


def set_backend(name: str) -> None:
    """Forces every genfast function to one backend: "auto" or "reference" (ValueError otherwise).

    The environment variable GENFAST_BACKEND sets the same at import.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    _state["name"] = name
    _C.force_slow_road(name != "auto")  # so that the fast roads never have to look


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
    """This binary has kernels for tensors on `device`."""
    return device.type == "cpu" or (device.type == "cuda" and _HAVE_CUDA)


if os.environ.get("GENFAST_BACKEND"):
    set_backend(os.environ["GENFAST_BACKEND"])
