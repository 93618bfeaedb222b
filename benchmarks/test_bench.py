"""The cases under pytest-benchmark: `pytest benchmarks --benchmark-enable`.

Without --benchmark-enable each case is proved and run once.
"""

import pytest
import torch

from genfast.benchmarks.harness import load_cases, prove

CASES = load_cases()


@pytest.mark.parametrize("who", ["ours", "eager"])
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_case(case, who, benchmark):
    work = case.setup(torch.device("cpu"))
    if who == "ours":
        prove(case, work)
        call = work.ours
    else:
        if who not in work.rivals:
            pytest.skip(f"no rival of this name; {', '.join(work.rivals) or 'none at all'}")
        call = work.rivals[who]
    benchmark.group = case.id
    benchmark(call)
