"""filtering: StyleGAN's ops against the PyTorch lines that they replace, eager and compiled, and a
training step of StyleGAN2 against the same module on those lines.

The PyTorch lines are the reference's (`genfast.reference.filtering`): what the peers run on a CPU.
A StyleGAN2 step is a move of both players; "lazy": one of those with R1 and the path length.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import genfast
from genfast.benchmarks.bench_models import fresh, prove
from genfast.benchmarks.compare import SEED, compare, draw, step
from genfast.benchmarks.harness import Case, Work
from genfast.benchmarks.plain import on_reference
from genfast.models import StyleGAN2
from genfast.models._seeds import sample_seeds
from genfast.reference import filtering as reference
from genfast.reference.filtering import ACTIVATIONS

TAPS = (1, 3, 3, 1)


# ---- the ops -------------------------------------------------------------------------------------


def _bias_act(shape, act, noisy, dtype, backward, device) -> Work:
    leaves = [draw(shape, 1, device, dtype), draw(shape[1:2], 2, device, dtype)]
    found = ACTIVATIONS[act]
    numbers = {"act": act, "alpha": found.alpha, "gain": found.gain}
    if not noisy:
        return compare(
            lambda x, b: genfast.bias_act(x, b, act=act),
            lambda x, b: reference.bias_act(x, b, **numbers), leaves, backward,
        )  # fmt: skip
    leaves.append(torch.tensor(0.5, device=device))
    noise = genfast.randn(shape[0], 1, *shape[2:], seed=SEED, device=device)
    work = compare(
        lambda x, b, s: genfast.bias_act(x, b, act=act, strength=s, seed=SEED),
        lambda x, b, s: reference.bias_act(x, b, noise.to(x.dtype), s, **numbers), leaves, backward,
    )  # fmt: skip

    def drawing(x, b, s):  # the rivals draw too
        return reference.bias_act(x, b, torch.randn_like(x[:, :1]), s, **numbers)

    grad = draw(shape, 9, device, dtype)
    make = partial(step, leaves=leaves, grads=grad if backward else None)
    work.rivals = {"eager": make(drawing)}
    work.late = {"compile": lambda: make(torch.compile(drawing, dynamic=False))}
    return work


def _resample(name, shape, dtype, backward, device) -> Work:
    f = genfast.setup_filter(TAPS, device=device)
    up, down, padding, gain = PLAIN[name]

    def plain(x):
        return reference.upfirdn2d(x, f, (up, up), (down, down), padding, gain=gain)

    ours = partial(getattr(genfast, name), f=f)
    return compare(ours, plain, [draw(shape, 1, device, dtype)], backward)


# upsample2d, downsample2d and filter2d of four taps as arguments of the reference
PLAIN = {
    "upsample2d": (2, 1, (2, 1, 2, 1), 4.0),
    "downsample2d": (1, 2, (1, 1, 1, 1), 1.0),
    "filter2d": (1, 1, (2, 1, 2, 1), 1.0),
}


def _layer(shape, dtype, backward, device) -> Work:
    """What follows a convolution of the generator: up-sampling, then bias and activation."""
    f = genfast.setup_filter(TAPS, device=device)
    leaves = [draw(shape, 1, device, dtype), draw(shape[1:2], 2, device, dtype)]
    up, down, padding, gain = PLAIN["upsample2d"]

    def ours(x, b):
        return genfast.bias_act(genfast.upsample2d(x, f), b, act="lrelu")

    def plain(x, b):
        x = reference.upfirdn2d(x, f, (up, up), (down, down), padding, gain=gain)
        return reference.bias_act(x, b, act="lrelu", alpha=0.2, gain=2**0.5)

    return compare(ours, plain, leaves, backward)


# ---- StyleGAN2 -----------------------------------------------------------------------------------


def _moves(model, x, seeds, step) -> list[Tensor]:
    """The losses, then the gradients of each player."""
    losses = (
        (model.d_loss(x, seed=seeds, step=step), model.D),
        (model.g_loss(seed=seeds, step=step), model.G),
    )
    grads = [torch.autograd.grad(v, list(net.parameters())) for v, net in losses]
    return [torch.stack([v.detach() for v, _ in losses]), *(g for own in grads for g in own)]


def _gated(shape, act, backward, device) -> Work:
    leaves = [draw((*shape[:-1], 2 * shape[-1]), 1, device)]
    return compare(
        partial(genfast.gated_act, act=act), partial(reference.gated_act, act=act), leaves, backward
    )


def _stylegan(lazy, shape, device) -> Work:
    B, *image = shape
    step = 0 if lazy else 1
    model = fresh(partial(StyleGAN2, tuple(image)), device).eval()  # its averages stay
    x = genfast.rand(shape, seed=SEED, device=device)
    seeds = sample_seeds(B, SEED, device=device)
    ours = partial(_moves, model, x, seeds, step)

    def compute(m):
        """The gradients of single numbers (D's last bias, the strengths) as one tensor: the error
        of one number is luck, and plain PyTorch's may be 0."""
        found = _moves(m, x[:4].to(next(m.parameters()).dtype), seeds[:4], step)
        single = [g.reshape(1) for g in found if g.numel() == 1]
        return [g for g in found if g.numel() > 1] + [torch.cat(single)]

    return Work(
        ours=ours,
        rivals={"reference": on_reference(ours)},
        proof=lambda: prove(model, compute),
    )


# ---- the table -----------------------------------------------------------------------------------

# The last layer of a StyleGAN2 of 256 x 256, a middle one, and one of 28 x 28.
LARGE, MIDDLE, SMALL = (4, 64, 256, 256), (8, 256, 32, 32), (32, 16, 28, 28)
PASSES = {"": False, " fwd+bwd": True}


def _case(name, shape, setup, dtype=torch.float32, touched=0, **more) -> Case:
    """touched: elements read or written, in multiples of the shape's."""
    n = torch.Size(shape).numel()
    size = torch.finfo(dtype).bits // 8
    return Case("filtering", name, shape, setup, dtype=dtype, bytes=int(touched * n * size), **more)


CASES = [
    _case(f"bias_act {act}{' + noise' if noisy else ''}{p}", shape,
          partial(_bias_act, shape, act, noisy, dtype, backward), dtype, 5 if backward else 2)
    for act, noisy, dtype, shapes in (
        ("lrelu", False, torch.float32, (LARGE, SMALL)),
        ("lrelu", False, torch.bfloat16, (LARGE,)),
        ("lrelu", True, torch.float32, (LARGE, SMALL)),
        ("swish", False, torch.float32, (LARGE,)),
    )
    for shape in shapes
    for p, backward in PASSES.items()
]  # fmt: skip
CASES += [  # the feed-forward's inner width of the T5 and the GPT of the benchmarks; short rows
    _case(f"gated_act {act}{p}", shape, partial(_gated, shape, act, backward),
          touched=8 if backward else 3)
    for act, shape in (("gelu_tanh", (4, 512, 768)), ("swish", (8, 256, 688)), ("swish", (4096, 8)))
    for p, backward in PASSES.items()
]  # fmt: skip
CASES += [
    _case(f"{name}{p}", shape, partial(_resample, name, shape, dtype, backward), dtype,
          {"upsample2d": 5, "downsample2d": 1.25, "filter2d": 2}[name] * (1 + backward))
    for name in PLAIN
    for shape, dtype in ((MIDDLE, torch.float32), (SMALL, torch.float32), (MIDDLE, torch.bfloat16))
    for p, backward in PASSES.items()
]  # fmt: skip
CASES += [
    _case("upsample2d + bias_act fwd+bwd", shape, partial(_layer, shape, dtype, True), dtype,
          5 * 2 + 5 * 4, targets={"eager": 2.0})
    for shape, dtype in ((MIDDLE, torch.float32), (SMALL, torch.float32), (MIDDLE, torch.bfloat16))
]  # fmt: skip
CASES += [
    _case(f"StyleGAN2 train{', lazy' if lazy else ''}", (32, 1, 28, 28),
          partial(_stylegan, lazy, (32, 1, 28, 28)), targets={"reference": 1.3})
    for lazy in (False, True)
]  # fmt: skip
