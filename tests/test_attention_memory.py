"""Peak memory of attention beside its inputs and outputs: O(S), where the scores are O(S^2)."""

import os
import subprocess
import sys

import pytest

MEASURE = """
import resource, sys, torch, genfast
S, backward = int(sys.argv[1]), sys.argv[2] == "backward"
torch.set_num_threads(2)
q, k, v, g = (torch.randn(1, 4, S, 64) for _ in range(4))

def run(n):
    three = [x[:, :, :n].detach().clone().requires_grad_(backward) for x in (q, k, v)]
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = genfast.attention(*three)
    kept = (out, *torch.autograd.grad(out, three, g[:, :, :n])) if backward else (out,)
    end = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (end - start) * 1024 - sum(x.nbytes for x in kept)

run(256)
print(run(S))
"""


def workspace(S, kind) -> int:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(S), kind], check=True, capture_output=True, text=True
    )
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_forward_needs_a_constant_workspace():
    """0.6 MiB a thread at D = 64, whatever the length (measured: 1.3 MiB for two threads at 4,096
    to 16,384 keys); the scores alone would be 1 GiB here."""
    assert workspace(8192, "forward") < 8 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_backward_needs_a_linear_workspace():
    """Gradients of q in fp32 of all heads, and of one head and its packed rows a thread: 3.1 KiB a
    query for 4 heads of 64 and two threads (measured: 13, 25 and 31 MiB at 4,096, 8,192 and 16,384
    keys; packed rows beyond 8 MiB are not kept)."""
    short, long = workspace(4096, "backward"), workspace(8192, "backward")
    assert short < 5 * 1024 * 4096 and long < 5 * 1024 * 8192


PACKED = """
import resource, torch, genfast
lengths = torch.tensor([0, 20000] + [1] * 4000)
cu = lengths.cumsum(0).int()
q = torch.randn(int(cu[-1]), 4, 16, requires_grad=True)
out = genfast.attention_varlen(q, q, q, cu, cu, causal=True, window=(16, 0))
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**29
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
out.sum().backward()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_packed_backward_needs_memory_of_its_rows():
    """Two numbers a row and head, 0.7 MiB here; 2.4 GiB if each of the 4,001 sequences had the
    longest one's."""
    subprocess.run(
        [sys.executable, "-c", PACKED], check=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
