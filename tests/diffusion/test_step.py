"""The affine step, judged against the reference in float64; gradients; roads. About 10 s."""

import math

import pytest
import torch
from draws import draw
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import schedulers as S
from genfast.ops.diffusion import step as step_module
from genfast.reference import diffusion as R

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
X0, Z = 2, 9


def random_table(rows=5, seed=3, clip=0.7, used=range(10)):
    """Every coefficient of the used sources nonzero, in all three outputs."""
    t = draw(rows, 36, seed=seed) * 0.5
    t[:, 2] = clip
    c = t[:, 6:].view(rows, 3, 10)
    for s in range(10):
        if s not in used:
            c[:, :, s] = 0
    return t


def tensors(shape, count, dtype=torch.float32, seed=1):
    return [draw(*shape, seed=seed + i, dtype=dtype) for i in range(count)]


def scale_of(x, m, coef, sources, n_out):
    """Sum of the magnitudes that were added, per output: what rounding is relative to."""
    coef = coef.double().abs()
    column = lambda k: R._column(coef, k, x)  # noqa: E731
    x0 = column(0) * x.double().abs() + column(1) * m.double().abs()
    values = [x.double().abs(), m.double().abs(), x0]
    values += [None if s is None else s.double().abs() for s in sources]
    return [
        sum(column(6 + 10 * i + k) * v for k, v in enumerate(values) if v is not None)
        for i in range(n_out)
    ]


def judge(got, truth, scale, ulps=2.0):
    """Within `ulps` of the output dtype: of the terms that were added."""
    assert got.dtype.is_floating_point and torch.isfinite(got).all()
    info = torch.finfo(got.dtype)
    allowed = ulps * info.eps * torch.maximum(scale, truth.abs()) + info.smallest_normal
    excess = ((got.double() - truth).abs() - allowed).max() if got.numel() else torch.zeros(())
    assert excess <= 0, f"{excess.item():.3g} too far"


SHAPES = [(1,), (3, 5), (2, 3, 7, 5), (1, 4, 64, 64), (2, 1, 1025), (3, 0, 4)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("outputs", [1, 3])
def test_against_fp64(shape, dtype, outputs):
    x, m, z, *history = tensors(shape, 9, dtype)
    table = random_table()
    for row in (0, 3):
        got = genfast.diffusion_step(
            x, m, table, row, history=tuple(history), noise=z, outputs=outputs
        )
        got = got if outputs > 1 else (got,)
        wide = [t.double() for t in (x, m, z, *history)]
        truth = R.diffusion_step(
            wide[0], wide[1], table[row].double(), history=wide[3:], noise=wide[2], n_out=outputs
        )
        scales = scale_of(x, m, table[row], [*history, z], outputs)
        for g, t, s in zip(got, truth, scales, strict=True):
            assert g.dtype == dtype and g.shape == x.shape
            judge(g, t, s)


def layouts(x):
    yield "channels_last", x.to(memory_format=torch.channels_last)
    yield "transposed", x.transpose(1, 3).contiguous().transpose(1, 3)
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
    wide[..., 1::2] = x
    yield "every second", wide[..., 1::2]
    yield "shifted", torch.cat([x.flatten(), x.new_zeros(1)]).as_strided(x.shape, x.stride())
    flipped = torch.zeros_like(x).expand(x.shape)
    yield "copied", flipped.copy_(x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides_never_matter(dtype):
    x, m, z, h = tensors((2, 3, 9, 11), 4, dtype)
    table = random_table(used=[0, 1, 2, 3, Z])
    want = genfast.diffusion_step(x, m, table, 1, history=(h,), noise=z)
    drawn = genfast.diffusion_step(x, m, table, 1, history=(h,), seed=5)
    for (name, a), (_, b), (_, c), (_, d) in zip(*map(layouts, (x, m, h, z)), strict=True):
        got = genfast.diffusion_step(a, b, table, 1, history=(c,), noise=d)
        assert torch.equal(got, want), name
        got = genfast.diffusion_step(x, b, table, 1, history=(c,), seed=5)
        assert torch.equal(got, drawn), name
    row = draw(1, 3, 1, 1, dtype=dtype).expand(2, 3, 9, 11)
    got = genfast.diffusion_step(x, row, table, 1, history=(h,), noise=z)
    want = genfast.diffusion_step(x, row.contiguous(), table, 1, history=(h,), noise=z)
    assert torch.equal(got, want)


def noise_row():
    t = torch.zeros(1, 36)
    t[0, 2] = math.inf
    t[0, 6 + Z] = 1.0
    return t


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 33, 35), (7, 1025)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_noise_is_the_contract(shape, dtype):
    x, table = torch.zeros(shape, dtype=dtype), noise_row()
    for kw in (dict(seed=7), dict(seed=7, stream=3, offset=6), dict(seed=2**63 + 5)):
        assert torch.equal(
            genfast.diffusion_step(x, x, table, **kw), genfast.randn(shape, dtype=dtype, **kw)
        )
    seeds = torch.arange(shape[0]) * 11 + 5
    got = genfast.diffusion_step(x, x, table, seed=seeds, stream=2)
    assert torch.equal(got, genfast.randn(shape, seed=seeds, stream=2, dtype=dtype))
    # a sample is a function of its own seed, wherever it stands in the batch
    alone = genfast.diffusion_step(x[1:2], x[1:2], table, seed=seeds[1:2], stream=2)
    assert torch.equal(got[1:2], alone)
    with genfast.backend("reference"):
        assert torch.equal(got, genfast.diffusion_step(x, x, table, seed=seeds, stream=2))


#: sources per output: a pair in two and in three outputs (Euler, Heun), different ones, a clamp
FLAT = {
    "pair": [(0, 1), (0, 1)],
    "pair of three": [(0, 1), (0, 1), (0, 1)],
    "history": [(0, 1, 3, 4), (0, 1)],
    "clamp": [(0, X0), (X0,)],
    "clamp and noise": [(0, X0, Z), (X0,)],
    "noise": [(0, 1, Z)],
}


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 37), (3, 1, 16, 65), (2, 4, 100, 100)])
@pytest.mark.parametrize("name", FLAT)
def test_contiguous_memory_takes_a_shorter_road_to_the_same_bits(name, shape):
    """Strided tensors are staged chunk by chunk; contiguous ones are not."""
    table = torch.zeros(1, 36)
    table[0, :3] = torch.tensor([0.8, -0.6, 0.9])
    for o, sources in enumerate(FLAT[name]):
        for s in sources:
            table[0, 6 + 10 * o + s] = 0.3 + 0.1 * s - 0.2 * o
    x, m, *history = tensors(shape, 4)
    seeds = [7, torch.arange(shape[0])] if "noise" in name else [None]
    for seed in seeds:
        kw = dict(outputs=len(FLAT[name]), seed=seed, stream=5)
        flat = genfast.diffusion_step(x, m, table, history=tuple(history), **kw)
        staged = genfast.diffusion_step(
            torch.stack([x, x], -1)[..., 0], m, table, history=tuple(history), **kw
        )
        pairs = [(flat, staged)] if torch.is_tensor(flat) else list(zip(flat, staged, strict=True))
        assert all(torch.equal(a, b) for a, b in pairs)
        assert all(a.is_contiguous() for a, _ in pairs)


def test_threads_do_not_matter():
    x, m = tensors((2, 3, 200, 333), 2)
    table = random_table(used=[0, 1, 2, Z])
    torch.set_num_threads(1)
    one = genfast.diffusion_step(x, m, table, 2, seed=1, outputs=3)
    torch.set_num_threads(2)
    for a, b in zip(one, genfast.diffusion_step(x, m, table, 2, seed=1, outputs=3), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(4, 6, 8), (3, 5, 3), (2, 257, 64)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_per_sample_and_per_token(shape, dtype):
    x, m, h = tensors(shape, 3, dtype)
    table = random_table()
    table = table * (torch.arange(36) < 6 + 10)  # one output
    table[:, 6 + 4 : 6 + Z] = 0
    b, length = shape[:2]
    index = torch.randint(0, 5, (b,))
    got = genfast.diffusion_step(x, m, table, index, history=(h,), seed=9)
    tokens = torch.randint(0, 5, (b, length))
    got_tokens = genfast.diffusion_step(x, m, table, tokens, history=(h,), seed=9)
    for r in range(5):
        whole = genfast.diffusion_step(x, m, table, r, history=(h,), seed=9)
        assert torch.equal(got[index == r], whole[index == r])
        assert torch.equal(got_tokens[tokens == r], whole[tokens == r])
    zero_dim = genfast.diffusion_step(x, m, table, torch.tensor(2), history=(h,), seed=9)
    assert torch.equal(zero_dim, genfast.diffusion_step(x, m, table, 2, history=(h,), seed=9))


def test_unread_sources_may_be_anything():
    x, m = tensors((2, 3, 40), 2)
    table = torch.zeros(1, 36)
    table[0, 2] = math.inf
    table[0, 7] = 2.0  # out = 2 m
    bad = torch.full_like(x, math.nan)
    got = genfast.diffusion_step(bad, m, table, history=(bad, bad), noise=bad)
    assert torch.equal(got, 2 * m)
    assert torch.equal(genfast.diffusion_step(x, bad, table * 0), torch.zeros_like(x))


def test_lists_take_the_direct_road(monkeypatch):
    """On a GPU the slow road costs a solver step 130 to 250 us where the direct one takes 17."""
    x, m, n, h = tensors((2, 3, 8), 4)
    table = random_table(used=(0, 1, 3)).float()
    expected = genfast.diffusion_step(x, (m, n), table, 1, history=(h, None), weights=(0.5, 0.5))
    monkeypatch.setattr(step_module, "_slow", None)
    out = genfast.diffusion_step(x, [m, n], table, 1, history=[h, None], weights=(0.5, 0.5))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_in_place_and_out(dtype):
    shape = (2, 3, 1030)
    x, m, h1, h2 = tensors(shape, 4, dtype)
    table = random_table(used=[0, 1, 2, 3, 4])
    want = genfast.diffusion_step(x, m, table, history=(h1, h2), outputs=3)
    a, b, c = x.clone(), h1.clone(), h2.clone()
    version = a._version
    got = genfast.diffusion_step(a, m, table, history=(b, c), outputs=3, out=(a, c, b))
    assert got[0] is a and a._version > version
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    single = x.clone()
    assert torch.equal(
        genfast.diffusion_step(single, m, table, history=(h1, h2), out=single), want[0]
    )
    strided = torch.empty(2, 3, 2060, dtype=dtype)[..., ::2]
    genfast.diffusion_step(x, m, table, history=(h1, h2), out=strided)
    assert torch.equal(strided, want[0])
    wide = torch.empty(shape, dtype=torch.float32)  # another dtype than x
    genfast.diffusion_step(x, m, table, history=(h1, h2), out=wide)
    assert torch.equal(wide.to(dtype), want[0])
    # memory that overlaps without being the same: still right
    buffer = torch.zeros(2 * 3 * 1030 + 7, dtype=dtype)
    source = buffer[:-7].view(shape).copy_(x)
    target = buffer[7:].view(shape)
    genfast.diffusion_step(source, m, table, history=(h1, h2), out=target)
    assert torch.equal(target, want[0])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights(count, dtype):
    x, *models = tensors((3, 4, 50), 1 + count, dtype)
    table = random_table(used=[0, 1, 2])
    weights = draw(3, count, seed=8)
    got = genfast.diffusion_step(x, tuple(models), table, 2, weights=weights)
    m = sum(R._like(weights[:, j].double(), x) * models[j].double() for j in range(count))
    scale_m = sum(
        R._like(weights[:, j].double(), x).abs() * models[j].double().abs() for j in range(count)
    )  # noqa: E501
    truth = R.diffusion_step(x.double(), m, table[2].double(), n_out=1)[0]
    judge(got, truth, scale_of(x, scale_m, table[2], [], 1)[0])
    if count == 2:
        a = genfast.diffusion_step(x, tuple(models), table, 2, weights=3.5)
        b = genfast.diffusion_step(x, tuple(models), table, 2, weights=(3.5, -2.5))
        assert torch.equal(a, b)


@pytest.mark.parametrize("variance", ["learned_range", "learned"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_learned_variance(variance, dtype):
    x, z = tensors((2, 3, 5, 7), 2, dtype)
    m = draw(2, 6, 5, 7, seed=4, dtype=dtype).clamp(-1, 1)
    table = random_table(used=[0, 1, 2, Z])
    mode = {"learned_range": 1, "learned": 2}[variance]
    got = genfast.diffusion_step(x, m, table, 1, noise=z, variance=variance)
    truth = R.diffusion_step(
        x.double(), m.double(), table[1].double(), noise=z.double(), variance_mode=mode, n_out=1
    )[0]
    judge(got, truth, truth.abs().max() + 1)
    two = genfast.diffusion_step(
        x, (m, -m), table, 1, noise=z, variance=variance, weights=(1.0, 0.0)
    )
    assert torch.equal(two, got)  # the variance is the first output's


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_inpainting(dtype):
    x, m, known, z = tensors((2, 3, 8, 9), 4, dtype)
    table = random_table(used=[0, 1, Z])
    mask = torch.zeros(2, 1, 8, 9, dtype=torch.bool)
    mask[:, :, 2:5] = True
    free = genfast.diffusion_step(x, m, table, 1, noise=z)
    got = genfast.diffusion_step(
        x, m, table, 1, noise=z, mask=mask, known=known, known_level=(0.8, 0.6)
    )
    noised = genfast.add_noise(known, 0.8, 0.6, noise=z)
    where = mask.expand_as(x)
    assert torch.equal(got[where], free[where])
    assert torch.equal(got[~where], noised[~where])
    clean = genfast.diffusion_step(x, m, table, 1, noise=z, mask=mask, known=known)
    assert torch.equal(clean[~where], known[~where])
    level = torch.tensor([[0.8, 0.6], [0.1, 0.9]])
    got = genfast.diffusion_step(x, m, table, 1, seed=3, mask=mask, known=known, known_level=level)
    for b in range(2):
        noised = genfast.add_noise(known, level[b, 0], level[b, 1], seed=3)
        assert torch.equal(got[b][~where[b]], noised[b][~where[b]])
    soft = torch.rand(8, 9, generator=torch.Generator().manual_seed(0))
    got = genfast.diffusion_step(
        x, m, table, 1, noise=z, mask=soft, known=known, known_noise=x, known_level=(1.0, 2.0)
    )  # noqa: E501
    with genfast.backend("reference"):
        want = genfast.diffusion_step(
            x, m, table, 1, noise=z, mask=soft, known=known, known_noise=x, known_level=(1.0, 2.0)
        )  # noqa: E501
    tolerance = 4 * torch.finfo(dtype).eps * 8
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_threshold():
    x, m = tensors((3, 4, 50), 2)
    table = random_table(used=[0, X0], clip=math.inf)
    s = torch.tensor([1.0, 1.4, 0.3])
    got = genfast.diffusion_step(x, m, table, 1, threshold=s)
    truth = R.diffusion_step(
        x.double(), m.double(), table[1].double(), threshold=s.double(), n_out=1
    )[0]  # noqa: E501
    judge(got, truth, truth.abs() + 2)
    for dtype in (torch.float32, torch.float64):  # one sample without a dimension
        x, m = torch.tensor(2.0, dtype=dtype), torch.tensor(1.0, dtype=dtype)
        got = [
            genfast.diffusion_step(x, m, table, 1, threshold=torch.ones(1), backend=b)
            for b in ("auto", "reference")
        ]
        assert all(g.shape == () and torch.allclose(g, got[0]) for g in got)


# ---- gradients -----------------------------------------------------------------------------------


def leaves(*xs, dtype=None):
    return [x.detach().to(dtype or x.dtype).requires_grad_() for x in xs]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", ["plain", "clamped", "guided", "rows", "threshold", "masked"])
def test_gradients(case, dtype):
    shape = (2, 3, 50)
    x, m, m2, h, z, *grads = tensors(shape, 8, dtype)
    table = random_table(used=[0, 1, 2, 3, Z], clip=0.7 if case == "clamped" else math.inf)
    row = torch.tensor([4, 1]) if case == "rows" else 1
    kw = {}
    if case == "guided":
        kw["weights"] = torch.tensor([[2.0, -1.0], [0.5, 0.25]])
    if case == "threshold":
        kw["threshold"] = torch.tensor([0.6, 1.2])
    if case == "masked":
        kw["mask"], kw["known"] = (
            (draw(*shape, seed=50) > 0).to(dtype),
            torch.zeros(shape, dtype=dtype),
        )

    def run(dtype):
        inputs = leaves(x, m, m2, h, z, dtype=dtype)
        models = (inputs[1], inputs[2]) if case == "guided" else inputs[1]
        extra = {k: v.to(dtype) if k in ("mask", "known") else v for k, v in kw.items()}
        outs = genfast.diffusion_step(
            inputs[0],
            models,
            table,
            row,
            history=(None, inputs[3])[1:],
            noise=inputs[4],
            outputs=3,
            **extra,  # noqa: E501
        )
        wanted = [t for i, t in enumerate(inputs) if i != 2 or case == "guided"]
        return torch.autograd.grad(outs, wanted, [g.to(dtype) for g in grads])

    for got, truth in zip(run(dtype), run(torch.float64), strict=True):
        assert got.dtype == dtype
        judge(got, truth, truth.abs() + 6, ulps=3)


@pytest.mark.parametrize("case", ["clamped", "learned", "masked"])
def test_gradients_of_gradients(case):
    x, m, h, z, known = tensors((2, 2, 3), 5, torch.float64)
    table = random_table(used=[0, 1, 2, 3, Z], clip=0.9).double()
    kw = {}
    if case == "learned":
        m, kw["variance"] = draw(2, 4, 3, seed=30, dtype=torch.float64), "learned_range"
    if case == "masked":
        kw = dict(mask=torch.rand(2, 2, 3).double(), known=known, known_level=(0.5, 0.5))
    inputs = leaves(x, m, h, z)

    def f(x, m, h, z):
        return genfast.diffusion_step(x, m, table, 1, history=(h,), noise=z, outputs=2, **kw)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_double_backward_of_the_kernel():
    x, m = leaves(*tensors((2, 3, 20), 2))
    table = random_table(used=[0, 1, 2, Z])
    y = genfast.diffusion_step(x, m**2, table, 1, seed=4)
    (g,) = torch.autograd.grad(y.sum(), m, create_graph=True)
    (gg,) = torch.autograd.grad(g.sum(), m)
    y = R.diffusion_step(x, m**2, table[1], noise=genfast.randn(2, 3, 20, seed=4), n_out=1)[0]
    (g2,) = torch.autograd.grad(y.sum(), m, create_graph=True)
    torch.testing.assert_close(g, g2)
    torch.testing.assert_close(gg, torch.autograd.grad(g2.sum(), m)[0])


def test_gradient_of_weights_and_strange_gradients():
    x, m, m2 = tensors((2, 3, 20), 3)
    table = random_table(used=[0, 1, 2], clip=math.inf)
    weights = torch.tensor([1.5, -0.5], requires_grad=True)
    y = genfast.diffusion_step(x, (m, m2), table, weights=weights)
    (g,) = torch.autograd.grad(y.sum(), weights)
    c = table[0, 7] + table[0, 8] * table[0, 1]
    torch.testing.assert_close(g, torch.stack([m.sum(), m2.sum()]) * c)
    (a,) = leaves(x)
    y = genfast.diffusion_step(a, m, table)
    expanded = torch.autograd.grad(y, a, torch.ones(()).expand(x.shape), retain_graph=True)[0]
    c = table[0, 6] + table[0, 8] * table[0, 0]
    torch.testing.assert_close(expanded, torch.full_like(x, c))
    basis = torch.eye(120).view(120, 2, 3, 20)
    batched = torch.autograd.grad(y, a, basis, is_grads_batched=True)[0]
    torch.testing.assert_close(batched, basis * c)


# ---- roads ---------------------------------------------------------------------------------------


def test_compile_and_export():
    table = random_table(used=[0, 1, 2, 3, Z])

    def f(x, m, h, index):
        y, d = genfast.diffusion_step(x * 1.0, m, table, index, history=(h,), seed=3, outputs=2)
        return (y * d).sum()

    x, m, h = tensors((2, 3, 20), 3)
    index = torch.tensor([1, 3])
    a, b = leaves(x, m), leaves(x, m)
    want = torch.autograd.grad(f(*a, h, index), a)
    got = torch.autograd.grad(torch.compile(f, fullgraph=True)(*b, h, index), b)
    for w, g in zip(want, got, strict=True):
        torch.testing.assert_close(g, w)

    class Step(torch.nn.Module):
        def forward(self, x, m, index):
            return genfast.diffusion_step(x, m, table, index, noise=x, history=(m,), weights=None)

    program = torch.export.export(Step(), (x, m, index))
    assert torch.equal(program.module()(x, m, index), Step()(x, m, index))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    x, m, h = tensors((2, 3, 6), 3)
    if grad:
        x, m = leaves(x, m)
    table = random_table(used=[0, 1, 2, 3, Z])
    args = step_module.pack(
        x, m, table, torch.tensor([0, 2]), (h,), None, 5, 0, 0, None, None, None, "fixed", None,
        None, None, None, 2,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.genfast.diffusion_step, args)


def test_function_transforms():
    x, m = tensors((4, 3, 6), 2)
    table = random_table(used=[0, 1, 2])
    step = lambda x, m: genfast.diffusion_step(x, m, table, 1)  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(step)(x, m), step(x, m))
    tangent = torch.func.jvp(step, (x, m), (torch.ones_like(x), torch.zeros_like(m)))[1]
    inside = (table[1, 0] * x + table[1, 1] * m).abs() < 0.7
    want = table[1, 6] + table[1, 8] * table[1, 0] * inside
    torch.testing.assert_close(tangent, want.expand_as(x))
    meta = genfast.diffusion_step(x.to("meta"), m.to("meta"), table.to("meta"))
    assert meta.shape == x.shape and meta.device.type == "meta"
    assert torch.equal(
        genfast.diffusion_step(torch._neg_view(x), m, table), genfast.diffusion_step(-x, m, table)
    )


def test_inference_mode():
    x, m = tensors((2, 3, 6), 2)
    table = random_table(used=[0, 1, 2])
    want = genfast.diffusion_step(x, m, table)
    with torch.inference_mode():
        assert torch.equal(genfast.diffusion_step(x.clone(), m, table, out=x.clone()), want)


# ---- real plans ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm", "unipc", "pndm", "sa"])
def test_rows_of_real_plans(name):
    plan = {
        "ddim": lambda: S.ddim_plan(10, eta=0.5),
        "ddpm": lambda: S.ddpm_plan(10, clip=1.0),
        "dpm": lambda: S.dpm_solver_plan(10, order=3),
        "unipc": lambda: S.unipc_plan(10, order=3),
        "pndm": lambda: S.pndm_plan(10),
        "sa": lambda: S.sa_solver_plan(10),
    }[name]()
    table = torch.tensor(plan.table, dtype=torch.float32)
    x, m, z, *history = tensors((2, 3, 8, 8), 9)
    history = tuple(history)
    for r in range(len(plan)):
        got = genfast.diffusion_step(x, m, table, r, history=history, noise=z, outputs=3)
        truth = R.diffusion_step(
            x.double(),
            m.double(),
            plan.table[r],
            history=[h.double() for h in history],
            noise=z.double(),  # noqa: E501
        )
        coef = torch.tensor(plan.table[r])
        for g, t, s in zip(got, truth, scale_of(x, m, coef, [*history, z], 3), strict=True):
            judge(g, t, s)


# ---- properties ----------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_row(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    dtype = data.draw(st.sampled_from(FLOATS))
    used = data.draw(st.sets(st.integers(0, 9)))
    outputs = data.draw(st.integers(1, 3))
    clip = data.draw(st.sampled_from([0.3, math.inf]))
    seed = data.draw(st.integers(0, 10**6))
    table = random_table(rows=2, seed=seed, clip=clip, used=used)
    x, m, z, *history = tensors(shape, 9, dtype, seed)
    got = genfast.diffusion_step(x, m, table, 1, history=tuple(history), noise=z, outputs=outputs)
    truth = R.diffusion_step(
        x.double(), m.double(), table[1].double(), history=[h.double() for h in history],
        noise=z.double(), n_out=outputs,
    )  # fmt: skip
    scales = scale_of(x, m, table[1], [*history, z], outputs)
    for g, t, s in zip(got if outputs > 1 else (got,), truth, scales, strict=True):
        judge(g, t, s)


# ---- bad input -----------------------------------------------------------------------------------

X = torch.zeros(2, 3, 4)
T = random_table(used=[0, 1, 2])
BAD = [
    ("x no tensor", TypeError, "x:", lambda: genfast.diffusion_step([1.0], X, T)),
    ("x of ints", TypeError, "x:", lambda: genfast.diffusion_step(X.long(), X, T)),
    ("m of another shape", ValueError, "m:", lambda: genfast.diffusion_step(X, X[:1], T)),
    ("four models", TypeError, "m:", lambda: genfast.diffusion_step(X, (X,) * 4, T)),
    (
        "two models without weights",
        ValueError,
        "weights:",
        lambda: genfast.diffusion_step(X, (X, X), T),
    ),  # noqa: E501
    (
        "three weights for two",
        ValueError,
        "weights:",
        lambda: genfast.diffusion_step(X, (X, X), T, weights=(1.0, 2.0, 3.0)),
    ),  # noqa: E501
    (
        "weight NaN",
        ValueError,
        "weights:",
        lambda: genfast.diffusion_step(X, (X, X), T, weights=math.nan),
    ),  # noqa: E501
    (
        "table of another width",
        ValueError,
        "table:",
        lambda: genfast.diffusion_step(X, X, T[:, :30]),
    ),
    ("table of numpy", TypeError, "table:", lambda: genfast.diffusion_step(X, X, T.numpy())),
    ("row too large", ValueError, "row:", lambda: genfast.diffusion_step(X, X, T, 5)),
    ("row negative", ValueError, "row:", lambda: genfast.diffusion_step(X, X, T, -1)),
    ("row a float", TypeError, "row:", lambda: genfast.diffusion_step(X, X, T, 1.0)),
    (
        "row tensor out of range",
        ValueError,
        "row:",
        lambda: genfast.diffusion_step(X, X, T, torch.tensor([0, 9])),
    ),  # noqa: E501
    (
        "row tensor of another shape",
        ValueError,
        "row:",
        lambda: genfast.diffusion_step(X, X, T, torch.zeros(3, dtype=torch.long)),
    ),  # noqa: E501
    (
        "history missing",
        ValueError,
        "history:",
        lambda: genfast.diffusion_step(X, X, random_table(used=[0, 4])),
    ),  # noqa: E501
    (
        "history of another shape",
        ValueError,
        "history[0]:",
        lambda: genfast.diffusion_step(X, X, T, history=(X[:1],)),
    ),  # noqa: E501
    (
        "seven histories",
        ValueError,
        "history:",
        lambda: genfast.diffusion_step(X, X, T, history=(X,) * 7),
    ),  # noqa: E501
    ("noise missing", ValueError, "noise:", lambda: genfast.diffusion_step(X, X, noise_row())),
    (
        "noise of another shape",
        ValueError,
        "noise:",
        lambda: genfast.diffusion_step(X, X, T, noise=X[0]),
    ),  # noqa: E501
    (
        "noise and seed",
        ValueError,
        "noise:",
        lambda: genfast.diffusion_step(X, X, T, noise=X, seed=1),
    ),  # noqa: E501
    (
        "seeds of another batch",
        ValueError,
        "seed:",
        lambda: genfast.diffusion_step(X, X, T, seed=torch.zeros(3, dtype=torch.long)),
    ),  # noqa: E501
    (
        "offset negative",
        ValueError,
        "offset:",
        lambda: genfast.diffusion_step(X, X, T, seed=1, offset=-1),
    ),  # noqa: E501
    (
        "unknown variance",
        ValueError,
        "variance:",
        lambda: genfast.diffusion_step(X, X, T, variance="x"),
    ),  # noqa: E501
    (
        "variance without channels",
        ValueError,
        "m:",
        lambda: genfast.diffusion_step(X, X, T, variance="learned"),
    ),  # noqa: E501
    ("four outputs", ValueError, "outputs:", lambda: genfast.diffusion_step(X, X, T, outputs=4)),
    (
        "out of another shape",
        ValueError,
        "out:",
        lambda: genfast.diffusion_step(X, X, T, out=X[:1]),
    ),
    (
        "out expanded",
        ValueError,
        "out:",
        lambda: genfast.diffusion_step(X, X, T, out=X[:1].expand(2, 3, 4)),
    ),  # noqa: E501
    (
        "one out for two",
        ValueError,
        "out:",
        lambda: genfast.diffusion_step(X, X, T, outputs=2, out=X),
    ),  # noqa: E501
    (
        "one out twice",
        ValueError,
        "out: expected 2 different tensors",
        lambda: genfast.diffusion_step(X, X, T, outputs=2, out=(X, X)),
    ),  # noqa: E501
    (
        "2^31 outputs",
        ValueError,
        "outputs:",
        lambda: genfast.diffusion_step(X, X, T, outputs=2**31),
    ),
    ("known alone", ValueError, "mask, known:", lambda: genfast.diffusion_step(X, X, T, known=X)),
    (
        "level alone",
        ValueError,
        "known_noise, known_level:",
        lambda: genfast.diffusion_step(X, X, T, known_level=(1, 0)),
    ),
    ("mask alone", ValueError, "mask, known:", lambda: genfast.diffusion_step(X, X, T, mask=X)),
    (
        "mask of another shape",
        ValueError,
        "mask:",
        lambda: genfast.diffusion_step(X, X, T, mask=X[:, :2], known=X),
    ),  # noqa: E501
    (
        "level of three",
        ValueError,
        "known_level:",
        lambda: genfast.diffusion_step(X, X, T, mask=X, known=X, known_level=(1, 2, 3)),
    ),  # noqa: E501
    (
        "known without noise",
        ValueError,
        "known_noise:",
        lambda: genfast.diffusion_step(X, X, T, mask=X, known=X, known_level=(1, 2)),
    ),  # noqa: E501
    (
        "threshold of another batch",
        ValueError,
        "threshold:",
        lambda: genfast.diffusion_step(X, X, T, threshold=torch.ones(3)),
    ),  # noqa: E501
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("error, name, call", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(error, name, call, backend):
    with genfast.backend(backend), pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(name), caught.value


def test_out_and_gradient():
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="out:"):
        genfast.diffusion_step(x, X, T, out=torch.empty_like(X))
