"""Files that a reader never sees half of."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

from genfast._extras import need

_MARK = ".part"


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """write(temporary path in the same folder), then rename: old or new, never half, whenever the
    process is killed. What a kill leaves behind, `remove_leftovers` finds. A link stays one.
    """
    path = Path(os.path.realpath(path))
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_MARK)
    os.close(handle)
    try:
        write(Path(temporary))
        _sync(temporary)
        os.chmod(temporary, 0o644)  # mkstemp's are private
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:  # a full disk
            error.filename = str(path)
        raise
    if os.name == "posix":
        _sync(path.parent)  # the rename itself


def write_tensors(path: Path, tensors: dict, about: dict) -> None:
    """A safetensors file, whole or not at all; about: JSON, kept as its metadata `genfast`."""
    need("safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    # One entry: with two, their order in the file would be random, and its hash with it.
    text = {"genfast": json.dumps(about)}

    def write(p: Path) -> None:
        try:
            # Its own temporary file lies beside what it writes, and a kill leaves it there.
            with tempfile.TemporaryDirectory(dir=p.parent, prefix=".", suffix=_MARK) as folder:
                save_file(whole, Path(folder) / p.name, text)
                os.replace(Path(folder) / p.name, p)
        except SafetensorError as error:  # a full disk
            raise OSError(f"{path}: could not be written ({error})") from None

    write_atomic(path, write)


def _sync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder is this process's to write to within; ValueError where another one holds it.

    The lock is on the folder itself: it leaves no file and ends with the process, whatever ends it.
    None where the system has no such locks.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"out: expected a folder that no other run writes to, got {folder}, which another "
                "process holds; wait for its end or take another folder"
            ) from None
        except OSError:  # network file systems without locks
            pass
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Waits until no other process is about to write `path` too. The lock is on a file beside it,
    which stays: `path` itself is replaced. None where the system has no such locks."""
    if fcntl is None:
        yield
        return
    path = Path(os.path.realpath(path))
    # To read: the file may be another user's.
    handle = os.open(path.with_name(f".{path.name}.lock"), os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        with contextlib.suppress(OSError):  # network file systems without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Temporary files and folders of writers that were killed."""
    for path in folder.glob(f".*{_MARK}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
