"""GAN, DCGAN, WGAN, WGAN-GP, CycleGAN and VAE-GAN: losses and gradients, penalties, samples
whatever the batch, data of two domains, commands."""

import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import genfast
from genfast import cli
from genfast.metrics import images as metrics
from genfast.models import DCGAN, GAN, VAEGAN, WGAN, WGANGP, CycleGAN
from genfast.models._seeds import sample_seeds
from genfast.models.gan import (
    FAKE,
    LATENT,
    MIX,
    OBJECTIVES,
    TILE,
    gradient_penalty,
    r1_penalty,
)
from genfast.models.hybrid.vae_gan import POSTERIOR
from genfast.train import checkpoint, data, loop
from genfast.train.recipes import RECIPES
from genfast.train.settings import Settings

SEED, SHAPE = 5, (1, 8, 8)
SEEDS = sample_seeds(6, SEED)
SMALL = {"shape": SHAPE, "z_dim": 5, "width": 4, "levels": 2}

# name -> (class, arguments)
MODELS = {
    "gan": (GAN, {"shape": SHAPE, "z_dim": 5, "h_dim": 12}),
    "gan, minimax, R1": (GAN, {"shape": SHAPE, "h_dim": 12, "objective": "minimax", "r1": 1.0}),
    "dcgan": (DCGAN, SMALL),
    "dcgan, hinge, spectral norm": (
        DCGAN, {**SMALL, "objective": "hinge", "batch_norm": False, "spectral_norm": True},
    ),
    "dcgan, noise": (DCGAN, {**SMALL, "objective": "least-squares", "noise": 0.3}),
    "wgan": (WGAN, SMALL),
    "wgan-gp": (WGANGP, SMALL),
    "vae-gan": (VAEGAN, SMALL),
    "cyclegan": (CycleGAN, {"shape": SHAPE, "width": 4, "d_width": 4, "blocks": 1}),
}  # fmt: skip
DRAWING = [name for name in MODELS if name != "cyclegan"]


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(name, **more):
    cls, given = MODELS[name]
    model = checkpoint.initialised(lambda: cls(**{**given, **more}), SEED)
    with torch.no_grad():  # away from N(0, 0.02): give every path something to do
        for i, p in enumerate(model.parameters()):
            p.add_(0.1 * genfast.randn(p.shape, seed=SEED, stream=i))
    return model


@pytest.fixture
def x():
    return genfast.rand(6, *SHAPE, seed=2)


def losses(model, x):
    """Name -> (loss, its player's parameters)."""
    if isinstance(model, CycleGAN):
        y = x.flip(0) * 0.5
        return {
            "G": (model.g_loss(x, y), [*model.G.parameters(), *model.F.parameters()]),
            "D": (model.d_loss(x, y), [*model.D_X.parameters(), *model.D_Y.parameters()]),
        }
    if isinstance(model, VAEGAN):
        found = {"G": (model.g_loss(x, seed=SEEDS), model.G)}
        found["E"] = (model.e_loss(x, seed=SEEDS), model.E)
    else:
        found = {"G": (model.g_loss(len(x), seed=SEEDS), model.G)}
    found["D"] = (model.d_loss(x, seed=SEEDS), model.D)
    return {k: (loss, list(net.parameters())) for k, (loss, net) in found.items()}


# ---- losses and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_reference_backend(name, x):
    found = {}
    for backend in ("auto", "reference"):
        with genfast.backend(backend):
            found[backend] = {
                player: [loss.detach(), *torch.autograd.grad(loss, moved)]
                for player, (loss, moved) in losses(tiny(name), x).items()
            }
    for player, ours in found["auto"].items():
        assert any(g.abs().max() > 1e-6 for g in ours[1:]), player
        for i, (a, b) in enumerate(zip(ours, found["reference"][player], strict=True)):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-6, msg=f"{player}, tensor {i}")


def test_the_games_of_a_gan_are_goodfellows(x):
    """Equation 1 and section 3, by cross entropy, with z of each sample's own seed."""
    model = tiny("gan")
    z = torch.stack([genfast.randn(5, seed=int(s), stream=LATENT) for s in SEEDS])
    real, fake = model.D(2 * x - 1), model.D(model.G(z))
    one, zero = torch.ones(6), torch.zeros(6)
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(
        model.d_loss(x, seed=SEEDS), bce(real, one) + bce(fake, zero), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(model.g_loss(6, seed=SEEDS), bce(fake, one), rtol=1e-5, atol=0)
    model.objective = "minimax"
    torch.testing.assert_close(model.g_loss(6, seed=SEEDS), -bce(fake, zero), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("objective", "d", "g"),
    [  # at D(x) = 0.5, D(G(z)) = -2
        ("least-squares", 0.5 * (0.25 + 4.0), 0.5 * 9.0),
        ("hinge", 0.5 + 0.0, 2.0),
        ("wasserstein", -2.5, 2.0),
        ("non-saturating", math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-2)),
         math.log1p(math.exp(2))),
    ],
)  # fmt: skip
def test_objectives_have_their_papers_values(objective, d, g):
    real, fake = torch.tensor([0.5]), torch.tensor([-2.0])
    assert OBJECTIVES[objective].D(real, fake).item() == pytest.approx(d)
    assert OBJECTIVES[objective].G(fake).item() == pytest.approx(g)
    middle = OBJECTIVES[objective].middle(real, fake)
    assert fake.item() < middle <= real.item()


def test_wgan_gp_is_algorithm_1_in_pytorch_lines(x):
    model = tiny("wgan-gp")
    with torch.no_grad():
        fake = model.G(torch.stack([genfast.randn(5, seed=int(s), stream=LATENT) for s in SEEDS]))
    u = torch.stack([genfast.rand(1, 1, 1, seed=int(s), stream=MIX) for s in SEEDS])
    between = (u * (2 * x - 1) + (1 - u) * fake).requires_grad_(True)
    (slope,) = torch.autograd.grad(model.D(between).sum(), between, create_graph=True)
    penalty = (slope.flatten(1).norm(dim=1) - 1).square()
    want = (model.D(fake) - model.D(2 * x - 1) + 10 * penalty).mean()
    got = model.d_loss(x, seed=SEEDS)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    moved = list(model.D.parameters())
    pairs = zip(torch.autograd.grad(got, moved), torch.autograd.grad(want, moved), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_penalties_of_a_plane_are_those_of_its_slope(x):
    plane = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))
    slope = plane[1].weight.detach().square().sum()
    got = gradient_penalty(plane, x, x.flip(0), SEEDS)
    torch.testing.assert_close(got, (slope.sqrt() - 1).square(), rtol=1e-5, atol=0)
    torch.testing.assert_close(r1_penalty(plane, x), 0.5 * slope, rtol=1e-5, atol=0)


@pytest.mark.parametrize("penalty", ["gradient", "r1"])
def test_penalties_differentiate_by_the_weights(penalty):
    """The gradient of a gradient against finite differences, fp64."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(8, 3), nn.Tanh(),
        nn.Linear(3, 1), nn.Flatten(0),
    ).double()  # fmt: skip
    x = genfast.randn(3, 1, 4, 4, seed=1).double()
    seeds = sample_seeds(3, 1)

    def of(*weights):
        names = [n for n, _ in net.named_parameters()]

        def call(x):
            given = dict(zip(names, weights, strict=True))
            return torch.func.functional_call(net, given, (x,))

        if penalty == "r1":
            return r1_penalty(call, x)
        return gradient_penalty(call, x, x.flip(0), seeds)

    weights = [p.detach().requires_grad_(True) for p in net.parameters()]
    assert torch.autograd.gradcheck(of, weights, atol=1e-6)


def test_a_samples_part_of_the_loss_depends_on_its_seed_alone(x):
    """Without BatchNorm the loss of a batch is the mean of its halves' losses."""
    model = tiny("gan, minimax, R1", noise=0.2, penalty=1.0)
    parts = [model.d_loss(x[i], seed=SEEDS[i], step=3) for i in (slice(0, 3), slice(3, 6))]
    whole = model.d_loss(x, seed=SEEDS, step=3)
    torch.testing.assert_close(whole, sum(parts) / 2, rtol=1e-5, atol=1e-6)
    parts = [model.g_loss(3, seed=SEEDS[i], step=3) for i in (slice(0, 3), slice(3, 6))]
    whole = model.g_loss(6, seed=SEEDS, step=3)
    torch.testing.assert_close(whole, sum(parts) / 2, rtol=1e-5, atol=1e-6)


def test_instance_noise_falls_to_nothing(x):
    model = tiny("dcgan, noise", noise_steps=10)
    for step, sigma in ((0, 0.3), (5, 0.15), (10, 0.0), (99, 0.0)):
        want = x + sigma * genfast.randn(x.shape, seed=SEEDS, stream=FAKE)
        assert torch.equal(model.noisy(x, SEEDS, FAKE, step), want if sigma else x), step


def test_weight_clipping_bounds_the_critic_alone():
    model = tiny("wgan")
    generator = [p.clone() for p in model.G.parameters()]
    model.clip_weights()
    assert max(p.abs().max() for p in model.D.parameters()) == torch.tensor(0.01)
    assert all(torch.equal(a, b) for a, b in zip(generator, model.G.parameters(), strict=True))


def test_spectral_norm_makes_each_layers_gain_one(x):
    model = tiny("dcgan, hinge, spectral norm")
    for _ in range(60):  # each call takes one step of the power iteration
        model.D(2 * x - 1)
    model.eval()
    layers = [m for m in model.D if hasattr(m, "parametrizations")]
    assert len(layers) == 3
    for layer in layers:
        gain = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        torch.testing.assert_close(gain, torch.tensor(1.0), rtol=0.02, atol=0)


def test_accuracy_counts_what_the_discriminator_takes_for_what_it_is(x):
    model = tiny("gan")
    model.D = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))
    with torch.no_grad():
        model.D[1].weight.fill_(1.0)
        model.D[1].bias.fill_(0.0)
    light, dark = torch.full_like(x, 0.9), torch.full_like(x, 0.1)
    assert model.accuracy(light, dark) == (1.0, 1.0)
    assert model.accuracy(dark, light) == (0.0, 0.0)
    assert model.accuracy(torch.cat([light[:3], dark[:3]]), light) == (0.5, 0.0)


# ---- samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWING)
def test_samples_are_bitwise_the_same_for_any_batch_size(name):
    model = tiny(name)
    n = 2 * TILE + 3
    whole = model.sample(n, SEED)
    assert whole.shape == (n, *SHAPE) and whole.min() >= 0 and whole.max() <= 1
    assert not torch.equal(whole[0], whole[1]) and model.training
    for start, count in ((0, 1), (7, TILE), (TILE - 1, 2), (n - 1, 1), (3, 0)):
        torch.manual_seed(start)  # not read
        assert torch.equal(model.sample(count, SEED, start), whole[start : start + count]), start
    assert not torch.equal(model.sample(2, SEED + 1), whole[:2])


def test_sampling_leaves_every_part_in_its_mode():
    model = DCGAN((1, 8, 8), z_dim=4, width=4, levels=1).train()
    model.D.eval()
    model.sample(2, 0)
    assert model.training and model.G.training and not model.D.training


def test_a_cyclegan_is_pickled(x):
    model = CycleGAN((1, 8, 8), width=4, d_width=4, blocks=1)
    y = torch.rand(2, 1, 8, 8)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.g_loss(y, y), model.g_loss(y, y))


def test_a_sample_is_the_generator_at_its_seeds_latent():
    model = tiny("dcgan")
    with torch.no_grad():  # running statistics of something
        model.G(model.latent(64, 3))
    z = genfast.randn(TILE, 5, seed=sample_seeds(TILE, SEED), stream=LATENT)
    want = (model.eval().G(z)[:2] + 1) / 2
    torch.testing.assert_close(model.sample(2, SEED), want.detach(), rtol=0, atol=0)


# ---- VAE-GAN -------------------------------------------------------------------------------------


def test_vae_gan_is_algorithm_1_of_larsen(x):
    model = tiny("vae-gan", gamma=0.1)
    mu, logvar = model.E(2 * x - 1).chunk(2, 1)
    eps = torch.stack([genfast.randn(5, seed=int(s), stream=POSTERIOR) for s in SEEDS])
    z = mu + eps * (0.5 * logvar).exp()
    z_p = torch.stack([genfast.randn(5, seed=int(s), stream=LATENT) for s in SEEDS])
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1).mean()

    def body(x):
        for layer in list(model.D)[:-2]:
            x = layer(x)
        return x

    like = 0.5 * (body(2 * x - 1) - body(model.G(z))).square().sum(1).mean()
    real, ours, drawn = model.D(2 * x - 1), model.D(model.G(z)), model.D(model.G(z_p))
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(model.e_loss(x, seed=SEEDS), kl + like, **close)
    fooled = F.softplus(-ours).mean() + F.softplus(-drawn).mean()
    torch.testing.assert_close(model.g_loss(x, seed=SEEDS), 0.1 * like + fooled, **close)
    caught = F.softplus(-real) + 0.5 * (F.softplus(ours) + F.softplus(drawn))
    torch.testing.assert_close(model.d_loss(x, seed=SEEDS), caught.mean(), **close)


def test_vae_gan_reconstructs_at_the_mean(x):
    model = tiny("vae-gan")
    found = model.reconstruct(x)
    assert model.training and found.shape == x.shape
    model.eval()
    assert torch.equal(found, model(model.encode(x)[0]).detach())


# ---- CycleGAN and its data -----------------------------------------------------------------------


def test_cyclegan_is_equation_3(x):
    model = tiny("cyclegan", cycle=7.0, identity=0.25)
    y = x.flip(0) * 0.5
    a, b = 2 * x - 1, 2 * y - 1
    there, fro = model.G(a), model.F(b)
    l1, square = F.l1_loss, lambda d, to: (d - to).square().mean()
    cycle = l1(model.F(there), a) + l1(model.G(fro), b)
    same = l1(model.G(b), b) + l1(model.F(a), a)
    game = 0.5 * square(model.D_Y(there), 1) + 0.5 * square(model.D_X(fro), 1)
    torch.testing.assert_close(model.g_loss(x, y), game + 7 * cycle + 7 * 0.25 * same)
    caught = square(model.D_X(a), 1) + square(model.D_X(fro), 0)
    caught = caught + square(model.D_Y(b), 1) + square(model.D_Y(there), 0)
    torch.testing.assert_close(model.d_loss(x, y), 0.5 * caught)


def test_translations_are_bitwise_the_same_for_any_batch_size():
    model, x = tiny("cyclegan"), genfast.rand(TILE + 3, *SHAPE, seed=1)
    for to in ("X", "Y"):
        whole = model.translate(x, to)
        for part in (slice(0, 1), slice(5, TILE + 1), slice(TILE, TILE + 3)):
            assert torch.equal(model.translate(x[part], to), whole[part])
    assert not torch.equal(model.translate(x), model.translate(x, "X"))


def test_a_patch_is_22_pixels_wide():
    D = CycleGAN((1, 48, 48), 2, 2, 1).D_X
    x = genfast.rand(1, 1, 48, 48, seed=1).requires_grad_(True)
    grid = nn.Sequential(*[layer for layer in D if not isinstance(layer, nn.InstanceNorm2d)][:-1])
    out = grid(x)[0, 0]
    out[5, 5].backward()
    seen = x.grad[0, 0] != 0
    assert seen.any(0).sum() == 22 and seen.any(1).sum() == 22


def test_thin_and_thick_digits_are_unpaired_and_a_pixel_apart():
    found = data.load("thin-thick", data.DOMAINS)
    assert found.x.shape == found.y.shape == (2500, 1, 28, 28)
    thick_x, thin_y = found.truths
    assert (found.x <= thick_x).all() and (thin_y <= found.y).all()
    ink = [t.mean().item() for t in (found.x, thick_x, thin_y, found.y)]
    assert ink[1] > 1.5 * ink[0] and ink[3] > 1.5 * ink[2]
    originals = {x.numpy().tobytes() for x in found.x}
    assert not originals & {x.numpy().tobytes() for x in thin_y}  # no digit is in both
    block = torch.zeros(1, 1, 6, 6)
    block[..., 1:5, 2:4] = 1.0
    assert data.thinner(block).sum() == 3 * 1 and data.thicker(block).sum() == 5 * 3


# ---- the recipes ---------------------------------------------------------------------------------

OURS = ("gan", "dcgan", "wgan", "wgan-gp", "vae-gan")


@pytest.mark.parametrize("name", [*OURS, "cyclegan"])
def test_recipes_build_their_model_and_move_all_of_it(name):
    recipe = RECIPES[name]
    options = {k: o.default for k, o in recipe.options.items()}
    model = recipe.build({"shape": [1, 28, 28]}, options)
    assert type(model) is recipe.model
    assert type(model)(**json.loads(json.dumps(model.config))).config == model.config
    players = recipe.players(model, options)
    for parameter, _ in model.named_parameters():
        assert sum(p.owns(parameter) for p in players) == 1, parameter
    assert {p.name: p.averaged for p in players if p.name.startswith("discriminator")} == {
        "discriminators" if name == "cyclegan" else "discriminator": False
    }
    Settings(**recipe.settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def run(*args):
    return cli.main([str(a) for a in args])


def trained(folder, name, *more):
    out = folder / name
    if not out.exists():
        data_name = "two-photos" if name == "cyclegan" else "digits"
        assert run("train", name, "--data", data_name, "--out", out, "--epochs", 1, "--threads", 1,
                   *more) == 0  # fmt: skip
    return out


SMALLEST = {
    "gan": ("--h-dim", 16), "dcgan": ("--width", 4), "wgan": ("--width", 4),
    "wgan-gp": ("--width", 4, "--n-critic", 2), "vae-gan": ("--width", 4),
    "cyclegan": ("--width", 2, "--d-width", 2, "--blocks", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALLEST)
def test_from_the_command_line(name, folder, capsys):
    """Train, generate in two batch sizes, evaluate, inspect."""
    out = trained(folder, name, *SMALLEST[name])
    (record,) = loop.records(out / loop.LOG)
    assert {"validation_classifier_fid", "validation_accuracy_real", "validation_accuracy_fake"} < (
        set(record)
    )
    assert (out / ("translations.png" if name == "cyclegan" else "samples.png")).is_file()
    pictures = []
    for batch in (3, 10):
        png = out / f"{batch}.png"
        assert run("generate", "--from", out, "--seed", 4, "--count", 10, "--batch-size", batch,
                   "--out", png) == 0  # fmt: skip
        from PIL import Image

        with Image.open(png) as image:
            pictures.append(image.tobytes())
            assert json.loads(image.text["genfast"])["model"] == name
    assert pictures[0] == pictures[1]
    capsys.readouterr()
    assert run("evaluate", "--from", out, "--count", 30, "--json", out / "e.json") == 0
    found = json.loads((out / "e.json").read_text())["metrics"]
    want = {
        "cyclegan": {"round_trip_error", "classifier_fid"},
        "vae-gan": {"reconstruction PSNR, dB", "classes covered", "coverage"},
    }.get(name, {"discriminator accuracy, real", "classes covered", "coverage"})
    assert want <= set(found) and all(math.isfinite(v) for v in found.values())
    capsys.readouterr()
    assert run("inspect", out / "model.safetensors", "--json") == 0
    about = json.loads(capsys.readouterr().out)
    assert about["model"] == name and "validation_classifier_fid" in about


def test_translations_of_another_data_set_and_the_other_way(folder):
    out = trained(folder, "cyclegan", *SMALLEST["cyclegan"])
    for to in ("X", "Y"):
        assert run("generate", "--from", out, "--seed", 1, "--count", 2, "--to", to,
                   "--given", "two-photos", "--out", out / f"{to}.png") == 0  # fmt: skip
    assert (out / "X.png").read_bytes() != (out / "Y.png").read_bytes()


def test_classes_covered_needs_a_hundredth_of_the_samples():
    labels = torch.tensor([0] * 150 + [1] * 48 + [2] * 2 + [3])
    assert metrics.classes_covered(labels, 10) == 2  # 2 of 201 are less than 1 %
    assert metrics.classes_covered(labels[:200], 10) == 3
    assert metrics.classes_covered(torch.zeros(5, dtype=torch.long), 10) == 1


@pytest.mark.slow
def test_a_dcgan_learns_real_digits(tmp_path):
    """scikit-learn's 8 x 8 digits, seconds: all ten classes, and far nearer than at first."""
    recipe = RECIPES["dcgan"]
    digits = recipe.load("digits", {})
    options = {k: o.default for k, o in recipe.options.items()} | {"width": 16}
    model = checkpoint.initialised(lambda: recipe.build(digits.about, options), 0)
    settings = Settings(**{**recipe.settings, "epochs": 20, "lr": 1e-3, "alarm": "stop"})
    loop.train("dcgan", recipe, model, digits, settings, tmp_path, {"options": options})
    first, *_, last = loop.records(tmp_path / loop.LOG)
    name = "validation_classifier_fid"
    assert last[name] < 0.2 * first[name]
    found = recipe.evaluate(model.eval(), digits, 1, 300, {})
    assert found["classes covered"] >= 9 and found["coverage"] > 0.3


@pytest.mark.parametrize("penalty", ["r1", "penalty"])
def test_vae_gan_knows_the_penalties_of_a_gan(penalty):
    x, seed = torch.rand(4, *SHAPE), torch.arange(4)
    plain, *weighed = (tiny("vae-gan", **{penalty: w}).eval() for w in (0.0, 1.0, 3.0))
    for model in weighed:
        model.load_state_dict(plain.state_dict())
    base, one, three = (float(m.d_loss(x, seed=seed)) for m in (plain, *weighed))
    assert one > base and three - base == pytest.approx(3 * (one - base), rel=1e-3)


# ---- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GAN(objective="hing"), "objective: expected one of non-saturating.*got 'hing'"),
        (lambda: GAN(r1=-1.0), "r1: expected a finite number >= 0.0, got -1"),
        (lambda: GAN(z_dim=0), "z_dim: expected an int >= 1, got 0"),
        (lambda: GAN(noise=0.1, noise_steps=0), "noise_steps: expected an int >= 1"),
        (lambda: GAN(h_dim=0), "h_dim: expected an int >= 1"),
        (lambda: GAN((28, 28)), r"shape: expected \(C, H, W\), three ints, got \(28, 28\)"),
        (lambda: DCGAN(width=-1), "width: expected an int >= 1, got -1"),
        (lambda: VAEGAN(width=0), "width: expected an int >= 1"),
        (lambda: CycleGAN(blocks=0), "blocks: expected an int >= 1"),
        (lambda: CycleGAN((1, 4, 8)), r"H, W >= 8, got \(1, 4, 8\)"),
        (lambda: tiny("gan").d_loss(torch.zeros(0, *SHAPE), seed=1), "at least one sample"),
        (lambda: tiny("cyclegan").g_loss(torch.zeros(0, *SHAPE), torch.zeros(1, *SHAPE)),
         "x: expected at least one sample"),
        (lambda: tiny("vae-gan").e_loss(torch.zeros(0, *SHAPE), seed=1), "at least one sample"),
        (lambda: DCGAN((1, 30, 28)), r"divisible by 4 for 2 levels, got \(1, 30, 28\); take fewer"),
        (lambda: DCGAN(levels=0), "levels: expected an int >= 1"),
        (lambda: WGAN(clip_weight=math.inf), "clip_weight: expected a finite number >= 0"),
        (lambda: WGANGP(penalty=math.nan), "penalty: expected a finite number >= 0"),
        (lambda: VAEGAN(gamma=0.0), "gamma: expected a finite number > 0"),
        (lambda: CycleGAN((1, 30, 28)), "divisible by 4"),
        (lambda: CycleGAN(cycle=-1.0), "cycle: expected a number >= 0"),
        (lambda: tiny("gan").d_loss(torch.zeros(2, 1, 9, 8), seed=1),
         r"x: expected \(B, 1, 8, 8\), got shape \(2, 1, 9, 8\)"),
        (lambda: tiny("gan")(torch.zeros(2, 4)), r"z: expected \(B, 5\), got shape \(2, 4\)"),
        (lambda: tiny("gan").sample(-1, 0), "n, start: expected ints >= 0"),
        (lambda: tiny("cyclegan")(torch.zeros(1, *SHAPE), "Z"), "to: expected X or Y, got 'Z'"),
        (lambda: tiny("cyclegan").g_loss(torch.zeros(1, *SHAPE), torch.zeros(1, 3, 8, 8)),
         r"y: expected \(B, 1, 8, 8\)"),
        (lambda: RECIPES["cyclegan"].load("mnist5k", {}),
         "data: expected one of thin-thick, two-photos, got 'mnist5k'"),
    ],
)  # fmt: skip
def test_bad_input_names_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["gan", "vae-gan", "cyclegan"])
def test_bytes_are_refused(name):
    x = torch.zeros(2, *SHAPE, dtype=torch.uint8)
    model = tiny(name)
    call = model if name == "cyclegan" else lambda x: model.d_loss(x, seed=1)
    with pytest.raises(TypeError, match=r"x: expected floats in \[0, 1\], got torch.uint8; divide"):
        call(x)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("gan", "--n-critic", "0"), "every: expected an int >= 1, got 0"),
        (("dcgan", "--d-lr", "-1"), "lr: expected a multiple > 0, got -1"),
        (("dcgan", "--levels", "4"), "H and W divisible by 16 for 4 levels, got (1, 8, 8)"),
        (("gan", "--width", "3"), "--width: no option of gan"),
        (("vae-gan", "--alarm", "shout"), "alarm: expected one of warn, stop, off"),
    ],
)
def test_wrong_flags_say_what_was_expected(args, message, tmp_path, capsys):
    assert run("train", *args, "--data", "digits", "--out", tmp_path, "--epochs", 1) == 2
    assert message in capsys.readouterr().err
