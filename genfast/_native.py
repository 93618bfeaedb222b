"""The compiled module, initialised once."""

from __future__ import annotations

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

__all__ = ["_C"]
