"""Every kernel test of this folder, executed on the CPU by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(p.name for p in HERE.glob("test_*.py"))
FILES = [f for f in FILES if f not in ("test_interpreter.py", "test_resources.py")]


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", HERE / file]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # From the tests' folder: from the root, `python -m` would import the source folder.
    run = subprocess.run(command, env=env, cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and " failed" not in run.stdout
