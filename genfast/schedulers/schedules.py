"""Noise schedules and sampling grids, on the host, in numpy float64.

Notation: ``x_t = alpha_t x0 + sigma_t eps``. A training schedule is ``alpha_bar`` of shape (T,),
with ``alpha_t = sqrt(alpha_bar_t)`` and ``sigma_t = sqrt(1 - alpha_bar_t)``. A grid is the part of
it that a sampler visits:

* `AlphaGrid` (DDPM, DDIM, PNDM, LCM, TCD): timesteps (N,), alpha_bar (N,) and alpha_bar_next (N,),
* `SigmaGrid` (all others): timesteps (N,) and sigmas (N+1,), the last being where sampling ends.
  ``kind`` says what a sigma is: "vp" sigma_t / alpha_t, "flow" the flow time (alpha = 1 - sigma),
  "edm" the noise level of Karras et al. (alpha = 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from ._check import choice, finite, number, positive, sigma_range, whole
from ._special import beta_ppf


def _frozen(a, dtype=np.float64) -> np.ndarray:
    a = np.asarray(a).astype(dtype)
    a.flags.writeable = False
    return a


# --------------------------------------------------------------------------------------------------
# training schedules


def _from_alpha_bar(f, T: int, max_beta: float = 0.999) -> np.ndarray:
    """beta_i = 1 - f((i+1)/T) / f(i/T), at most max_beta (Nichol & Dhariwal 2021, eq. 17)."""
    t = [f(i / T) for i in range(T + 1)]
    return np.array([min(1 - t[i + 1] / t[i], max_beta) for i in range(T)])


def _laplace_alpha_bar(t: float) -> float:
    """Laplace schedule, mu = 0, b = 0.5 (Hang & Gu 2024); diffusers takes the root of alpha_bar
    here.
    """
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def _sigmoid_betas(T, start, end):
    return (end - start) / (1 + np.exp(-np.linspace(-6, 6, T))) + start


#: name -> betas(T, beta_start, beta_end) -> (T,)
BETA_SCHEDULES = {
    # Ho et al. 2020
    "linear": lambda T, start, end: np.linspace(start, end, T),
    # Rombach et al. 2022 (linear in sqrt(beta))
    "scaled_linear": lambda T, start, end: np.linspace(start**0.5, end**0.5, T) ** 2,
    # Nichol & Dhariwal 2021, eq. 17
    "squaredcos_cap_v2": lambda T, start, end: _from_alpha_bar(
        lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2, T
    ),
    "sigmoid": _sigmoid_betas,
    "laplace": lambda T, start, end: _from_alpha_bar(_laplace_alpha_bar, T),
    "exp": lambda T, start, end: _from_alpha_bar(lambda t: math.exp(-12.0 * t), T),
}
BETA_SCHEDULES["cosine"] = BETA_SCHEDULES["squaredcos_cap_v2"]


def zero_terminal_snr(alpha_bar: ArrayLike) -> np.ndarray:
    """Shift and scale sqrt(alpha_bar) (T,) so that its last entry is 0 and its first stays (Lin et
    al. 2023, alg. 1).
    """
    a = np.sqrt(np.asarray(alpha_bar, np.float64))
    return ((a - a[-1]) * (a[0] / (a[0] - a[-1]))) ** 2


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A training schedule: ``alpha_bar`` (T,) float64, nowhere rising, read-only."""

    alpha_bar: np.ndarray

    def __post_init__(self):
        a = _frozen(self.alpha_bar)
        if (
            a.ndim != 1
            or a.size == 0
            or not (np.isfinite(a).all() and (a >= 0).all() and (a <= 1).all())
        ):
            raise ValueError(
                f"alpha_bar: expected a 1-D array of values in [0, 1], got shape {a.shape}, range "
                f"[{a.min() if a.size else None}, {a.max() if a.size else None}]"
            )
        if (np.diff(a) > 2.0**-20).any():  # the peers put 2^-24 behind what may be less
            raise ValueError(
                f"alpha_bar: expected values that fall from data to noise, got {a[:8]} ...; "
                "betas are for NoiseSchedule.from_betas"
            )
        object.__setattr__(self, "alpha_bar", a)

    @classmethod
    def from_betas(cls, betas, *, zero_snr: bool = False) -> NoiseSchedule:
        """alpha_bar = cumprod(1 - beta), from betas (T,)."""
        alpha_bar = np.cumprod(1.0 - np.asarray(betas, np.float64))
        return cls(zero_terminal_snr(alpha_bar) if zero_snr else alpha_bar)

    def __len__(self) -> int:
        return len(self.alpha_bar)

    @property
    def sigmas(self) -> np.ndarray:
        """sqrt((1 - alpha_bar) / alpha_bar) (T,). A zero alpha_bar counts as 2^-24 (sigma = 4096),
        as in every public sampler: the solver coefficients need a finite sigma."""
        a = np.where(self.alpha_bar > 0, self.alpha_bar, 2.0**-24)
        return np.sqrt((1 - a) / a)


def _schedule(given) -> NoiseSchedule:
    if given is None:
        return noise_schedule()
    if not isinstance(given, NoiseSchedule):
        raise TypeError(
            f"schedule: expected a NoiseSchedule or None, got {given!r}; make one with "
            "noise_schedule() or NoiseSchedule.from_betas"
        )
    return given


def noise_schedule(
    name: str = "scaled_linear",
    T: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    *,
    zero_snr: bool = False,
) -> NoiseSchedule:
    """The named training schedule, T steps. Names: "linear", "scaled_linear", "squaredcos_cap_v2"
    or "cosine", "sigmoid", "laplace", "exp". The defaults are Stable Diffusion's; ``linear, 1e-4,
    0.02`` is DDPM's. Raises ValueError for an unknown name."""
    betas = choice("name", name, BETA_SCHEDULES)(positive("T", T), beta_start, beta_end)
    return NoiseSchedule.from_betas(betas, zero_snr=zero_snr)


# --------------------------------------------------------------------------------------------------
# spacings: which timesteps are visited. Every function gives N descending values.


def _trailing(T, N, last=None):
    # np.arange(last, 0, -T/N) alone can give N+1 values by rounding
    t = np.arange(T if last is None else last, 0, -T / N)[:N]
    return np.round(t) - 1


#: name -> timesteps(T, N, offset) as DDPM, DDIM and the Euler family visit them
SPACINGS = {
    "linspace": lambda T, N, offset: np.linspace(0, T - 1, N)[::-1],
    "leading": lambda T, N, offset: (np.arange(N) * (T // N))[::-1] + float(offset),
    "trailing": lambda T, N, offset: _trailing(T, N),
}

#: the same for DPM-Solver and its kin, which place N+1 points and drop the cleanest; last = T
#: unless clipped
SPACINGS_DROP_LAST = {
    "linspace": lambda T, N, offset, last: np.round(np.linspace(0, last - 1, N + 1))[::-1][:-1],
    "leading": lambda T, N, offset, last: (
        (np.arange(N + 1) * (last // (N + 1)))[::-1][:-1] + float(offset)
    ),
    "trailing": lambda T, N, offset, last: _trailing(T, N, last),
}


# --------------------------------------------------------------------------------------------------
# sigma sequences: N descending noise levels from sigma_max to sigma_min


def karras_sigmas(sigma_max: float, sigma_min: float, N: int, rho: float = 7.0) -> np.ndarray:
    """Karras et al. 2022, eq. 5; (N,)."""
    hi, lo = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (hi + np.linspace(0, 1, N) * (lo - hi)) ** rho


def exponential_sigmas(sigma_max: float, sigma_min: float, N: int) -> np.ndarray:
    """Equal steps in log sigma; (N,)."""
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), N))


def beta_sigmas(sigma_max: float, sigma_min: float, N: int, alpha=0.6, beta=0.6) -> np.ndarray:
    """Quantiles of Beta(alpha, beta) (Lee et al. 2024, "Beta Sampling is All You Need"); (N,)."""
    return sigma_min + beta_ppf(1 - np.linspace(0, 1, N), alpha, beta) * (sigma_max - sigma_min)


#: name -> sigmas(sigma_max, sigma_min, N). "lu" is uniform in lambda = -log sigma (Lu et al. 2022),
#: that is rho = 1 on log sigma, the same points as "exponential"; kept as a name of its own because
#: models ask for it.
SIGMA_KINDS = {
    "karras": karras_sigmas,
    "exponential": exponential_sigmas,
    "beta": beta_sigmas,
    "lu": exponential_sigmas,
}


def sigma_to_t(sigma: ArrayLike, sigmas: ArrayLike) -> np.ndarray:
    """Fractional timestep at which the training table ``sigmas`` (T,) reaches sigma (any shape) for
    the last time, linear in log sigma. (It rises, but for the 4096 that stands for a zero alpha_bar
    and may be less than what is before it.)
    """
    log_sigma, table = np.log(np.maximum(sigma, 1e-10)), np.log(sigmas)
    reached = table <= np.asarray(log_sigma)[..., None]
    low = len(table) - 1 - reached[..., ::-1].argmax(-1)
    low = np.where(reached.any(-1), np.minimum(low, len(table) - 2), 0)
    w = np.clip((table[low] - log_sigma) / (table[low] - table[low + 1]), 0, 1)
    return (1 - w) * low + w * (low + 1)


# --------------------------------------------------------------------------------------------------
# grids


@dataclass(frozen=True, eq=False)
class AlphaGrid:
    """timesteps (N,), alpha_bar at each and alpha_bar where each step goes (N,),
    ``final_alpha_bar`` for a step to x0, and the whole training table ``schedule`` for solvers that
    look up other timesteps (PNDM, TCD)."""

    timesteps: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_next: np.ndarray
    schedule: NoiseSchedule
    final_alpha_bar: float = 1.0
    stride: int = 0  # T // N, the distance DDIM-like solvers step by

    def __post_init__(self):
        for name in ("timesteps", "alpha_bar", "alpha_bar_next"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))

    def __len__(self) -> int:
        return len(self.timesteps)

    def at(self, t) -> np.ndarray:
        """alpha_bar at integer timesteps t (any shape); final_alpha_bar where t < 0."""
        t = np.asarray(t, np.int64)
        return np.where(t >= 0, self.schedule.alpha_bar[np.maximum(t, 0)], self.final_alpha_bar)


def alpha_grid(
    steps: ArrayLike,
    schedule: NoiseSchedule | None = None,
    *,
    spacing: str = "leading",
    offset: int = 0,
    chain: str = "visited",
    final_alpha_bar: float = 1.0,
) -> AlphaGrid:
    """Grid of integer timesteps for `ddpm_plan`, `ddim_plan`, …

    steps: number of steps N, or the descending integer timesteps themselves.
    chain: where a step goes. "visited": the next visited timestep, -1 after the last (DDPM);
        "stride": t - T // N (DDIM); "repeat": the next visited one, the last goes to itself (LCM);
        "zero": the same but the last goes to 0 (TCD).
    final_alpha_bar: alpha_bar of a step to t < 0.
    """
    schedule = _schedule(schedule)
    T = len(schedule)
    if np.ndim(steps) == 0:
        N = positive("steps", steps)
        if N > T:
            raise ValueError(
                f"steps: expected at most {T}, the length of the training schedule, got {N}"
            )
        t = np.round(choice("spacing", spacing, SPACINGS)(T, N, whole("offset", offset)))
    else:
        t = np.asarray(steps, np.float64)
        if t.ndim != 1 or t.size == 0 or not ((np.diff(t) < 0).all() and (t == np.round(t)).all()):
            raise ValueError(
                f"steps: expected descending integer timesteps, got {list(np.ravel(t))[:8]}"
            )
    # "leading" with an offset can pass the end: T = N = 4 with offset 1 does
    if not (t[0] < T and t[-1] >= 0):
        raise ValueError(
            f"steps: timesteps {t[0]:g} ... {t[-1]:g} go beyond the training schedule "
            f"(0..{T - 1}); change the offset"
        )
    number("final_alpha_bar", final_alpha_bar, 0.0, 1.0)
    t = t.astype(np.int64)
    stride = T // len(t)
    tail = {"visited": -1, "repeat": t[-1], "zero": 0}
    t_next = t - stride if chain == "stride" else np.append(t[1:], choice("chain", chain, tail))
    grid = AlphaGrid(t, t, t, schedule, final_alpha_bar, stride)
    return replace(grid, alpha_bar=grid.at(t), alpha_bar_next=grid.at(t_next))


def distilled_timesteps(
    steps: int, T: int = 1000, original_steps: int = 50, strength: float = 1.0
) -> np.ndarray:
    """The timesteps LCM and TCD visit: ``steps`` of the ``original_steps`` the teacher was
    distilled on; (steps,) int64.
    """
    positive("steps", steps)
    if positive("original_steps", original_steps) > positive("T", T):
        raise ValueError(f"original_steps: expected at most T = {T}, got {original_steps}")
    number("strength", strength, 0.0, 1.0)
    origin = np.arange(1, int(original_steps * strength) + 1) * (T // original_steps) - 1
    if not 1 <= steps <= len(origin):
        raise ValueError(
            f"steps: expected 1..{len(origin)} (original_steps {original_steps} x strength "
            f"{strength}), got {steps}"
        )
    return origin[::-1][
        np.floor(np.linspace(0, len(origin), steps, endpoint=False)).astype(np.int64)
    ]


@dataclass(frozen=True, eq=False)
class SigmaGrid:
    """timesteps (N,) given to the model, sigmas (N+1,); ``kind`` "vp", "flow" or "edm"; see the
    module's head. ``table``: the ascending training sigmas (T,), for solvers that need a timestep
    between two visited ones."""

    timesteps: np.ndarray
    sigmas: np.ndarray
    kind: str = "vp"
    table: np.ndarray | None = None
    init_noise_sigma: float = 1.0

    def __post_init__(self):
        choice("kind", self.kind, ALPHA_SIGMA)
        for name in ("timesteps", "sigmas"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        t, s = self.timesteps, self.sigmas
        if t.ndim != 1 or s.shape != (len(t) + 1,):
            raise ValueError(
                f"sigmas: expected shape ({t.size + 1},), one more than timesteps, got {s.shape}"
            )
        if not (np.isfinite(s).all() and (s >= 0).all()):
            raise ValueError(f"sigmas: expected finite values >= 0, got {s}")
        if not np.isfinite(t).all():
            raise ValueError(f"timesteps: expected finite values, got {t}; keep sigmas above 0")

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def alpha_sigma(self) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, sigma), each (N+1,), of x = alpha x0 + sigma eps."""
        return ALPHA_SIGMA[self.kind](self.sigmas)


#: kind -> (alpha, sigma_t) of a sigma
ALPHA_SIGMA = {
    "vp": lambda s: (1 / np.sqrt(s**2 + 1), s / np.sqrt(s**2 + 1)),
    "flow": lambda s: (1 - s, s),
    "edm": lambda s: (np.ones_like(s), s),
}


def sigma_grid(
    steps: ArrayLike,
    schedule: NoiseSchedule | None = None,
    *,
    spacing: str = "linspace",
    offset: int = 0,
    drop_last: bool = False,
    kind: str | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    range_of: str = "visited",
    interpolation: str = "linear",
    final: str | float = "zero",
    round_t: bool = False,
    lambda_min: float = -math.inf,
) -> SigmaGrid:
    """Grid over a discrete training schedule, for the solvers in sigma.

    steps: N, or the descending timesteps themselves (floats allowed).
    spacing: "linspace", "leading", "trailing". drop_last: place N+1 integer points and drop the
        cleanest (DPM-Solver).
    kind: None (sigmas at the spaced timesteps) or "karras", "exponential", "beta" or "lu"; then
        the timesteps follow the sigmas.
    sigma_min, sigma_max: ends of the kind's range; by default those of the timesteps visited
        (range_of="visited") or of the whole training table ("table").
    interpolation: "linear" or "log_linear" (N+1 sigmas uniform in log over the table).
    final: last sigma: "zero", "sigma_min" (the table's smallest), "repeat" (the last one again) or
        a number.
    round_t: round the timesteps that follow from sigmas. lambda_min: forbid timesteps with lambda
        below it (cosine schedules).
    """
    schedule = _schedule(schedule)
    T, table = len(schedule), schedule.sigmas
    if np.ndim(steps) == 0:
        N = positive("steps", steps)
        if drop_last:
            # lambda = -log(sigma) ascends from the noisy end; lambda_min cuts that end
            last = T - int(np.searchsorted(-np.log(table)[::-1], lambda_min))
            t = choice("spacing", spacing, SPACINGS_DROP_LAST)(T, N, offset, last)
        else:
            t = choice("spacing", spacing, SPACINGS)(T, N, offset)
    else:
        t, N = np.asarray(steps, np.float64), len(steps)
        inside = t.ndim == 1 and N > 0 and ((t >= 0) & (t <= T - 1)).all()
        if not inside or (np.diff(t) > 0).any():
            raise ValueError(
                f"steps: expected descending timesteps in [0, {T - 1}], got {list(np.ravel(t))[:8]}"
            )
    if interpolation == "log_linear":
        sigmas = np.exp(np.linspace(np.log(table[-1]), np.log(table[0]), N + 1))
    else:
        choice("interpolation", interpolation, {"linear": 0, "log_linear": 0})
        sigmas = np.interp(t, np.arange(T), table)
    if kind is not None:
        ends = {"visited": (sigmas[0], sigmas[-1]), "table": (table[-1], table[0])}
        hi, lo = choice("range_of", range_of, ends)
        hi, lo = (
            hi if sigma_max is None else finite("sigma_max", sigma_max, above=True),
            lo if sigma_min is None else finite("sigma_min", sigma_min, above=True),
        )
        sigmas = choice("kind", kind, SIGMA_KINDS)(hi, lo, N)
        sigmas[0] = hi  # to the last bit: the table may have other timesteps just below it
        t = sigma_to_t(sigmas, table)
        t = np.round(t) if round_t else t
    sigmas = sigmas[:N]  # the last one of log_linear is where its last step goes
    return SigmaGrid(
        t,
        np.append(sigmas, _final(final, sigmas, table[0])),
        table=_frozen(table),
        init_noise_sigma=init_noise(sigmas.max(), spacing),
    )


def _final(final, sigmas, sigma_min):
    ends = {"zero": 0.0, "sigma_min": sigma_min, "repeat": sigmas[-1], "one": 1.0}
    return choice("final", final, ends) if isinstance(final, str) else float(final)


def init_noise(sigma_max, spacing) -> float:
    """Standard deviation of the first x. "leading" starts below the sigma_max of training, where x
    still has unit-variance data in it.
    """
    return float(np.sqrt(sigma_max**2 + 1) if spacing == "leading" else sigma_max)


def time_shift(
    t: ArrayLike, shift: float | None = None, mu: float | None = None, form: str = "exponential"
) -> np.ndarray:
    """Move flow times t towards noise. shift: s t / (1 + (s-1) t) (Esser et al. 2024, eq. 23).
    mu: resolution-dependent: e^mu / (e^mu + 1/t - 1) ("exponential") or mu / (mu + 1/t - 1)
        ("linear")."""
    t = np.asarray(t, np.float64)
    if mu is not None:
        # e^710 is beyond float64
        forms = {"exponential": math.exp(number("mu", mu, -700.0, 700.0)), "linear": mu}
        shift = choice("form", form, forms)
    if shift is not None:
        finite("shift" if mu is None else "mu", shift, above=True)
    return t if shift is None else shift * t / (1 + (shift - 1) * t)


def dynamic_shift_mu(
    seq_len: int,
    base_len: int = 256,
    max_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """mu for `time_shift`, linear in the number of image tokens (Flux)."""
    return base_shift + (seq_len - base_len) * (max_shift - base_shift) / (max_len - base_len)


def stretch_to_terminal(t: np.ndarray, terminal: float) -> np.ndarray:
    """Stretch flow times so that the last one becomes ``terminal`` (LTX-Video)."""
    return 1 - (1 - t) * ((1 - terminal) / (1 - t[-1]))


def flow_grid(
    steps: ArrayLike,
    *,
    shift: float = 1.0,
    mu: float | None = None,
    form: str = "exponential",
    terminal: float | None = None,
    kind: str | None = None,
    invert: bool = False,
    T: int = 1000,
    timesteps: ArrayLike | None = None,
    t_range: tuple[float, float] | None = None,
) -> SigmaGrid:
    """Flow-matching grid: sigma from ~1 to 0, timesteps = T sigma.

    steps: N, or the N sigmas before shifting. timesteps: given to the model instead of T sigma.
    shift / mu, form: see `time_shift` (mu replaces shift). terminal: see `stretch_to_terminal`.
    kind: re-space the shifted range as "karras", "exponential" or "beta". invert: run from data to
        noise.
    t_range: first and last sigma before shifting when steps is a number; by default 1 and 1/T, each
        shifted once already as diffusers does (so that a static shift acts twice on the low end),
        or unshifted with mu.
    """
    positive("T", T)
    finite("shift", shift, above=True)
    if np.ndim(steps) == 0:
        hi, lo = t_range or time_shift(np.array([1.0, 1 / T]), None if mu is not None else shift)
        # linspace on T sigma, as the peers do: the values agree to the last bit
        s = np.linspace(hi * T, lo * T, positive("steps", steps)) / T
    else:
        s = np.array(steps, np.float64)
        if s.ndim != 1 or s.size == 0 or not ((s >= 0) & (s <= 1)).all():
            raise ValueError(
                f"steps: expected flow times in [0, 1], got {list(np.ravel(s))[:8]}; divide "
                f"timesteps by {T}"
            )
    s = time_shift(s, shift, mu, form)
    if terminal:
        s = stretch_to_terminal(s, number("terminal", terminal, 0.0, float(s.max())))
    if kind is not None:
        s = choice("kind", kind, SIGMA_KINDS)(s[0], s[-1], len(s))
    if invert:
        s = 1 - s
        timesteps = None
    t = s * T if timesteps is None else np.asarray(timesteps, np.float64)
    return SigmaGrid(t, np.append(s, 1.0 if invert else 0.0), "flow")


def flow_sigma_grid(
    steps: int,
    *,
    shift: float = 1.0,
    final: str = "zero",
    T: int = 1000,
    sigma_min: float = 0.0,
    truncate: bool = True,
) -> SigmaGrid:
    """Flow sigmas as DPM-Solver, DEIS and SA-Solver use them: N of N+1 points of 1 - linspace(1,
    1/T), shifted.
    final: "zero", "repeat" or "sigma_min" (then the number ``sigma_min``)."""
    finite("shift", shift, above=True)
    positive("T", T)
    s = 1.0 - np.linspace(1, 1 / T, positive("steps", steps) + 1)
    s = (shift * s / (1 + (shift - 1) * s))[::-1][:-1]
    t = np.floor(s * T) if truncate else s * T
    return SigmaGrid(t, np.append(s, _final(final, s, sigma_min)), "flow")


C_NOISE = {"log": lambda s: 0.25 * np.log(s), "atan": lambda s: np.arctan(s) * (2 / np.pi)}


def edm_grid(
    steps: ArrayLike,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    kind: str = "karras",
    final: str | float = "zero",
    c_noise: str = "log",
) -> SigmaGrid:
    """Karras et al. 2022, eq. 5: N sigmas from sigma_max to sigma_min.
    steps: N, or rising ramp values in [0, 1]. final: "zero", "sigma_min" or a number. c_noise, the
    timesteps: "log", log(sigma) / 4, or "atan", 2 atan(sigma) / pi (Stable Audio)."""
    N = positive("steps", steps if np.ndim(steps) == 0 else len(steps))
    sigma_range(sigma_min, sigma_max, rho)
    ramp = np.linspace(0, 1, N) if np.ndim(steps) == 0 else np.asarray(steps, np.float64)
    if ramp.ndim != 1 or not ((ramp >= 0) & (ramp <= 1)).all() or (np.diff(ramp) < 0).any():
        raise ValueError(
            f"steps: expected a number of steps or rising values in [0, 1], got "
            f"{list(np.ravel(ramp))[:8]}"
        )
    if kind == "karras":
        hi, lo = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
        s = (hi + ramp * (lo - hi)) ** rho
    else:
        s = choice("kind", kind, SIGMA_KINDS)(sigma_max, sigma_min, N)
    with np.errstate(divide="ignore"):  # log 0, which the grid refuses
        t = choice("c_noise", c_noise, C_NOISE)(s)
    return SigmaGrid(
        t,
        np.append(s, _final(final, s, sigma_min)),
        "edm",
        init_noise_sigma=float(np.sqrt(sigma_max**2 + 1)),
    )
