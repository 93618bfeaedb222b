"""normalization in Triton; each launcher takes the arguments of the native entry point of its name.

Rows lie in registers (forward.py) or in a tile of the sums' kernel (backward.py) as far as those
reach; groups of a group norm, and longer rows as groups of one place, are walked in tiles.
"""

from .backward import normalize_backward
from .forward import normalize

__all__ = ["normalize", "normalize_backward"]
