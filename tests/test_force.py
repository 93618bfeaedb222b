"""A backend asked for by name: by argument, by block, by process; what it cannot do, threads,
gradients, compiled functions."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

import genfast
from genfast import schedulers
from genfast.ops import _backend, _force
from genfast.ops import linear as linear_module
from genfast.ops._road import DIRECT, GRAD, SLOW, gate
from genfast.ops.convolution import winograd
from genfast.ops.filtering.feed_forward import feed_forward

PLAN = schedulers.ddpm_plan(10)


def draw(*shape, seed=0):
    return genfast.randn(*shape, seed=seed)


X, Y, Q = draw(3, 2, 8), draw(3, 2, 8, seed=1), draw(1, 2, 5, 8)
HALF, TAPS = torch.full((3,), 0.5), genfast.setup_filter([1, 3, 3, 1])
CU, LENGTHS = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
WIDE = torch.ones(9, 4, dtype=torch.float64)
PACKED = Q[0].transpose(0, 1).contiguous()
# Every function that has kernels on more than one backend.
CALLS = {
    "rand": lambda f, **o: f(3, 4, seed=1, **o),
    "randn": lambda f, **o: f(3, 4, seed=1, **o),
    "rand_like": lambda f, **o: f(X, seed=1, **o),
    "randn_like": lambda f, **o: f(X, seed=1, **o),
    "randint": lambda f, **o: f(0, 9, (7,), seed=1, **o),
    "reparameterize": lambda f, **o: f(X, Y, seed=1, **o),
    "gaussian_kl": lambda f, **o: f(X, Y, **o),
    "tanh_normal": lambda f, **o: f(X, Y, seed=1, **o),
    "log_normal": lambda f, **o: f(X, Y, seed=1, **o),
    "gumbel_softmax": lambda f, **o: f(X, 0.5, seed=1, **o),
    "relaxed_bernoulli": lambda f, **o: f(X, 0.5, seed=1, **o),
    "bernoulli_nll": lambda f, **o: f(X, Y, **o),
    "sample_categorical": lambda f, **o: f(X, seed=1, **o),
    "sample_tokens": lambda f, **o: f(X, 0.7, top_k=3, seed=1, **o),
    "diffusion_step": lambda f, **o: f(X, Y, PLAN.table_on("cpu"), 1, seed=1, **o),
    "add_noise": lambda f, **o: f(X, 0.6, 0.8, seed=1, **o),
    "scale_noise": lambda f, **o: f(X, 0.8, seed=1, **o),
    "velocity": lambda f, **o: f(X, 0.6, 0.8, seed=1, **o),
    "scale_model_input": lambda f, **o: f(X, 0.6, **o),
    "guidance_weights": lambda f, **o: f(X, Y, 2.0, method="rescale", rescale=0.7, **o),
    "guide": lambda f, **o: f(X, Y, 2.0, method="apg", eta=0.5, **o),
    "dynamic_threshold": lambda f, **o: f(X, 0.9, 2.0, **o),
    "denoising_loss": lambda f, **o: f(X, Y, HALF, HALF, seed=1, **o),
    "step_log_prob": lambda f, **o: f(X, Y, PLAN.table_on("cpu"), 1, seed=1, **o)[1],
    "bias_act": lambda f, **o: f(X, X[0, :, 0], act="lrelu", strength=0.5, seed=1, **o),
    "gated_act": lambda f, **o: f(X, "swish", **o),
    "upfirdn2d": lambda f, **o: f(Q, TAPS, up=2, padding=1, **o),
    "filter2d": lambda f, **o: f(Q, TAPS, **o),
    "upsample2d": lambda f, **o: f(Q, TAPS, **o),
    "downsample2d": lambda f, **o: f(Q, TAPS, **o),
    "group_norm": lambda f, **o: f(X, 2, act="silu", **o),
    "layer_norm": lambda f, **o: f(X, X[0, 0], add=Y, **o)[1],
    "rms_norm": lambda f, **o: f(X, X[0, 0], **o),
    "attention": lambda f, **o: f(Q, Q, Q, causal=True, **o),
    "attention_varlen": lambda f, **o: f(PACKED, PACKED, PACKED, CU, CU, **o),
    "attention_with_kvcache": lambda f, **o: f(Q, Q.clone(), Q.clone(), cache_seqlens=LENGTHS, **o),
}


@pytest.fixture
def asked(monkeypatch):
    """Backend -> entry points of its table that were called."""
    found = {}
    for name in ("auto", "cpu", "reference"):
        calls = found[name] = []
        for entry, function in _backend._functions(name).items():
            spy = lambda *a, e=entry, f=function, c=calls: (c.append(e), f(*a))[1]  # noqa: E731
            monkeypatch.setitem(_backend._functions(name), entry, spy)
    genfast.set_backend("auto")
    yield found
    monkeypatch.undo()
    genfast.set_backend("auto")


def test_every_function_with_a_choice_takes_the_argument():
    functions = {n: f for n in genfast.__all__ if inspect.isfunction(f := getattr(genfast, n))}
    taking = {n for n, f in functions.items() if "backend" in inspect.signature(f).parameters}
    assert taking == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_is_a_block_around_the_call(name, asked):
    call, function = CALLS[name], getattr(genfast, name)
    for backend in ("cpu", "reference"):
        found = call(function, backend=backend)
        assert _force.get_backend() == "auto" and not asked["auto"]
        with genfast.backend(backend):
            expected = call(function)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert backend == "reference" or asked[backend]
    assert set(asked["reference"]) <= {"random"}  # its noise
    asked["auto"].clear()
    torch.testing.assert_close(call(function), expected, rtol=1e-5, atol=1e-5)
    assert asked["auto"]


def doubles(f):
    return f(Q.double(), Q.double(), Q.double(), backend="cpu")


def mapped(f):
    return torch.func.vmap(lambda x: f(x, x, x, backend="cpu"))(Q[None])


TABLE = PLAN.table_on("cpu")
SPACED = torch.empty(1, 2, 5, 16)[..., ::2].copy_(Q)  # no kernel reads such rows
# What a conversion makes fit.
CONVERTED = {
    "a wide table": lambda **o: genfast.dynamic_threshold(X, m=Y, table=TABLE.double(), row=1, **o),
    "a strided table": lambda **o: genfast.dynamic_threshold(
        X, m=Y, table=TABLE.t().contiguous().t(), row=1, **o),
    "slopes": lambda **o: genfast.attention_with_kvcache(
        Q, Q.clone(), Q.clone(), alibi_slopes=torch.ones(2).double(), **o),
    "half slopes": lambda **o: genfast.attention_with_kvcache(
        Q, Q.clone(), Q.clone(), alibi_slopes=torch.ones(2).half(), **o),
    "a spaced cache": lambda **o: genfast.attention_with_kvcache(Q, SPACED, SPACED, **o),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_what_a_conversion_makes_fit_is_converted(name):
    torch.testing.assert_close(CONVERTED[name](backend="cpu"), CONVERTED[name]())
    torch.testing.assert_close(CONVERTED[name](backend="cpu"), CONVERTED[name](backend="reference"))


def test_a_spaced_cache_is_appended_to_in_place():
    caches = {}
    for backend in ("cpu", "reference"):
        k, v = (torch.zeros(1, 2, 9, 16)[..., ::2] for _ in range(2))
        genfast.attention_with_kvcache(Q, k, v, Q, Q, cache_seqlens=2, backend=backend)
        caches[backend] = k, v
    torch.testing.assert_close(caches["cpu"], caches["reference"], rtol=0, atol=0)
    assert torch.equal(caches["cpu"][0][:, :, 2:7], Q)


def test_the_device_of_a_call_is_the_one_it_names():
    seeds = torch.arange(3)
    for device in ("cpu", "meta", "cuda"):
        assert _backend._device({"seed": seeds, "device": device}).type == device
    assert _backend._device({"x": X.to("meta"), "device": None}).type == "meta"
    assert _backend._device({"seed": seeds.to("meta"), "device": None}).type == "cpu"


def test_noise_is_drawn_whatever_computes_with_it():
    for name in ("torch", "reference"):
        assert torch.equal(genfast.randn(5, seed=1, backend=name), genfast.randn(5, seed=1))
    genfast.set_backend("torch")
    assert genfast.randn(5, device="meta").shape == (5,)
    _force.may_compose("random", X)


def learned(value):
    return torch.tensor(value, requires_grad=True)


# function, a call that the backend cannot do, what the error says
REFUSED = [
    ("attention", doubles, "float64 has no kernels"),
    ("attention", mapped, "function transforms"),
    ("attention", lambda f: f(Q, Q, Q, causal=True, mask=torch.ones(5, 5) > 0, backend="torch"),
     "without options of ours"),
    ("attention", lambda f: f(Q, Q, Q, softcap=2.0, backend="torch"), "without options of ours"),
    ("attention", lambda f: f(Q, Q, Q, return_lse=True, backend="torch"), "options of ours"),
    ("attention", lambda f: f(*[draw(1, 1, 2, 600)] * 3, backend="cpu"), "wider than 512"),
    ("attention", lambda f: f(Q, Q, Q, alibi_slopes=torch.ones(2, requires_grad=True),
                              backend="cpu"), "a gradient by alibi_slopes"),
    ("diffusion_step", lambda f: f(X, (X, Y), PLAN.table_on("cpu"), 0, seed=1, backend="cpu",
                                   weights=torch.ones(2, requires_grad=True)),
     "a gradient by weights"),
    ("gumbel_softmax", lambda f: f(X, learned(0.5), seed=1, backend="cpu"), "a gradient by tau"),
    ("add_noise", lambda f: f(X, HALF, learned(0.5), seed=1, backend="cpu"),
     "a gradient by alpha or sigma"),
    ("velocity", lambda f: f(X, learned(0.5), HALF, seed=1, backend="cpu"),
     "a gradient by sigma or alpha"),
    ("denoising_loss", lambda f: f(X, Y, HALF, learned(0.5), seed=1, backend="cpu"),
     "a gradient but by model_output"),
    ("denoising_loss", lambda f: f(X, Y.clone().requires_grad_(), HALF, HALF, seed=1,
                                   backend="cpu"), "a gradient but by model_output"),
    ("step_log_prob", lambda f: f(X.clone().requires_grad_(), Y, PLAN.table_on("cpu"), 1, seed=1,
                                  backend="cpu"), "a gradient has no kernels"),
    ("diffusion_step", lambda f: f(X, draw(3, 4, 8).requires_grad_(), PLAN.table_on("cpu"), 1,
                                   seed=1, variance="learned", backend="cpu"),
     "a gradient with a learned variance"),
    ("gumbel_softmax", lambda f: f(X.double(), backend="cpu"), "float64 has no kernels"),
    ("diffusion_step", lambda f: f(X, X, PLAN.table_on("cpu"), 0, seed=1, backend="cpu",
                                   mask=X > 0, known=X.double()), "float64"),
    ("diffusion_step", lambda f: f(X, X, PLAN.table_on("cpu"), 0, seed=1, backend="cpu",
                                   history=(X.double(),)), "float64"),
    ("step_log_prob", lambda f: f(X, X, PLAN.table_on("cpu"), 1, sample=X.double(),
                                  backend="cpu"), "float64"),
    ("attention_with_kvcache", lambda f: f(Q, Q.clone(), Q.clone(), rotary_cos=WIDE,
                                           rotary_sin=WIDE, backend="cpu"), "float64"),
    ("dynamic_threshold", lambda f: f(X.clone().requires_grad_(), backend="cpu"), "a gradient"),
    ("gumbel_softmax", lambda f: f(X, backend="torch"), "PyTorch has attention alone"),
    ("sample_tokens", lambda f: f(X.double(), backend="cpu"), "float64"),
    ("reparameterize", lambda f: f(X.double(), X, backend="cpu"), "float64"),
    ("diffusion_step", lambda f: f(X.double(), X.double(), PLAN.table_on("cpu"), 0, seed=1,
                                   backend="cpu"), "float64"),
    ("add_noise", lambda f: f(X.double(), 0.6, 0.8, backend="cpu"), "float64"),
    ("guide", lambda f: f(X.clone().requires_grad_(), X, 2.0, backend="cpu"), "gradient"),
    ("guidance_weights", lambda f: f(X.double(), X.double(), 2.0, backend="cpu"), "float64"),
    ("dynamic_threshold", lambda f: f(X.double(), backend="cpu"), "float64"),
    ("denoising_loss", lambda f: f(X.double(), X.double(), 0.6, 0.8, seed=1, backend="cpu"),
     "float64"),
    ("step_log_prob", lambda f: f(X.double(), X.double(), PLAN.table_on("cpu"), 1, seed=1,
                                  backend="cpu"), "float64"),
    ("attention_with_kvcache", lambda f: f(Q.double(), Q.double(), Q.double(), backend="cpu"),
     "float64"),
    ("randn", lambda f: f(3, device="meta", backend="cpu"), "tensors are on meta"),
]  # fmt: skip


@pytest.mark.parametrize("name, call, why", REFUSED, ids=[f"{n}-{w}" for n, _, w in REFUSED])
def test_what_it_cannot_do_is_refused_with_the_reason(name, call, why):
    function = getattr(genfast, name)
    with pytest.raises(RuntimeError, match=why) as error:
        call(function)
    assert str(error.value).startswith('backend: "') and "auto" in str(error.value)
    assert _force.get_backend() == "auto"
    call(lambda *a, backend, **o: function(*a, **o))  # the automatic choice falls through


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_a_gradient_without_a_kernel_is_refused_like_the_forward():
    """Eager and compiled alike."""
    genfast.set_backend("cpu")
    x = X.clone().requires_grad_()
    y = genfast.gumbel_softmax(x, 0.5, seed=1)
    with pytest.raises(RuntimeError, match="gumbel_softmax: this gradient has no kernels"):
        torch.autograd.grad(y, x, torch.stack([y, y]), is_grads_batched=True)

    class Doubles(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return genfast.gumbel_softmax(g.double(), 0.5, seed=1).float()

    with pytest.raises(RuntimeError, match="float64 has no kernels"):
        Doubles.apply(x).sum().backward()
    calls = [
        ("a gradient by tau", lambda x, c: genfast.gumbel_softmax(x, c, seed=1)),
        ("by alpha or sigma", lambda x, c: genfast.add_noise(x, HALF, c, seed=1)),
        ("but by model_output", lambda x, c: genfast.denoising_loss(x, Y, c, c, seed=1)),
    ]
    for why, call in calls:
        for full in (None, False, True):
            torch._dynamo.reset()
            run = call if full is None else torch.compile(call, backend="eager", fullgraph=full)
            with pytest.raises((RuntimeError, torch._dynamo.exc.Unsupported), match=why):
                run(x, learned(0.5)).sum().backward()


def test_calls_without_elements_and_second_gradients_are_composed():
    genfast.set_backend("cpu")
    assert genfast.attention(Q[:, :0], Q[:, :0], Q[:, :0]).numel() == 0
    x = X.clone().requires_grad_()
    y = genfast.gumbel_softmax(x, 0.5, seed=1)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x)
    assert torch.isfinite(h).all()


def test_families_with_cpu_kernels_alone_are_no_part_of_it():
    for name in ("cpu", "torch", "reference"):
        genfast.set_backend(name)
        assert torch.isfinite(genfast.linear(draw(2, 4, 6).double(), draw(3, 6).double())).all()


def test_around_its_attention_pytorch_does_norms_and_filters():
    for name in ("torch", "reference"):
        genfast.set_backend(name)
        calls = (genfast.group_norm(X.double(), 2), genfast.bias_act(X), genfast.gated_act(X))
        assert all(torch.isfinite(y).all() for y in calls)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: genfast.group_norm(X.double(), 2), "float64"),
        (lambda: torch.func.vmap(lambda x: genfast.layer_norm(x))(X), "transforms"),
        (lambda: genfast.gated_act(X.double()), "float64"),
        (lambda: genfast.upfirdn2d(Q, TAPS.clone().requires_grad_()), "gradient by f"),
    ],
    ids=["double", "vmap", "gate", "filter"],
)
def test_norms_and_filters_say_what_they_cannot_do(call, why):
    assert torch.isfinite(call()).all()
    genfast.set_backend("cpu")
    with pytest.raises(RuntimeError, match=f"{why}.* no kernels"):
        call()


def test_pytorchs_attention_on_request():
    q = Q.clone().requires_grad_()
    out = genfast.attention(q, q, q, causal=True, backend="torch")
    assert "ScaledDotProduct" in type(out.grad_fn).__name__
    torch.testing.assert_close(out, genfast.attention(q, q, q, causal=True))
    genfast.set_backend("torch")
    face = genfast.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert torch.equal(face, out)


MASKS = {
    "bool": torch.ones(5, 5, dtype=torch.bool).tril(),
    "float": draw(2, 5, 5),
    "learned": draw(1, 2, 5, 5).requires_grad_(),
}


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("Dv", [8, 12])
def test_pytorchs_attention_takes_masks_and_other_values_and_differentiates_twice(mask, Dv):
    mask = MASKS.get(mask)
    leaves = [draw(1, 2, 5, n, seed=n).requires_grad_() for n in (8, 9, Dv)]
    leaves[1] = leaves[1][..., :8].detach().requires_grad_()
    leaves += [mask] if mask is not None and mask.requires_grad else []

    def gradients(name):
        out = genfast.attention(*leaves[:3], mask=mask, backend=name)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return out, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    torch.testing.assert_close(gradients("torch"), gradients("auto"), rtol=1e-4, atol=1e-4)


def test_pytorchs_attention_in_graphs_and_under_transforms():
    call = lambda q, mask: genfast.attention(q, q, q, mask=mask)  # noqa: E731

    class Model(torch.nn.Module):
        def forward(self, q, mask):
            return call(q, mask)

    genfast.set_backend("torch")
    for mask in (None, MASKS["bool"]):
        q = Q.clone().requires_grad_()
        torch._dynamo.reset()
        found = torch.compile(call, backend="aot_eager", fullgraph=True)(q, mask)
        torch.testing.assert_close(found, call(q, mask))
        (g,) = torch.autograd.grad(found.square().sum(), q)
        torch.testing.assert_close(g, *torch.autograd.grad(call(q, mask).square().sum(), q))
        for strict in (True, False):
            graph = torch.export.export(Model(), (Q, mask), strict=strict)
            assert "scaled_dot_product_attention" in graph.graph_module.code
            torch.testing.assert_close(graph.module()(Q, mask), call(Q, mask))
    with pytest.raises(RuntimeError, match="PyTorch's attention has no forward-mode gradients"):
        torch.func.jvp(lambda q: call(q, None), (Q,), (Q,))


def test_a_gradient_runs_where_its_block_said(asked):
    """Also behind the block, in another thread, where the process has another backend."""
    x = X.clone().requires_grad_()
    with genfast.backend("cpu"):
        z = genfast.reparameterize(x, x, seed=1)
    y = genfast.gumbel_softmax(x, 0.5, seed=1, backend="cpu")
    genfast.set_backend("reference")
    (z.sum() + y.square().sum()).backward()
    assert {"reparameterize_backward", "gumbel_softmax_backward"} <= set(asked["cpu"])
    assert _force.get_backend() == "reference" and gate(X) == SLOW
    genfast.set_backend("auto")
    expected = x.grad
    x.grad = None
    out = genfast.reparameterize(x, x, seed=1).sum()
    (out + genfast.gumbel_softmax(x, 0.5, seed=1).square().sum()).backward()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)


def test_a_gradient_of_a_block_for_auto_runs_so_in_a_process_with_another_name(asked):
    x, q = X.clone().requires_grad_(), Q.clone().requires_grad_()
    for name in ("reference", "triton") if _force.HAVE_TRITON else ("reference",):
        genfast.set_backend(name)
        with genfast.backend("auto"):
            assert gate(X) == DIRECT and gate(x) == SLOW
            out = genfast.reparameterize(x, x, seed=1).sum() + genfast.attention(q, q, q).sum()
        y = genfast.gumbel_softmax(x, 0.5, seed=1, backend="auto").square().sum()
        asked["auto"].clear()
        (out + y).backward()
        assert {"reparameterize_backward", "gumbel_softmax_backward", "attention_backward"} == set(
            asked["auto"]
        )
    genfast.set_backend("auto")
    with genfast.backend("auto"):
        assert gate(x) == GRAD
    with genfast.backend("reference"):  # and in a block with another name
        out = genfast.reparameterize(x, x, seed=1, backend="auto").sum()
        asked["auto"].clear()
        out.backward()
        assert asked["auto"] == ["reparameterize_backward"]


def test_one_object_serves_two_threads_at_once():
    shared, seen = genfast.backend("reference"), {}
    inside, second, left = (threading.Event() for _ in range(3))

    def first():
        with shared:
            inside.set()
            second.wait(10)
        seen["behind"] = _force.get_backend()
        left.set()

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with shared:
        second.set()
        left.wait(10)
        seen["within"] = _force.get_backend()
    thread.join()
    assert seen == {"behind": "auto", "within": "reference"}
    assert _force.get_backend() == "auto" and not _force.blocks.open


def test_blocks_belong_to_their_thread():
    """They may end in any order; the last one gives the fast road back."""
    steps = [threading.Event() for _ in range(3)]
    seen = {}

    def other():
        seen["before"] = (_force.get_backend(), gate(X))
        with genfast.backend("cpu"):
            steps[0].set()
            steps[1].wait(10)
            seen["inside"] = (_force.get_backend(), gate(X))
        seen["behind"] = (_force.get_backend(), gate(X))
        steps[2].set()

    thread = threading.Thread(target=other)
    with genfast.backend("reference"):
        thread.start()
        assert steps[0].wait(10)
        assert (_force.get_backend(), gate(X)) == ("reference", SLOW)
        with genfast.backend("auto"):
            assert (_force.get_backend(), gate(X)) == ("auto", DIRECT)
        assert _force.get_backend() == "reference"
    assert (_force.get_backend(), gate(X)) == ("auto", DIRECT)
    steps[1].set()
    assert steps[2].wait(10)
    thread.join()
    assert seen == {"before": ("auto", DIRECT), "inside": ("cpu", SLOW), "behind": ("auto", DIRECT)}
    assert not _force.blocks.open
    assert vars(_backend.kernels) == _backend._functions("auto")


def test_many_threads_many_blocks():
    errors = []

    def work(name):
        for _ in range(200):
            with genfast.backend(name):
                if _force.get_backend() != name:
                    errors.append(name)
                genfast.gumbel_softmax(X, 0.5, seed=1)

    names = ["cpu", "reference", "auto", "cpu"]
    threads = [threading.Thread(target=work, args=(n,)) for n in names]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and not _force.blocks.open
    assert vars(_backend.kernels) == _backend._functions("auto")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_the_blocks_of_its_thread_alone():
    program = """
import os, sys, threading
import genfast
from genfast.ops import _backend, _force
held, end = threading.Event(), threading.Event()
def hold():
    with genfast.backend("reference"):
        held.set(); end.wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if not child:
    fine = not _force.blocks.open and vars(_backend.kernels) == _backend._functions("auto")
    with genfast.backend("cpu"):
        genfast.randn(3, seed=1)
    os._exit(0 if fine else 1)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
end.set()
sys.exit(code)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_an_error_ends_a_block():
    with pytest.raises(ValueError, match="logits: expected at least one dimension"):
        genfast.gumbel_softmax(torch.tensor(1.0), backend="cpu")
    assert _force.get_backend() == "auto" and not _force.blocks.open
    with pytest.raises(TypeError, match="temperature"):
        genfast.sample_tokens(X, "hot", backend="cpu")
    assert not _force.blocks.open


def test_compiled_functions_follow_the_block_they_are_called_in():
    kernels = []

    def keep(module, inputs):
        kernels.append("genfast.gumbel_softmax" in module.code)
        return module

    torch._dynamo.reset()
    run = torch.compile(lambda x: genfast.gumbel_softmax(x, 0.5, seed=1), backend=keep)
    for _ in range(3):
        auto = run(X)
        with genfast.backend("reference"):
            composed = run(X)
    torch.testing.assert_close(auto, composed)
    assert kernels == [True, False]


def test_a_graph_made_beside_another_threads_block_is_not_taken_in_ones_own():
    program = """
import threading, torch, genfast
graphs = []
def keep(module, inputs):
    graphs.append("genfast.gumbel_softmax" in module.code)
    return module
held, end = threading.Event(), threading.Event()
def hold():
    with genfast.backend("reference"):
        held.set(); end.wait()
thread = threading.Thread(target=hold); thread.start(); held.wait()
run = torch.compile(lambda x: genfast.gumbel_softmax(x, 0.5, seed=1), backend=keep)
run(torch.ones(3, 4))
end.set(); thread.join()
with genfast.backend("reference"):
    run(torch.ones(3, 4))
assert graphs == [True, False], graphs
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


def test_an_argument_breaks_a_graph_and_says_so():
    call = lambda x: genfast.gumbel_softmax(x, 0.5, seed=1, backend="cpu")  # noqa: E731
    torch.testing.assert_close(torch.compile(call, backend="eager")(X), call(X))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(call, backend="eager", fullgraph=True)(X)
    plain = torch.compile(
        lambda x: genfast.gumbel_softmax(x, 0.5, seed=1), backend="eager", fullgraph=True
    )
    assert torch.isfinite(plain(X)).all()


def test_an_eager_thread_beside_a_compiling_one_keeps_its_arguments_and_second_gradients():
    """torch.compiler.is_compiling() is the process's."""
    begun, end = threading.Event(), threading.Event()

    def slow(module, inputs):
        begun.set()
        end.wait(60)
        return module

    thread = threading.Thread(target=lambda: torch.compile(lambda x: x + 1, backend=slow)(X))
    thread.start()
    try:
        assert begun.wait(60)
        genfast.gumbel_softmax(X, 0.5, seed=1, backend="cpu")
        genfast.attention(Q, Q, Q, backend="torch")
        x = X.clone().requires_grad_()
        y = genfast.gumbel_softmax(x, 0.5, seed=1).square().sum()
        assert torch.autograd.grad(y, x, create_graph=True)[0].requires_grad
    finally:
        end.set()
        thread.join()


@pytest.mark.parametrize("strict", [True, False])
def test_an_argument_is_refused_where_a_graph_would_lose_it(strict):
    class Model(torch.nn.Module):
        def forward(self, x):
            return genfast.gumbel_softmax(x, 0.5, seed=1, backend="cpu")

    with pytest.raises((RuntimeError, torch._dynamo.exc.Unsupported), match="no argument inside"):
        torch.export.export(Model(), (X,), strict=strict)
    with pytest.raises(RuntimeError, match="no argument inside"):
        make_fx(Model())(X)


def test_a_block_for_the_cpu_keeps_the_kernels_without_a_registered_op(asked, monkeypatch):
    """linear, convolutions and the feed-forward: their roads have no other end than PyTorch."""
    monkeypatch.setattr(linear_module, "_AMD", True)
    monkeypatch.setattr(winograd, "_MEASURED", True)
    x, w = draw(4, 256), draw(256, 256)
    image = draw(2, 16, 16, 16).contiguous(memory_format=torch.channels_last)
    calls = {
        "linear": lambda: genfast.linear(x, w),
        "conv2d": lambda: genfast.conv2d(image, draw(16, 16, 3, 3), padding=1),
        "bias_act": lambda: feed_forward(x, w, None, w, None),
    }
    for entry, call in calls.items():
        with genfast.backend("cpu"):
            found = call()
        assert entry in asked["cpu"]
        with genfast.backend("reference"):
            torch.testing.assert_close(found, call(), rtol=1e-4, atol=1e-3)
        assert entry not in asked["reference"]
        torch.testing.assert_close(found, call(), rtol=0, atol=0)


@pytest.mark.skipif(_force._INTERPRETED, reason="Triton runs on the CPU")
@pytest.mark.parametrize("name", CALLS)
def test_triton_on_cpu_tensors_says_that_it_does_not_run_there(name):
    if not _force.HAVE_TRITON:
        pytest.skip("no Triton")
    with pytest.raises(RuntimeError, match="Triton does not run on cpu tensors here"):
        CALLS[name](getattr(genfast, name), backend="triton")


def beside(name, call):
    """call() while another thread is in a block."""
    held, end = threading.Event(), threading.Event()

    def hold():
        with genfast.backend(name):
            held.set()
            end.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(60)
        return call()
    finally:
        end.set()
        thread.join()


def test_names_used_in_other_threads_make_no_graphs_here():
    torch._dynamo.reset()
    graphs = CompileCounter()
    run = torch.compile(lambda x: genfast.gumbel_softmax(x, 0.5, seed=1), backend=graphs)
    run(X)
    names = [n for n in _force.BACKENDS if n != "cuda" and (n != "triton" or _force.HAVE_TRITON)]
    for name in names:
        beside(name, lambda: run(X))
        run(X)
    assert graphs.frame_count == 1
    for name in ("cpu", "reference"):  # one each of its own, whatever others ask for
        for other in names:
            with genfast.backend(name):
                beside(other, lambda: run(X))
    assert graphs.frame_count == 3


def state():
    return _force.get_backend(), gate(X), len(_force.blocks.open), _force.blocks.switched


CLEAN = ("auto", DIRECT, 0, False)


def test_blocks_of_a_thread_may_end_in_any_order():
    def stream(name):
        with genfast.backend(name):
            yield

    first, second = stream("reference"), stream("cpu")
    next(first), next(second)
    first.close()
    assert state() == ("cpu", SLOW, 1, True)
    second.close()
    assert state() == CLEAN

    async def task(name, seconds):
        with genfast.backend(name):
            await asyncio.sleep(seconds)

    async def main():
        await asyncio.gather(task("reference", 0.01), task("cpu", 0.02))

    asyncio.run(main())
    assert state() == CLEAN


def test_another_thread_may_end_a_block():
    def stream():
        with genfast.backend("reference"):
            yield

    mine = stream()
    next(mine)
    with genfast.backend("cpu"):
        thread = threading.Thread(target=mine.close)
        thread.start()
        thread.join()
        assert state() == ("cpu", SLOW, 1, True)
    assert state() == CLEAN
    mine = stream()
    next(mine)
    thread = threading.Thread(target=mine.close)
    thread.start()
    thread.join()
    assert state() == CLEAN


def test_a_decorated_function_runs_in_a_block_and_generators_are_refused():
    @genfast.backend("reference")
    def plain(depth=1):
        return (_force.get_backend(), *(plain(depth - 1) if depth else ()))

    assert plain() == ("reference", "reference") and state() == CLEAN

    def generator():
        yield

    async def coroutine():
        pass

    for function in (generator, coroutine):
        with pytest.raises(TypeError, match="got a generator or coroutine"):
            genfast.backend("cpu")(function)
    block = genfast.backend("cpu")
    with block, block:
        assert state() == ("cpu", SLOW, 2, True)
    assert state() == CLEAN


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
def test_interrupts_at_a_blocks_edges_leave_nothing_behind():
    def interrupt(*_):
        with genfast.backend("reference"):  # a handler has blocks too, whatever it interrupts
            raise KeyboardInterrupt

    before, hits = signal.signal(signal.SIGALRM, interrupt), 0
    random = torch.Generator().manual_seed(0)
    try:
        while hits < 2000:
            pause = 1e-5 + 5e-5 * torch.rand((), generator=random).item()
            try:
                signal.setitimer(signal.ITIMER_REAL, pause)
                while True:
                    with genfast.backend("cpu"):
                        pass
            except KeyboardInterrupt:
                hits += 1
            assert state() == CLEAN, hits
    finally:
        signal.signal(signal.SIGALRM, before)
    assert vars(_backend.kernels) == _backend._functions("auto")
