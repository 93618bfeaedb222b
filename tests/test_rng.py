"""The noise contract: known answers, equal bits everywhere, invariances, accuracy, statistics."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from tolerances import (
    APPROXIMATIONS,
    EXP_SUBNORMAL,
    SINCOS_ABSOLUTE,
    P,
    poisson_bounds,
    two_sided,
    ulps,
)

import genfast
from genfast._native import _C
from genfast.ops.rng import DISTRIBUTIONS, random_bits
from genfast.reference import rng as reference

FLOAT_NOISE = tuple(reference.DISTRIBUTIONS)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def native(size, distribution, seed=1, stream=0, offset=0, dtype=torch.float32, out=None):
    """Kernel values of any distribution of the contract, also those without a public function."""
    out = torch.empty(size, dtype=dtype) if out is None else out
    seeds = seed if isinstance(seed, torch.Tensor) else None
    assert _C.random(
        out, DISTRIBUTIONS[distribution], 0 if seeds is not None else seed, seeds, stream, offset,
        0, 1,
    )  # fmt: skip
    return out


def bits(x: torch.Tensor) -> np.ndarray:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(kind).numpy()


def assert_same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert np.array_equal(bits(a), bits(b))


# ---- known answers ----------------------------------------------------------------------------

# Random123, kat_vectors, "philox4x32 10": counter, key, answer.
KNOWN = [
    pytest.param(
        (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), id="zero"
    ),
    pytest.param(
        (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        id="ones",
    ),
    pytest.param(
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1), id="pi",
    ),
]  # fmt: skip


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_known_answers_of_the_reference(counter, key, answer):
    got = reference.philox4x32_10(np.array(counter, np.uint32), np.array(key, np.uint32))
    assert tuple(int(x) for x in got) == answer


def test_known_answer_of_the_kernel():
    # The counters of the other two answers lie beyond element 2^63; these words reach the kernel
    # through the reference, which is pinned by them, in `test_bits_of_64_bit_counters`.
    got = random_bits(4, seed=0).numpy().view(np.uint32)
    assert tuple(int(x) for x in got) == KNOWN[0].values[2]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32 - 1, 2**63, 2**64 - 1, -(2**63)])
@pytest.mark.parametrize("stream", [0, 7, 2**32 + 5, -1, 2**64 - 2])
@pytest.mark.parametrize("offset", [0, 2**34 - 6, 2**40 + 3, 2**62 - 1])
def test_bits_of_64_bit_counters(seed, stream, offset):
    """The counter carries at element 2^34; seeds and streams are 64 bit, of either sign."""
    got = random_bits(23, seed=seed, stream=stream, offset=offset).numpy().view(np.uint32)
    assert np.array_equal(got, reference.words(23, seed, stream, offset))


def test_seeds_of_either_sign_are_the_same_64_bits():
    assert_same_bits(genfast.randn(9, seed=-1), genfast.randn(9, seed=2**64 - 1))
    tensor = genfast.randn(2, 9, seed=torch.tensor([-(2**63), 5]))
    assert_same_bits(tensor[0], genfast.randn(9, seed=2**63))


def test_version_of_the_mapping():
    """These bits are a promise. If this fails, NOISE_VERSION must change with a word to users."""
    assert genfast.NOISE_VERSION == 1
    digest = hashlib.sha256()
    for name in FLOAT_NOISE:
        digest.update(bits(native(1001, name, seed=2024, stream=3, offset=5)).tobytes())
    assert digest.hexdigest()[:16] == "819fde466957cf69"


# ---- kernel = reference, bit for bit ----------------------------------------------------------


@pytest.mark.parametrize("distribution", FLOAT_NOISE)
def test_bits_equal_the_reference(distribution):
    count, offset = (1 << 20) + 37, 3
    expected = reference.random((count,), distribution, 11, 4, offset)
    for dtype in DTYPES:
        toward_zero = distribution == "uniform"
        truth = reference._cast(expected.numpy(), dtype, toward_zero)
        assert_same_bits(native((count,), distribution, 11, 4, offset, dtype), truth)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 31, 33, 63, 64, 65, 1023, 1024, 1025, 4097])
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 1021])
def test_odd_counts_and_offsets(count, offset):
    for distribution in ("uniform", "normal"):
        for dtype in (torch.float32, torch.bfloat16):
            guard = torch.full((count + 64,), 7.0, dtype=dtype)
            native((count,), distribution, 5, 0, offset, dtype, out=guard[:count])
            truth = reference.random((count,), distribution, 5, 0, offset, dtype)
            assert_same_bits(guard[:count], truth)
            assert (guard[count:] == 7).all()  # not one element past the end


HASH = """
import hashlib, torch, genfast
from genfast._native import _C
h = hashlib.sha256()
x = genfast.randn(70001, seed=8) * 3
wide = torch.linspace(-230, 200, 70001)  # e^(wide/2) from below the least subnormal to inf
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    for d in range(5):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            out = torch.empty(70001, dtype=dtype)
            assert _C.random(out, d, 99, None, 2, 5, 0, 1)
            h.update(out.view(torch.uint8).numpy().tobytes())
    for y in (genfast.randint(-3, 1000, (5001,), seed=4), genfast.reparameterize(x, -x, seed=6),
              genfast.tanh_normal(x, x, seed=6), genfast.log_normal(x, x, seed=6),
              genfast.reparameterize(x, wide, seed=6),
              genfast.relaxed_bernoulli(x, 0.7, seed=6),
              genfast.sample_categorical(x[:70000].view(700, 100), seed=torch.arange(700))):
        h.update(y.contiguous().view(torch.uint8).numpy().tobytes())
print(_C.build_info()["isa"], h.hexdigest())
"""


def test_an_unknown_instruction_set_is_named():
    run = subprocess.run(
        [sys.executable, "-c", "import genfast"], env=dict(os.environ, GENFAST_ISA="v9"),
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "GENFAST_ISA: expected one of" in run.stderr and "'v9'" in run.stderr


def test_numpy_integers_are_integers():
    want = genfast.randn(9, seed=3, stream=2, offset=1)
    got = genfast.randn(9, seed=np.uint32(3), stream=np.int64(2), offset=np.int8(1))
    assert torch.equal(got, want)


NOISY = {
    "rand": lambda **k: genfast.rand(5, **k),
    "reparameterize": lambda **k: genfast.reparameterize(torch.zeros(5), torch.zeros(5), **k),
    "gumbel_softmax": lambda **k: genfast.gumbel_softmax(torch.zeros(1, 5), **k),
    "add_noise": lambda **k: genfast.add_noise(torch.zeros(5), 1.0, 1.0, **k),
    "bias_act": lambda **k: genfast.bias_act(
        torch.zeros(1, 5), strength=torch.ones(()), **k
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOISY)
def test_numbers_of_noise_are_integers(name):
    for argument, value in (
        ("offset", torch.tensor(2.9)), ("offset", np.float32(2.9)), ("offset", True),
        ("seed", True), ("stream", True), ("stream", 1.0),
    ):  # fmt: skip
        if name == "bias_act" and argument == "offset":
            continue
        with pytest.raises(TypeError, match=f"^{argument}: expected an int"):
            NOISY[name](**{"seed": 1, argument: value})
    for seed in (1, np.int64(1), torch.tensor(1)):
        with pytest.raises(ValueError, match="^generator: has no effect"):
            NOISY[name](seed=seed, generator=torch.Generator())


DRAWN = {  # in fp32, and where a road is given up for another
    "reparameterize": lambda x: genfast.reparameterize(x, x),
    "reparameterize, broadcast": lambda x: genfast.reparameterize(x, x[:1].clone()),
    "reparameterize, gradient": lambda x: genfast.reparameterize(x.requires_grad_(), x[:1].clone()),
    "tanh_normal": lambda x: genfast.tanh_normal(x, x),
    "gumbel_softmax": lambda x: genfast.gumbel_softmax(x),
    "sample_categorical": lambda x: genfast.sample_categorical(x),
    "sample_tokens": lambda x: genfast.sample_tokens(x, 0.5),
    "add_noise": lambda x: genfast.add_noise(x, 0.0, 1.0),
    "add_noise, ranks": lambda x: genfast.add_noise(x, torch.zeros(3, 6), torch.ones(3)),
    "bias_act": lambda x: genfast.bias_act(x, strength=torch.ones(())),
    "randn": lambda x: genfast.randn(3, 6, dtype=x.dtype),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_a_call_draws_one_seed(name):
    """Of torch's generator, whichever road the call takes: fp32, fp64 and compiled agree."""

    def run(call, x):
        torch.manual_seed(3)
        return call(x).detach(), torch.rand(1)

    x = torch.zeros(3, 6)
    want, behind = run(DRAWN[name], x.clone())
    torch.manual_seed(3)
    torch.empty(1, dtype=torch.int64).random_(0, 2**63 - 1)
    assert torch.equal(torch.rand(1), behind)
    got, behind_too = run(DRAWN[name], x.double())
    assert torch.equal(behind_too, behind)
    torch.testing.assert_close(got.to(want.dtype), want, rtol=1e-5, atol=1e-6)


def test_compiled_calls_have_the_seed_of_eager_ones():
    compiled = torch.compile(genfast.randn_like, backend="aot_eager", fullgraph=True)
    for seed in range(8):
        torch.manual_seed(seed)
        want = genfast.randn_like(torch.zeros(5))
        torch.manual_seed(seed)
        assert torch.equal(compiled(torch.zeros(5)), want)


def test_sizes_and_seeds_without_memory():
    for size in ((2**63,), (2**40, 2**40)):
        with pytest.raises(ValueError, match="^size: expected"):
            genfast.rand(size, seed=1)
    with pytest.raises(ValueError, match="^seed: .*meta"):
        genfast.rand(5, seed=torch.zeros(1, dtype=torch.int64, device="meta"), device="cpu")


def test_bits_do_not_depend_on_the_instruction_set():
    """Every level this processor runs, 1 to 3 threads each."""
    usable = _C.build_info()["isa_usable"]
    found = {}
    for level in usable:
        run = subprocess.run(
            [sys.executable, "-c", HASH], env=dict(os.environ, GENFAST_ISA=level), check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        name, digest = run.stdout.split()
        assert name == level
        found[level] = digest
    assert len(set(found.values())) == 1, found


# ---- invariances ------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(threads):
    expected = reference.random((100, 1777), "normal", 3)
    torch.set_num_threads(threads)
    assert_same_bits(genfast.randn(100, 1777, seed=3), expected)
    seeds = torch.arange(100)
    assert_same_bits(genfast.randn(100, 1777, seed=seeds)[7], genfast.randn(1777, seed=7))


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 999, 1024, 4099])
def test_a_shard_reproduces_its_slice(cut):
    whole = genfast.randn(9001, seed=3, stream=1)
    assert_same_bits(genfast.randn(9001 - cut, seed=3, stream=1, offset=cut), whole[cut:])
    assert_same_bits(genfast.randn(cut, seed=3, stream=1), whole[:cut])


def test_rows_are_functions_of_their_seed():
    seeds = torch.tensor([5, -7, 2**62, 0, 5])
    whole = genfast.randn(5, 3, 701, seed=seeds, offset=9)
    assert_same_bits(whole[0], whole[4])
    order = torch.tensor([3, 1, 4, 2, 0])
    assert_same_bits(genfast.randn(5, 3, 701, seed=seeds[order], offset=9), whole[order])
    for b, seed in enumerate(seeds.tolist()):
        assert_same_bits(genfast.randn(1, 3, 701, seed=seed, offset=9)[0], whole[b])
        assert_same_bits(genfast.randn(1, 3, 701, seed=seeds[b : b + 1], offset=9)[0], whole[b])


@pytest.mark.parametrize("cols", [1, 2, 3, 4, 20, 33, 252, 508, 509])
def test_short_rows_are_made_side_by_side(cols):
    """Of several seeds in one chunk: each row as alone, whatever its part of a Philox block."""
    seeds = genfast.randint(-(2**31), 2**31, (300,), seed=1) * 2**31
    for offset in (0, 1, 3, 2**34 - 2):
        whole = genfast.randn(300, cols, seed=seeds, offset=offset)
        words = genfast.randint(0, 10**6, (300, cols), seed=seeds, offset=offset)
        for b in (0, 1, 127, 128, 299):
            alone = dict(seed=seeds[b].item(), offset=offset)
            assert_same_bits(whole[b], genfast.randn(cols, **alone))
            assert torch.equal(words[b], genfast.randint(0, 10**6, (cols,), **alone))


LAYOUTS = {
    "transposed": lambda: torch.empty(7, 129, 5).transpose(0, 2),
    "channels_last": lambda: torch.empty(5, 3, 11, 13).to(memory_format=torch.channels_last),
    "sliced": lambda: torch.empty(40, 70)[3:33:3, 1::2],
    "gaps": lambda: torch.empty(33, 1030)[:, :1025],
    "negative view": lambda: torch.zeros(37, dtype=torch.complex64).conj().imag,
    "0-dim": lambda: torch.empty(()),
    "empty": lambda: torch.empty(3, 0, 4),
    "12 dims": lambda: torch.empty((1, 2) * 6).permute(*range(11, -1, -1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(layout, dtype):
    out = LAYOUTS[layout]()
    if not out.is_neg():
        out = torch.empty_strided(out.shape, out.stride(), dtype=dtype)
    expected = genfast.randn(tuple(out.shape), seed=3, dtype=out.dtype)
    assert genfast.randn(out=out, seed=3) is out
    assert torch.equal(out, expected)
    if layout != "negative view":
        assert torch.equal(genfast.randn_like(out, seed=3), expected)
        assert torch.equal(
            genfast.rand_like(out, seed=3), genfast.rand(out.shape, seed=3, dtype=dtype)
        )


def test_randint_out_of_any_strides():
    expected = genfast.randint(0, 100, (6, 5), seed=1)
    for dtype in (torch.int64, torch.int32):
        out = torch.empty(5, 6, dtype=dtype).t()
        assert genfast.randint(0, 100, (6, 5), seed=1, out=out) is out
        assert torch.equal(out.long(), expected)


def test_autograd_sees_that_out_was_overwritten():
    out, weight = torch.ones(3), torch.ones(3, requires_grad=True)
    loss = (out * weight).sum()
    genfast.randn(3, seed=1, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_seed_from_torch():
    torch.manual_seed(5)
    a, b = genfast.randn(64), genfast.randn(64)
    assert not torch.equal(a, b)
    torch.manual_seed(5)
    assert torch.equal(genfast.randn(64), a) and torch.equal(genfast.randn(64), b)
    g = [torch.Generator().manual_seed(9) for _ in range(2)]
    assert torch.equal(genfast.rand(8, generator=g[0]), genfast.rand(8, generator=g[1]))
    state = torch.get_rng_state()
    genfast.randn(8, seed=1), genfast.rand(8, generator=g[0])
    assert torch.equal(torch.get_rng_state(), state)  # explicit sources leave torch's alone


def test_defaults_follow_torch():
    assert genfast.randn(2).dtype == torch.float32 and genfast.randint(0, 5, 3).shape == (3,)
    torch.set_default_dtype(torch.float64)
    try:
        assert genfast.randn(2).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert genfast.randn(2, 3, seed=1).is_meta
    assert genfast.randn((2, 3), seed=1).shape == genfast.randn([2, 3], seed=1).shape == (2, 3)


# ---- accuracy of the approximations -----------------------------------------------------------


def sweep(low, high, count=1_000_000, seed=0):
    """fp32 numbers between two positive bounds, evenly and at random over their bit patterns."""
    a, b = (int(x) for x in np.array([low, high], np.float32).view(np.uint32))
    draw = np.random.default_rng(seed).integers(a, b, count, dtype=np.uint32)
    return np.concatenate([np.linspace(a, b - 1, count).astype(np.uint32), draw]).view(np.float32)


def through(function, x):
    """function(mu, logvar) of the sampling family at sigma = 0: its transform of x alone."""
    x = torch.from_numpy(x)
    return function(x, torch.full_like(x, -300.0), seed=1).numpy()


SINGLE = {
    "log": (reference.log_positive, np.log),
    "exponential": (reference.exponential_of, lambda v: -np.log1p(-v)),
    "exp": (lambda x: through(genfast.log_normal, x), np.exp),
    "tanh": (lambda x: through(genfast.tanh_normal, x), np.tanh),
}


@pytest.mark.parametrize(
    "name, low, high, bound", [(n, *row) for n in SINGLE for row in APPROXIMATIONS[n]]
)
def test_error_in_ulp(name, low, high, bound):
    approximation, exact = SINGLE[name]
    x = sweep(low, high)
    if name in ("exp", "tanh"):
        x = np.concatenate([x, -x[x < 87.3]])
    truth = exact(x.astype(np.float64))
    keep = truth != 0
    assert ulps(approximation(x)[keep], truth[keep]).max() <= bound


def test_log_over_every_float_around_one():
    a, b = (int(np.float32(x).view(np.uint32)) for x in (0.7, 1.42))
    x = np.arange(a, b, dtype=np.uint32).view(np.float32)
    x = x[x != 1]
    assert ulps(reference.log_positive(x), np.log(x.astype(np.float64))).max() <= 0.9
    assert reference.log_positive(np.ones(1, np.float32))[0] == 0


def test_error_of_sin_and_cos():
    w = np.concatenate(
        [np.arange(0, 2**32, 2**13, dtype=np.uint64), np.arange(2**29 - 999, 2**29 + 999)]
    ).astype(np.uint32)
    w = np.concatenate([w, reference.words(1 << 20, 3)])
    sine, cosine = reference.sincos_turn(w)
    quadrant = (w.astype(np.int64) + 2**29) >> 30  # exact reduction, so that ulps mean something
    y = (w.astype(np.int64) - (quadrant << 30)) * (2 * np.pi / 2**32)
    s, c = np.sin(y), np.cos(y)
    ((_, _, bound),) = APPROXIMATIONS["sincos"]
    for got, exact in ((sine, (s, c, -s, -c)), (cosine, (c, -s, -c, s))):
        truth = np.choose(quadrant & 3, exact)
        keep = truth != 0
        assert ulps(got[keep], truth[keep]).max() <= bound
        assert np.abs(got - truth).max() <= SINCOS_ABSOLUTE


def test_error_of_the_sigmoid():
    x = genfast.randn(1 << 20, seed=1) * 12 - 10
    noise = native((1 << 20,), "logistic", 5)
    exact = (x + noise).double().numpy()
    got = genfast.relaxed_bernoulli(x, 1.0, seed=5).numpy()
    ((low, high, bound),) = APPROXIMATIONS["sigmoid"]
    keep = (exact > low) & (exact < high)
    assert ulps(got[keep], 1 / (1 + np.exp(-exact[keep]))).max() <= bound


def test_exponential_function_at_its_ends():
    x = -sweep(87.4, 103.9, 200_000)
    got = through(genfast.log_normal, x)
    assert (np.abs(got - np.exp(x.astype(np.float64))) / 2.0**-149).max() <= EXP_SUBNORMAL
    special = np.array([88.72, 88.73, np.inf, -np.inf, -104, 0, np.nan], np.float32)
    expected = np.array([np.exp(np.float64(special[0])), np.inf, np.inf, 0, 0, 1, np.nan])
    assert np.allclose(through(genfast.log_normal, special), expected, rtol=1e-6, equal_nan=True)
    special = np.array([np.inf, -np.inf, 40, 0, np.nan], np.float32)
    assert np.array_equal(through(genfast.tanh_normal, special), [1, -1, 1, 0, np.nan], True)


def test_extreme_words():
    """u = 1 (the 128 largest words) and u = 2^-33 (word 0) stay finite and inside the range."""
    w = np.array([[0, 0, 0xFFFFFFFF, 0], [0xFFFFFF80, 1 << 31, 0xFFFFFF7F, 3 << 30]], np.uint32)
    n = reference._box_muller(w)
    assert np.isfinite(n).all() and abs(n[0, 0] - 6.7637) < 1e-3
    # A radius of zero is +0, so that the sign of the result is that of sin or cos.
    assert n[0, 2] == 0 and not np.signbit(n[0, 2])
    for name in ("exponential", "gumbel", "logistic"):
        values = getattr(reference, name)(w.reshape(-1))
        assert np.isfinite(values).all() and np.abs(values).max() < 23


# ---- statistics -------------------------------------------------------------------------------

N = 1 << 22
EXACT = {
    "uniform": stats.uniform(),
    "normal": stats.norm(),
    "exponential": stats.expon(),
    "gumbel": stats.gumbel_r(),
    "logistic": stats.logistic(),
}


@pytest.mark.parametrize("distribution", FLOAT_NOISE)
def test_moments_up_to_the_fourth(distribution):
    """Each raw moment against its exact value, in standard errors over 2^22 values: a bias of
    0.24 % of a standard deviation in the mean, or of 0.35 % in the variance, would be seen."""
    exact = EXACT[distribution]
    x = native((N,), distribution, 17).numpy().astype(np.float64)
    mean, deviation = exact.mean(), exact.std()
    x = (x - mean) / deviation
    if distribution == "logistic":  # scipy integrates these badly
        p = np.pi**2
        raw = [1, 0, p / 3, 0, 7 * p**2 / 15, 0, 31 * p**3 / 21, 0, 127 * p**4 / 15]
    else:
        raw = [exact.moment(k) for k in range(9)]
    standard = [
        sum(
            float(_binomial(k, j)) * raw[j] * (-mean) ** (k - j) for j in range(k + 1)
        ) / deviation**k
        for k in range(9)
    ]  # fmt: skip
    for k in (1, 2, 3, 4):
        error = np.sqrt((standard[2 * k] - standard[k] ** 2) / N)
        assert two_sided((np.mean(x**k) - standard[k]) / error), f"moment {k}"


def _binomial(n, k):
    return np.prod([(n - i) / (i + 1) for i in range(k)])


@pytest.mark.parametrize("distribution", FLOAT_NOISE)
def test_kolmogorov_smirnov(distribution):
    """2^22 draws: sees any shift of the distribution function by more than 0.0014."""
    x = np.sort(native((N,), distribution, 23, 1).numpy().astype(np.float64))
    cdf = EXACT[distribution].cdf(x)
    steps = np.arange(N + 1) / N
    d = max(np.max(steps[1:] - cdf), np.max(cdf - steps[:-1]))
    assert stats.kstwobign.sf(d * np.sqrt(N)) > P


def test_uniform_chi_square():
    counts = torch.histc(genfast.rand(N, seed=31), 4096, 0, 1).numpy()
    assert stats.chisquare(counts).pvalue > P
    low_bits = (genfast.rand(N, seed=32) * 2**24).long() & 255  # the low bits are random too
    assert stats.chisquare(np.bincount(low_bits.numpy(), minlength=256)).pvalue > P
    for dtype in DTYPES:
        x = genfast.rand(N, seed=33, dtype=dtype)
        assert 0 <= x.min() and x.max() < 1


def test_tails_beyond_five_sigma():
    """2^26 values: 4250 expected beyond 4 sigma, 38.5 beyond 5; Poisson bounds at 1e-6."""
    n, block = 1 << 26, 1 << 22
    out = torch.empty(block)
    four = five = 0
    largest = 0.0
    for i in range(n // block):
        x = genfast.randn(out=out, seed=41, offset=i * block).abs_()
        top = x[x > 4]
        four += len(top)
        five += int((top > 5).sum())
        largest = max(largest, top.max().item())
    for count, sigma in ((four, 4), (five, 5)):
        low, high = poisson_bounds(2 * stats.norm.sf(sigma) * n)
        assert low <= count <= high, f"{count} values beyond {sigma} sigma"
    assert largest <= 6.77


def correlation(a, b):
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return (torch.dot(a, b) / (a.norm() * b.norm())).item() * len(a) ** 0.5


def test_uses_are_independent():
    """|r| > 0.0048 over 2^20 pairs, of values and of their squares, would be seen."""
    n = 1 << 20
    base = genfast.randn(n + 8, seed=100)
    others = {
        "stream + 1": genfast.randn(n, seed=100, stream=1),
        "stream + 2^32": genfast.randn(n, seed=100, stream=2**32),
        "seed + 1": genfast.randn(n, seed=101),
        "seed + 2^32": genfast.randn(n, seed=100 + 2**32),
        "seed and stream swapped": genfast.randn(n, seed=0, stream=100),
        **{f"lag {k}": base[k : k + n] for k in (1, 2, 3, 4, 5, 8)},
    }
    base = base[:n]
    for name, other in others.items():
        assert two_sided(correlation(base, other)), name
        assert two_sided(correlation(base**2, other**2)), f"{name}, squares"
        assert two_sided(correlation(base**2, other)), f"{name}, square and value"


def test_neighbouring_rows_are_independent():
    x = genfast.randn(64, 1 << 14, seed=torch.arange(64)).double()
    r = torch.corrcoef(x)[~torch.eye(64, dtype=torch.bool)] * (1 << 7)
    assert r.abs().max() < 6.0  # the largest of 2016 pairs
    assert two_sided((r.square().mean().item() - 1) * (2016 / 2) ** 0.5)


# ---- integers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "low, high",
    [(0, 1), (-3, 4), (0, 1000), (5, 2**32 + 5), (-(2**63), 2**32 - 2**63), (0, 3 << 30)],
)
def test_integers_equal_the_reference(low, high):
    got = genfast.randint(low, high, (1003,), seed=6, stream=2, offset=5)
    assert torch.equal(got, reference.randint((1003,), low, high, 6, 2, 5))
    assert got.min() >= low and got.max() <= high - 1


@pytest.mark.parametrize("span", [2, 7, 1000])
def test_integers_are_unbiased(span):
    for dtype in (torch.int64, torch.int32):
        x = genfast.randint(-5, span - 5, (N,), seed=span, dtype=dtype)
        assert x.min() == -5 and x.max() == span - 6
        assert stats.chisquare(np.bincount(x.numpy() + 5, minlength=span)).pvalue > P


def test_integer_edges():
    assert genfast.randint(2**63 - 1, 2**63, (3,), seed=1).tolist() == [2**63 - 1] * 3
    x = genfast.randint(-(2**31), 2**31, (5000,), seed=1, dtype=torch.int32)
    assert x.min() < -(2**30) and x.max() > 2**30
