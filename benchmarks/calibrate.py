"""`genfast bench --calibrate`: where PyTorch's attention is faster on this machine, as table rows.

Of each dtype and kind of call a ladder of sizes is timed, ours against PyTorch's in the same run.
A row says "below this size PyTorch": up to the last rung of the ladder's lower part where PyTorch
wins by more than MARGIN. Where it wins at the top of the ladder too (matrix units), the row holds
for all sizes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from genfast._files import write_atomic
from genfast.benchmarks.harness import measure
from genfast.ops import _choice
from genfast.ops._choice import ALL_SIZES, ANY, Row
from genfast.ops.attention.by_torch import torch_sdpa
from genfast.ops.attention.core import plain_forward

MARGIN = 1.05  # less is noise
BUDGET_S = 0.15  # of one rung
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (B, H, Sq, Sk, D) from small to large: one query, and long self attention.
LADDERS = {
    "decode": [(1, 8, 1, n, 64) for n in (64, 256, 1024, 4096, 16384)],
    "forward": [(1, 8, n, n, 64) for n in (16, 64, 256, 1024, 2048)],
}


def _ratio(shape, dtype) -> float:
    """PyTorch's time over ours."""
    B, H, Sq, Sk, D = shape
    q = torch.randn(B, H, Sq, D).to(dtype)
    k, v = (torch.randn(B, H, Sk, D).to(dtype) for _ in range(2))
    found = measure(
        {
            "ours": lambda: plain_forward(q, k, v, None, False, None, False),
            "torch": lambda: torch_sdpa(q, k, v),
        },
        BUDGET_S,
    )
    return found["torch"].median / found["ours"].median


def limit_of(sizes: list[int], ratios: list[float]) -> int:
    """Sizes below it belong to PyTorch: 0 none, ALL_SIZES all."""
    loses = [ratio * MARGIN < 1 for ratio in ratios]
    if not any(loses):
        return 0
    if loses[-1]:
        return ALL_SIZES if sum(loses) > len(loses) // 2 else 0
    last = max(i for i, lost in enumerate(loses) if lost)
    return sizes[last] + 1 if all(loses[: last + 1]) else 0


def calibrate(threads: int = 2) -> Iterator[Row]:
    """One row per dtype and kind of call, as each is decided."""
    rows = _choice.ATTENTION_BY_TORCH[True]
    before, known = torch.get_num_threads(), dict(rows)
    torch.set_num_threads(threads)
    rows.clear()  # ours is what is timed
    try:
        for feature, ladder in LADDERS.items():
            for dtype in DTYPES:
                sizes = [B * H * Sq * Sk * D for B, H, Sq, Sk, D in ladder]
                ratios = [_ratio(shape, dtype) for shape in ladder]
                below = limit_of(sizes, ratios)
                text = ", ".join(
                    f"{size:.1e}: {r:.2f}x" for size, r in zip(sizes, ratios, strict=True)
                )
                name = str(dtype).removeprefix("torch.")
                backend = "torch" if below else "cpu"
                yield Row(
                    "attention", "cpu", ANY, name, feature, below or ALL_SIZES, backend,
                    f"calibrated, {threads} threads; size: PyTorch's time over ours: {text}",
                )  # fmt: skip
    finally:
        torch.set_num_threads(before)
        rows.update(known)


def save(rows: list[Row], path: Path | None = None) -> Path:
    path = path or _choice.user_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {"machine": _choice.machine(), "rows": [row._asdict() for row in rows]}, indent=1
    )
    write_atomic(path, lambda temporary: temporary.write_text(text + "\n"))
    return path
