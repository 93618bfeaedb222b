"""The allocator of a process that is ours, such as the command line."""

from __future__ import annotations

import ctypes
import os

# malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, with the environment variable of each.
_SETTINGS = (
    ("MALLOC_MMAP_THRESHOLD_", -3, 2**30),
    ("MALLOC_TRIM_THRESHOLD_", -1, 2**31 - 1),
    ("MALLOC_TOP_PAD_", -2, 64 * 2**20),
)


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep what is freed for the next allocation of this process.

    Every step of a model allocates and frees the same activations. Given back to the system in
    between, they are fetched again page by page: 18 of a U-Net training step's 92 ms, against 77 ms
    when kept (32 images of 28 x 28 on two cores), and how much is given back is luck. What an
    environment variable of malloc sets stays as it is. False, with nothing changed: another C
    library, or an old glibc, which refuses thresholds above 32 MiB.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = [(key, value) for name, key, value in _SETTINGS if name not in os.environ]
    return all(mallopt(key, value) == 1 for key, value in settings)  # the first refusal ends it
