"""python tests/levels.py BUILD: of the CPU kernels' objects in a build folder, nothing of one
instruction set reaches a processor without it. The linker keeps one copy of a weak function for all
levels, and what initialises at load runs everywhere: both ended imports and `upfirdn2d` of
processors without AVX-512 by SIGILL."""

import subprocess
import sys
from pathlib import Path


def read(*command) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def shared(path: Path) -> list[str]:
    """What an object shares with others of its name, or has run at load."""
    symbols = [line.split(maxsplit=2) for line in read("nm", "-C", "--defined-only", path)]
    weak = [name for _, kind, name in symbols if kind in "WVu" and not name.startswith("DW.ref.")]
    return weak + [line.strip() for line in read("readelf", "-SW", path) if ".init_array" in line]


def main(build: Path) -> str | None:
    objects = sorted(build.glob("CMakeFiles/genfast_*.dir/**/*.o"))
    if not objects:
        return f"{build}: expected the build folder of genfast, got none of its objects"
    found = [f"{path.relative_to(build)}: {what}" for path in objects for what in shared(path)]
    print(
        f"{len(objects)} objects; shared by levels or run at load: {len(found)}", *found, sep="\n"
    )
    return "give it code of its own: cpu/scratch.h, Vector" if found else None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
