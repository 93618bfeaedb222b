"""The hybrids: CLIP, DiT, latent diffusion, prior: losses and gradients, samples whatever the
batch, guidance, parts that travel in a checkpoint."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import genfast
from genfast import schedulers
from genfast.models import (
    CLIP,
    Diffusion,
    DiffusionPrior,
    DiT,
    DiTDiffusion,
    KLAutoencoder,
    LatentDiffusion,
    StyleGAN2,
)
from genfast.models._seeds import sample_seeds
from genfast.models.hybrid import CLIPGuide
from genfast.models.hybrid.dit import Conditions, learned_range, places, variational_bound
from genfast.models.process import NOISE, PLANS, STEPS, TIME
from genfast.models.transformer.blocks import Residual
from genfast.schedulers.plan import CLIP as CLAMP
from genfast.train import captions, checkpoint, loop, provenance
from genfast.train.recipes import RECIPES, load_trained
from genfast.train.settings import Settings

SEED, B, TILE = 5, 6, DiTDiffusion.TILE
SEEDS = sample_seeds(B, SEED)
Y = torch.tensor([0, 3, 1, 2, 2, 0])


pytestmark = pytest.mark.usefixtures("one_thread")


def awake(build):
    """Away from the zeros that last layers start at: every path has something to do."""
    model = checkpoint.initialised(build, SEED).eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.05 * genfast.randn(p.shape, seed=SEED, stream=i))
    return model


SMALL = {"d": 16, "layers": 1, "heads": 2}
X = genfast.rand(6, 1, 8, 8, seed=1)
BYTES = (255 * X).byte()
IDS = captions.wanted("a seven|the digit 3|zero|a handwritten two|9|one", "")


def clip(**more):
    given = {"shape": (1, 8, 8), "width": 4, "e": 8, "shift": 1, **SMALL, **more}
    return awake(lambda: CLIP(**given))


def autoencoder():
    return awake(lambda: KLAutoencoder((1, 8, 8), (8,), 2))


def dit(**more):
    given = {"shape": (1, 8, 8), "classes": 4, "T": 100, **SMALL, **more}
    return awake(lambda: DiTDiffusion(**given))


def latent(condition="class", **more):
    given = {"condition": condition, "T": 100, **SMALL, **more}
    given["clip"] = clip().config if condition in ("text", "image") else None
    given["classes"] = 4 if condition == "class" else 0
    return awake(lambda: LatentDiffusion(autoencoder().config, **given))


def prior():
    return awake(lambda: DiffusionPrior(clip().config, T=100, **SMALL))


@pytest.fixture
def x():
    return genfast.rand(B, 1, 8, 8, seed=2)


# name -> model, and the second argument of its loss
MODELS = {
    "clip": (clip, IDS),
    "autoencoder": (autoencoder, None),
    "dit": (dit, Y),
    "dit qk-norm": (lambda: dit(qk_norm=True, patch=2, learn_variance=False), Y),
    "dit v": (lambda: dit(prediction="v_prediction"), Y),
    "latent none": (lambda: latent("none"), None),
    "latent class": (latent, Y),
    "latent text": (lambda: latent("text"), IDS),
    "latent image": (lambda: latent("image"), None),
    "prior": (prior, IDS),
}


def loss_of(model, x, c, seeds=SEEDS):
    return model.loss(x, *([] if c is None else [c]), seed=seeds)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


# ---- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_reference_backend(name, x):
    build, c = MODELS[name]
    model = build().train()
    found = {}
    for backend in ("auto", "reference"):
        with genfast.backend(backend):
            loss = loss_of(model, x, c)
            grads = torch.autograd.grad(loss, trained(model))
            found[backend] = [loss.detach(), *grads]
    names = ["loss", *(n for n, p in model.named_parameters() if p.requires_grad)]
    for name, a, b in zip(names, *found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    reached = sum(bool(g.any()) for g in found["auto"][1:])
    assert reached >= len(names) - 3  # what stands in for dropped conditions may be drawn by none


@pytest.mark.parametrize("name", ["dit", "latent class", "latent text", "latent image", "prior"])
def test_a_samples_loss_depends_on_its_seed_alone(name, x):
    build, c = MODELS[name]
    model, order = build().train(), torch.tensor([4, 0, 5])
    given = [] if c is None else [c]
    whole = model.losses(x, *given, seed=SEEDS)
    some = model.losses(x[order], *(a[order] for a in given), seed=SEEDS[order])
    torch.testing.assert_close(some, whole[order], rtol=1e-5, atol=1e-6)


def test_hybrid_loss_is_nichol_and_dhariwals(x):
    """eps, L_simple and the KL of two Gaussians by torch.distributions, in plain PyTorch."""
    model = dit()
    x0 = 2 * x - 1
    eps = torch.stack([genfast.randn(1, 8, 8, seed=int(s), stream=NOISE) for s in SEEDS])
    t = torch.stack([genfast.rand(1, seed=int(s), stream=TIME)[0] for s in SEEDS])
    t = (t * model.T).long()
    bar = torch.from_numpy(model.noise.alpha_bar.copy())
    before = torch.cat([torch.ones(1), bar[:-1]])
    beta = 1 - bar / before
    tilde = beta * (1 - before) / (1 - bar)
    tilde[0] = tilde[1]
    a, before, beta, tilde = (v[t].float()[:, None, None, None] for v in (bar, before, beta, tilde))
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps
    m, v = model.dit(x_t, t, Conditions(y=Y)).chunk(2, 1)

    def mean(x0):
        return (before.sqrt() * beta * x0 + (a / before).sqrt() * (1 - before) * x_t) / (1 - a)

    found = (x_t - (1 - a).sqrt() * m.detach()) / a.sqrt()
    std = (((v + 1) / 2 * beta.log() + (1 - v) / 2 * tilde.log()) / 2).exp()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean(x0), tilde.sqrt()),
        torch.distributions.Normal(mean(found), std),
    )
    bits = kl.flatten(1).mean(1) / math.log(2)
    want = (m - eps).square().flatten(1).mean(1) + 0.001 * model.T * bits
    torch.testing.assert_close(model.losses(x, Y, seed=SEEDS), want, rtol=2e-4, atol=1e-6)


def test_the_variance_term_does_not_train_the_mean():
    error = torch.randn(2, 1, 4, 4, requires_grad=True)
    v = torch.zeros(2, 1, 4, 4, requires_grad=True)
    table = learned_range(torch.linspace(0.99, 0.01, 10, dtype=torch.float64))
    rows = [table[k][torch.tensor([3, 7])] for k in ("of_x0", "low", "high")]
    bits = variational_bound(error, v, *rows)
    (grad,) = torch.autograd.grad(bits.sum(), v)
    assert grad.any() and not error.requires_grad or error.grad is None
    # the best variance of a mean that is right is the posterior's own: v = -1
    zero = torch.zeros(2, 1, 4, 4)
    best = variational_bound(zero, zero - 1, *rows)
    torch.testing.assert_close(best, torch.zeros(2, dtype=best.dtype), atol=1e-9, rtol=0)
    assert (variational_bound(zero, zero, *rows) > 0).all()


def test_clip_loss_is_figure_3_of_the_paper(x):
    model = clip()
    z_i, z_t = model.encode_image(x), model.encode_text(IDS)
    torch.testing.assert_close(z_i.norm(dim=1), torch.ones(B))
    logits = z_i @ z_t.T * model.tau.exp()
    want = sum(-a.log_softmax(1).diagonal().mean() for a in (logits, logits.T)) / 2
    torch.testing.assert_close(model.loss(x, IDS, seed=SEEDS), want)
    perfect = torch.eye(B) * 100
    assert F.cross_entropy(perfect, torch.arange(B)) < 1e-6 < want


def test_text_behind_the_end_changes_nothing():
    model = clip()
    longer = IDS.clone()
    longer[IDS == 0] = 77
    assert torch.equal(model.encode_text(IDS), model.encode_text(longer))
    short = IDS[:, : int((IDS != 0).sum(1).max())]
    torch.testing.assert_close(model.encode_text(short), model.encode_text(IDS))


def test_augmentation_is_a_function_of_the_seed(x):
    model = clip(noise=0.2).train()
    whole = model.augment(x, SEEDS)
    assert torch.equal(model.augment(x[3:4], SEEDS[3:4]), whole[3:4])
    still = clip(noise=0.0, shift=2).augment(x, SEEDS)
    inside = still[:, :, 2:-2, 2:-2]
    for b in range(B):  # each a window of its own image
        windows = F.pad(x[b], (2,) * 4)[0].unfold(0, 8, 1).unfold(1, 8, 1).flatten(0, 1)
        assert (windows == still[b]).all(-1).all(-1).any()
    assert inside.shape == (B, 1, 4, 4) and not torch.equal(still, x)


def test_the_autoencoder_knows_the_scale_of_its_latents(x):
    model = autoencoder().train()
    for k in range(150):
        model(x, seed=k)
    z = torch.cat([genfast.reparameterize(*model.encode(x), seed=k) for k in range(50)])
    standard = model.standard(z)
    assert standard.mean((0, 2, 3)).abs().max() < 0.1
    torch.testing.assert_close(standard.std((0, 2, 3)), torch.ones(2), atol=0.1, rtol=0)
    mu = model.encode(x)[0]
    torch.testing.assert_close(model.image(model.standard(mu)), model.reconstruct(x))


def test_the_autoencoder_keeps_its_scale_in_16_bits_and_of_one_value(x):
    model = autoencoder().train()
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(x, seed=torch.arange(len(x))).backward()
    before = model.std.clone()
    assert before.isfinite().all() and not torch.equal(before, torch.ones_like(before))
    model._watch(torch.zeros(1, 2, 1, 1))
    assert torch.equal(model.std, before)


# ---- the network ---------------------------------------------------------------------------------


def test_dit_starts_as_the_identity_and_predicts_nothing():
    net = DiT((2, 6, 4), 3, 2, 16, 2, 2, classes=3, z=5, tokens=7)
    given = Conditions(torch.tensor([0, 2]), torch.randn(2, 5), torch.randn(2, 4, 7))
    assert not net(torch.randn(2, 2, 6, 4), torch.tensor([0, 9]), given).any()
    h = torch.randn(2, 6, 16)
    c = net._condition(torch.tensor([0, 9]), given, None, torch.float32)[0]
    x, add, gate = net.blocks[0](Residual(h), c, given)
    assert torch.equal(x + gate[:, None] * add, h)
    patches = net.patches(torch.arange(96.0).view(2, 2, 6, 4))
    assert torch.equal(net.image(patches), torch.arange(96.0).view(2, 2, 6, 4))


def test_positions_are_all_different():
    p = places(5, 7, 16)
    assert p.shape == (35, 16) and torch.cdist(p, p).add(torch.eye(35)).min() > 0.1


def test_a_dropped_condition_is_not_read():
    model = latent("text").dit
    z, t = torch.randn(2, 2, 4, 4), torch.tensor([5, 60])
    tokens, seen = torch.randn(2, 2, 3, 16), torch.ones(2, 3, dtype=torch.bool)
    drop = torch.tensor([True, False])
    a, b = (
        model(z, t, Conditions(z=torch.full((2, 8), float(k)), tokens=tokens[k], seen=seen), drop)
        for k in range(2)
    )
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


# ---- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm-solver++", "heun", "euler-ancestral"])
@pytest.mark.parametrize("build", [dit, latent])
def test_plans_sample(build, name):
    model = build()
    drawn = model.sample(3, SEED, plan=model.plan(name, 4), guidance=2.0)
    assert drawn.shape == (3, 1, 8, 8) and drawn.min() >= 0 and drawn.max() <= 1
    assert not torch.equal(drawn[0], drawn[1])


def test_learned_variance_is_used_by_ddpm_and_left_unread_by_ddim():
    """Each row of the plan in PyTorch lines, with the same noise (Nichol & Dhariwal, eq. 15)."""
    model, steps, seeds = dit(prediction="v_prediction").double(), 4, sample_seeds(TILE, SEED)
    got = model.sample(2, SEED, plan=model.plan("ddpm", steps), c=torch.tensor([1, 2]))
    bar = torch.from_numpy(model.noise.alpha_bar.copy())
    c = Conditions(y=torch.tensor([1] + [2] * (TILE - 1)))
    x = genfast.randn(TILE, 1, 8, 8, seed=seeds, dtype=torch.float64)
    times = [round(100 * (steps - k) / steps) - 1 for k in range(steps)]
    with torch.no_grad():
        for k, t in enumerate(times):
            a = bar[t]
            b = bar[times[k + 1]] if k + 1 < steps else torch.tensor(1.0, dtype=torch.float64)
            m, v = model.dit(x, torch.full((TILE,), t), c).chunk(2, 1)
            x0 = (a.sqrt() * x - (1 - a).sqrt() * m).clamp(-1, 1)
            beta = 1 - a / b
            x = (b.sqrt() * beta * x0 + (a / b).sqrt() * (1 - b) * x) / (1 - a)
            # Of the last row too, whose t is not 0: as diffusers has it.
            tilde = ((1 - b) / (1 - a) * beta).clamp_min(1e-20)
            logvar = (v + 1) / 2 * beta.log() + (1 - v) / 2 * tilde.log()
            z = genfast.randn(TILE, 1, 8, 8, seed=seeds, stream=STEPS + k, dtype=x.dtype)
            x = x + (logvar / 2).exp() * z
    want = ((x + 1) / 2).clamp(0, 1)[:2]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    ddim = model.plan("ddim", 3)
    before = model.sample(2, SEED, plan=ddim)
    with torch.no_grad():
        half = model.dit.leave.bias.view(2, -1)[1]
        half.add_(1.0)
    assert torch.equal(before, model.sample(2, SEED, plan=ddim))


@pytest.mark.parametrize("name", PLANS)
def test_plans_bound_pixels_and_no_latents(name):
    pixels, latents = (m.plan(name, 4) for m in (dit(), latent("none")))
    bounded, free = (np.isfinite(plan.table[:, CLAMP]).any() for plan in (pixels, latents))
    assert not free and latents.threshold is None
    assert bounded == (PLANS[name][1] == {"clip_sample": True})


@pytest.mark.parametrize("condition", ["none", "class", "text", "image"])
def test_latent_samples_are_bitwise_the_same_for_any_batch_size(condition):
    model, n = latent(condition), TILE + 3
    c = {
        "none": None, "class": torch.arange(n) % 4, "text": IDS[torch.arange(n) % B],
        "image": F.normalize(genfast.randn(n, 8, seed=3), dim=1),
    }[condition]  # fmt: skip
    more = {"plan": model.plan("ddpm", 2), "guidance": 1.0 if condition == "none" else 1.5}
    whole = model.sample(n, SEED, c=c, **more)
    for start, count in ((0, 1), (7, TILE - 6), (TILE - 1, 2), (n - 1, 1), (3, 0)):
        part = None if c is None else c[start : start + count]
        drawn = model.sample(count, SEED, start, c=part, **more)
        assert torch.equal(drawn, whole[start : start + count]), start
    assert not torch.equal(model.sample(2, SEED + 1, c=None if c is None else c[:2], **more),
                           whole[:2])  # fmt: skip


def test_prior_samples_are_bitwise_the_same_for_any_batch_size():
    model, n = prior(), DiffusionPrior.TILE + 2
    ids, more = IDS[torch.arange(n) % B], {"plan": model.plan(3), "guidance": 2.0}
    whole = model.sample(n, SEED, ids=ids, **more)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(n))
    for start, count in ((0, 1), (5, 3), (DiffusionPrior.TILE - 1, 2), (4, 0)):
        part = model.sample(count, SEED, start, ids=ids[start : start + count], **more)
        assert torch.equal(part, whole[start : start + count]), start


def test_prior_keeps_the_candidate_that_fits_the_text_better():
    model = prior()
    z_t, more = model.clip.encode_text(IDS), {"ids": IDS, "plan": model.plan(3)}
    fits = [(model.sample(B, SEED, candidates=k, **more) * z_t).sum(1) for k in (1, 2, 4)]
    assert (fits[1] >= fits[0]).all() and (fits[2] >= fits[1]).all()
    assert (fits[2] > fits[0]).any()


# ---- guidance by CLIP ----------------------------------------------------------------------------


def unet(prediction="epsilon", classes=0):
    more = {"classes": classes, "head_dim": 8, "T": 100, "prediction": prediction}
    return awake(lambda: Diffusion((1, 8, 8), (8, 16), **more))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("w", [1.0, 2.0])
def test_guided_step_is_dhariwal_and_nichols(prediction, w):
    """One deterministic step: x0 from eps - s sigma grad, in letters of eps whatever is predicted;
    the gradient by finite differences of ln p along one direction."""
    model = unet(prediction, 4 if w != 1 else 0).double()
    guide, s, t = CLIPGuide(clip().double(), IDS[:2]), 0.5, 60
    alpha, sigma = model.alpha[t].item(), model.sigma[t].item()
    y = torch.zeros(TILE, dtype=torch.long) if w != 1 else None
    weights = (1.0,) if w == 1 else (w, 1 - w)
    plain = model._denoiser(model._conditional, (y, None), w)
    index = torch.arange(TILE)
    guided = model._guided(plain, weights, lambda x0: guide(x0, index))
    x = 0.3 * genfast.randn(TILE, 1, 8, 8, seed=1, dtype=torch.float64)
    *m, term = guided(x, t)
    m = sum(a * b for a, b in zip(weights, m, strict=True))

    def x0_of(x, m):
        at = torch.full((TILE,), t)
        return model._x0(x, m, model.alpha[at], model.sigma[at]).clamp(-1, 1)

    def log_p(x):
        with torch.no_grad():
            parts = plain(x, t)
            parts = parts if isinstance(parts, tuple) else (parts,)
            return guide(x0_of(x, sum(a * b for a, b in zip(weights, parts, strict=True))), index)

    to_eps = {"epsilon": -sigma, "sample": sigma**2 / alpha, "v_prediction": -sigma / alpha}
    gradient = term / to_eps[prediction]
    way, h = genfast.randn(TILE, 1, 8, 8, seed=2, dtype=torch.float64), 1e-6
    slope = (log_p(x + h * way) - log_p(x - h * way)) / (2 * h)
    torch.testing.assert_close((gradient * way).flatten(1).sum(1), slope, rtol=1e-4, atol=1e-5)
    raw = {  # x0 and eps of the unguided output
        "epsilon": lambda m: (x - sigma * m) / alpha, "sample": lambda m: m,
        "v_prediction": lambda m: alpha * x - sigma * m,
    }[prediction]  # fmt: skip
    eps = (x - alpha * raw(m)) / sigma
    want = (x - sigma * (eps - s * sigma * gradient)) / alpha
    torch.testing.assert_close(raw(m + s * term), want, rtol=1e-3, atol=1e-4)


def test_clip_guidance_raises_what_clip_thinks_and_keeps_the_seeds():
    model, judge = unet("v_prediction"), clip()
    guide, n = CLIPGuide(judge, IDS[:3]), TILE + 3
    index = torch.arange(n)
    more = {"plan": model.plan("ddpm", 4), "guide": guide}
    whole = model.sample(n, SEED, guide_scale=3.0, **more)
    plain = model.sample(n, SEED, guide_scale=0.0, **more)
    assert torch.equal(plain, model.sample(n, SEED, plan=more["plan"]))
    with torch.no_grad():
        assert (guide(2 * whole - 1, index) > guide(2 * plain - 1, index)).float().mean() > 0.9
    for start, count in ((0, 1), (TILE - 1, 2), (n - 1, 1)):
        part = model.sample(count, SEED, start, guide_scale=3.0, **more)
        assert torch.equal(part, whole[start : start + count]), start


def test_sample_takes_a_weight_per_model_output():
    plan = schedulers.ddim_plan(schedulers.alpha_grid(3, schedulers.noise_schedule("linear", 100)))
    x = genfast.randn(2, 3, seed=1)

    def model(x, t):
        return x, 2 * x, x * t / 100

    got = schedulers.sample(model, plan, x, guidance=(0.5, 0.25, -1.0))
    want = schedulers.sample(lambda x, t: x - x * t / 100, plan, x)
    torch.testing.assert_close(got, want)
    with pytest.raises(TypeError, match="with 2 weights of guidance .* got 3"):
        schedulers.sample(model, plan, x, guidance=(0.5, 0.5))


# ---- input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DiTDiffusion((1, 8, 8), 3, classes=4), "patch: expected a divisor of H, W = 8"),
        (lambda: DiTDiffusion((1, 8, 8), condition="word"), "condition: expected one of none"),
        (lambda: DiTDiffusion((1, 8, 8)), "classes: expected an int >= 1"),
        (lambda: latent(clip=None).sample(2, 0, c=torch.arange(3)), "c: expected labels"),
        (lambda: latent("text").sample(2, 0), "c: expected token ids .* got None"),
        (lambda: LatentDiffusion({}, condition="text"), "clip: expected the config of a CLIP"),
        (lambda: latent("none").sample(2, 0, guidance=2.0), "guidance: expected 1"),
        (
            lambda: dit(prediction="sample"),
            "learn_variance: expected False for prediction 'sample'",
        ),
        (lambda: dit(prediction="flow_prediction"), "prediction: expected one of 'epsilon'"),
        (lambda: dit(T=1), "T: expected an int >= 2, got 1"),
        (lambda: dit(layers=0), "layers: expected an int >= 1, got 0"),
        (lambda: dit(vlb=-1.0), "vlb: expected a finite number >= 0"),
        (lambda: dit(condition_dropout=7.0), "condition_dropout: expected a finite number"),
        (lambda: DiffusionPrior(clip().config, d=0), "d: expected an int >= 1, got 0"),
        (lambda: CLIP(d=0), "d: expected an int >= 1, got 0"),
        (lambda: CLIP(noise=math.nan), "noise: expected a finite number >= 0"),
        (lambda: KLAutoencoder(z_channels=0), "z_channels: expected an int >= 1, got 0"),
        (lambda: KLAutoencoder(widths=(8, -4)), r"widths\[1\]: expected an int >= 1, got -4"),
        (lambda: dit().plan("dim"), "plan: expected one of 'ddpm'"),
        (lambda: dit().plan("ddim", 0), "steps: expected an int in 1 ... 100, got 0"),
        (lambda: prior().sample(2, 0, ids=IDS), "ids: expected a text for each of 2"),
        (lambda: prior().sample(6, 0, ids=IDS, candidates=0), "candidates: expected an int >= 1"),
        (lambda: KLAutoencoder((1, 10, 8)), "shape: expected H and W divisible by 4"),
        (lambda: KLAutoencoder((1, 0, 8)), r"shape: expected H and W .* got \(1, 0, 8\)"),
        (lambda: autoencoder().encode(torch.zeros(1, 1, 4, 4)), "x: expected"),
        (lambda: clip().encode_text(torch.full((1, 3), 9)), "ids: expected an end token"),
        (lambda: clip().loss(torch.zeros(2, 1, 8, 8), IDS, seed=SEEDS), "ids: expected a text"),
        (lambda: clip().loss(X[:0], IDS[:0], seed=SEEDS[:0]), "x: expected at least one sample"),
        (lambda: autoencoder().loss(X[:0], seed=1), "x: expected at least one sample"),
        (lambda: CLIPGuide(clip(), IDS[:0]), "ids: expected at least one prompt"),
        (lambda: dit().dit(torch.zeros(1, 1, 8, 8), torch.zeros(1)), "y: expected a tensor"),
        (lambda: captions.tokens("x" * 40), "prompt: expected at most 39 bytes, got 40"),
        (lambda: captions.table("faces"), "data: expected a set whose classes have names"),
        (lambda: dit().loss(BYTES, Y, seed=1), "x: expected floats in .* got torch.uint8"),
        (lambda: dit().loss(X, Y[:1], seed=1), "c: expected labels .* of 6 samples"),
        (lambda: dit().loss(X, Y + 2, seed=1), "c: expected labels in 0 ... 4, got 2 ... 5"),
        (lambda: dit().loss(X, Y[:, None], seed=1), r"c: expected shape \(6,\)"),
        (lambda: dit().sample(2, 0, c=[0, 1]), "c: expected dtype|c: expected a torch.Tensor"),
        (lambda: dit().sample(2, 0, plan="ddpm"), "plan: expected a SolverPlan"),
        (lambda: dit().sample(2, 0, guidance=math.nan), "guidance: expected a finite number"),
        (lambda: latent().loss(BYTES, Y, seed=1), "x: expected floats in"),
        (lambda: latent().adopt(dit=clip()), "dit: no part of this model"),
        (lambda: latent().adopt(autoencoder=clip()), "autoencoder: expected a KLAutoencoder"),
        (lambda: prior().adopt(clip(eos=2)), "clip: expected one of this model's config, .* eos"),
        (lambda: prior().loss(X, IDS[:2], seed=1), "ids: expected a text for each of 6"),
        (lambda: DiffusionPrior(clip().config, d=15, heads=3), "d: expected an even number"),
        (lambda: clip().encode_image(torch.zeros(2, 1, 7, 7)), r"x: expected \(B, 1, 8, 8\)"),
        (lambda: clip().classify(X, IDS), "prompts: expected ids"),
        (lambda: CLIPGuide(clip(), IDS, views=2.5), "views: expected an int"),
    ],
)
def test_bad_input_names_what_was_expected(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_part_is_taken_over_whatever_sequence_its_config_holds():
    model, part = prior(), clip()
    part.config["shape"] = list(part.config["shape"])
    model.clip.config["shape"] = tuple(model.clip.config["shape"])
    model.adopt(part)


def test_a_bad_batch_does_not_stay_in_an_autoencoders_statistics():
    model = autoencoder().train()
    model.loss(X * math.nan, seed=0)
    assert model.mean.isfinite().all() and model.std.isfinite().all()


def test_captions_are_drawn_by_seed_and_held_back_ones_never():
    table = captions.table("digits")
    drawn = captions.draw(table[Y], SEEDS)
    assert torch.equal(captions.draw(table[Y[2:3]], SEEDS[2:3]), drawn[2:3])
    held = captions.table("digits", captions.HELD_BACK).flatten(0, 1)
    trained = table.flatten(0, 1)
    assert not (held[:, None] == trained).all(-1).any()
    many = captions.draw(table[:1].expand(500, -1, -1), sample_seeds(500, 1))
    assert len(many.unique(dim=0)) == table.shape[1]  # every caption comes up


# ---- the command line's road ---------------------------------------------------------------------


def saved(name, folder, **chosen):
    recipe = RECIPES[name]
    options = {k: o.default for k, o in recipe.options.items()} | chosen
    data = recipe.load("digits", options)
    model = checkpoint.initialised(lambda: recipe.build(data.about, options), 0)
    checkpoint.save(folder, name, model, {**data.about, "data": "digits", "options": options})
    return recipe, data


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    at = tmp_path_factory.mktemp("runs")
    small = {"d": 16, "layers": 1, "heads": 2}
    folders = {k: at / k for k in ("clip", "ae", "class", "image", "prior", "unet")}
    for folder in folders.values():
        folder.mkdir()
    saved("clip", folders["clip"], width=8, **small)
    saved("autoencoder", folders["ae"], widths="8")
    ae, of = str(folders["ae"]), str(folders["clip"])
    saved("latent-diffusion", folders["class"], autoencoder=ae, **small)
    saved("latent-diffusion", folders["image"], autoencoder=ae, condition="image", clip_from=of,
          **small)  # fmt: skip
    saved("prior", folders["prior"], clip_from=of, **small)
    saved("diffusion", folders["unet"], widths="8,16", labels=False)
    return folders


def generated(capsys, *args):
    from genfast.cli import main

    code = main(["generate", "--seed", "1", "--count", "3", "--steps", "2", *map(str, args)])
    return code, capsys.readouterr().err


def test_generate_needs_one_folder(runs, tmp_path, capsys):
    """The autoencoder is gone: its weights are in the checkpoint."""
    alone = tmp_path / "moved"
    alone.mkdir()
    (alone / "model.safetensors").write_bytes((runs["class"] / "model.safetensors").read_bytes())
    assert generated(capsys, "--from", alone, "--out", tmp_path / "a.png") == (0, "")
    facts = provenance.read(tmp_path / "a.png")
    assert facts["model"] == "latent-diffusion" and facts["options"]["guidance"] == 1.5
    model, _ = load_trained(alone)
    stage, _ = load_trained(runs["ae"])
    for key, value in stage.state_dict().items():
        assert torch.equal(model.autoencoder.state_dict()[key], value)
    assert not any(p.requires_grad for p in model.autoencoder.parameters())


def test_evaluation_judges_by_what_was_asked_for(runs, monkeypatch):
    """By the label given; a prompt says no class."""
    from genfast.train.recipes import latent

    model, _ = load_trained(runs["class"])
    recipe, seen = RECIPES["latent-diffusion"], []
    split = recipe.load("digits", {})
    monkeypatch.setattr(latent.DiTRecipe, "judge", lambda self, x, d, s, asked: seen.append(asked))
    for label in (-1, 3):
        options = recipe.sample_defaults(model, {}) | {"label": label, "steps": 2}
        recipe.evaluate(model, split, 1, 12, options)
    assert seen[0].tolist() == [*range(10), 0, 1] and seen[1].tolist() == [3] * 12
    prior, _ = load_trained(runs["prior"])
    recipe = RECIPES["prior"]
    split = recipe.load("digits", {})
    for prompt in ("", "a handwritten seven"):
        options = recipe.sample_defaults(prior, {}) | {"prompt": prompt, "prior_steps": 2}
        found = recipe.evaluate(prior, split, 1, 12, options)
        assert ("zero-shot accuracy of drawn embeddings" in found) is not bool(prompt)


def test_text_to_prior_to_image(runs, tmp_path, capsys):
    args = ["--from", runs["prior"], "--prior-steps", 2, "--prompt", "a handwritten seven"]
    out = ["--out", tmp_path / "a.png"]
    assert generated(capsys, *args, "--decoder", runs["image"], *out) == (0, "")
    code, said = generated(capsys, *args, "--decoder", runs["class"], *out)
    assert code == 2 and "--decoder: expected a model of condition image, got 'class'" in said
    code, said = generated(capsys, *args, *out)
    assert code == 2 and "--decoder: expected the folder of a trained latent-diffusion" in said


def test_steps_are_by_default_no_more_than_the_schedule_has(runs, tmp_path, capsys):
    """T of 4 and 6 beside the defaults 100, 50 and 25; what is asked for beyond T stays refused."""
    from genfast.cli import main

    small, of = {"d": 16, "layers": 1, "heads": 2}, str(runs["clip"])
    wanted = {
        "diffusion": {"widths": "8,16", "timesteps": 6},
        "dit": {"timesteps": 6, **small},
        "prior": {"clip_from": of, "timesteps": 6, **small},
        "latent-diffusion": {"autoencoder": str(runs["ae"]), "condition": "image",
                             "clip_from": of, "timesteps": 4, **small},
    }  # fmt: skip
    for name, options in wanted.items():
        (tmp_path / name).mkdir()
        recipe, data = saved(name, tmp_path / name, **options)
        model, about = load_trained(tmp_path / name)
        assert len(model.plan()) == options["timesteps"]
        files = recipe.finish(model, data, 0, tmp_path)
        assert files == ([] if name == "prior" else ["samples.png"])
    for name, chosen in {
        "diffusion": {"steps": 6},
        "dit": {"steps": 6},
        "prior": {"prior_steps": 6, "steps": 4},
    }.items():
        args = ["generate", "--from", str(tmp_path / name), "--seed", "1", "--count", "2"]
        if name == "prior":
            args += ["--decoder", str(tmp_path / "latent-diffusion")]
        out = tmp_path / f"{name}.png"
        assert main([*args, "--out", str(out)]) == 0
        assert provenance.read(out)["options"].items() >= chosen.items()
        capsys.readouterr()
        assert main([*args, "--out", str(out), "--steps", "7"]) == 2
        said = capsys.readouterr().err
        assert f"steps: expected an int in 1 ... {chosen['steps']}, got 7" in said


def test_diffusion_guided_from_the_command_line(runs, tmp_path, capsys):
    args = ["--from", runs["unet"], "--out", tmp_path / "a.safetensors"]
    prompt = ["--prompt", "seven|a nine"]
    drawn = []
    for more in (["--clip", runs["clip"], *prompt], ["--clip", runs["clip"]], []):
        assert generated(capsys, *args, *more) == (0, "")
        drawn.append(checkpoint_images(tmp_path / "a.safetensors"))
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    code, said = generated(capsys, *args, *prompt)
    assert code == 2 and "--prompt: expected --clip DIR" in said
    for flag, value in (("--clip-scale", "100"), ("--given", "mnist5k")):
        code, said = generated(capsys, *args, flag, value)
        assert code == 2 and f"{flag}: expected" in said
    code, said = generated(capsys, *args, "--clip", runs["ae"])
    assert code == 2 and "expected a trained clip, got one of autoencoder" in said


def checkpoint_images(path):
    from safetensors.torch import load_file

    return load_file(path)["images"]


# ---- learning ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_clip_learns_captions_of_real_digits(tmp_path):
    """scikit-learn's 8 x 8 digits, seconds; images and templates that it was not trained on."""
    recipe = RECIPES["clip"]
    options = {k: o.default for k, o in recipe.options.items()}
    options |= {"width": 16, "d": 32, "shift": 1}
    digits = recipe.load("digits", options)
    model = checkpoint.initialised(lambda: recipe.build(digits.about, options), 0)
    settings = Settings(**{**recipe.settings, "epochs": 15, "batch_size": 64})
    loop.train("clip", recipe, model, digits, settings, tmp_path)
    found = recipe.evaluate(model.eval(), digits, 0, 0, {})
    assert found["zero-shot accuracy, held-back templates"] > 0.7  # chance is 0.1


# ---- tables that no state dict has ---------------------------------------------------------------

TABLED = {
    "diffusion": lambda: Diffusion((1, 8, 8), (16, 32)),
    "dit": lambda: DiTDiffusion((1, 8, 8), patch=2, classes=10, d=32, layers=1, heads=2),
    "stylegan2": lambda: StyleGAN2((1, 28, 28)),
}


@pytest.mark.parametrize("name", TABLED)
def test_tables_outlive_meta_to_empty_and_16_bits(name):
    """`load_state_dict` says nothing of them: they were what lay in memory, or stayed rounded."""
    build = TABLED[name]
    model = build()
    tables = dict(model.named_buffers())

    def on_meta():
        with torch.device("meta"):
            return build()

    moved = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    built, assigned = on_meta().to_empty(device="cpu"), on_meta()
    for twin in (moved, built, copy.deepcopy(model).bfloat16().float()):
        twin.load_state_dict(model.state_dict())
    assigned.load_state_dict(model.state_dict(), assign=True)
    for twin in (moved, built, assigned, copy.deepcopy(model).bfloat16().float()):
        for key, value in twin.named_buffers():
            assert torch.equal(value, tables[key]), key
