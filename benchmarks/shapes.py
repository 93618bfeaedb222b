"""`genfast bench --shape 4096x2`: every op that takes one tensor of that shape, and its gradient,
against the lines that a PyTorch user would write for it. `--sweep` is the same for 16 shapes that
are on no grid: short rows, odd widths, one number, a batch of one. Each is proved against the
backend "reference" first.

The first axis is the batch; a shape of four is of images (and, for attention, of heads), any other
of rows whose last axis is channels or classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import genfast
from genfast.benchmarks.compare import SEED
from genfast.benchmarks.harness import Case, Work, assert_bitwise, assert_judged

# Numbers at most: the proof has some ten such tensors in fp64, 5 GiB. As many scores of attention,
# which it has too.
MOST_ELEMENTS = 2**26
MOST_CLASSES = 2**20

SWEEP = (
    (4096, 2), (1024, 2), (128, 2), (4096, 10), (1024, 33), (256, 32), (32, 7), (8, 1000),
    (64, 256), (1, 1), (1, 64), (100000,), (3, 100001),
    (512, 3, 8, 8), (2, 3, 5, 5), (16, 4, 32, 32),
)  # fmt: skip


class Given:
    """Tensors of one shape, made when first asked for. x, y, z: the shape's own normals. alpha and
    sigma: one of each sample, and `spread` over it. weight, bias: of the channels. wide: the same
    numbers in float64.
    """

    def __init__(self, shape, dtype, device, memory_format, wide=False):
        self.shape, self.drawn, self.device = shape, dtype, device
        self.dtype = torch.float64 if wide else dtype
        self.memory_format = memory_format

    def draw(self, shape: Sequence[int], stream: int) -> Tensor:
        x = genfast.randn(tuple(shape), seed=SEED, stream=stream, device=self.device)
        return x.to(self.drawn).to(self.dtype)

    def own(self, stream: int, shape: Sequence[int] | None = None) -> Tensor:
        """In this memory order, if it is of images."""
        x = self.draw(self.shape if shape is None else shape, stream)
        return x.contiguous(memory_format=self.memory_format) if x.dim() == 4 else x

    x = cached_property(lambda self: self.own(1))
    y = cached_property(lambda self: self.own(2))
    z = cached_property(lambda self: self.own(3))
    half = cached_property(lambda self: torch.full_like(self.x, 0.5))
    sigma = cached_property(
        lambda self: torch.linspace(0.1, 0.9, self.shape[0], device=self.device)
    )
    alpha = cached_property(lambda self: (1 - self.sigma**2).sqrt())
    seeds = cached_property(lambda self: torch.arange(self.shape[0], device=self.device))
    generators = cached_property(
        lambda self: [torch.Generator(self.device).manual_seed(n) for n in range(self.shape[0])]
    )
    weight = cached_property(lambda self: self.draw((self.channels,), 4))
    bias = cached_property(lambda self: self.draw((self.channels,), 5))
    matrix = cached_property(lambda self: self.draw((self.channels, self.channels), 6))
    kernels = cached_property(lambda self: self.own(7, (8, self.channels, 3, 3)))
    filter = cached_property(lambda self: genfast.setup_filter([1, 3, 3, 1], device=self.device))

    @property
    def channels(self) -> int:
        return self.shape[1] if len(self.shape) == 4 else self.shape[-1]

    def spread(self, c: Tensor) -> Tensor:
        """A number of each sample, as a PyTorch user hands it to all of the sample's."""
        return c.to(self.dtype).reshape(-1, *(1,) * (len(self.shape) - 1))


@dataclass(frozen=True)
class Line:
    """ours, plain: of what is given and, for each name in `leaves`, the tensor. gradient: by the
    leaves. terms: of a shape, how many a single number is the mean of: its gradient is made that
    much larger, to be seen beside others. layout: of images, their memory order matters.
    """

    family: str
    name: str
    ours: Callable
    plain: Callable
    leaves: tuple[str, ...] = ()
    gradient: bool = False
    fits: Callable[[tuple[int, ...]], bool] = lambda shape: True
    terms: Callable[[tuple[int, ...]], int] = lambda shape: 1
    layout: bool = True


# ---- which shapes ----------------------------------------------------------------------------


def rows(shape) -> bool:
    return len(shape) > 1 and not images(shape)


def norms(shape) -> bool:
    return rows(shape) and shape[-1] > 1


def batches(shape) -> bool:
    """Of which one generator each, or a loop over them, is not too slow."""
    return shape[0] <= 4096


def vocabularies(shape) -> bool:
    return classes(shape) and len(shape) == 2 and batches(shape)


def classes(shape) -> bool:
    return rows(shape) and shape[-1] <= MOST_CLASSES


def halves(shape) -> bool:
    return rows(shape) and shape[-1] % 2 == 0


def widths(shape) -> bool:
    return rows(shape) and shape[-1] <= 8192


def images(shape) -> bool:
    return len(shape) == 4


def heads(shape) -> bool:
    return images(shape) and shape[-1] <= 256 and math.prod(shape[:3]) * shape[2] <= MOST_ELEMENTS


# ---- what PyTorch's users write -------------------------------------------------------------


def _randn_of_each(t: Given) -> Tensor:
    own = [torch.randn(t.shape[1:], generator=g, dtype=t.dtype, device=t.device)
           for g in t.generators]  # fmt: skip
    return torch.stack(own)


def _drawn(mean: Tensor, log_variance: Tensor) -> Tensor:
    return mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)


def _kl_terms(mean: Tensor, log_variance: Tensor) -> Tensor:
    return 1 + log_variance - mean.square() - log_variance.exp()


def _kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    terms = _kl_terms(mean, log_variance)
    return -0.5 * terms.flatten(1).sum(1) if mean.dim() > 1 else -0.5 * terms


def _nll(logits: Tensor, target: Tensor) -> Tensor:
    terms = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return terms.flatten(1).sum(1) if logits.dim() > 1 else terms


def _rescaled(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    out = uncond + scale * (cond - uncond)
    axes = tuple(range(1, out.dim()))
    ratio = cond.std(axes, keepdim=True) / out.std(axes, keepdim=True)
    return 0.7 * out * ratio + 0.3 * out


def _gated(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return a.sigmoid() * b


def _nucleus(logits: Tensor) -> Tensor:
    ordered, order = torch.sort(logits.float(), descending=True)
    chance = ordered.softmax(-1)
    beyond = chance.cumsum(-1) - chance >= 0.9
    kept = logits.float().masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(kept.softmax(-1), 1)


def _quantile(x: Tensor) -> Tensor:
    return torch.quantile(x.flatten(1).abs().float(), 0.995, dim=1).clamp(1.0, 9.0)


# fmt: off
LINES = (
    Line("rng", "randn",
         lambda t: genfast.randn(t.shape, seed=SEED, dtype=t.dtype, device=t.device),
         lambda t: torch.randn(t.shape, dtype=t.dtype, device=t.device), layout=False),
    Line("rng", "randn, a seed of each",
         lambda t: genfast.randn(t.shape, seed=t.seeds, dtype=t.dtype, device=t.device),
         lambda t: _randn_of_each(t), fits=batches, layout=False),
    Line("rng", "rand",
         lambda t: genfast.rand(t.shape, seed=SEED, dtype=t.dtype, device=t.device),
         lambda t: torch.rand(t.shape, dtype=t.dtype, device=t.device), layout=False),

    Line("sampling", "reparameterize",
         lambda t, m, v: genfast.reparameterize(m, v, seed=SEED),
         lambda t, m, v: _drawn(m, v), ("x", "y")),
    Line("sampling", "reparameterize+kl",
         lambda t, m, v: genfast.reparameterize(m, v, seed=SEED, return_kl=True),
         lambda t, m, v: (_drawn(m, v), -0.5 * _kl_terms(m, v).sum() / t.shape[0]), ("x", "y"),
         True, terms=lambda shape: shape[0]),
    Line("sampling", "reparameterize+kl of each sample",
         lambda t, m, v: genfast.reparameterize(m, v, seed=SEED, return_kl=True,
                                                kl_reduction="none"),
         lambda t, m, v: (_drawn(m, v), _kl(m, v)), ("x", "y"), True),
    Line("sampling", "gaussian_kl",
         lambda t, m, v: genfast.gaussian_kl(m, v, reduction="none"),
         lambda t, m, v: _kl(m, v), ("x", "y"), True, lambda shape: len(shape) > 1),
    Line("sampling", "bernoulli_nll",
         lambda t, x: genfast.bernoulli_nll(x, t.half),
         lambda t, x: _nll(x, t.half),
         ("x",), True),
    Line("sampling", "tanh_normal",
         lambda t, m, s: genfast.tanh_normal(m, s, seed=SEED),
         lambda t, m, s: torch.tanh(m + torch.exp(s) * torch.randn_like(m)), ("x", "y")),
    Line("sampling", "gumbel_softmax",
         lambda t, x: genfast.gumbel_softmax(x, seed=SEED),
         lambda t, x: F.gumbel_softmax(x), ("x",), True, classes),
    Line("sampling", "sample_categorical",
         lambda t, x: genfast.sample_categorical(x, seed=SEED),
         lambda t, x: torch.multinomial(x.softmax(-1), 1), ("x",), False, vocabularies),
    Line("sampling", "sample_tokens top_p",
         lambda t, x: genfast.sample_tokens(x, top_p=0.9, seed=SEED),
         lambda t, x: _nucleus(x), ("x",), False, vocabularies),

    Line("diffusion", "add_noise",
         lambda t, x: genfast.add_noise(x, t.alpha, t.sigma, seed=SEED),
         lambda t, x: t.spread(t.alpha) * x + t.spread(t.sigma) * torch.randn_like(x), ("x",)),
    Line("diffusion", "add_noise, a seed of each",
         lambda t, x: genfast.add_noise(x, t.alpha, t.sigma, seed=t.seeds),
         lambda t, x: t.spread(t.alpha) * x + t.spread(t.sigma) * _randn_of_each(t), ("x",), False,
         batches),
    Line("diffusion", "add_noise, given noise",
         lambda t, x, n: genfast.add_noise(x, t.alpha, t.sigma, noise=n),
         lambda t, x, n: t.spread(t.alpha) * x + t.spread(t.sigma) * n, ("x", "y")),
    Line("diffusion", "velocity",
         lambda t, x, n: genfast.velocity(x, t.alpha, t.sigma, noise=n),
         lambda t, x, n: t.spread(t.alpha) * n - t.spread(t.sigma) * x, ("x", "y")),
    Line("diffusion", "scale_noise",
         lambda t, x, n: genfast.scale_noise(x, t.sigma, noise=n),
         lambda t, x, n: (1 - t.spread(t.sigma)) * x + t.spread(t.sigma) * n, ("x", "y")),
    Line("diffusion", "scale_model_input",
         lambda t, x: genfast.scale_model_input(x, t.sigma),
         lambda t, x: x / (t.spread(t.sigma).square() + 1).sqrt(), ("x",)),
    Line("diffusion", "loss epsilon",
         lambda t, out: genfast.denoising_loss(out, t.x, t.alpha, t.sigma, seed=SEED),
         lambda t, out: F.mse_loss(out, torch.randn_like(t.x)), ("y",), True, terms=math.prod),
    Line("diffusion", "loss v, given noise",
         lambda t, out: genfast.denoising_loss(out, t.x, t.alpha, t.sigma, noise=t.z,
                                               prediction="v_prediction"),
         lambda t, out: F.mse_loss(out, t.spread(t.alpha) * t.z - t.spread(t.sigma) * t.x),
         ("y",), True, terms=math.prod),
    Line("diffusion", "guide cfg",
         lambda t, c, u: genfast.guide(c, u, 5.0),
         lambda t, c, u: u + 5.0 * (c - u), ("x", "y")),
    Line("diffusion", "guide cfg, a scale of each",
         lambda t, c, u: genfast.guide(c, u, t.alpha),
         lambda t, c, u: u + t.spread(t.alpha) * (c - u), ("x", "y")),
    Line("diffusion", "guide rescale",
         lambda t, c, u: genfast.guide(c, u, 5.0, method="rescale", rescale=0.7),
         lambda t, c, u: _rescaled(c, u, 5.0), ("x", "y"), False,
         lambda shape: len(shape) > 1 and math.prod(shape[1:]) > 1),
    Line("diffusion", "dynamic_threshold",
         lambda t, x: genfast.dynamic_threshold(x, 0.995, 9.0),
         lambda t, x: _quantile(x), ("x",), False,
         lambda shape: len(shape) > 1 and math.prod(shape[1:]) < 2**24),

    Line("attention", "self",
         lambda t, q, k, v: genfast.attention(q, k, v),
         lambda t, q, k, v: F.scaled_dot_product_attention(q, k, v), ("x", "y", "z"), True, heads,
         layout=False),
    Line("attention", "self causal",
         lambda t, q, k, v: genfast.attention(q, k, v, causal=True),
         lambda t, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
         ("x", "y", "z"), True, heads, layout=False),

    Line("filtering", "gated_act",
         lambda t, x: genfast.gated_act(x),
         lambda t, x: _gated(x), ("x",), True, halves),
    Line("filtering", "bias_act lrelu",
         lambda t, x, b: genfast.bias_act(x, b, act="lrelu"),
         lambda t, x, b: F.leaky_relu(x + b[:, None, None], 0.2) * math.sqrt(2), ("x", "bias"),
         True, images),
    Line("filtering", "upsample2d",
         lambda t, x: genfast.upsample2d(x, t.filter),
         lambda t, x: F.interpolate(x, scale_factor=2, mode="bilinear"), ("x",), False, images),

    Line("normalization", "layer_norm",
         lambda t, x, w, b: genfast.layer_norm(x, w, b),
         lambda t, x, w, b: F.layer_norm(x, w.shape, w, b), ("x", "weight", "bias"), True, norms),
    Line("normalization", "rms_norm",
         lambda t, x, w: genfast.rms_norm(x, w),
         lambda t, x, w: F.rms_norm(x, w.shape, w), ("x", "weight"), True, norms),
    Line("normalization", "group_norm of one",
         lambda t, x, w, b: genfast.group_norm(x, 1, w, b),
         lambda t, x, w, b: F.group_norm(x, 1, w, b), ("x", "weight", "bias"), True,
         lambda shape: images(shape) and math.prod(shape[1:]) > 1),

    Line("linear", "linear",
         lambda t, x, w, b: genfast.linear(x, w, b),
         lambda t, x, w, b: F.linear(x, w, b), ("x", "matrix", "bias"), True, widths),
    Line("convolution", "conv2d",
         lambda t, x, w: genfast.conv2d(x, w, padding=1),
         lambda t, x, w: F.conv2d(x, w, padding=1), ("x", "kernels"), True, images),
)
# fmt: on


def _tensors(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _call(fn: Callable, line: Line, given: Given, upstream: list[Tensor] | None):
    """Of what is given; with upstream, the gradients by the leaves."""
    leaves = [getattr(given, name).detach() for name in line.leaves]
    if upstream is None:
        return lambda: _tensors(fn(given, *leaves))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    return lambda: torch.autograd.grad(_tensors(fn(given, *leaves)), leaves, upstream)


def _work(line: Line, backward: bool, shape, dtype, channels_last, device) -> Work:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    given, wide = (Given(shape, dtype, device, memory_format, wide) for wide in (False, True))
    upstream = wider = None
    if backward:
        results = _call(line.ours, line, given, None)()
        upstream = [
            given.own(10 + i, y.shape).to(y.dtype) * (1 if y.dim() else line.terms(shape))
            for i, y in enumerate(results)
        ]
        wider = [g.double() for g in upstream]
    ours = _call(line.ours, line, given, upstream)

    def proof():
        with genfast.backend("reference"):
            plain = ours()
            judged = bool(line.leaves) and plain[0].is_floating_point()  # others are draws
            truth = _call(line.ours, line, wide, wider)() if judged else plain
        for got, yardstick, want in zip(ours(), plain, truth, strict=True):
            if judged:
                assert_judged(line.name, got, yardstick, want, summed=1.0)  # of normals
            else:
                assert_bitwise(line.name, got, yardstick)

    return Work(ours, {"eager": _call(line.plain, line, given, upstream)}, proof)


def cases(
    shapes: Sequence[tuple[int, ...]],
    families: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> list[Case]:
    """The cases of each shape: all ops of these families (of all) that take it, and their
    gradients. channels_last: of images, where it matters. ValueError for what no op takes."""
    known = list(dict.fromkeys(line.family for line in LINES))
    for family in families:
        if family not in known:
            raise ValueError(f"family: expected one of {', '.join(known)}, got {family!r}")
    shapes = list(dict.fromkeys(shapes))
    for shape in shapes:
        if math.prod(shape) > MOST_ELEMENTS:
            raise ValueError(f"--shape: expected at most 2**26 numbers, got {shape}")
        if channels_last and not images(shape):
            raise ValueError(
                f"--channels-last: expected shapes of images such as 16x4x32x32, got {shape}"
            )
    found = [
        Case(
            line.family,
            f"{line.name}{' nhwc' * channels_last}{' fwd+bwd' * backward}",
            shape,
            partial(_work, line, backward, shape, dtype, channels_last),
            dtype=dtype,
        )
        for line in LINES
        if (not families or line.family in families) and (line.layout or not channels_last)
        for shape in shapes
        if line.fits(shape)
        for backward in ((False, True) if line.gradient else (False,))
    ]
    if not found:
        raise ValueError(
            f"--shape: expected one that an op of {', '.join(families or known)} takes, got "
            f"{', '.join(map(str, shapes))}{' with --channels-last' * channels_last}"
        )
    return found
