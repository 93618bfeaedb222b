#!/usr/bin/env bash
# One wheel for every torch: builds it once and runs what depends on torch (the boundary, autograd,
# compile and export, the faces of F.sdpa) under every interpreter given.
#
#   tests/torches.sh PYTHON_WITH_TORCH_A PYTHON_WITH_TORCH_B ...
#
# All of one Python version, with torch, numpy and the packages of the `test` extra, without genfast;
# the first one's pip builds.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

GENFAST_CUDA=${GENFAST_CUDA:-OFF} "$1" -m pip wheel -q --no-deps -w "$work" \
  --config-settings=build-dir="$work/build" .
"$1" -m zipfile -e "$work"/genfast-*.whl "$work/site"
export PYTHONPATH="$work/site" PYTHONSAFEPATH=1
for python in "$@"; do
  "$python" - "$work/site" <<'PY'
import sys

import torch

import genfast

assert genfast.__file__.startswith(sys.argv[1]), f"not of the wheel: {genfast.__file__}"
print(f"== torch {torch.__version__}, python {sys.version.split()[0]}")
PY
  "$python" -m pytest -q -p no:cacheprovider -m "not gpu" tests/test_native.py \
    tests/test_rng.py tests/test_transforms.py tests/test_attention_faces.py
done
