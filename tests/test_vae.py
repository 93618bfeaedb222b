"""The VAE: its loss against plain PyTorch lines, its samples whatever the batch."""

import pytest
import torch
import torch.nn.functional as F

import genfast
from genfast.models import VAE, ConvVAE
from genfast.models.vae import TILE
from genfast.reference import rng as noise
from genfast.train import checkpoint

SEED = 11


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def vae():
    return checkpoint.initialised(lambda: VAE(36, 24, 5), SEED)


@pytest.fixture
def x():
    return genfast.rand(7, 6, 6, seed=2)


def plain_loss(vae, x, eps):
    """The same loss in PyTorch alone, with the noise given."""
    x = x.flatten(1)
    h = F.relu(vae.fc1(x))
    mu, logvar = vae.fc21(h), vae.fc22(h)
    z = mu + torch.exp(0.5 * logvar) * eps
    p = torch.sigmoid(vae.fc4(F.relu(vae.fc3(z))))
    nll = -(x * p.log() + (1 - x) * (1 - p).log()).sum(1)
    kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1)
    return (nll + kl).mean()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_loss_and_gradients_are_those_of_plain_pytorch(vae, x, backend):
    with genfast.backend(backend):
        loss = vae.loss(x, seed=5, stream=9)
        got = torch.autograd.grad(loss, list(vae.parameters()))
    eps = noise.random((7, 5), "normal", 5, 9)
    want_loss = plain_loss(vae, x, eps)
    want = torch.autograd.grad(want_loss, list(vae.parameters()))
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    for (name, _), a, b in zip(vae.named_parameters(), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_elbo_is_per_sample_and_forward_gives_its_parts(vae, x):
    logits, kl = vae(x, seed=1)
    assert logits.shape == (7, 36) and kl.shape == (7,)
    nll = F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none").sum(1)
    torch.testing.assert_close(vae.elbo(x, seed=1), -nll - kl)


def test_state_dict_keys_are_those_of_pytorch_examples():
    shapes = {name: tuple(p.shape) for name, p in VAE().named_parameters() if "weight" in name}
    assert shapes == {
        "fc1.weight": (400, 784),
        "fc21.weight": (20, 400),
        "fc22.weight": (20, 400),
        "fc3.weight": (400, 20),
        "fc4.weight": (784, 400),
    }


def test_prior_row_depends_on_seed_and_index_alone(vae):
    whole = vae.prior(50, SEED)
    for start, n in ((0, 1), (13, 30), (49, 1)):
        assert torch.equal(vae.prior(n, SEED, start), whole[start : start + n])
    assert not torch.equal(vae.prior(50, SEED + 1), whole)


# One tile, many tiles, a part of one, across a border: the full-size model, where a matrix
# product of another height does round otherwise.
@pytest.mark.parametrize("batch", [1, 7, TILE - 1, TILE, TILE + 1, 150])
def test_samples_are_bitwise_the_same_for_any_batch_size(batch):
    vae = checkpoint.initialised(VAE, SEED)
    whole = vae.sample(150, SEED)
    some = range(0, 150, batch) if batch > 1 else (0, 1, 63, 64, 149)
    for start in some:
        n = min(batch, 150 - start)
        assert torch.equal(vae.sample(n, SEED, start), whole[start : start + n]), start


def test_samples_are_the_decoded_prior(vae):
    want = torch.sigmoid(vae.decode(vae.prior(10, SEED)))
    torch.testing.assert_close(vae.sample(10, SEED), want, rtol=1e-5, atol=1e-6)
    assert vae.sample(0, SEED).shape == (0, 36)


def test_interpolation_ends_at_the_reconstructions(vae, x):
    line = vae.interpolate(x[:3], x[3:6], 4)
    assert line.shape == (3, 4, 36)
    torch.testing.assert_close(line[:, 0], vae.reconstruct(x[:3]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(line[:, -1], vae.reconstruct(x[3:6]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda v: v.encode(torch.zeros(2, 35)),
        lambda v: v.encode(torch.zeros(36)),
        lambda v: v.sample(-1, 0),
        lambda v: v.interpolate(torch.zeros(1, 36), torch.zeros(1, 36), 1),
        lambda v: v.loss(torch.zeros(0, 36)),
        lambda v: VAE(36, 24, 0),
        lambda v: VAE(36, 24, 5, beta=-1.0),
        lambda v: ConvVAE((1, 8, 8), width=0),
        lambda v: ConvVAE((1, 8, 8), beta=float("nan")),
    ],
    ids=[
        "width",
        "no batch",
        "negative n",
        "one step",
        "no sample",
        "no z",
        "beta < 0",
        "no width",
        "beta nan",
    ],
)
def test_bad_input_names_what_was_expected(vae, call):
    with pytest.raises(ValueError, match="expected"):
        call(vae)


@pytest.mark.parametrize("make", [lambda: VAE(96, 24, 5), lambda: ConvVAE((1, 8, 12), 4, 5)],
                         ids=["VAE", "ConvVAE"])  # fmt: skip
def test_no_samples(make):
    model, x = make(), torch.rand(0, 1, 8, 12)
    logits, kl = model(x)
    assert logits.shape == (0, *model.x_shape) and kl.shape == model.elbo(x).shape == (0,)
    assert model.bound(x, 2).shape == (0,) and model.reconstruct(x).shape == logits.shape
    with pytest.raises(ValueError, match="x: expected .* 96 values a sample, got shape"):
        model(torch.rand(0, 95))


# ---- convolutional, beta, bounds -----------------------------------------------------------------


@pytest.fixture
def conv():
    return checkpoint.initialised(lambda: ConvVAE((1, 8, 12), 4, 3), SEED)


@pytest.mark.parametrize("make", [lambda: VAE(96, 24, 5), lambda: ConvVAE((1, 8, 12), 4, 5)],
                         ids=["vae", "conv"])  # fmt: skip
def test_gradients_are_those_of_the_reference_backend(make):
    model = checkpoint.initialised(make, SEED)
    x, found = genfast.rand(7, 1, 8, 12, seed=2), {}
    for backend in ("auto", "reference"):
        with genfast.backend(backend):
            loss = model.loss(x, seed=torch.arange(7))
            found[backend] = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_conv_samples_are_bitwise_the_same_for_any_batch_size(conv):
    whole = conv.sample(TILE + 6, SEED)
    assert whole.shape == (TILE + 6, 1, 8, 12)
    for start, n in ((0, 1), (5, TILE), (TILE, 6)):
        assert torch.equal(conv.sample(n, SEED, start), whole[start : start + n])


def test_conv_reconstructs_and_interpolates_in_shape(conv):
    x = genfast.rand(4, 1, 8, 12, seed=1)
    assert conv.reconstruct(x).shape == x.shape
    assert conv.interpolate(x[:2], x[2:], 3).shape == (2, 3, 1, 8, 12)
    with pytest.raises(ValueError, match="divisible by 4"):
        ConvVAE((1, 25, 25))


def test_beta_weighs_the_kl(vae, x):
    logits, kl = vae(x, seed=4)
    vae.beta = 3.0
    want = -vae.elbo(x, seed=4) + 2.0 * kl
    torch.testing.assert_close(vae.loss(x, seed=4), want.mean())
    assert VAE(36, 24, 5, beta=3.0).config["beta"] == 3.0


def test_bound_tightens_from_the_elbo_towards_ln_p(vae, x):
    """One draw of many is an elbo; with a linear decoder of one latent, ln p(x) is an integral."""
    one = torch.stack([vae.bound(x, 1, seed=s) for s in range(300)]).mean(0)
    elbo = torch.stack([vae.elbo(x, seed=1000 + s) for s in range(300)]).mean(0)
    torch.testing.assert_close(one, elbo, rtol=0, atol=0.5)
    small = checkpoint.initialised(lambda: VAE(36, 24, 1), SEED)
    z = torch.linspace(-8, 8, 4001)[:, None]
    with torch.no_grad():
        likelihood = -torch.stack([small._nll(small.decode(z), v.expand(4001, 1, 6, 6)) for v in x])
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z[:, 0])
    exact = torch.logsumexp(likelihood + prior, 1) + torch.log(z[1] - z[0])
    assert (small.elbo(x, seed=3) < exact + 2).all()
    torch.testing.assert_close(small.bound(x, 2000, seed=1), exact, rtol=0, atol=0.05)


def test_anomaly_score_finds_what_was_not_trained():
    """Trained on images with one bright column; noise of the same values scores higher."""
    from test_train import blobs

    model = checkpoint.initialised(lambda: VAE(36, 24, 5), SEED)
    data = blobs()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(150):
        optimizer.zero_grad()
        model.loss(data.train.images, seed=SEED, stream=step).backward()
        optimizer.step()
    normal = model.anomaly_score(data.test.images)
    order = genfast.rand(36, seed=9).argsort()
    strange = model.anomaly_score(data.test.images.flatten(1)[:, order])
    assert normal.max() < strange.min()
    assert torch.equal(normal, model.anomaly_score(data.test.images))
    with pytest.raises(ValueError, match="draws: expected"):
        model.anomaly_score(data.test.images, 0)
