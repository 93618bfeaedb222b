"""The native boundary: what comes in through DLPack, what is refused and how, threads and fork."""

# ruff: noqa: E501  (the table of bad calls: one case a line)

import multiprocessing
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import genfast
from genfast._native import _C, LEVEL_BITS, VECTOR_BITS

DIRECT, GRAD, SLOW = 1, 2, 0
ROOT = Path(__file__).parents[1]


# ---- the ABI ----------------------------------------------------------------------------------

PAIRS = {  # our struct: (the header's, {our field: its field})
    "Version": ("DLPackVersion", {"major": "major", "minor": "minor"}),
    "Device": ("DLDevice", {"type": "device_type", "id": "device_id"}),
    "DataType": ("DLDataType", {"code": "code", "bits": "bits", "lanes": "lanes"}),
    "Tensor": (
        "DLTensor",
        {k: k for k in ("data", "device", "ndim", "dtype", "shape", "strides", "byte_offset")},
    ),
    "Managed": (
        "DLManagedTensor",
        {"tensor": "dl_tensor", "context": "manager_ctx", "deleter": "deleter"},
    ),
    "ManagedVersioned": (
        "DLManagedTensorVersioned",
        {"version": "version", "context": "manager_ctx", "deleter": "deleter", "flags": "flags",
         "tensor": "dl_tensor"},
    ),
    "ExchangeApi": (
        "DLPackExchangeAPI",
        {"allocate": "managed_tensor_allocator",
         "from_object": "managed_tensor_from_py_object_no_sync",
         "to_object": "managed_tensor_to_py_object_no_sync",
         "view": "dltensor_from_py_object_no_sync", "current_stream": "current_work_stream"},
    ),
}  # fmt: skip


def test_dlpack_structs_equal_the_header_of_torch(tmp_path):
    header = Path(torch.__file__).parent / "include" / "ATen" / "dlpack.h"
    source = ROOT / "csrc" / "api" / "dlpack.h"
    if not header.exists() or not source.exists() or shutil.which("g++") is None:
        pytest.skip("needs torch's dlpack.h, the source tree and g++")
    lines = ["#include <cstddef>", f'#include "{header}"', f'#include "{source}"']
    lines.append("namespace ours = genfast::dl;")
    for our, (theirs, fields) in PAIRS.items():
        lines.append(f'static_assert(sizeof(ours::{our}) == sizeof({theirs}), "{our}");')
        for a, b in fields.items():
            lines.append(
                f"static_assert(offsetof(ours::{our}, {a}) == offsetof({theirs}, {b}) && "
                f'sizeof(ours::{our}::{a}) == sizeof({theirs}::{b}), "{our}.{a}");'
            )
    lines.append(
        "static_assert(offsetof(ours::ExchangeApi, version) == offsetof(DLPackExchangeAPI, "
        'header), "version");'
    )
    file = tmp_path / "abi.cpp"
    file.write_text("\n".join(lines))
    run = subprocess.run(
        ["g++", "-std=c++17", "-Wno-invalid-offsetof", "-fsyntax-only", str(file)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_extension_needs_no_library_of_torch():
    """So one wheel serves every torch: tests/torches.sh runs it under several."""
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")

    def told(*options):
        command = ["readelf", "--wide", *options, _C.__file__]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    needed = [line.split("[")[1] for line in told("--dynamic").splitlines() if "NEEDED" in line]
    symbols = [line.split()[-1] for line in told("--dyn-syms").splitlines() if " UND " in line]
    assert any("libc.so" in name for name in needed) and len(symbols) > 50
    foreign = ("torch", "c10", "cuda", "_ZN2at", "_ZNK2at", "THP")
    assert not [name for name in needed + symbols if any(word in name for word in foreign)]


def test_build_info():
    info = _C.build_info()
    assert info["exchange_api"] and info["isa"] in info["isa_usable"]
    assert info["isa_usable"][-1] == "base" and info["threads"] in ("gomp", "std::thread")
    bits = [LEVEL_BITS[level] for level in info["isa_usable"]]  # best first
    assert bits == sorted(bits, reverse=True) and LEVEL_BITS[info["isa"]] == VECTOR_BITS


def test_an_amd_processor_of_zen_4_has_no_512_bit_unit():
    """Zen 5 (family 26) may; a guest, which does not see the bit, takes it for granted."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    family = re.search(r"^cpu family\s*: (\d+)", text, re.M)
    amd = "AuthenticAMD" in text
    wide = _C.build_info()["amd_512_bit_unit"]
    if not amd or not family or int(family[1]) < 26:
        assert wide is False
    elif "hypervisor" in text:
        assert wide is True


# ---- the gate ---------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def test_gate():
    x, g = torch.zeros(3), torch.zeros(3, requires_grad=True)
    gate = _C.gate
    assert gate() == gate(x) == gate(x, x) == gate(x, None) == DIRECT
    assert gate(g) == gate(x, g) == gate(torch.nn.Parameter(x)) == GRAD
    with torch.no_grad():
        assert gate(g) == DIRECT
    with torch.inference_mode():
        assert gate(g) == DIRECT
    for strange in (x.as_subclass(Subclass), 3.0, [x], np.zeros(3), "x"):
        assert gate(strange) == gate(x, strange) == SLOW
    assert gate(torch.zeros(3, dtype=torch.complex64).conj().imag) == SLOW
    with FakeTensorMode():
        assert gate() == SLOW
    with forward_ad.dual_level():
        assert gate(x) == SLOW
    seen = []
    torch.vmap(lambda t: seen.append(gate(x)) or t)(x)
    torch.func.grad(lambda t: seen.append(gate(x)) or t.sum())(x)
    assert seen == [SLOW, SLOW]
    with genfast.backend("reference"):
        assert gate(x) == SLOW
    assert gate(x) == DIRECT


# ---- what the caster takes ----------------------------------------------------------------------


def fill(out, seeds=None):
    return _C.random(out, 1, 5, seeds, 0, 0, 0, 1)


def test_caster_takes_memory_of_any_producer():
    expected = genfast.randn(12, seed=5)
    array = np.zeros(12, np.float32)
    assert fill(array) and np.array_equal(array, expected.numpy())
    array = np.zeros((24,), np.float64)[::-2]  # negative strides
    assert fill(array) and np.array_equal(array, expected.double().numpy())
    for x in (torch.zeros(12).as_subclass(Subclass), torch.nn.Parameter(torch.zeros(12))):
        assert fill(x) and torch.equal(x.detach().as_subclass(torch.Tensor), expected)
    base = torch.zeros(20)
    assert fill(base[5:17]) and torch.equal(base[5:17], expected) and (base[17:] == 0).all()
    lazy = torch._lazy_clone(base)
    assert fill(lazy[5:17]) and torch.equal(lazy[5:17], expected)


def not_memory():
    x = torch.zeros(4)
    with FakeTensorMode() as mode:
        yield "fake", mode.from_tensor(x)
    yield "meta", x.to("meta")
    yield "sparse", x.to_sparse()
    yield "complex", x.to(torch.complex64)
    yield "conj", x.to(torch.complex64).conj()
    yield "nested", torch.nested.nested_tensor([x], layout=torch.jagged)
    yield "quantized", torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    yield "bool", x.bool()
    yield "int16", x.short()
    yield "float8", x.to(torch.float8_e4m3fn)
    yield "13 dims", x.view([1] * 12 + [4])
    yield "list", [1.0]
    yield "float", 1.0
    yield "str", "x"
    yield "None", None
    yield "type", torch.Tensor
    yield "int array", np.zeros(4, np.uint16)
    yield "object array", np.array([None])


STRANGE = [pytest.param(x, id=name) for name, x in not_memory()]


@pytest.mark.parametrize("x", STRANGE)
def test_caster_refuses_what_is_no_plain_memory(x):
    """Never a crash, never an exception of its own: "not handled", in every position."""
    ok = lambda: torch.zeros(4)  # noqa: E731
    tau, index = torch.tensor(1.0), torch.zeros((), dtype=torch.int64)
    noise = (5, None, 0, 0)
    calls = [
        (_C.random, [ok(), 1, *noise, 0, 1], [0]),
        (_C.reparameterize, [ok(), ok(), ok(), None, *noise, 0, 0, 1.0], [0, 1]),
        (_C.reparameterize_backward,
         [ok(), None, ok(), ok(), ok(), ok(), *noise, 0, 0, 1.0], [2, 3, 4, 5]),
        (_C.gumbel_softmax, [ok(), ok(), tau, *noise, False], [0, 1, 2]),
        (_C.gumbel_softmax_backward, [ok(), None, ok(), tau, ok(), *noise], [0, 2, 3, 4]),
        (_C.relaxed_bernoulli, [ok(), ok(), tau, None, *noise, False], [0, 1, 2]),
        (_C.categorical, [ok(), index, None, None, None, None, *noise], [0, 1]),
        (_C.bernoulli_nll, [ok(), ok(), ok()], [0, 1, 2]),
        (_C.bernoulli_nll_backward, [ok(), ok(), ok(), ok(), ok()], [0, 3, 4]),
    ]  # fmt: skip
    for function, args, positions in calls:
        for at in positions:
            broken = list(args)
            broken[at] = x
            assert function(*broken) in (False, -1), (function.__name__, at)


def test_boundary_refuses_wrong_shapes_dtypes_and_numbers():
    a, b, noise = torch.zeros(3, 4), torch.zeros(4, 3), (5, None, 0, 0)
    tau = torch.tensor(1.0)
    assert not _C.reparameterize(a, b, a, None, *noise, 0, 0, 1.0)
    assert not _C.reparameterize(a, a, b, None, *noise, 0, 0, 1.0)
    assert not _C.reparameterize(a.double(), a, a, None, *noise, 0, 0, 1.0)
    assert not _C.reparameterize(a, a, a, torch.zeros(2), *noise, 0, 1, 1.0)
    assert not _C.reparameterize(a, a, a, torch.zeros(3).half(), *noise, 0, 1, 1.0)
    assert not _C.reparameterize(a, a, a, None, *noise, 0, 1, 1.0)
    for transform, side in ((3, 0), (-1, 0), (0, 3), (0, -1)):
        assert not _C.reparameterize(a, a, a, None, *noise, transform, side, 1.0)
    assert not _C.random(a, 7, *noise, 0, 1) and not _C.random(a, -1, *noise, 0, 1)
    assert not _C.random(torch.zeros(3).long(), 5, *noise, 0, 0)  # an empty range
    assert not _C.random(torch.zeros(3).long(), 5, *noise, 0, 2**32 + 1)
    assert not _C.random(torch.zeros(4, 2).long()[:, 0], 5, *noise, 0, 9)
    assert not _C.gumbel_softmax(a, a, torch.ones(2), *noise, False)
    assert not _C.gumbel_softmax(a, a, tau.double(), *noise, False)
    assert not _C.gumbel_softmax(a[0], a[0].clone(), tau, 0, torch.arange(4), 0, 0, False)
    rows = torch.zeros(3)
    assert not _C.bernoulli_nll(rows, a, b) and not _C.bernoulli_nll(torch.zeros(4), a, a)
    assert not _C.bernoulli_nll(rows.half(), a, a)
    assert not _C.bernoulli_nll(rows[0], rows[0], rows[0])
    assert not _C.bernoulli_nll(rows, a, a, torch.zeros(4, dtype=torch.float64))
    assert not _C.bernoulli_nll_backward(rows, b, None, a, a)
    assert not _C.bernoulli_nll_backward(rows, None, a.double(), a, a)
    index = torch.zeros(3, dtype=torch.int64)
    assert _C.categorical(a, index[:2], None, None, None, None, *noise) == -1
    assert _C.categorical(a, index.int(), None, None, None, None, *noise) == -1
    assert _C.categorical(a, index, torch.ones(2), None, None, None, *noise) == -1
    for seeds in (torch.zeros(2).long(), torch.zeros(3), torch.zeros(6).long()[::2],
                  torch.zeros(3, 1).long()):  # fmt: skip
        assert not fill(a, seeds)
    with pytest.raises(ValueError, match="offset: expected 0 <= offset"):
        _C.random(a, 1, 5, None, 0, -1, 0, 1)
    with pytest.raises(ValueError, match="offset"):
        _C.random(a, 1, 5, None, 0, 2**62 + 1, 0, 1)
    for at, name in ((2, "seed"), (4, "stream")):
        for value, error in ((2**64, ValueError), (-(2**63) - 1, ValueError), (1.5, TypeError),
                             (True, TypeError), (None, TypeError)):  # fmt: skip
            args = [a, 1, 5, None, 0, 0, 0, 1]
            args[at] = value
            with pytest.raises(error, match=f"{name}: expected an int"):
                _C.random(*args)


# ---- threads and fork -------------------------------------------------------------------------


def everything(seed=3):
    """Only genfast's own kernels: torch's hang in a forked child (its OpenMP team is not there)."""
    x = genfast.randn(300, 701, seed=1)
    z, kl = genfast.reparameterize(x, x, seed=seed, return_kl=True, kl_reduction="sum")
    rows = genfast.randn(2, 4, 300, 64, seed=seed, dtype=torch.bfloat16)  # a matrix unit's, if any
    return (
        genfast.attention(rows, rows, rows).view(torch.int16),
        z, kl, genfast.gumbel_softmax(x, 0.5, seed=seed), genfast.relaxed_bernoulli(x, seed=seed),
        genfast.sample_tokens(x, 0.8, top_p=0.9, seed=torch.arange(300)),
        genfast.gaussian_kl(x, x, reduction="none"),
        genfast.randint(0, 99, (5000,), seed=seed),
    )  # fmt: skip


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_results_do_not_depend_on_the_number_of_threads():
    expected = everything()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert same(everything(), expected)


def test_concurrent_calls():
    expected = [everything(s) for s in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = list(pool.map(everything, range(4)))
            assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    # … and backward, which runs on autograd's own threads
    x = torch.randn(64, 700)

    def gradient(_):
        a = x.clone().requires_grad_()
        genfast.reparameterize(a, a, seed=2).sum().backward()
        return a.grad

    with ThreadPoolExecutor(4) as pool:
        grads = list(pool.map(gradient, range(8)))
    assert all(torch.equal(g, grads[0]) for g in grads)


def _child(connection):
    torch.set_num_threads(2)
    connection.send([x.numpy().tobytes() for x in everything()])
    connection.close()


def test_after_fork():
    """A child computes the same, although the parent's thread team is not in it."""
    expected = [x.numpy().tobytes() for x in everything()]
    context = multiprocessing.get_context("fork")
    mine, other = context.Pipe()
    child = context.Process(target=_child, args=(other,), daemon=True)
    child.start()
    other.close()
    try:
        assert mine.poll(60), "the child hangs"
        assert mine.recv() == expected
        child.join(30)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert same(everything(), everything())  # the parent still works


ALONE = """
import sys
sys.modules["torch"] = None  # not importable: what a process without torch sees
import importlib.util, numpy as np
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
x = np.zeros(200_001, np.float32)
assert module.random(x, 1, 5, None, 0, 0, 0, 1)
print(module.build_info()["threads"], x.sum(dtype=np.float64).hex())
"""


def test_without_torch_a_thread_pool_serves():
    run = subprocess.run(
        [sys.executable, "-c", ALONE, _C.__file__], capture_output=True, text=True, check=True
    )
    runtime, total = run.stdout.split()
    expected = genfast.randn(200_001, seed=5).numpy().sum(dtype=np.float64).hex()
    assert total == expected and runtime in ("gomp", "std::thread")


# ---- error messages ---------------------------------------------------------------------------

X = torch.zeros(3, 4)
COMPLEX, INTS, META = X.to(torch.complex64), X.long(), X.to("meta")
G = torch.Generator()
TWO = torch.zeros(2, dtype=torch.int64)

# call, exception, words that its text must hold: the argument, what was expected, what came
BAD = {
    "randn text": (lambda: genfast.randn("a"), TypeError, ["size", "int", "'a'"]),
    "randn float": (lambda: genfast.randn(2.5, seed=1), TypeError, ["size", "int", "2.5"]),
    "randn negative": (lambda: genfast.randn(-1, seed=1), ValueError, ["size", ">= 0", "-1"]),
    "randn 13 dims": (lambda: genfast.randn((1,) * 13, seed=1), ValueError, ["size", "12", "13"]),
    "randn dtype": (lambda: genfast.randn(3, dtype=torch.int64), TypeError, ["dtype", "float32", "int64"]),
    "rand complex": (lambda: genfast.rand(3, dtype=torch.complex64), TypeError, ["dtype", "complex64"]),
    "seed float": (lambda: genfast.randn(3, seed=1.5), TypeError, ["seed", "int", "1.5"]),
    "seed bool": (lambda: genfast.randn(3, seed=True), TypeError, ["seed", "int", "True"]),
    "seed wide": (lambda: genfast.randn(3, seed=2**64), ValueError, ["seed", "<=", str(2**64)]),
    "seed low": (lambda: genfast.randn(3, seed=-(2**63) - 1), ValueError, ["seed", ">="]),
    "seeds length": (lambda: genfast.randn(3, 4, seed=TWO), ValueError, ["seed", "3", "(2,)"]),
    "seeds dtype": (lambda: genfast.randn(3, seed=TWO.int()), TypeError, ["seed", "int64", "int32"]),
    "seeds 2-d": (lambda: genfast.randn(3, seed=torch.zeros(3, 1).long()), ValueError, ["seed", "(3, 1)"]),
    "seeds strided": (lambda: genfast.randn(3, seed=torch.zeros(6).long()[::2]), ValueError, ["seed", "contiguous"]),
    "stream": (lambda: genfast.randn(3, seed=1, stream="a"), TypeError, ["stream", "int", "'a'"]),
    "stream wide": (lambda: genfast.randn(3, seed=1, stream=2**64), ValueError, ["stream", "<="]),
    "offset": (lambda: genfast.randn(3, seed=1, offset=-1), ValueError, ["offset", ">= 0", "-1"]),
    "offset float": (lambda: genfast.randn(3, seed=1, offset=0.5), TypeError, ["offset", "int", "0.5"]),
    "offset wide": (lambda: genfast.randn(3, seed=1, offset=2**63), ValueError, ["offset", "<="]),
    "generator type": (lambda: genfast.randn(3, generator=1), TypeError, ["generator", "torch.Generator", "1"]),
    "generator and seed": (lambda: genfast.randn(3, seed=1, generator=G), ValueError, ["generator", "seed"]),
    "out type": (lambda: genfast.randn(3, seed=1, out=[0, 0, 0]), TypeError, ["out", "torch.Tensor", "list"]),
    "out shape": (lambda: genfast.randn(3, seed=1, out=torch.empty(4)), ValueError, ["out", "(3,)", "(4,)"]),
    "out dtype": (lambda: genfast.randn(3, 4, seed=1, out=X.half(), dtype=torch.float32), TypeError, ["out", "float32", "float16"]),
    "out ints": (lambda: genfast.randn(3, 4, seed=1, out=INTS), TypeError, ["out", "float32", "int64"]),
    "out grad": (lambda: genfast.randn(3, seed=1, out=torch.empty(3, requires_grad=True)), ValueError, ["out", "require grad", "detach"]),
    "out expanded": (lambda: genfast.randn(3, 4, seed=1, out=torch.empty(3, 1).expand(3, 4)), ValueError, ["out", "expanded"]),
    "out device": (lambda: genfast.randn(3, 4, seed=1, out=META, device="cpu"), ValueError, ["out", "cpu", "meta"]),
    "out sparse": (lambda: genfast.randn(3, 4, seed=1, out=X.to_sparse()), TypeError, ["out", "strided", "sparse"]),
    "randn_like": (lambda: genfast.randn_like([1.0]), TypeError, ["x", "torch.Tensor", "list"]),
    "rand_like ints": (lambda: genfast.rand_like(INTS), TypeError, ["dtype", "float32", "int64"]),
    "randint order": (lambda: genfast.randint(5, 5, 3), ValueError, ["high", "low 5"]),
    "randint wide": (lambda: genfast.randint(0, 2**32 + 1, 3), ValueError, ["high", "2**32"]),
    "randint low": (lambda: genfast.randint(0.5, 3, 3), TypeError, ["low", "int", "0.5"]),
    "randint size": (lambda: genfast.randint(0, 3, 2.5), TypeError, ["size", "int", "2.5"]),
    "randint dtype": (lambda: genfast.randint(0, 3, 3, dtype=torch.float32), TypeError, ["dtype", "int64", "float32"]),
    "randint int32": (lambda: genfast.randint(0, 2**31 + 1, 3, dtype=torch.int32), ValueError, ["int32", "int64"]),
    "mu type": (lambda: genfast.reparameterize(1.0, X), TypeError, ["mu", "torch.Tensor", "1.0"]),
    "mu None": (lambda: genfast.reparameterize(None, X), TypeError, ["mu", "torch.Tensor", "None"]),
    "logvar type": (lambda: genfast.reparameterize(X, [0]), TypeError, ["logvar", "torch.Tensor", "list"]),
    "logvar shape": (lambda: genfast.reparameterize(X, X.t()), ValueError, ["mu (3, 4)", "logvar (4, 3)", "broadcast"]),
    "mu ints": (lambda: genfast.reparameterize(INTS, X), TypeError, ["mu", "float32", "int64"]),
    "mu complex": (lambda: genfast.reparameterize(COMPLEX, X), TypeError, ["mu", "complex64"]),
    "mu sparse": (lambda: genfast.reparameterize(X.to_sparse(), X), TypeError, ["mu", "strided", "to_dense"]),
    "devices": (lambda: genfast.reparameterize(X, META), ValueError, ["device", "mu on cpu", "logvar on meta"]),
    "mu seeds": (lambda: genfast.reparameterize(X, X, seed=TWO), ValueError, ["seed", "(3)", "(2,)"]),
    "grad seeds": (lambda: genfast.reparameterize(X.clone().requires_grad_(), X, seed=TWO[:1].int()), TypeError, ["seed", "int64", "int32"]),
    "mu seeds device": (lambda: genfast.reparameterize(X, X, seed=TWO[:1].to("meta")), ValueError, ["seed", "cpu", "meta"]),
    "mu offset": (lambda: genfast.tanh_normal(X, X, seed=1, offset=-3), ValueError, ["offset", ">= 0", "-3"]),
    "mu stream": (lambda: genfast.log_normal(X, X, seed=1, stream=1.5), TypeError, ["stream", "int", "1.5"]),
    "mu generator": (lambda: genfast.reparameterize(X, X, generator=3), TypeError, ["generator", "torch.Generator"]),
    "mu both": (lambda: genfast.reparameterize(X, X, seed=1, generator=G), ValueError, ["generator", "seed"]),
    "reduction": (lambda: genfast.reparameterize(X, X, kl_reduction="avg"), ValueError, ["kl_reduction", "'batchmean'", "'avg'"]),
    "kl None": (lambda: genfast.gaussian_kl(None, X), TypeError, ["mu", "torch.Tensor", "None"]),
    "kl reduction": (lambda: genfast.gaussian_kl(X, X, reduction=None), ValueError, ["reduction", "'sum'", "None"]),
    "kl ints": (lambda: genfast.gaussian_kl(X, INTS), TypeError, ["logvar", "float32", "int64"]),
    "logits ints": (lambda: genfast.gumbel_softmax(INTS), TypeError, ["logits", "float32", "int64"]),
    "logits type": (lambda: genfast.gumbel_softmax([1.0]), TypeError, ["logits", "torch.Tensor", "list"]),
    "logits 0-dim": (lambda: genfast.gumbel_softmax(torch.tensor(1.0)), ValueError, ["logits", "dimension", "0-dim"]),
    "tau zero": (lambda: genfast.gumbel_softmax(X, 0.0), ValueError, ["tau", "> 0", "0.0"]),
    "tau negative": (lambda: genfast.gumbel_softmax(X, -1), ValueError, ["tau", "> 0", "-1"]),
    "tau NaN": (lambda: genfast.gumbel_softmax(X, float("nan")), ValueError, ["tau", "finite", "nan"]),
    "tau inf": (lambda: genfast.relaxed_bernoulli(X, float("inf")), ValueError, ["tau", "finite", "inf"]),
    "tau text": (lambda: genfast.relaxed_bernoulli(X, "1"), TypeError, ["tau", "number", "'1'"]),
    "tau shape": (lambda: genfast.gumbel_softmax(X, torch.ones(2)), ValueError, ["tau", "one element", "(2,)"]),
    "tau device": (lambda: genfast.gumbel_softmax(X, torch.ones((), device="meta")), ValueError, ["tau on meta", "logits on cpu"]),
    "dim": (lambda: genfast.gumbel_softmax(X, 1.0, dim=2), ValueError, ["dim", "<= 1", "2"]),
    "dim type": (lambda: genfast.gumbel_softmax(X, 1.0, dim="a"), TypeError, ["dim", "int", "'a'"]),
    "row seeds": (lambda: genfast.gumbel_softmax(X[0], seed=torch.arange(4)), ValueError, ["seed", "(4,)"]),
    "coin seeds": (lambda: genfast.relaxed_bernoulli(X, seed=TWO), ValueError, ["seed", "(2,)"]),
    "categorical type": (lambda: genfast.sample_categorical(None), TypeError, ["logits", "torch.Tensor", "None"]),
    "categorical ints": (lambda: genfast.sample_categorical(INTS), TypeError, ["logits", "float32", "int64"]),
    "categorical empty": (lambda: genfast.sample_categorical(X[:, :0]), ValueError, ["logits", "V > 0", "(3, 0)"]),
    "categorical 0-dim": (lambda: genfast.sample_categorical(X[0, 0]), ValueError, ["logits", "V > 0", "()"]),
    "categorical seeds": (lambda: genfast.sample_categorical(X, seed=TWO), ValueError, ["seed", "(2,)"]),
    "categorical both": (lambda: genfast.sample_categorical(X, seed=1, generator=G), ValueError, ["generator", "seed"]),
    "temperature": (lambda: genfast.sample_tokens(X, -0.1), ValueError, ["temperature", ">= 0", "-0.1"]),
    "temperature NaN": (lambda: genfast.sample_tokens(X, float("nan")), ValueError, ["temperature", "finite", "nan"]),
    "temperature NaN tensor": (lambda: genfast.sample_tokens(X, torch.tensor([0.5, float("nan"), 1])), ValueError, ["temperature", "nan"]),
    "temperature text": (lambda: genfast.sample_tokens(X, "hot"), TypeError, ["temperature", "number", "'hot'"]),
    "temperature rows": (lambda: genfast.sample_tokens(X, torch.ones(2)), ValueError, ["temperature", "(3)", "(2,)"]),
    "top_k": (lambda: genfast.sample_tokens(X, top_k=-1), ValueError, ["top_k", ">= 0", "-1"]),
    "top_k float": (lambda: genfast.sample_tokens(X, top_k=2.5), TypeError, ["top_k", "int", "2.5"]),
    "top_k floats": (lambda: genfast.sample_tokens(X, top_k=torch.ones(3)), TypeError, ["top_k", "int64", "float32"]),
    "top_p NaN": (lambda: genfast.sample_tokens(X, top_p=float("nan")), ValueError, ["top_p", "finite", "nan"]),
    "top_p ints": (lambda: genfast.sample_tokens(X, top_p=TWO[:1]), TypeError, ["top_p", "float32", "int64"]),
    "top_p device": (lambda: genfast.sample_tokens(X, top_p=torch.ones(1, device="meta")), ValueError, ["logits on cpu", "top_p on meta"]),
    "min_p": (lambda: genfast.sample_tokens(X, min_p=1.5), ValueError, ["min_p", "<= 1", "1.5"]),
    "backend": (lambda: genfast.set_backend("metal"), ValueError, ["backend", "auto", "'metal'"]),
}  # fmt: skip


@pytest.mark.parametrize("call, error, words", BAD.values(), ids=list(BAD))
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) in (TypeError, ValueError)
    for word in words:
        assert word in str(caught.value), str(caught.value)


_NO_MEMORY = """
import resource
import torch
import genfast
torch.set_num_threads(2)
x = torch.zeros(2, 30_000_000)
genfast.sample_categorical(x[:, :1000].contiguous(), seed=1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 60_000_000, resource.RLIM_INFINITY))
try:
    genfast.sample_categorical(x, seed=1)
except MemoryError:
    print("MemoryError")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(torch.ones(1 << 20).sum().item(), genfast.sample_categorical(torch.eye(64) * 99, seed=1).sum())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_a_thread_without_memory_raises_and_leaves_the_process_whole():
    """Left to itself the exception ended the process, or the team of threads went on with a stack
    that was gone."""
    for _ in range(3):
        found = subprocess.run([sys.executable, "-c", _NO_MEMORY], capture_output=True, text=True)
        assert found.returncode == 0, found.stderr[-2000:]
        assert found.stdout.split() == ["MemoryError", "1048576.0", "tensor(2016)"]
