"""DTensors on two processes: outputs and gradients are those of the whole tensors."""

import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import genfast

if not dist.is_available():
    pytest.skip("this torch has no distributed part", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from genfast.integrations import dtensor

X, C = (3, 4, 6, 8), 8  # three samples on two processes: one has one more
QKV = {"q": (3, 4, 5, 16), "k": (3, 2, 9, 16), "v": (3, 2, 9, 16)}
ROWS = torch.tensor([0, 3, 7, 11], dtype=torch.int32)


def norm(x, w=None, b=None, s=None, t=None, add=None, g=None, act="linear"):
    return genfast.layer_norm(x, w, b, scale=s, shift=t, add=add, gate=g, act=act)


def seen(q, k, v, m):
    return genfast.attention(q, k, v, mask=m > 0)


def sinks(q, k, v, sinks):
    return genfast.attention(q, k, v, sinks=sinks)


def alibi(q, k, v, m):
    slopes = m.detach().exp()  # they have no gradient on the kernels
    return genfast.attention(q, k, v, alibi_slopes=slopes, causal=True, align="bottom_right")


def packed(q, k, v):
    cu = distribute_tensor(ROWS, q.device_mesh, [Replicate()]) if dtensor_like(q) else ROWS
    return genfast.attention_varlen(q, k, v, cu, cu, 4, 4, causal=True)


def dtensor_like(x):
    return hasattr(x, "placements")


# Function, shapes, which of them are cut along the dimension, the dimensions tried.
CASES = [
    (norm, {"x": X, "w": (C,), "b": (C,)}, "x", (0, 1, 2, 3)),
    (norm, {"x": X, "w": (C,)}, "x", (0, 2)),
    (norm, {"x": X, "b": (C,)}, "x", (0, 2)),  # the same tensors as the one before
    (norm, {"x": X, "s": (3, C), "t": (3, C)}, "x", (0, 1)),
    (norm, {"x": X, "w": (C,), "add": X, "g": (3, C)}, ("x", "add"), (0, 1)),
    (norm, {"x": X, "add": X}, ("x",), (0, 1)),
    (genfast.rms_norm, {"x": X, "weight": (C,)}, "x", (0, 1)),
    (
        lambda x, w, s: genfast.group_norm(x, 2, w, scale=s, act="silu"),
        {"x": X, "w": (4,), "s": (3, 4)}, "x", (0, 1),
    ),
    (lambda x, b: genfast.bias_act(x, b, act="lrelu"), {"x": X, "b": (4,)}, "x", (0, 1, 3)),
    (lambda x, b: genfast.bias_act(x, b, dim=3, act="swish"), {"x": X, "b": (C,)}, "x", (0, 1, 3)),
    (genfast.gated_act, {"x": X}, "x", (0, 2, 3)),
    (genfast.attention, QKV, "qkv", (0, 1, 2)),
    (genfast.attention, {**QKV, "mask": (5, 9)}, "qkv", (0, 1)),
    (genfast.attention, {**QKV, "mask": (3, 1, 5, 9)}, "qkv", (0, 1)),
    (genfast.attention, {**QKV, "mask": (1, 4, 5, 9)}, "qkv", (0, 1)),
    (seen, {**QKV, "m": (3, 1, 1, 9)}, "qkv", (0, 1)),
    (sinks, {**QKV, "sinks": (4,)}, "qkv", (0, 1)),
    (alibi, {**QKV, "m": (4,)}, "qkv", (0, 1)),
    (alibi, {**QKV, "m": (3, 4)}, "qkv", (0, 1)),
    (packed, {"q": (11, 4, 16), "k": (11, 2, 16), "v": (11, 2, 16)}, "qkv", (0, 1)),
]  # fmt: skip


def both(call, tensors, gradients=None):
    """Outputs and gradients of the tensors that have one."""
    outs = call(**tensors)
    outs = outs if isinstance(outs, tuple) else (outs,)
    gradients = gradients or [torch.ones_like(y) * y.detach() for y in outs]
    wanted = [t for t in tensors.values() if t.requires_grad]
    return *outs, *torch.autograd.grad(outs, wanted, gradients, allow_unused=True)


def compare(mesh, call, shapes, cut, d):
    plain = {k: torch.randn(s).requires_grad_() for k, s in shapes.items()}
    parts = {
        k: distribute_tensor(t.detach(), mesh, [Shard(d) if k in cut else Replicate()])
        for k, t in plain.items()
    }
    want = both(call, plain)
    got = both(call, {k: t.requires_grad_() for k, t in parts.items()})
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.full_tensor(), b, rtol=2e-5, atol=2e-5)
    return got[0].placements[0]


def process(rank, store):
    dist.init_process_group(
        "gloo", f"file://{store}", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    dtensor.register()
    torch.manual_seed(0)
    for call, shapes, cut, dims in CASES:
        for d in dims:
            compare(mesh, call, shapes, cut, d)
    # What can stay where it is does.
    assert compare(mesh, norm, {"x": X, "w": (C,)}, "x", 1) == Shard(1)
    assert compare(mesh, genfast.attention, QKV, "qkv", 1) == Shard(1)
    three = {name: (3, 3, 5, 16) for name in "qkv"}  # heads do not divide
    assert compare(mesh, genfast.attention, three, "qkv", 1) != Shard(1)
    x = distribute_tensor(torch.randn(4, 4, 5, 16), mesh, [Shard(0)])
    one = distribute_tensor(torch.ones(()), mesh, [Replicate()])
    with pytest.raises(RuntimeError, match="dropout_p: expected 0 on DTensors"):
        genfast.attention(x, x, x, dropout_p=0.5, seed=1)
    with pytest.raises(RuntimeError, match="noise: expected a tensor or None on DTensors"):
        genfast.bias_act(x, strength=one, seed=1)
    dist.barrier()  # the first to leave would take what the other still asks for
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    """This file as a script: what a child would have to import has no name under bare pytest."""
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [child.communicate()[1] for child in children]
    for child, error in zip(children, errors, strict=True):
        assert child.returncode == 0, error


if __name__ == "__main__":
    process(int(sys.argv[1]), sys.argv[2])
