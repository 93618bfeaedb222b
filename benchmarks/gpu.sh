#!/usr/bin/env bash
# Everything that needs a GPU, in one run of at most 9 minutes, without a network: builds for the
# GPU that is there, runs the tests marked `gpu` and the benchmark grid, and writes one JSON and one
# table named after the device under benchmarks/results/ (or $RESULTS).
#
#   PYTHON=python3 RESULTS=dir COMMIT=hash benchmarks/gpu.sh
#
# Needs nvcc 12.8 or newer, torch >= 2.10 with CUDA, and, already installed: pybind11,
# scikit-build-core, cmake, ninja, numpy, pytest, pytest-benchmark, rich.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=$(mkdir -p "${RESULTS:-benchmarks/results}" && cd "${RESULTS:-benchmarks/results}" && pwd)
commit=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
started=$SECONDS

read -r name capability driver < <(nvidia-smi --query-gpu=name,compute_cap,driver_version \
  --format=csv,noheader | head -1 | tr ' ' '_' | sed 's/,_/ /g')
[ -n "${capability:-}" ] || { echo "no NVIDIA GPU answers nvidia-smi" >&2; exit 2; }
arch=${capability/./}
[ "$arch" = 90 ] && arch=90a
[ "$arch" = 100 ] && arch=100f
[ "$arch" = 120 ] && arch=120f
slug=$(echo "$name" | tr 'A-Z_' 'a-z-')
echo "== $name, sm_$arch, driver $driver, commit $commit"

echo "== build"
GENFAST_CUDA=ON GENFAST_CUDA_ARCHS=$arch-real timeout 200 "$python" -m pip install -q \
  --no-build-isolation --no-deps --no-index --target "$work/site" \
  --config-settings=build-dir="$work/build" . || exit 1
build_s=$((SECONDS - started))
echo "built in $build_s s"
# The installed package, not the source folder that lies in the current one.
export PYTHONPATH="$work/site" PYTHONSAFEPATH=1 GENFAST_BACKEND=cuda

echo "== tests marked gpu"
timeout 170 "$python" -m pytest -q -m gpu -p no:cacheprovider --junitxml="$work/tests.xml" tests
tests=$?

echo "== benchmarks"
timeout 150 "$python" -c 'import sys; from genfast.cli import main; sys.exit(main(sys.argv[1:]))' \
  bench --device cuda --quick --json "$work/bench.json" >"$work/table.txt" 2>"$work/bench.log"
bench=$?
cat "$work/table.txt" "$work/bench.log"

"$python" - "$work" "$results/$slug" "$name" "$driver" "$commit" "$build_s" "$tests" "$bench" <<'PY'
import datetime, json, pathlib, platform, sys
import xml.etree.ElementTree as xml

import torch

work, target, name, driver, commit, build_s, tests, bench = sys.argv[1:]
work = pathlib.Path(work)
suite = next(xml.parse(work / "tests.xml").iter("testsuite"), None) if (
    work / "tests.xml").exists() else None
counts = {} if suite is None else {
    k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
failed = [] if suite is None else [
    c.get("name") for c in suite.iter("testcase")
    if c.find("failure") is not None or c.find("error") is not None]
rows = work / "bench.json"
record = {
    "device": name.replace("_", " "), "driver": driver, "commit": commit,
    "date": datetime.date.today().isoformat(), "python": platform.python_version(),
    "torch": torch.__version__, "cuda": torch.version.cuda, "build_s": int(build_s),
    "tests": counts | {"exit": int(tests), "failed": failed},
    "benchmark_exit": int(bench),
    "benchmark": json.loads(rows.read_text()) if rows.exists() else None,
}
pathlib.Path(target + ".json").write_text(json.dumps(record, indent=1) + "\n")
head = "\n".join(f"{k}: {record[k]}" for k in (
    "device", "driver", "date", "commit", "python", "torch", "cuda", "build_s", "tests"))
table = (work / "table.txt").read_text()
pathlib.Path(target + ".txt").write_text(head + "\n\n" + table)
PY
echo "== $((SECONDS - started)) s; $results/$slug.json and .txt"
[ "$tests" = 0 ] && [ "$bench" = 0 ]
