"""CUDA kernels on a GPU: the CPU's bits, the current stream, no synchronisation, graph capture.

The same kernels run on any machine through tests/cuda; what only a GPU can show stands here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

import genfast
from genfast import schedulers
from genfast._native import _C

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not _C.build_info()["cuda"], reason="built without CUDA"),
]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PLAN = schedulers.dpm_solver_plan(20)


@pytest.fixture(autouse=True)
def cuda_backend(torch_state):
    """Of the process: a block's calls take the slow road."""
    genfast.set_backend("cuda")


def inputs(n: int, shape, dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(n)]


def step(x, m, h, row=7, **options):
    """A solver step that reads the sample, the model output and a history entry."""
    return genfast.diffusion_step(x, m, PLAN.table_on(x.device), row, history=(h,), **options)


def per_sample(x, low=0.25, step=1 / 128):
    """A number per sample, made on x's device by exact operations: no copy, the same bits."""
    return torch.arange(x.shape[0], dtype=torch.float32, device=x.device) * step + low


def rows_of(x):
    """A number per sample and channel of the last dimension."""
    return x.flatten(1)[:, : x.shape[-1]]


def resampled(x):
    taps = torch.full((4, 4), 1 / 16, device=x.device)
    return genfast.upsample2d(x.reshape(1, 1, len(x), -1), taps)


# name -> function of device tensors, in eager and differentiable form
CALLS = {
    "randn_like": (1, lambda x: genfast.randn_like(x, seed=3, stream=2)),
    "rand_like": (1, lambda x: genfast.rand_like(x, seed=3, offset=2**33 + 1)),
    "reparameterize": (2, lambda m, v: genfast.reparameterize(m, v, seed=5)),
    "tanh_normal": (2, lambda m, v: genfast.tanh_normal(m, v, seed=5)),
    "log_normal": (2, lambda m, v: genfast.log_normal(m, v, seed=5)),
    "hard_gumbel": (1, lambda x: genfast.gumbel_softmax(x, 0.5, True, seed=7)),
    "relaxed_bernoulli": (1, lambda x: genfast.relaxed_bernoulli(x, 0.5, seed=7)),
    "sample_categorical": (1, lambda x: genfast.sample_categorical(x, seed=9)),
    "sample_tokens": (1, lambda x: genfast.sample_tokens(x, 0.8, 50, 0.9, 0.01, seed=9)),
    "diffusion_step": (3, lambda x, m, h: step(x, m, h, seed=3)),
    "diffusion_step_guided": (4, lambda x, m, u, h: step(x, (m, u), h, weights=3.5)),
    "add_noise": (1, lambda x: genfast.add_noise(x, 0.6, 0.8, seed=3)),
    "add_noise_per_sample": (1, lambda x: genfast.add_noise(x, None, per_sample(x), seed=3)),
    "velocity": (2, lambda x, z: genfast.velocity(x, 0.6, 0.8, noise=z)),
    "bias_act": (1, lambda x: genfast.bias_act(x, act="lrelu", strength=0.5, seed=3, clamp=2.0)),
    "bias_act_swish": (
        2,
        lambda x, b: genfast.bias_act(x, b.flatten(1)[0, : x.shape[1]], act="swish"),
    ),
    "gated_act": (1, lambda x: genfast.gated_act(torch.cat([x, x], -1), "swish")),
}
CLOSE = {  # sums: another order of addition
    "reparameterize_kl": (2, lambda m, v: genfast.reparameterize(m, v, seed=5, return_kl=True)),
    "tanh_log_prob": (2, lambda m, v: genfast.tanh_normal(m, v, seed=5, return_log_prob=True)),
    "gumbel_softmax": (1, lambda x: genfast.gumbel_softmax(x, 0.5, seed=7)),
    "bernoulli_nll": (2, genfast.bernoulli_nll),
    "upsample2d": (1, resampled),
    "group_norm": (1, lambda x: genfast.group_norm(x, 1, act="silu")),
    "layer_norm": (2, lambda x, s: genfast.layer_norm(x, scale=rows_of(s), act="gelu")),
    "rms_norm": (2, lambda x, h: genfast.rms_norm(x, add=h, gate=rows_of(h))),
    "guide": (2, lambda c, u: genfast.guide(c, u, 5.0, method="rescale", rescale=0.7)),
    "denoising_loss": (
        2,
        lambda o, x: genfast.denoising_loss(
            o, x, per_sample(x, 0.875, -1 / 128), per_sample(x), seed=5, weighting="min_snr"
        ),
    ),
    "dynamic_threshold": (1, lambda x: genfast.dynamic_threshold(x, 0.99, 4.0)),
}
SHAPES = [(64, 1000), (3, 7, 333), (2, 50257)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_same_bits_as_the_cpu(name, shape, dtype):
    n, call = CALLS[name]
    xs = inputs(n, shape, dtype)
    on_cpu, on_gpu = call(*xs), call(*(x.cuda() for x in xs))
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CLOSE)
def test_sums_are_close_and_repeatable(name, shape):
    n, call = CLOSE[name]
    xs = inputs(n, shape, torch.float32)
    on_gpu = [call(*(x.cuda() for x in xs)) for _ in range(3)]
    torch.testing.assert_close(on_gpu[0], call(*xs), check_device=False, rtol=1e-5, atol=1e-5)
    for again in on_gpu[1:]:
        torch.testing.assert_close(again, on_gpu[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "name",
    [
        "reparameterize",
        "tanh_normal",
        "hard_gumbel",
        "gumbel_softmax",
        "relaxed_bernoulli",
        "reparameterize_kl",
        "bernoulli_nll",
        "bias_act_swish",
        "gated_act",
        "group_norm",
        "layer_norm",
        "rms_norm",
        "diffusion_step",
        "add_noise_per_sample",
        "denoising_loss",
    ],
)
def test_gradients(name):
    n, call = (CALLS | CLOSE)[name]
    xs = inputs(n, (33, 257), torch.float32)
    grads = []
    for device in ("cpu", "cuda"):
        tensors = [x.to(device) for x in xs]
        # Of a loss the kernels have the gradient by the model's output alone.
        leaves = tensors[:1] if name == "denoising_loss" else tensors
        for x in leaves:
            x.requires_grad_()
        out = call(*tensors)
        total = sum(o.cos().sum() for o in (out if isinstance(out, tuple) else (out,)))
        grads.append([g.cpu() for g in torch.autograd.grad(total, leaves)])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


# Group norms whose groups many blocks share: long ones, and with the channels last scattered ones.
LONG_GROUPS = {
    "long": ((2, 6, 96, 104), 2, torch.contiguous_format),
    "odd": ((1, 4, 111, 113), 2, torch.contiguous_format),
    "scattered": ((3, 40, 46, 50), 8, torch.channels_last),
    "odd scattered": ((1, 22, 113, 107), 11, torch.channels_last),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", LONG_GROUPS)
def test_long_groups(name, dtype):
    shape, groups, memory_format = LONG_GROUPS[name]
    x, g = (t.contiguous(memory_format=memory_format) for t in inputs(2, shape, dtype))
    C = shape[1]
    w, rows = inputs(1, (C,), dtype)[0], inputs(1, (shape[0], C), dtype)[0]
    found = []
    for device in ("cpu", "cuda", "cuda"):
        leaves = [t.to(device).detach().requires_grad_() for t in (x, w, w, rows, rows)]
        call = {"scale": leaves[3], "shift": leaves[4], "act": "silu"}
        y = genfast.group_norm(leaves[0], groups, *leaves[1:3], **call)
        found.append([t.cpu() for t in (y, *torch.autograd.grad(y, leaves, g.to(device)))])
    for cpu, gpu, again in zip(*found, strict=True):
        assert torch.equal(gpu, again) and gpu.stride() == cpu.stride()
        most = 40 * torch.finfo(dtype).eps * cpu.abs().max().item()
        torch.testing.assert_close(gpu, cpu, rtol=0, atol=most)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["group_norm", "layer_norm", "rms_norm"])
def test_gradients_of_plain_norms_by_the_automatic_choice(name, dtype):
    """They may be PyTorch's: the dtype is x's under autocast too, and gradients have gradients."""
    x, w = (t.cuda().requires_grad_() for t in inputs(2, (4, 16), dtype))
    w = w[0].detach().requires_grad_()
    before = (4,) if name == "group_norm" else ()
    found = {}
    for backend in ("auto", "reference"):
        with torch.autocast("cuda", torch.bfloat16):
            genfast.set_backend(backend)
            y = getattr(genfast, name)(x, *before, w)
        assert y.dtype == dtype
        first = torch.autograd.grad(y.float().square().sum(), (x, w), create_graph=True)
        total = sum(g.float().square().sum() for g in first)
        found[backend] = (y, *first, *torch.autograd.grad(total, (x, w)))
    for a, b in zip(*found.values(), strict=True):
        assert (a - b).abs().max() <= 100 * torch.finfo(dtype).eps * b.abs().max()


def test_strided_and_misaligned():
    x = inputs(1, (64, 130), torch.float16)[0]
    for view in (x.t(), x[:, 1:], x[::2, ::3], x.flatten()[3:]):
        gpu = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device="cuda")
        gpu.copy_(view)
        for name in ("randn_like", "relaxed_bernoulli"):
            assert torch.equal(CALLS[name][1](gpu).cpu(), CALLS[name][1](view))


def test_seed_per_sample_on_the_device():
    seeds = torch.arange(100, 108)
    whole = genfast.randn(8, 999, seed=seeds.cuda(), device="cuda")
    assert torch.equal(whole.cpu(), genfast.randn(8, 999, seed=seeds))
    part = genfast.randn(2, 999, seed=seeds[3:5].cuda(), device="cuda")
    assert torch.equal(part, whole[3:5])


def test_current_stream():
    """Work goes to torch's current stream: it waits for what that stream does, nothing else."""
    x, stream = torch.zeros(1 << 22, device="cuda"), torch.cuda.Stream()
    genfast.reparameterize(x, torch.full_like(x, -200.0), seed=1)  # loading a kernel waits
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
        y = genfast.reparameterize(x, torch.full_like(x, -200.0), seed=1)
        done = stream.query()
    torch.cuda.current_stream().wait_stream(stream)
    assert not done
    assert torch.equal(y, torch.ones_like(y))


@pytest.mark.parametrize("name", [*CALLS, *CLOSE])
def test_no_sync_and_graph_capture(name):
    n, call = (CALLS | CLOSE)[name]
    xs = [x.cuda() for x in inputs(n, (32, 2048), torch.bfloat16)]
    call(*xs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = call(*xs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(*xs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x in xs:
        x.neg_()
    graph.replay()
    expected = call(*xs)
    pair = (
        (captured, expected)
        if isinstance(captured, torch.Tensor)
        else (
            torch.cat([c.flatten() for c in captured]),
            torch.cat([e.flatten() for e in expected]),
        )
    )
    assert torch.equal(*pair)
    del eager


def test_step_counter_in_a_graph():
    """One captured step, replayed: the row comes from a counter on the device."""
    x, m, h = (t.cuda() for t in inputs(3, (2, 4, 16, 16), torch.float32))
    counter = torch.zeros((), dtype=torch.int64, device="cuda")
    table = PLAN.table_on("cuda")
    expected = [step(x, m, h, row=row, seed=1) for row in range(4)]
    out = torch.empty_like(x)

    def one():
        genfast.diffusion_step(x, m, table, counter, history=(h,), seed=1, out=out)
        counter.add_(1)

    one()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one()
    counter.zero_()
    for want in expected:
        graph.replay()
        assert torch.equal(out, want)


# B, Hq, Hkv, Sq, Sk, D
ATTENTION = [(2, 8, 2, 333, 333, 64), (1, 4, 4, 128, 1000, 128), (1, 2, 1, 65, 65, 256)]
OPTIONS = {
    "plain": {},
    "causal": {"causal": True, "align": "bottom_right"},
    "window": {"window": (70, 0), "softcap": 3.0},
    "dropout": {"dropout_p": 0.2, "seed": 4},
}


def attention_inputs(shape, dtype, grad=True):
    B, Hq, Hkv, Sq, Sk, D = shape
    generator = torch.Generator().manual_seed(2)
    sizes = ((B, Hq, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, D))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_(grad) for s in sizes]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_judged_by_the_reference(name, shape, dtype):
    """Outputs and gradients: at most twice (three times) PyTorch's own error, in its dtype."""
    found = {}
    for kind in ("truth", "torch", "ours"):
        wide = torch.float64 if kind == "truth" else dtype
        leaves = [
            x.detach().cuda().to(wide).requires_grad_() for x in attention_inputs(shape, dtype)
        ]
        with genfast.backend("cuda" if kind == "ours" else "reference"):
            out = genfast.attention(*leaves, **OPTIONS[name])
        grad = torch.ones_like(out) / 8
        found[kind] = [out, *torch.autograd.grad(out, leaves, grad)]
    for i, (ours, plain, truth) in enumerate(
        zip(found["ours"], found["torch"], found["truth"], strict=True)
    ):
        # The reference computes 16 bit in fp32: its error is one rounding, ours a few.
        scale = torch.finfo(dtype).eps * truth.abs().max()
        own = (plain.double() - truth).abs().max()
        assert (ours.double() - truth).abs().max() <= (3 if i else 2) * own + 3 * scale


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("heads, D", [(4, 64), (2, 64), (4, 36)])
def test_the_automatic_choice_keeps_the_promises(heads, D, dtype):
    """Of calls that may be PyTorch's: rows that see no key give 0, gradients have gradients."""
    q = genfast.randn(2, 4, 40, D, seed=1, dtype=dtype, device="cuda")
    k, v = (genfast.randn(2, heads, 40, D, seed=1, stream=i, dtype=dtype, device="cuda")
            for i in (1, 2))  # fmt: skip
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool, device="cuda")
    mask[0, :, 3], mask[1] = False, False
    found = {}
    for name in ("auto", "reference"):
        with genfast.backend(name):
            out = genfast.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
            assert not out[0, :, 3].any() and not out[1].any()
            inputs = [x.clone().requires_grad_() for x in (q, k, v)]
            loss = genfast.attention(*inputs).float().square().sum()
            first = torch.autograd.grad(loss, inputs, create_graph=True)
            total = sum(g.float().square().sum() for g in first)
            found[name] = (out, *first, *torch.autograd.grad(total, inputs))
    wide = 1e-4 if dtype == torch.float32 else 0.1
    for a, b in zip(*found.values(), strict=True):
        assert (a - b).abs().max() <= wide * b.abs().max()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_gradients_repeat(dtype):
    """With deterministic algorithms asked for; else sm_90 adds the parts of dQ in any order."""
    leaves = [x.detach().cuda().requires_grad_() for x in attention_inputs(ATTENTION[0], dtype)]
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            out = genfast.attention(*leaves, causal=True)
            runs.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    finally:
        torch.use_deterministic_algorithms(False)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))


def test_attention_dropout_is_the_cpus():
    q, k, v = attention_inputs(ATTENTION[0], torch.float32, grad=False)
    options = {"dropout_p": 0.5, "seed": 9}
    on_gpu = genfast.attention(q.cuda(), k.cuda(), v.cuda(), **options).cpu()
    torch.testing.assert_close(on_gpu, genfast.attention(q, k, v, **options), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("paged", [False, True], ids=["entries", "pages"])
def test_decoding_equals_prefill(paged):
    q, k, v = (x.cuda() for x in attention_inputs((2, 8, 2, 96, 96, 64), torch.float16, False))
    whole = genfast.attention(q, k, v, causal=True)
    shape = (16, 2, 16, 64) if paged else (2, 2, 128, 64)
    caches = [torch.full(shape, torch.nan, dtype=q.dtype, device="cuda") for _ in range(2)]
    table = torch.arange(16, dtype=torch.int32, device="cuda").view(2, 8) if paged else None
    for i in range(96):
        at = slice(i, i + 1)
        lengths = torch.full((2,), i, dtype=torch.int32, device="cuda")
        out = genfast.attention_with_kvcache(
            q[:, :, at], *caches, k[:, :, at], v[:, :, at], cache_seqlens=lengths,
            block_table=table,
        )  # fmt: skip
        torch.testing.assert_close(out, whole[:, :, at], rtol=4e-3, atol=2e-3)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_attention_no_sync_and_graph_capture(backward):
    leaves = [x.detach().cuda() for x in attention_inputs(ATTENTION[0], torch.bfloat16)]
    leaves = [x.requires_grad_(backward) for x in leaves]

    def call():
        out = genfast.attention(*leaves, causal=True)
        return torch.autograd.grad(out, leaves, torch.ones_like(out)) if backward else (out,)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # autograd's warm-up, as torch's documentation asks
        expected = call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_second_device():
    x = inputs(1, (1000,), torch.float32)[0]
    assert torch.cuda.current_device() == 0
    assert torch.equal(
        genfast.randn_like(x.to("cuda:1"), seed=1).cpu(), genfast.randn_like(x, seed=1)
    )
    assert torch.cuda.current_device() == 0


def test_offsets_beyond_32_bits():
    free, _ = torch.cuda.mem_get_info()
    n = 2**32 + 4099
    if free < n * 2 + 2**30:
        pytest.skip(f"needs {n * 2 >> 30} GiB")
    x = genfast.randn(n, seed=1, dtype=torch.bfloat16, device="cuda")
    tail = genfast.randn(4099, seed=1, offset=2**32, dtype=torch.bfloat16)
    assert torch.equal(x[2**32 :].cpu(), tail)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer")
    program = (
        "import torch, genfast; genfast.set_backend('cuda');"
        "x = torch.randn(3, 1030, device='cuda', dtype=torch.float16);"
        "genfast.reparameterize(x, x, seed=1, return_kl=True);"
        "genfast.gumbel_softmax(x, 0.5, seed=1);"
        "genfast.sample_tokens(x, 0.8, 50, 0.9, 0.01, seed=1);"
        "genfast.add_noise(x, 0.6, 0.8, seed=1); genfast.guide(x, x, 2.0, method='tcfg');"
        "q = torch.randn(1, 2, 140, 40, device='cuda', dtype=torch.float16, requires_grad=True);"
        "genfast.attention(q, q, q, causal=True).sum().backward();"
        "genfast.attention(q[:, :, :3].detach(), q, q); torch.cuda.synchronize()"
    )
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=80,
        # torch's allocator cuts tensors out of large blocks, where an overrun goes unseen.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer refuses this device")
    assert done.returncode == 0, done.stdout[-3000:]
