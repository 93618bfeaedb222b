"""normalization: group, layer and RMS norm against the PyTorch lines that they replace, eager and
compiled: the norm, (1 + scale) y + shift of a condition, the activation; and the gated sum before
it, both of whose results are used.

Shapes of the project's models: a U-Net's levels, channels outside and inside (nhwc), the DiT's and
the ViT's tokens, T5's; and the first and the third level of a latent U-Net of 64 x 64, plain in
front of its attention.
"""

from __future__ import annotations

from functools import partial

import torch

import genfast
from genfast.benchmarks.compare import compare, draw
from genfast.benchmarks.harness import Case, Work
from genfast.reference.normalization import gated_sum, normalize

FORMATS = {"": torch.contiguous_format, " nhwc": torch.channels_last}


def _norm(kind, shape, groups, act, modulated, layout, dtype, backward, device) -> Work:
    C = shape[1] if groups else shape[-1]
    x = draw(shape, 1, device, dtype).contiguous(memory_format=FORMATS[layout])
    leaves = [x, draw((C,), 2, device, dtype)]
    if kind != "rms_norm":
        leaves.append(draw((C,), 3, device, dtype))
    if modulated:
        leaves += [draw((shape[0], C), n, device, dtype) for n in (4, 5)]
    condition = ("scale", "shift") if modulated else ()
    options = {"act": act, "eps": 1e-5}

    def ours(x, *rest):
        rest, given = rest[: len(rest) - len(condition)], rest[len(rest) - len(condition) :]
        rest = (groups, *rest) if groups else rest
        return getattr(genfast, kind)(x, *rest, **dict(zip(condition, given, strict=True)),
                                      **options)  # fmt: skip

    def plain(x, *rest):
        rest, given = rest[: len(rest) - len(condition)], rest[len(rest) - len(condition) :]
        return normalize(x, *rest, **dict(zip(condition, given, strict=True)), groups=groups,
                         rms=kind == "rms_norm", **options)  # fmt: skip

    return compare(ours, plain, leaves, backward)


def _summed(shape, dtype, backward, device) -> Work:
    """A DiT's x + gate h and the modulated norm of it."""
    rows = [draw((shape[0], shape[-1]), n, device, dtype) for n in (3, 4, 5)]
    leaves = [draw(shape, 1, device, dtype), draw(shape, 2, device, dtype), *rows]

    def ours(x, h, gate, scale, shift):
        return genfast.layer_norm(x, scale=scale, shift=shift, add=h, gate=gate)

    def plain(x, h, gate, scale, shift):
        total = gated_sum(x, h, gate)
        return total, normalize(total, scale=scale, shift=shift)

    return compare(ours, plain, leaves, backward)


PASSES = {"": False, " fwd+bwd": True}
# kind, shape, groups, activation, modulated, layouts, dtype
KINDS = (
    ("group_norm", (32, 16, 28, 28), 4, "silu", False, FORMATS, torch.float32),
    ("group_norm", (32, 16, 28, 28), 4, "silu", True, (" nhwc",), torch.float32),
    ("group_norm", (32, 64, 7, 7), 16, "silu", True, (" nhwc",), torch.float32),
    ("group_norm", (4, 320, 64, 64), 32, "silu", False, FORMATS, torch.float32),
    ("group_norm", (4, 320, 64, 64), 32, "silu", False, (" nhwc",), torch.bfloat16),
    ("group_norm", (4, 320, 64, 64), 32, "linear", False, FORMATS, torch.float32),
    ("group_norm", (4, 320, 64, 64), 32, "linear", False, FORMATS, torch.bfloat16),
    ("group_norm", (4, 1280, 16, 16), 32, "linear", False, FORMATS, torch.float32),
    ("layer_norm", (16, 768), 0, "linear", False, ("",), torch.float32),
    ("layer_norm", (32, 196, 96), 0, "linear", True, ("",), torch.float32),
    ("layer_norm", (8, 197, 192), 0, "linear", False, ("",), torch.float32),
    ("layer_norm", (8, 1024, 768), 0, "linear", False, ("",), torch.float32),
    ("layer_norm", (8, 1024, 768), 0, "linear", False, ("",), torch.bfloat16),
    ("rms_norm", (4, 512, 192), 0, "linear", False, ("",), torch.float32),
)

CASES = [
    Case(
        "normalization",
        f"{kind}{' + modulation' if modulated else ''}{'' if act == 'linear' else ' + ' + act}"
        f"{layout}{p}",
        shape,
        partial(_norm, kind, shape, groups, act, modulated, layout, dtype, backward),
        dtype=dtype,
        bytes=(5 if backward else 2) * torch.Size(shape).numel() * dtype.itemsize,
    )
    for kind, shape, groups, act, modulated, layouts, dtype in KINDS
    for layout in layouts
    for p, backward in PASSES.items()
]
CASES += [
    Case(
        "normalization", f"layer_norm + gated sum + modulation{p}", shape,
        partial(_summed, shape, torch.float32, backward),
        bytes=(10 if backward else 4) * torch.Size(shape).numel() * 4,
    )
    for shape in ((32, 196, 96), (32, 49, 96))
    for p, backward in PASSES.items()
]  # fmt: skip
