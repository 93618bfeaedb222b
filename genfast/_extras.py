"""Optional packages: imported where they are used, with one message when they are missing."""

from __future__ import annotations

import importlib.util


class MissingExtra(ImportError):
    """A package of an extra is not installed; the message holds the install line."""


# Extra -> its packages by import name.
EXTRAS = {
    "cli": (
        "rich",
        "matplotlib",
        "safetensors",
        "PIL",
        "accelerate",
        "yaml",
        "torchmetrics",
        "sacrebleu",
        "mlxtend",
        "sklearn",
        "skimage",
    ),  # fmt: skip
    "triton": ("triton",),
}


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def need(*packages: str, extra: str = "cli") -> None:
    missing = [p for p in packages if not installed(p)]
    if missing:
        raise MissingExtra(
            f"this needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            f'installed: pip install "genfast[{extra}]"'
        )
