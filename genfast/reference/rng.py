"""The noise contract in numpy: the truth that every kernel must equal bit for bit.

The same lines stand in csrc/math/rng.h. numpy, not torch: torch's CPU sqrt is not correctly
rounded. Only IEEE add, mul, sqrt and integer operations, in a fixed order.

Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
Normals: Box & Muller, 1958, on two words of one block.
"""

from __future__ import annotations

import numpy as np
import torch

F = np.float32
U32, U64 = np.uint32, np.uint64
_LOW = U64(0xFFFFFFFF)


def philox4x32_10(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """counter: (..., 4) uint32, key: (..., 2) uint32 -> (..., 4) uint32."""
    c0, c1, c2, c3 = (counter[..., i].astype(U64) for i in range(4))
    k0, k1 = key[..., 0].astype(U64), key[..., 1].astype(U64)
    for _ in range(10):
        p0, p1 = c0 * U64(0xD2511F53), c2 * U64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> U64(32)) ^ c1 ^ k0,
            p1 & _LOW,
            (p0 >> U64(32)) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0, k1 = (k0 + U64(0x9E3779B9)) & _LOW, (k1 + U64(0xBB67AE85)) & _LOW
    return np.stack([c0, c1, c2, c3], -1).astype(U32)


def words(count: int, seed: int, stream: int = 0, offset: int = 0) -> np.ndarray:
    """uint32 words of elements [offset, offset + count): word e % 4 of block e // 4."""
    first = offset // 4
    block = np.arange(first, (offset + count + 3) // 4, dtype=U64)
    seed, stream = seed % 2**64, stream % 2**64
    counter = np.stack(
        [
            block & _LOW,
            block >> U64(32),
            np.full_like(block, stream & 0xFFFFFFFF),
            np.full_like(block, stream >> 32),
        ],
        -1,
    ).astype(U32)
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], U32)
    return philox4x32_10(counter, key).reshape(-1)[offset - 4 * first :][:count]


def uniform(w: np.ndarray) -> np.ndarray:
    """[0, 1): the top 24 bits."""
    return (w >> U32(8)).astype(F) * F(2.0**-24)


def uniform_positive(w: np.ndarray) -> np.ndarray:
    """(0, 1]: all 32 bits, one rounding."""
    return w.astype(F) * F(2.0**-32) + F(2.0**-33)


def _log_of_parts(e: np.ndarray, f: np.ndarray) -> np.ndarray:
    p = F(-0.07634499669075012) * f + F(0.127615824341774)
    for c in (
        -0.13160184025764465,
        0.14201757311820984,
        -0.16623356938362122,
        0.20001226663589478,
        -0.2500081956386566,
        0.3333333134651184,
    ):
        p = p * f + F(c)
    f2 = f * f
    y = p * (f2 * f) + e * F(-2.12194440e-4)
    y = y + f2 * F(-0.5)
    return e * F(0.693359375) + (f + y)


def _split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x = 2**e m with m in [sqrt(1/2), sqrt(2))."""
    b = x.view(U32)
    e = (b - U32(0x3F3504F3)).view(np.int32) >> 23
    m = (b - (e.astype(U32) << U32(23))).view(F)
    return e.astype(F), m


def log_positive(x: np.ndarray) -> np.ndarray:
    """ln x for normal positive x."""
    e, m = _split(x)
    return _log_of_parts(e, m - F(1))


def exponential_of(v: np.ndarray) -> np.ndarray:
    """-ln(1 - v) for v in (0, 1]."""
    e, m = _split(np.maximum(F(1) - v, F(2.0**-25)))
    return -_log_of_parts(e, np.where(v < F(0.29), -v, m - F(1)))


def exponential(w: np.ndarray) -> np.ndarray:
    return exponential_of(uniform_positive(w))


def gumbel(w: np.ndarray) -> np.ndarray:
    return -log_positive(exponential(w))


def logistic(w: np.ndarray) -> np.ndarray:
    u = uniform_positive(w)
    return log_positive(u) + exponential_of(u)


def sincos_turn(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sin and cos of 2 pi w / 2**32."""
    q = (w + U32(0x20000000)) >> U32(30)
    y = (w - (q << U32(30))).view(np.int32).astype(F) * F(2.0**-29)
    t = y * y
    a = F(-3.595450834836811e-05) * t + F(0.002490007085725665)
    a = a * t + F(-0.08074543625116348)
    a = (a * t + F(0.7853981852531433)) * y
    b = F(3.5313346415932756e-06) * t + F(-0.00032594200456514955)
    b = b * t + F(0.015854327008128166)
    b = b * t + F(-0.3084251284599304)
    b = b * t + F(1)
    odd = (q & U32(1)) != 0
    s, c = np.where(odd, b, a), np.where(odd, a, b)
    s = (s.view(U32) ^ ((q & U32(2)) << U32(30))).view(F)
    c = (c.view(U32) ^ (((q + U32(1)) & U32(2)) << U32(30))).view(F)
    return s, c


def _box_muller(w: np.ndarray) -> np.ndarray:
    """(n, 4) words -> (n, 4) normals: words 0, 1 make values 0, 1; words 2, 3 make 2, 3."""
    square = log_positive(uniform_positive(w[:, 0::2])) * F(-2)
    r = np.sqrt(np.where(square > 0, square, F(0)))  # +0 for u = 1, whose log gives -0
    s, c = sincos_turn(w[:, 1::2])
    return np.stack([r * c, r * s], -1).reshape(-1, 4)


def _normals(count: int, seed: int, stream: int, offset: int) -> np.ndarray:
    first = offset - offset % 4
    blocks = words((offset + count + 3) // 4 * 4 - first, seed, stream, first).reshape(-1, 4)
    return _box_muller(blocks).reshape(-1)[offset - first :][:count]


def _of_words(value):
    return lambda count, seed, stream, offset: value(words(count, seed, stream, offset))


# One row per distribution, in the order of the native enum.
DISTRIBUTIONS = {
    "uniform": _of_words(uniform),
    "normal": _normals,
    "exponential": _of_words(exponential),
    "gumbel": _of_words(gumbel),
    "logistic": _of_words(logistic),
}


def _cast(values: np.ndarray, dtype: torch.dtype, toward_zero: bool) -> torch.Tensor:
    if toward_zero and dtype in (torch.float16, torch.bfloat16):  # [0, 1) in every dtype
        mask = U32(0xFFFFE000 if dtype == torch.float16 else 0xFFFF0000)
        values = (values.view(U32) & mask).view(F)
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def random(
    size, distribution: str, seed, stream: int = 0, offset: int = 0, dtype=torch.float32
) -> torch.Tensor:
    """Contract noise of shape `size` on the CPU.

    seed: int, or an int64 tensor of one seed, or of one per row of dim 0 (element indices then
    count within the row). 16-bit values are the fp32 ones rounded (uniform: toward zero), fp64 the
    fp32 ones widened.
    """
    size = tuple(size)
    make = DISTRIBUTIONS[distribution]
    seeds = seed.tolist() if isinstance(seed, torch.Tensor) and seed.dim() else [int(seed)]
    count = int(np.prod(size, dtype=np.int64)) if size else 1
    rows = len(seeds) if len(seeds) > 1 else 1
    values = [make(count // rows, s, stream, offset) for s in seeds[:rows]]
    flat = np.concatenate(values) if count else np.empty(0, F)
    return _cast(flat, dtype, distribution == "uniform").reshape(size)


def randint(size, low: int, high: int, seed: int, stream: int = 0, offset: int = 0):
    """int64: low + floor(word * (high - low) / 2**32)."""
    count = int(np.prod(tuple(size), dtype=np.int64)) if size else 1
    w = words(count, int(seed), stream, offset).astype(object)
    values = [low + ((int(x) * (high - low)) >> 32) for x in w]
    return torch.tensor(values, dtype=torch.int64).reshape(tuple(size))
