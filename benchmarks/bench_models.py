"""models: a training step and a sampling step on genfast's ops against the same module on plain
PyTorch, in one run.

Rivals: `reference`, the same module under genfast.backend("reference"), and `compile`, that module
through torch.compile. A training step is forward and backward, gradients of all parameters; a
sampling step is all that a tile of images costs, over the rows of its plan.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

import genfast
from genfast.benchmarks.harness import Case, Work, assert_judged
from genfast.models import VAE, ConvVAE, Diffusion
from genfast.models._seeds import sample_seeds
from genfast.models.diffusion import TILE

SEED = 1234


def on_reference(call: Callable) -> Callable:
    def run(*args):
        with genfast.backend("reference"):
            return call(*args)

    return run


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


def _vae_sampling(build, device) -> Work:
    model = fresh(build, device).eval()
    draw = partial(model.sample, 64, SEED)
    compiled = torch.compile(model.decode, dynamic=False)
    with torch.no_grad():
        return Work(
            ours=draw,
            rivals={"reference": on_reference(draw)},
            late={
                "compile": lambda: on_reference(
                    torch.no_grad()(lambda: torch.sigmoid(compiled(model.prior(64, SEED))))
                )
            },
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
    _train("vae", VAE, 128, 1.5),
    _train("conv-vae", ConvVAE, 128, 1.0),
    Case(
        "models", "vae sample", (64, 784), partial(_vae_sampling, VAE), flops=32 * _flops(VAE)
    ),  # fmt: skip
    _train("diffusion", _unet, 32, 1.0, labels=True),
    _train("diffusion attending", _attending, 32, 1.0, labels=True),
    _draw("diffusion", _unet, 4, 2.0),
    _draw("diffusion attending", _attending, 4, 2.0),
]
