"""The compiled module, initialised once."""

from __future__ import annotations

import os
import warnings

import torch

try:
    from genfast import _C
except ImportError as error:
    raise ImportError(
        "genfast's compiled module is missing or was built for another Python: "
        f"{error}. Install the project (`pip install .`, or `pip install --no-build-isolation "
        "-e .` to work on it) instead of importing the source folder."
    ) from error

_C.init(torch)

_level, _usable = os.environ.get("GENFAST_ISA"), _C.build_info()["isa_usable"]
if _level and _level not in _usable:
    warnings.warn(
        f"GENFAST_ISA: expected one of {', '.join(_usable)} (the levels built in that this "
        f"processor has), got {_level!r}; it is ignored",
        RuntimeWarning,
        stacklevel=2,
    )

# Of a vector at every level; from 256 on with fused multiply-adds. Choices ask for this number, not
# for names, so that a new level is missed nowhere.
LEVEL_BITS = {"base": 128, "v3": 256, "v4": 512, "bf16": 512, "amx": 512}
VECTOR_BITS = LEVEL_BITS[_C.build_info()["isa"]]

__all__ = ["_C", "LEVEL_BITS", "VECTOR_BITS"]
