"""Which backend `auto` takes: a table of measurements, the first row that fits a call.

Rows of this machine, written by `genfast bench --calibrate [--device cuda]`, come before the ones
below, which were filled from the files named in `why`. Those of a GPU are looked up at the first
call on it: asking for its model starts CUDA, and a process that has started it cannot be forked.
`genfast info --backends` prints the table in force. A row whose backend cannot do a call is passed
over: the next one is asked.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from genfast._native import _C

BACKENDS = ("cpu", "cuda", "triton", "torch", "reference")
ANY = "*"
ALL_SIZES = 2**63 - 1


class Row(NamedTuple):
    """device: cpu or cuda. arch: instruction set of the CPU kernels, or sm_NN (gfxNNN) of the first
    GPU. dtype: torch's name. feature: a kind of call; of attention "decode" (one query), "forward"
    and "training" (a gradient is wanted), "wide training" (the same with heads wider than
    WIDE_HEAD; rows of "training" fit it too), all without options that PyTorch's fused kernel
    lacks; else a native entry point ("wide attention_backward": heads wider than WIDE_BACKWARD;
    "plain normalize": without modulation, activation or sum; "plain training": the same with a
    gradient wanted). Of filtering and normalization rows of all dtypes and sizes count, and
    "reference" ones turn a gradient to PyTorch too.
    below: sizes under it (elements of k of "decode", B Hq Sq Sk D of attention's other calls and
    backward, elements of the first tensor otherwise). ANY fits all.
    """

    family: str
    device: str
    arch: str
    dtype: str
    feature: str
    below: int
    backend: str
    why: str


_H100 = "benchmarks/results/2026-11-26-h100*.json"
_EPYC = "benchmarks/results/2026-11-27-epyc-avx512.json"
_XEON = "benchmarks/results/2026-11-26-xeon-amx-attention.json"
_H200 = "benchmarks/results/2026-11-2*-h200*.json"
_UNTIMED = "Triton's are not timed yet; --calibrate --device cuda does"

# Attention on CPU: on AMD EPYCs every case of the benchmark is at least 1.0x, of Zen 5 at AVX2 and
# at AVX-512, of Zen 4 1.1x (2026-11-28-epyc-zen4). (Under 10 us the call itself decides, and
# handing it on costs 4 us.)
#
# On an Intel Xeon with a matrix unit PyTorch's bf16 beats our vectors (0.35x at S 1024, D 128,
# 2026-11-25-xeon-avx512), so level amx has that unit too: at least 1.22x, fp16 1.14x. Gradients of
# fp32 heads of 256 come to 0.92x there with four heads of 1024 rows (1.03x with eight; shorter ones
# 1.04 to 1.4x): the long ones are PyTorch's. With AVX2 alone it is 0.98x (0.93 in an earlier
# version); that level does not tell a Xeon from an EPYC, where ours is ahead: `genfast bench
# --calibrate` does.
# fp32 comes to 0.86x at one query without groups, bound by memory: handing it on is no faster
# (0.82 to 0.99x).
#
# On a GPU a small call costs what its launch costs the host. On an H200 16-bit attention of up to
# 2^30 is 1.1 to 1.3x PyTorch's, from 1.5 * 2^30 on 0.67 to 0.87x; one query of fp32 is 1.7 to 10x
# at any size, of 16 bits 1.0 to 1.1x up to 2^24 elements of k, above 0.94 to 0.98x. Gradients are
# PyTorch's: 150 to 185 us against 270 to 330 of our 16-bit calls. Triton's launches take 49 us on
# an H100; it is ahead where its kernel is so much faster that they are paid: fp32 attention (three
# tf32 products against the plain cores: 1.2 against 2.7 ms), the backward of heads wider than 128,
# for which CUDA has the plain cores in 16 bit too (fp32, 4 x 1024 x 256: 2.3 against 9.5 ms; not
# yet timed in 16 bit), and without warpgroups that of long 16-bit rows (35 ms of 68 at 16k;
# warpgroups take 15).
#
# Filters are 1.1 to 7.5x PyTorch's lines on an H200, norms 1.15 to 6x, gradients of those with a
# condition, a sum or an activation 1.1 to 1.8x. (Of large images with the channels inside they were
# 0.6 to 0.9x; these have kernels of their own since, strips.cuh, not timed yet.) Of plain norms
# gradients were 0.56 to 1.1x: Python's node takes 60 to 100 us more there than PyTorch's.
ROWS = (
    Row("attention", "cuda", ANY, "float32", "decode", ALL_SIZES, "cuda", _H200),
    Row("attention", "cuda", ANY, ANY, "decode", 2**24 + 1, "cuda", _H200),
    Row("attention", "cuda", ANY, ANY, "decode", ALL_SIZES, "torch", _H200),
    Row("attention", "cuda", ANY, "float32", "forward", 2**22, "cuda", _H200),
    Row("attention", "cuda", ANY, "float32", "forward", ALL_SIZES, "torch", _H200),
    Row("attention", "cuda", ANY, ANY, "forward", 2**30 + 1, "cuda", _H200),
    Row("attention", "cuda", ANY, ANY, "forward", ALL_SIZES, "torch", _H200),
    Row("attention", "cuda", ANY, ANY, "training", ALL_SIZES, "torch", _H200),
    Row("attention", "cuda", ANY, "float32", "attention_forward", 2**18, "cuda", _H200),
    Row("attention", "cuda", ANY, "float32", "attention_forward", ALL_SIZES, "triton", _H100),
    Row("attention", "cuda", ANY, "float32", "attention_backward", ALL_SIZES, "triton", _H100),
    Row("attention", "cuda", ANY, ANY, "wide attention_backward", 2**27, "cuda", _H200),
    Row("attention", "cuda", ANY, ANY, "wide attention_backward", ALL_SIZES, "triton", _H100),
    Row("attention", "cuda", "sm_90", ANY, "attention_backward", ALL_SIZES, "cuda", _H200),
    Row("attention", "cuda", ANY, ANY, "attention_backward", 2**33, "cuda", _H100),
    Row("attention", "cuda", ANY, ANY, "attention_backward", ALL_SIZES, "triton", _H100),
    Row("attention", "cpu", "amx", "float32", "wide training", 2**30, "cpu", _XEON),
    Row("attention", "cpu", "amx", "float32", "wide training", ALL_SIZES, "torch", _XEON),
    Row("normalization", "cuda", ANY, ANY, "plain training", ALL_SIZES, "reference", _H200),
    Row("normalization", "cuda", ANY, ANY, ANY, ALL_SIZES, "cuda", _H200),
    Row("normalization", "cuda", ANY, ANY, ANY, ALL_SIZES, "reference", _UNTIMED),
    Row("filtering", "cuda", ANY, ANY, ANY, ALL_SIZES, "cuda", _H200),
    Row("filtering", "cuda", ANY, ANY, ANY, ALL_SIZES, "reference", _UNTIMED),
    Row(ANY, "cpu", ANY, ANY, ANY, ALL_SIZES, "cpu", _EPYC),
    Row(ANY, "cuda", ANY, ANY, ANY, ALL_SIZES, "cuda", _H100),
    Row(ANY, "cuda", ANY, ANY, ANY, ALL_SIZES, "triton", "where CUDA is not built in, and on AMD"),
    Row(ANY, "cuda", ANY, ANY, ANY, ALL_SIZES, "reference", "always possible"),
)


@functools.cache
def processor() -> str:
    """The model, which `platform.processor()` does not know on most distributions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def arch(device: str) -> str:
    """What rows are looked up by; ANY where there is no GPU."""
    if device == "cpu":
        return _C.build_info()["isa"]
    if not torch.cuda.is_available():
        return ANY
    if torch.version.hip:
        return torch.cuda.get_device_properties(0).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(0))


def machine(device: str = "cpu") -> dict[str, str]:
    """What a calibrated table is valid for."""
    if device == "cuda":
        found = torch.cuda.is_available()
        name = torch.cuda.get_device_name(0) if found else "none"
        return {"gpu": name, "arch": arch("cuda"), "torch": torch.__version__}
    info = _C.build_info()
    return {
        "processor": processor(),
        "vendor": info["vendor"],
        "isa": info["isa"],
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def user_file() -> Path:
    """$GENFAST_CHOICES, or genfast/choices.json in the user's cache folder."""
    if os.environ.get("GENFAST_CHOICES"):
        return Path(os.environ["GENFAST_CHOICES"])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "genfast" / "choices.json"


def _checked(rows: list[dict]) -> tuple[Row, ...]:
    found = tuple(Row(**row) for row in rows)
    for row in found:
        for name, value in row._asdict().items():
            kind = int if name == "below" else str
            if type(value) is not kind:
                raise TypeError(f"{name}: expected {kind.__name__}, got {value!r}")
        if row.backend not in BACKENDS or row.below < 1:
            raise ValueError(
                f"backend, below: expected one of {', '.join(BACKENDS)}, and at least 1, got "
                f"{row.backend!r}, {row.below}"
            )
    return found


def read_tables(path: Path) -> tuple[list[dict], int]:
    """[{"machine": ..., "rows": [...]}, ...]: of the nodes of a cluster, say, that share a home;
    and how many entries are no such table."""
    try:
        entries = json.loads(path.read_text())
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(entries, list):
        raise ValueError("expected a list of tables")
    tables = [t for t in entries if isinstance(t, dict) and {"machine", "rows"} <= set(t)]
    return tables, len(entries) - len(tables)


def user_rows(device: str = "cpu") -> tuple[Row, ...]:
    """The calibrated rows; none when they are of other machines or another torch."""
    path, rows = "the user's table", ()
    try:
        path = user_file()
        tables, others = read_tables(path)
        rows = _checked(next((t["rows"] for t in tables if t["machine"] == machine(device)), []))
        if others:
            raise ValueError("entries without machine and rows")
    except (OSError, RuntimeError):
        pass  # no such file, or none that may be read; RuntimeError: no home folder
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{path}: not a table of `genfast bench --calibrate` ({error}); that is ignored. "
            "Delete it or calibrate again",
            RuntimeWarning,
            stacklevel=2,
        )
    return rows


def table(gpu: bool) -> tuple[Row, ...]:
    """gpu: the calibrated rows of the GPU too, which starts CUDA."""
    return (*user_rows(), *(user_rows("cuda") if gpu else ()), *ROWS)


def torch_sizes(
    rows: Iterable[Row], device: str, dtype: str, feature: str, arch: str = ANY
) -> range:
    """Sizes that go to PyTorch's own attention; empty calls never do, and of several such ranges
    those of the first."""
    low, features = 1, (ANY, feature, feature.removeprefix("wide "))
    able = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch", "reference")}[device]
    for row in rows:
        fits = zip(row[:4], ("attention", device, arch, dtype), strict=True)
        if row.feature in features and all(have in (ANY, want) for have, want in fits):
            if row.backend not in able or row.below <= low:
                continue
            if row.backend == "torch":
                return range(low, row.below)
            low = row.below
    return range(0)


def triton_from(rows: Iterable[Row], family: str, entry: str, dtype: str, arch: str = ANY) -> int:
    """Sizes from which a GPU takes the Triton kernel of this entry point before the CUDA one."""
    low, features = 0, (ANY, entry, entry.removeprefix("wide "))
    for row in rows:
        fits = zip(row[:4], (family, "cuda", arch, dtype), strict=True)
        if row.feature in features and all(have in (ANY, want) for have, want in fits):
            if row.backend == "triton" and row.below == ALL_SIZES:
                return low
            low = max(low, row.below)
    return ALL_SIZES


def gpu_backend(
    rows: Iterable[Row], family: str, feature: str, usable: Iterable[str], arch: str = ANY
) -> str:
    """What a GPU runs of a family whose calls are PyTorch's or a kernel's whatever their size."""
    for row in rows:
        fits = zip(row[:5], (family, "cuda", arch, ANY, feature), strict=True)
        if row.below == ALL_SIZES and row.backend in usable:
            if all(have in (ANY, want) for have, want in fits):
                return row.backend
    return "reference"


ATTENTION_CALLS = ("decode", "forward", "training", "wide training")
WIDE_HEAD = 192
WIDE_BACKWARD = 128  # columns up to which the CUDA backward has tensor cores


def _attention_sizes(device: str) -> dict[torch.dtype, tuple[range, ...]]:
    rows, here, found = table(device == "cuda"), arch(device), {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        sizes = tuple(torch_sizes(rows, device, name, call, here) for call in ATTENTION_CALLS)
        if any(sizes):
            found[dtype] = sizes
    return found


class _Sizes(dict):
    def __missing__(self, is_cuda: bool) -> dict[torch.dtype, tuple[range, ...]]:
        found = self[is_cuda] = _attention_sizes("cuda" if is_cuda else "cpu")
        return found


# is_cuda -> dtype -> sizes of ATTENTION_CALLS that PyTorch runs: two lookups a call.
ATTENTION_BY_TORCH = _Sizes()
