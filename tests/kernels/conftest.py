"""Triton kernels, tested twice: in the interpreter on any machine, compiled where there is a GPU.

The interpreter is chosen by TRITON_INTERPRET=1 before Triton's first import, so test_interpreter.py
runs the kernel tests of this folder in processes of their own.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FAMILIES = "rng", "sampling", "diffusion", "attention", "filtering", "normalization"
KERNEL_TESTS = [f"test_{family}.py" for family in FAMILIES]

if INTERPRETED:
    collect_ignore = ["test_resources.py", "test_interpreter.py"]
elif not torch.cuda.is_available():
    collect_ignore = KERNEL_TESTS


def pytest_collection_modifyitems(items):
    if INTERPRETED:
        return
    for item in items:
        if item.path.parent.name == "kernels" and item.path.name in KERNEL_TESTS:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    pytest.importorskip("triton")
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def interpreted():
    return INTERPRETED
