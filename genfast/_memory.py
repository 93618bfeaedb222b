"""The allocator of a process that is ours, such as the command line."""

from __future__ import annotations

import ctypes
import os

# malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD and their environment variables.
_SETTINGS = {
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
    "MALLOC_TOP_PAD_": (-2, 64 * 2**20),
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**30),
}


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep what is freed for the next allocation of this process.

    Every step of a model allocates and frees the same activations. Given back to the system in
    between, they are fetched again page by page: 18 of a U-Net training step's 92 ms, against 77 ms
    when kept (32 images of 28 x 28 on two cores), and how much is given back is luck. Settings made
    by environment variables stay. False: another C library, and nothing changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    given = [setting for name, setting in _SETTINGS.items() if name not in os.environ]
    return all([mallopt(*setting) == 1 for setting in given])
