"""`genfast bench --calibrate [--device cuda]`: where PyTorch is faster on this machine, as rows of
the table: of attention, and on a GPU of filtering and normalization too.

Of each dtype and kind of attention a ladder of sizes is timed, ours against PyTorch's in the same
run. PyTorch gets the lower part of a ladder where it wins by more than MARGIN, or the upper part
(matrix units; gradients of wide heads with AVX2 on an Intel Xeon), or all of it. A call of the
other two is ours where it loses by more than MARGIN at no size and dtype, with gradients or
without.
"""

from __future__ import annotations

import errno
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import genfast
from genfast._archs import covers
from genfast._files import alone, write_atomic
from genfast._native import _C
from genfast.benchmarks.harness import measure
from genfast.ops import _choice
from genfast.ops._choice import ALL_SIZES, ANY, Row
from genfast.ops.attention.by_torch import torch_sdpa
from genfast.ops.attention.core import plain_forward, plain_training
from genfast.reference import filtering, normalization

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


class Call(NamedTuple):
    """ours(x, p) and PyTorch's of x of each shape; p: (4, C), C = x.shape[dim]. feature, training:
    of the table's rows, without and with gradients."""

    family: str
    feature: str
    ours: Callable
    torch: Callable
    shapes: tuple
    dim: int = 1

    @property
    def training(self) -> str:
        return "plain training" if self.feature == "plain normalize" else self.feature


_IMAGES = tuple((4, 64, n, n) for n in (8, 64, 256))
_ROWS = tuple((4, n, 768) for n in (16, 256, 4096))
_UP = {"up": 2, "padding": (2, 1, 2, 1), "gain": 4.0}
# Of what a GPU's table gives to PyTorch or to a kernel whatever the size.
CALLS = (
    Call(
        "filtering", "bias_act",
        lambda x, p: genfast.bias_act(x, p[0], act="lrelu"),
        lambda x, p: filtering.bias_act(x, p[0], act="lrelu", alpha=0.2, gain=2**0.5),
        _IMAGES,
    ),
    Call(
        "filtering", "gated_act",
        lambda x, p: genfast.gated_act(x, "swish"),
        lambda x, p: filtering.gated_act(x, act="swish"),
        _ROWS,
    ),
    Call(
        "filtering", "upfirdn2d",
        lambda x, p: genfast.upfirdn2d(x, _taps(x), **_UP),
        lambda x, p: filtering.upfirdn2d(x, _taps(x).to(x.dtype), (2, 2), (1, 1), _UP["padding"],
                                         gain=_UP["gain"]),
        _IMAGES,
    ),
    Call(
        "normalization", "normalize",
        lambda x, p: genfast.group_norm(x, 32, p[0], p[1], scale=p, shift=p, act="silu"),
        lambda x, p: normalization.normalize(x, p[0], p[1], p, p, groups=32, act="silu"),
        _IMAGES,
    ),
    Call(
        "normalization", "normalize",
        lambda x, p: genfast.layer_norm(x, scale=p, shift=p, add=x, gate=p)[1],
        lambda x, p: normalization.normalize(normalization.gated_sum(x, x, p), None, None, p, p),
        _ROWS, -1,
    ),
    Call(
        "normalization", "plain normalize",
        lambda x, p: genfast.group_norm(x, 32, p[0], p[1]),
        lambda x, p: normalization.normalize(x, p[0], p[1], groups=32),
        _IMAGES,
    ),
    Call(
        "normalization", "plain normalize",
        lambda x, p: genfast.layer_norm(x, p[0], p[1]),
        lambda x, p: normalization.normalize(x, p[0], p[1]),
        _ROWS, -1,
    ),
)  # fmt: skip


def _taps(x: torch.Tensor) -> torch.Tensor:
    return torch.full((4, 4), 1 / 16, device=x.device)


def _least_ratios(call: Call, device: str) -> tuple[float, float]:
    """PyTorch's time over ours where ours does worst, forward and with gradients."""
    ratios = []
    for shape in call.shapes:
        for dtype in DTYPES[:2]:
            x = torch.randn(shape, device=device).to(dtype)
            p = torch.randn(4, shape[call.dim], device=device).to(dtype)
            calls = {"ours": lambda: call.ours(x, p), "torch": lambda: call.torch(x, p)}  # noqa: B023
            with torch.no_grad():
                found = [measure(calls, BUDGET_S, device)]
            leaves, grad = [t.requires_grad_() for t in (x, p)], torch.randn_like(calls["torch"]())
            used = {"allow_unused": True}
            training = {
                name: lambda f=f: torch.autograd.grad(f(), leaves, grad, **used)  # noqa: B023
                for name, f in calls.items()
            }
            found.append(measure(training, BUDGET_S, device))
            ratios.append([times["torch"].least / times["ours"].least for times in found])
    forward, training = map(min, zip(*ratios, strict=True))
    return forward, training


def whole_families(ours: str, arch: str, device: str = "cuda") -> Iterator[Row]:
    """A row for each feature of CALLS."""
    before = genfast.get_backend()
    genfast.set_backend(ours)  # ours is what is timed
    try:
        least = {}
        for call in CALLS:
            ratios = _least_ratios(call, device)
            for feature, ratio in zip((call.feature, call.training), ratios, strict=True):
                key = call.family, feature
                least[key] = min(least.get(key, math.inf), ratio)
    finally:
        genfast.set_backend(before)
    for (family, feature), ratio in least.items():
        backend = ours if ratio * MARGIN >= 1 else "reference"
        why = f"calibrated; PyTorch's time over ours at the least: {ratio:.2f}x"
        yield Row(family, "cuda", arch, ANY, feature, ALL_SIZES, backend, why)


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
    """Rows as they are decided: of attention by dtype and kind of call, then the others."""
    rows = _choice.ATTENTION_BY_TORCH[device == "cuda"]
    ours, arch, how = "cpu", ANY, f"{threads} threads"  # save() says of which machine
    if device == "cuda":
        built, gpu = _C.build_info()["cuda_archs"], torch.cuda.get_device_capability(0)
        ours = "cuda" if covers(built, gpu) else "triton"
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
        if device == "cuda":
            yield from whole_families(ours, arch)
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
