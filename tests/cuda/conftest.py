"""The CUDA kernels on the host: tests/simt builds them, `cuda` runs them.

`GENFAST_SIMT_ASAN` names the AddressSanitizer edition that `build_simt("asan")` makes, to be loaded
instead; the interpreter then needs LD_PRELOAD=libasan.so (test_simt.py starts such children).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
# (order of threads and blocks, byte that shared memory starts with, whether asynchronous copies
# land at once or when waited for): a race or a read of uninitialised shared memory changes a
# result between them.
SCHEDULES = ((0, 0xFF, 0), (1, 0x5A, 1), (7, 0x00, 0))


def _tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing: install genfast's `test` extra", pytrace=False)
    return found


@functools.cache
def build_simt(edition: str) -> Path:
    """The module of one edition, "plain" or "asan", built where it is out of date."""
    import pybind11

    folder = ROOT / "build" / f"simt-{sys.implementation.cache_tag}"
    configure = [
        _tool("cmake"),
        *("-S", str(ROOT / "tests" / "simt"), "-B", str(folder), "-G", "Ninja"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
    ]
    build = [_tool("cmake"), "--build", str(folder), "--target", edition]
    environment = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "ASAN_OPTIONS")}
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # of pytest -n
        for command in (configure, build):
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                pytest.fail(
                    f"{' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}", pytrace=False
                )
    return next((folder / edition).glob("_C.*.so"))


class Simt:
    """The emulated module, and calls of one entry point on both sides."""

    def __init__(self, path: Path):
        self.schedules = SCHEDULES[:1] if "GENFAST_SIMT_ASAN" in os.environ else SCHEDULES
        spec = importlib.util.spec_from_file_location("_C", path)
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.module.init(torch)
        self.module.enable_cuda(True)
        self.library = ctypes.CDLL(str(path))
        for count in ("launches", "matrices", "conflicts", "products"):
            getattr(self.library, f"simt_{count}").restype = ctypes.c_int64

    def count(self, name: str) -> int:
        """So far: kernel "launches", 8 x 8 "matrices" read, bank "conflicts" among their rows,
        "products" of warpgroups (once per warp)."""
        return getattr(self.library, f"simt_{name}")()

    def call(self, name: str, outputs, *arguments, added=()):
        """Runs `name(*arguments)` once per schedule on fresh outputs; all must agree bit for bit.
        Under AddressSanitizer once: addresses do not depend on the schedule.

        outputs: the tensors among `arguments` that are written. Returns their values as a list.
        added: those among them whose sums are made in any order; they agree to a rounding or two.
        """
        results = None
        for schedule in self.schedules:
            self.library.simt_configure(*schedule)
            for out in outputs:
                out.fill_(-7)
            before = self.count("launches")
            answer = getattr(self.module, name)(*arguments)
            assert answer is True or answer == 0, f"{name}: not handled ({answer})"
            assert self.count("launches") > before or all(o.numel() == 0 for o in outputs)
            found = [out.clone() for out in outputs]
            for out, a, b in zip(outputs, results or found, found, strict=True):
                if any(out is x for x in added):
                    torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2, equal_nan=True)
                    continue
                assert same_bits(a, b), f"{name}: depends on the schedule (race or garbage read)"
            results = found
        self.library.simt_configure(*SCHEDULES[0])
        return results


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits; any NaN equals any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    nan = a.isnan() & b.isnan()
    return bool(((a.contiguous().view(ints) == b.contiguous().view(ints)) | nan).all())


@pytest.fixture
def hopper(cuda):
    """The machine is an sm_90 with its shared memory."""
    cuda.library.simt_device(9, 228)
    yield cuda
    cuda.library.simt_device(8, 164)


@pytest.fixture(scope="session")
def cuda() -> Simt:
    built = os.environ.get("GENFAST_SIMT_ASAN")
    return Simt(Path(built) if built else build_simt("plain"))
