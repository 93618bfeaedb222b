"""Parity with diffusers in float64, over a pairwise-covering part of its options. About 35 s.

Every diffusers class is rebuilt with its source's float32 replaced by float64 (its own arithmetic,
29 bits finer), driven with random model outputs, and compared with the plan run by the reference
step.
"""

import importlib
import itertools

import numpy as np
import pytest
import torch
from peers import BROWNIAN, FILES, SHAPE, Brownian, cases, double_class, extra_cases, pairwise, peer

from genfast.reference.diffusion import diffusion_step, dynamic_threshold
from genfast.schedulers import plan as P
from genfast.schedulers.from_config import plan_from_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run_peer(name, config, steps, set_kw, step_kw, shipped=None):
    """Drives the class; returns timesteps, and per call (model input scale, m, noises, prev, second
    output).
    """
    cls, module = shipped or double_class(name)
    rng = np.random.default_rng(0)
    drawn = []

    def randn(shape, **_):
        drawn.append(torch.from_numpy(rng.standard_normal(tuple(shape))))
        return drawn[-1]

    original, module.randn_tensor = getattr(module, "randn_tensor", None), randn
    if hasattr(module, "BrownianTreeNoiseSampler"):
        module.BrownianTreeNoiseSampler = lambda x, *_, **__: Brownian(lambda: randn(x.shape))
    scheduler = peer(cls, config)
    scheduler.set_timesteps(steps, **set_kw) if steps is not None else scheduler.set_timesteps(
        **set_kw
    )
    x = torch.from_numpy(rng.standard_normal(SHAPE))
    calls = []
    learned = 2 if "learned" in (config.get("variance_type") or "") else 1
    for t in scheduler.timesteps.clone():
        drawn.clear()
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        m = torch.from_numpy(rng.standard_normal((SHAPE[0], learned * SHAPE[1], *SHAPE[2:])))
        out = scheduler.step(m, t, x, **step_kw)
        second = next((v for k, v in out.items() if k != "prev_sample"), None)
        calls.append((x, float((scaled / x).mean()), m, list(drawn), out.prev_sample, second))
        x = out.prev_sample
    module.randn_tensor = original
    return scheduler, calls


def run_plan(plan, calls):
    """Largest relative errors of (next sample, second output, input scale) over the plan's rows."""
    H = [
        torch.full(SHAPE, float("nan"), dtype=torch.float64)
    ] * plan.slots  # an unwritten slot must not be read
    x, errors = calls[0][0], np.zeros(3)
    assert len(plan) == len(calls)
    for r, (_, scale, m, drawn, prev, second) in enumerate(calls):
        index = plan.index[r]
        assert len(drawn) == (index[P.NOISE] != P.NOISE_NONE), (
            f"row {r}: peer drew {len(drawn)} noises"
        )
        reads = {s - 3 for s in plan.sources(r)}
        threshold = None
        if plan.threshold:
            raw = plan.table[r, P.D_X] * x + plan.table[r, P.D_M] * m
            threshold = dynamic_threshold(raw, *plan.threshold)
        outs = diffusion_step(
            x,
            m,
            plan.table[r],
            threshold=threshold,
            history=[h if k in reads else None for k, h in enumerate(H)],
            noise=drawn[0] if drawn else None,
            variance_mode=int(index[P.VARIANCE_MODE]),
        )
        for slot, out in zip(index[[P.WRITE_1, P.WRITE_2]], outs[1:], strict=True):
            if slot:
                H[slot - 1] = out
        x = outs[0]
        errors[0] = max(errors[0], ((x - prev).abs().max() / prev.abs().max()).item())
        if second is not None:
            denoised = outs[index[P.DENOISED]]
            errors[1] = max(
                errors[1], ((denoised - second).abs().max() / second.abs().max()).item()
            )
        errors[2] = max(errors[2], abs(plan.table[r, P.INPUT_SCALE] / scale - 1))
    return errors


# The peers' own cancellation, not the plan's: their closed forms subtract numbers ~1/h^2 (DEIS,
# order 3) or 1/h^3 (SA-Solver, order 4) larger than the result, and h is 0.02 between the last
# steps at N = 50. The weights here are tested against 50-digit arithmetic below.
PARITY = {
    "DEISMultistep": 1e-9,
    "SASolver": 1e-9,
    "DPMSolverMultistep": 1e-10,
    "PNDM": 1e-10,
    "EulerDiscrete": 1e-10,
    "KDPM2AncestralDiscrete": 1e-11,
    "DPMSolverSinglestep": 1e-11,
}


def check_parity(name, config, n, set_kw, step_kw):
    scheduler, calls = run_peer(name, config, n, set_kw, step_kw)
    options = {
        k: np.asarray(v) if k in ("sigmas", "timesteps") else v
        for k, v in {**set_kw, **step_kw}.items()
    }
    plan = plan_from_config(f"{name}Scheduler", config, n, **options)
    case = f"{name} {config} N={n} {set_kw} {step_kw}"
    assert np.abs(plan.timesteps - scheduler.timesteps.numpy()).max() < 1e-9, case
    start = float(getattr(scheduler, "init_noise_sigma", 1.0))
    assert abs(plan.init_noise_sigma / start - 1) < 1e-9, case
    errors = run_plan(plan, calls)
    assert errors.max() < PARITY.get(name, 1e-12), f"{case}: next, second, scale {errors}"


@pytest.mark.parametrize("name", [*FILES, *BROWNIAN])
def test_parity_with_diffusers_in_float64(name, float64):
    """Next sample, second output, input scale, timesteps and number of noise draws over a
    pairwise-covering part of class x prediction x spacing x sigma kind x order x solver type x
    final sigma x clip x N, and rarer options."""
    pytest.importorskip("diffusers", exc_type=ImportError).logging.set_verbosity_error()
    mine = [c for c in itertools.chain(extra_cases(), cases()) if c[0] == name]
    checked = 0
    for case in pairwise(mine):
        check_parity(*case)
        checked += 1
    assert checked >= len(mine) / 20


LOG_LINEAR = dict(interpolation_type="log_linear", timestep_spacing="leading")
KINDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
CONTINUOUS = dict(prediction_type="v_prediction", timestep_type="continuous")
#: beyond the grid: pairs of options that feed the same numbers
TOGETHER = [
    *(
        ("EulerDiscrete", {**LOG_LINEAR, kind: True, "final_sigmas_type": final}, 5, {}, churn)
        for kind, final, churn in zip(
            KINDS, ("zero", "sigma_min", "zero"), ({}, {}, dict(s_churn=1.0)), strict=True
        )
    ),
    ("EulerDiscrete", LOG_LINEAR, None, dict(timesteps=[999, 500, 3]), dict(s_churn=1.0)),
    ("EulerDiscrete", LOG_LINEAR, None, dict(sigmas=[14.0, 5.0, 1.0, 0.0]), {}),
    ("EulerDiscrete", {**LOG_LINEAR, **CONTINUOUS}, 5, {}, dict(s_churn=1.0)),
    ("EulerDiscrete", {**LOG_LINEAR, **CONTINUOUS, "final_sigmas_type": "sigma_min"}, 5, {}, {}),
    ("EulerDiscrete", CONTINUOUS, None, dict(sigmas=[14.0, 5.0, 1.0, 0.0]), {}),
    ("UniPCMultistep", dict(predict_x0=False, thresholding=True), 5, {}, {}),
    *(
        ("DEISMultistep", dict(use_flow_sigmas=True, prediction_type=pred), 6, {}, {})
        for pred in ("epsilon", "sample", "v_prediction")
    ),
]


@pytest.mark.parametrize("case", TOGETHER, ids=lambda c: " ".join(map(str, c)))
def test_options_together(case, float64):
    pytest.importorskip("diffusers", exc_type=ImportError).logging.set_verbosity_error()
    check_parity(*case)


@pytest.mark.parametrize("name", FILES)
def test_close_to_diffusers_as_shipped(name):
    """The unmodified class, fp32 tables: timesteps to fp32, samples to its own rounding; and its
    alphas_cumprod can be handed over, which removes the table's part of the difference."""
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    diffusers.logging.set_verbosity_error()
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{FILES[name]}")
    scheduler, calls = run_peer(
        name, {}, 10, {}, {}, shipped=(getattr(diffusers, f"{name}Scheduler"), module)
    )
    table = getattr(scheduler, "alphas_cumprod", None)
    plan = plan_from_config(
        f"{name}Scheduler",
        dict(scheduler.config),
        10,
        alphas_cumprod=None if table is None else table.double().numpy(),
    )
    np.testing.assert_allclose(plan.timesteps, scheduler.timesteps.numpy(), rtol=2e-7, atol=1e-4)
    np.testing.assert_allclose(
        plan.init_noise_sigma, float(getattr(scheduler, "init_noise_sigma", 1.0)), rtol=1e-6
    )
    assert run_plan(plan, calls).max() < 4e-6
