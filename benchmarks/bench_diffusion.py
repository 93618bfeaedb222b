"""diffusion: solver steps, the forward process, guidance and the training loss, against the PyTorch
lines and the diffusers schedulers that they replace."""

from __future__ import annotations

import importlib.util
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import genfast
from genfast import schedulers as S
from genfast.benchmarks.harness import Case, Work, assert_bitwise, assert_judged
from genfast.reference import diffusion as reference
from genfast.reference import rng as noise

SEED, STEPS, ROW = 1234, 20, 10


def _inputs(count, shape, device, dtype=torch.float32):
    return [
        genfast.randn(shape, seed=SEED, stream=100 + i, device=device).to(dtype)
        for i in range(count)
    ]


# ---- solver steps --------------------------------------------------------------------------------

# name -> plan maker, diffusers class (its options are the plan's), tensors read + written.
SOLVERS = {
    "ddim": (S.ddim_plan, "DDIMScheduler", 3),
    "euler": (S.euler_plan, "EulerDiscreteScheduler", 3),
    "flow euler": (S.flow_match_euler_plan, "FlowMatchEulerDiscreteScheduler", 3),
    "dpm++2m": (S.dpm_solver_plan, "DPMSolverMultistepScheduler", 5),
    "unipc2": (S.unipc_plan, "UniPCMultistepScheduler", 8),
    "ddpm": (S.ddpm_plan, "DDPMScheduler", 3),
}


def _row_of(plan):
    """Its numbers: those of x0 and its clamp, and the weights of the sources."""
    c = plan.table_on("cpu", torch.float64)[ROW, 6:16].float().tolist()
    return [float(v) for v in plan.table[ROW][:3]], c


def _eager_row(numbers, x, m, history, z):
    """The row as PyTorch code that knows its numbers: a product, then one pass for each source."""
    (a, b, most), c = numbers
    x0 = None
    if c[2]:
        x0 = (a * x).add_(m, alpha=b).clamp_(-most, most)
    sources = [x, m, x0, *history, *[None] * (6 - len(history)), z]
    (first, s), *others = [(w, s) for w, s in zip(c, sources, strict=True) if w]
    out = first * s
    for w, s in others:
        out.add_(s, alpha=w)
    return out


def _peer(module, name, m, x):
    """One step of a scheduler class in mid-schedule, as often as asked."""
    scheduler = getattr(module, name)()
    scheduler.set_timesteps(STEPS)
    keywords = {"return_dict": False}
    if name == "DDPMScheduler":
        keywords["generator"] = torch.Generator().manual_seed(SEED)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    scheduler.is_scale_input_called = True
    for t in scheduler.timesteps[:ROW]:
        scheduler.step(m, t, x, **keywords)
    t, counted = scheduler.timesteps[ROW], getattr(scheduler, "_step_index", None) is not None

    def call():
        if counted:
            scheduler._step_index = ROW
        return scheduler.step(m, t, x, **keywords)[0]

    return call


def _diffusers_peer(name, m, x):
    import diffusers

    return _peer(diffusers, name, m, x)


def _dropin_peer(name, m, x):
    from genfast.integrations import diffusers

    return _peer(diffusers, name, m, x)


def _solver(name, shape, dtype, device):
    make, peer, _ = SOLVERS[name]
    plan = make(STEPS)
    x, m, z, *history = _inputs(3 + plan.slots, shape, device, dtype)
    state = S.SolverState(x, history, ROW)
    noisy, numbers = plan.needs_noise(ROW), _row_of(plan)

    def proof():
        got = S.step(plan, state, m, seed=SEED).x
        small = slice(0, 1)
        eps = noise.random(shape, "normal", SEED, stream=ROW).to(device)[small]
        args = lambda kind: (  # noqa: E731
            numbers, x[small].to(kind), m[small].to(kind), [h[small].to(kind) for h in history],
            eps.to(kind),
        )  # fmt: skip
        assert_judged(name, got[small], _eager_row(*args(dtype)), _eager_row(*args(torch.float64)))

    rivals = {
        "eager": lambda: _eager_row(numbers, x, m, history, torch.randn_like(x) if noisy else z)
    }
    late = {}
    if importlib.util.find_spec("diffusers"):
        rivals["diffusers"] = _diffusers_peer(peer, m, x)
        rivals["dropin"] = _dropin_peer(peer, m, x)
    else:  # reported as skipped
        late["diffusers"] = partial(_diffusers_peer, peer, m, x)
    return Work(lambda: S.step(plan, state, m, seed=SEED), rivals, proof, late)


def _solver_case(name, shape, dtype=torch.float32, target=20.0, **more):
    n = math.prod(shape)
    return Case(
        "diffusion",
        f"{name} step",
        shape,
        partial(_solver, name, shape, dtype),
        dtype=dtype,
        bytes=n * SOLVERS[name][2] * torch.finfo(dtype).bits // 8,
        targets={"diffusers": target, "dropin": 0.0},
        note="the plan API; dropin: our class of diffusers' name, for information",
        **more,
    )


# ---- forward process and loss --------------------------------------------------------------------


def _levels(batch, device):
    sigma = torch.linspace(0.05, 0.95, batch, device=device)
    return (1 - sigma**2).sqrt(), sigma


def _spread(c: Tensor, x: Tensor) -> Tensor:
    return c.reshape(-1, *(1,) * (x.dim() - 1))


def _add_noise(shape, device):
    (x0,) = _inputs(1, shape, device)
    alpha, sigma = _levels(shape[0], device)

    def eager():
        return _spread(alpha, x0) * x0 + _spread(sigma, x0) * torch.randn_like(x0)

    def proof():
        rows = slice(0, 1)
        eps = noise.random(shape, "normal", SEED)[rows].to(device)
        got = genfast.add_noise(x0, alpha, sigma, seed=SEED)[rows]
        plain = lambda k: reference.add_noise(  # noqa: E731
            x0[rows].to(k), eps.to(k), alpha[rows].to(k), sigma[rows].to(k)
        )
        assert_judged("add_noise", got, plain(torch.float32), plain(torch.float64))
        zero = torch.zeros_like(x0)
        drawn = genfast.randn(shape, seed=SEED, device=device)
        assert_bitwise("noise", genfast.add_noise(zero, 0.0, 1.0, seed=SEED), drawn)

    return Work(
        ours=lambda: genfast.add_noise(x0, alpha, sigma, seed=SEED),
        rivals={"eager": eager},
        late={"compile": lambda: torch.compile(eager, dynamic=False)},
        proof=proof,
    )


def _eager_loss(output, x0, eps, alpha, sigma, prediction):
    """Min-SNR weighted loss of diffusion training scripts."""
    target = eps
    if prediction == "v_prediction":
        target = _spread(alpha, x0) * eps - _spread(sigma, x0) * x0
    snr = (alpha / sigma) ** 2
    weight = snr.clamp(max=5.0) / (snr + 1 if prediction == "v_prediction" else snr)
    error = F.mse_loss(output, target, reduction="none").mean(tuple(range(1, x0.dim())))
    return (error * weight).mean()


def _loss(shape, prediction, given, device):
    output, x0, eps = _inputs(3, shape, device)
    alpha, sigma = _levels(shape[0], device)
    leaf = output.detach().requires_grad_()
    options = dict(prediction=prediction, weighting="min_snr")
    options |= dict(noise=eps) if given else dict(seed=SEED)

    def ours():
        return torch.autograd.grad(genfast.denoising_loss(leaf, x0, alpha, sigma, **options), leaf)

    def make_eager(loss, redraw=False):
        def call():
            e = torch.randn_like(x0) if redraw else eps
            return torch.autograd.grad(loss(leaf, x0, e, alpha, sigma, prediction), leaf)

        return call

    def proof():
        n = min(shape[0], max(1, 2**18 // math.prod(shape[1:])))
        z = eps[:n] if given else noise.random((n, *shape[1:]), "normal", SEED).to(device)
        some = dict(options, noise=z) if given else options

        def plain(kind):
            o = output[:n].to(kind).requires_grad_()
            rest = (x0[:n].to(kind), z.to(kind), alpha[:n].to(kind), sigma[:n].to(kind))
            loss = _eager_loss(o, *rest, prediction)
            return loss.detach(), torch.autograd.grad(loss, o)[0]

        o = output[:n].detach().requires_grad_()
        loss = genfast.denoising_loss(o, x0[:n], alpha[:n], sigma[:n], **some)
        got = (loss.detach(), torch.autograd.grad(loss, o)[0])
        for name, a, b, c in zip(
            ("loss", "gradient"), got, plain(torch.float32), plain(torch.float64), strict=True
        ):
            assert_judged(name, a, b, c, 3.0)

    redrawn = {} if given else {"eager, redrawn": make_eager(_eager_loss, True)}
    return Work(
        ours=ours,
        rivals={"eager": make_eager(_eager_loss), **redrawn},
        late={"compile": lambda: make_eager(torch.compile(_eager_loss, dynamic=False))},
        proof=proof,
    )


# ---- guidance and thresholds ---------------------------------------------------------------------

GUIDANCE = {
    "cfg": dict(method="cfg"),
    "rescale": dict(method="rescale", rescale=0.7),
    "apg": dict(method="apg", eta=0.2, norm_threshold=15.0),
}


def _guide(method, shape, by_sample, device):
    cond, uncond = _inputs(2, shape, device)
    uncond = 0.8 * cond + 0.2 * uncond
    options = GUIDANCE[method]
    scale = torch.linspace(1.0, 9.0, shape[0], device=device) if by_sample else 5.0

    def proof():
        plain = lambda k: reference.guide(cond.to(k), uncond.to(k), scale, **options)  # noqa: E731
        got = genfast.guide(cond, uncond, scale, **options)
        assert_judged(method, got, plain(torch.float32), plain(torch.float64))

    spread = _spread(scale, cond) if by_sample else scale
    eager = partial(reference.GUIDANCE[method], cond, uncond, spread)
    named = {k: v for k, v in options.items() if k != "method"}
    return Work(
        ours=lambda: genfast.guide(cond, uncond, scale, **options),
        rivals={"eager": lambda: eager(**named)},
        proof=proof,
    )


def _threshold(shape, device):
    (x0,) = _inputs(1, shape, device)

    def eager():
        return torch.quantile(x0.flatten(1).abs(), 0.995, dim=1).clamp(1.0, 9.0)

    def proof():
        got = genfast.dynamic_threshold(x0, 0.995, 9.0)
        wide = torch.quantile(x0.flatten(1).abs().double(), 0.995, dim=1).clamp(1.0, 9.0)
        assert_judged("threshold", got, eager(), wide)

    return Work(
        ours=lambda: genfast.dynamic_threshold(x0, 0.995, 9.0), rivals={"eager": eager}, proof=proof
    )


def _case(name, shape, setup, passes, **more):
    return Case(
        "diffusion", name, shape, partial(setup, shape), bytes=4 * passes * math.prod(shape), **more
    )


LATENT, IMAGE, BATCH = (1, 4, 64, 64), (4, 3, 512, 512), (64, 3, 256, 256)
POINTS, EMBEDDINGS = (4096, 2), (256, 32)  # short rows

CASES = [
    *(_solver_case(name, LATENT) for name in SOLVERS),
    *(_solver_case(name, IMAGE, target=5.0) for name in SOLVERS),
    _solver_case("ddim", IMAGE, torch.bfloat16, target=5.0),
    # Large enough for a GPU's memory to decide: below 100 MB the launch does.
    *(
        _solver_case(name, (64, 3, 512, 512), target=1.0, device="cuda")
        for name in ("ddim", "dpm++2m", "ddpm")
    ),
    _case("add_noise", BATCH, _add_noise, 2, targets={"eager": 5.0}),
    *(_case("add_noise", shape, _add_noise, 2) for shape in ((8, 4, 64, 64), POINTS, EMBEDDINGS)),
    *(
        Case(
            "diffusion",
            f"loss {prediction}{', given noise' * given} fwd+bwd",
            shape,
            partial(_loss, shape, prediction, given),
            bytes=4 * math.prod(shape) * (passes + 2 * given),
            targets={"eager": target} | ({} if given else {"eager, redrawn": max(1.0, target)}),
            note="eager reads a stored eps, redrawn draws it as a training step does",
        )
        for shape, given, target in (
            (BATCH, False, 4.0),
            (BATCH, True, 4.0),
            (POINTS, False, 0.0),
            (POINTS, True, 1.0),
            (EMBEDDINGS, False, 0.0),
            (EMBEDDINGS, True, 1.0),
        )
        for prediction, passes in (("epsilon", 3), ("v_prediction", 5))
    ),
    *(
        Case(
            "diffusion",
            f"guide {method}{', a scale of each' * by_sample}",
            shape,
            partial(_guide, method, shape, by_sample),
            bytes=4 * math.prod(shape) * passes,
        )
        for method, shape, by_sample, passes in (
            ("cfg", (4, 4, 128, 128), False, 3),
            ("rescale", (4, 4, 128, 128), False, 5),
            ("apg", (4, 4, 128, 128), False, 5),
            ("cfg", (4, 4, 128, 128), True, 3),
            ("cfg", POINTS, True, 3),
        )
    ),
    _case("dynamic_threshold", (4, 3, 256, 256), _threshold, 1),
]
