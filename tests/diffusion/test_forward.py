"""Forward process and training loss, judged against the reference in float64. About 20 s."""

import math
from functools import partial

import pytest
import torch
from draws import draw
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast.ops.diffusion.loss import PREDICTIONS, WEIGHTINGS
from genfast.reference import diffusion as R
from genfast.schedulers import dpm_solver_plan

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def within(got, truth, scale, ulps=2.0):
    assert got.shape == truth.shape and torch.isfinite(got).all()
    info = torch.finfo(got.dtype)
    allowed = ulps * info.eps * torch.maximum(scale, truth.abs()) + info.smallest_normal
    excess = (got.double() - truth.double()).abs() - allowed
    assert not got.numel() or excess.max() <= 0, f"{excess.max().item():.3g} too far"


COEFFICIENTS = {
    "numbers": lambda b, n: (0.8, 0.6),
    "integers": lambda b, n: (1, 2),
    "0-dim": lambda b, n: (torch.tensor(0.8), torch.tensor(0.6)),
    "batch": lambda b, n: (torch.rand(b), torch.rand(b)),
    "batch fp64": lambda b, n: (torch.rand(b, dtype=torch.float64), torch.rand(b).double()),
    "mixed": lambda b, n: (0.5, torch.rand(b)),
    "tokens": lambda b, n: (torch.rand(b, n), torch.rand(b, n)),
    "tokens and batch": lambda b, n: (torch.rand(b), torch.rand(b, n)),
    "flow": lambda b, n: (None, torch.rand(b)),
}


def wide(c, x):
    c = torch.as_tensor(c, dtype=torch.float64)
    return R._like(c, x)


@pytest.mark.parametrize("kind", COEFFICIENTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_add_noise_and_velocity(kind, dtype):
    x, z = draw(3, 5, 67, seed=1, dtype=dtype), draw(3, 5, 67, seed=2, dtype=dtype)
    alpha, sigma = COEFFICIENTS[kind](3, 5)
    a = wide(1 - sigma if alpha is None else alpha, x)
    s = wide(sigma, x)
    truth = a * x.double() + s * z.double()
    scale = (a * x.double()).abs() + (s * z.double()).abs()
    within(genfast.add_noise(x, alpha, sigma, noise=z), truth, scale)
    if alpha is None:
        assert torch.equal(
            genfast.scale_noise(x, sigma, noise=z), genfast.add_noise(x, None, sigma, noise=z)
        )
        return
    truth = a * z.double() - s * x.double()
    scale = (a * z.double()).abs() + (s * x.double()).abs()
    within(genfast.velocity(x, alpha, sigma, noise=z), truth, scale)
    within(genfast.scale_model_input(x, alpha), a * x.double(), (a * x.double()).abs(), 1.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3, 33, 35), (3, 2051)], ids=str)
def test_noise_is_the_contract(shape, dtype):
    x = torch.zeros(shape, dtype=dtype)
    for kw in (dict(seed=7), dict(seed=7, stream=3, offset=5)):
        want = genfast.randn(shape, dtype=dtype, **kw)
        assert torch.equal(genfast.add_noise(x, 0.3, 1.0, **kw), want)
        assert torch.equal(genfast.velocity(x, 1.0, 0.3, **kw), want)
    if shape and shape[0]:
        seeds = torch.arange(shape[0]) + 5
        want = genfast.randn(shape, seed=seeds, dtype=dtype)
        assert torch.equal(genfast.add_noise(x, 0.3, 1.0, seed=seeds), want)


def test_noise_from_torch():
    x = draw(2, 3, 4)
    torch.manual_seed(0)
    a, b = genfast.add_noise(x, 0.5, 0.5), genfast.add_noise(x, 0.5, 0.5)
    torch.manual_seed(0)
    assert torch.equal(a, genfast.add_noise(x, 0.5, 0.5)) and not torch.equal(a, b)
    g = torch.Generator()
    c = genfast.add_noise(x, 0.5, 0.5, generator=g.manual_seed(3))
    assert torch.equal(c, genfast.add_noise(x, 0.5, 0.5, generator=g.manual_seed(3)))


def test_bf16_keeps_the_noise_of_small_steps():
    """Coefficients in bf16 lose the noise of the first timesteps altogether."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    t = torch.arange(20)
    x = torch.zeros(20, 64, dtype=torch.bfloat16)
    y = genfast.add_noise(x, alpha_bar.sqrt()[t], (1 - alpha_bar).sqrt()[t], seed=1)
    z = genfast.randn(20, 64, seed=1).double()
    want = (1 - alpha_bar).sqrt()[:20, None] * z
    within(y, want, want.abs(), 1.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_layouts_out_and_in_place(dtype):
    x = draw(2, 3, 8, 9, dtype=dtype)
    z = draw(2, 3, 8, 9, seed=4, dtype=dtype)
    want = genfast.add_noise(x, 0.8, 0.6, noise=z)
    drawn = genfast.add_noise(x, 0.8, 0.6, seed=4)
    channels = x.to(memory_format=torch.channels_last)
    got = genfast.add_noise(channels, 0.8, 0.6, noise=z)
    assert torch.equal(got, want) and got.stride() == channels.stride()
    assert torch.equal(genfast.add_noise(channels, 0.8, 0.6, seed=4), drawn)
    y = x.clone()
    assert genfast.add_noise(y, 0.8, 0.6, noise=z, out=y) is y
    assert torch.equal(y, want)
    out = torch.empty(2, 3, 9, 8, dtype=dtype).mT
    genfast.add_noise(x, 0.8, 0.6, noise=z, out=out)
    assert torch.equal(out, want)
    buffer = torch.cat([x.flatten(), x.new_zeros(3)])
    genfast.add_noise(buffer[:-3].view_as(x), 0.8, 0.6, noise=z, out=buffer[3:].view_as(x))
    assert torch.equal(buffer[3:].view_as(x), want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("function", ["add_noise", "velocity", "flow"])
def test_gradients(function, dtype):
    x, z, g = (draw(3, 4, 40, seed=i, dtype=dtype) for i in (1, 2, 3))
    sigma = torch.rand(3, generator=torch.Generator().manual_seed(0))
    alpha = (1 - sigma**2).sqrt()

    def run(dtype):
        a, b = x.detach().to(dtype).requires_grad_(), z.detach().to(dtype).requires_grad_()
        if function == "velocity":
            y = genfast.velocity(a, alpha, sigma, noise=b)
        else:
            y = genfast.add_noise(a, None if function == "flow" else alpha, sigma, noise=b)
        return torch.autograd.grad(y, (a, b), g.to(dtype))

    for got, truth in zip(run(dtype), run(torch.float64), strict=True):
        assert got.dtype == dtype
        within(got, truth, truth.abs())


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_one_coefficient_of_16_bit_is_widened(dtype):
    x, alpha = draw(3, 4).requires_grad_(), torch.tensor([0.75], dtype=dtype)
    x0 = draw(3, 4, seed=5)
    for call in (genfast.add_noise, partial(genfast.denoising_loss, x)):
        given = x if call is genfast.add_noise else x0
        got, want = (call(given, a, 0.5, seed=3) for a in (alpha, 0.75))
        assert torch.equal(got, want)
        got, want = (torch.autograd.grad(y.sum(), x)[0] for y in (got, want))
        assert torch.equal(got, want)


def test_gradients_of_gradients_and_of_coefficients():
    x, z = (draw(2, 3, 4, seed=i, dtype=torch.float64).requires_grad_() for i in (1, 2))
    a, s = (torch.rand(2, dtype=torch.float64).requires_grad_() for _ in range(2))
    for f in (
        lambda x, z, a, s: genfast.add_noise(x, a, s, noise=z),
        lambda x, z, a, s: genfast.velocity(x, a, s, noise=z),
        lambda x, z, a, s: genfast.scale_model_input(x * z, a * s),
        lambda x, z, a, s: genfast.denoising_loss(
            x, z, a, s, seed=3, prediction="v_prediction", weighting="min_snr"
        ),  # noqa: E501
        lambda x, z, a, s: genfast.denoising_loss(
            x, z, None, s, seed=3, prediction="flow_prediction", weighting=a, reduction="none"
        ),  # noqa: E501
    ):
        assert torch.autograd.gradcheck(f, (x, z, a, s))
        assert torch.autograd.gradgradcheck(f, (x, z, a, s))
    x = draw(2, 3, seed=1).requires_grad_()
    alpha = torch.rand(2).requires_grad_()
    y = genfast.add_noise(x, alpha, 0.5, seed=1)
    found = torch.autograd.grad(y.sum(), (x, alpha))
    torch.testing.assert_close(found[1], x.detach().sum(1))
    torch.testing.assert_close(found[0], alpha.detach()[:, None].expand(2, 3))


# ---- loss ----------------------------------------------------------------------------------------


def loss_inputs(dtype, shape=(3, 4, 301), seed=0):
    output, x0, z = (draw(*shape, seed=seed + i, dtype=dtype) for i in range(3))
    sigma = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.05
    return output, x0, z, (1 - sigma**2).sqrt(), sigma


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_against_fp64(prediction, weighting):
    for dtype in FLOATS:
        output, x0, z, alpha, sigma = loss_inputs(dtype)
        given = torch.rand(3) if weighting == "given" else None
        options = {"min_snr": dict(gamma=4.0), "p2": dict(gamma=1.5, k=0.7)}.get(weighting, {})
        kw = dict(prediction=prediction, weighting=weighting if given is None else given, **options)
        for reduction in ("none", "sum", "mean"):
            for noise in (dict(noise=z), dict(seed=5, stream=2)):
                eps = z if "noise" in noise else genfast.randn(output.shape, seed=5, stream=2)
                wide_out = output.double().requires_grad_()
                truth = R.denoising_loss(
                    wide_out, x0.double(), eps.double(), alpha.double(), sigma.double(),
                    prediction=prediction, weighting="none" if given is not None else weighting,
                    reduction="none", **options,
                )  # fmt: skip
                truth = truth if given is None else truth * given
                truth = {"none": truth, "sum": truth.sum(), "mean": truth.mean()}[reduction]
                g = torch.full_like(truth, 0.7)
                (g_truth,) = torch.autograd.grad(truth, wide_out, g)
                leaf = output.detach().requires_grad_()
                got = genfast.denoising_loss(
                    leaf, x0, alpha, sigma, reduction=reduction, **kw, **noise
                )
                assert got.dtype == torch.float32
                torch.testing.assert_close(got.double(), truth.detach(), rtol=3e-6, atol=0)
                with torch.no_grad():
                    again = genfast.denoising_loss(
                        output, x0, alpha, sigma, reduction=reduction, **kw, **noise
                    )
                    assert torch.equal(again, got)
                (g_got,) = torch.autograd.grad(got, leaf, g.float())
                assert g_got.dtype == dtype
                within(g_got, g_truth, g_truth.abs() + g_truth.abs().mean(), ulps=4)


def test_loss_matches_what_add_noise_did():
    """A model that knows the noise has no loss, whatever it predicts."""
    x0 = draw(4, 3, 9, 9)
    sigma = torch.tensor([0.1, 0.5, 0.9, 0.7])
    alpha = (1 - sigma**2).sqrt()
    seeds = torch.tensor([4, 7, 4, 9])
    eps = genfast.randn(x0.shape, seed=seeds, stream=1)
    exact = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": genfast.velocity(x0, alpha, sigma, seed=seeds, stream=1),
        "flow_prediction": eps - x0,
    }
    for prediction, output in exact.items():
        loss = genfast.denoising_loss(
            output, x0, alpha, sigma, seed=seeds, stream=1, prediction=prediction
        )
        assert loss == 0


@pytest.mark.parametrize("prediction", ["v_prediction", "flow_prediction"])
@pytest.mark.parametrize("flow", [True, False])
def test_one_coefficient_of_many_dimensions(flow, prediction):
    """Gradients through it and past it, as through a number."""
    x0, output = draw(4, 6, seed=1), draw(4, 6, seed=2)

    def run(shape):
        leaves = [t.clone().requires_grad_() for t in (output, x0, torch.full(shape, 0.4))]
        alpha = None if flow else torch.full(shape, 0.6)
        loss = genfast.denoising_loss(*leaves[:2], alpha, leaves[2], seed=1, prediction=prediction)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return loss, *(torch.zeros(()) if g is None else g.reshape(-1) for g in found)

    for a, b in zip(run((1, 1, 1)), run(()), strict=True):
        torch.testing.assert_close(a, b)


def test_loss_per_sample_and_layout():
    output, x0, _, alpha, sigma = loss_inputs(torch.float32, (2, 3, 20, 21))
    kw = dict(seed=3, prediction="v_prediction", weighting="min_snr")
    mean, each = genfast.denoising_loss(output, x0, alpha, sigma, return_per_sample=True, **kw)
    torch.testing.assert_close(each.mean(), mean)
    last = torch.channels_last
    other = genfast.denoising_loss(
        output.to(memory_format=last), x0.to(memory_format=last), alpha, sigma, **kw
    )
    assert torch.equal(mean, other)
    torch.set_num_threads(1)
    assert torch.equal(mean, genfast.denoising_loss(output, x0, alpha, sigma, **kw))
    torch.set_num_threads(2)
    leaf = output.detach().requires_grad_()
    mean, each = genfast.denoising_loss(leaf, x0, alpha, sigma, return_per_sample=True, **kw)
    (g,) = torch.autograd.grad(mean + each.sum(), leaf)
    (g1,) = torch.autograd.grad(genfast.denoising_loss(leaf, x0, alpha, sigma, **kw), leaf)
    torch.testing.assert_close(g, 3 * g1)


def test_nothing_expanded():
    """Strides of 0 say nothing about a tensor without elements, nor about what is made like it."""
    x = torch.zeros(1, 0).expand(5, 0).requires_grad_()
    y = genfast.add_noise(x, 0.5, 0.5, seed=1)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == g.shape == (5, 0)
    assert genfast.add_noise(x.detach(), 0.5, 0.5, seed=1, out=x.detach()).shape == (5, 0)


@pytest.mark.parametrize("cols", [1, 2, 7, 20, 33, 508])
def test_short_rows_are_as_alone(cols):
    """Several in one chunk, coefficients of zero among them: to the bit, and NaN is not read."""
    B = 1100 if cols < 8 else 130
    x0, z, output = (draw(B, cols, seed=i) for i in (1, 2, 3))
    alpha, sigma, g = draw(B, seed=4).abs(), draw(B, seed=5).abs(), draw(B, seed=6)
    alpha[5], sigma[7], x0[5], z[7] = 0.0, 0.0, math.nan, math.nan
    seeds = torch.arange(B) * 2**40 - 9

    def run(at, noise):
        a, s, x = alpha[at], sigma[at], x0[at]
        mixes = [genfast.add_noise(x, a, s, **noise), genfast.scale_noise(x, s, **noise)]
        if "noise" in noise:
            mixes.append(genfast.velocity(x, a.double(), s.double(), **noise))
        for prediction in PREDICTIONS:
            o = output[at].clone().requires_grad_()
            loss = genfast.denoising_loss(
                o, x, a, s, **noise, prediction=prediction, weighting="min_snr", reduction="none"
            )
            mixes += loss, *torch.autograd.grad(loss, o, g[at])
        return [*mixes, genfast.scale_model_input(x, s)]

    for kind in (
        lambda b: {"seed": seeds[b : b + 1] if b is not None else seeds},
        lambda b: {"seed": 3, "offset": (b or 0) * cols},
        lambda b: {"noise": z[b : b + 1] if b is not None else z},
    ):
        whole = run(slice(None), kind(None))
        assert whole[0][5].isfinite().all()
        assert whole[0][7].isfinite().all()
        for b in (0, 1, 5, 7, 41, B - 1):
            for alone, all_of_them in zip(run(slice(b, b + 1), kind(b)), whole, strict=True):
                assert torch.equal(alone[0].nan_to_num(9), all_of_them[b].nan_to_num(9))


@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (1, 4, 6, 5), (3, 1, 6, 5), (2, 4, 1, 5)], ids=str)
def test_channels_inside_are_walked_as_they_lie(shape):
    """The bits of contiguous tensors, whichever of them lie so."""
    x, z, known = (draw(*shape, seed=i) for i in (1, 2, 3))
    alpha, sigma = draw(shape[0], seed=4), draw(shape[0], seed=5)
    mask = draw(1, 1, *shape[2:], seed=6).sigmoid().expand(shape)
    table = dpm_solver_plan(8).table_on()

    def run(x, z, known, mask):
        yield genfast.velocity(x, alpha, sigma, noise=z)
        yield genfast.scale_noise(x, sigma, noise=z)
        yield genfast.guide(x, z, 3.0)
        yield genfast.guide(x, z, sigma)
        yield genfast.guide(x, z, sigma, method="rescale", rescale=0.7)
        yield genfast.diffusion_step(x, z, table, 3, history=(known,))
        yield genfast.diffusion_step(x, (z, known), table, 0, weights=2.0)
        yield genfast.diffusion_step(x, z, table, 0, mask=mask, known=known, known_noise=x)
        yield genfast.diffusion_step(x, z, table, torch.arange(shape[0]), history=(known,))

    def inside(t):
        return t.contiguous(memory_format=torch.channels_last)

    plain = list(run(x, z, known, mask.contiguous()))
    for found in (
        run(inside(x), inside(z), inside(known), inside(mask)),
        run(inside(x), inside(z), inside(known), mask),
        run(inside(x), z, known, mask),
        run(x, inside(z), known, mask),
    ):
        for a, b in zip(found, plain, strict=True):
            assert torch.equal(a, b)


def test_coefficients_of_tokens_and_seeds_of_samples():
    """Short rows that are parts of what shares a seed."""
    x0, alpha, sigma = draw(9, 11, 3, seed=1), draw(9, 11, seed=2), draw(9, 11, seed=3)
    seeds = torch.arange(9)
    whole = genfast.add_noise(x0, alpha, sigma, seed=seeds)
    for b in range(9):
        for t in (0, 5, 10):
            one = genfast.add_noise(x0[b, t], alpha[b, t], sigma[b, t], seed=b, offset=3 * t)
            assert torch.equal(one, whole[b, t])


def test_zero_terminal_snr():
    """alpha = 0: the limit of the weights, no NaN."""
    output, x0, *_ = loss_inputs(torch.float32)
    for prediction in PREDICTIONS:
        for backend in ("auto", "reference"):
            with genfast.backend(backend):
                loss = genfast.denoising_loss(
                    output, x0, 0.0, 1.0, seed=1, prediction=prediction, weighting="min_snr"
                )
            assert math.isfinite(loss)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_keeps_nan(prediction):
    output, x0, _, alpha, sigma = loss_inputs(torch.float32)
    for a, s in ((alpha * math.nan, sigma), (alpha, sigma * math.nan)):
        loss = genfast.denoising_loss(
            output, x0, a, s, seed=1, prediction=prediction, weighting="min_snr"
        )
        assert math.isnan(loss)


# ---- roads ---------------------------------------------------------------------------------------


def test_compile_export_and_transforms():
    output, x0, _, alpha, sigma = loss_inputs(torch.float32, (3, 4, 10))

    def f(output, x0, alpha, sigma):
        x_t = genfast.add_noise(x0, alpha, sigma, seed=3)
        y = genfast.velocity(x_t, alpha, sigma, seed=4) * genfast.scale_model_input(output, alpha)
        return genfast.denoising_loss(y, x0, alpha, sigma, seed=3, weighting="min_snr")

    leaves = [t.detach().requires_grad_() for t in (output,)]
    want = torch.autograd.grad(f(leaves[0], x0, alpha, sigma), leaves)
    got = torch.autograd.grad(torch.compile(f, fullgraph=True)(leaves[0], x0, alpha, sigma), leaves)
    torch.testing.assert_close(got, want)

    class Module(torch.nn.Module):
        def forward(self, *args):
            return f(*args)

    program = torch.export.export(Module(), (output, x0, alpha, sigma))
    torch.testing.assert_close(
        program.module()(output, x0, alpha, sigma), f(output, x0, alpha, sigma)
    )
    g = torch.func.grad(f)(output, x0, alpha, sigma)
    torch.testing.assert_close(g, want[0])
    z = draw(*x0.shape, seed=9)
    noisy = lambda x, z, s: genfast.add_noise(x, None, s, noise=z)  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(noisy)(x0, z, sigma), noisy(x0, z, sigma))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    output, x0, z, alpha, sigma = loss_inputs(torch.float32, (2, 3, 4))
    if grad:
        output, x0 = output.requires_grad_(), x0.requires_grad_()
    ops = torch.ops.genfast
    torch.library.opcheck(ops.diffusion_mix, (x0, None, alpha, sigma, None, 3, 0, 0, True, 1, 1))
    torch.library.opcheck(ops.diffusion_mix, (x0, z, None, sigma, None, 3, 0, 0, False, 1, 1))
    torch.library.opcheck(
        ops.denoising_loss,
        (output, x0.detach(), None, alpha, sigma, None, None, 3, 0, 0, 2, 1, 5.0, 1.0, 2),
    )


@given(st.data())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_any_shape(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    dtype = data.draw(st.sampled_from(FLOATS))
    depth = data.draw(st.integers(0, len(shape)))
    seed = data.draw(st.integers(-(2**63), 2**64 - 1))
    stream = data.draw(st.integers(0, 2**64 - 1))
    x = draw(*shape, seed=depth, dtype=dtype)
    alpha, sigma = torch.rand(shape[:depth]), torch.rand(shape[:depth])
    z = genfast.randn(shape, seed=seed, stream=stream)
    got = genfast.add_noise(x, alpha, sigma, seed=seed, stream=stream)
    a, s = wide(alpha, x), wide(sigma, x)
    scale = (a * x.double()).abs() + (s * z.double()).abs()
    within(got, a * x.double() + s * z.double(), scale)


# ---- bad input -----------------------------------------------------------------------------------

X = torch.zeros(2, 3, 4)
HALF = torch.full((2,), 0.5)
BAD = [
    ("x0 no tensor", TypeError, "x0:", lambda: genfast.add_noise([1.0], 0.5, 0.5)),
    ("x0 of ints", TypeError, "x0:", lambda: genfast.add_noise(X.long(), 0.5, 0.5)),
    (
        "alpha of another batch",
        ValueError,
        "alpha:",
        lambda: genfast.add_noise(X, torch.ones(3), 0.5),
    ),
    ("alpha a string", TypeError, "alpha:", lambda: genfast.add_noise(X, "1", 0.5)),
    ("alpha infinite", ValueError, "alpha:", lambda: genfast.add_noise(X, math.inf, 0.5)),
    ("sigma None", TypeError, "sigma:", lambda: genfast.add_noise(X, None, None)),
    ("velocity without sigma", TypeError, "sigma:", lambda: genfast.velocity(X, 0.5, None)),
    ("sigma NaN", ValueError, "sigma:", lambda: genfast.add_noise(X, 0.5, math.nan)),
    ("sigma of ints", TypeError, "sigma:", lambda: genfast.add_noise(X, 0.5, torch.ones(2).long())),
    (
        "noise of another shape",
        ValueError,
        "noise:",
        lambda: genfast.add_noise(X, 0.5, 0.5, noise=X[0]),
    ),
    (
        "noise and seed",
        ValueError,
        "noise:",
        lambda: genfast.add_noise(X, 0.5, 0.5, noise=X, seed=1),
    ),
    ("seed a float", TypeError, "seed:", lambda: genfast.add_noise(X, 0.5, 0.5, seed=1.0)),
    ("out of another shape", ValueError, "out:", lambda: genfast.add_noise(X, 0.5, 0.5, out=X[0])),
    ("velocity without alpha", TypeError, "alpha:", lambda: genfast.velocity(X, None, 0.5)),
    ("scale None", TypeError, "scale:", lambda: genfast.scale_model_input(X, None)),
    (
        "scale of another batch",
        ValueError,
        "scale:",
        lambda: genfast.scale_model_input(X, torch.ones(3)),
    ),  # noqa: E501
    ("loss without noise", ValueError, "seed:", lambda: genfast.denoising_loss(X, X, HALF, HALF)),
    (
        "loss of two shapes",
        ValueError,
        "x0:",
        lambda: genfast.denoising_loss(X, X[0], HALF, HALF, seed=1),
    ),  # noqa: E501
    (
        "loss of nothing",
        ValueError,
        "model_output:",
        lambda: genfast.denoising_loss(X[:0], X[:0], 0.5, 0.5, seed=1),
    ),  # noqa: E501
    (
        "unknown prediction",
        ValueError,
        "prediction:",
        lambda: genfast.denoising_loss(X, X, HALF, HALF, seed=1, prediction="x"),
    ),  # noqa: E501
    (
        "unknown weighting",
        ValueError,
        "weighting:",
        lambda: genfast.denoising_loss(X, X, HALF, HALF, seed=1, weighting="given"),
    ),  # noqa: E501
    (
        "unknown reduction",
        ValueError,
        "reduction:",
        lambda: genfast.denoising_loss(X, X, HALF, HALF, seed=1, reduction="max"),
    ),  # noqa: E501
    (
        "sigma per token",
        ValueError,
        "sigma:",
        lambda: genfast.denoising_loss(X, X, 0.5, torch.ones(2, 3), seed=1),
    ),  # noqa: E501
    (
        "loss of a number",
        ValueError,
        "model_output:",
        lambda: genfast.denoising_loss(X[0, 0, 0], X[0, 0, 0], 0.5, 0.5, seed=1),
    ),
    (
        "gamma NaN",
        ValueError,
        "gamma:",
        lambda: genfast.denoising_loss(X, X, HALF, HALF, seed=1, gamma=math.nan),
    ),
    *(
        (
            f"{weighting} {name} {value}",
            ValueError,
            f"{name}:",
            lambda weighting=weighting, more={name: value}: genfast.denoising_loss(
                X, X, HALF, HALF, seed=1, weighting=weighting, **more
            ),
        )
        for weighting, name, value in [
            ("min_snr", "gamma", -1),
            ("min_snr", "gamma", 0.0),
            ("min_snr", "gamma", math.inf),
            ("p2", "k", -1.0),
            ("p2", "gamma", math.nan),
        ]
    ),
    *(
        (
            f"seed {seed!r}",
            TypeError,
            "seed:",
            lambda seed=seed: genfast.denoising_loss(X, X, HALF, HALF, seed=seed),
        )
        for seed in ([], "", 0.0, False)
    ),
    ("sigma missing", TypeError, "sigma:", lambda: genfast.denoising_loss(X, X, 0.5, None, seed=1)),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("error, name, call", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(error, name, call, backend):
    with genfast.backend(backend), pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(name), caught.value
