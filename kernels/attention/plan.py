"""Checked arguments of a call in the order of the kernels, and the sizes of their blocks."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .._launch import FLOATS, hidden
from .score import ADDITIVE, BOOLEAN, NO_MASK

# Rows of K and V in shared memory: heads of 512 in 16 bit, of 256 in fp32.
MAX_HEAD_BYTES = 1024
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
    has_slopes: bool
    scale: float
    keep_scale: float
    strides: tuple  # of q, k, v
    options: tuple  # left ... keep_scale, in the kernels' order
    flags: dict[str, Any]

    @property
    def group(self) -> int:
        return self.Hq // self.Hkv

    @property
    def folds(self) -> bool:
        """Scores are q k times a positive number and nothing else."""
        f = self.flags
        plain = not (f["SOFTCAP"] or f["MASK"] or self.has_slopes)
        return plain and self.scale >= 2.0**-126  # less is 0 on a GPU, and 0 times -inf NaN

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
        if min(D, Dv) < 1 or max(D, Dv) * q.element_size() > MAX_HEAD_BYTES or not unit_rows(q):
            return None
        if not unit_rows(k) or not unit_rows(v) or Hkv < 1 or Hq % Hkv or max(Sq, Sk) >= 2**30:
            return None
        if Sq * (Hq // Hkv) > 2**31 - 512:  # rows of a key head, which the tiles count in int32
            return None
        if not softcap >= 0 or not 0 <= dropout_p <= 1:
            return None
        if too_old(q.device):
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
            if max(Sq, Sk) >= 2**30:
                return None
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
            "PRECISION": precision(q),
            "BD": max(triton.next_power_of_2(D), 16),
            "BV": max(triton.next_power_of_2(Dv), 16),
        }
        return Call(
            q, k, v, mask, cu_q, cu_k, sinks, B, Hq, Hkv, Sq, Sk, Tq, Tk, D, Dv, k.shape[0],
            alibi is not None, scale, keep_scale, tuple(rows), options, flags,
        )  # fmt: skip


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def target(device: torch.device) -> tuple[str, int]:
    """("cuda", compute capability) or ("hip", 0) of the GPU that will run; ("", 0) without one."""
    try:
        found = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # the interpreter needs no driver
        return "", 0
    if found.backend == "cuda" and device.type == "cuda":  # not that of another current GPU
        return "cuda", _capability(device)
    return found.backend, found.arch if isinstance(found.arch, int) else 0


def too_old(device: torch.device) -> bool:
    """NVIDIA's before sm_80 have 64 KiB of shared memory: heads of 80 do not fit."""
    backend, arch = target(device)
    return backend == "cuda" and arch < 80


def precision(x: torch.Tensor) -> str:
    """fp32 operands: three tf32 products on NVIDIA (about 22 bits; plain fp32 has no tensor core
    there), fp32 matrix instructions on AMD."""
    return "tf32x3" if x.dtype == torch.float32 and target(x.device)[0] == "cuda" else "ieee"


# kind, bytes of an element -> widest head (a power of two) -> (BM, BN, warps, stages): the largest
# blocks whose rows stay in registers and in shared memory when compiled for sm_80, sm_90, sm_100
# and sm_120 (99 KiB) alike; with 64 x 64 blocks in backward at 64, sm_80 and sm_120 spill. None of
# it has been timed on a GPU. No autotuning: one compilation a head dimension.
CONFIGS = {
    ("forward", 2): {
        64: (128, 64, 8, 3),
        128: (128, 64, 8, 3),
        256: (64, 32, 8, 2),
        512: (32, 32, 8, 1),
    },
    ("forward", 4): {64: (64, 32, 8, 2), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
    ("decode", 2): {128: (16, 64, 4, 3), 256: (16, 64, 8, 1), 512: (16, 32, 8, 1)},
    ("decode", 4): {64: (16, 32, 4, 2), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    # with a mask, dropout, softcap or ALiBi: the block of scores needs twice the registers, and
    # pipelined blocks of a fp32 mask would not fit in shared memory
    ("forward options", 2): {64: (64, 64, 8, 1), 128: (32, 32, 8, 1), 512: (32, 16, 8, 1)},
    ("forward options", 4): {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    ("backward options", 2): {128: (32, 32, 8, 1), 512: (16, 16, 8, 1)},
    ("backward options", 4): {256: (16, 16, 8, 1)},
    ("backward", 2): {
        64: (32, 64, 8, 2),
        128: (64, 64, 8, 1),
        256: (32, 32, 8, 1),
        512: (16, 16, 8, 1),
    },
    ("backward", 4): {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
}
# AMD: 64 KiB of shared memory, no asynchronous copies, 512 registers when a program has four waves.
AMD_CONFIGS = {
    ("decode", 2): {128: (16, 64, 4, 2), 512: (16, 32, 8, 1)},
    ("backward options", 2): {128: (32, 32, 4, 1), 512: (16, 16, 4, 1)},
    ("forward", 2): {128: (128, 64, 8, 2), 256: (64, 32, 8, 2), 512: (64, 16, 8, 1)},
    ("forward", 4): {64: (64, 32, 8, 2), 128: (64, 32, 8, 1), 256: (32, 32, 8, 1)},
    ("backward", 2): {
        64: (32, 64, 8, 1),
        128: (32, 32, 4, 1),
        256: (16, 32, 8, 1),
        512: (16, 16, 4, 1),
    },
    ("backward", 4): {64: (32, 32, 4, 1), 128: (16, 32, 8, 1), 256: (16, 16, 4, 1)},
}


# Hopper, timed on an H100 (bf16, 16 heads, 8192 rows; TFLOP/s): two stages double a backward, 291
# at 64 (126 with one stage and 8 warps) and 321 at 128 (154); 180 at 256 (61 with blocks of 32).
# Forward at 256 takes 492 with 128 rows (174 with 64). At 128, 128 keys a block are no better than
# 64 when causal (445 against 478), 4 stages no better than 3 (466, 472).
HOPPER_CONFIGS = {
    ("forward", 2): {128: (128, 64, 8, 3), 256: (128, 64, 8, 2)},
    ("backward", 2): {128: (64, 64, 4, 2), 256: (64, 64, 8, 2)},
}


def tables(c: Call, light: bool) -> tuple[dict, ...]:
    """Of the GPU that will run; the first with an entry decides. light: the kernel holds few
    addresses."""
    backend, arch = target(c.q.device)
    if backend == "hip":
        return AMD_CONFIGS, CONFIGS
    # At 256 the addresses spilled 816 bytes of packed sequences, 144 to 328 of a forward.
    fits = light or max(c.flags["BD"], c.flags["BV"]) <= 128
    return (HOPPER_CONFIGS, CONFIGS) if arch == 90 and fits else (CONFIGS,)


def has_tma(device: torch.device) -> bool:
    """Blocks are copied by the tensor memory accelerator: no address is computed in the loop."""
    backend, arch = target(device)
    return backend == "cuda" and arch >= 90


def _steps(x: torch.Tensor) -> list[int]:
    """Strides of a descriptor: that of a dimension of one is never taken, and may be anything."""
    return [*(t if n > 1 else 8 for n, t in zip(x.shape[:3], x.stride()[:3], strict=True)), 1]


def has_descriptors(c: Call) -> bool:
    """The accelerator copies k and v: no packed sequences (it would read the next one's rows),
    fp32, heads over 256, addresses off 16 bytes, nor what is expanded."""
    flags = c.flags
    if not (has_tma(c.q.device) and flags["ALIGNED"] and c.q.element_size() == 2):
        return False
    if c.packed or c.Sk == 0 or max(flags["BD"], flags["BV"]) > 256:
        return False
    return min(*_steps(c.k), *_steps(c.v)) > 0


def descriptors(c: Call, bn: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of k and v, in blocks of bn rows of a head."""
    k, v = (
        TensorDescriptor(x, list(x.shape), _steps(x), [1, 1, bn, width])
        for x, width in ((c.k, c.flags["BD"]), (c.v, c.flags["BV"]))
    )
    return k, v


def config(kind: str, c: Call, rows: int, light: bool) -> tuple[int, int, int, int]:
    """(BM, BN, warps, stages). light: as in `tables`."""
    flags = c.flags
    if kind == "forward" and rows <= 16:
        kind = "decode"
    elif flags["MASK"] or flags["DROPOUT"] or flags["SOFTCAP"] or c.has_slopes:
        kind += " options"
    elif not flags["ALIGNED"]:  # an address for each element: 1.5 to 4.7 KiB spilled at 128 and 256
        kind += " options"
    key = kind, c.q.element_size()
    width = max(flags["BD"], flags["BV"])
    rows = (t.get(key, {}).items() for t in tables(c, light))
    return next(v for row in rows for widest, v in row if width <= widest)
