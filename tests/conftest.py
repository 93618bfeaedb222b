"""Shared fixtures. Tests import the installed package; helpers beside this file by their name."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

# Child interpreters import the installed package too, not the source folder they start in.
os.environ["PYTHONSAFEPATH"] = "1"

sys.path.insert(0, str(Path(__file__).parent))  # tolerances.py, under --import-mode=importlib

# The same examples on every machine and every run: a failure is always repeatable.
hypothesis.settings.register_profile(
    "genfast",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("genfast")


def pytest_configure(config):
    if config.getoption("numprocesses", None):  # threads that wait would keep the others out
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def torch_state():
    """Every test starts from one torch seed and leaves threads and backend as it found them."""
    import genfast

    threads, backend = torch.get_num_threads(), genfast.get_backend()
    torch.manual_seed(1234)
    yield
    torch.set_num_threads(threads)
    genfast.set_backend(backend)


@pytest.fixture
def one_thread(torch_state):
    """For what is tiny: two threads of a busy machine would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def gen():
    """A torch generator of its own, for test inputs."""
    return torch.Generator().manual_seed(20240607)
