"""What is built into this binary and which backends are usable here: what `genfast info` shows."""

from __future__ import annotations

import ctypes
import pkgutil
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

import genfast
import genfast.kernels
from genfast._archs import LEAST, best, covers
from genfast._extras import EXTRAS, installed
from genfast._native import _C
from genfast.ops import _choice
from genfast.ops._choice import ALL_SIZES, ANY


@dataclass(frozen=True)
class Usable:
    """One backend: usable here, and why (not)."""

    name: str
    usable: bool
    why: str


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cuda_driver() -> str | None:
    """The CUDA version that the installed driver supports, e.g. "13.0", or None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(number)):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _capabilities() -> list[tuple[int, int]]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


def _gpus() -> list[str]:
    return [
        f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})"
        for i, (major, minor) in enumerate(_capabilities())
    ]


def _no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without GPU support"
    if cuda_driver() is None:
        return "no NVIDIA driver (libcuda.so.1) on this machine"
    return "torch sees no GPU"


def _cpu(build: dict) -> Usable:
    return Usable("cpu", True, f"{build['isa']} kernels, threads by {build['threads']}")


def _cuda(build: dict) -> Usable:
    if not build["cuda"]:
        why = "this binary was built without CUDA; rebuild with nvcc and GENFAST_CUDA=ON"
        return Usable("cuda", False, why)
    gpus = _gpus()
    if not gpus:
        return Usable("cuda", False, _no_gpu())
    lacking = [c for c in _capabilities() if not covers(build["cuda_archs"], c)]
    if lacking and lacking[0] < LEAST:
        major, minor = lacking[0]
        return Usable("cuda", False, f"no kernels for sm_{major}{minor}: they want sm_80 or newer")
    if lacking:
        names = ", ".join(f"sm_{major}{minor}" for major, minor in lacking)
        why = (
            f"built for {build['cuda_archs']}, without code for {names}; rebuild with "
            f"GENFAST_CUDA_ARCHS={best(lacking[0])}"
        )
        return Usable("cuda", False, why)
    return Usable("cuda", True, f"architectures {build['cuda_archs']}; {', '.join(gpus)}")


def _triton(build: dict) -> Usable:
    if not list(pkgutil.iter_modules(genfast.kernels.__path__)):
        return Usable("triton", False, "this version of genfast has no Triton kernels")
    if not installed("triton"):
        return Usable("triton", False, 'not installed: pip install "genfast[triton]"')
    if not _gpus():
        why = f"{_no_gpu()}; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter"
        return Usable("triton", False, why)
    return Usable("triton", True, f"triton {_version('triton')}")


def _torch(build: dict) -> Usable:
    return Usable("torch", True, "PyTorch's own attention, for dense calls without options of ours")


def _reference(build: dict) -> Usable:
    return Usable("reference", True, "plain PyTorch on any device")


BACKENDS = (_cpu, _cuda, _triton, _torch, _reference)


def collect() -> dict:
    """Everything `genfast info` shows, as JSON values."""
    build = _C.build_info()
    return {
        "genfast": genfast.__version__,
        "noise_version": genfast.NOISE_VERSION,
        "binary": _C.__file__,
        "compiler": build["compiler"],
        "isa": build["isa"],
        "isa_usable": build["isa_usable"],
        "thread_runtime": build["threads"],
        "threads": torch.get_num_threads(),
        "cuda": {
            "built": build["cuda"],
            "architectures": build["cuda_archs"].split(),
            "driver": cuda_driver(),
            "gpus": _gpus(),
        },
        "exchange_api": build["exchange_api"],
        "backend": genfast.get_backend(),
        "backends": [asdict(backend(build)) for backend in BACKENDS],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": _version("numpy"),
            "triton": _version("triton"),
        },
        "extras": {
            extra: {package: installed(package) for package in packages}
            for extra, packages in EXTRAS.items()
        },
        "platform": platform.platform(),
    }


def choices() -> list[dict[str, str]]:
    """The table of the automatic choice, first fitting row first."""
    rows = (row._asdict() for row in _choice.table(torch.cuda.is_available()))
    return [
        {**row, "below": ANY if row["below"] == ALL_SIZES else f"{row['below']:,}"} for row in rows
    ]


def lines(facts: dict) -> list[tuple[str, str]]:
    """The same facts as (label, text), in the order of the screen."""
    cuda = facts["cuda"]
    built = f"architectures {' '.join(cuda['architectures'])}" if cuda["built"] else "not built in"
    driver = f"driver for CUDA {cuda['driver']}" if cuda["driver"] else "no driver"
    exchange = "DLPack exchange API" if facts["exchange_api"] else "__dlpack__ (slower)"
    rows = [
        ("genfast", f"{facts['genfast']}, noise contract {facts['noise_version']}"),
        ("binary", f"{facts['binary']} ({facts['compiler']})"),
        ("cpu kernels", f"{facts['isa']} chosen of {', '.join(facts['isa_usable'])}"),
        ("threads", f"{facts['threads']}, runtime {facts['thread_runtime']}"),
        ("tensors by", exchange),
        ("cuda", "; ".join([built, driver, *(cuda["gpus"] or ["no GPU"])])),
        *((k, v or "not installed") for k, v in facts["versions"].items()),
        ("platform", facts["platform"]),
    ]
    for extra, packages in facts["extras"].items():
        missing = [p for p, there in packages.items() if not there]
        text = f'missing {", ".join(missing)}: pip install "genfast[{extra}]"'
        rows.append((f"extra {extra}", text if missing else "complete"))
    for b in facts["backends"]:
        state = "usable" if b["usable"] else "not usable"
        rows.append((f"backend {b['name']}", f"{state}: {b['why']}"))
    rows.append(("backend setting", facts["backend"]))
    return rows
