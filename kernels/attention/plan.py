"""Checked arguments of a call in the order of the kernels, and the sizes of their blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .._launch import FLOATS, hidden
from .score import ADDITIVE, BOOLEAN, NO_MASK

MAX_HEAD_DIM = 512
# seqlens, leftpad, batch_idx, block_table, its stride, page size, pages, added rows
NOTHING = (None, None, None, None, 0, 1, 1, 0)


def same_layout(B: int, device, lengths, leftpad, batch_idx, block_table) -> bool:
    """int32 vectors of B on the device, and a table of pages with B rows."""
    for t in (lengths, leftpad, batch_idx):
        if t is not None and (t.dtype != torch.int32 or t.shape != (B,) or t.device != device):
            return False
        if t is not None and not t.is_contiguous():
            return False
    t = block_table
    if t is None:
        return True
    fits = t.dtype == torch.int32 and t.dim() == 2 and t.shape[0] == B and t.device == device
    return fits and (t.shape[1] <= 1 or t.stride(1) == 1)


def unit_rows(x: torch.Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] == 1 or x.numel() == 0


def aligned(x: torch.Tensor) -> bool:
    """Every row starts at 16 bytes: loads and stores of whole rows take vectors."""
    return x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:-1])


@dataclass
class Call:
    """One call: tensors, sizes and the arguments that every kernel takes."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    cu_q: torch.Tensor | None
    cu_k: torch.Tensor | None
    sinks: torch.Tensor | None
    B: int
    Hq: int
    Hkv: int
    Sq: int
    Sk: int
    Tq: int
    Tk: int
    D: int
    Dv: int
    entries: int
    keep_scale: float
    strides: tuple  # of q, k, v
    options: tuple  # left ... keep_scale, in the kernels' order
    flags: dict[str, Any]

    @property
    def group(self) -> int:
        return self.Hq // self.Hkv

    @property
    def packed(self) -> bool:
        return self.cu_q is not None

    @property
    def sizes(self) -> tuple:
        return self.Hq, self.Sq, self.Sk, self.Tq, self.Tk

    def scratch(self, *shape: int) -> torch.Tensor:
        return self.q.new_empty(shape, dtype=torch.float32)

    def row_strides(self, x: torch.Tensor) -> tuple[int, int, int]:
        """(b, h, s) of (B, H, S, X), or of packed (T, H, X)."""
        if self.packed:
            return 0, x.stride(1), x.stride(0)
        return x.stride(0), x.stride(1), x.stride(2)

    def stats_strides(self, x: torch.Tensor | None) -> tuple[int, int, int]:
        """(b, h, s) of (B, H, S), or of packed (H, T)."""
        if x is None:
            return 0, 0, 0
        return (0, *x.stride()) if self.packed else x.stride()

    def takes_out(self, out: torch.Tensor, lse: torch.Tensor | None) -> bool:
        if out.shape != (*self.q.shape[:-1], self.Dv) or not unit_rows(out):
            return False
        if out.dtype not in (self.q.dtype, torch.float32) or out.device != self.q.device:
            return False
        rows = self.q.shape[:2][::-1] if self.packed else self.q.shape[:3]
        return lse is None or (
            lse.dtype == torch.float32 and lse.shape == rows and lse.device == self.q.device
        )

    @staticmethod
    def of(
        q, k, v, mask, cu_q, cu_k, max_q, max_k, alibi, sinks, seed, seeds, stream, scale, softcap,
        left, right, bottom_right, dropout_p, capacity=None,
    ) -> Call | None:  # fmt: skip
        """None when the kernels do not take these arguments. capacity: of a paged cache."""
        packed = cu_q is not None
        n, h, s = (3, 1, 0) if packed else (4, 1, 2)
        if q.dtype not in FLOATS or any(x.dtype != q.dtype or x.dim() != n for x in (q, k, v)):
            return None
        others = (k, v, mask, cu_q, cu_k, alibi, sinks, seeds)
        if any(t is not None and t.device != q.device for t in others):
            return None
        B = cu_q.numel() - 1 if packed else q.shape[0]
        Hq, Hkv, Sq, D, Dv = q.shape[h], k.shape[h], q.shape[s], q.shape[-1], v.shape[-1]
        Sk = k.shape[s] if capacity is None else capacity
        if k.shape[-1] != D or v.shape[h] != Hkv or v.shape[s] != k.shape[s]:
            return None
        if not 1 <= D <= MAX_HEAD_DIM or not 1 <= Dv <= MAX_HEAD_DIM or not unit_rows(q):
            return None
        if not unit_rows(k) or not unit_rows(v) or Hkv < 1 or Hq % Hkv or max(Sq, Sk) >= 2**30:
            return None
        if not softcap >= 0 or not 0 <= dropout_p <= 1:
            return None
        if packed:
            if mask is not None or cu_k is None or cu_k.numel() != cu_q.numel():
                return None
            if any(t.dtype != torch.int32 or not t.is_contiguous() for t in (cu_q, cu_k)):
                return None
        for t, most in ((alibi, 2), (sinks, 1)):
            if t is None:
                continue
            if t.dtype != torch.float32 or not t.is_contiguous() or t.dim() > most:
                return None
            if t.shape[-1] != Hq or (t.dim() == 2 and t.shape[0] != B):
                return None
        if seeds is not None and (seeds.dtype != torch.int64 or seeds.numel() != 1):
            return None
        kind, mask_strides = NO_MASK.value, (0, 0, 0, 0)
        if mask is not None:
            kind = BOOLEAN.value if mask.dtype == torch.bool else ADDITIVE.value
            full = (B, Hq, Sq, Sk)
            if mask.dim() > 4 or (kind == ADDITIVE.value and mask.dtype not in FLOATS):
                return None
            shape = (*[1] * (4 - mask.dim()), *mask.shape)
            if any(m not in (1, f) for m, f in zip(shape, full, strict=True)):
                return None
            steps = (*[0] * (4 - mask.dim()), *mask.stride())
            mask_strides = tuple(0 if m == 1 else t for m, t in zip(shape, steps, strict=True))
        if packed:
            Tq, Tk, Sq, Sk = Sq, Sk, max_q, max_k
        else:
            Tq, Tk = B * Sq, B * Sk
        threshold = min(math.floor(dropout_p * 2.0**32 + 0.5), 2**32 - 1)
        keep_scale = 1.0 if dropout_p == 0 else 1.0 / (1.0 - dropout_p) if dropout_p < 1 else 0.0
        scale = 1.0 / math.sqrt(D) if scale is None else float(scale)
        alibi_step = Hq if alibi is not None and alibi.dim() == 2 else 0
        signed = lambda x: (int(x) + 2**63) % 2**64 - 2**63  # noqa: E731
        rows = [(0, x.stride(1), x.stride(0)) if packed else x.stride()[:3] for x in (q, k, v)]
        options = (
            min(left, 2**30), min(right, 2**30), scale, float(softcap), alibi, alibi_step, sinks,
            mask if kind != BOOLEAN.value else mask.view(torch.uint8), hidden(mask_strides), seeds,
            signed(seed), signed(stream), Sq, Sk, threshold, keep_scale,
        )  # fmt: skip
        flags = {
            "D": D,
            "DV": Dv,
            "BOTTOM_RIGHT": bool(bottom_right),
            "SOFTCAP": softcap > 0,
            "MASK": kind,
            "LEFT": left >= 0,
            "RIGHT": right >= 0,
            "DROPOUT": dropout_p > 0,
            "SEEDS": int(seeds is not None),
            "WHOLE": dropout_p > 0 and Sk % 4 == 0,
            "ALIGNED": D % 8 == 0 and Dv % 8 == 0 and all(aligned(x) for x in (q, k, v)),
            "PRECISION": precision(q.dtype),
            "BD": max(triton.next_power_of_2(D), 16),
            "BV": max(triton.next_power_of_2(Dv), 16),
        }
        return Call(
            q, k, v, mask, cu_q, cu_k, sinks, B, Hq, Hkv, Sq, Sk, Tq, Tk, D, Dv, k.shape[0],
            keep_scale, tuple(rows), options, flags,
        )  # fmt: skip


def target() -> tuple[str, int]:
    """("cuda", compute capability) or ("hip", 0) of the GPU that will run; ("", 0) without one."""
    try:
        found = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # the interpreter needs no driver
        return "", 0
    return found.backend, found.arch if isinstance(found.arch, int) else 0


def precision(dtype: torch.dtype) -> str:
    """fp32 operands: three tf32 products on NVIDIA (about 22 bits; plain fp32 has no tensor core
    there), fp32 matrix instructions on AMD."""
    return "tf32x3" if dtype == torch.float32 and target()[0] == "cuda" else "ieee"


# kind -> widest row in bytes -> (BM, BN, warps, stages). Chosen by what has to lie in registers
# (O, and dK, dV: at most 128 fp32 a thread) and in shared memory (99 KiB on sm_120, 64 KiB on AMD
# whose table has fewer stages); none of it has been tuned on a GPU.
CONFIGS = {
    "forward": {
        128: (128, 64, 8, 3),
        256: (128, 64, 8, 2),
        512: (64, 32, 4, 2),
        1024: (32, 32, 4, 1),
        2048: (16, 16, 4, 1),
    },
    "decode": {
        128: (16, 128, 4, 3),
        256: (16, 64, 4, 3),
        512: (16, 64, 4, 1),
        1024: (16, 32, 4, 1),
        2048: (16, 16, 4, 1),
    },
    "backward": {
        128: (64, 64, 8, 2),
        256: (32, 64, 8, 1),
        512: (32, 32, 4, 1),
        1024: (16, 16, 4, 1),
        2048: (16, 16, 4, 1),
    },
}


def config(kind: str, c: Call, rows: int) -> tuple[int, int, int, int]:
    """(BM, BN, warps, stages)."""
    backend, arch = target()
    width = max(c.flags["BD"], c.flags["BV"]) * c.q.element_size()
    if kind == "forward" and rows <= 16:
        kind = "decode"
    bm, bn, warps, stages = next(v for w, v in CONFIGS[kind].items() if width <= w)
    if kind == "forward" and 256 >= width > 128 and backend == "cuda" and arch in (90, 100, 103):
        bn = 128  # 227 KiB of shared memory
    if backend == "hip":
        stages = 1
    return bm, bn, warps, stages
