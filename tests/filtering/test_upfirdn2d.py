"""upfirdn2d and its helpers: scipy's upfirdn, the reference in fp64, gradients, tracing, errors."""

import numpy as np
import pytest
import torch
from scipy import signal
from tolerances import REORDERED, yardstick
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

import genfast
from genfast.reference import filtering as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FILTERS = {
    "one tap": torch.ones(1, 1),
    "1331": genfast.setup_filter([1, 3, 3, 1]),
    "12 taps, 1-d": genfast.setup_filter(list(range(1, 13))),
    "any 2-d": torch.tensor([[1.0, 2.0, 0.0], [-1.0, 3.0, 0.5]]),
    "signs": genfast.setup_filter([-1, 2, 5], normalize=False),
}
# up, down, padding: along W and H alike, or each its own
WAYS = {
    "same": (1, 1, (1, 2, 2, 1)),
    "up": (2, 1, (2, 1, 2, 1)),
    "down": (1, 2, (1, 1, 1, 1)),
    "up 3, down 2": (3, 2, (4, 5, 6, 7)),
    "axes": ((2, 1), (1, 3), (3, 0, 4, 4)),
    "cropped": (2, 1, (-1, 3, 2, -2)),
    "cropped before": (1, 1, (-3, 9, -4, 12)),
}
# Planes that go whole, rows of a large plane, and a row longer than a chunk.
SHAPES = {"small": (2, 3, 12, 13), "one row": (1, 2, 6, 300), "large": (1, 2, 150, 170)}


def randn(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(n):
    return (n, n) if isinstance(n, int) else n


def truth(x, f, up, down, padding, flip=False, gain=1.0):
    return reference.upfirdn2d(x, f, pair(up), pair(down), padding, flip, gain)


@pytest.mark.parametrize("up", [1, 2, 3])
@pytest.mark.parametrize("down", [1, 2, 3])
def test_the_full_convolution_is_scipys(up, down):
    """A signal along W, padded by all that the filter reaches."""
    x, h = randn(1, 1, 1, 25), np.array([0.5, -1.0, 2.0, 0.25])
    f = torch.tensor(h[None], dtype=torch.float32)
    got = genfast.upfirdn2d(x, f, up=(up, 1), down=(down, 1), padding=(3, 3 - (up - 1), 0, 0))
    want = torch.from_numpy(signal.upfirdn(h, x[0, 0, 0].double().numpy(), up, down))
    torch.testing.assert_close(got[0, 0, 0].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("taps", FILTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient(shape, taps, way, dtype):
    up, down, padding = WAYS[way]
    f, size = FILTERS[taps], SHAPES[shape]
    if taps == "12 taps, 1-d":
        padding = tuple(p + 6 for p in padding)
    flip = taps == "any 2-d" and way == "up"
    x = randn(*size, dtype=dtype)
    leaf = x.clone().requires_grad_()
    y = genfast.upfirdn2d(leaf, f, up=up, down=down, padding=padding, flip_filter=flip, gain=1.5)
    grad = randn(*y.shape, seed=2, dtype=dtype)
    (dx,) = torch.autograd.grad(y, leaf, grad)

    def plain(to):
        v = x.to(to).requires_grad_()
        out = (
            truth(v, f, up, down, padding, flip, 1.5)
            if to != torch.float64
            else truth(v, f.double(), up, down, padding, flip, 1.5)
        )
        return out.detach(), *torch.autograd.grad(out, v, grad.to(to))

    eager, exact = plain(dtype), plain(torch.float64)
    yardstick(f"{taps}, {way}", y.detach(), eager[0], exact[0])
    yardstick(f"{taps}, {way}, dx", dx, eager[1], exact[1], kind="gradient")
    inner = x.contiguous(memory_format=torch.channels_last)
    other = genfast.upfirdn2d(
        inner, f, up=up, down=down, padding=padding, flip_filter=flip, gain=1.5
    )
    assert other.is_contiguous(memory_format=torch.channels_last)
    yardstick(f"{taps}, {way}, channels last", other, eager[0], exact[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_threads_change_no_bit(shape):
    x, f = randn(8, *SHAPES[shape][1:]), FILTERS["1331"]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(genfast.upfirdn2d(x, f, up=2, padding=(2, 1, 2, 1)))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_not_a_number_stays_where_the_filter_reaches():
    x = torch.zeros(1, 2, 12, 12)
    x[0, 0, 5, 5] = torch.nan
    y = genfast.upfirdn2d(x, FILTERS["1331"], padding=(2, 1, 2, 1))
    assert y.isnan().sum() == 16 and not y[0, 1].isnan().any()


# ---- gradients of any order ----------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("taps", ["1331", "any 2-d"])
def test_gradcheck_in_fp64(way, taps):
    up, down, padding = WAYS[way]
    x = randn(1, 2, 5, 6).double().requires_grad_()

    def call(x, f):
        return genfast.upfirdn2d(x, f, up=up, down=down, padding=padding, gain=2.0)

    f = FILTERS[taps].double().requires_grad_()
    assert gradcheck(call, (x, f), check_forward_ad=True)
    assert gradgradcheck(call, (x, f))


@pytest.mark.parametrize("way", WAYS)
def test_the_kernels_gradient_has_a_gradient(way):
    """<dx(g), v> differentiated by g is upfirdn2d(v): fp32, through the kernel twice."""
    up, down, padding = WAYS[way]
    f, x = FILTERS["1331"], randn(2, 3, 12, 13).requires_grad_()

    def call(x):
        return genfast.upfirdn2d(x, f, up=up, down=down, padding=padding)

    y = call(x)
    g, v = randn(*y.shape, seed=2).requires_grad_(), randn(*x.shape, seed=3)
    (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
    (back,) = torch.autograd.grad((dx * v).sum(), g)
    torch.testing.assert_close(back, call(v), rtol=1e-5, atol=1e-5)


def test_a_learned_filter_has_a_gradient():
    x, f = randn(2, 3, 12, 13), FILTERS["any 2-d"].clone().requires_grad_()
    (df,) = torch.autograd.grad(genfast.upfirdn2d(x, f, up=2, padding=2).square().sum(), f)
    exact = FILTERS["any 2-d"].double().requires_grad_()
    y = truth(x.double(), exact, 2, 1, (2, 2, 2, 2))
    (want,) = torch.autograd.grad(y.square().sum(), exact)
    torch.testing.assert_close(df.double(), want, rtol=1e-4, atol=1e-3)


def test_forward_mode_and_vmap():
    x, t, f = randn(2, 3, 8, 8), randn(2, 3, 8, 8, seed=2), FILTERS["1331"]
    call = lambda x: genfast.upfirdn2d(x, f, up=2, padding=(2, 1, 2, 1))  # noqa: E731
    _, dy = torch.func.jvp(call, (x,), (t,))
    torch.testing.assert_close(dy, call(t), rtol=1e-5, atol=1e-6)
    got = torch.vmap(call)(torch.stack([x, t]))
    torch.testing.assert_close(got, torch.stack([call(x), call(t)]), rtol=1e-5, atol=1e-6)


# ---- tracing -------------------------------------------------------------------------------------


def test_compile_is_the_same_with_its_gradient():
    x, f = randn(2, 3, 8, 8).requires_grad_(), FILTERS["1331"]

    def call(x):
        return genfast.downsample2d(genfast.upsample2d(x, f).square(), f)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    y, other = compiled(x), call(x)
    torch.testing.assert_close(y, other, **REORDERED[torch.float32])
    torch.testing.assert_close(
        *(torch.autograd.grad(v.sum(), x)[0] for v in (y, other)), **REORDERED[torch.float32]
    )


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x):
            return genfast.upsample2d(genfast.bias_act(x, act="lrelu"), FILTERS["1331"])

    x = randn(2, 3, 8, 8)
    program = torch.export.export(Module(), (x,))
    assert any("genfast" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), Module()(x), rtol=0, atol=0)


def test_a_traced_gradient_is_computed():
    """By the op, which a tracer sees; the kernel behind its back left memory as it came."""
    f, x = FILTERS["1331"], torch.randn(1, 2, 8, 8)

    def grad(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(genfast.upsample2d(x, f).square().sum(), x)[0]

    traced = make_fx(grad)(x)
    other = torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(traced(other), grad(other))


def test_opcheck():
    x, f = randn(2, 3, 8, 8).requires_grad_(), FILTERS["1331"]
    args = (x, f, [2, 1], [1, 2], [2, 1, -1, 3], False, 1.5)
    torch.library.opcheck(torch.ops.genfast.upfirdn2d.default, args)


# ---- helpers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_negative_gain(backend, dtype):
    """Of (n,) taps too, on every road."""
    x, f = torch.ones(1, 1, 4, 4, dtype=dtype), torch.ones(3)
    options = {"padding": 1, "gain": -1.0, "backend": backend}
    assert genfast.upfirdn2d(x, f, **options)[0, 0, 1, 1] == -9
    assert genfast.upfirdn2d(x, f.clone().requires_grad_(), **options)[0, 0, 1, 1] == -9
    assert torch.vmap(lambda x: genfast.upfirdn2d(x, f, **options))(x[None])[0, 0, 0, 1, 1] == -9
    assert genfast.filter2d(x, f, gain=-1.0, backend=backend)[0, 0, 1, 1] == -9
    assert genfast.upsample2d(x, f, gain=-1.0, backend=backend).min() == -16


def test_modules_keep_their_taps_in_fp32():
    taps = [0.1, 0.7, 0.2]  # none of which 16 bits hold
    for kind, of in (("Upsample2d", genfast.upsample2d), ("Downsample2d", genfast.downsample2d)):
        module, f = getattr(genfast.nn, kind)(2, taps), genfast.setup_filter(taps)
        for dtype in (*DTYPES, torch.float64):
            x = randn(1, 2, 8, 8).to(dtype)
            assert torch.equal(module.to(dtype)(x), of(x, f)) and torch.equal(module.f, f)
        f = module.to("meta").f
        assert f.is_meta and f.dtype == torch.float32
        assert module.to_empty(device="cpu").f.dtype == torch.float32


def test_setup_filter():
    f = genfast.setup_filter([1, 3, 3, 1])
    assert f.shape == (4, 4) and f.dtype == torch.float32
    torch.testing.assert_close(f.sum(), torch.tensor(1.0))
    torch.testing.assert_close(f[0], torch.tensor([1.0, 3.0, 3.0, 1.0]) / 64)
    assert genfast.setup_filter(list(range(1, 9))).shape == (8,)
    assert genfast.setup_filter([1, 2], separable=True).shape == (2,)
    assert torch.equal(genfast.setup_filter(None), torch.ones(1, 1))
    assert torch.equal(genfast.setup_filter([1, 2], normalize=False, gain=3.0, flip_filter=True),
                       3 * torch.tensor([[4.0, 2.0], [2.0, 1.0]]))  # fmt: skip


@pytest.mark.parametrize("taps", ["1331", "12 taps, 1-d", "any 2-d"])
def test_resampling_keeps_a_constant_and_the_size(taps):
    """Where an up-sampled constant has ripples, it has its mean over whole periods."""
    f = FILTERS[taps] / (FILTERS[taps].sum() if FILTERS[taps].dim() == 2 else 1)
    x = torch.ones(1, 2, 64, 64)
    for y, size, edge in (
        (genfast.upsample2d(x, f), 128, 24),
        (genfast.downsample2d(x, f), 32, 8),
        (genfast.filter2d(x, f), 64, 16),
        (genfast.upsample2d(x, f, up=3), 192, 24),
    ):
        assert y.shape == (1, 2, size, size)
        inside = y[:, :, edge:-edge, edge:-edge]
        inside = inside.mean((2, 3)) if size > 64 else inside
        torch.testing.assert_close(inside, torch.ones_like(inside), rtol=2e-5, atol=0)


# Options and what they give of x and a filter (fh, fw): one place, one tap a place, padding alone.
FAR = {
    "down": ({"down": 2**31, "padding": 1}, lambda x, f: truth(x, f, 1, 1, (1,) * 4)[..., :1, :1]),
    "up": ({"up": 2**31, "down": 2**31}, lambda x, f: x * f[-1, -1]),
    "padding": ({"padding": (2**31 - 9, 9 - 2**31, 0, 3)},
                lambda x, f: torch.zeros_like(truth(x, f, 1, 1, (0, 0, 0, 3)))),
}  # fmt: skip


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize("taps", ["1331", "any 2-d"])
def test_memory_follows_the_sizes_of_the_images(taps, name):
    """Not those of up, down and the padding: gigabytes of zeros around a row, of which no output
    sees one, and products of sizes that leave 64 bits."""
    x, f = randn(400, 3, 9, 8), FILTERS[taps]
    options, expected = FAR[name]
    want = expected(x, f if f.dim() == 2 else f.outer(f))
    torch.testing.assert_close(genfast.upfirdn2d(x, f, **options), want, rtol=1e-4, atol=1e-5)


def test_cropping_beyond_the_image():
    x, f = randn(2, 3, 6, 7), FILTERS["any 2-d"]
    y = genfast.upfirdn2d(x, f, padding=(-9, 11, -8, 10))
    with genfast.backend("reference"):
        other = genfast.upfirdn2d(x, f, padding=(-9, 11, -8, 10))
    assert y.shape == other.shape and (y == 0).all() and (other == 0).all()


# ---- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (TypeError, "x: ", ([1.0], None), {}),
        (ValueError, r"x: expected images \(N, C, H, W\)", (torch.zeros(2, 3), None), {}),
        (ValueError, "x: expected images", (torch.zeros(1, 0, 4, 4), torch.ones(2)), {}),
        (TypeError, "f: ", (torch.zeros(1, 1, 4, 4), [1.0]), {}),
        (ValueError, r"f: expected shape \(fh, fw\)",
         (torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 1)), {}),
        (ValueError, "up: expected", (torch.zeros(1, 1, 4, 4), None), {"up": 0}),
        (ValueError, "down: expected an int or two", (torch.zeros(1, 1, 4, 4), None),
         {"down": (1, 2, 3)}),
        (TypeError, "up: ", (torch.zeros(1, 1, 4, 4), None), {"up": 1.5}),
        (ValueError, "padding: expected an int, two", (torch.zeros(1, 1, 4, 4), None),
         {"padding": (1, 2, 3)}),
        (ValueError, "padding: expected the padded image to hold", (torch.zeros(1, 1, 4, 4), None),
         {"padding": -2}),
        (TypeError, "flip_filter: ", (torch.zeros(1, 1, 4, 4), None), {"flip_filter": 1}),
        (TypeError, "gain: ", (torch.zeros(1, 1, 4, 4), None), {"gain": torch.tensor(1.0)}),
        (TypeError, "gain: ", (torch.zeros(1, 1, 4, 4), torch.ones(2)),
         {"gain": torch.tensor(1.0)}),
    ],
)  # fmt: skip
def test_wrong_input_names_the_argument(error, message, args, options):
    with pytest.raises(error, match=message):
        genfast.upfirdn2d(*args, **options)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "f: expected numbers", lambda: genfast.setup_filter("blur")),
        (ValueError, "f: expected at most two dim", lambda: genfast.setup_filter([[[1.0]]])),
        (ValueError, "f: expected taps with a sum", lambda: genfast.setup_filter([1, -1])),
        (ValueError, "separable: ", lambda: genfast.setup_filter([[1.0]], separable=True)),
        (ValueError, "gain: ", lambda: genfast.setup_filter([1, 2], separable=True, gain=-1.0)),
        (TypeError, "gain: ", lambda: genfast.upsample2d(torch.zeros(1, 1, 4, 4), None, gain="2")),
    ],
)
def test_wrong_taps(error, message, call):
    with pytest.raises(error, match=message):
        call()
