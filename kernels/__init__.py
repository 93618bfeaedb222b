"""Triton kernels, a file or folder per family; the portable GPU path."""
