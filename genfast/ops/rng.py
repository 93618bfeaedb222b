"""rng: values of the noise contract. A value is a pure function of (seed, stream, element).

The mapping is version 1 (`NOISE_VERSION`); changing it would be a breaking change. Source: Salmon
et al. 2011 (Philox4x32-10), Box & Muller 1958; the exact steps stand in `genfast.reference.rng`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genfast.ops import _check, _noise
from genfast.ops._backend import has_kernels, kernels, under
from genfast.ops._force import may_compose
from genfast.ops._road import _C, DIRECT, define, gate, is_compiling
from genfast.reference import rng as reference

NOISE_VERSION = 1

# The order of the native enum `Distribution`.
DISTRIBUTIONS = {name: i for i, name in enumerate((*reference.DISTRIBUTIONS, "integer", "bits"))}
_UNIFORM, _NORMAL, _INTEGER = 0, 1, 5
_INTEGERS = (torch.int64, torch.int32)
_MOST = 2**60  # elements: their bytes have 63 bits
# `new_empty` of one of these takes 1.25 us, `torch.empty(size, dtype=, device=)` 1.67.
_ON_CPU = {
    (dtype, device): torch.empty(0, dtype=dtype)
    for dtype in (*_check.FLOATS, *_INTEGERS)
    for device in ("cpu", torch.device("cpu"))
}


def _fill(out: Tensor, distribution: int, seed, seeds, stream, offset, low=0, span=1) -> Tensor:
    """Writes contract values into `out` on whatever device it lives."""
    if out.numel() == 0 or out.device.type == "meta":
        return out
    if kernels.random(out, distribution, seed, seeds, stream, offset, low, span):
        return out
    # A device without kernels, or a layout the kernel refuses: draw on the CPU and copy.
    may_compose("random", out)
    host = torch.empty(out.shape, dtype=out.dtype)
    host_seeds = None if seeds is None else seeds.cpu().contiguous()
    if not _C.random(host, distribution, seed, host_seeds, stream, offset, low, span):
        raise TypeError(
            f"dtype: expected float32, float16, bfloat16 or float64 (int64 or int32 for integers), "
            f"got {out.dtype}"
        )
    return out.copy_(host)


def _impl(size, distribution, seed, seeds, stream, offset, low, span, dtype, device):
    out = torch.empty(size, dtype=dtype, device=device)
    return _fill(out, distribution, seed, seeds, stream, offset, low, span)


def _fake(size, distribution, seed, seeds, stream, offset, low, span, dtype, device):
    return torch.empty(size, dtype=dtype, device=device)


random_op = define(
    "random(SymInt[] size, int distribution, SymInt seed, Tensor? seeds, SymInt stream, "
    "SymInt offset, SymInt low, SymInt span, ScalarType dtype, Device device) -> Tensor",
    _impl,
    _fake,
)


@torch.library.register_vmap("genfast::random")
def _random_vmap(info, in_dims, size, distribution, seed, seeds, *rest):
    """Only `seeds` can be batched: each lane draws with its own."""
    lanes = seeds.movedim(in_dims[3], 0).unbind(0)
    return torch.stack([random_op(size, distribution, seed, s, *rest) for s in lanes]), 0


def noise_like(x: Tensor, distribution: str, seed, seeds, stream, offset) -> Tensor:
    """Contract noise of x's shape, dtype and device, through the op: for composites."""
    return random_op(
        x.shape,
        DISTRIBUTIONS[distribution],
        _noise.signed(seed),
        seeds,
        _noise.signed(stream),
        offset,
        0,
        1,
        x.dtype,
        x.device,
    )


def _sizes(size: tuple) -> tuple:
    return tuple(size[0]) if len(size) == 1 and isinstance(size[0], (tuple, list)) else size


def _draw(
    size, distribution, seed, stream, offset, generator, dtype, device, out, low=0, span=1
) -> Tensor:
    plain = not is_compiling() and gate(out) == DIRECT
    rows = plain and type(seed) is Tensor and gate(seed) == DIRECT
    if plain and out is None and generator is None and (rows or seed is None or type(seed) is int):
        try:
            kind = torch.int64 if dtype is None and distribution == _INTEGER else dtype
            if device is None and kind is None:
                result = torch.empty(size)
            elif (like := _ON_CPU.get((kind, device))) is not None:
                result = like.new_empty(size)
            else:
                result = torch.empty(size, dtype=kind, device=device)
            if type(seed) is int:  # 0.1 us of 3.2
                int_seed, seeds = seed, None
            else:
                seed, _ = _noise.drawn_once(seed, result.device, None)
                int_seed, seeds = _noise.resolve(seed, None, result.device)
            if kernels.random(result, distribution, int_seed, seeds, stream, offset, low, span):
                return result
        except (TypeError, ValueError, RuntimeError):
            pass  # the checks below name the argument
    for n in size:
        _check.integer("size", n, low=0)
    if not is_compiling() and math.prod(size) >= _MOST:
        raise ValueError(f"size: expected fewer than 2**60 elements, got {tuple(size)}")
    if len(size) > _check.MAX_DIMS:
        raise ValueError(
            f"size: expected at most {_check.MAX_DIMS} dimensions, got {len(size)}; flatten some"
        )
    integers = distribution >= _INTEGER
    if out is not None:
        _check.tensor("out", out, _INTEGERS if integers else _check.FLOATS)
        _check.output(out, size or out.shape, dtype)
        if device is not None and out.device != torch.device(device):
            raise ValueError(
                f"out: expected it on {device}, got {out.device}; leave device away or match it"
            )
        size, dtype, device = out.shape, out.dtype, out.device
    if dtype is None:
        dtype = torch.int64 if integers else torch.get_default_dtype()
    allowed = _INTEGERS if integers else _check.FLOATS
    if dtype not in allowed:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, allowed))}, got {dtype}")
    if device is not None:
        device = torch.device(device)
    else:  # dynamo cannot trace get_default_device
        device = torch.empty(0).device if is_compiling() else torch.get_default_device()
    _noise.check(
        seed, stream, offset, generator, size, seed.device if isinstance(seed, Tensor) else device
    )
    seed, seeds = _noise.resolve(seed, generator, device)
    if seeds is not None and seeds.is_meta and device.type != "meta":
        raise ValueError(f"seed: expected numbers on {device}, got a meta tensor; give a real one")
    if seeds is not None and seeds.device != device and has_kernels(device):
        seeds = seeds.to(device)
    if out is not None and plain:
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)  # autograd must see the overwrite
        if integers and not out.is_contiguous():
            dense = torch.empty(size, dtype=dtype, device=device)
            return out.copy_(_fill(dense, distribution, seed, seeds, stream, offset, low, span))
        return _fill(out, distribution, seed, seeds, stream, offset, low, span)
    drawn = random_op(
        size,
        distribution,
        _noise.signed(seed),
        seeds,
        _noise.signed(stream),
        offset,
        low,
        span,
        dtype,
        device,
    )
    return drawn if out is None else out.copy_(drawn)


def rand(
    *size: int | Sequence[int],
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Uniform noise in [0, 1), 24 bits, the same on every backend.

    size: ints or one tuple. seed: int, or int64 tensor of one seed or one per row of dim 0 (a row
    is then a function of its own seed), or None: drawn from torch's generator (or `generator`).
    stream: separates uses of one seed. offset: index of the first element (a shard's start).
    dtype: float32 (default), float16, bfloat16 (rounded toward zero, so that 1 never occurs) or
    float64 (the fp32 value widened). out: a tensor of this shape, any strides, no grad.
    backend: one for this call, as `genfast.set_backend`.
    Raises TypeError / ValueError naming the argument.
    """
    if backend is not None:
        return under(rand, locals())
    return _draw(_sizes(size), _UNIFORM, seed, stream, offset, generator, dtype, device, out)


def randn(
    *size: int | Sequence[int],
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Standard normal noise, |x| up to 6.7, the same bits on every backend.

    Arguments and errors as in `rand`; 16-bit values are the fp32 ones rounded to nearest.
    """
    if backend is not None:
        return under(randn, locals())
    return _draw(_sizes(size), _NORMAL, seed, stream, offset, generator, dtype, device, out)


def _like(x, distribution, seed, stream, offset, generator, dtype, device):
    if not isinstance(x, Tensor) or x.is_nested or (dtype is None and x.dtype not in _check.FLOATS):
        _check.tensor("x", x)
    return _draw(
        x.shape,
        distribution,
        seed,
        stream,
        offset,
        generator,
        x.dtype if dtype is None else dtype,
        x.device if device is None else device,
        None,
    )


def rand_like(
    x: Tensor,
    *,
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """`rand` with the shape, dtype and device of x."""
    if backend is not None:
        return under(rand_like, locals())
    return _like(x, _UNIFORM, seed, stream, offset, generator, dtype, device)


def randn_like(
    x: Tensor,
    *,
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """`randn` with the shape, dtype and device of x."""
    if backend is not None:
        return under(randn_like, locals())
    return _like(x, _NORMAL, seed, stream, offset, generator, dtype, device)


def randint(
    low: int,
    high: int,
    size: int | Sequence[int],
    *,
    seed: _noise.Seed | None = None,
    stream: int = 0,
    offset: int = 0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Integers in [low, high), high - low <= 2**32; int64 (default) or int32.

    Multiply-shift of one 32-bit word (Lemire 2019): bias at most (high - low) / 2**32.
    """
    if backend is not None:
        return under(randint, locals())
    _check.integer("low", low, low=-(2**63), high=2**63 - 1)
    _check.integer("high", high, low=-(2**63), high=2**63)
    if not 0 < high - low <= 2**32:
        raise ValueError(
            f"high: expected low < high <= low + 2**32, got low {low} and high {high}; "
            "compose two draws for a wider range"
        )
    kept = out.dtype if dtype is None and isinstance(out, Tensor) else dtype
    if kept == torch.int32 and not (-(2**31) <= low and high <= 2**31):
        raise ValueError(f"dtype: int32 cannot hold [{low}, {high}); use torch.int64")
    size = tuple(size) if isinstance(size, (tuple, list)) else (size,)
    return _draw(
        size,
        _INTEGER,
        seed,
        stream,
        offset,
        generator,
        dtype,
        device,
        out,
        low,
        high - low,
    )


def random_bits(*size, seed=0, stream=0, offset=0) -> Tensor:
    """The raw Philox words as int32 bit patterns on the CPU: for known-answer tests."""
    return _draw(
        _sizes(size), DISTRIBUTIONS["bits"], seed, stream, offset, None, torch.int32, None, None
    )
