"""The VAE: its loss against plain PyTorch lines, its samples whatever the batch, its training."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import genfast
from genfast.models import VAE
from genfast.models.vae import TILE
from genfast.reference import rng as noise
from genfast.train import checkpoint, data, loop
from genfast.train.recipes import RECIPES

SEED = 11


@pytest.fixture(autouse=True)
def one_thread():
    """These models are tiny: two threads of a busy machine would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    ],
    ids=["width", "no batch", "negative n", "one step"],
)
def test_bad_input_names_what_was_expected(vae, call):
    with pytest.raises(ValueError, match="expected"):
        call(vae)


# ---- training ------------------------------------------------------------------------------------


def blobs(n=120, seed=0):
    """Images with one bright column: something that a small VAE learns in seconds."""
    at = genfast.randint(0, 6, n, seed=seed)
    images = 0.9 * F.one_hot(at, 6).float()[:, None, None].expand(n, 1, 6, 6) + 0.05
    return data.split(data.Images(images.contiguous(), at), seed=1)


def run(folder, **settings):
    folder.mkdir(exist_ok=True)
    model = checkpoint.initialised(lambda: VAE(36, 24, 5), SEED)
    chosen = {"epochs": 4, "batch_size": 32, **settings}
    return model, loop.train("vae", RECIPES["vae"], model, blobs(), loop.Settings(**chosen), folder)


def test_training_learns(tmp_path):
    model = checkpoint.initialised(lambda: VAE(36, 24, 5), SEED)
    before = loop.evaluate(RECIPES["vae"], model, blobs().test, 0)
    _, summary = run(tmp_path, epochs=30, batch_size=8, lr=1e-2)
    assert summary["test_loss"] < before - 10  # nats; measured 25.1 before, 12.5 after
    records = [json.loads(line) for line in (tmp_path / loop.LOG).read_text().splitlines()]
    assert [r["epoch"] for r in records] == list(range(1, len(records) + 1))
    assert min(r["validation_loss"] for r in records) == summary["validation_loss"]


def test_same_seed_is_the_same_run_and_torch_state_does_not_matter(tmp_path):
    torch.manual_seed(1)
    first, one = run(tmp_path / "a")
    torch.manual_seed(2)
    second, two = run(tmp_path / "b")
    other, _ = run(tmp_path / "c", seed=1)
    assert one["validation_loss"] == two["validation_loss"]
    for k, v in first.state_dict().items():
        assert torch.equal(v, second.state_dict()[k]), k
    assert not torch.equal(first.fc1.weight, other.fc1.weight)


def test_training_leaves_torchs_generator_alone(tmp_path):
    before = torch.random.get_rng_state()
    run(tmp_path, epochs=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_early_stopping_keeps_the_best_epoch(tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 3.5, 99.0, 7.0])
    monkeypatch.setattr(loop, "evaluate", lambda *_: next(losses))
    _, summary = run(tmp_path, epochs=30, patience=2)
    assert summary["best_epoch"] == 2 and summary["epochs"] == 4
    assert checkpoint.load(tmp_path)[1]["epoch"] == 2


def test_a_nan_loss_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    run(tmp_path, epochs=1)
    kept = (tmp_path / checkpoint.CHECKPOINT).read_bytes()
    model = checkpoint.initialised(lambda: VAE(36, 24, 5), SEED)
    with torch.no_grad():
        model.fc3.weight[0, 0] = math.nan
    with pytest.raises(loop.Diverged, match="step 0 .*Try a smaller lr"):
        loop.train("vae", RECIPES["vae"], model, blobs(), loop.Settings(epochs=1), tmp_path)
    assert (tmp_path / checkpoint.CHECKPOINT).read_bytes() == kept


def test_schedule_rises_then_falls_to_zero():
    shares = [loop.lr_share(step, 100, 10) for step in range(101)]
    assert shares[0] == 0.1 and shares[9] == 1.0 and shares[10] == 1.0
    assert shares == sorted(shares[:10]) + sorted(shares[10:], reverse=True)
    assert shares[100] == pytest.approx(0)


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"lr": -1.0}, {"lr": math.nan}, {"warmup": 2.0}, {"clip": 0.0}, {"seed": -1}],
    ids=str,
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        loop.Settings(**wrong)


# ---- checkpoints and data ------------------------------------------------------------------------


def test_checkpoint_round_trip(tmp_path, vae):
    path = checkpoint.save(tmp_path, "vae", vae, {"shape": [6, 6]})
    loaded, about = checkpoint.load(tmp_path)
    assert about["config"] == {"x_dim": 36, "h_dim": 24, "z_dim": 5} and about["shape"] == [6, 6]
    assert not loaded.training and [p.name for p in tmp_path.iterdir()] == [path.name]
    for k, v in vae.state_dict().items():
        assert torch.equal(v, loaded.state_dict()[k]), k


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, vae, monkeypatch):
    path = checkpoint.save(tmp_path, "vae", vae, {})
    kept = path.read_bytes()

    def broken(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, "vae", vae, {})
    assert path.read_bytes() == kept and len(list(tmp_path.iterdir())) == 1


def test_bad_checkpoints_are_refused(tmp_path, vae):
    from safetensors.torch import save_file

    path = tmp_path / checkpoint.CHECKPOINT
    with pytest.raises(checkpoint.BadCheckpoint, match="as `genfast train` writes it"):
        checkpoint.load(tmp_path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(checkpoint.BadCheckpoint, match="not a readable safetensors file"):
        checkpoint.load(tmp_path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(checkpoint.BadCheckpoint, match="not a genfast checkpoint"):
        checkpoint.load(tmp_path)
    checkpoint.save(tmp_path, "gan", vae, {})
    with pytest.raises(checkpoint.BadCheckpoint, match="expected one of vae, got 'gan'"):
        checkpoint.load(tmp_path)


def test_mnist5k_is_real_and_its_split_is_fixed():
    digits = data.load("mnist5k")
    assert digits.images.shape == (5000, 1, 28, 28) and digits.images.dtype == torch.float32
    assert digits.images.min() == 0 and digits.images.max() == 1
    assert digits.labels.bincount().tolist() == [500] * 10
    parts = data.split(digits)
    sizes = [len(p.images) for p in (parts.train, parts.validation, parts.test)]
    assert sizes == [4000, 500, 500]
    again = data.split(digits)
    assert torch.equal(parts.test.labels, again.test.labels)
    everything = torch.cat([parts.train.images, parts.validation.images, parts.test.images])
    assert torch.equal(everything.sum((1, 2, 3)).sort()[0], digits.images.sum((1, 2, 3)).sort()[0])


def test_unknown_data_lists_the_table():
    with pytest.raises(data.UnknownData, match="expected one of mnist5k, got 'cifar'"):
        data.load("cifar")
    with pytest.raises(ValueError, match="expected shares"):
        data.split(data.Images(torch.zeros(3, 1, 2, 2), torch.zeros(3)), 0.5, 0.5)
