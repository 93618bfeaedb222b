"""The SIMT machine itself: it computes what a GPU would and refuses what a GPU would not."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from .conftest import SCHEDULES, build_simt

FAULTS = (
    "none race uninitialised divergent_places missing_threads exited_lane divergent_shuffle "
    "no_copy_wait shared_overrun global_overrun named_barriers sub_warps shared_limit early_copy"
).split()


def mirror(
    cuda, fault: str, order=0, poison=0xFF, early=0
) -> tuple[str | None, torch.Tensor, torch.Tensor]:
    x = torch.arange(128.0)
    out = torch.zeros(128)
    call = cuda.library.simt_mirror
    call.restype = ctypes.c_char_p
    cuda.library.simt_configure(order, poison, early)
    error = call(
        ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), 128, FAULTS.index(fault)
    )
    cuda.library.simt_configure(0, 0xFF, 0)
    truth = x.view(2, 64) + x.view(2, 64).flip(1)
    return error and error.decode(), out, truth.flatten()


@pytest.mark.parametrize("fault", ["none", "named_barriers", "sub_warps"])
@pytest.mark.parametrize("order", [0, 1, 5])
def test_right_kernels_run(cuda, fault, order):
    error, out, truth = mirror(cuda, fault, order)
    assert error is None
    assert torch.equal(out, truth)


REFUSED = {
    "divergent_places": "divergent barrier: some threads at faults.cu",
    "missing_threads": "lane 9 calls a warp operation with mask 00000400",
    "exited_lane": "names lane 1, which has returned",
    "divergent_shuffle": "divergent warp operation",
    "shared_limit": "57344 bytes of shared memory; this kernel may have 49152",
}


@pytest.mark.parametrize("fault", REFUSED)
def test_divergence_is_refused(cuda, fault):
    error, *_ = mirror(cuda, fault)
    assert error is not None and REFUSED[fault] in error
    assert mirror(cuda, "none")[0] is None  # the next launch is not affected


def test_a_gpu_without_code_is_named(cuda):
    """cudaErrorNoKernelImageForDevice names the architecture and the remedy."""
    call = cuda.library.simt_error_text
    call.restype = ctypes.c_char_p
    text = call(209).decode()
    for part in ("sm_80", "GENFAST_CUDA_ARCHS", "genfast info", "auto"):
        assert part in text
    assert call(0) is None


@pytest.mark.parametrize("fault", ["race", "uninitialised", "no_copy_wait", "early_copy"])
def test_schedules_tell_races_and_garbage(cuda, fault):
    """A race shows as a result that moves with the order, garbage as one that moves with the bytes.

    An asynchronous copy lands as late as allowed, so one that nobody waits for reads garbage; or at
    once, so one over values that others still need destroys them.
    """
    results = [mirror(cuda, fault, *schedule)[1] for schedule in SCHEDULES]
    assert any(not torch.equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tensor_core_product(cuda, dtype):
    """ldmatrix, its transpose and mma.m16n8k16: small integers, so the product is exact."""
    a = torch.randint(-8, 9, (16, 16)).to(dtype)
    b = torch.randint(-8, 9, (16, 8)).to(dtype)
    c = torch.empty(16, 8)
    call = cuda.library.simt_product
    call.restype = ctypes.c_char_p
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (a, b, c))
    assert call(*pointers, int(dtype == torch.bfloat16)) is None
    assert torch.equal(c, a.float() @ b.float())


# ---- AddressSanitizer ---------------------------------------------------------------------------


def _libasan() -> str | None:
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True)
    path = found.stdout.strip()
    return path if found.returncode == 0 and Path(path).is_absolute() else None


def _child(*arguments: str, halt: bool = True) -> subprocess.CompletedProcess:
    libasan = _libasan()
    if libasan is None:
        pytest.skip("no libasan beside g++")
    environment = os.environ | {
        "GENFAST_SIMT_ASAN": str(build_simt("asan")),
        "LD_PRELOAD": libasan,
        "ASAN_OPTIONS": f"detect_leaks=0:halt_on_error={int(halt)}",
    }
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment
    )


needs_child = pytest.mark.skipif("GENFAST_SIMT_ASAN" in os.environ, reason="this is the child")
_HERE = str(Path(__file__).parent)


@needs_child
def test_kernels_under_address_sanitizer():
    """Every kernel again, with shared arrays and tensors that end where they end."""
    names = "families", "diffusion", "filtering", "normalization", "attention", "simt"
    files = [f"{_HERE}/test_{name}.py" for name in names]
    # Side by side: the masks of attention and the filters take as long as all the rest.
    parts = "masks or test_filtering", "not masks and not test_filtering and not one_fault"
    build_simt("asan")  # once, before the two ask for it
    with ThreadPoolExecutor(2) as pool:
        arguments = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k")
        for done in list(pool.map(lambda part: _child(*arguments, part), parts)):
            assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
            assert " passed" in done.stdout


@needs_child
def test_overruns_are_caught():
    done = _child(
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        "-k",
        "test_one_fault",
        f"{_HERE}/test_simt.py",
        halt=False,
    )
    text = done.stdout + done.stderr
    for array in ("256-byte region", "512-byte region"):  # the shared one, the tensor
        assert "AddressSanitizer: heap-buffer-overflow" in text and array in text, text[-4000:]


@pytest.mark.skipif(needs_child.args[0] is False, reason="only under AddressSanitizer")
@pytest.mark.parametrize("fault", ["shared_overrun", "global_overrun"])
def test_one_fault(cuda, fault):
    mirror(cuda, fault)
