"""sampling and rng under everything torch can do to a function: autograd of every order and mode,
vmap, autocast, compile, export, fake and meta tensors, checkpoint, opcheck."""

import pytest
import torch
from tolerances import REORDERED
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import genfast

# Every differentiable function as f(x, y) -> tensor; x and y of one shape (B, V).
SMOOTH = {
    "reparameterize": lambda x, y, **k: genfast.reparameterize(x, y, **k),
    "kl": lambda x, y, **k: genfast.reparameterize(x, y, return_kl=True, **k)[1],
    "z and kl": lambda x, y, **k: sum(
        t.sum() for t in genfast.reparameterize(x, y, return_kl=True, kl_reduction="sum", **k)
    ),
    "gaussian_kl": lambda x, y, **k: genfast.gaussian_kl(x, y, reduction="none"),
    "tanh_normal": lambda x, y, **k: genfast.tanh_normal(x, y, **k),
    "tanh log_prob": lambda x, y, **k: genfast.tanh_normal(x, y, return_log_prob=True, **k)[1],
    "log_normal": lambda x, y, **k: genfast.log_normal(x, y, **k),
    "log_normal log_prob": lambda x, y, **k: genfast.log_normal(x, y, return_log_prob=True, **k)[1],
    "gumbel_softmax": lambda x, y, **k: genfast.gumbel_softmax(x, 0.7, **k) * y,
    "relaxed_bernoulli": lambda x, y, **k: genfast.relaxed_bernoulli(x, 0.7, **k) * y,
}
every = pytest.mark.parametrize("name", SMOOTH)


def inputs(dtype=torch.float32, shape=(3, 5)):
    g = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(2)]


def leaves(*tensors, dtype=None):
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]


def close(a, b):
    torch.testing.assert_close(a, b, **REORDERED[a.dtype], check_dtype=False)


# ---- autograd ---------------------------------------------------------------------------------


@every
def test_gradcheck_of_both_orders(name):
    x, y = leaves(*inputs(torch.float64, (2, 3)))
    f = lambda a, b: SMOOTH[name](a, b, seed=3)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, y), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x, y), check_fwd_over_rev=True)


def second_order(f, x, y, graph_between):
    """Gradients of |gradient|^2, with y a function of x: paths between the inputs count once."""
    y = y + x.sin() if graph_between else y
    grads = torch.autograd.grad(f(x, y).square().sum(), (x, y), create_graph=True)
    return [g.detach() for g in grads], torch.autograd.grad(sum((g**2).sum() for g in grads), x)[0]


@every
@pytest.mark.parametrize("graph_between", [False, True])
def test_double_backward_in_fp32(name, graph_between):
    f = lambda a, b: SMOOTH[name](a, b, seed=3)  # noqa: E731
    first, second = second_order(f, *leaves(*inputs()), graph_between)
    first64, second64 = second_order(f, *leaves(*inputs(), dtype=torch.float64), graph_between)
    for a, b in zip((*first, second), (*first64, second64), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_one_tensor_as_both_arguments():
    for create in (False, True):
        (x,) = leaves(inputs()[0])
        z = genfast.reparameterize(x, x, seed=1)
        got = torch.autograd.grad(z.sum(), x, create_graph=create)[0].detach()
        (x64,) = leaves(x, dtype=torch.float64)
        close(got, torch.autograd.grad(genfast.reparameterize(x64, x64, seed=1).sum(), x64)[0])


@every
def test_forward_mode_never_drops_a_tangent(name):
    f = lambda a, b: SMOOTH[name](a, b, seed=3)  # noqa: E731
    x, y = inputs()
    tx, ty = inputs()[::-1]
    wide = [t.double() for t in (x, y, tx, ty)]
    _, truth = torch.func.jvp(f, tuple(wide[:2]), tuple(wide[2:]))
    assert truth.abs().max() > 0
    value, tangent = torch.func.jvp(f, (x, y), (tx, ty))
    close(tangent, truth.float())
    close(value, f(x, y))
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(x, tx), forward_ad.make_dual(y, ty))
        close(forward_ad.unpack_dual(dual).tangent, truth.float())
    if name != "gaussian_kl":  # one dual input is enough
        with forward_ad.dual_level():
            dual = f(forward_ad.make_dual(x, tx), y)
            assert forward_ad.unpack_dual(dual).tangent is not None


@every
def test_gradients_of_unusual_kinds(name):
    """Negative views, expanded, strided and batched gradients reach the backward unharmed."""
    f = SMOOTH[name]
    x, y = leaves(*inputs())
    out = f(x, y, seed=3)
    plain = torch.arange(1.0, out.numel() + 1).reshape(out.shape)
    expected = torch.autograd.grad(out, (x, y), plain, retain_graph=True)
    negative = torch.complex(torch.zeros_like(plain), -plain).conj().imag
    assert negative.is_neg() and torch.equal(negative, plain)
    strided = torch.stack([plain, plain], -1)[..., 0]
    for grad in (negative, strided):
        for a, b in zip(
            torch.autograd.grad(out, (x, y), grad, retain_graph=True), expected, strict=True
        ):
            close(a, b)
    batch = torch.stack([plain, 2 * plain])
    batched = torch.autograd.grad(out, (x, y), batch, is_grads_batched=True, retain_graph=True)
    for a, b in zip(batched, expected, strict=True):
        close(a, torch.stack([b, 2 * b]))


@every
def test_negative_views_as_inputs(name):
    x, y = inputs()
    negative = [torch.complex(torch.zeros_like(t), -t).conj().imag for t in (x, y)]
    close(SMOOTH[name](*negative, seed=3), SMOOTH[name](x, y, seed=3))


@every
def test_checkpoint_draws_the_same_noise_again(name):
    for seed in (3, None):  # None: torch's generator, whose state checkpoint restores
        grads = []
        for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
            torch.manual_seed(2)
            x, y = leaves(*inputs())
            wrap(lambda a, b, s=seed: SMOOTH[name](a, b, seed=s), x, y).square().sum().backward()
            grads.append((x.grad, y.grad))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class Own(torch.Tensor):
    pass


class OwnParameter(torch.nn.Parameter):
    pass


TRAINED = {
    "layer_norm": lambda x, w: genfast.layer_norm(x, w),
    "rms_norm": lambda x, w: genfast.rms_norm(x, w),
    "group_norm": lambda x, w: genfast.group_norm(x, 2, w),
    "bias_act": lambda x, w: genfast.bias_act(x, w),
    "gated_act": lambda x, w: genfast.gated_act(x * w),
    "bernoulli_nll": lambda x, w: genfast.bernoulli_nll(x * w, torch.ones(3, 8)),
    "relaxed_bernoulli": lambda x, w: genfast.relaxed_bernoulli(x * w, seed=1),
    "attention": lambda x, w: genfast.attention(*[(x * w)[None, None]] * 3, softcap=2.0),
    "sdpa": lambda x, w: genfast.scaled_dot_product_attention(*[(x * w)[None, None]] * 3),
}


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_of_subclasses(name):
    """Of an input's class or a parameter's, and of what save_on_cpu makes plain tensors of."""
    x, w = torch.randn(3, 8), torch.rand(8)
    x, w = x.requires_grad_(), w.requires_grad_()
    want = torch.autograd.grad(TRAINED[name](x, w).square().sum(), (x, w))
    for x2, w2 in (
        (x.detach().as_subclass(Own).requires_grad_(), w),
        (x, OwnParameter(w.detach())),
    ):
        with torch.autograd.graph.save_on_cpu():
            saved = TRAINED[name](x2, w2)
        for y in (TRAINED[name](x2, w2), saved):
            got = torch.autograd.grad(y.square().sum(), (x2, w2))
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a.as_subclass(torch.Tensor), b)


def test_hooks_that_store_attention_in_another_order():
    def pack(t):
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    for options in ({}, {"softcap": 2.0}):
        want = torch.autograd.grad(genfast.attention(q, q, q, **options).square().sum(), q)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = genfast.attention(q, q, q, **options)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), q), want)


def test_a_default_device_is_not_that_of_coefficients():
    x = torch.randn(2, 4, 6, 6)
    plan = genfast.schedulers.ddim_plan(3)
    want = [genfast.guide(x, x + 1, 2.25, method=m) for m in ("cfg", "mag")]
    taps = genfast.setup_filter([1, 3, 3, 1])
    with torch.device("meta"):
        got = [genfast.guide(x, x + 1, 2.25, method=m) for m in ("cfg", "mag")]
        assert torch.equal(genfast.setup_filter([1, 3, 3, 1]), taps)
        genfast.diffusion_step(
            x, x, plan.table_on("cpu"), mask=x > 0, known=x, known_level=(0.5, 0.25), seed=1
        )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_grad_and_inference_mode_agree():
    x, y = leaves(*inputs())
    for f in SMOOTH.values():
        with torch.no_grad():
            a = f(x, y, seed=3)
        with torch.inference_mode():
            b = f(x, y, seed=3)
            genfast.randn(3, seed=1, out=torch.empty(3))
        assert not a.requires_grad and torch.equal(a, b)
        assert f(x, y, seed=3).requires_grad


# ---- functorch --------------------------------------------------------------------------------


OUTLIVING = {
    **SMOOTH,
    "layer_norm": lambda x, y, **_: genfast.layer_norm(x, y[0]),
    "layer_norm of a sum": lambda x, y, **_: genfast.layer_norm(x, add=y)[1],
    "bias_act": lambda x, y, **_: genfast.bias_act(x, y[0], act="lrelu"),
    "gated_act": lambda x, y, **_: genfast.gated_act(torch.cat((x, y), 1)),
    "bernoulli_nll": lambda x, y, **_: genfast.bernoulli_nll(x, y),
    "attention": lambda x, y, **_: genfast.attention(*[t[None, None] for t in (x, y, x)]),
    "linear": lambda x, y, **_: genfast.linear(x, y),
}


@pytest.mark.parametrize("name", OUTLIVING)
def test_a_tensor_that_outlived_its_transform(name):
    """It is of type Tensor and has no memory of its own."""
    kept = []

    def keep(t):
        kept.append(t)
        return t.sum()

    x, y = inputs()
    torch.func.grad(keep)(x)
    found, expected = (
        torch.autograd.grad(OUTLIVING[name](t, leaf, seed=3).sum(), leaf)[0]
        for t, leaf in zip((kept[0], x), leaves(y, y), strict=True)
    )
    close(found, expected)


@every
def test_function_transforms(name):
    f = SMOOTH[name]
    x, y = inputs(shape=(4, 3, 5))
    one = lambda a, b: f(a, b, seed=3)  # noqa: E731
    expected = torch.stack([one(a, b) for a, b in zip(x, y, strict=True)])
    close(torch.vmap(one)(x, y), expected)
    close(torch.vmap(one, in_dims=(0, None))(x, y[0])[1], one(x[1], y[0]))
    loss = lambda a, b: one(a, b).square().sum()  # noqa: E731
    got = torch.vmap(torch.func.grad(loss, (0, 1)))(x, y)
    for i in range(4):
        a, b = leaves(x[i], y[i])
        loss(a, b).backward()
        close(got[0][i], a.grad)
        close(got[1][i], torch.zeros_like(b) if b.grad is None else b.grad)
    jacobian = torch.func.jacrev(one)(x[0], y[0])
    close(jacobian, torch.func.jacfwd(one)(x[0], y[0]))


@pytest.mark.parametrize("name", ["reparameterize", "tanh_normal", "gumbel_softmax"])
def test_vmap_with_one_seed_per_lane(name):
    x, y = inputs(shape=(4, 3, 5))
    seeds = torch.tensor([9, -1, 2**40, 9])
    got = torch.vmap(lambda a, b, s: SMOOTH[name](a, b, seed=s))(x, y, seeds)
    for i in range(4):
        close(got[i], SMOOTH[name](x[i], y[i], seed=seeds[i].item()))
    noise = torch.vmap(lambda s: genfast.randn(7, seed=s))(seeds)
    assert torch.equal(noise, torch.stack([genfast.randn(7, seed=s) for s in seeds.tolist()]))


def test_vmap_with_torch_randomness():
    x, y = inputs()
    f = lambda a, b: genfast.reparameterize(a, b)  # noqa: E731
    different = torch.vmap(f, randomness="different")(x[:1].expand(2, 5), y[:1].expand(2, 5))
    assert not torch.equal(different[0], different[1])
    same = torch.vmap(f, randomness="same")(x[:1].expand(2, 5), y[:1].expand(2, 5))
    assert torch.equal(same[0], same[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(f)(x, y)


def test_tokens_under_vmap():
    x = inputs(shape=(4, 6, 9))[0]
    got = torch.vmap(lambda a: genfast.sample_categorical(a, seed=3))(x)
    assert torch.equal(got, torch.stack([genfast.sample_categorical(a, seed=3) for a in x]))


# ---- autocast, fake, meta -----------------------------------------------------------------------


@every
def test_autocast_with_mixed_dtypes(name):
    x, y = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = leaves(x, y)
        w = torch.eye(5)
        out = SMOOTH[name](a @ w, b, seed=3)  # bf16 beside fp32
        out.sum().backward()
    rounded = SMOOTH[name](x.bfloat16().double(), y.double(), seed=3)
    torch.testing.assert_close(out.double(), rounded, rtol=2e-2, atol=2e-2)
    assert a.grad.dtype == torch.float32 and torch.isfinite(a.grad).all()


@every
def test_fake_and_meta_tensors_agree_with_real_ones(name):
    f = SMOOTH[name]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        real_inputs = [x.to(dtype).t() for x in inputs(shape=(5, 3))]
        real = f(*real_inputs, seed=3)
        meta = f(*(x.to("meta") for x in real_inputs), seed=3)
        with FakeTensorMode() as mode:
            fake = f(*(mode.from_tensor(x) for x in real_inputs), seed=3)
            unseeded = f(*(mode.from_tensor(x) for x in real_inputs))
        for other in (meta, fake, unseeded):
            assert other.shape == real.shape and other.dtype == real.dtype
            assert other.stride() == real.stride()
    close(f(*inputs(), seed=3), f(*inputs(torch.float64), seed=3).float())  # nothing fake stayed


def test_fake_tensors_are_not_looked_into():
    """Lengths of a cache, first rows of sequences, a strength that is kept."""
    i32 = torch.int32

    def outs(**where):
        q, c = torch.zeros(2, 4, 1, 8, **where), torch.zeros(2, 2, 16, 8, **where)
        cu = torch.arange(3, dtype=i32, **where)
        return (
            genfast.attention_with_kvcache(q, c, c, cache_seqlens=cu[1:]),
            genfast.attention_varlen(q[:, :, 0], q[:, :, 0], q[:, :, 0], cu, cu, 1, 1),
            genfast.bias_act(torch.zeros(2, 3, 4, **where), strength=1.0, seed=1),
        )

    with FakeTensorMode():
        fake = outs()
    for a, b, c in zip(fake, outs(device="meta"), outs(), strict=True):
        assert a.shape == b.shape == c.shape and type(c) is torch.Tensor


def test_fake_noise():
    with FakeTensorMode():
        out = torch.empty(3, 4)
        assert genfast.randn(3, 4, out=out, seed=1) is out
        assert genfast.rand(3, dtype=torch.float16, seed=1).dtype == torch.float16
        assert genfast.randint(0, 5, (2, 3)).shape == (2, 3)
        x = torch.empty(2, 7)
        assert genfast.sample_tokens(x, 0.5, top_k=3, seed=2).shape == (2,)
        assert genfast.sample_categorical(x).dtype == torch.int64


def test_dispatch_modes_see_the_op():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, y = inputs()
    with Watch():
        genfast.reparameterize(x, y, seed=1)
        genfast.randn(3, seed=1)
        genfast.gumbel_softmax(x, 1.0, seed=1)
        genfast.sample_categorical(x, seed=1)
    for op in ("reparameterize", "random", "gumbel_softmax", "sample_tokens"):
        assert f"genfast.{op}.default" in seen


# ---- registered ops ---------------------------------------------------------------------------


def op_cases():
    ops = torch.ops.genfast
    x, y = inputs()
    seeds = torch.tensor([4, 5, 6])
    tau = torch.tensor(0.7)
    grad = torch.ones(3, 5)
    for transform, side in ((0, 0), (0, 1), (1, 2), (2, 2)):
        for s in (None, seeds):
            args = (3, s, 0, 0, transform, side, 0)
            yield f"reparameterize-{transform}-{side}", ops.reparameterize, (*leaves(x, y), *args)
    args = (3, None, 0, 0, 0, 1, 3)
    yield "reparameterize_backward", ops.reparameterize_backward, (
        grad, torch.tensor(1.0), x, y.t().contiguous().t(), *args
    )  # fmt: skip
    for name in ("gumbel_softmax", "relaxed_bernoulli"):
        for hard in (False, True):
            call = (*leaves(x), tau, 3, seeds, 0, 0, hard)
            yield f"{name}-{hard}", getattr(ops, name), call
        yield f"{name}_backward", getattr(ops, f"{name}_backward"), (
            grad, x.softmax(-1), x, tau, 3, None, 0, 0
        )  # fmt: skip
    random = ([3, 5], 1, 3, seeds, 0, 0, 0, 1, torch.float16, torch.device("cpu"))
    yield "random", ops.random, random
    filters = (torch.tensor([0.7]), torch.tensor([3]), torch.tensor([0.9]), None)
    yield "sample_tokens", ops.sample_tokens, (x, *filters, 3, seeds, 0, 0)
    yield "sample_tokens-plain", ops.sample_tokens, (x, None, None, None, None, 3, None, 0, 0)


OPS = list(op_cases())


@pytest.mark.parametrize("op, args", [pytest.param(op, args, id=name) for name, op, args in OPS])
def test_opcheck(op, args):
    torch.library.opcheck(op.default, args)


def test_every_registered_op_is_checked():
    ours = {
        n.removeprefix("genfast::").split(".")[0]
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("genfast::")
    }
    families = ("reparameterize", "gumbel", "relaxed", "random", "sample")
    checked = {op._qualified_op_name.removeprefix("genfast::") for _, op, _ in OPS}
    assert {n for n in ours if n.startswith(families)} == checked


# ---- compile and export -----------------------------------------------------------------------


def everything(x, y, seed):
    z, kl = genfast.reparameterize(x, y, seed=seed, return_kl=True, kl_reduction="sum")
    t, log_prob = genfast.tanh_normal(x, y, seed=seed, stream=1, return_log_prob=True)
    soft = genfast.gumbel_softmax(x, 0.7, seed=seed, stream=2)
    hard = genfast.gumbel_softmax(x, 0.7, True, seed=seed, stream=3)
    coin = genfast.relaxed_bernoulli(x, 0.7, seed=seed, stream=4)
    noise = genfast.randn(3, 5, seed=seed, stream=5)
    value = z.square().sum() + kl + (t * noise).sum() + log_prob.sum()
    return value + (soft * y).sum() + (hard * y).sum() + coin.sum()


def check_compiled(compiled, seed):
    values = []
    for f in (everything, compiled):
        x, y = leaves(*inputs())
        value = f(x, y, seed)
        value.backward()
        values.append((value.detach(), x.grad, y.grad))
    for a, b in zip(*values, strict=True):
        close(a, b)


@pytest.mark.slow
def test_compile_fullgraph_forward_and_backward():
    torch._dynamo.reset()
    check_compiled(torch.compile(everything, fullgraph=True), 3)


def test_new_seeds_do_not_recompile():
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    f = torch.compile(
        lambda x, s, o: (
            genfast.reparameterize(x, x, seed=s, offset=o)
            + genfast.randn(3, 5, seed=s, stream=s + 1, offset=o)
        ),
        backend=count,
        fullgraph=True,
    )
    x = inputs()[0]
    for i, seed in enumerate((3, 4, -5, 2**40, 2**62, 17, -(2**63), 2**63 - 1, 99, 100, 101, 102)):
        offset = 2 + i * i
        expected = genfast.reparameterize(x, x, seed=seed, offset=offset)
        expected = expected + genfast.randn(3, 5, seed=seed, stream=seed + 1, offset=offset)
        if seed < 2**63 - 1:
            close(f(x, seed, offset), expected)
    assert len(graphs) <= 3  # the first value, then a symbol (and the offset's)
    before = len(graphs)
    seeds = torch.compile(
        lambda x, s: genfast.randn(3, 5, seed=s) + x, backend=count, fullgraph=True
    )
    for i in range(12):
        s = torch.arange(3) + i
        assert torch.equal(seeds(x, s), genfast.randn(3, 5, seed=s) + x)
    assert len(graphs) == before + 1


def test_compile_without_a_seed_uses_torch():
    torch._dynamo.reset()
    f = torch.compile(lambda x: genfast.reparameterize(x, x), backend="aot_eager", fullgraph=True)
    x = inputs()[0]
    torch.manual_seed(1)
    a, b = f(x), f(x)
    torch.manual_seed(1)
    assert not torch.equal(a, b) and torch.equal(f(x), a)


def test_compiled_forward_mode_keeps_the_tangent():
    torch._dynamo.reset()
    x, t = inputs()
    for name in ("reparameterize", "gumbel_softmax"):
        f = lambda m, v, name=name: torch.func.jvp(  # noqa: E731
            lambda q: SMOOTH[name](q, q, seed=1), (m,), (v,)
        )[1]
        close(torch.compile(f, backend="eager")(x, t), f(x, t))


def test_compiled_tokens():
    torch._dynamo.reset()
    f = lambda x: (  # noqa: E731
        genfast.sample_tokens(x, 0.7, top_k=3, seed=4),
        genfast.sample_categorical(x, seed=torch.tensor([1, 2, 3])),
    )
    x = inputs()[0]
    for a, b in zip(torch.compile(f, backend="aot_eager", fullgraph=True)(x), f(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    class Model(torch.nn.Module):
        def forward(self, x, y, seeds):
            z, kl = genfast.reparameterize(x, y, seed=seeds, return_kl=True)
            return z, kl, genfast.gumbel_softmax(x, 0.7, seed=4), genfast.randn(3, 5, seed=seeds)

    args = (*inputs(), torch.tensor([5, 6, 7]))
    exported = torch.export.export(Model(), args, strict=strict)
    targets = {str(n.target) for n in exported.graph.nodes}
    assert {"genfast.reparameterize.default", "genfast.random.default"} <= targets
    for program in (exported, exported.run_decompositions()):
        for a, b in zip(program.module()(*args), Model()(*args), strict=True):
            close(a, b)


_W = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
_K = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(1))
TRACED = {
    "attention": ((1, 2, 8, 16), lambda x: genfast.attention(x, x, x)),
    "bias_act": ((4, 32), lambda x: genfast.bias_act(x)),
    "conv2d": ((4, 16, 8, 8), lambda x: genfast.conv2d(x, _K, padding=1)),
    "guide": ((4, 32), lambda x: genfast.guide(x, 2 * x, 3.0)),
    "layer_norm": ((4, 32), lambda x: genfast.layer_norm(x)),
    "linear": ((3, 256), lambda x: genfast.linear(x, _W)),
    "reparameterize": ((4, 32), lambda x: genfast.reparameterize(x, x, seed=1)),
    "upfirdn2d": ((1, 2, 8, 8), lambda x: genfast.upfirdn2d(x, torch.ones(2, 2))),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", TRACED)
def test_a_trace_sees_what_the_kernel_would_compute(name):
    """torch.jit.trace records torch's calls: a kernel's result would be a constant to it."""
    shape, call = TRACED[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    traced = torch.jit.trace(call, (x,))
    torch.testing.assert_close(traced(2 * x + 1), call(2 * x + 1), rtol=1e-4, atol=1e-4)


# ---- what changes between calls ----------------------------------------------------------------

# f(x, s) of x (3, 4, 8) and a number.
OF_A_NUMBER = {
    "guide": lambda x, s: genfast.guide(x, 2 * x, s),
    "add_noise": lambda x, s: genfast.add_noise(x, s, 1 - s, seed=1),
    "denoising_loss": lambda x, s: genfast.denoising_loss(x, x, s, 0.8, seed=1),
    "scale_model_input": genfast.scale_model_input,
    "dynamic_threshold": genfast.dynamic_threshold,
    "gumbel_softmax": lambda x, s: genfast.gumbel_softmax(x, s, seed=1),
    "relaxed_bernoulli": lambda x, s: genfast.relaxed_bernoulli(x, s, seed=1),
    "sample_tokens": lambda x, s: genfast.sample_tokens(x, s, top_p=s, seed=1).float(),
    "bias_act": lambda x, s: genfast.bias_act(x, gain=s, strength=s, seed=1),
    "layer_norm": lambda x, s: genfast.layer_norm(x, eps=s),
}


@pytest.mark.parametrize("dynamic", [None, True], ids=["numbers", "sizes"])
@pytest.mark.parametrize("name", OF_A_NUMBER)
def test_what_changes_breaks_no_graph(name, dynamic):
    f = OF_A_NUMBER[name]
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="eager")
    for n, s in ((3, 0.25), (3, 0.5), (3, 0.75), (5, 0.75)):
        x = torch.randn(n, 4, 8)
        close(compiled(x, s), f(x, s))


@pytest.mark.parametrize(
    "module",
    [genfast.nn.LayerNorm(8), genfast.nn.RMSNorm(8), genfast.nn.GroupNorm(2, 4)],
    ids=lambda module: type(module).__name__,
)
def test_export_of_any_batch(module):
    batch = torch.export.Dim("batch", min=2, max=64)
    guided = torch.nn.Module()
    guided.forward = lambda x: genfast.guide(module(x), x, 3.0)
    made = torch.export.export(guided, (torch.randn(3, 4, 8),), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 4, 8)
    close(made.module()(x), guided(x))
