"""gan: a move of each player, and a tile of samples, on genfast's ops against the same module on
plain PyTorch, in one run.

Rivals: `reference`, the same module under genfast.backend("reference"), and `compile`, that module
through torch.compile. A training step is what the recipe's players do with one batch: the loss of
each and its gradients by its own parameters. Of genfast's there are the draws alone (z, the places
of the penalty, z ~ q(z|x) with its KL): the rest is convolutions and matrix products, the same code
for all, so 1.0x within the noise is what there is to have, and less is a loss.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor, nn

import genfast
from genfast.benchmarks.bench_models import fresh, prove
from genfast.benchmarks.harness import Case, Work
from genfast.benchmarks.plain import on_reference
from genfast.models._seeds import sample_seeds
from genfast.models.gan import TILE
from genfast.train.recipes import RECIPES

SEED, SHAPE = 1234, (1, 28, 28)
# name -> batch, of the recipe's settings
BATCH = {
    name: RECIPES[name].settings["batch_size"]
    for name in ("gan", "dcgan", "wgan", "wgan-gp", "vae-gan", "cyclegan")
}
WITHIN_NOISE = 0.95  # of a rival that runs the same code


def _options(name: str) -> dict:
    return {k: option.default for k, option in RECIPES[name].options.items()}


def _build(name: str) -> nn.Module:
    return RECIPES[name].build({"shape": SHAPE}, _options(name))


def _batch(name: str, B: int, device, dtype=torch.float32) -> tuple[tuple[Tensor, ...], Tensor]:
    """Images and what stands beside them: those of a second domain, or labels."""
    x = genfast.rand(B, *SHAPE, seed=SEED, device=device).to(dtype)
    beside = 1 - x if name == "cyclegan" else torch.zeros(B, dtype=torch.int64, device=device)
    return (x, beside), sample_seeds(B, SEED, device=device)


def _moves(name: str, model: nn.Module) -> list[tuple]:
    """(loss, parameters) of each player."""
    named = list(model.named_parameters())
    players = RECIPES[name].players(model, _options(name))
    return [(p.loss, [w for n, w in named if p.owns(n)]) for p in players]


def _step(model, moves, batch, seeds) -> list[Tensor]:
    """The losses, then the gradients of each."""
    losses = [loss(model, batch, seeds, 0) for loss, _ in moves]
    grads = [torch.autograd.grad(v, own) for v, (_, own) in zip(losses, moves, strict=True)]
    return [torch.stack([v.detach() for v in losses]), *(g for own in grads for g in own)]


def _training(name: str, device) -> Work:
    model = fresh(partial(_build, name), device)
    given = _batch(name, BATCH[name], device)
    ours = partial(_step, model, _moves(name, model), *given)

    def compiled():
        moves = [(torch.compile(loss, dynamic=False), own) for loss, own in _moves(name, model)]
        return on_reference(partial(_step, model, moves, *given))

    def compute(m):
        dtype = next(m.parameters()).dtype
        return _step(m, _moves(name, m), *_batch(name, 4, device, dtype))

    return Work(
        ours=ours,
        rivals={"reference": on_reference(ours)},
        late={"compile": compiled},
        proof=lambda: prove(model, compute),
    )


def _sampling(name: str, device) -> Work:
    (x, _), _ = _batch(name, TILE, device)

    def draw(model, n=TILE):
        if name == "cyclegan":
            return model.translate(x[:n].to(next(model.parameters()).dtype))
        return model.sample(n, SEED)

    def compiled():
        twin = fresh(partial(_build, name), device).eval()
        twin.G = torch.compile(twin.G, dynamic=False)
        return on_reference(partial(draw, twin))

    model = fresh(partial(_build, name), device).eval()
    return Work(
        ours=partial(draw, model),
        rivals={"reference": on_reference(partial(draw, model))},
        late={"compile": compiled},
        proof=lambda: prove(model, lambda m: [draw(m, 3)]),
    )


@cache
def _flops(name: str) -> int:
    """Of one image of the generator, counted by torch over four."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.random.fork_rng(devices=[]):
        model = _build(name)
    given = torch.zeros(4, *(SHAPE if name == "cyclegan" else (model.z_dim,)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.G(given)
    return counter.get_total_flops() // 4


def _case(name: str, what: str, B: int, setup, flops: int = 0) -> Case:
    return Case(
        "gan", f"{name} {what}", (B, *SHAPE), partial(setup, name), flops=flops,
        targets={"reference": WITHIN_NOISE, "compile": 0.0},
    )  # fmt: skip


CASES = [_case(name, "train", B, _training) for name, B in BATCH.items()]
CASES += [
    _case(name, "translate" if name == "cyclegan" else "sample", TILE, _sampling,
          TILE * _flops(name))
    for name in BATCH
]  # fmt: skip
