"""hybrid: a training step of each hybrid's model, and what is drawn from it, on genfast's ops
against the same module on plain PyTorch, in one run.

Rivals: `reference`, the same module under genfast.backend("reference") with PyTorch's own
attention, and `compile`, that module through torch.compile. A training step is forward and
backward, gradients of all weights that are trained. The sizes are those of the recipes. Of CLIP and
the autoencoder nearly all is convolutions and matrix products, the same code for all three: there
1.0x within the noise is what there is to have, and less is a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import genfast
from genfast.benchmarks.bench_models import fresh, prove
from genfast.benchmarks.harness import Case, Work
from genfast.benchmarks.plain import on_reference
from genfast.models import (
    CLIP,
    Diffusion,
    DiffusionPrior,
    DiTDiffusion,
    KLAutoencoder,
    LatentDiffusion,
)
from genfast.models._seeds import sample_seeds
from genfast.models.hybrid import CLIPGuide
from genfast.train import captions
from genfast.train.recipes import RECIPES

SEED, SHAPE, CLASSES = 1234, (1, 28, 28), 10
STEPS, GUIDANCE = 4, 2.0
WITHIN_NOISE = 0.95  # of a rival that runs the same code


def _autoencoder() -> KLAutoencoder:
    return RECIPES["autoencoder"].build({"shape": SHAPE}, _options("autoencoder"))


def _clip() -> CLIP:
    return RECIPES["clip"].build({"shape": SHAPE}, _options("clip"))


def _options(name: str) -> dict:
    return {k: option.default for k, option in RECIPES[name].options.items()}


def _sizes(name: str) -> dict:
    return {k: v for k, v in _options(name).items() if k in ("patch", "d", "layers", "heads")}


def _dit() -> DiTDiffusion:
    return DiTDiffusion(SHAPE, classes=CLASSES, **_sizes("dit"))


def _latent() -> LatentDiffusion:
    sizes = _sizes("latent-diffusion")
    return LatentDiffusion(_autoencoder().config, classes=CLASSES, **sizes)


def _of_text() -> LatentDiffusion:
    sizes = _sizes("latent-diffusion")
    return LatentDiffusion(_autoencoder().config, condition="text", clip=_clip().config, **sizes)


def _prior() -> DiffusionPrior:
    return DiffusionPrior(_clip().config, **_sizes("prior"))


def _texts(n: int, device) -> Tensor:
    """A caption of each class in turn, (n, S)."""
    ids = captions.wanted("", "mnist5k")
    return ids[torch.arange(n) % len(ids)].to(device)


def _given(model: nn.Module, n: int, device) -> dict[str, Tensor]:
    """What `loss` takes besides images, and `sample`."""
    if isinstance(model, (CLIP, DiffusionPrior)):
        return {"ids": _texts(n, device)}
    condition = getattr(model, "condition", None)
    if condition == "text":
        return {"c": _texts(n, device)}
    return {"c": torch.arange(n, device=device) % CLASSES} if condition == "class" else {}


def _training(build: Callable, B: int, device) -> Work:
    model = fresh(build, device)

    def given(model, n: int, seed: int = SEED):
        dtype = next(model.parameters()).dtype
        x = genfast.rand(n, *SHAPE, seed=seed, device=device).to(dtype)
        return x, _given(model, n, device) | {"seed": sample_seeds(n, seed, device=device)}

    def step(model, loss, x, more) -> list[Tensor]:
        value = loss(x, **more)
        trained = [p for p in model.parameters() if p.requires_grad]
        return [value.detach(), *torch.autograd.grad(value, trained)]

    def compute(model) -> list[Tensor]:
        # Of several batches: all of one's gradients carry the one rounding error of its loss's. Of
        # four, CLIP's were off by 3.6 times what PyTorch's were on one processor, of forty by 2.2.
        found = (step(model, model.loss, *given(model, 4, SEED + k)) for k in range(8))
        return [torch.stack(tensors) for tensors in zip(*found, strict=True)]

    ours = partial(step, model, model.loss, *given(model, B))
    compiled = torch.compile(model.loss, dynamic=False)
    return Work(
        ours=ours,
        rivals={"reference": on_reference(ours)},
        late={"compile": lambda: on_reference(partial(step, model, compiled, *given(model, B)))},
        proof=lambda: prove(model, compute),
    )


def _work(build: Callable, compile: Callable, draw: Callable, n: int, few: int, device) -> Work:
    """draw(model, images); compile(model): compiles its network in place."""
    model = fresh(build, device).eval()
    ours = torch.no_grad()(partial(draw, model, n))

    def compiled():
        twin = fresh(build, device).eval()
        compile(twin)
        return on_reference(torch.no_grad()(partial(draw, twin, n)))

    return Work(
        ours=ours,
        rivals={"reference": on_reference(ours)},
        late={"compile": compiled},
        proof=lambda: prove(model, torch.no_grad()(lambda m: [draw(m, few)])),
    )


def _compile(*names: str) -> Callable:
    def compile(model: nn.Module) -> None:
        for name in names:
            setattr(model, name, torch.compile(getattr(model, name), dynamic=False))

    return compile


def _sampling(build: Callable, device) -> Work:
    def draw(m, n):
        c = _given(m, n, device)["c"]
        return m.sample(n, SEED, c=c, plan=m.plan("ddpm", STEPS), guidance=GUIDANCE)

    return _work(build, _compile("dit"), draw, DiTDiffusion.TILE, 2, device)


def _prior_sampling(device) -> Work:
    def draw(m, n):
        return m.sample(n, SEED, ids=_texts(n, device), plan=m.plan(STEPS), candidates=1)

    return _work(_prior, _compile("forward"), draw, DiffusionPrior.TILE, 2, device)


def _reconstructing(n: int, device) -> Work:
    def draw(m, n):
        dtype = next(m.parameters()).dtype
        return m.reconstruct(genfast.rand(n, *SHAPE, seed=SEED, device=device).to(dtype))

    return _work(_autoencoder, _compile("encoder", "decoder"), draw, n, 4, device)


def _classifying(n: int, device) -> Work:
    """Logits of n images and a text of each class."""

    def draw(m, n):
        dtype = next(m.parameters()).dtype
        x = genfast.rand(n, *SHAPE, seed=SEED, device=device).to(dtype)
        return m(x, _texts(CLASSES, device))

    return _work(_clip, _compile("image", "text"), draw, n, 4, device)


class _Guided(nn.Module):
    """A diffusion model without labels, and the CLIP that guides it."""

    def __init__(self):
        super().__init__()
        self.config = {}
        o = _options("diffusion")
        widths = [int(width) for width in o["widths"].split(",")]
        self.diffusion, self.clip = Diffusion(SHAPE, widths), _clip().requires_grad_(False)

    def sample(self, n: int) -> Tensor:
        d = self.diffusion
        guide = CLIPGuide(self.clip, _texts(CLASSES, d.alpha.device))
        return d.sample(n, SEED, plan=d.plan("ddpm", STEPS), guide=guide, guide_scale=8.0)


def _guided_sampling(device) -> Work:
    def compile(model: _Guided) -> None:
        _compile("unet")(model.diffusion)
        _compile("image")(model.clip)

    return _work(_Guided, compile, lambda m, n: m.sample(n), Diffusion.TILE, 2, device)


def _case(what: str, shape: tuple[int, ...], setup: Callable, target: float = 1.0) -> Case:
    targets = {"reference": target, "compile": 0.0}
    return Case("hybrid", what, shape, setup, targets=targets)


def _train(what: str, build: Callable, target: float = 1.0) -> Case:
    B = RECIPES[what.partition(",")[0]].settings["batch_size"]
    return _case(f"{what} train", (B, *SHAPE), partial(_training, build, B), target)


def _draw(what: str, n: int, setup: Callable, target: float = 1.0) -> Case:
    return _case(what, (n, *SHAPE), setup, target)


CASES = [
    _train("autoencoder", _autoencoder, WITHIN_NOISE),
    _train("clip", _clip, WITHIN_NOISE),
    _train("dit", _dit),
    _train("latent-diffusion", _latent),
    _train("latent-diffusion, text", _of_text),
    _train("prior", _prior),
    _draw("autoencoder reconstruct", 64, partial(_reconstructing, 64), WITHIN_NOISE),
    _draw("clip logits", 64, partial(_classifying, 64), WITHIN_NOISE),
    _draw(f"dit sample {STEPS} steps", DiTDiffusion.TILE, partial(_sampling, _dit)),
    _draw(f"latent-diffusion sample {STEPS} steps", DiTDiffusion.TILE, partial(_sampling, _latent)),
    _draw(f"latent-diffusion, text sample {STEPS} steps", DiTDiffusion.TILE,
          partial(_sampling, _of_text)),
    _case(f"prior sample {STEPS} steps", (DiffusionPrior.TILE, 32), _prior_sampling),
    _draw(f"clip-guided diffusion sample {STEPS} steps", Diffusion.TILE, _guided_sampling,
          WITHIN_NOISE),
]  # fmt: skip
