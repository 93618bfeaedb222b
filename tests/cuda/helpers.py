"""Inputs and comparisons that the emulated families share."""

from __future__ import annotations

import torch

from genfast._native import _C

from .conftest import same_bits

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SEEDS = {"int": (0x123456789ABCDEF0, None), "one": (0, [5]), "rows": (0, "rows")}


def seeds_of(kind: str, shape) -> tuple[int, torch.Tensor | None]:
    seed, seeds = SEEDS[kind]
    if seeds == "rows":
        seeds = [3 * b - 2**60 for b in range(shape[0])]
    return seed, None if seeds is None else torch.tensor(seeds, dtype=torch.int64)


def data(shape, dtype, salt: int, layout: str = "dense") -> torch.Tensor:
    generator = torch.Generator().manual_seed(salt)
    x = torch.randn(shape, generator=generator).to(dtype)
    return laid_out(x, layout)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values: dense, transposed, every second element, or off by one element."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.stack([x, x], -1)[..., 0]
    if layout == "misaligned":
        memory = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
        return memory.copy_(x)
    return x


def both(cuda, name, n_outputs, *arguments):
    """[(gpu, cpu), ...] of the outputs, which are given by their places among the arguments or, in
    tuples, as tensors."""
    outputs = [arguments[i] if isinstance(i, int) else i for i in n_outputs]
    found = cuda.call(name, outputs, *arguments)
    answer = getattr(_C, name)(*arguments)
    assert answer is True or answer == 0
    return list(zip(found, [o.clone() for o in outputs], strict=True))


def exact(pairs) -> None:
    for gpu, cpu in pairs:
        wrong = (gpu != cpu).nonzero()
        assert same_bits(gpu, cpu), f"{len(wrong)} of {gpu.numel()} differ, first {wrong[:3]}"
