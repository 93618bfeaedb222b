"""The diffusion model: shapes, loss and gradients, samples whatever the batch, conditioning."""

import math

import pytest
import torch
from torch.nn.utils import prune

import genfast
from genfast.models import Diffusion, UNet
from genfast.models import diffusion as module
from genfast.models._seeds import sample_seeds
from genfast.models.diffusion import hole, shrink
from genfast.models.process import NOISE, PLANS, STEPS, TIME
from genfast.train import checkpoint, loop
from genfast.train.recipes import RECIPES
from genfast.train.settings import Settings

SEED, TILE = 5, Diffusion.TILE
SEEDS = sample_seeds(6, SEED)


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**more):
    given = {"shape": (1, 8, 8), "widths": (8, 16), "classes": 4, "head_dim": 8, "T": 100, **more}
    model = checkpoint.initialised(lambda: Diffusion(**given), SEED).eval()
    with torch.no_grad():  # the last layers start at 0: give every path something to do
        for i, p in enumerate(model.parameters()):
            p.add_(0.05 * genfast.randn(p.shape, seed=SEED, stream=i))
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture
def x():
    return genfast.rand(6, 1, 8, 8, seed=2)


Y = torch.tensor([0, 3, 1, 2, 2, 0])


# ---- the loss ------------------------------------------------------------------------------------


def plain_loss(model, x, y):
    """Ho et al., algorithm 1, in PyTorch lines with the same noise."""
    x0 = 2 * x - 1
    eps = torch.stack([genfast.randn(1, 8, 8, seed=int(s), stream=NOISE) for s in SEEDS])
    u = torch.stack([genfast.rand(1, seed=int(s), stream=TIME)[0] for s in SEEDS])
    t = (u * model.T).long()
    alpha_bar = torch.from_numpy(model.noise.alpha_bar.copy()).float()[t][:, None, None, None]
    x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    return (model.unet(x_t, t, y) - eps).square().mean()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_loss_and_gradients_are_those_of_plain_pytorch(model, x, backend):
    with genfast.backend(backend):
        loss = model.loss(x, Y, seed=SEEDS)
        got = torch.autograd.grad(loss, list(model.parameters()))
    want_loss = plain_loss(model, x, Y)
    want = torch.autograd.grad(want_loss, list(model.parameters()))
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
    for (name, _), a, b in zip(model.named_parameters(), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("more", [
    {}, {"attention": (0,), "blocks": 2}, {"prediction": "v_prediction", "weighting": "min_snr"},
    {"task": "inpaint"}, {"task": "super-resolution"}, {"prediction": "sample", "classes": 0},
], ids=str)  # fmt: skip
def test_gradients_of_every_variant_are_those_of_the_reference_backend(more, x):
    model = tiny(**more).train()
    y = Y if model.classes else None
    found = {}
    for backend in ("auto", "reference"):
        with genfast.backend(backend):
            loss = model.loss(x, y, seed=SEEDS)
            grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            found[backend] = [loss.detach(), *grads]
    names = ["loss", *(n for n, _ in model.named_parameters())]
    for name, a, b in zip(names, *found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_samples_loss_depends_on_its_seed_alone(model, x):
    whole = model.losses(x, Y, seed=SEEDS)
    order = torch.tensor([4, 0, 5])
    some = model.losses(x[order], Y[order], seed=SEEDS[order])
    torch.testing.assert_close(some, whole[order], rtol=1e-5, atol=1e-6)


def test_labels_are_dropped_in_training_only(model, x):
    always = tiny(label_dropout=1.0)
    nobody = torch.full_like(Y, 4)
    eval_loss = always.losses(x, Y, seed=SEEDS)
    torch.testing.assert_close(eval_loss, model.losses(x, Y, seed=SEEDS))
    torch.testing.assert_close(
        always.train().losses(x, Y, seed=SEEDS), model.losses(x, nobody, seed=SEEDS)
    )


# ---- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_samples(model, name):
    drawn = model.sample(3, SEED, plan=model.plan(name, 5), guidance=2.0)
    assert drawn.shape == (3, 1, 8, 8) and drawn.min() >= 0 and drawn.max() <= 1
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("plan", ["ddpm", "dpm-solver++"])
def test_samples_are_bitwise_the_same_for_any_batch_size(model, plan):
    more = {"plan": model.plan(plan, 4), "guidance": 1.5}
    n = 2 * TILE + 3
    whole = model.sample(n, SEED, **more)
    for start, count in ((0, 1), (7, TILE), (TILE - 1, 2), (n - 1, 1), (3, 0)):
        part = model.sample(count, SEED, start, **more)
        assert torch.equal(part, whole[start : start + count]), start
    assert not torch.equal(model.sample(2, SEED + 1, **more), whole[:2])


def test_sampling_is_algorithm_2_of_ddpm(model):
    """Each row of the plan in PyTorch lines, with the same noise; clipped x0."""
    steps, seeds = 6, sample_seeds(TILE, SEED)
    got = model.sample(2, SEED, plan=model.plan("ddpm", steps), y=torch.tensor([1, 2]))
    alpha_bar = torch.from_numpy(model.noise.alpha_bar.copy()).float()
    y = torch.zeros(TILE, dtype=torch.long).index_copy(0, torch.arange(2), torch.tensor([1, 2]))
    x = genfast.randn(TILE, 1, 8, 8, seed=seeds)
    times = [round(100 * (steps - k) / steps) - 1 for k in range(steps)]
    with torch.no_grad():
        for k, t in enumerate(times):
            a = alpha_bar[t]
            b = alpha_bar[times[k + 1]] if k + 1 < steps else torch.tensor(1.0)
            eps = model.unet(x, torch.full((TILE,), t), y)
            x0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
            beta = 1 - a / b
            x = (b.sqrt() * beta * x0 + (a / b).sqrt() * (1 - b) * x) / (1 - a)
            if k + 1 < steps:
                z = genfast.randn(TILE, 1, 8, 8, seed=seeds, stream=STEPS + k)
                x = x + ((1 - b) / (1 - a) * beta).sqrt() * z
    want = ((x + 1) / 2).clamp(0, 1)[:2]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_guidance_is_ho_and_salimans():
    """One step of a model that predicts x0 shows the mix itself, where it is not clipped."""
    model = tiny(prediction="sample")
    y = torch.tensor([1, 2, 3])
    plan = model.plan("ddim", 1)
    cond, uncond, mixed = (
        2 * model.sample(3, SEED, plan=plan, y=labels, guidance=w) - 1
        for labels, w in ((y, 1.0), (torch.full_like(y, 4), 1.0), (y, 3.0))
    )
    inside = (mixed.abs() < 1) & (cond.abs() < 1) & (uncond.abs() < 1)
    assert inside.sum() > 100
    torch.testing.assert_close(
        mixed[inside], (uncond + 3 * (cond - uncond))[inside], rtol=1e-3, atol=1e-3
    )


def test_default_labels_go_round(model):
    y = torch.arange(3, 8) % 4
    assert torch.equal(model.sample(5, SEED, 3), model.sample(5, SEED, 3, y=y))


def test_inpainting_keeps_what_is_known_and_reads_it(x):
    model = tiny(task="inpaint", classes=0)
    known = hole(genfast.rand(6, 4, seed=1), 8, 8)
    assert set(known.unique().tolist()) == {0.0, 1.0}
    assert all(4 <= (1 - k).sum() <= 36 for k in known)
    drawn = model.inpaint(x, known, SEED, plan=model.plan("ddim", 3))
    assert torch.equal(drawn * known, x * known)
    other = model.inpaint(1 - x, known, SEED, plan=model.plan("ddim", 3))
    assert not torch.equal(drawn * (1 - known), other * (1 - known))
    part = model.inpaint(x[2:4], known[2:4], SEED, 2, plan=model.plan("ddim", 3))
    assert torch.equal(part, drawn[2:4])


def test_tasks_train_as_16_bits(x):
    for task in ("inpaint", "super-resolution"):
        model = tiny(task=task, classes=0).bfloat16()
        assert model.loss(x.bfloat16(), seed=torch.arange(len(x))).isfinite()


def test_super_resolution_reads_the_small_image(x):
    model = tiny(task="super-resolution", classes=0)
    low = shrink(x, 2)
    drawn = model.super_resolve(low, SEED, plan=model.plan("ddim", 3))
    assert drawn.shape == x.shape
    assert not torch.equal(drawn, model.super_resolve(1 - low, SEED, plan=model.plan("ddim", 3)))
    with pytest.raises(ValueError, match=r"low: expected \(B, 1, 4, 4\)"):
        model.super_resolve(x, SEED)


def test_no_random_state_is_read(model):
    torch.manual_seed(1)
    first = model.sample(1, SEED, plan=model.plan("ddpm", 2))
    torch.manual_seed(2)
    assert torch.equal(first, model.sample(1, SEED, plan=model.plan("ddpm", 2)))


# ---- the bound -----------------------------------------------------------------------------------


def test_bound_of_a_perfect_and_of_a_blind_denoiser(x, monkeypatch):
    """A denoiser that knows x0 pays for the last bins alone; one that says x0 = 0 also pays the
    KLs, which the sum over t gives exactly when every t is drawn once."""
    model = tiny(prediction="sample", classes=0)
    x = (x * 253 + 1).round() / 255  # no outer bins
    alpha_bar, x0 = model.noise.alpha_bar, (2 * x - 1).double()
    beta = 1 - alpha_bar[1] / alpha_bar[0]
    std = math.sqrt(beta * (1 - alpha_bar[0]) / (1 - alpha_bar[1]))
    normal = torch.distributions.Normal(0.0, std)

    def nats(mean):  # of the last bins
        low, high = x0 - mean - 1 / 255, x0 - mean + 1 / 255
        return -(normal.cdf(high) - normal.cdf(low)).clamp_min(1e-12).log().flatten(1).sum(1)

    # SNR(t - 1) - SNR(t), Kingma et al. 2021: the same sum of KLs by another road
    snr = alpha_bar / (1 - alpha_bar)
    kls = 0.5 * (snr[:-1] - snr[1:]).sum() * x0.square().flatten(1).sum(1)
    for answer, want in ((2 * x - 1, nats(x0)), (torch.zeros_like(x), nats(0.0) + kls)):
        monkeypatch.setattr(model, "forward", lambda x_t, t, y, a=answer: a)
        got = model.bound(x, draws=model.T)
        torch.testing.assert_close(got, want / (math.log(2) * 64), rtol=1e-3, atol=1e-3)


def test_discrete_likelihood_sums_to_one():
    bins = torch.arange(256) / 127.5 - 1
    for mean, std in ((0.1, 0.02), (-0.99, 0.3), (0.4, 1.5)):
        mass = module.discrete_log_likelihood(bins, torch.full((256,), mean), std).exp().sum()
        assert mass == pytest.approx(1, abs=1e-6)


# ---- input ---------------------------------------------------------------------------------------


BYTES = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)


def inpainter():
    return tiny(classes=0, task="inpaint")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: Diffusion((1, 10, 8), (8, 8, 8)), "divisible by 4 for 3 levels, got 10 x 8"),
        (lambda m: Diffusion((1, 8, 8), (8, 8), task="paint"), "task: expected one of generate"),
        (lambda m: Diffusion((1, 8, 8), (8, 8), schedule="cos"), "expected one of"),
        (lambda m: Diffusion((1, 8, 8), ()), "widths: expected an even number .* got none"),
        (lambda m: Diffusion((1, 8, 8), (8, 0)), "widths: expected an even number .* got 8,0"),
        (lambda m: Diffusion((1, 8, 8), (8, 98)), "widths: expected multiples of 3 heads"),
        (lambda m: Diffusion((1, 8, 8), (8,), attention=(5,)), r"levels in 0 \.\.\. 0"),
        (lambda m: Diffusion((1, 8, 8), (8,), label_dropout=2.0), "label_dropout: expected"),
        (
            lambda m: Diffusion((1, 8, 8), (8,), task="super-resolution", factor=0),
            "factor: expected an int >= 1, got 0",
        ),
        (lambda m: Diffusion((1, 8, 8), (8,), T=1), "T: expected an int >= 2, got 1"),
        (
            lambda m: Diffusion((1, 8, 8), (8,), weighting="snr5"),
            "weighting: expected one of 'none",
        ),
        (
            lambda m: Diffusion((1, 8, 8), (8,), prediction="flow_prediction"),
            "prediction: expected one of 'epsilon', 'sample', 'v_prediction'",
        ),
        (lambda m: m.plan("dim"), "plan: expected one of 'ddpm'"),
        (lambda m: m.plan("ddim", 0), "steps: expected an int in 1 ... 100, got 0"),
        (lambda m: m.loss(torch.zeros(2, 1, 8, 8), seed=1), "y: expected labels in 0 ... 3"),
        (lambda m: tiny(classes=0).sample(1, 0, guidance=2.0), "guidance: expected 1"),
        (lambda m: tiny(task="inpaint").sample(1, 0), "c: expected those of inpaint"),
        (lambda m: m.sample(-1, 0), "n: expected an int >= 0, got -1"),
        (lambda m: m.loss(BYTES, Y, seed=1), "x: expected floats in .* got torch.uint8"),
        (lambda m: m.loss(torch.zeros(6, 1, 12, 12), Y, seed=1), r"x: expected \(B, 1, 8, 8\)"),
        (lambda m: m.loss(BYTES / 255, Y[:1], seed=1), r"y: expected shape \(6,\)"),
        (
            lambda m: m.loss(BYTES / 255, Y + 2, seed=1),
            "y: expected labels in 0 ... 4, got 2 ... 5",
        ),
        (lambda m: m.loss(BYTES / 255, Y.float(), seed=1), "y: expected dtype int64"),
        (lambda m: m.sample(2, 0, y=Y), r"y: expected shape \(2,\)"),
        (lambda m: m.sample(2, None), "seed: expected an int, got NoneType"),
        (lambda m: m.sample(2, 0, plan="ddpm"), "plan: expected a SolverPlan or None, got str"),
        (lambda m: m.plan("ddim", 2, clip_smaple=False), "clip_smaple: no option of plan 'ddim'"),
        (lambda m: m.bound(BYTES / 255, Y, draws=0), "draws: expected an int >= 1, got 0"),
        (lambda m: m.bound(BYTES / 255), "y: expected labels in 0 ... 3, got none"),
        (lambda m: m.inpaint(BYTES / 255, BYTES, 0), "task: expected a model of task 'inpaint'"),
        (lambda m: inpainter().inpaint(BYTES, BYTES, 0), "image: expected floats in"),
        (lambda m: inpainter().inpaint(BYTES / 255, None, 0), "known: expected a tensor of shape"),
        (lambda m: Diffusion((8, 8)), r"shape: expected \(C, H, W\), three ints"),
        (lambda m: Diffusion((1, 0, 8)), "shape: expected .* with C >= 1 and H, W >= 1"),
    ],
)
def test_bad_input_names_what_was_expected(model, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(model)


def test_unet_without_labels_and_with_odd_channels():
    net = UNet(3, 6, (12, 20), 2, (0, 1), head_dim=16)
    out = net(torch.zeros(2, 3, 4, 6), torch.tensor([0, 9]))
    assert out.shape == (2, 6, 4, 6) and not out.any()  # the last layer starts at 0


def test_a_replaced_embedding_layer_is_the_one_that_runs():
    class Twice(torch.nn.Linear):
        def forward(self, e):
            return 2 * super().forward(e)

    net, (x, t) = UNet(1, 1, (8,), 1, ()), (torch.randn(2, 1, 8, 8), torch.tensor([3, 9]))
    block = net.middle[0]
    for weight in (net.leave[-1].weight, block.conv2.weight):  # they start at 0
        torch.nn.init.normal_(weight)
    plain, old = net(x, t), block.emb
    block.emb = Twice(old.in_features, old.out_features)
    block.emb.load_state_dict(old.state_dict())
    replaced = net(x, t)
    with torch.no_grad():
        old.weight.mul_(2), old.bias.mul_(2)
    block.emb = old
    assert not torch.equal(plain, replaced)
    torch.testing.assert_close(net(x, t), replaced)


def of_layers(*names):
    """A net whose paths all matter, its input, and these layers of its first block on the way up,
    which changes the number of channels."""
    net, x = UNet(1, 1, (8,), 1, ()), (torch.randn(2, 1, 8, 8), torch.tensor([3, 9]))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net, x, [getattr(net.up[0][0], name) for name in names]


@pytest.mark.parametrize("how", ["hook", "hook, accelerated", "forward"])
def test_what_was_put_into_a_layer_runs(how):
    """Hooks, and a forward of its own, as offloading has it."""
    net, x, layers = of_layers("conv2", "skip", "emb")
    layers.append(net.middle[0].skip)  # nn.Identity
    want, seen = net(*x), []
    for layer in layers:
        if how == "forward":
            layer.forward = lambda x, m=layer, own=layer.forward: seen.append(m) or own(x)
        else:
            layer.register_forward_hook(lambda m, *_: seen.append(m))
    got = (genfast.accelerate(net) if "accelerated" in how else net)(*x)
    assert set(seen) == set(layers) and len(seen) == len(layers)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["conv1", "conv2", "skip", "emb"])
def test_weights_that_are_made_before_a_call_are_made(name):
    net, x, (layer,) = of_layers(name)
    prune.custom_from_mask(layer, "weight", torch.rand_like(layer.weight) > 0.5)
    for _ in range(2):
        net(*x).square().mean().backward()
    net, x, (layer,) = of_layers(name)
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(layer)
    before = net(*x)
    with torch.no_grad():
        layer.weight_g.mul_(3)
    assert not torch.allclose(net(*x), before)


# ---- learning ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_on_real_digits_learns(tmp_path):
    """scikit-learn's 8 x 8 digits, seconds: the loss, and the classes of what is drawn."""
    recipe = RECIPES["diffusion"]
    digits = recipe.load("digits", {})
    options = {name: option.default for name, option in recipe.options.items()}
    options["widths"] = "16,32"
    model = checkpoint.initialised(lambda: recipe.build(digits.about, options), 0)
    settings = Settings(**{**recipe.settings, "epochs": 8, "ema": 0.98})
    before = loop.evaluate(recipe, model, digits.test, 0)
    summary = loop.train("diffusion", recipe, model, digits, settings, tmp_path)
    assert summary["test_loss"] < 0.2 < 0.9 < before  # measured 0.15 and 1.0
    from genfast.metrics.images import trained_classifier

    judge = trained_classifier(digits)
    drawn = model.eval().sample(50, 1, guidance=2.0, plan=model.plan("ddim", 10))
    right = (judge.logits(drawn).argmax(1) == torch.arange(50) % 10).float().mean()
    assert judge.accuracy > 0.9 and right > 0.5  # chance is 0.1


@pytest.mark.parametrize("widths", [(2, 4), (8, 10), (14, 6)])
def test_widths_of_any_even_number(widths):
    """Each norm's groups divide its channels, those of two levels put together too."""
    model = tiny(widths=widths)
    assert model.loss(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), seed=1).isfinite()
