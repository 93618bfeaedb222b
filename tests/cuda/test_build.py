"""nvcc compiles every CUDA kernel for every architecture: no spills, registers and sizes on record.

One fat object per file, so each file is parsed and optimised once per architecture and no more.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
# Kernels that may spill: {part of the mangled name: (bytes, reason)}.
SPILLS: dict[str, tuple[int, str]] = {}

nvcc = shutil.which("nvcc")


def _compile(source: Path, folder: Path) -> tuple[str, float]:
    target = folder / f"{source.stem}.fatbin"
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    # The flags of CMakeLists.txt.
    flags = ["-std=c++17", "-O3", "-fmad=false", "-diag-suppress=1675,20012,20208"]
    done = subprocess.run(
        [
            nvcc,
            *flags,
            *codes,
            "-Xptxas",
            "-v",
            "-I",
            str(ROOT / "csrc"),
            "-fatbin",
            str(source),
            "-o",
            str(target),
            "--threads",
            str(os.cpu_count() or 1),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr, target.stat().st_size / 1024


def _rows(report: str):
    """(kernel, architecture, registers, static shared memory, stack, spilled bytes)"""
    blocks = re.split(r"ptxas info\s*: Compiling entry function '", report)[1:]
    for block in blocks:
        name, arch = re.match(r"(\S+)' for 'sm_(\w+)'", block).groups()
        number = {
            key: int(m.group(1)) if (m := re.search(pattern, block)) else 0
            for key, pattern in {
                "registers": r"Used (\d+) registers",
                "shared": r"(\d+) bytes smem",
                "stack": r"(\d+) bytes stack frame",
                "stores": r"(\d+) bytes spill stores",
                "loads": r"(\d+) bytes spill loads",
            }.items()
        }
        yield name, arch, number


def _short(name: str) -> str:
    done = subprocess.run(["c++filt", name], capture_output=True, text=True)
    text = done.stdout.strip() or name
    return re.sub(r"genfast::cuda::|\(anonymous namespace\)::|genfast::|void |\(.*", "", text)


@pytest.mark.slow
@pytest.mark.skipif(nvcc is None, reason="no nvcc on this machine")
def test_resources(tmp_path, capsys):
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda s: _compile(s, tmp_path), SOURCES))
    spilled, table = [], {}
    for report, _ in reports:
        for name, arch, n in _rows(report):
            table.setdefault(name, {})[arch] = n
            allowed = next((v[0] for k, v in SPILLS.items() if k in name), 0)
            if n["stores"] + n["loads"] > allowed:
                spilled.append(f"{_short(name)} on sm_{arch}: {n['stores'] + n['loads']} bytes")
    with capsys.disabled():
        print(f"\n{'registers':44}" + "".join(f"{'sm_' + a:>8}" for a in ARCHITECTURES) + "  smem")
        for name, row in table.items():
            assert set(row) == set(ARCHITECTURES), f"{name} is missing an architecture"
            cells = "".join(f"{row[a]['registers']:8d}" for a in ARCHITECTURES)
            print(f"{_short(name)[:44]:44}{cells}{row['80']['shared']:6d}")
        sizes = ", ".join(f"{s.stem} {r[1]:.0f}" for s, r in zip(SOURCES, reports, strict=True))
        print(f"code of {len(ARCHITECTURES)} architectures, KiB: {sizes}")
    assert not spilled, "\n".join(spilled)
