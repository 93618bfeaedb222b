"""Compiles Triton kernels for GPUs that are not here, exactly as their launchers would start them.

`record(target)` puts a driver without a device in place of the real one, so that a launcher called
with CPU tensors compiles (its own signature, constants and options) and launches nothing.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that a block may ask for.
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}


class _NoDevice:
    """The part of a Triton driver that compilation asks for."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device=0):
        return divmod(self.target.arch, 10) if self.target.backend == "cuda" else (9, 4)


@dataclass
class Resources:
    kernel: str
    target: str
    registers: int
    spills: int  # bytes of local memory (NVIDIA) or spilled vector registers (AMD)
    shared: int
    text: str  # PTX or AMD assembly

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.text, re.M))


def _nvidia(kernel) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        run = [tool, "--dump-resource-usage", f.name]
        said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    used = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def _amd(kernel) -> tuple[int, int]:
    text = kernel.asm["amdgcn"]

    def number(name):
        found = re.findall(rf"^\s*\.{name}:\s*(\d+)", text, re.M)
        return int(found[0]) if found else 0

    return number("vgpr_count"), number("vgpr_spill_count") + number("sgpr_spill_count")


def _measure(name: str, target: str, kernel) -> Resources:
    nvidia = "ptx" in kernel.asm
    registers, spills = (_nvidia if nvidia else _amd)(kernel)
    text = kernel.asm["ptx" if nvidia else "amdgcn"]
    return Resources(name, target, registers, spills, kernel.metadata.shared, text)


@contextlib.contextmanager
def record(target: str) -> Iterator[list[Resources]]:
    """Kernels compiled inside the block for a key of TARGETS, each variant once."""
    found, seen = [], set()
    real_run = JITFunction.run
    driver = triton.runtime.driver
    previous, driver._active = driver._active, _NoDevice(TARGETS[target])

    def run(self, *args, grid, warmup, **options):
        self.device_caches.pop(0, None)  # of another target
        kernel = real_run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            found.append(_measure(self.__name__, target, kernel))
        return kernel

    JITFunction.run = run
    try:
        yield found
    finally:
        JITFunction.run = real_run
        driver._active = previous
