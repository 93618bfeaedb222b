"""Which GPUs a build has code for, from its list of architectures (CMake's notation)."""

from __future__ import annotations

import re

# number, "a" (this chip alone) or "f" (its family), and what is kept: cubin, PTX, or both
_ARCH = re.compile(r"(\d+)(\d)([af]?)(?:-(real|virtual))?$")


# The kernels want conversions of two 16-bit numbers and asynchronous copies.
LEAST = (8, 0)


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """A GPU of this compute capability runs one of these, e.g. "80-real 90a-real 90-virtual".

    A cubin runs on its major version from its minor one on ("80" on an sm_86), with "a" on exactly
    its own; PTX is compiled by the driver for anything later, unless it is of one chip or family.
    CUDA C++ Programming Guide, "Application Compatibility".
    """
    for arch in architectures.split():
        found = _ARCH.match(arch)
        if found is None:
            continue
        own = int(found[1]), int(found[2])
        if found[3] == "a":
            runs = capability == own
        elif found[3] == "f" or found[4] == "real":
            runs = capability[0] == own[0] and capability[1] >= own[1]
        else:
            runs = capability >= own
        if runs:
            return True
    return False


# Kernels of warpgroups are in 90a alone; a family's code runs on all of its chips.
_WHOLE = {9: "90a-real", 10: "100f-real", 12: "120f-real"}


def best(capability: tuple[int, int]) -> str:
    """What GENFAST_CUDA_ARCHS is set to for a GPU."""
    return _WHOLE.get(capability[0], f"{capability[0]}{capability[1]}-real")
