"""Registers, spills and shared memory of every Triton kernel, for GPUs that are not here.

Kernels are compiled exactly as their launchers would start them: `record(target)` puts a driver
without a device in place of the real one, so that a launcher called with CPU tensors compiles (its
own signature, constants and options) and launches nothing. Run as a script to print the table.
"""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that a block may ask for.
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}


class _NoDevice:
    """The part of a Triton driver that compilation asks for."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device=0):
        return divmod(self.target.arch, 10) if self.target.backend == "cuda" else (9, 4)


@dataclass
class Resources:
    kernel: str
    target: str
    registers: int
    spills: int  # bytes of local memory (NVIDIA) or spilled vector registers (AMD)
    shared: int
    text: str  # PTX or AMD assembly

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.text, re.M))


def _nvidia(kernel) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        run = [tool, "--dump-resource-usage", f.name]
        said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    used = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def _amd(kernel) -> tuple[int, int]:
    text = kernel.asm["amdgcn"]

    def number(name):
        found = re.findall(rf"^\s*\.{name}:\s*(\d+)", text, re.M)
        return int(found[0]) if found else 0

    # Scalar registers are kept in lanes of vector registers, not in memory: no spill.
    return number("vgpr_count"), number("vgpr_spill_count")


def _measure(name: str, target: str, kernel) -> Resources:
    nvidia = "ptx" in kernel.asm
    registers, spills = (_nvidia if nvidia else _amd)(kernel)
    text = kernel.asm["ptx" if nvidia else "amdgcn"]
    return Resources(name, target, registers, spills, kernel.metadata.shared, text)


@contextlib.contextmanager
def record(target: str) -> Iterator[list[Resources]]:
    """Kernels compiled inside the block for a key of TARGETS, each variant once."""
    found, seen = [], set()
    real_run = JITFunction.run
    driver = triton.runtime.driver
    previous, driver._active = driver._active, _NoDevice(TARGETS[target])

    def run(self, *args, grid, warmup, **options):
        self.device_caches.pop(0, None)  # of another target
        kernel = real_run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            found.append(_measure(self.__name__, target, kernel))
        return kernel

    JITFunction.run = run
    try:
        yield found
    finally:
        JITFunction.run = real_run
        driver._active = previous


# ---- every kernel, in its heaviest variant -------------------------------------------------------


def launch_rng():
    from genfast.kernels import rng

    rng.random(torch.empty(4096), 1, 1, None, 0, 0)
    half = torch.empty(8, 1023, dtype=torch.bfloat16)
    rng.random(half, 4, 1, torch.arange(8), 0, 3)
    rng.random(torch.empty(64, dtype=torch.int64), 5, 1, None, 0, 0, 0, 9)


def launch_sampling():
    from genfast.kernels import sampling

    x, sums, tau = torch.empty(8, 2048, dtype=torch.bfloat16), torch.empty(8), torch.ones(1)
    noise = (1, None, 0, 0)
    for transform, side in ((0, 1), (1, 2)):
        sampling.reparameterize(x, x, x, sums, *noise, transform, side, 1.0)
    sampling.reparameterize_backward(x, sums, x, x, x, x, 1, torch.arange(8), 0, 1, 1, 2, 1.0)
    sampling.relaxed_bernoulli(x, x, tau, x, *noise, False)
    sampling.bernoulli_nll(sums, x, x)
    sampling.bernoulli_nll_backward(sums, x, x, x, x)
    for v, hard in ((1000, True), (8191, False), (8192, False)):
        x, index = torch.empty(4, v), torch.empty(4, dtype=torch.int64)
        sampling.gumbel_softmax(x, x, tau, *noise, hard)
        sampling.gumbel_softmax_backward(x, None, x, tau, x, *noise)
        sampling.categorical(x, index, None, None, None, None, *noise)
    sampling.categorical(x, index, tau, index, tau, tau, *noise)


def launch_diffusion():
    from genfast.kernels import diffusion

    x, wide, s = torch.empty(8, 4, 1024), torch.empty(8, 8, 1024), torch.empty(8)
    half, table, index = x.half(), torch.ones(9, 36), torch.arange(8)
    noise = (1, index, 0, 0)
    step, six = diffusion.diffusion_step, (x,) * 6
    step((half,), half, (half,), None, table, None, 0, None, None, *noise, True, None)
    extras = (1, s, x, x, None, torch.ones(8, 2), None, None)
    two, outs = torch.empty(8, 2), tuple(torch.empty_like(x) for _ in range(3))
    step(outs, x, (wide, wide), two, table, index, 0, six, None, *noise, True, extras)
    extras = (0, s, None, None, None, None, None, torch.empty(8))
    step(outs[:1], x, (x,), None, table, None, 0, six, None, *noise, True, extras)
    given = (outs, x, (x, x), two, table, index, 0, s, x)
    diffusion.diffusion_step_backward(*given, outs[0], outs[1:], six, x)
    wide = torch.ones(8, dtype=torch.float64)
    diffusion.diffusion_mix(outs[0], x, None, *noise, True, wide, wide, 1, 1, False)
    diffusion.diffusion_mix(half, half, half, 0, None, 0, 0, False, 0.5, 0.5, 1, 1, False)
    for weighting in (1, 2):
        numbers = (wide, wide, wide, 2, weighting, 5.0, 1.0)
        loss = (s, torch.empty(()), 0.125, torch.ones(1), outs[0])
        diffusion.denoising_loss(x, x, None, *noise, *numbers, *loss)
    for method in (1, 4, 5):
        diffusion.guidance_weights(x, x, None, s, two, method, False, 0.5, 0.5)
    diffusion.dynamic_threshold(x, x, s, table, None, 0, 0.9, 2.0)


def attend(B, Hq, Hkv, Sq, Sk, D, dtype, backward, **o):
    """One call of forward, and of backward when asked for. off: elements that rows begin behind
    a multiple of 16 bytes."""
    from genfast.kernels import attention

    off = o.get("off", 0)
    q, k, v = (
        torch.empty(math.prod(shape) + off, dtype=dtype)[off:].view(shape)
        for shape in ((B, Hq, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, D))
    )
    out, lse, mask = torch.empty_like(q), torch.empty(B, Hq, Sq), o.get("mask")
    numbers = (None, o.get("softcap", 0.0), -1, o.get("right", -1), False, o.get("dropout", 0.0))
    tail = (mask, None, None, 0, 0, o.get("alibi"), o.get("sinks"), 1, None, 0, *numbers)
    attention.attention_forward(q, k, v, out, lse, *tail)
    if backward:
        dmask = None if mask is None else torch.empty(mask.shape)
        dsinks = None if mask is None else torch.empty(Hq)
        grads = (q, k, v, dmask, dsinks)
        attention.attention_backward(out, lse, *grads, q, k, v, out, lse, *tail)


def attend_packed(D, dtype):
    """Forward and backward of sequences without padding, four heads to one."""
    from genfast.kernels import attention

    q, k = torch.empty(600, 8, D, dtype=dtype), torch.empty(700, 2, D, dtype=dtype)
    cu, lse = torch.zeros(5, dtype=torch.int32), torch.empty(8, 600)
    tail = (None, cu, cu, 512, 512, None, None, 1, None, 0, None, 0.0, -1, 0, True, 0.0)
    attention.attention_forward(q, k, k, q, lse, *tail)
    attention.attention_backward(q, None, q, k, k, None, None, q, k, k, q, lse, *tail)


def launch_attention():
    """Every head dimension plain and causal, the options together at 128, rows off 16 bytes, packed
    sequences, decode and the cache."""
    from genfast.kernels import attention

    half, full = torch.bfloat16, torch.float32
    for dtype, D, backward in ((half, 64, True), (half, 128, True), (half, 256, True),
        (half, 512, False), (full, 64, True), (full, 128, True), (full, 256, True)):  # fmt: skip
        attend(1, 64, 64, 512, 512, D, dtype, backward, right=0)
    options = {"mask": torch.empty(512, 512), "alibi": torch.empty(64), "sinks": torch.empty(64)}
    attend(1, 64, 8, 512, 512, 128, half, True, **options, softcap=2.0, dropout=0.1)
    for D in (128, 256):
        attend(1, 32, 8, 512, 512, D, half, True, right=0, off=1)
        attend_packed(D, half)
    attend(1, 32, 8, 1, 4096, 128, half, False)
    cache, q = torch.empty(64, 8, 256, 128).to(half), torch.empty(2, 32, 1, 128).to(half)
    lengths, table = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 32, dtype=torch.int32)
    place, rest = (lengths, None, None, table), (None, None, None, 0.0, -1, -1)
    attention.attention_cached(q, cache, cache, q, None, lengths, 1, None, None, table, *rest)
    wide = torch.empty(2, 8, 4096, 256).to(half), torch.empty(2, 32, 512, 256).to(half)
    rest = (lengths, 512, None, None, None, *rest)  # a prompt, and no descriptors
    attention.attention_cached(wide[1], wide[0], wide[0], wide[1], None, *rest)
    new, turn = torch.empty(2, 8, 1, 128).to(half), torch.empty(9, 32)
    attention.attention_append(q, q, new, new, cache, cache, *place, turn, turn, True, False)


def launch_filtering():
    """Both memory orders, aligned with swish and not with tanh, which take the most registers."""
    from genfast.kernels import filtering

    last = {"memory_format": torch.channels_last}
    image, odd = torch.empty(8, 64, 32, 32, dtype=torch.bfloat16), torch.empty(8, 63, 31, 31)
    strength, total, seeds, noise = torch.ones(1), torch.empty(1), torch.arange(8), odd[:, :1]
    layouts = (image, 8), (image.contiguous(**last), 8), (odd, 3), (odd.contiguous(**last), 3)
    for x, act in layouts:
        b, db = x[0, :, 0, 0].contiguous(), torch.empty(x.shape[1])
        drawn = (b, None, strength, seeds, 1, 0, 0, True, 1, act, 0.2, 1.0, 256.0)
        filtering.bias_act(x, x, *drawn)
        filtering.bias_act_backward(x, x, db, total, x, False, *drawn)
    given = (b, noise.contiguous(), strength, None, 1, 0, 0, False, 1, 2, 0.2, 1.0, 256.0)
    filtering.bias_act_backward(x, x, db, total, x, True, *given)
    for x in (image, odd[..., 1:].contiguous()):
        y = x[..., : x.shape[-1] // 2].contiguous()
        filtering.gated_act(y, x, 10)
        filtering.gated_act_backward(y, x, x, 10)
    far, pad = 2**31, (2, 1, 2, 1)
    for order in ({}, last):
        x, twice, one = (
            torch.empty(8, 64, n, n, dtype=torch.bfloat16).contiguous(**order) for n in (32, 64, 1)
        )
        for f in (torch.ones(4, 4), torch.ones(4)):
            filtering.upfirdn2d(twice, x, f, 2, 2, 1, 1, *pad, False, 4.0)
            filtering.upfirdn2d(x, x, f, 1, 1, 1, 1, *pad, False, 1.0)
        filtering.upfirdn2d(one, x, f, 2, 2, far, far, *pad, False, 1.0)


def norm(shape, dtype, rest, act, groups=0, order=None):
    """Forward and backward of one call with everything that it can have."""
    from genfast.kernels import normalization

    x, B, C = torch.empty(shape, dtype=dtype), shape[0], shape[1 if groups else -1]
    x = x if order is None else x.contiguous(memory_format=order)
    w, (scale, shift, gate) = torch.empty(C, dtype=rest), torch.empty(B, 3 * C).to(rest).chunk(3, 1)
    add, gate = (None, None) if groups else (x, gate)
    count = B * groups if groups else x.numel() // C
    statistics, d, of = torch.empty(count * 2), torch.empty(C), torch.empty(B, C)
    given = (w, w, scale, shift, add, gate, groups, False, act, 1e-5)
    assert normalization.normalize(x, statistics, add, x, *given)
    gated = (None, None) if groups else (x, of)
    grads = (x, d, d, of, of, *gated)
    assert normalization.normalize_backward(x, add, *grads, statistics, x, *given)


def launch_normalization():
    """Rows of all tiles, long rows, groups of both memory orders, whole and in parts; GELU, which
    takes the most registers; rows off 8 elements."""
    half, full, last = torch.bfloat16, torch.float32, torch.channels_last
    rows = (
        (full, full, 4096),
        (full, full, 8192),
        (half, half, 768),
        (full, half, 2047),
        (full, half, 9000),
    )
    for dtype, rest, C in rows:
        norm((2, 8, C), dtype, rest, 2)
    for order in (None, last):
        norm((2, 320, 64, 64), full, full, 2, 32, order)
        norm((1, 64, 256, 256), half, half, 2, 2, order)


FAMILIES = {
    "rng": launch_rng,
    "sampling": launch_sampling,
    "diffusion": launch_diffusion,
    "attention": launch_attention,
    "filtering": launch_filtering,
    "normalization": launch_normalization,
}

# Kernels whose results are no part of the noise contract and may fuse products and sums (those of
# attention all may).
FUSED = {
    "guidance_weights_kernel",  # exp of "mag" in fp64
    "denoising_loss_kernel",  # the weight "p2": a power in fp64
    "loss_of_samples_kernel",
    "gated_act_fwd_kernel",
    "gated_act_bwd_kernel",
    "upfirdn2d_kernel",
    "normalize_fwd_kernel",
    "normalize_groups_fwd_kernel",
    "normalize_bwd_kernel",
    "normalize_groups_bwd_kernel",
    "normalize_sums_kernel",
}
_FRAME = "one value kept in memory around the calls of the division routine"
_EDGE = "a few values at the limit of the registers"
_ADDRESSES = "of packed sequences, which have no descriptors"
_TIMED = "bf16 on an H100: 321 TFLOP/s at 128 (8 bytes); 180 at 256, 61 with blocks of 32 (none)"
# (kernel, target): bytes of local memory that it may use, and why. Anything else must not spill.
SPILLS = {
    ("guidance_weights_kernel", "sm_90"): (8, _FRAME),
    ("guidance_weights_kernel", "sm_100"): (8, _FRAME),
    ("guidance_weights_kernel", "sm_120"): (8, _FRAME),
    ("diffusion_step_kernel", "sm_100"): (8, _FRAME),
    ("attention_fwd_kernel", "sm_80"): (32, _EDGE),  # fp32, heads of 64; bf16 off 16 bytes
    ("attention_fwd_kernel", "sm_90"): (8, _EDGE),  # bf16, heads of 256 off 16 bytes
    ("attention_fwd_kernel", "sm_120"): (88, _ADDRESSES),  # bf16, heads of 128
    ("attention_fwd_kernel", "gfx942"): (12, _EDGE),  # bf16, heads of 128
    ("attention_bwd_kv_kernel", "sm_90"): (416, _TIMED),
    ("normalize_groups_bwd_kernel", "sm_90"): (8, _EDGE),  # GELU, 64 registers of 16 warps
}
# Compilers before 3.9 keep more: 3.6 and 3.7 hold fp32 rows of 128 in 336 bytes where 3.9 needs 197
# of 255 registers (blocks of 16 keys would need none there, and twice the steps here).
_OLDER = "the most of 3.6.0, 3.7.1 and 3.8.0, tests/tritons.sh"
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    SPILLS |= {("attention_fwd_kernel", f"sm_{n}"): (336, _OLDER) for n in (80, 90, 100, 120)} | {
        ("attention_fwd_kernel", "gfx942"): (73, _OLDER),
        ("attention_bwd_kv_kernel", "sm_90"): (504, _OLDER),
        ("attention_rows_kernel", "sm_100"): (32, _OLDER),
        ("diffusion_step_bwd_kernel", "sm_100"): (8, _OLDER),
        ("guidance_weights_kernel", "sm_100"): (16, _OLDER),
        ("bias_act_bwd_kernel", "sm_100"): (8, _OLDER),
        ("normalize_bwd_kernel", "sm_100"): (16, _OLDER),
        ("normalize_bwd_kernel", "sm_120"): (16, _OLDER),
        ("normalize_groups_bwd_kernel", "sm_80"): (8, _OLDER),
        ("normalize_groups_bwd_kernel", "sm_120"): (8, _OLDER),
    }


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_resources(family, target):
    with record(target) as found:
        FAMILIES[family]()
    assert found
    for r in found:
        assert r.spills <= SPILLS.get((r.kernel, target), (0, ""))[0], r
        assert r.shared <= SHARED_LIMIT[target], r
        exact = family != "attention" and r.kernel not in FUSED
        if target.startswith("sm_") and exact:  # products must be rounded: the noise contract
            assert r.count(r"^\s*fma\.") == 0, r.kernel
            assert r.count(r"sqrt\.approx|div\.(full|approx)|\.ftz") == 0, r.kernel


def test_aligned_noise_is_stored_16_bytes_at_a_time():
    from genfast.kernels import rng

    with record("sm_90") as found:
        rng.random(torch.empty(4096), 1, 1, None, 0, 0)
    assert found[0].count(r"st\.global\.v4") and not found[0].count(r"st\.global\.b32")


@pytest.mark.parametrize("axis", ["rows", "cols", "seed"])
def test_new_values_compile_nothing_new(axis):
    from genfast.kernels import rng

    with record("sm_90") as found:
        for n in (1, 16, 2**31 + 7):
            rows, cols, seed = (n if axis == k else 2048 for k in ("rows", "cols", "seed"))
            if axis == "seed":
                rng.random(torch.empty(2048), 1, seed, None, seed, 0)
            else:
                out = torch.empty(1).expand(1)
                kernel_args(rng, out, rows, cols)
    assert len(found) == 1


def test_new_lengths_compile_nothing_new():
    """Lengths, strides and batch sizes of attention and of a diffusion step: one kernel each."""
    from genfast.kernels import diffusion

    with record("sm_90") as found:
        for n in (128, 129, 1000):
            attend(4, 64, 64, n, n, 16, torch.float16, True, right=0)
    assert len(found) == len({r.kernel for r in found}) == 4
    table, noise = torch.ones(9, 36), (1, None, 0, 0)
    with record("sm_90") as found:
        for shape in ((8, 2048), (16, 4096), (1, 2048), (2, 2, 2048)):
            x = torch.empty(shape)
            given = ((x,), None, table, None, 0, None, None, *noise, True, None)
            diffusion.diffusion_step((torch.empty_like(x),), x, *given)
    assert len(found) == 1


def kernel_args(rng, out, rows, cols):
    flags = {"KIND": 1, "SEEDS": 0, "ALIGNED": False, "BR": 1, "BC": 1024}
    scalars = (cols, None, 1, 0, 0, rows, rows, cols, 1, 0, 1)
    rng.launch(rng.random_kernel, 1, out, out, *scalars, **flags)


def main():
    print(f"triton {triton.__version__}")
    print(f"{'kernel':28} {'target':8} registers spills shared")
    for target in TARGETS:
        for launch in FAMILIES.values():
            with record(target) as found:
                launch()
            for r in found:
                print(f"{r.kernel:28} {r.target:8} {r.registers:9} {r.spills:6} {r.shared:6}")


if __name__ == "__main__":
    main()
