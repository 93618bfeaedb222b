"""Triton kernels, one file per family; the portable GPU path."""
