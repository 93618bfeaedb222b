"""SolverPlan: a diffusion solver as an immutable table of coefficients, one row per model
evaluation.

Every row is the same affine step (m is the guidance-combined model output, z ~ N(0, 1)):

    x0    = clamp(d_x x + d_m m, -clip, clip)
    out_i = c_i . [x, m, x0, H_1 .. H_6, z]            i = 0, 1, 2

out_0 is the next sample; out_1 and out_2 go to the history slots named in ``index`` and one of the
three may be the denoised estimate. H_1..H_6 are fixed places: nothing is ever shifted, instead the
plan maker decides which place holds what and permutes the coefficients. A slot may be read and
overwritten in one row, so a kernel must load an element's sources before it stores that element's
outputs.

Float table, float64 (rows, 36):

    0 d_x   1 d_m   2 clip (inf: none)   3 input_scale   4 logvar_min   5 logvar_max
    6..15 c_0   16..25 c_1   26..35 c_2

Index table, int32 (rows, 8):

    0 slot of out_1 (0: none)   1 slot of out_2 (0: none)
    2 which output is the denoised estimate (-1: none)
    3 noise: 0 none, 1 used, 2 drawn by the peer although its coefficient is 0
    4 variance: see VARIANCE   5 step   6 stage within the step
    7 bit k set: source k is used by some output

The model is called with (input_scale x, timestep). With a learned variance the model output has
twice the channels of x; its second half v gives a per-element factor of the z column:
exp(0.5 (f logvar_max + (1-f) logvar_min)), f = (v+1)/2 ("learned_range"), or sqrt(v) ("learned").
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch

from . import _check

SLOTS = 6
SOURCES = ("x", "m", "x0", *(f"H{k}" for k in range(1, SLOTS + 1)), "z")
OUTPUTS = 3
D_X, D_M, CLIP, INPUT_SCALE, LOGVAR_MIN, LOGVAR_MAX = range(6)
COEF = 6  # first column of c_0
COLUMNS = COEF + OUTPUTS * len(SOURCES)
WRITE_1, WRITE_2, DENOISED, NOISE, VARIANCE_MODE, STEP, STAGE, READS = range(8)
INDICES = 8
NOISE_NONE, NOISE_USED, NOISE_DRAWN = range(3)
VARIANCE = {"fixed": 0, "learned_range": 1, "learned": 2}


class Lin:
    """A linear form over named tensors: {"x": 0.9, "m": -0.1}. Lets a row-maker be written like the
    paper's equation.
    """

    __slots__ = ("terms",)
    __array_ufunc__ = None  # numpy scalars on the left defer to __rmul__

    def __init__(self, terms):
        self.terms = {k: float(v) for k, v in terms.items() if v != 0.0}

    def __add__(self, other):
        if isinstance(other, Lin):
            keys = {**self.terms, **other.terms}
            return Lin({k: self.terms.get(k, 0.0) + other.terms.get(k, 0.0) for k in keys})
        return self if other == 0 else NotImplemented

    __radd__ = __add__

    def __mul__(self, c):
        return Lin({k: v * float(c) for k, v in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, c):
        with np.errstate(
            divide="ignore"
        ):  # an infinite coefficient is reported by the plan, with its row
            return Lin({k: np.float64(v) / float(c) for k, v in self.terms.items()})

    def __neg__(self):
        return self * -1.0

    def __sub__(self, other):
        return self + -other

    def __eq__(self, other):
        return isinstance(other, Lin) and self.terms == other.terms

    __hash__ = None

    def __repr__(self):
        return " ".join(f"{v:+.6g} {k}" for k, v in self.terms.items()) or "0"


def sym(name: str) -> Lin:
    """The tensor called ``name`` as a linear form."""
    return Lin({name: 1.0})


X, M, X0, Z = sym("x"), sym("m"), sym("x0"), sym("z")


class Step(NamedTuple):
    """One row in plain values. outputs: to compute, with and without the denoised estimate, which
    is output `denoised` (-1: none). writes: (output, slot) pairs. reads: per slot, () if none.
    """

    outputs: int
    outputs_denoised: int
    denoised: int
    writes: tuple
    reads: tuple
    variance: int
    needs_noise: bool
    input_scale: float
    timestep: int | float
    table: torch.Tensor  # plan.table_on("cpu")


@dataclass(frozen=True, eq=False)
class SolverPlan:
    """See the module's head. Immutable; hash and equality by content; safe to share between threads
    and requests.

    table: (R, 36) float64. index: (R, 8) int32. timesteps: (R,) float64, what the model is given.
    sigmas: (R,) float64, the noise level of each row in the solver's own convention.
    init_noise_sigma: the sampler starts from x = init_noise_sigma * N(0, 1).
    slots: history tensors needed, 0..6.
    names: what each slot holds after each row, for inspection ("" when free).
    integer_timesteps: the model expects ints.
    threshold: (ratio, max) for dynamic thresholding of x0, or None.
    """

    name: str
    table: np.ndarray
    index: np.ndarray
    timesteps: np.ndarray
    sigmas: np.ndarray
    init_noise_sigma: float = 1.0
    slots: int = 0
    names: tuple = ()
    integer_timesteps: bool = True
    threshold: tuple[float, float] | None = None
    _digest: bytes = field(init=False, repr=False, default=b"")
    _tables: dict = field(init=False, repr=False, default_factory=dict)
    _steps: tuple = field(init=False, repr=False, default=())

    def __post_init__(self):
        arrays = dict(table=np.float64, index=np.int32, timesteps=np.float64, sigmas=np.float64)
        for name, dtype in arrays.items():
            a = np.array(getattr(self, name), dtype=dtype, order="C")
            a.flags.writeable = False
            object.__setattr__(self, name, a)
        object.__setattr__(self, "names", tuple(tuple(row) for row in self.names))
        if self.threshold is not None:
            object.__setattr__(self, "threshold", _check.threshold(self.threshold))
        self._validate()
        h = hashlib.sha256(repr(self._meta()).encode())
        for name in arrays:
            h.update(getattr(self, name).tobytes())
        object.__setattr__(self, "_digest", h.digest())

    def _meta(self):
        return (
            self.name,
            float(self.init_noise_sigma),
            int(self.slots),
            self.names,
            bool(self.integer_timesteps),
            self.threshold,
        )

    def _validate(self):
        R = len(self.table)
        for name, shape in dict(
            table=(R, COLUMNS), index=(R, INDICES), timesteps=(R,), sigmas=(R,)
        ).items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {getattr(self, name).shape}")
        if R == 0:
            raise ValueError("table: expected at least one row, got none")
        finite = np.isfinite(self.table)
        finite[:, CLIP] = self.table[:, CLIP] > 0  # also refuses NaN
        if not finite.all():
            row, col = np.argwhere(~finite)[0]
            raise ValueError(
                f"{self.name}: row {row} (timestep {self.timesteps[row]:g}) has coefficient "
                f"{self.table[row, col]} in column {col}; an epsilon or sample model cannot start "
                f"from (or end at) a noise level where it says nothing about x0, nor a step of "
                f"higher order begin at a flow's sigma 1 or lie between equal sigmas: use "
                f"v_prediction with zero terminal SNR, a flow grid that begins below 1 "
                f"(t_range=(0.999, 0.001)), another final sigma, or sigmas that differ"
            )
        if not 0 <= self.slots <= SLOTS:
            raise ValueError(f"slots: expected 0..{SLOTS}, got {self.slots}")
        for col, low, high in (
            (WRITE_1, 0, self.slots),
            (WRITE_2, 0, self.slots),
            (DENOISED, -1, OUTPUTS - 1),
            (NOISE, 0, 2),
            (VARIANCE_MODE, 0, 2),
        ):
            if not ((self.index[:, col] >= low) & (self.index[:, col] <= high)).all():
                raise ValueError(
                    f"index: expected column {col} in [{low}, {high}], got {self.index[:, col]}"
                )
        written, free = set(), 0
        for row in range(R):  # a slot is written before it is read, and never past `slots`
            reads = {s - 2 for s in self.sources(row) if 3 <= s <= 2 + SLOTS}
            if not reads <= written:
                raise ValueError(
                    f"index: row {row} reads slots {sorted(reads - written)} that no row wrote"
                )
            if self.index[row, READS] != sum(1 << s for s in self.sources(row)):
                raise ValueError(
                    f"index: row {row} has a wrong mask of sources {self.index[row, READS]}"
                )
            written |= set(self.index[row, [WRITE_1, WRITE_2]]) - {free}

    # ---- reading ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Rows, that is model evaluations."""
        return len(self.table)

    @property
    def num_steps(self) -> int:
        return int(self.index[-1, STEP] - self.index[0, STEP]) + 1

    def coefficients(self, row: int) -> np.ndarray:
        """c (3, 10) of one row, a view."""
        return self.table[row, COEF:].reshape(OUTPUTS, len(SOURCES))

    def sources(self, row: int) -> list[int]:
        """Indices into SOURCES with a nonzero coefficient."""
        return np.flatnonzero((self.coefficients(row) != 0).any(0)).tolist()

    def needs_noise(self, row: int) -> bool:
        return bool(self.index[row, NOISE] == NOISE_USED)

    def draws_noise(self, row: int) -> bool:
        """Whether the peer scheduler draws noise here, used or not."""
        return bool(self.index[row, NOISE] != NOISE_NONE)

    def timestep(self, row: int) -> int | float:
        t = float(self.timesteps[row])
        return int(t) if self.integer_timesteps else t

    def table_on(self, device="cpu", dtype=torch.float32) -> torch.Tensor:
        """The table for `genfast.diffusion_step`, (R, 36), made once per device and dtype.

        Where x0 is neither clamped nor thresholded its coefficients are folded into those of x and
        m in float64: fewer terms, and no cancellation in fp32 between d_x x and d_m m near t = T.
        """
        key = (str(device), dtype)
        found = self._tables.get(key)
        if found is None:
            table = self.table.copy()
            c = table[:, COEF:].reshape(len(self), OUTPUTS, len(SOURCES))
            if self.threshold is None:
                free = np.isinf(table[:, CLIP])
                c[free, :, 0] += c[free, :, 2] * table[free, D_X, None]
                c[free, :, 1] += c[free, :, 2] * table[free, D_M, None]
                c[free, :, 2] = 0.0
            with torch.inference_mode(False), torch.no_grad():
                found = torch.from_numpy(table).to(dtype).to(device)
            self._tables[key] = found
        return found

    @property
    def steps(self) -> tuple[Step, ...]:
        """What a loop must know of each row, as plain Python values."""
        if not self._steps:
            object.__setattr__(self, "_steps", tuple(self._step(r) for r in range(len(self))))
        return self._steps

    def _step(self, row: int) -> Step:
        index = self.index[row].tolist()
        writes = tuple((o, index[w] - 1) for o, w in ((1, WRITE_1), (2, WRITE_2)) if index[w])
        outputs = 1 + max((o for o, _ in writes), default=0)
        reads = tuple(k in self.sources(row) for k in range(3, 3 + self.slots))
        return Step(
            outputs=outputs,
            outputs_denoised=max(outputs, index[DENOISED] + 1),
            denoised=index[DENOISED],
            writes=writes,
            reads=reads if any(reads) else (),
            variance=index[VARIANCE_MODE],
            needs_noise=index[NOISE] == NOISE_USED,
            input_scale=float(self.table[row, INPUT_SCALE]),
            timestep=self.timestep(row),
            table=self.table_on("cpu"),
        )

    def noise_std(self, row: int) -> float:
        """Standard deviation of out_0 given everything but z (fixed variance)."""
        return abs(float(self.coefficients(row)[0, -1]))

    def describe(self, row: int) -> str:
        """One row as equations, with the slots' contents in words."""
        named = list(SOURCES)
        held = self.names[row - 1] if self.names and row else ()
        for k, name in enumerate(held, 1):
            named[2 + k] = name or named[2 + k]
        d = self.table[row]
        lines = [
            f"x0 = {d[D_X]:+.6g} x {d[D_M]:+.6g} m"
            + (f", |x0| <= {d[CLIP]:g}" if np.isfinite(d[CLIP]) else "")
        ]
        targets = ("x", *(f"H{s}" if s else "" for s in self.index[row, [WRITE_1, WRITE_2]]))
        for i, (c, to) in enumerate(zip(self.coefficients(row), targets, strict=True)):
            tag = " (denoised)" if self.index[row, DENOISED] == i else ""
            if to or tag:
                lines.append(f"{to or 'out'}{tag} <- {Lin(dict(zip(named, c, strict=True)))}")
        return "; ".join(lines)

    # ---- identity and storage -------------------------------------------------------------------

    def __eq__(self, other):
        return isinstance(other, SolverPlan) and self._digest == other._digest

    def __hash__(self):
        return hash(self._digest)

    def to_dict(self) -> dict:
        """Plain lists and numbers (json.dumps keeps every bit; an absent clip is Infinity)."""
        keys = ("name", "init_noise_sigma", "slots", "names", "integer_timesteps", "threshold")
        arrays = ("table", "index", "timesteps", "sigmas")
        return {
            **{k: getattr(self, k) for k in keys},
            **{k: getattr(self, k).tolist() for k in arrays},
        }

    @classmethod
    def from_dict(cls, d: dict) -> SolverPlan:
        """Inverse of `to_dict`. Raises ValueError on a table that is not a valid plan."""
        needed = [f.name for f in fields(cls) if f.init]
        if set(d) != set(needed):
            raise ValueError(f"d: expected the keys {needed} of to_dict(), got {list(d)}")
        return cls(**d)

    def __reduce__(self):
        return (SolverPlan.from_dict, (self.to_dict(),))


_local = threading.local()


@contextlib.contextmanager
def symbolic() -> Iterator[None]:
    """Inside, plan makers return their `PlanBuilder`: every row as linear forms over named history
    entries, before slots are assigned and before infinite coefficients are refused. For callers
    that keep the history elsewhere (the attributes of a diffusers scheduler).
    """
    before = is_symbolic()
    _local.symbolic = True
    try:
        yield
    finally:
        _local.symbolic = before


def is_symbolic() -> bool:
    return getattr(_local, "symbolic", False)


class PlanBuilder:
    """Collects rows written with `Lin` and assigns history slots.

    History entries are named by the row-maker ("D3", "x3"); a name is written once, and its slot is
    free again after the last row that reads it. An entry that nobody reads is not stored.
    """

    def __init__(
        self, name: str, *, clip: float | None = None, threshold: tuple[float, float] | None = None
    ):
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: expected a positive number or None, got {clip!r}")
        self.name = name
        self.threshold = None if threshold is None else _check.threshold(threshold)
        self.clip = np.inf if clip is None or self.threshold else float(clip)
        self.rows: list[dict] = []

    @property
    def opaque(self) -> bool:
        """x0 is clamped, so it cannot be expanded into x and m."""
        return np.isfinite(self.clip) or self.threshold is not None

    def x0(self, form: Lin) -> Lin:
        """The symbol to use for x0 = form: x0 itself when it is clamped, else its expansion (less
        rounding).
        """
        if self.opaque and set(form.terms) - {"x", "m"}:
            raise ValueError(
                "clip: cannot clamp an x0 that depends on more than the sample and the model output"
            )
        return X0 if self.opaque else form

    def row(
        self,
        t,
        sigma,
        x0: Lin,
        prev: Lin,
        *,
        save: dict[str, Lin] | None = None,
        denoised: Lin | None = None,
        input_scale=1.0,
        draws: bool = False,
        step: int = 0,
        stage: int = 0,
        variance="fixed",
        logvar=(0.0, 0.0),
    ):
        """Add a row: x <- prev, history <- save, and ``denoised`` on demand where an output is free
        for it. ``x0`` is the unclamped form in x and m.
        draws: the peer draws noise here even if the coefficient is 0."""
        if clash := set(save or {}) & set(SOURCES):
            raise ValueError(f"save: {sorted(clash)} are names of sources")
        self.rows.append(
            dict(
                t=t,
                sigma=sigma,
                x0=x0,
                prev=prev,
                save=save,
                denoised=denoised,
                draws=draws,
                step=step,
                input_scale=input_scale,
                stage=stage,
                variance=variance,
                logvar=logvar,
            )
        )

    def build(self, *, init_noise_sigma=1.0, integer_timesteps=True) -> SolverPlan:
        if is_symbolic():
            return self
        R = len(self.rows)
        last_read: dict[str, int] = {}
        for r, row in enumerate(self.rows):
            for form in (row["prev"], *(row["save"] or {}).values(), row["denoised"] or Lin({})):
                last_read.update((name, r) for name in form.terms)
        table, index = np.zeros((R, COLUMNS)), np.zeros((R, INDICES), np.int32)
        held: dict[str, int] = {}  # entry -> slot
        names = []
        for r, row in enumerate(self.rows):
            column = {s: i for i, s in enumerate(SOURCES)} | {n: 2 + s for n, s in held.items()}
            saves = {n: f for n, f in (row["save"] or {}).items() if last_read.get(n, -1) > r}
            denoised = row["denoised"]
            outs = [row["prev"], *saves.values()]
            place = outs.index(denoised) if denoised in outs else -1
            if (
                denoised is not None and place < 0 and len(outs) < OUTPUTS
            ):  # an output of its own: always the last one
                outs += [Lin({})] * (OUTPUTS - 1 - len(outs)) + [denoised]
                place = OUTPUTS - 1
            if len(outs) > OUTPUTS:
                raise ValueError(
                    f"{self.name}: row {r} has {len(outs)} outputs, at most {OUTPUTS} fit"
                )
            held = {n: s for n, s in held.items() if last_read[n] > r}
            for col, n in zip((WRITE_1, WRITE_2), saves, strict=False):
                held[n] = next(s for s in range(1, SLOTS + 2) if s not in held.values())
                index[r, col] = held[n]
                if held[n] > SLOTS:
                    raise ValueError(
                        f"order: expected a history of at most {SLOTS} tensors, got more at row "
                        f"{r} of {self.name}; lower it"
                    )
            c = np.zeros((OUTPUTS, len(SOURCES)))
            for i, form in enumerate(outs):
                for n, v in form.terms.items():
                    c[i, column[n]] += v
            form = row["x0"].terms
            table[r, :COEF] = (
                form.get("x", 0.0),
                form.get("m", 0.0),
                self.clip,
                row["input_scale"],
                *row["logvar"],
            )
            table[r, COEF:] = c.ravel()
            used = (c != 0).any(0)
            noise = NOISE_USED if used[-1] else NOISE_DRAWN if row["draws"] else NOISE_NONE
            index[r, DENOISED:] = (
                place,
                noise,
                VARIANCE[row["variance"]],
                row["step"],
                row["stage"],
                sum(1 << int(s) for s in np.flatnonzero(used)),
            )
            slot_names = [""] * max(held.values(), default=0)
            for n, s in held.items():
                slot_names[s - 1] = n
            names.append(slot_names)
        return SolverPlan(
            self.name,
            table,
            index,
            [row["t"] for row in self.rows],
            [row["sigma"] for row in self.rows],
            float(init_noise_sigma),
            max((len(n) for n in names), default=0),
            names,
            integer_timesteps,
            self.threshold,
        )


def stack_rows(plans: Iterable[SolverPlan], rows: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """(table (B, 36), index (B, 8)) of one row per sample: requests at different steps, or even of
    different solvers, share one batch and one kernel call. Their history tensors need
    max(plan.slots) places. float64; `diffusion_step` takes torch.tensor(table, dtype=float32)."""
    pairs = list(zip(plans, rows, strict=True))
    return np.stack([p.table[r] for p, r in pairs]), np.stack([p.index[r] for p, r in pairs])
