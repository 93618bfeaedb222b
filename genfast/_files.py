"""Files that a reader never sees half of."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from genfast._extras import need

_MARK = ".part"


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """write(temporary path in the same folder), then rename: old or new, never half, whenever the
    process is killed. What a kill leaves behind, `remove_leftovers` finds.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_MARK)
    os.close(handle)
    try:
        write(Path(temporary))
        _sync(temporary)
        os.chmod(temporary, 0o644)  # mkstemp's are private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":
        _sync(path.parent)  # the rename itself


def write_tensors(path: Path, tensors: dict, about: dict) -> None:
    """A safetensors file, whole or not at all; about: JSON, kept as its metadata `genfast`."""
    need("safetensors")
    from safetensors.torch import save_file

    whole = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    # One entry: with two, their order in the file would be random, and its hash with it.
    text = {"genfast": json.dumps(about)}
    write_atomic(path, lambda p: save_file(whole, p, text))


def _sync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Temporary files of writers that were killed."""
    for path in folder.glob(f".*{_MARK}"):
        path.unlink(missing_ok=True)
