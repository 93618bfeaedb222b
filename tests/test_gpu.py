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
from genfast._native import _C

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not _C.build_info()["cuda"], reason="built without CUDA"),
]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def cuda_backend():
    with genfast.backend("cuda"):
        yield


def inputs(n: int, shape, dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(n)]


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
}
CLOSE = {  # sums: another order of addition
    "reparameterize_kl": (2, lambda m, v: genfast.reparameterize(m, v, seed=5, return_kl=True)),
    "tanh_log_prob": (2, lambda m, v: genfast.tanh_normal(m, v, seed=5, return_log_prob=True)),
    "gumbel_softmax": (1, lambda x: genfast.gumbel_softmax(x, 0.5, seed=7)),
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
    ],
)
def test_gradients(name):
    n, call = (CALLS | CLOSE)[name]
    xs = inputs(n, (33, 257), torch.float32)
    grads = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device).requires_grad_() for x in xs]
        out = call(*leaves)
        total = sum(o.cos().sum() for o in (out if isinstance(out, tuple) else (out,)))
        grads.append([g.cpu() for g in torch.autograd.grad(total, leaves)])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


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
        "genfast.sample_tokens(x, 0.8, 50, 0.9, 0.01, seed=1); torch.cuda.synchronize()"
    )
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ,
    )
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer refuses this device")
    assert done.returncode == 0, done.stdout[-3000:]
