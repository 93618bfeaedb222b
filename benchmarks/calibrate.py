"""`genfast bench --calibrate [--device cuda]`: where PyTorch's attention is faster on this machine,
as rows of the table.

Of each dtype and kind of call a ladder of sizes is timed, ours against PyTorch's in the same run.
PyTorch gets the lower part of a ladder where it wins by more than MARGIN, or the upper part (matrix
units; gradients of wide heads with AVX2 on an Intel Xeon), or all of it.
"""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from genfast._files import alone, write_atomic
from genfast._native import _C
from genfast.benchmarks.harness import measure
from genfast.ops import _choice
from genfast.ops._choice import ALL_SIZES, ANY, Row
from genfast.ops.attention.by_torch import torch_sdpa
from genfast.ops.attention.core import plain_forward, plain_training

MARGIN = 1.05  # less is noise
BUDGET_S = 0.15  # of one rung
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (B, H, Sq, Sk, D) from small to large: one query, and long self attention. "wide training" comes
# before "training", whose rows fit it too.
LADDERS = {
    "cpu": {
        "decode": [(1, 8, 1, n, 64) for n in (64, 256, 1024, 4096, 16384)],
        "forward": [(1, 8, n, n, 64) for n in (16, 64, 256, 1024, 2048)],
        "wide training": [(1, 8, n, n, 256) for n in (64, 256, 512, 768, 1024)],
        "training": [(1, 8, n, n, 64) for n in (16, 64, 256, 512, 1024)],
    },
    "cuda": {
        "decode": [(1, 32, 1, n, 128) for n in (128, 512, 2048, 8192, 32768)],
        "forward": [(1, 16, n, n, 64) for n in (64, 256, 1024, 2048, 4096)],
        "wide training": [(1, 8, n, n, 256) for n in (64, 256, 1024, 2048)],
        "training": [(1, 16, n, n, 64) for n in (64, 256, 1024, 2048, 4096)],
    },
}


def _ratio(shape, dtype, training: bool, device: str) -> float:
    """PyTorch's time over ours."""
    B, H, Sq, Sk, D = shape
    q = torch.randn(B, H, Sq, D, device=device).to(dtype)
    k, v = (torch.randn(B, H, Sk, D, device=device).to(dtype) for _ in range(2))
    if plain_forward(q, k, v, None, False, None, False) is None:
        raise ValueError(
            f"--device: expected one that genfast's attention has kernels for, got {device}; "
            "`genfast info` says what is missing"
        )
    ours = plain_training if training else plain_forward
    calls = {
        "ours": lambda: ours(q, k, v, None, False, None, False),
        "torch": lambda: torch_sdpa(q, k, v),
    }
    if training:
        inputs = [x.requires_grad_() for x in (q, k, v)]
        grad = torch.randn_like(q)
        calls = {
            name: lambda f=f: torch.autograd.grad(f(), inputs, grad) for name, f in calls.items()
        }
    found = measure(calls, BUDGET_S, device)
    # The least, not the median: beside other work the medians of one machine were up to 20 times
    # apart, and a wrong table stays.
    return found["torch"].least / found["ours"].least


def parts_of(sizes: list[int], ratios: list[float], ours: str = "cpu") -> list[tuple[int, str]]:
    """(below, backend) from small sizes to all; one odd rung is no rule."""
    loses = [ratio * MARGIN < 1 for ratio in ratios]
    whole = [(ALL_SIZES, ours)]
    if loses[0]:
        low = loses.index(False) if False in loses else len(loses)
        if low == len(loses):
            return [(ALL_SIZES, "torch")]
        return whole if any(loses[low:]) else [(sizes[low - 1] + 1, "torch"), *whole]
    if not loses[-1]:
        return whole
    top = max(i for i, ratio in enumerate(ratios) if ratio >= 1) + 1 if max(ratios) >= 1 else 1
    return whole if len(ratios) - top < 2 else [(sizes[top - 1] + 1, ours), (ALL_SIZES, "torch")]


def calibrate(threads: int = 2, device: str = "cpu") -> Iterator[Row]:
    """Rows of each dtype and kind of call, as they are decided."""
    rows = _choice.ATTENTION_BY_TORCH[device == "cuda"]
    ours, arch, how = "cpu", ANY, f"{threads} threads"  # save() says of which machine
    if device == "cuda":
        ours = "cuda" if _C.build_info()["cuda"] else "triton"
        arch, how = _choice.arch(device), "the host's part included"
    before, known = torch.get_num_threads(), dict(rows)
    torch.set_num_threads(threads)
    rows.clear()  # ours is what is timed
    try:
        for feature, ladder in LADDERS[device].items():
            for dtype in DTYPES:
                sizes = [B * H * Sq * Sk * D for B, H, Sq, Sk, D in ladder]
                ratios = [_ratio(shape, dtype, "training" in feature, device) for shape in ladder]
                text = ", ".join(
                    f"{size:.1e}: {r:.2f}x" for size, r in zip(sizes, ratios, strict=True)
                )
                name = str(dtype).removeprefix("torch.")
                for below, backend in parts_of(sizes, ratios, ours):
                    yield Row(
                        "attention", device, arch, name, feature, below, backend,
                        f"calibrated, {how}; size: PyTorch's time over ours: {text}",
                    )  # fmt: skip
    finally:
        torch.set_num_threads(before)
        rows.update(known)


def place() -> Path:
    """Where the table goes; OSError, before anything is measured, where nobody may write."""
    path = _choice.user_file()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file for the table, got a folder", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        return path


def save(rows: list[Row], path: Path, device: str = "cpu") -> Path:
    """Beside the tables of other machines, which may save theirs at the same time; what is no table
    gives way."""
    machine = _choice.machine(device)
    with alone(path):
        try:
            kept = [t for t in _choice.read_tables(path)[0] if t["machine"] != machine]
        except (OSError, ValueError):
            kept = []
        tables = [*kept, {"machine": machine, "rows": [row._asdict() for row in rows]}]
        text = json.dumps(tables, indent=1)
        write_atomic(path, lambda temporary: temporary.write_text(text + "\n"))
    return path
