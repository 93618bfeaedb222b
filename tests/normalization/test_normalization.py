"""group_norm, layer_norm and rms_norm against PyTorch's and the reference in fp64."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import REORDERED, on_both_roads, yardstick
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import genfast
import genfast.nn
from genfast.ops._common import composite_dtype
from genfast.ops.normalization import _by_torch, _training
from genfast.reference import normalization as reference
from genfast.reference.normalization import ACTIVATIONS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# kind -> our function and the options of the reference; groups are 4
KINDS = {
    "group": (lambda x, w, b, s, t, **o: genfast.group_norm(x, 4, w, b, scale=s, shift=t, **o),
              {"groups": 4}),
    "layer": (lambda x, w, b, s, t, **o: genfast.layer_norm(x, w, b, scale=s, shift=t, **o), {}),
    "rms": (lambda x, w, b, s, t, **o: genfast.rms_norm(x, w, scale=s, shift=t, **o),
            {"rms": True}),
}  # fmt: skip
PARAMETERS = {
    "nothing": (), "affine": ("weight", "bias"), "weight": ("weight",),
    "modulated": ("scale", "shift"), "scale": ("scale",), "shift": ("weight", "shift"),
    "all": ("weight", "bias", "scale", "shift"),
}  # fmt: skip
# The channels are dimension 1 of a group norm and the last of the others.
SHAPES = {
    "images": (2, 12, 7, 9), "vectors": (3, 20), "one place": (2, 8, 1, 1), "odd": (2, 4, 3, 33),
    "threads": (4, 16, 65, 33), "parts": (1, 16, 130, 66), "wide rows": (2, 4, 5000),
    "no samples": (0, 4, 5, 16), "no places": (2, 4, 0, 16),
}  # fmt: skip


def randn(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(kind, shape, given, dtype=torch.float32):
    """x away from mean 0, and the named parameters; scale and shift are slices of one tensor."""
    C = shape[1] if kind == "group" else shape[-1]
    s, t = randn(shape[0], 2 * C, seed=4, dtype=dtype).chunk(2, 1)
    all_of = {
        "weight": randn(C, seed=2, dtype=dtype), "bias": randn(C, seed=3, dtype=dtype),
        "scale": s, "shift": t,
    }  # fmt: skip
    if kind == "rms":
        all_of["bias"] = None
    return [2 * randn(*shape, dtype=dtype) + 1, *(all_of[n] if n in given else None
                                                  for n in all_of)]  # fmt: skip


def truth(kind):
    return lambda *tensors, **o: reference.normalize(*tensors, **KINDS[kind][1], **o)


def run(function, tensors, grad, dtype, **options):
    """y and the gradients by every tensor."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    y = on_both_roads(function, *leaves, **options)
    given = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, given, grad.to(y.dtype))]


def options_of(kind, act="linear", eps=1e-5):
    return {"act": act, "eps": eps}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients(kind, parameters, act, dtype):
    shape = (3, 12, 9, 20)
    tensors = inputs(kind, shape, PARAMETERS[parameters], dtype)
    grad = randn(*shape, seed=5, dtype=dtype)
    options = options_of(kind, act)
    got = run(KINDS[kind][0], tensors, grad, dtype, **options)
    eager = run(truth(kind), tensors, grad, dtype, **options)
    exact = run(truth(kind), tensors, grad, torch.float64, **options)
    for i, values in enumerate(zip(got, eager, exact, strict=True)):
        assert values[0].dtype == dtype
        yardstick(f"{kind} {act} tensor {i}", *values, kind="gradient" if i else "output")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("act", ["linear", "silu"])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_memory_orders(kind, act, name):
    shape = SHAPES[name]
    tensors = inputs(kind, shape, PARAMETERS["all"])
    x, grad, options = tensors[0], randn(*shape, seed=5), options_of(kind, act)
    exact = run(truth(kind), tensors, grad, torch.float64, **options)
    orders, grads = [x, torch.stack([x, x], -1)[..., 0]], [grad]
    if len(shape) == 4:
        orders.append(x.contiguous(memory_format=torch.channels_last))
        grads.append(grad.contiguous(memory_format=torch.channels_last))
    for laid in orders:
        for g in grads:
            got = run(KINDS[kind][0], [laid, *tensors[1:]], g, torch.float32, **options)
            for a, e in zip(got, exact, strict=True):
                e = e.nan_to_num()  # PyTorch's sums over no places; ours are 0
                scale = max(1.0, e.abs().max().item()) if e.numel() else 1.0
                torch.testing.assert_close(a / scale, (e / scale).float(), rtol=3e-5, atol=3e-5)
    y = KINDS[kind][0](orders[-1], *tensors[1:], **options)
    if kind == "group" and y.numel() and len(shape) == 4:
        assert y.stride() == orders[-1].stride()


def test_a_large_mean_does_not_cancel():
    """Deviation 1 at mean 1024: E[x^2] - E[x]^2 in fp32 would be off by 0.06. What remains is the
    rounding of the mean to fp32, up to 6e-5 over the deviation, and of its sum: 4e-5 in the narrow
    vectors of the base level."""
    x = randn(4, 16, 8, 64) + 1024
    for laid in (x, x.contiguous(memory_format=torch.channels_last)):
        y = genfast.group_norm(laid, 4)
        exact = torch.group_norm(x.double(), 4)
        assert (y - exact).abs().max() < 2e-4
    assert (genfast.layer_norm(x) - F.layer_norm(x.double(), (64,))).abs().max() < 2e-4


def test_first_rows_far_from_the_others():
    """Channels inside are summed around the mean of their first rows: 1000 here, 31 of all."""
    x = randn(2, 64, 32, 32)
    x[:, :, 0] += 1000
    x = x.contiguous(memory_format=torch.channels_last)
    got, eager = genfast.group_norm(x, 4, eps=0.0), torch.group_norm(x, 4, eps=0.0)
    yardstick("far", got, eager, torch.group_norm(x.double(), 4, eps=0.0), kind="output")


@pytest.mark.parametrize("kind", KINDS)
def test_squares_beyond_fp32_are_nan(kind):
    """Not zeros: a training that has run away must show."""
    x = 1e25 * randn(2, 8, 4, 8)
    for laid in (x, x.contiguous(memory_format=torch.channels_last)):
        assert KINDS[kind][0](laid, None, None, None, None).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("shape", [(2, 8, 4, 8), (2, 8, 200, 120)])  # whole samples, parts of them
def test_what_is_not_finite_stays_in_its_group(shape, bad, dtype):
    x = randn(*shape, dtype=dtype)
    x[1, 3, -1, 2] = bad
    for laid in (x, x.contiguous(memory_format=torch.channels_last)):
        lost = genfast.group_norm(laid, 4).isnan()
        assert lost[1, 2:4].all() and lost.sum() == x[1, 2:4].numel()


def test_silu_and_gelu_end_at_zero():
    """Where 1 / (1 + e^-z) is no fp32 number: it was 2^-126, and SiLU of -3e38 was -3.5."""
    far = torch.tensor([[-90.0, -1e4, -1e37, -3.4e38]])
    x = torch.zeros_like(far)
    for act in ("silu", "gelu_tanh"):
        assert not genfast.layer_norm(x, shift=far, act=act).any()
    assert not genfast.bias_act(far, act="gelu_tanh").any()


def test_a_bias_without_a_weight():
    """PyTorch's group norm has no gradient there, which the reference's is made of."""
    found = []
    for dtype in (torch.float32, torch.float64):
        x, b = (t.to(dtype).requires_grad_() for t in (randn(2, 8, 3, 5), randn(8, seed=2)))
        first = torch.autograd.grad(genfast.group_norm(x, 4, None, b).square().sum(), (x, b),
                                    create_graph=True)  # fmt: skip
        second = torch.autograd.grad(sum(d.square().sum() for d in first), (x, b))
        found.append([d.detach().double() for d in (*first, *second)])
    for got, exact in zip(*found, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


def test_expanded_gradient():
    """Of y.sum(): one number for every element."""
    x = randn(2, 8, 5, 5).requires_grad_()
    w = randn(8, seed=2).requires_grad_()
    got = torch.autograd.grad(genfast.group_norm(x, 4, w, act="silu").sum(), (x, w))
    want = torch.autograd.grad(F.silu(F.group_norm(x, 4, w)).sum(), (x, w))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["images", "threads", "parts"])
def test_threads_change_no_bit(kind, name):
    shape = SHAPES[name]
    tensors, grad = inputs(kind, shape, PARAMETERS["all"]), randn(*shape, seed=5)
    orders = [tensors[0], tensors[0].contiguous(memory_format=torch.channels_last)]
    for x in orders if kind == "group" else orders[:1]:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                run(KINDS[kind][0], [x, *tensors[1:]], grad, torch.float32,
                    **options_of(kind, "silu"))
            )  # fmt: skip
        for other in found[1:]:
            assert all(torch.equal(p, q) for p, q in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 40001), (40, 17001)], ids=str)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_gradients_of_few_long_rows(kind, shape, dtype):
    """Those of weight and bias are summed by columns, not from each part of the rows."""
    tensors, grad = inputs(kind, shape, PARAMETERS["affine"], dtype), randn(*shape, seed=5)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run(KINDS[kind][0], tensors, grad, dtype, **options_of(kind)))
    eager, exact = (
        run(truth(kind), tensors, grad, t, **options_of(kind)) for t in (dtype, torch.float64)
    )
    for i, (one, two, *judged) in enumerate(zip(*found, eager, exact, strict=True)):
        assert torch.equal(one, two)
        yardstick(f"{kind} tensor {i}", two, *judged, kind="gradient" if i else "output")


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_wanted_gradients(kind):
    """A frozen weight gets none, and x none where only the parameters learn."""
    tensors = inputs(kind, (2, 8, 5, 12), PARAMETERS["all"])
    whole = run(KINDS[kind][0], tensors, tensors[0], torch.float32)
    for learned in ([0], [1], [3, 4]):
        leaves = [
            None if t is None else t.detach().requires_grad_(i in learned)
            for i, t in enumerate(tensors)
        ]
        y = KINDS[kind][0](*leaves)
        found = torch.autograd.grad(y, [leaves[i] for i in learned], tensors[0])
        given = [i for i, t in enumerate(tensors) if t is not None]
        for i, d in zip(learned, found, strict=True):
            torch.testing.assert_close(d, whole[1 + given.index(i)], rtol=0, atol=0)


# ---- gradients of any order, transforms, tracing -------------------------------------------------


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_in_fp64(kind, act):
    tensors = inputs(kind, (2, 4, 8), PARAMETERS["all"])
    tensors = [None if t is None else t.double().requires_grad_() for t in tensors]
    given = [t for t in tensors if t is not None]

    def f(*given):
        rest = iter(given)
        return KINDS[kind][0](*(None if t is None else next(rest) for t in tensors), act=act)

    assert gradcheck(f, given, check_forward_ad=True)
    assert gradgradcheck(f, given)


@pytest.mark.parametrize("kind", KINDS)
def test_second_order_of_the_kernel(kind):
    tensors = inputs(kind, (2, 8, 3, 16), PARAMETERS["all"])
    weights = randn(2, 8, 3, 16, seed=7)

    def orders(f, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors if t is not None]
        rest = iter(leaves)
        y = f(*(None if t is None else next(rest) for t in tensors), act="silu")
        grads = torch.autograd.grad(y, leaves, weights.to(dtype), create_graph=True)
        total = sum(d.square().sum() for d in grads)
        return [d.detach() for d in (*grads, *torch.autograd.grad(total, leaves))]

    def exact(*leaves, act):
        return truth(kind)(*leaves, act=act, eps=torch.finfo(torch.float32).eps
                           if kind == "rms" else 1e-5)  # fmt: skip

    for a, e in zip(
        orders(KINDS[kind][0], torch.float32), orders(exact, torch.float64), strict=True
    ):
        scale = max(1.0, e.abs().max().item())
        torch.testing.assert_close(a.double() / scale, e / scale, rtol=1e-4, atol=2e-5)


def test_forward_mode_and_vmap():
    x, w, t = randn(3, 5, 16), randn(16, seed=2), randn(3, 5, 16, seed=4)
    f = lambda x: genfast.layer_norm(x, w, act="gelu")  # noqa: E731
    plain = lambda x: F.gelu(F.layer_norm(x, (16,), w))  # noqa: E731
    for a, b in zip(torch.func.jvp(f, (x,), (t,)), torch.func.jvp(plain, (x,), (t,)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.vmap(f)(x), plain(x), **REORDERED[torch.float32])


@pytest.mark.parametrize("kind", KINDS)
def test_compile_is_the_same_with_its_gradients(kind):
    tensors, grad = inputs(kind, (2, 8, 5, 12), PARAMETERS["all"]), randn(2, 8, 5, 12, seed=5)

    def f(*tensors):
        return KINDS[kind][0](*tensors, act="silu")

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        run(compiled, tensors, grad, torch.float32), run(f, tensors, grad, torch.float32),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, **REORDERED[torch.float32])


@pytest.mark.parametrize(("groups", "rms"), [(4, False), (0, False), (0, True)])
def test_opcheck(groups, rms):
    x = randn(2, 8, 3, 8).requires_grad_()
    w, s = randn(8, seed=2).requires_grad_(), randn(2, 8, seed=3).requires_grad_()
    torch.library.opcheck(
        torch.ops.genfast.normalize.default,
        (x, w, None, s, None, None, None, groups, rms, 1, 1e-5),
    )


def test_reference_backend_and_autocast_agree():
    x, w, b = randn(2, 8, 4, 5), randn(8, seed=2), randn(8, seed=3)
    y = genfast.group_norm(x, 2, w, b, act="silu")
    with genfast.backend("reference"):
        other = genfast.group_norm(x, 2, w, b, act="silu")
    torch.testing.assert_close(y, other, **REORDERED[torch.float32])
    with torch.autocast("cpu", torch.bfloat16):  # an fp32 weight at activations of 16 bit
        half = genfast.group_norm(x.bfloat16(), 2, w, b, act="silu")
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_rms_norms_own_eps_is_pytorchs(dtype, size):
    """That of what it computes in: of small bf16 rows the spacing of bf16 would leave an eighth."""
    x = (size * randn(4, 64)).to(dtype)
    want, close = F.rms_norm(x, (64,)), {"rtol": 2e-2, "atol": 1e-6}
    for backend in ("auto", "reference"):
        with genfast.backend(backend):
            torch.testing.assert_close(genfast.rms_norm(x), want, **close)
            torch.testing.assert_close(genfast.nn.RMSNorm(64).to(dtype)(x), want, **close)


@pytest.mark.parametrize("value", [3.3, 10000.3, -12345.678])
@pytest.mark.parametrize("n", [3, 33, 1000, 5000])
def test_equal_numbers_are_zeros(value, n):
    """Also where their mean is rounded, whatever the memory order."""
    x = torch.full((2, 4, n), value, requires_grad=True)
    for norm in (lambda x: genfast.layer_norm(x), lambda x: genfast.group_norm(x, 2)):
        y = norm(x)
        assert y.abs().max() == 0
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert dx.abs().max() < 1e-2  # of 1 / sqrt(eps) = 316


def test_no_grad_keeps_its_input():
    """The reference applies SiLU in place: to its own tensor, never to x."""
    x = randn(2, 8, 4, 5)
    before = x.clone()
    with torch.no_grad(), genfast.backend("reference"):
        genfast.group_norm(x, 2, act="silu")
    assert torch.equal(x, before)


# ---- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "shape", "args"),
    [
        (genfast.nn.GroupNorm, nn.GroupNorm, (2, 8, 5, 5), (4, 8)),
        (genfast.nn.GroupNorm, nn.GroupNorm, (2, 8, 5), (2, 8, 1e-3, False)),
        (genfast.nn.LayerNorm, nn.LayerNorm, (2, 8, 5), (5,)),
        (genfast.nn.LayerNorm, nn.LayerNorm, (2, 3, 8, 5), ((8, 5), 1e-6)),
        (genfast.nn.RMSNorm, nn.RMSNorm, (2, 3, 8, 5), ((8, 5),)),
        (genfast.nn.RMSNorm, nn.RMSNorm, (7, 5), (5, 1e-6)),
    ],
)
def test_modules_are_drop_in(ours, theirs, shape, args):
    a, b, x = ours(*args), theirs(*args), randn(*shape)
    for i, p in enumerate(b.parameters()):
        p.data.copy_(randn(*p.shape, seed=i))
    a.load_state_dict(b.state_dict())
    assert isinstance(a, theirs) and list(a.state_dict()) == list(b.state_dict())
    torch.testing.assert_close(a(x), b(x), **REORDERED[torch.float32])
    for dtype in (torch.bfloat16, torch.float64):
        torch.testing.assert_close(a.to(dtype)(x.to(dtype)), b.to(dtype)(x.to(dtype)),
                                   **REORDERED[dtype])  # fmt: skip
    assert "act='silu'" in repr(ours(*args, act="silu"))


@pytest.mark.parametrize("kind", [genfast.nn.LayerNorm, genfast.nn.RMSNorm])
@pytest.mark.parametrize(
    ("normalized", "shape"), [(8, (3, 16)), (8, (3, 8, 1)), ((2, 8), (3, 8, 2)), ((2, 8), (16,))]
)
def test_modules_refuse_what_does_not_fit_normalized_shape(kind, normalized, shape):
    for affine in (True, False):
        norm = kind(normalized, elementwise_affine=affine)
        with pytest.raises(ValueError, match="input: expected shape .*normalized_shape"):
            norm(torch.zeros(shape))


def test_modules_take_input_by_its_name():
    x = randn(2, 4, 5)
    for norm in (genfast.nn.LayerNorm(5), genfast.nn.GroupNorm(2, 4)):
        assert torch.equal(norm(input=x), norm(x))


def test_a_frozen_input_with_channels_last_in_fp64():
    """PyTorch 2.13's own gradient by the weight alone ends the process."""
    x = randn(3, 4, 6, 6, dtype=torch.float64)
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    last = x.to(memory_format=torch.channels_last)
    got, want = (torch.autograd.grad(genfast.group_norm(t, 2, w).sum(), w)[0] for t in (last, x))
    torch.testing.assert_close(got, want)


def test_modules_take_a_condition():
    x, s, t = randn(2, 8, 5, 6), randn(2, 8, seed=2), randn(2, 8, seed=3)
    m = genfast.nn.GroupNorm(4, 8, act="silu")
    want = F.silu(F.group_norm(x, 4) * (1 + s[:, :, None, None]) + t[:, :, None, None])
    torch.testing.assert_close(m(x, s, t), want, rtol=1e-5, atol=1e-5)
    m, s, t = genfast.nn.LayerNorm(6), randn(2, 6, seed=2), randn(2, 6, seed=3)
    want = F.layer_norm(x, (6,)) * (1 + s[:, None, None]) + t[:, None, None]
    torch.testing.assert_close(m(x, s, t), want, rtol=1e-5, atol=1e-5)


# ---- wrong input ---------------------------------------------------------------------------------

X = torch.zeros(2, 8, 5)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x: ", lambda: genfast.layer_norm([1.0])),
        (TypeError, "x: ", lambda: genfast.group_norm(X.long(), 2)),
        (ValueError, "x: expected at least 2", lambda: genfast.group_norm(X[0, 0], 1)),
        (ValueError, "x: expected at least 1", lambda: genfast.layer_norm(torch.zeros(()))),
        (ValueError, "x: expected at least 2",
         lambda: genfast.layer_norm(X[0, 0], scale=torch.zeros(1, 5))),
        (ValueError, "groups: expected a divisor of the 8", lambda: genfast.group_norm(X, 3)),
        (ValueError, "groups: ", lambda: genfast.group_norm(X, 0)),
        (TypeError, "groups: ", lambda: genfast.group_norm(X, 2.0)),
        (ValueError, "act: expected", lambda: genfast.layer_norm(X, act="mish")),
        (ValueError, r"weight: expected shape \(8,\)",
         lambda: genfast.group_norm(X, 2, torch.zeros(5))),
        (ValueError, r"bias: expected shape \(5,\)",
         lambda: genfast.layer_norm(X, None, torch.zeros(8))),
        (ValueError, r"scale: expected shape \(2, 8\)",
         lambda: genfast.group_norm(X, 2, scale=torch.zeros(8))),
        (ValueError, r"shift: expected shape \(2, 5\)",
         lambda: genfast.layer_norm(X, shift=torch.zeros(1, 5))),
        (TypeError, "scale: ", lambda: genfast.layer_norm(X, scale=1.0)),
        (ValueError, "eps: ", lambda: genfast.layer_norm(X, eps=-1.0)),
        (ValueError, "eps: ", lambda: genfast.group_norm(X, 2, eps=float("inf"))),
        (TypeError, "eps: ", lambda: genfast.layer_norm(X, eps=torch.tensor(1e-5))),
        (ValueError, r"weight: expected shape \(8,\)",
         lambda: genfast.group_norm(X, 2, torch.zeros(2, 4))),
        (TypeError, "eps: ", lambda: genfast.rms_norm(X, eps="small")),
        (ValueError, "one device",
         lambda: genfast.layer_norm(X, torch.zeros(5, device="meta"))),
    ],
)  # fmt: skip
def test_wrong_input_names_the_argument(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_off_the_cpu_the_composite_casts_nothing():
    """PyTorch's norms are fp32 inside on a GPU: 16 bits stay 16 bits there, mixed inputs widen."""
    x, w = torch.empty(2, 8, dtype=torch.bfloat16, device="meta"), torch.empty(8, device="meta")
    assert composite_dtype(x, w.bfloat16(), None) == torch.bfloat16
    assert composite_dtype(x, w) == torch.float32
    assert composite_dtype(torch.empty(2, 8, dtype=torch.bfloat16)) == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_norms_by_pytorch(kind, dtype):
    """What a GPU's table may choose for a gradient: the same function; None where it is not."""
    x, weight, bias, *_ = inputs(kind, (2, 8, 5, 8), ("weight", "bias"), dtype)
    settings = (4 if kind == "group" else 0, kind == "rms", 0, 1e-5)
    nothing = (None,) * 4
    bias = None if kind == "rms" else bias
    x.requires_grad_(), weight.requires_grad_()
    found = []
    ours = KINDS[kind][0](x, weight, bias, None, None, eps=1e-5)
    for y in (_by_torch(x, weight, bias, *nothing, *settings), ours):
        assert y.dtype == dtype
        found.append((y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))))
    for a, b in zip(*found, strict=True):
        most = 8 * torch.finfo(dtype).eps * b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=most)
    assert _by_torch(x, weight[:4], None, *nothing, *settings) is None
    assert _by_torch(x, weight, None, *nothing[1:], weight, *settings) is None
    for eps in (-1.0, torch.inf, torch.nan):
        assert _by_torch(x, weight, None, *nothing, *settings[:3], eps) is None
    assert _training(x, weight, bias, *nothing, *settings) == "plain training"
    assert _training(x, weight.double(), bias, *nothing, *settings) == "plain normalize"
    assert _training(x.mT, weight, bias, *nothing, *settings) == "plain normalize"
