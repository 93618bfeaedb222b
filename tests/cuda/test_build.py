"""nvcc compiles every CUDA kernel for every architecture: no spills, registers and sizes on record,
tensor-core instructions in the code of attention.

One fat object per file, so each file is parsed and optimised once per architecture and no more.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
# Those of a wheel for all; 86 and 89 run the code of 80.
ARCHITECTURES = ("80", "90a", "100f", "120f")
# The same source as its twin, with one instruction for another: one architecture tells enough.
TWINS = {
    "forward_bf16": ("80",),
    "backward_bf16": ("80",),
    "hopper_forward_bf16": ("90a",),
    "hopper_backward_bf16": ("90a",),
}
# Kernels that run on tensor cores: pattern of the name, their instruction, the least of them, and
# architectures. 16: both products of decoding with 64 columns, 8 each; 20: both of the forward
# kernels of warpgroups with 64 columns, 4 + 8 with the first block's scores apart.
TENSOR_CORES = (
    ("mma_decode", "HMMA.16816", 16, ARCHITECTURES),
    ("mma_forward", "HMMA.16816", 32, ARCHITECTURES),
    ("mma_backward_[qk]", "HMMA.16816", 32, ARCHITECTURES),
    ("hopper_forward", "HGMMA.64", 20, ("90a",)),
    ("hopper_short", "HGMMA.64", 16, ("90a",)),
    ("hopper_backward", "HGMMA.64", 24, ("90a",)),
)
TENSOR_FILES = re.compile("decode|((hopper_)?(forward|backward)_b?f16)").fullmatch
# Kernels that may spill: {part of the mangled name: (bytes stored and loaded, reason)}. The first
# four are mma_forward by columns, keys and extras (0 none, 2 all); sums and scores take 192 of 255
# registers with 128 columns and 144 with 256. Speeds are of an H200.
SPILLS: dict[str, tuple[int, str]] = {
    "16ELi128ELi64ELNS1_6ExtrasE0": (
        356,
        "addresses kept around the products: 148 bytes, 335 TFLOP/s all the same; the 356 on "
        "sm_120, where the host takes the kernel of 32 keys",
    ),
    "16ELi128ELi32ELNS1_6ExtrasE0": (56, "two addresses; sm_80, which takes 64 keys, and sm_120"),
    "16ELi256ELi32ELNS1_6ExtrasE0": (36, "one tile at 255 registers, sm_90 and sm_120"),
    "16ELi256ELi32ELNS1_6ExtrasE2": (88, "options at 255 registers, sm_80 to sm_90"),
    "hopper_forwardINS1_3F16ELi256": (
        116,
        "128 registers of sums, 32 of scores and 16 of weights of 224; 573 TFLOP/s all the same",
    ),
    "hopper_forwardINS1_4Bf16ELi256": (116, "the same"),
    "hopper_forwardINS1_3F16ELi128ELNS1_6ExtrasE1": (
        92,
        "a mask's rows at 216 registers; 16 x 16 heads of 512 in 153 us, 222 without warpgroups",
    ),
    "hopper_forwardINS1_4Bf16ELi128ELNS1_6ExtrasE1": (92, "the same"),
    "hopper_shortINS1_3F16ELNS1_6ExtrasE1": (
        80,
        "a mask's rows at 168 registers, which leave room for three blocks",
    ),
    "hopper_shortINS1_4Bf16ELNS1_6ExtrasE1": (80, "the same"),
    "hopper_backwardINS1_3F16ELi128": (
        108,
        "dK and dV take 128 registers, scores and their gradients 64; 350 TFLOP/s all the same",
    ),
    "hopper_backwardINS1_4Bf16ELi128": (108, "the same"),
    "mma_backward_kINS1_3F16ELi128ELb0": (
        44,
        "dK and dV take 128 registers, scores and their gradients 64; sm_100",
    ),
    "append_rows": (36, "two values kept around the five calls of the 64-bit division, sm_100"),
    "8GradientILi8EEEEEvT0_ll": (
        8,
        "one value around a row's pieces at 128 registers, of norms by warps; sm_80 and sm_100",
    ),
    "sink_gradient": (8, "one value kept around the calls of the 64-bit division, sm_100"),
}

nvcc = shutil.which("nvcc")


def _name(source: Path) -> str:
    return "/".join(source.relative_to(ROOT / "csrc" / "cuda").with_suffix("").parts)


def _compile(source: Path, folder: Path) -> tuple[str, Path]:
    target = folder / f"{_name(source).replace('/', '-')}.fatbin"
    architectures = TWINS.get(source.stem, ARCHITECTURES)
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    # The flags of CMakeLists.txt.
    fused = str(source.parent.name in ("attention", "normalization")).lower()
    flags = ["-std=c++17", "-O3", f"-fmad={fused}", "-diag-suppress=1675,20012,20208"]
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
    return done.stderr, target


def _cuobjdump() -> str | None:
    """The toolkit's, else the one that Triton brings."""
    found = shutil.which("cuobjdump")
    if found is None and (triton := importlib.util.find_spec("triton")) is not None:
        found = shutil.which("cuobjdump", path=Path(triton.origin).parent / "backends/nvidia/bin")
    return found


def _tensor_core_instructions(code: Path) -> dict[tuple[str, str, str], int]:
    """(kernel, architecture, instruction of TENSOR_CORES) -> how often it is in the code."""
    text = subprocess.run([_cuobjdump(), "-sass", str(code)], capture_output=True, text=True).stdout
    counts, arch, kernel = {}, "", ""
    for line in text.splitlines():
        if found := re.match(r"\s*arch = sm_(\w+)", line):
            arch = found.group(1)
        elif found := re.match(r"\s*Function : (\S+)", line):
            kernel = found.group(1)
            counts |= {(kernel, arch, row[1]): 0 for row in TENSOR_CORES}
        else:
            for _, instruction, *_ in TENSOR_CORES:
                if instruction in line:
                    counts[kernel, arch, instruction] += 1
    return counts


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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """[(report of ptxas, fat object)] of every file."""
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda s: _compile(s, folder), SOURCES))


needs_nvcc = pytest.mark.skipif(nvcc is None, reason="no nvcc on this machine")


@pytest.mark.slow
@needs_nvcc
def test_resources(compiled, capsys):
    spilled, table = [], {}
    for source, (report, _) in zip(SOURCES, compiled, strict=True):
        # ptxas waits for each product of a warpgroup when it cannot keep them all under way.
        assert "wgmma.mma_async instructions are serialized" not in report, source
        kernels = {}
        for name, arch, n in _rows(report):
            kernels.setdefault(name, {})[arch] = n
            allowed = next((v[0] for k, v in SPILLS.items() if k in name), 0)
            if n["stores"] + n["loads"] > allowed:
                spilled.append(f"{_short(name)} on sm_{arch}: {n['stores'] + n['loads']} bytes")
        for name, row in kernels.items():
            wanted = set(TWINS.get(source.stem, ARCHITECTURES))
            assert set(row) == wanted, f"{name} is missing an architecture"
        table |= kernels
    with capsys.disabled():
        print(f"\n{'registers':50}" + "".join(f"{'sm_' + a:>8}" for a in ARCHITECTURES) + "  smem")
        for name, row in table.items():
            cells = "".join(f"{row[a]['registers'] if a in row else '':>8}" for a in ARCHITECTURES)
            print(f"{_short(name)[:50]:50}{cells}{max(n['shared'] for n in row.values()):6d}")
        sizes = (
            f"{_name(s)} {c.stat().st_size / 1024:.0f}"
            for s, (_, c) in zip(SOURCES, compiled, strict=True)
        )
        print(f"code of {len(ARCHITECTURES)} architectures, KiB: {', '.join(sizes)}")
    assert not spilled, "\n".join(spilled)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.skipif(_cuobjdump() is None, reason="no cuobjdump on this machine")
def test_tensor_cores(compiled):
    """Both products of a forward kernel, four or five of a backward one, on every architecture."""
    seen = 0
    codes = [code for s, (_, code) in zip(SOURCES, compiled, strict=True) if TENSOR_FILES(s.stem)]
    with ThreadPoolExecutor(2) as pool:
        counted = list(pool.map(_tensor_core_instructions, codes))
    for counts in counted:
        for (kernel, arch, found), count in counts.items():
            for part, instruction, least, architectures in TENSOR_CORES:
                named = re.search(rf"\d{part}I", kernel)  # and not a file's name
                if named and found == instruction and arch in architectures:
                    seen += 1
                    assert count >= least, f"{_short(kernel)} on sm_{arch}: {count} {instruction}"
    assert seen >= 2 * len(ARCHITECTURES)
