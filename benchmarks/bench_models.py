"""models: a training step and a sampling step on genfast's ops against the same module on plain
PyTorch, in one run.

Rivals: `reference`, the same module on PyTorch's lines (`plain`), and `compile`, that module
through torch.compile; of the VAE, whose steps are short, the same weights in PyTorch's own words. A
training step is forward and backward, gradients of all parameters; a sampling step is all that a
tile of images costs, over the rows of its plan.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import genfast
from genfast.benchmarks.harness import Case, Work, assert_judged
from genfast.benchmarks.plain import on_reference
from genfast.models import VAE, ConvVAE, Diffusion
from genfast.models._seeds import sample_seeds

SEED, TILE = 1234, Diffusion.TILE


def fresh(build: Callable[[], nn.Module], device) -> nn.Module:
    """With every weight away from 0: the zeroed last layers would leave nothing to prove."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().to(device)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.02 * genfast.randn(p.shape, seed=SEED, stream=i, device=device))
    return model


def prove(model: nn.Module, compute: Callable[[nn.Module], list[Tensor]]) -> None:
    """2x the error of plain PyTorch for the first tensor, 3x for its gradients, the others.

    A gradient of one value, such as a last bias, is judged with the one before it: alone, plain
    PyTorch may be exact by luck (1e-8 of the value was seen, where float32 resolves 6e-8).
    """
    twin = type(model)(**model.config).to(next(model.parameters()).device)
    twin.load_state_dict(model.state_dict())
    twin.train(model.training)
    ours, plain, truth = compute(model), on_reference(compute)(model), compute(twin.double())
    judged = []
    for three in zip(ours, plain, truth, strict=True):
        if three[0].numel() == 1 and len(judged) > 1:
            before = judged.pop()
            three = tuple(
                torch.cat([a.flatten(), b.flatten()]) for a, b in zip(before, three, strict=True)
            )
        judged.append(three)
    for i, three in enumerate(judged):
        assert_judged(f"tensor {i}", *three, 3.0 if i else 2.0)


def _training(build, labels, B, device) -> Work:
    model = fresh(build, device)
    shape = model.config.get("shape", (1, 28, 28))
    x = genfast.rand(B, *shape, seed=SEED, device=device)
    y = torch.arange(B, device=device) % 10
    seeds = sample_seeds(B, SEED, device=device)

    def step(model, loss, n=B):
        x_n = x[:n].to(next(model.parameters()).dtype)
        value = loss(x_n, *([y[:n]] if labels else []), seed=seeds[:n])
        return [value, *torch.autograd.grad(value, list(model.parameters()))]

    ours = partial(step, model, model.loss)
    compiled = torch.compile(model.loss, dynamic=False)
    return Work(
        ours=ours,
        rivals={"reference": on_reference(ours)},
        late={"compile": lambda: on_reference(partial(step, model, compiled))},
        proof=lambda: prove(model, lambda m: [v.detach() for v in step(m, m.loss, 4)]),
    )


def _plain_vae(model: VAE, x: Tensor) -> Tensor:
    """`VAE.loss` in PyTorch's own words."""
    h = F.relu(F.linear(x, model.fc1.weight, model.fc1.bias))
    mu, logvar = (F.linear(h, fc.weight, fc.bias) for fc in (model.fc21, model.fc22))
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum()
    nll = F.binary_cross_entropy_with_logits(_plain_decode(model, z), x, reduction="sum")
    return (nll + kl) / len(x)


def _plain_decode(model: VAE, z: Tensor) -> Tensor:
    h = F.relu(F.linear(z, model.fc3.weight, model.fc3.bias))
    return F.linear(h, model.fc4.weight, model.fc4.bias)


def _vae_training(B, device) -> Work:
    work, model = _training(VAE, False, B, device), fresh(VAE, device)
    x = genfast.rand(B, 1, 28, 28, seed=SEED, device=device).flatten(1)

    def step(loss):
        value = loss(model, x)
        return [value, *torch.autograd.grad(value, list(model.parameters()))]

    compiled = torch.compile(_plain_vae, dynamic=False)
    torch.testing.assert_close(step(_plain_vae)[0], work.ours()[0], rtol=1e-2, atol=0)
    return Work(
        ours=work.ours,
        rivals={"eager": partial(step, _plain_vae)},
        late={"compile": lambda: partial(step, compiled)},
        proof=work.proof,
    )


def _sampling(build, steps, guidance, device) -> Work:
    model = fresh(build, device).eval()
    plan = model.plan("dpm-solver++", steps)
    draw = partial(model.sample, TILE, SEED, plan=plan, guidance=guidance)

    def compute(m):
        return [m.sample(2, SEED, plan=m.plan("dpm-solver++", 2), guidance=guidance)]

    def compiled():
        twin = fresh(build, device).eval()
        twin.unet = torch.compile(twin.unet, dynamic=False)
        return on_reference(partial(twin.sample, TILE, SEED, plan=plan, guidance=guidance))

    return Work(
        ours=draw,
        rivals={"reference": on_reference(draw)},
        late={"compile": compiled},
        proof=lambda: prove(model, compute),
    )


def _vae_sampling(device) -> Work:
    model = fresh(VAE, device).eval()

    @torch.no_grad()
    def plain(decode):
        return torch.sigmoid(decode(model, torch.randn(64, model.z_dim, device=device)))

    compiled = torch.compile(_plain_decode, dynamic=False)
    return Work(
        ours=partial(model.sample, 64, SEED),
        rivals={"eager": partial(plain, _plain_decode)},
        late={"compile": lambda: partial(plain, compiled)},
        proof=lambda: prove(model, lambda m: [m.sample(3, SEED)]),
    )


def _unet():
    return Diffusion((1, 28, 28), (16, 32, 64), classes=10)


def _attending():
    return Diffusion((1, 28, 28), (16, 32, 64), attention=(0, 1), head_dim=16, classes=10)


@cache
def _flops(build) -> int:
    """Of one image's forward pass, counted by torch; three times that with the backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if isinstance(model, Diffusion):
            t = torch.zeros(1, dtype=torch.long)
            model(torch.zeros(1, *model.shape), t, t)
        else:
            model(torch.zeros(1, *model.x_shape), seed=0)
    return counter.get_total_flops()


def _train(name, build, B, target, labels=False):
    return Case(
        "models", f"{name} train", (B, 1, 28, 28), partial(_training, build, labels, B),
        flops=3 * B * _flops(build), targets={"reference": target},
    )  # fmt: skip


def _draw(name, build, steps, guidance):
    calls = steps * (2 if guidance != 1 else 1)
    return Case(
        "models", f"{name} sample {steps} steps", (TILE, 1, 28, 28),
        partial(_sampling, build, steps, guidance), flops=TILE * calls * _flops(build),
        targets={"reference": 1.5},
    )  # fmt: skip


CASES = [
    Case(
        "models",
        "vae train",
        (128, 1, 28, 28),
        partial(_vae_training, 128),
        flops=3 * 128 * _flops(VAE),
    ),
    _train("conv-vae", ConvVAE, 128, 1.0),
    Case("models", "vae sample", (64, 784), _vae_sampling, flops=32 * _flops(VAE)),
    _train("diffusion", _unet, 32, 1.0, labels=True),
    _train("diffusion attending", _attending, 32, 1.0, labels=True),
    _draw("diffusion", _unet, 4, 2.0),
    _draw("diffusion attending", _attending, 4, 2.0),
]
