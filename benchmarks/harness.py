"""One definition of a benchmark case, for `genfast bench` and for pytest-benchmark.

A family file `bench_<family>.py` exposes `CASES`, a list of `Case`. `Case.setup(device)` builds the
inputs once and returns a `Work`: our call, the rivals' calls, and a proof. Example:

    def setup(device):
        x = genfast.randn(1000, seed=1, device=device)

        def proof():                       # raises AssertionError; runs before anything is timed
            assert_bitwise("silu", genfast.silu(x), reference.silu(x))

        return Work(
            ours=lambda: genfast.silu(x),
            rivals={"eager": lambda: F.silu(x)},
            late={"compile": lambda: torch.compile(F.silu, dynamic=False) and ...},  # -> callable
            proof=proof,
        )

    CASES = [Case("diffusion", "silu", (1000,), setup, bytes=8 * 1000, targets={"eager": 3.0})]

What is measured: after the proof, every candidate is warmed up, its inner loop is sized so that one
reading takes about a millisecond, then ours and the rivals are read in turn (the order rotates), so
that a slow moment of the machine hits all of them. Reported: median and quartiles over the
readings, GB/s and GFLOP/s from the case's `bytes` and `flops`, the share of a limit measured in
the same run (copying or reading a large buffer; multiply-adds), and rival time / our time.
Caches are as the interleaving leaves them; a case larger than the last-level cache is cold.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import quantiles

import torch
from torch import Tensor

from genfast._memory import keep_freed_memory
from genfast._native import _C

# Order of the table; a family appears when its file does.
FAMILIES = (
    "rng", "sampling", "diffusion", "schedulers", "attention", "filtering", "normalization",
    "linear", "convolution", "models", "transformers", "gan", "hybrid",
)  # fmt: skip

# Timed as `genfast train` and `generate` run them: freed memory kept, for us and for the rivals.
WHOLE_MODELS = ("models", "transformers", "gan", "hybrid")

Call = Callable[[], object]


@dataclass
class Work:
    """What `Case.setup` returns. late: rivals that are slow to make or need a peer (torch.compile,
    diffusers): functions that return the call; left out by --quick, and reported as skipped, with
    the reason, when making or first running one raises.
    """

    ours: Call
    rivals: dict[str, Call]
    proof: Callable[[], None]
    late: dict[str, Callable[[], Call]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """bytes: read and written once by an ideal kernel. flops: of the ideal algorithm.
    reads: the bytes are read, hardly any written: the limit is reading, not copying.
    targets: rival -> least rival time / our time; 1.0 for a rival not named.
    device: the only kind it is for ("cuda"); "" for any.
    """

    family: str
    name: str
    shape: tuple[int, ...]
    setup: Callable[[torch.device], Work]
    dtype: torch.dtype = torch.float32
    bytes: int = 0
    flops: int = 0
    reads: bool = False
    targets: dict[str, float] = field(default_factory=dict)
    note: str = ""
    device: str = ""

    @property
    def id(self) -> str:
        return f"{self.family}/{self.name}/{'x'.join(map(str, self.shape))}/{short(self.dtype)}"


@dataclass(frozen=True)
class Settings:
    """budget_s: measuring time of one case. device: "cpu" or "cuda"."""

    threads: int = 2
    quick: bool = False
    device: str = "cpu"

    @property
    def budget_s(self) -> float:
        return 0.25 if self.quick else 1.5


class ProofFailed(AssertionError):
    """A kernel's answer is wrong: nothing is timed and no table is shown."""


class UnknownFamily(ValueError):
    pass


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- cases --------------------------------------------------------------------------------------


def available_families() -> list[str]:
    package = __name__.rpartition(".")[0]
    return [f for f in FAMILIES if importlib.util.find_spec(f"{package}.bench_{f}")]


def load_cases(families: Sequence[str] = (), device: str = "cpu") -> list[Case]:
    """The cases of the named families, or of all (UnknownFamily otherwise), for this device."""
    known = available_families()
    for family in families:
        if family not in known:
            raise UnknownFamily(f"family: expected one of {', '.join(known)}, got {family!r}")
    package = __name__.rpartition(".")[0]
    return [
        case
        for family in known
        if not families or family in families
        for case in importlib.import_module(f"{package}.bench_{family}").CASES
        if case.device in ("", device)
    ]


# ---- proofs -------------------------------------------------------------------------------------


def assert_bitwise(name: str, got: Tensor, want: Tensor) -> None:
    if got.dtype != want.dtype or got.shape != want.shape:
        raise AssertionError(
            f"{name}: expected {short(want.dtype)} {tuple(want.shape)}, "
            f"got {short(got.dtype)} {tuple(got.shape)}"
        )
    wrong = int((got.cpu() != want.cpu()).sum())
    if wrong:
        raise AssertionError(f"{name}: {wrong} of {got.numel()} values differ from the reference")


def assert_judged(
    name: str, got: Tensor, yardstick: Tensor, truth: Tensor, factor: float = 2.0,
    summed: float = 0.0,
) -> None:  # fmt: skip
    """Largest error of `got` <= factor x that of plain PyTorch in the same dtype, + 2 rounding
    steps of the largest value, or of `summed` where that is larger: the size of terms that cancel.
    truth: the reference in float64.
    """
    if got.shape != truth.shape:
        raise AssertionError(f"{name}: expected shape {tuple(truth.shape)}, got {tuple(got.shape)}")
    truth = truth.double()
    error = (got.double() - truth).abs().max().item()
    allowed = (yardstick.double() - truth).abs().max().item() * factor
    allowed += 2 * torch.finfo(got.dtype).eps * max(truth.abs().max().item(), summed)
    if not error <= allowed:  # also catches NaN
        raise AssertionError(f"{name}: error {error:.3g} against float64, allowed {allowed:.3g}")


def prove(case: Case, work: Work) -> None:
    try:
        work.proof()
    except AssertionError as error:
        raise ProofFailed(f"{case.id}: {error}") from error


# ---- timing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median, quartiles and least of `repeats` readings of `inner` calls each."""

    median: float
    q1: float
    q3: float
    least: float
    repeats: int
    inner: int

    @property
    def spread(self) -> float:
        """The quartile range over the median."""
        return (self.q3 - self.q1) / self.median


def _reading(call: Call, inner: int, sync: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(inner):
        call()
    sync()
    return (time.perf_counter() - start) / inner


def _no_sync() -> None:
    pass


def measure(calls: dict[str, Call], budget_s: float, device: str = "cpu") -> dict[str, Timing]:
    """Interleaved readings of all calls for about budget_s seconds (at least 5 readings each)."""
    sync = torch.cuda.synchronize if device == "cuda" else _no_sync
    inner = {}
    for name, call in calls.items():
        once = min(_reading(call, 1, sync) for _ in range(3))  # warm-up
        inner[name] = max(1, round(1e-3 / max(once, 1e-7)))
        once = _reading(call, inner[name], sync)
        inner[name] = max(1, round(1e-3 / max(once, 1e-7)))
    names = list(calls)
    readings: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start, turn = time.perf_counter(), 0
        while turn < 5 or (turn < 200 and time.perf_counter() - start < budget_s):
            for i in range(len(names)):
                name = names[(i + turn) % len(names)]
                readings[name].append(_reading(calls[name], inner[name], sync))
            turn += 1
    finally:
        if collecting:
            gc.enable()
    found = {}
    for name in names:
        q1, median, q3 = quantiles(readings[name], n=4, method="inclusive")
        found[name] = Timing(median, q1, q3, min(readings[name]), len(readings[name]), inner[name])
    return found


def measure_limits(settings: Settings) -> dict[str, float]:
    """copy_gbps: read + written by copying 256 MiB. On the CPU read_gbps: reading them once, and
    fma_gflops: chains of fused multiply-adds at the instruction set of the kernels. On a GPU
    matmul_gflops, and for cases in 16 bit matmul16_gflops: fp32 and bf16, 8192 cubed, of normals
    (of ones or zeros a GPU draws less power and is up to 13 % faster).
    """
    device = torch.device(settings.device)
    a = torch.ones(64 * 2**20, device=device)
    b = torch.empty_like(a)
    calls: dict[str, Call] = {"copy": lambda: b.copy_(a)}
    if settings.device == "cpu":
        rounds = 10**6
        flops = _C.limit(None, rounds)
        calls |= {"read": lambda: _C.limit(a, 0), "fma": lambda: _C.limit(None, rounds)}
    else:
        n = 8192
        x = torch.randn(n, n, device=device)
        out, flops = torch.empty_like(x), 2 * n**3
        x16, out16 = x.bfloat16(), out.bfloat16()
        calls["matmul"] = lambda: torch.mm(x, x, out=out)
        calls["matmul16"] = lambda: torch.mm(x16, x16, out=out16)
    found = measure(calls, 2 * settings.budget_s, settings.device)
    work = {
        "copy_gbps": 2 * a.nbytes, "read_gbps": a.nbytes, "fma_gflops": flops,
        "matmul_gflops": flops, "matmul16_gflops": flops,
    }  # fmt: skip
    per_second = {name: work[name] / 1e9 for name in work if name.partition("_")[0] in found}
    return {name: x / found[name.partition("_")[0]].median for name, x in per_second.items()}


# ---- one case -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    case: Case
    ours: Timing
    rivals: dict[str, Timing]
    skipped: dict[str, str]
    limits: dict[str, float]

    @property
    def ratios(self) -> dict[str, float]:
        return {name: t.median / self.ours.median for name, t in self.rivals.items()}

    @property
    def gbps(self) -> float:
        return self.case.bytes / self.ours.median / 1e9

    @property
    def gflops(self) -> float:
        return self.case.flops / self.ours.median / 1e9

    @property
    def share(self) -> tuple[float, str]:
        """The nearer limit and how much of it was reached."""
        memory = "read" if self.case.reads and "read_gbps" in self.limits else "copy"
        matmul = "matmul16" if self.case.dtype.itemsize == 2 else "matmul"
        compute = "fma" if "fma_gflops" in self.limits else matmul
        return max(
            (self.gbps / self.limits[f"{memory}_gbps"], memory),
            (self.gflops / self.limits[f"{compute}_gflops"], compute),
        )

    @property
    def missed(self) -> dict[str, float]:
        """Rivals whose target was not reached: name -> target."""
        wanted = {name: self.case.targets.get(name, 1.0) for name in self.rivals}
        return {name: t for name, t in wanted.items() if self.ratios[name] < t}

    def as_dict(self) -> dict:
        share, limit = self.share
        return {
            "id": self.case.id,
            "family": self.case.family,
            "name": self.case.name,
            "shape": list(self.case.shape),
            "dtype": short(self.case.dtype),
            "bytes": self.case.bytes,
            "flops": self.case.flops,
            "seconds": vars(self.ours),
            "gbps": self.gbps,
            "gflops": self.gflops,
            "share": share,
            "limit": limit,
            "rivals": {
                name: {
                    "seconds": vars(t),
                    "ratio": self.ratios[name],
                    "target": self.case.targets.get(name, 1.0),
                }
                for name, t in self.rivals.items()
            },
            "skipped": self.skipped,
        }


def run_case(case: Case, settings: Settings, limits: dict[str, float]) -> Row:
    """Setup, proof (ProofFailed), timing."""
    work = case.setup(torch.device(settings.device))
    prove(case, work)
    rivals, skipped = dict(work.rivals), {}
    for name, make in work.late.items():
        if settings.quick:
            skipped[name] = "--quick"
            continue
        try:
            rivals[name] = make()
            rivals[name]()
        except Exception as error:  # a peer that is absent or fails is no failure of ours
            rivals.pop(name, None)
            skipped[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    found = measure({"ours": work.ours, **rivals}, settings.budget_s, settings.device)
    return Row(case, found.pop("ours"), found, skipped, limits)


def run(cases: Sequence[Case], settings: Settings) -> Iterator[Row | None]:
    """First None (the limits are measured), then a row per case; restores torch's thread count."""
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        limits = measure_limits(settings)
        yield None
        for case in cases:
            if case.family in WHOLE_MODELS:
                keep_freed_memory()
            if not settings.quick:
                torch.compiler.reset()  # no rival falls back for the recompiles of earlier cases
            yield run_case(case, settings, limits)
    finally:
        torch.set_num_threads(before)
