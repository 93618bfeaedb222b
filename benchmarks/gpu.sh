#!/usr/bin/env bash
# Everything that needs a GPU, in one run of at most 9 minutes, without a network: builds for the
# GPU that is there, runs the tests marked `gpu` and the benchmark grid, and writes one JSON and one
# table named after the device under benchmarks/results/ (or $RESULTS).
#
#   PYTHON=python3 RESULTS=dir COMMIT=hash LIMIT=540 SITE=dir PARTS="tests auto …" benchmarks/gpu.sh
#
# SITE: where genfast is installed already (pip install --target), instead of building it. PARTS: of
# tests, auto, cuda, sanitizer, triton, models, sweep, calibrate and triton-attention, those to run.
#
# Needs nvcc 12.8 or newer, torch >= 2.10 with CUDA, and, already installed: pybind11,
# scikit-build-core, cmake, ninja, numpy, hypothesis, pytest, pytest-benchmark, rich.
#
# What matters most comes first, and each part stands alone: a part that fails or runs out of time
# takes no other with it, and what it had found is kept.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=$(mkdir -p "${RESULTS:-benchmarks/results}" && cd "${RESULTS:-benchmarks/results}" && pwd)
commit=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
started=$SECONDS
left() { echo $((${LIMIT:-540} - 20 - SECONDS + started)); }  # seconds; 20 are kept for the summary
least() { echo $(($1 < $2 ? $1 : $2)); }
command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin

read -r name capability driver < <(nvidia-smi --query-gpu=name,compute_cap,driver_version \
  --format=csv,noheader | head -1 | tr ' ' '_' | sed 's/,_/ /g')
[ -n "${capability:-}" ] || { echo "no NVIDIA GPU answers nvidia-smi" >&2; exit 2; }
archs=$("$python" -c "import runpy
print(runpy.run_path('genfast/_archs.py')['best'](tuple(map(int, '$capability'.split('.')))))")
arch=${archs%-real}
slug=$(echo "$name" | tr 'A-Z_' 'a-z-')
echo "== $name, sm_$arch, driver $driver, commit $commit"

if [ -n "${SITE:-}" ]; then
  site=$(cd "$SITE" && pwd) || exit 1
  ln -s "$site" "$work/site"
else
  echo "== build"
  GENFAST_CUDA=ON GENFAST_CUDA_ARCHS=$archs timeout 240 "$python" -m pip install -q \
    --no-build-isolation --no-deps --no-index --target "$work/site" \
    --config-settings=build-dir="$work/build" . || exit 1
fi
build_s=$((SECONDS - started))
echo "built in $build_s s"
# The installed package, not the source folder that lies in the current one.
export PYTHONPATH="$work/site" PYTHONSAFEPATH=1

# part NAME BACKEND SECONDS ARGUMENTS: pytest, stopped by an interrupt, so that its report is written.
failed=0
part() {
  local name=$1 backend=$2 limit; limit=$(least "$3" "$(left)"); shift 3
  [ "$limit" -gt 10 ] || { echo "== tests, $name: no time left"; return; }
  echo "== tests, $name"
  GENFAST_BACKEND=$backend timeout -s INT -k 15 "$limit" "$python" -m pytest -q -m gpu \
    -p no:cacheprovider --junitxml="$work/tests-$name.xml" "$@" || failed=1
}
# grid BACKEND FAMILY [SECONDS], or sweep for a family: all ops, 16 shapes that are on no grid
grid() {
  local limit; limit=$(least "${3:-60}" "$(left)")
  [ "$limit" -gt 10 ] || { echo "== benchmark, $1, $2: no time left"; return; }
  echo "== benchmark, $1, $2"
  GENFAST_BACKEND=$1 timeout -s INT -k 15 "$limit" "$python" -c \
    'import sys; from genfast.cli import main; sys.exit(main(sys.argv[1:]))' \
    bench "${2/#sweep/--sweep}" --device cuda --quick --json "$work/bench-$1-$2.json" >"$work/table-$1-$2.txt" \
    || failed=1
  cat "$work/table-$1-$2.txt"
}
wanted() { [[ -z "${PARTS:-}" || " $PARTS " == *" $1 "* ]]; }
if wanted tests; then part cuda cuda 100 tests/test_gpu.py -k "not sanitizer"; fi
if wanted auto; then
  for family in attention rng sampling diffusion normalization filtering; do grid auto "$family"; done
fi
if wanted cuda; then grid cuda attention; fi
if wanted sanitizer; then part sanitizer cuda 90 tests/test_gpu.py -k sanitizer; fi
if wanted triton; then
  for family in rng sampling diffusion normalization; do grid triton "$family"; done
  part triton auto 90 tests/kernels
fi
if wanted cuda; then
  for family in rng sampling diffusion normalization; do grid cuda "$family"; done
fi
if wanted models; then
  for family in models transformers; do grid auto "$family"; done
fi
limit=$(least 60 "$(left)")
if wanted calibrate && [ "$limit" -gt 10 ]; then
  GENFAST_CHOICES="$work/choices.json" timeout "$limit" "$python" -c \
    'import sys; from genfast.cli import main; sys.exit(main(sys.argv[1:]))' \
    bench --calibrate --device cuda | tee "$work/table-calibrated.txt" || failed=1
fi
if wanted sweep; then grid auto sweep 240; fi
# Last, and with what is left: compiling some 60 kernels takes longer than their timing.
if wanted triton-attention; then grid triton attention 240; fi

"$python" - "$work" "$results/$slug" "$name" "$driver" "$commit" "$build_s" "$failed" <<'PY'
import datetime, json, pathlib, platform, sys
import xml.etree.ElementTree as xml

import torch

work, target, name, driver, commit, build_s, failed = sys.argv[1:]
work = pathlib.Path(work)


def tests(path):
    suite = next(xml.parse(path).iter("testsuite"))
    bad = [c for c in suite.iter("testcase") if c.find("failure") is not None
           or c.find("error") is not None]
    counts = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    return counts | {"seconds": float(suite.get("time", 0)), "failed": [c.get("name") for c in bad]}


record = {
    "device": name.replace("_", " "), "driver": driver, "commit": commit,
    "date": datetime.date.today().isoformat(), "python": platform.python_version(),
    "torch": torch.__version__, "cuda": torch.version.cuda, "build_s": int(build_s),
    "passed": failed == "0",
    "tests": {p.stem.removeprefix("tests-"): tests(p) for p in sorted(work.glob("tests-*.xml"))},
    "benchmark": {
        p.stem.removeprefix("bench-"): json.loads(p.read_text())
        for p in sorted(work.glob("bench-*.json"))
    },
}
pathlib.Path(target + ".json").write_text(json.dumps(record, indent=1) + "\n")
lines = [f"{k}: {record[k]}" for k in (
    "device", "driver", "date", "commit", "python", "torch", "cuda", "build_s")]
lines += [f"tests, {part}: {found}" for part, found in record["tests"].items()]
for table in sorted(work.glob("table-*.txt")):
    lines += ["", f"backend, family: {table.stem.removeprefix('table-')}", table.read_text()]
pathlib.Path(target + ".txt").write_text("\n".join(lines) + "\n")
PY
echo "== $((SECONDS - started)) s; $results/$slug.json and .txt"
exit "$failed"
