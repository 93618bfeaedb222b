#!/usr/bin/env bash
# The Triton kernels under other versions of Triton: interpreted, and compiled for every target.
#
#   tests/tritons.sh 3.6.0 3.7.1 3.8.0
#
# Uses the `python` on the PATH, with genfast and its `test` extra; fetches each version (200 MB).
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for version in "$@"; do
  site="$work/$version"
  python -m pip install -q --no-deps --target "$site" "triton==$version"
  # The interpreter of 3.6 calls what numpy 2.4 dropped.
  case $version in 3.6.*) python -m pip install -q --no-deps --target "$site" "numpy<2.4" ;; esac
  echo "== triton $version"
  PYTHONPATH="$site" OMP_NUM_THREADS=1 pytest -q -p no:cacheprovider tests/kernels
done
