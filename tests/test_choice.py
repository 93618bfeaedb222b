"""The table of the automatic choice: rows in force, calibration, and what a chosen row changes."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.checkpoint import checkpoint

import genfast
from genfast import cli
from genfast.benchmarks import calibrate
from genfast.ops import _backend, _choice
from genfast.ops._choice import ALL_SIZES, ANY, Row
from genfast.ops.attention import by_torch as by_torch_module
from genfast.ops.attention import core

SIZES = [10, 100, 1000, 10000]


OURS, THEIRS = (ALL_SIZES, "cpu"), (ALL_SIZES, "torch")


@pytest.mark.parametrize(
    "ratios, parts",
    [
        ([1.2, 1.1, 2.0, 1.5], [OURS]),
        ([0.99, 1.0, 2.0, 1.5], [OURS]),  # within the noise
        ([0.5, 1.1, 2.0, 1.5], [(11, "torch"), OURS]),
        ([0.5, 0.8, 2.0, 1.5], [(101, "torch"), OURS]),
        ([1.5, 0.8, 2.0, 1.5], [OURS]),  # one odd rung is no rule
        ([1.2, 1.8, 1.5, 0.4], [OURS]),
        ([0.5, 1.8, 1.5, 0.4], [OURS]),
        ([0.9, 0.8, 0.5, 0.4], [THEIRS]),
        ([1.2, 0.8, 0.5, 0.4], [(11, "cpu"), THEIRS]),
        ([1.2, 1.1, 0.98, 0.9], [(101, "cpu"), THEIRS]),
        ([0.98, 0.97, 0.98, 0.9], [(11, "cpu"), THEIRS]),
    ],
)
def test_parts_of_a_ladder(ratios, parts):
    assert calibrate.parts_of(SIZES, ratios) == parts


def test_the_first_fitting_row_decides():
    isa = _choice.arch("cpu")
    rows = (
        Row("attention", "cuda", ANY, ANY, ANY, 7, "torch", ""),
        Row("attention", "cpu", "other", ANY, ANY, 8, "torch", ""),
        Row("attention", "cpu", isa, "float32", "decode", 9, "torch", ""),
        Row(ANY, "cpu", ANY, ANY, ANY, ALL_SIZES, "cpu", ""),
    )
    assert _choice.torch_sizes(rows, "cpu", "float32", "decode", isa) == range(1, 9)
    assert not _choice.torch_sizes(rows, "cpu", "float32", "forward", isa)
    assert not _choice.torch_sizes(rows, "cpu", "float16", "decode", isa)
    assert _choice.torch_sizes(rows, "cuda", "float16", "decode") == range(1, 7)
    rows = (
        Row("attention", "cpu", isa, "float32", "wide training", 5, "cpu", ""),
        Row("attention", "cpu", isa, "float32", "wide training", ALL_SIZES, "torch", ""),
        Row("attention", "cpu", isa, ANY, "training", 9, "torch", ""),
    )
    sizes = _choice.torch_sizes(rows, "cpu", "float32", "wide training", isa)
    assert sizes == range(5, ALL_SIZES)
    assert _choice.torch_sizes(rows, "cpu", "float32", "training", isa) == range(1, 9)
    assert _choice.torch_sizes(rows, "cpu", "float16", "wide training", isa) == range(1, 9)


def test_rows_that_say_nothing_are_passed_over():
    def row(below, backend):
        return Row("attention", "cpu", ANY, ANY, "decode", below, backend, "")

    def sizes(*rows):
        return _choice.torch_sizes(rows, "cpu", "float32", "decode")

    behind = row(1000, "cpu"), row(100, "torch"), row(ALL_SIZES, "torch")
    assert sizes(*behind) == range(1000, ALL_SIZES)
    unable = row(ALL_SIZES, "triton"), row(ALL_SIZES, "torch")
    assert sizes(*unable) == range(1, ALL_SIZES)


def test_what_goes_to_pytorch_on_a_gpu():
    found = {
        (d, call): _choice.torch_sizes(_choice.ROWS, "cuda", d, call, "sm_90")
        for d in ("float32", "bfloat16")
        for call in _choice.ATTENTION_CALLS
    }
    assert found == {
        ("float32", "decode"): range(0),  # ours is 1.7 to 10x at any size
        ("float32", "forward"): range(2**22, ALL_SIZES),
        ("float32", "training"): range(1, ALL_SIZES),
        ("float32", "wide training"): range(1, ALL_SIZES),
        ("bfloat16", "decode"): range(2**24 + 1, ALL_SIZES),
        ("bfloat16", "forward"): range(2**30 + 1, ALL_SIZES),
        ("bfloat16", "training"): range(1, ALL_SIZES),
        ("bfloat16", "wide training"): range(1, ALL_SIZES),
    }


def test_what_goes_to_pytorch_on_a_cpu():
    """Long gradients of wide fp32 heads, on a Xeon with a matrix unit only."""
    for isa in ("base", "v3", "v4", "bf16", "amx"):
        found = {
            (d, call): sizes
            for d in ("float32", "bfloat16", "float16")
            for call in _choice.ATTENTION_CALLS
            if (sizes := _choice.torch_sizes(_choice.ROWS, "cpu", d, call, isa))
        }
        wide = {("float32", "wide training"): range(2**30, ALL_SIZES)}
        assert found == (wide if isa == "amx" else {})


def test_what_goes_to_triton_before_cuda():
    rows = _choice.ROWS
    assert _choice.triton_from(rows, "rng", "random", "float32") == ALL_SIZES
    assert _choice.triton_from(rows, "diffusion", "dynamic_threshold", "bfloat16") == ALL_SIZES
    assert _choice.triton_from(rows, "attention", "attention_forward", "float32") == 2**18
    assert _choice.triton_from(rows, "attention", "attention_forward", "float16") == ALL_SIZES
    assert _choice.triton_from(rows, "attention", "attention_backward", "bfloat16") == 2**33
    warpgroups = ("attention", "attention_backward", "bfloat16", "sm_90")
    assert _choice.triton_from(rows, *warpgroups) == ALL_SIZES
    for arch in (ANY, "sm_90"):
        wide = ("attention", "wide attention_backward")
        assert _choice.triton_from(rows, *wide, "float16", arch) == 2**27
        assert _choice.triton_from(rows, *wide, "float32", arch) == 0


def test_rows_by_hand_are_walked_by_size():
    def row(below, backend):
        return Row("attention", "cuda", ANY, "bfloat16", "attention_forward", below, backend, "")

    ask = "attention", "attention_forward", "bfloat16"
    for first in (row(1000, "cuda"), row(1000, "triton")):  # the next fitting one is CUDA's
        assert _choice.triton_from((first, *_choice.ROWS), *ask) == ALL_SIZES
    assert _choice.triton_from((row(9, "cuda"), row(ALL_SIZES, "triton")), *ask) == 9


def test_attention_on_a_gpu_before_sm_80_is_composed(monkeypatch):
    monkeypatch.setattr(_backend, "composes", lambda *_: False)
    monkeypatch.setattr(_backend, "_HAVE_TRITON", True)
    for old in (False, True):
        monkeypatch.setattr(_backend, "_too_old", lambda device, old=old: old)
        for name in ("attention_forward", "attention_cached"):
            assert _backend.has_kernels(torch.device("cuda", 0), name) is not old
        assert _backend.has_kernels(torch.device("cuda", 0), "random")


def test_the_feature_and_the_size_of_a_backward_call():
    def call(D, Dv):
        q, k, v = (torch.empty(2, 4, 8, n, device="meta") for n in (D, D, Dv))
        return _backend._feature_and_size("attention_backward", (*[None] * 7, q, k, v))

    assert call(128, 64) == ("attention_backward", 2 * 4 * 8 * 8 * 128)
    assert call(64, 160) == ("wide attention_backward", 2 * 4 * 8 * 8 * 64)
    assert call(512, 512) == ("wide attention_backward", -1)


class Tensors:
    """A native and a Triton kernel that write down who was asked; CUDA refuses until enabled."""

    def __init__(self, monkeypatch, covered):
        self.asked, self.enabled = [], False
        gpu = lambda on, covered: setattr(self, "enabled", on)  # noqa: E731
        patch = monkeypatch.setattr
        patch(_backend, "_native", lambda name: lambda *a: self.ask("cuda") and self.enabled)
        patch(_backend, "_triton", lambda name, forced: lambda *a: self.ask("triton"))
        patch(_backend, "_follow", lambda: None)  # `kernels` is everybody's
        patch(_backend, "_HAVE_TRITON", True)
        patch(_backend, "covers", lambda archs, capability: covered)
        patch(_backend._C, "enable_cuda", gpu)
        patch(torch.version, "cuda", "13.0")
        patch(torch.cuda, "device_count", lambda: 1)
        patch(torch.cuda, "get_device_capability", lambda i: (9, 0))
        monkeypatch.setitem(_backend._cuda_covers, "gpus", None)

    def ask(self, who):
        self.asked.append(who)
        return True

    def of(self, *shape, dtype=torch.float32):
        class OnGpu(torch.Tensor):
            is_cuda = True

        return torch.zeros(shape, dtype=dtype).as_subclass(OnGpu)


def test_composed_noise_settles_cuda_too(monkeypatch):
    """Not drawn by the host where Triton is missing."""
    t = Tensors(monkeypatch, True)
    monkeypatch.setattr(_backend, "_triton", lambda name, forced: lambda *a: t.ask("triton") and 0)
    assert _backend._any("random")(t.of(4))
    assert t.asked == ["cuda", "cuda"]


@pytest.mark.parametrize("covered", [True, False])
def test_cuda_is_settled_at_the_first_tensor_and_falls_through(monkeypatch, covered):
    t = Tensors(monkeypatch, covered)
    random = _backend._auto("random")
    assert random(t.of(4))
    assert t.asked == (["cuda", "cuda"] if covered else ["cuda", "cuda", "triton"])
    assert t.enabled is covered
    t.asked.clear()
    assert random(t.of(4))
    assert t.asked == (["cuda"] if covered else ["cuda", "triton"])


def test_once_settled_the_cuda_kernels_are_called_without_a_layer(monkeypatch):
    t = Tensors(monkeypatch, True)
    assert _backend._auto("random")(t.of(4))
    assert _backend._auto("random").__name__ == "<lambda>"  # the native function itself


def test_the_table_puts_triton_first(monkeypatch):
    t = Tensors(monkeypatch, True)
    forward, backward = (_backend._auto(f"attention_{n}") for n in ("forward", "backward"))
    half = t.of(1, 1, 4, 8, dtype=torch.float16)
    long = torch.empty(1, dtype=torch.float16).expand(1, 8, 2**14, 64)
    long = long.as_subclass(type(half))
    wide = torch.empty(1, dtype=torch.float16).expand(1, 8, 2**9, 256).as_subclass(type(half))
    for call in (
        lambda: forward(half),
        lambda: forward(t.of(1, 1, 2**15, 8)),
        lambda: backward(half, *[None] * 6, half, half, half),
        lambda: backward(long, *[None] * 6, long, long, long),
        lambda: backward(wide, *[None] * 6, wide, wide, wide),
    ):
        assert call()
    # The first: before settling.
    assert t.asked == ["cuda", "cuda", "triton", "cuda", "triton", "triton"]


def test_an_unwritable_table_is_refused_before_it_is_measured(tmp_path, monkeypatch):
    for place in (tmp_path, tmp_path / "file" / "choices.json"):
        monkeypatch.setenv("GENFAST_CHOICES", str(place))
        (tmp_path / "file").touch()
        monkeypatch.setattr(calibrate, "calibrate", lambda *a: pytest.fail("measured"))
        assert cli.main(["bench", "--calibrate"]) == 2


def test_a_calibrated_table_is_read_back_on_its_own_machine_only(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "choices.json"
    monkeypatch.setenv("GENFAST_CHOICES", str(path))
    assert _choice.table(gpu=False) == _choice.ROWS
    row = Row("attention", "cpu", ANY, "float32", "decode", 123, "torch", "measured")
    assert calibrate.save([row], calibrate.place()) == path
    assert _choice.table(gpu=False) == (row, *_choice.ROWS)
    nothing = range(0)
    sizes = _choice._attention_sizes("cpu")[torch.float32]
    assert sizes[:3] == (range(1, 123), nothing, nothing)
    text = json.loads(path.read_text())
    text[0]["machine"]["torch"] = "1.0"
    path.write_text(json.dumps(text))
    assert _choice.table(gpu=False) == _choice.ROWS


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, as far as asking for its model goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (8, 9))


def test_a_gpu_has_rows_and_a_table_of_its_own(tmp_path, monkeypatch, gpu):
    monkeypatch.setenv("GENFAST_CHOICES", str(tmp_path / "choices.json"))
    assert (_choice.arch("cuda"), _choice.machine("cuda")["gpu"]) == ("sm_89", "NVIDIA L4")
    monkeypatch.setattr(calibrate, "_ratio", lambda shape, *rest: 0.5 if shape[3] > 300 else 2.0)
    known = dict(_choice.ATTENTION_BY_TORCH[True])
    monkeypatch.setattr(calibrate, "whole_families", lambda *a: ())
    rows = list(calibrate.calibrate(device="cuda"))
    assert known == _choice.ATTENTION_BY_TORCH[True]
    assert {(r.device, r.arch) for r in rows} == {("cuda", "sm_89")}
    assert {r.backend for r in rows} == {"triton", "torch"}  # no CUDA code for it is built here
    of_cpu = Row("attention", "cpu", ANY, "float32", "decode", 123, "torch", "measured")
    calibrate.save([of_cpu], calibrate.place())
    calibrate.save(rows, calibrate.place(), "cuda")
    assert _choice.table(gpu=False) == (of_cpu, *_choice.ROWS)
    assert _choice.table(gpu=True) == (of_cpu, *rows, *_choice.ROWS)
    decode, forward, *_ = _choice._Sizes()[True][torch.float16]
    assert decode == range(32 * 128 * 128 + 1, ALL_SIZES)
    assert forward == range(16 * 256 * 256 * 64 + 1, ALL_SIZES)
    calibrate.save([], calibrate.place(), "cuda")  # once more: in place of the first
    assert _choice.table(gpu=True) == (of_cpu, *_choice.ROWS)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    calibrate.save(rows, calibrate.place(), "cuda")  # rows of sm_89
    assert _choice._Sizes()[True][torch.float16][1] == range(2**30 + 1, ALL_SIZES)


def test_norms_and_filters_on_a_gpu_follow_the_table(tmp_path, monkeypatch, gpu):
    """As shipped gradients of plain norms are PyTorch's; by a table of this GPU what it says."""
    monkeypatch.setenv("GENFAST_CHOICES", str(tmp_path / "choices.json"))
    monkeypatch.setitem(_backend._cuda_covers, "gpus", True)
    features = {f: c.family for c in calibrate.CALLS for f in (c.feature, c.training)}
    entries = {f: "normalize" if f.startswith("plain") else f for f in features}
    _backend._composes.cache_clear()
    composed = {f for f, entry in entries.items() if _backend.composes(entry, f)}
    assert composed == {"plain training"}
    slow = {"plain normalize", "upfirdn2d"}
    ratios = lambda call, device: (0.5 if call.feature in slow else 2.0, 2.0)  # noqa: E731
    monkeypatch.setattr(calibrate, "_least_ratios", ratios)
    rows = list(calibrate.whole_families("cpu", "sm_89"))
    assert [(r.family, r.feature) for r in rows] == [(fam, f) for f, fam in features.items()]
    assert {r.backend for r in rows} == {"cpu", "reference"}
    rows = [r._replace(backend=r.backend.replace("cpu", "cuda")) for r in rows]
    calibrate.save(rows, calibrate.place(), "cuda")
    _backend._composes.cache_clear()
    for feature, entry in entries.items():
        assert _backend.composes(entry, feature) == (feature in slow)
        for name in {entry, f"{entry}_backward"} & set(_backend._TRITON):
            on_gpu = _backend.has_kernels(torch.device("cuda", 0), name, feature)
            assert on_gpu == (feature not in slow)
    _backend._composes.cache_clear()


@pytest.mark.parametrize("call", calibrate.CALLS, ids=lambda c: c.feature)
def test_what_a_calibration_times_is_the_same_call(call, monkeypatch):
    """Ours and PyTorch's, forward and backward, on tensors of the smallest shape."""
    shape = call.shapes[0]
    x, p = torch.randn(shape), torch.randn(4, shape[call.dim])
    torch.testing.assert_close(call.ours(x, p), call.torch(x, p), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(calibrate, "BUDGET_S", 1e-3)
    genfast.set_backend("cpu")
    assert min(calibrate._least_ratios(call._replace(shapes=(shape,)), "cpu")) > 0


def test_pytorchs_calls_on_a_gpu_are_refused_by_the_kernels(monkeypatch):
    t = Tensors(monkeypatch, True)
    x, row = t.of(2, 4), t.of(2, 4)
    plain = functools.cache(lambda entry, feature: feature == "plain normalize")
    monkeypatch.setattr(_backend, "_composes", plain)
    norm, gradient = _backend._auto("normalize"), _backend._auto("normalize_backward")
    rest = (None, None, x, None, None)
    assert not norm(x, *rest, None, None, None, None, 0, False, 0, 1e-5) and not t.asked
    for modulation in ((row, None, None, None, 0, False, 0), (None, None, None, None, 0, False, 1)):
        assert norm(x, *rest, *modulation, 1e-5)
    assert gradient(x) and "reference" not in t.asked and len(t.asked) >= 3
    # With statistics a gradient is wanted, for which the table has been asked before.
    assert norm(x, row, *rest[1:], None, None, None, None, 0, False, 0, 1e-5)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_graph_for_a_gpu_can_be_traced_without_one(backend):
    """The choice is no break in it: by itself PyTorch's, by name one op."""
    pytest.importorskip("triton")

    class Model(torch.nn.Module):
        def forward(self, x):
            return genfast.gated_act(genfast.layer_norm(genfast.bias_act(x), act="silu"))

    with FakeTensorMode(shape_env=ShapeEnv()), genfast.backend(backend):
        x = torch.empty(2, 4, 8, 8, device="cuda")
        graph = torch.export.export(Model(), (x,), strict=True).graph
    ours = [str(n.target) for n in graph.nodes if str(n.target).startswith("genfast")]
    names = "bias_act", "normalize", "gated_act"
    assert ours == ([] if backend == "auto" else [f"genfast.{name}.default" for name in names])


def test_a_gpu_is_asked_for_at_its_first_call(monkeypatch):
    program = """
import torch
asked = []
torch.cuda.is_available = lambda: asked.append("gpu")
import genfast
q = torch.randn(1, 2, 4, 8)
genfast.attention(q, q, q)
genfast.attention(*[q.to("meta")] * 3)
assert not asked
from genfast.ops._choice import ATTENTION_BY_TORCH
ATTENTION_BY_TORCH[True]
assert asked
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


_WRONG = (
    Row("attention", "cpu", ANY, "float32", "forward", "many", "torch", ""),
    Row("attention", "cpu", ANY, "float32", "forward", 5, "pytorch", ""),
    Row("attention", "cpu", ANY, "float32", "forward", -1, "torch", ""),
)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "{}", '[{"machine": 1, "rows": 0}]', '[{"rows": [{"x": 1}]}]', "[3]",
        pytest.param("[" * 100_000, id="deep"),
        *(json.dumps([{"machine": _choice.machine(), "rows": [row._asdict()]}]) for row in _WRONG),
    ],
)  # fmt: skip
def test_a_broken_table_is_named_and_ignored(tmp_path, monkeypatch, text):
    path = tmp_path / "choices.json"
    path.write_text(text)
    monkeypatch.setenv("GENFAST_CHOICES", str(path))
    if text == '[{"machine": 1, "rows": 0}]':  # another machine's, whatever it holds
        assert _choice.user_rows() == ()
        return
    with pytest.warns(RuntimeWarning, match="choices.json.*calibrate again"):
        assert _choice.user_rows() == ()


def test_a_folder_in_place_of_the_table_is_no_table(tmp_path, monkeypatch):
    monkeypatch.setenv("GENFAST_CHOICES", str(tmp_path))
    assert _choice.user_rows() == ()


def test_a_linked_table_stays_linked(tmp_path, monkeypatch):
    link, path = tmp_path / "choices.json", tmp_path / "elsewhere.json"
    link.symlink_to(path)
    monkeypatch.setenv("GENFAST_CHOICES", str(link))
    calibrate.save([], calibrate.place())
    assert link.is_symlink() and json.loads(path.read_text())[0]["rows"] == []


def test_an_entry_that_is_no_table_takes_no_other_one_with_it(tmp_path, monkeypatch):
    path = tmp_path / "choices.json"
    monkeypatch.setenv("GENFAST_CHOICES", str(path))
    row = Row("attention", "cpu", ANY, "float32", "decode", 123, "torch", "measured")
    mine = {"machine": _choice.machine(), "rows": [row._asdict()]}
    other = {"machine": {"processor": "another"}, "rows": [row._asdict()]}
    path.write_text(json.dumps([3, None, "machine rows", {"machine": 1}, mine, other]))
    with pytest.warns(RuntimeWarning, match="without machine and rows"):
        assert _choice.user_rows() == (row,)
    calibrate.save([], path)
    assert json.loads(path.read_text()) == [other, mine | {"rows": []}]


def test_machines_that_share_a_table_save_at_once(tmp_path, monkeypatch):
    """Every one's rows are there afterwards."""
    path = tmp_path / "choices.json"
    program = """
import sys
from pathlib import Path
from genfast.benchmarks import calibrate
from genfast.ops import _choice
for i in range(20):
    _choice.machine = lambda device: {"processor": f"{sys.argv[2]} {i}"}
    calibrate.save([], Path(sys.argv[1]))
"""
    runs = [subprocess.Popen([sys.executable, "-c", program, str(path), n]) for n in "abc"]
    assert [run.wait(120) for run in runs] == [0, 0, 0]
    assert len(json.loads(path.read_text())) == 60


def test_a_device_without_kernels_of_ours_is_not_calibrated(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GENFAST_CHOICES", str(tmp_path / "choices.json"))
    monkeypatch.setattr(calibrate, "plain_forward", lambda *a: None)
    assert cli.main(["bench", "--calibrate"]) == 2
    assert "has kernels for, got cpu" in capsys.readouterr().err
    assert not (tmp_path / "choices.json").exists()


def test_no_home_folder_is_no_table(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GENFAST_CHOICES", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(_choice.Path, "home", no_home)
    assert _choice.table(gpu=False) == _choice.ROWS


def test_an_unknown_backend_in_the_environment_is_named():
    environment = os.environ | {"GENFAST_BACKEND": "bogus"}
    found = subprocess.run(
        [sys.executable, "-c", "import genfast"], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 1
    assert "ValueError: GENFAST_BACKEND: backend: expected one of auto" in found.stderr


@pytest.fixture
def by_torch(monkeypatch):
    """Every plain call goes to PyTorch; returns how often it was asked."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setitem(core.ATTENTION_BY_TORCH[False], torch.float32, (range(1, ALL_SIZES),) * 4)
    monkeypatch.setattr(by_torch_module, "torch_sdpa", counted)
    return calls


@pytest.mark.parametrize("Sq, Hkv, causal", [(1, 4, False), (5, 4, False), (9, 2, True)])
def test_a_row_for_pytorch_is_followed(by_torch, Sq, Hkv, causal):
    q, k, v = torch.randn(2, 4, Sq, 8), *torch.randn(2, 2, Hkv, 9, 8)
    out = genfast.attention(q, k, v, causal=causal)
    face = genfast.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert len(by_torch) == 2
    with genfast.backend("reference"):
        expected = genfast.attention(q, k, v, causal=causal)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(face, expected)


@pytest.mark.parametrize(
    "Hkv, causal, wanted", [(4, False, "qkv"), (2, True, "qkv"), (4, True, "k")]
)
def test_a_row_for_pytorch_trains_and_differentiates_twice(by_torch, Hkv, causal, wanted):
    q, k, v = torch.randn(2, 4, 5, 8), *torch.randn(2, 2, Hkv, 5, 8)
    inputs = [
        x.requires_grad_() for name, x in zip("qkv", (q, k, v), strict=True) if name in wanted
    ]

    def gradients():
        out = genfast.attention(q, k, v, causal=causal)
        first = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
        twice = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return *first, *twice, *torch.autograd.grad(sum(g.square().sum() for g in twice), inputs)

    found = gradients()
    assert len(by_torch) == 1
    with genfast.backend("reference"):
        expected = gradients()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_row_for_pytorch_differentiates_twice_under_a_checkpoint(by_torch):
    """Which lets what a node saved be unpacked once."""
    inputs = [x.requires_grad_() for x in torch.randn(3, 2, 4, 5, 8).unbind(0)]

    def gradients():
        out = checkpoint(genfast.attention, *inputs, use_reentrant=False)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    found = gradients()
    assert by_torch
    with genfast.backend("reference"):
        expected = gradients()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_wide_heads_have_a_row_of_their_own(by_torch, monkeypatch):
    nothing = range(0)
    sizes = (nothing, nothing, nothing, range(1, ALL_SIZES))
    monkeypatch.setitem(core.ATTENTION_BY_TORCH[False], torch.float32, sizes)
    for D, asked in ((_choice.WIDE_HEAD, 0), (_choice.WIDE_HEAD + 1, 2)):
        leaves = torch.randn(3, 1, 2, 5, D).unbind(0)
        genfast.attention(*leaves)  # no gradient
        for x in leaves:
            x.requires_grad_()
        genfast.attention(*leaves)
        genfast.scaled_dot_product_attention(*leaves)
        assert len(by_torch) == asked


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_forced_backend_does_the_work_itself(by_torch, name):
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    genfast.attention(q, q, q)
    assert len(by_torch) == 1
    genfast.set_backend(name)
    for x in (q, q.detach()):
        genfast.attention(x, x, x)
        genfast.scaled_dot_product_attention(x, x, x)
    assert len(by_torch) == 1


def test_options_and_empty_calls_stay_ours(by_torch):
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    genfast.attention(q, k, v, softcap=3.0)
    genfast.attention(q, k, v, window=(2, 0))
    genfast.attention(q, k, v, mask=torch.ones(5, 5, dtype=torch.bool))
    genfast.attention(q, k, v, return_lse=True)
    genfast.attention(q, k, v, dropout_p=0.5, seed=1)
    genfast.attention(q[:, :, :3], k, v, causal=True, align="bottom_right")
    genfast.attention(q, k[:, :, :0], v[:, :, :0])
    assert not by_torch
    with pytest.raises(ValueError, match="k: expected"):
        genfast.attention(q, k[..., :4], v)
    with pytest.raises(ValueError, match="query: expected as many heads"):
        genfast.scaled_dot_product_attention(q, k[:, :2], v[:, :2])
    assert not by_torch


def test_a_forced_backend_that_cannot_run_says_why():
    """Triton without a GPU and without its interpreter; also of families without Triton kernels."""
    x = torch.randn(2, 4, 3)
    for call in (
        lambda: genfast.randn(4, seed=1), lambda: genfast.bias_act(x),
        lambda: genfast.group_norm(x, 2), lambda: genfast.layer_norm(x),
        lambda: genfast.bernoulli_nll(x, x),
    ):  # fmt: skip
        with genfast.backend("triton"), pytest.raises(RuntimeError, match="Triton does not run on"):
            call()
        assert torch.isfinite(call()).all()
