"""`genfast bench --calibrate`: where PyTorch's attention is faster on this machine, as table rows.

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

from genfast._files import write_atomic
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
    "decode": [(1, 8, 1, n, 64) for n in (64, 256, 1024, 4096, 16384)],
    "forward": [(1, 8, n, n, 64) for n in (16, 64, 256, 1024, 2048)],
    "wide training": [(1, 8, n, n, 256) for n in (64, 256, 512, 768, 1024)],
    "training": [(1, 8, n, n, 64) for n in (16, 64, 256, 512, 1024)],
}


def _ratio(shape, dtype, training: bool) -> float:
    """PyTorch's time over ours."""
    B, H, Sq, Sk, D = shape
    q = torch.randn(B, H, Sq, D).to(dtype)
    k, v = (torch.randn(B, H, Sk, D).to(dtype) for _ in range(2))
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
    found = measure(calls, BUDGET_S)
    # The least, not the median: beside other work the medians of one machine were up to 20 times
    # apart, and a wrong table stays.
    return found["torch"].least / found["ours"].least


def parts_of(sizes: list[int], ratios: list[float]) -> list[tuple[int, str]]:
    """(below, backend) from small sizes to all; one odd rung is no rule."""
    loses = [ratio * MARGIN < 1 for ratio in ratios]
    whole = [(ALL_SIZES, "cpu")]
    if loses[0]:
        low = loses.index(False) if False in loses else len(loses)
        if low == len(loses):
            return [(ALL_SIZES, "torch")]
        return whole if any(loses[low:]) else [(sizes[low - 1] + 1, "torch"), *whole]
    if not loses[-1]:
        return whole
    top = max(i for i, ratio in enumerate(ratios) if ratio >= 1) + 1 if max(ratios) >= 1 else 1
    return whole if len(ratios) - top < 2 else [(sizes[top - 1] + 1, "cpu"), (ALL_SIZES, "torch")]


def calibrate(threads: int = 2) -> Iterator[Row]:
    """Rows of each dtype and kind of call, as they are decided."""
    rows = _choice.ATTENTION_BY_TORCH[True]
    before, known = torch.get_num_threads(), dict(rows)
    torch.set_num_threads(threads)
    rows.clear()  # ours is what is timed
    try:
        for feature, ladder in LADDERS.items():
            for dtype in DTYPES:
                sizes = [B * H * Sq * Sk * D for B, H, Sq, Sk, D in ladder]
                ratios = [_ratio(shape, dtype, "training" in feature) for shape in ladder]
                text = ", ".join(
                    f"{size:.1e}: {r:.2f}x" for size, r in zip(sizes, ratios, strict=True)
                )
                name = str(dtype).removeprefix("torch.")
                for below, backend in parts_of(sizes, ratios):
                    yield Row(
                        "attention", "cpu", ANY, name, feature, below, backend,
                        f"calibrated, {threads} threads; size: PyTorch's time over ours: {text}",
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


def save(rows: list[Row], path: Path) -> Path:
    text = json.dumps(
        {"machine": _choice.machine(), "rows": [row._asdict() for row in rows]}, indent=1
    )
    write_atomic(path, lambda temporary: temporary.write_text(text + "\n"))
    return path
