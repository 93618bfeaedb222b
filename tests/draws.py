"""Tensors that tests are fed with."""

import torch


def draw(*shape, seed=0, dtype=torch.float32):
    """Normal numbers, the same rounded to any dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
