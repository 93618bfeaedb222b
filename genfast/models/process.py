"""The noise process that every diffusion model here undoes, its solver plans and its sampling.

    q(x_t | x_0) = N(alpha_t x_0, sigma_t^2),  alpha_t^2 = alpha_bar_t,  sigma_t^2 = 1 - alpha_bar_t

Ho et al., "Denoising diffusion probabilistic models", 2020, eq. 4; Ho & Salimans, "Classifier-free
diffusion guidance", 2022. Letters: x_0 (B, ...); t (B,) int64 in 0 ... T - 1; m a model's output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genfast import schedulers
from genfast.models._seeds import in_tiles, sample_seeds
from genfast.nn._tables import Tables
from genfast.ops import _check
from genfast.ops._noise import Seed
from genfast.ops.diffusion import add_noise
from genfast.ops.rng import rand, randn
from genfast.schedulers.from_config.makers import CLASSES

NOISE, TIME, DROP = range(3)  # streams of a training sample's seed
START, STEPS = 0, 1  # of a generated sample's: x_T; the solver's row k has STEPS + k

# Of x_t, a model's output m, alpha and sigma.
_X0 = {
    "epsilon": lambda x, m, a, s: (x - s * m) / a,
    "sample": lambda x, m, a, s: m,
    "v_prediction": lambda x, m, a, s: a * x - s * m,
}

# Names for plans -> the diffusers scheduler whose steps they are, and options that keep the
# predicted x0 in [-1, 1]. Without them a small error of eps at the noisy end, where alpha is
# 5e-5, becomes an x0 of thousands: dpm-solver++ then draws white noise around the digits.
_CLIP = {"clip_sample": True}
_THRESHOLD = {"thresholding": True, "sample_max_value": 1.0}
PLANS = {
    "ddpm": ("DDPMScheduler", _CLIP),
    "ddim": ("DDIMScheduler", _CLIP),
    "heun": ("HeunDiscreteScheduler", _CLIP),
    "dpm-solver++": ("DPMSolverMultistepScheduler", _THRESHOLD),
    "unipc": ("UniPCMultistepScheduler", _THRESHOLD),
    "deis": ("DEISMultistepScheduler", _THRESHOLD),
    "pndm": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
}


class NoiseProcess(Tables):
    """T, schedule: of `schedulers.noise_schedule`, T >= 2, for 1 has no posterior; prediction: what
    a model gives, "epsilon", "sample" or "v_prediction" (see `genfast.denoising_loss`; flows have
    no place on a `noise_schedule`).
    """

    TILE = 16  # samples of one model call in `sample`, see `in_tiles`
    _bounded = True  # x_0 is in [-1, 1]

    def __init__(self, T: int, schedule: str, prediction: str):
        super().__init__()
        _check.integer("T", T, low=2)
        _check.choice("prediction", prediction, _X0)
        self.T, self.prediction = T, prediction
        self.noise = schedulers.noise_schedule(schedule, T)
        self.set_tables(**self._tables_of(torch.from_numpy(self.noise.alpha_bar.copy())))

    def _tables_of(self, alpha_bar: Tensor) -> dict[str, Tensor]:
        """Of alpha_bar (T,) float64: values of each t."""
        return {"alpha": alpha_bar.sqrt(), "sigma": (1 - alpha_bar).sqrt()}

    # ---- training -------------------------------------------------------------------------------

    def losses(self, *args: Tensor | None, seed: Seed, **named: Tensor | None) -> Tensor:
        raise NotImplementedError

    def loss(self, *args: Tensor | None, seed: Seed, **named: Tensor | None) -> Tensor:
        """Mean of `losses`, whose arguments it takes, ()."""
        return self.losses(*args, seed=seed, **named).mean()

    def _noised(self, x0: Tensor, seed: Seed) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x_t, t, alpha and sigma of training samples x0 (B, ...) at uniform times."""
        t = (rand(len(x0), seed=seed, stream=TIME, device=x0.device) * self.T).long()
        alpha, sigma = self.alpha[t], self.sigma[t]
        return add_noise(x0, alpha, sigma, seed=seed, stream=NOISE), t, alpha, sigma

    def _dropped(self, x: Tensor, share: float, seed: Seed) -> Tensor | None:
        """(B,) bool: the samples that train without their condition; None: outside training."""
        if not self.training:
            return None
        return rand(len(x), seed=seed, stream=DROP, device=x.device) < share

    def _x0(self, x: Tensor, m: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x0 of x = alpha x0 + sigma eps and a model's output m; alpha, sigma (B,)."""
        wide = (-1, *[1] * (x.dim() - 1))
        return _X0[self.prediction](x, m, alpha.view(wide), sigma.view(wide))

    # ---- sampling -------------------------------------------------------------------------------

    def _plan(self, name: str, steps: int | None, default: int, options) -> schedulers.SolverPlan:
        """A solver plan on this schedule, of `default` steps or T if that is less."""
        _check.choice("plan", name, PLANS)
        steps = min(default, self.T) if steps is None else steps
        _check.integer("steps", steps)
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps: expected an int in 1 ... {self.T}, got {steps}")
        scheduler, bounds = PLANS[name]
        known, _ = CLASSES[scheduler]
        if unknown := [key for key in options if key not in known]:
            raise TypeError(
                f"{unknown[0]}: no option of plan {name!r}; expected one of {', '.join(known)}"
            )
        if not self._bounded:  # said aloud: by diffusers' defaults ddpm and ddim clamp x0 to +-1
            bounds = {key: False for key, value in bounds.items() if value is True}
        config = {
            "num_train_timesteps": self.T, "prediction_type": self.prediction,
            "timestep_spacing": "trailing", **bounds, **options,
        }  # fmt: skip
        return schedulers.plan_from_config(
            scheduler, config, steps, alphas_cumprod=self.noise.alpha_bar
        )

    def _in_tiles(self, call: Callable[[Tensor, Tensor], Tensor], n: int, seed: int, start: int):
        """Rows start ... start + n - 1 of call(rows, seeds): rows, their places among the n (those
        of a tile's end that nobody asked for: any); seeds, int64, one each."""
        device, B = self.alpha.device, self.TILE

        def tile(first: int) -> Tensor:
            rows = torch.arange(first, first + B, device=device).sub_(start).clamp_(0, n - 1)
            return call(rows, sample_seeds(B, seed, start=first, device=device))

        return in_tiles(tile, n, start, B)

    def _check_sampling(self, n: int, plan: schedulers.SolverPlan, guidance: float) -> None:
        _check.integer("n", n, low=0)
        _check.number("guidance", guidance)
        if not isinstance(plan, schedulers.SolverPlan):
            raise TypeError(
                f"plan: expected a SolverPlan or None, got {_check.describe(plan)}; make one with "
                "model.plan(name, steps)"
            )

    def _solve(self, model: Callable, plan: schedulers.SolverPlan, shape: tuple[int, ...],
               seeds: Tensor, guidance=None, stream: int = 0) -> Tensor:  # fmt: skip
        """x_0 of a tile, by model(x, t) as `schedulers.sample` calls it."""
        x_T = randn(self.TILE, *shape, seed=seeds, stream=stream + START, device=self.alpha.device,
                    dtype=self.alpha.dtype)  # fmt: skip
        return schedulers.sample(model, plan, plan.init_noise_sigma * x_T, seed=seeds,
                                 stream=stream + STEPS, guidance=guidance)  # fmt: skip

    def _denoiser(self, model: Callable[..., Tensor], conditions: tuple, guidance: float):
        """model(x, t (B,), *conditions, drop) as `schedulers.sample` calls it. With guidance, of
        cond and uncond in one pass of 2 TILE rows, where drop (2 TILE,) names those without."""
        B, device = self.TILE, self.alpha.device
        if guidance == 1:
            return lambda x, t: model(x, torch.full((B,), t, device=device), *conditions, None)
        conditions = tuple(None if c is None else torch.cat([c, c]) for c in conditions)
        drop = torch.arange(2 * B, device=device) >= B

        def both(x, t):
            m = model(torch.cat([x, x]), torch.full((2 * B,), t, device=device), *conditions, drop)
            return m[:B], m[B:]

        return both
