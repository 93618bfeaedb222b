"""StyleGAN2: its equations in PyTorch lines, double backward, seeds, samples, recipe, commands."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import genfast
from genfast import cli
from genfast.models import StyleGAN2
from genfast.models._seeds import sample_seeds
from genfast.models.stylegan import TILE, ModulatedConv, deviation
from genfast.train import checkpoint, loop
from genfast.train.recipes import RECIPES
from genfast.train.settings import Settings

SEED, SHAPE = 5, (1, 8, 8)
SEEDS = sample_seeds(6, SEED)
SMALL = {"shape": SHAPE, "width": 4, "z_dim": 5, "w_dim": 6, "mapping_layers": 2}


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**more):
    model = checkpoint.initialised(lambda: StyleGAN2(**{**SMALL, **more}), SEED)
    with torch.no_grad():  # the strength of the noise starts at 0
        for i, p in enumerate(model.parameters()):
            p.add_(0.1 * genfast.randn(p.shape, seed=SEED, stream=i))
    return model


@pytest.fixture
def x():
    return genfast.rand(6, *SHAPE, seed=2)


# ---- losses and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1])
def test_losses_and_gradients_are_those_of_the_reference_backend(step, x):
    """With R1 and the path length (step 0), and without."""
    found = {}
    for backend in ("auto", "reference"):
        with genfast.backend(backend):
            model = tiny()
            losses = {
                model.D: model.d_loss(x, seed=SEEDS, step=step),
                model.G: model.g_loss(seed=SEEDS, step=step),
            }
            found[backend] = [
                t
                for net, loss in losses.items()
                for t in (loss.detach(), *torch.autograd.grad(loss, list(net.parameters())))
            ]
    assert sum(t.abs().max() > 1e-6 for t in found["auto"]) > 40
    for i, (a, b) in enumerate(zip(*found.values(), strict=True)):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a / scale, b / scale, rtol=2e-4, atol=2e-5, msg=f"tensor {i}")


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("demodulate", [False, True])
def test_modulation_is_that_of_the_weights(up, demodulate):
    """Equations 1 and 3: one kernel a sample, as a convolution of its own."""
    conv = ModulatedConv(3, 4, 3, 6, demodulate=demodulate, up=up)
    x, w = torch.randn(2, 3, 5, 5), torch.randn(2, 6)
    s = F.linear(w, conv.affine.weight * conv.affine.gain) + conv.affine.bias
    for b in range(2):
        kernel = conv.weight * conv.gain * s[b][None, :, None, None]
        if demodulate:
            kernel = kernel / (kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:
            y = F.conv_transpose2d(x[b : b + 1], kernel.transpose(0, 1), stride=2)
            y = genfast.upfirdn2d(y, genfast.setup_filter([1, 3, 3, 1]), padding=1, gain=4.0)
        else:
            y = F.conv2d(x[b : b + 1], kernel, padding=1)
        torch.testing.assert_close(conv(x, w)[b : b + 1], y, rtol=1e-4, atol=1e-5)


def test_modulated_convolution_has_a_double_backward():
    conv = ModulatedConv(2, 3, 3, 4, up=True).double()
    x, w = torch.randn(1, 2, 3, 3).double(), torch.randn(1, 4).double()
    inputs = (x.requires_grad_(), w.requires_grad_())
    assert torch.autograd.gradcheck(conv, inputs)
    assert torch.autograd.gradgradcheck(conv, inputs)


def test_r1_is_lazy_and_mescheders(x):
    model = tiny(r1=3.0, r1_every=4)
    with torch.no_grad():
        real, fake = model.D(2 * x - 1), model.D(model.G(SEEDS, model.mixing))
    plain = F.softplus(fake).mean() + F.softplus(-real).mean()
    torch.testing.assert_close(model.d_loss(x, seed=SEEDS, step=3).detach(), plain)
    images = (2 * x - 1).requires_grad_()
    (slope,) = torch.autograd.grad(model.D(images).sum(), images)
    penalty = 0.5 * 3.0 * 4 * slope.square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(model.d_loss(x, seed=SEEDS, step=8).detach(), plain + penalty)


def test_path_length_is_that_of_the_jacobian():
    """|J^T y| by finite differences of <image, y> along each w, fp64."""
    model = tiny(path=1.0, path_every=1, mixing=0.0).double()
    model.path_mean.fill_(0.5)
    seeds = SEEDS[:2]
    ws = model.G.styles(seeds).detach()
    y = genfast.randn(2, *SHAPE, seed=seeds, stream=3).double()
    J = torch.zeros_like(ws)
    for at in range(ws[0].numel()):
        step = torch.zeros_like(ws).flatten(1)
        step[:, at] = 1e-5
        step = step.view_as(ws)
        difference = model.G.synthesis(ws + step, seeds) - model.G.synthesis(ws - step, seeds)
        J.flatten(1)[:, at] = (difference * y).sum((1, 2, 3)).detach() / 2e-5 / math.sqrt(64)
    lengths = J.square().sum(2).mean(1).sqrt()
    mean = 0.5 + 0.01 * (lengths.mean() - 0.5)
    want = (lengths - mean).square().mean()
    torch.testing.assert_close(model._path_penalty(sample_seeds(4, SEED)), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.path_mean, mean, rtol=1e-6, atol=0)


def test_the_first_mean_path_length_is_the_first_batchs():
    model = tiny()
    model.g_loss(seed=SEEDS, step=0)
    assert model.path_mean > 0
    before = model.path_mean.clone()
    model.eval().g_loss(seed=SEEDS, step=0)
    assert torch.equal(model.path_mean, before)


def test_deviation_tells_equal_samples_from_different_ones():
    same = torch.randn(1, 2, 3, 3).expand(4, -1, -1, -1)
    assert deviation(same, 4)[:, -1].abs().max() < 1.1e-4
    x = torch.randn(4, 2, 3, 3)
    want = x.var(0, unbiased=False).add(1e-8).sqrt().mean()
    torch.testing.assert_close(deviation(x, 4)[:, -1], want.expand(4, 3, 3))


# ---- samples -------------------------------------------------------------------------------------


def test_samples_are_bitwise_the_same_for_any_batch_size():
    model, n = tiny(), 2 * TILE + 3
    whole = model.sample(n, SEED)
    assert whole.shape == (n, *SHAPE) and whole.min() >= 0 and whole.max() <= 1
    assert not torch.equal(whole[0], whole[1])
    for start, count in ((0, 1), (7, TILE), (TILE - 1, 2), (n - 1, 1), (3, 0)):
        torch.manual_seed(start)  # not read
        assert torch.equal(model.sample(count, SEED, start), whole[start : start + count]), start
    assert not torch.equal(model.sample(2, SEED + 1), whole[:2])


def test_truncation_goes_to_the_mean_image():
    model = tiny()
    for block in model.G.synthesis.convs:
        block.act.strength.data.zero_()  # the noise is no style
    model.G.mapping.w_avg.fill_(0.1)
    flat = model.sample(3, SEED, psi=0.0)
    torch.testing.assert_close(flat[0], flat[1])
    spread = [model.sample(8, SEED, psi=psi).std(0).mean() for psi in (0.0, 0.5, 1.0)]
    assert spread[0] < 1e-5 < spread[1] < spread[2]


def test_mixing_takes_the_styles_of_two():
    model = tiny()
    a, b = SEEDS[:2], SEEDS[2:4]
    layers = model.G.synthesis.layers
    plain = (model.G(a).detach() * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.mix(a, b, layers), plain)
    assert not torch.equal(model.mix(a, b, 1), plain)
    ws = model.G.styles(SEEDS, 1.0)
    own = model.G.styles(SEEDS)
    assert torch.equal(ws[:, 0], own[:, 0]) and not torch.equal(ws[:, -1], own[:, -1])


# ---- the recipe ----------------------------------------------------------------------------------


def run(*args):
    return cli.main([str(a) for a in args])


def test_the_recipe_moves_all_of_its_model():
    recipe = RECIPES["stylegan2"]
    options = {k: o.default for k, o in recipe.options.items()}
    model = recipe.build({"shape": [1, 28, 28]}, options)
    assert StyleGAN2(**json.loads(json.dumps(model.config))).config == model.config
    players = recipe.players(model, options)
    for parameter, _ in model.named_parameters():
        assert sum(p.owns(parameter) for p in players) == 1, parameter
    Settings(**recipe.settings)


def test_sixteen_bits(x):
    """Under autocast the means stay fp32; a converted model runs in its own type."""
    model = tiny(path_every=1)
    with torch.autocast("cpu", torch.bfloat16):
        model.g_loss(seed=SEEDS).backward()
        model.d_loss(x, seed=SEEDS).backward()
        assert model.sample(2, SEED, psi=0.5).shape == (2, *SHAPE)
    assert model.G.mapping.w_avg.dtype == model.path_mean.dtype == torch.float32
    assert model.G.mapping.w_avg.any() and model.path_mean > 0
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = tiny().to(dtype)
        assert model.g_loss(seed=SEEDS).dtype == model.d_loss(x.to(dtype), seed=SEEDS).dtype
        assert model.sample(2, SEED, psi=0.5).dtype == dtype


def test_from_the_command_line(tmp_path, capsys):
    """Train, generate in two batch sizes, truncate, evaluate."""
    out = tmp_path / "run"
    assert run("train", "stylegan2", "--data", "digits", "--out", out, "--epochs", 1,
               "--threads", 1, "--width", 4, "--batch-size", 64) == 0  # fmt: skip
    (record,) = loop.records(out / loop.LOG)
    assert {"validation_classifier_fid", "validation_accuracy_real"} < set(record)
    assert (out / "samples.png").is_file()
    from PIL import Image

    pictures = []
    for batch, psi in ((3, 1.0), (10, 1.0), (10, 0.3)):
        png = out / f"{batch}-{psi}.png"
        assert run("generate", "--from", out, "--seed", 4, "--count", 10, "--batch-size", batch,
                   "--psi", psi, "--out", png) == 0  # fmt: skip
        with Image.open(png) as image:
            pictures.append(image.tobytes())
    assert pictures[0] == pictures[1] != pictures[2]
    assert run("evaluate", "--from", out, "--count", 30, "--json", out / "e.json") == 0
    found = json.loads((out / "e.json").read_text())["metrics"]
    assert {"classes covered", "coverage", "discriminator accuracy, real"} <= set(found)
    assert all(math.isfinite(v) for v in found.values())


# ---- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StyleGAN2((1, 29, 28)), r"shape: expected \(C, H, W\) with H and W that halve"),
        (lambda: StyleGAN2(group=0), "group: expected an int >= 1, got 0"),
        (lambda: StyleGAN2(z_dim=0), "z_dim: expected an int >= 1, got 0"),
        (lambda: StyleGAN2(r1_every=0), "r1_every: expected an int >= 1, got 0"),
        (lambda: tiny().d_loss(torch.zeros(2, 1, 9, 8), seed=SEEDS[:2]),
         r"x: expected \(B, 1, 8, 8\), got shape \(2, 1, 9, 8\)"),
        (lambda: tiny().sample(-1, 0), "n, start: expected ints >= 0"),
    ],
)  # fmt: skip
def test_bad_input_names_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
