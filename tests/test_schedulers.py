"""Schedules, solver plans and the reference step. About 40 s on two cores.

Parity: every diffusers class is rebuilt with its source's float32 replaced by float64 (its own arithmetic, 29 bits
finer), driven with random model outputs, and compared with the plan run by the reference step.
"""

import dataclasses
import importlib
import inspect
import itertools
import json
import math
import pickle
import sys
import types

import numpy as np
import pytest
import torch

from genfast import schedulers as S
from genfast.reference.diffusion import diffusion_step, dynamic_threshold
from genfast.schedulers import dpm
from genfast.schedulers import plan as P
from genfast.schedulers._special import beta_ppf, phi
from genfast.schedulers.from_config import plan_from_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::DeprecationWarning:.*scheduling_.*")

N_GRID = [1, 2, 3, 10, 14, 15, 50]
SHAPE = (2, 3, 4, 2)

FILES = dict(
    DDPM="ddpm", DDIM="ddim", DDIMInverse="ddim_inverse", PNDM="pndm", IPNDM="ipndm", EulerDiscrete="euler_discrete",
    EulerAncestralDiscrete="euler_ancestral_discrete", HeunDiscrete="heun_discrete", KDPM2Discrete="k_dpm_2_discrete",
    KDPM2AncestralDiscrete="k_dpm_2_ancestral_discrete", LMSDiscrete="lms_discrete",
    DPMSolverMultistep="dpmsolver_multistep", DPMSolverSinglestep="dpmsolver_singlestep",
    DEISMultistep="deis_multistep", UniPCMultistep="unipc_multistep", SASolver="sasolver", LCM="lcm", TCD="tcd",
    CMStochasticIterative="consistency_models", EDMEuler="edm_euler",
    EDMDPMSolverMultistep="edm_dpmsolver_multistep", FlowMatchEulerDiscrete="flow_match_euler_discrete",
    FlowMatchHeunDiscrete="flow_match_heun_discrete", FlowMatchLCM="flow_match_lcm",
)  # fmt: skip


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def double_class(name, _cache={}):  # noqa: B006
    """The diffusers class computing in float64 throughout, and the module it lives in."""
    if name not in _cache:
        pytest.importorskip("diffusers", exc_type=ImportError)
        original = importlib.import_module(f"diffusers.schedulers.scheduling_{FILES[name]}")
        module = types.ModuleType(f"{original.__name__}_float64")
        module.__package__ = original.__package__
        module.__file__ = original.__file__
        sys.modules[module.__name__] = module  # dataclasses look their module up
        exec(compile(inspect.getsource(original).replace("float32", "float64"), original.__file__, "exec"), module.__dict__)
        _cache[name] = getattr(module, f"{name}Scheduler"), module
    return _cache[name]


def peer(cls, config, _cache={}):  # noqa: B006
    """The scheduler object. KDPM2's constructor takes 80 ms (it lays out all 1000 timesteps), so those are kept."""
    if not cls.__name__.startswith("KDPM2"):
        return cls(**config)
    key = cls, repr(config)
    if key not in _cache:
        _cache[key] = cls(**config)
    return _cache[key]


def run_peer(name, config, steps, set_kw, step_kw, shipped=None):
    """Drives the class; returns timesteps, and per call (model input scale, m, noises, prev, second output)."""
    cls, module = shipped or double_class(name)
    rng = np.random.default_rng(0)
    drawn = []

    def randn(shape, **_):
        drawn.append(torch.from_numpy(rng.standard_normal(tuple(shape))))
        return drawn[-1]

    original, module.randn_tensor = getattr(module, "randn_tensor", None), randn
    scheduler = peer(cls, config)
    scheduler.set_timesteps(steps, **set_kw) if steps is not None else scheduler.set_timesteps(**set_kw)
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
    H = [torch.full(SHAPE, float("nan"), dtype=torch.float64)] * plan.slots  # an unwritten slot must not be read
    x, errors = calls[0][0], np.zeros(3)
    assert len(plan) == len(calls)
    for r, (_, scale, m, drawn, prev, second) in enumerate(calls):
        index = plan.index[r]
        assert len(drawn) == (index[P.NOISE] != P.NOISE_NONE), f"row {r}: peer drew {len(drawn)} noises"
        reads = {s - 3 for s in plan.sources(r)}
        threshold = None
        if plan.threshold:
            raw = plan.table[r, P.D_X] * x + plan.table[r, P.D_M] * m
            threshold = dynamic_threshold(raw, *plan.threshold)
        outs = diffusion_step(x, m, plan.table[r], threshold=threshold, history=[h if k in reads else None for k, h in enumerate(H)],
                              noise=drawn[0] if drawn else None, variance_mode=int(index[P.VARIANCE_MODE]))  # fmt: skip
        for slot, out in zip(index[[P.WRITE_1, P.WRITE_2]], outs[1:], strict=True):
            if slot:
                H[slot - 1] = out
        x = outs[0]
        errors[0] = max(errors[0], ((x - prev).abs().max() / prev.abs().max()).item())
        if second is not None:
            denoised = outs[index[P.DENOISED]]
            errors[1] = max(errors[1], ((denoised - second).abs().max() / second.abs().max()).item())
        errors[2] = max(errors[2], abs(plan.table[r, P.INPUT_SCALE] / scale - 1))
    return errors


VP_PRED = ["epsilon", "sample", "v_prediction"]
SPACING = ["linspace", "leading", "trailing"]
KINDS = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
BETA = ["linear", "scaled_linear", "squaredcos_cap_v2"]


def cases():
    """(class, config, N, set_timesteps arguments, step arguments). Full products of the axes that interact in a class;
    the remaining axes are walked through cyclically, so every value meets every class (and nearly every pair occurs)."""
    cycle = itertools.count()

    def walk(*values):
        return values[next(cycle) % len(values)]

    for n, pred in itertools.product(N_GRID, VP_PRED):
        base = dict(prediction_type=pred)
        for spacing in SPACING:
            b = dict(base, timestep_spacing=spacing, beta_schedule=walk(*BETA), steps_offset=walk(0, 1))
            clip = dict(clip_sample=walk(True, False), clip_sample_range=walk(1.0, 2.0))
            variances = ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"]
            yield "DDPM", {**b, **clip, "variance_type": walk(*variances)}, n, {}, {}
            yield "DDIM", {**b, **clip, "set_alpha_to_one": walk(True, False)}, n, {}, dict(
                eta=walk(0.0, 0.5, 1.0), use_clipped_model_output=walk(False, True))  # fmt: skip
            if spacing != "linspace" and not (pred == "sample"):
                yield "DDIMInverse", {**b, **clip, "set_alpha_to_one": walk(True, False)}, n, {}, {}
            if pred != "sample":
                yield "PNDM", {**b, "skip_prk_steps": n < 4 or walk(True, False)}, n, {}, {}
                yield "EulerAncestralDiscrete", b, n, {}, {}
            churn = walk({}, dict(s_churn=2.0, s_noise=1.1), dict(s_churn=40.0, s_tmin=0.5, s_tmax=10.0))
            yield "EulerDiscrete", {**b, "final_sigmas_type": walk("zero", "sigma_min")}, n, {}, churn
            for kind in KINDS:
                b = dict(base, timestep_spacing=spacing, beta_schedule=walk(*BETA[:2]), **kind)
                final = walk("zero", "sigma_min")
                yield "EulerDiscrete", {**b, "final_sigmas_type": final}, n, {}, churn
                yield "HeunDiscrete", {**b, **clip}, n, {}, {}
                yield "LMSDiscrete", b, n, {}, dict(order=walk(1, 2, 3, 4))
                if pred != "sample":
                    yield "KDPM2Discrete", b, n, {}, {}
                    yield "KDPM2AncestralDiscrete", b, n, {}, {}
    flow = [{"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}]
    for n, kind, order in itertools.product(N_GRID, KINDS + flow, [1, 2, 3]):
        flowing = "use_flow_sigmas" in kind
        for pred in ["flow_prediction"] if flowing else VP_PRED:
            b = dict(timestep_spacing=walk(*SPACING), beta_schedule=walk(*BETA[:2]), steps_offset=walk(0, 1))
            b = {**b, **kind, "prediction_type": pred, "solver_order": order}
            end = dict(lower_order_final=walk(True, True, False), final_sigmas_type=walk("zero", "sigma_min"))
            for algorithm in ["dpmsolver++", "sde-dpmsolver++"]:
                yield "DPMSolverMultistep", {**b, **end, "algorithm_type": algorithm, "euler_at_final": walk(False, True),
                                             "solver_type": walk("midpoint", "heun")}, n, {}, {}  # fmt: skip
                single = {k: v for k, v in b.items() if k not in ("timestep_spacing", "steps_offset")}
                # the peer has no noise level below the last one when two blocks meet at N < order
                yield "DPMSolverSinglestep", {**single, **end, "algorithm_type": algorithm,
                                              "solver_type": walk("midpoint", "heun")}, n, {}, {}  # fmt: skip
            if not flowing:
                eps = {**b, "final_sigmas_type": "sigma_min", "solver_type": walk("midpoint", "heun")}
                yield "DPMSolverMultistep", {**eps, "algorithm_type": "dpmsolver"}, n, {}, {}
                if order < 3:
                    yield "DPMSolverMultistep", {**eps, "algorithm_type": "sde-dpmsolver"}, n, {}, {}
                eps = {k: v for k, v in eps.items() if k not in ("timestep_spacing", "steps_offset")}
                yield "DPMSolverSinglestep", {**eps, "algorithm_type": "dpmsolver"}, n, {}, {}
            if not ("use_flow_sigmas" in kind and n >= 15):  # h = 0 with order > 1 divides by zero there
                yield "DEISMultistep", {**b, "lower_order_final": True}, n, {}, {}
            for bh in ["bh1", "bh2"]:
                final = walk("zero", "sigma_min")
                yield "UniPCMultistep", {**b, "solver_type": bh, "predict_x0": walk(True, True, False) or flowing,
                                         "final_sigmas_type": final, "disable_corrector": walk([], [], [0, 2])}, n, {}, {}  # fmt: skip
            sa = {k: v for k, v in b.items() if k != "solver_order"}
            data = "data_prediction" if flowing else walk("data_prediction", "noise_prediction")
            yield "SASolver", {**sa, "predictor_order": order, "corrector_order": walk(1, 2, 3, 4),
                               "algorithm_type": data}, n, {}, {}  # fmt: skip
    for n, pred in itertools.product(N_GRID, VP_PRED):
        b = dict(prediction_type=pred, clip_sample=walk(True, False))
        yield "LCM", b, n, {}, {}
        yield "TCD", b, n, {}, dict(eta=walk(0.0, 0.3, 1.0))
    for n in N_GRID:
        yield "CMStochasticIterative", dict(clip_denoised=walk(True, False)), min(n, 40), {}, {}
        yield "IPNDM", {}, n, {}, {}
        yield "FlowMatchHeunDiscrete", dict(shift=walk(1.0, 3.0)), n, {}, walk({}, dict(s_churn=2.0, s_noise=1.1))
        for pred, schedule in itertools.product(["epsilon", "v_prediction"], ["karras", "exponential"]):
            b = dict(prediction_type=pred, sigma_schedule=schedule, final_sigmas_type=walk("zero", "sigma_min"))
            if n > 1 or schedule == "karras":
                yield "EDMEuler", b, n, {}, walk({}, dict(s_churn=2.0))
            if n == 1 and schedule == "exponential":
                continue  # the peer starts at sigma_min then
            for order, algorithm in [(1, "dpmsolver++"), (2, "dpmsolver++"), (3, "dpmsolver++"), (1, "sde-dpmsolver++"),
                                     (2, "sde-dpmsolver++")]:  # fmt: skip
                yield "EDMDPMSolverMultistep", dict(b, algorithm_type=algorithm, solver_order=order,
                                                    solver_type=walk("midpoint", "heun")), n, {}, {}  # fmt: skip
        for kind in KINDS:
            shift = walk(dict(shift=3.0), dict(use_dynamic_shifting=True, time_shift_type=walk("exponential", "linear")))
            mu = dict(mu=0.7) if "use_dynamic_shifting" in shift else {}
            b = {**kind, **shift, "shift_terminal": walk(None, 0.1) if n > 1 else None}
            yield "FlowMatchEulerDiscrete", {**b, "stochastic_sampling": walk(False, True),
                                             "invert_sigmas": walk(False, False, True)}, n, mu, {}  # fmt: skip
            yield "FlowMatchLCM", b, n, mu, {}


def extra_cases():
    """Options of set_timesteps and rarer config attributes, one or two cases each."""
    own = [999, 703, 421, 64, 3]
    v = dict(prediction_type="v_prediction")
    for name in ["DDPM", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "LCM", "TCD"]:
        yield name, {}, None, dict(timesteps=own), {}
    yield "DPMSolverSinglestep", dict(lower_order_final=True), None, dict(timesteps=own), {}
    yield "CMStochasticIterative", {}, None, dict(timesteps=[39, 20, 4]), {}
    yield "EulerDiscrete", {}, None, dict(sigmas=[14.0, 5.0, 1.0, 0.1, 0.0]), {}
    yield "EDMEuler", {}, 4, dict(sigmas=torch.tensor([0.0, 0.3, 0.8, 1.0])), {}
    flow = dict(use_flow_sigmas=True, flow_shift=2.0, prediction_type="flow_prediction")
    yield "UniPCMultistep", flow, None, dict(sigmas=np.array([1.0, 0.7, 0.3, 0.1])), {}
    shifted = dict(use_dynamic_shifting=True, shift_terminal=0.05)
    yield "UniPCMultistep", dict(flow, **shifted), 6, dict(mu=0.4), {}
    yield "UniPCMultistep", dict(flow, use_karras_sigmas=True), 6, {}, {}
    for name in ["DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep"]:
        yield name, dict(flow, use_dynamic_shifting=True), 6, dict(mu=0.4), {}
    for name in ["FlowMatchEulerDiscrete", "FlowMatchLCM"]:
        yield name, dict(shift=3.0), None, dict(sigmas=[1.0, 0.7, 0.3]), {}
        yield name, dict(shift=3.0), None, dict(timesteps=[1000.0, 700.0, 300.0]), {}
        yield name, {}, None, dict(sigmas=[1.0, 0.7, 0.3], timesteps=[999.0, 701.0, 300.0]), {}
    for name in ["LCM", "TCD"]:
        yield name, {}, 4, dict(original_inference_steps=100), {}
        yield name, {}, 4, dict(strength=0.5), {}
    for name in ["DDPM", "DDIM", "LCM", "TCD", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep"]:
        yield name, dict(v, rescale_betas_zero_snr=True, timestep_spacing="trailing"), 7, {}, {}
    for name in ["DPMSolverMultistep", "DPMSolverSinglestep", "SASolver"]:
        yield name, dict(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1), 12, {}, {}
    yield "DPMSolverMultistep", dict(use_lu_lambdas=True), 12, {}, {}
    yield "DPMSolverMultistep", dict(use_karras_sigmas=True, beta_schedule="squaredcos_cap_v2"), 12, {}, {}
    yield "DPMSolverMultistep", dict(algorithm_type="deis", solver_type="bh2", final_sigmas_type="sigma_min"), 5, {}, {}
    yield "EulerDiscrete", dict(v, timestep_type="continuous", sigma_min=0.002, sigma_max=700.0, use_karras_sigmas=True), 9, {}, {}
    yield "EulerDiscrete", dict(interpolation_type="log_linear"), 9, {}, dict(s_churn=1.0)
    for name in ["DDPM", "DDIM", "LCM", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "SASolver"]:
        yield name, dict(thresholding=True, sample_max_value=2.0, dynamic_thresholding_ratio=0.9), 6, {}, {}
    yield "DPMSolverMultistep", dict(algorithm_type="dpmsolver", thresholding=True, final_sigmas_type="sigma_min"), 6, {}, {}
    yield "EDMDPMSolverMultistep", dict(thresholding=True, sample_max_value=2.0), 6, {}, {}
    yield "UniPCMultistep", dict(solver_order=4), 12, {}, {}
    for schedule in ["sigmoid", "laplace"]:
        yield "DDPM", dict(beta_schedule=schedule), 8, {}, {}
    yield "HeunDiscrete", dict(beta_schedule="exp"), 8, {}, {}
    for name in ["DDIM", "EulerDiscrete", "DPMSolverMultistep"]:
        yield name, dict(trained_betas=np.linspace(0.001, 0.05, 100).tolist(), num_train_timesteps=100), 9, {}, {}
        yield name, dict(num_train_timesteps=37, timestep_spacing="trailing"), 5, {}, {}
    yield "DDPM", dict(variance_type="learned"), 1, {}, {}  # with more steps the peer roots negative numbers here


def pairwise(all_cases):
    """The cases that show a pair of values (config attributes, N, options) not seen before in their class."""
    seen = set()
    for case in all_cases:
        name, config, n, set_kw, step_kw = case
        values = [("N", n), *config.items(), *set_kw.items(), *step_kw.items()]
        pairs = {(name, *pair) for pair in itertools.combinations_with_replacement(map(repr, values), 2)}
        if not pairs <= seen:
            seen |= pairs
            yield case


# The peers' own cancellation, not the plan's: their closed forms subtract numbers ~1/h^2 (DEIS, order 3) or
# 1/h^3 (SA-Solver, order 4) larger than the result, and h is 0.02 between the last steps at N = 50. The weights
# here are tested against 50-digit arithmetic below.
PARITY = {"DEISMultistep": 1e-9, "SASolver": 1e-9, "DPMSolverMultistep": 1e-10, "PNDM": 1e-10, "EulerDiscrete": 1e-10,
          "KDPM2AncestralDiscrete": 1e-11, "DPMSolverSinglestep": 1e-11}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_parity_with_diffusers_in_float64(name, float64):
    """Next sample, second output, input scale, timesteps and number of noise draws over a pairwise-covering part of
    class x prediction x spacing x sigma kind x order x solver type x final sigma x clip x N, and rarer options."""
    pytest.importorskip("diffusers", exc_type=ImportError).logging.set_verbosity_error()
    mine = [c for c in itertools.chain(extra_cases(), cases()) if c[0] == name]
    checked = 0
    for _, config, n, set_kw, step_kw in pairwise(mine):
        scheduler, calls = run_peer(name, config, n, set_kw, step_kw)
        options = {k: np.asarray(v) if k in ("sigmas", "timesteps") else v for k, v in {**set_kw, **step_kw}.items()}
        plan = plan_from_config(f"{name}Scheduler", config, n, **options)
        case = f"{name} {config} N={n} {set_kw} {step_kw}"
        assert np.abs(plan.timesteps - scheduler.timesteps.numpy()).max() < 1e-9, case
        errors = run_plan(plan, calls)
        assert errors.max() < PARITY.get(name, 1e-12), f"{case}: next, second, scale {errors}"
        checked += 1
    assert checked >= len(mine) / 20


@pytest.mark.parametrize("name", FILES)
def test_close_to_diffusers_as_shipped(name):
    """The unmodified class, fp32 tables: timesteps to fp32, samples to its own rounding; and its alphas_cumprod
    can be handed over, which removes the table's part of the difference."""
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    diffusers.logging.set_verbosity_error()
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{FILES[name]}")
    scheduler, calls = run_peer(name, {}, 10, {}, {}, shipped=(getattr(diffusers, f"{name}Scheduler"), module))
    table = getattr(scheduler, "alphas_cumprod", None)
    plan = plan_from_config(f"{name}Scheduler", dict(scheduler.config), 10,
                            alphas_cumprod=None if table is None else table.double().numpy())  # fmt: skip
    np.testing.assert_allclose(plan.timesteps, scheduler.timesteps.numpy(), rtol=2e-7, atol=1e-4)
    np.testing.assert_allclose(plan.init_noise_sigma, float(getattr(scheduler, "init_noise_sigma", 1.0)), rtol=1e-6)
    assert run_plan(plan, calls).max() < 4e-6


# ---------------------------------------------------------------------------------------------------
# where diffusers is wrong


def test_sde_order_3_plans_exist():
    for kw in [dict(algorithm="sde-dpmsolver"), dict(algorithm="sde-dpmsolver++")]:
        g = S.sigma_grid(10, drop_last=True, final="sigma_min")
        assert np.isfinite(S.dpm_solver_plan(g, order=3, **kw).table[:, P.COEF :]).all()
    assert len(S.edm_dpm_plan(10, algorithm="sde-dpmsolver++", order=3)) == 10


def _exponential_moment(k, h, sde):
    """int_0^h c e^{-c (h-u)} (u/h)^k du, c = 2 for the SDE: what a data solver gives D(u) = (u/h)^k."""
    u = np.polynomial.legendre.leggauss(40)
    x, w = (u[0] + 1) / 2 * h, u[1] / 2 * h
    c = 2 if sde else 1
    return float(np.sum(w * c * np.exp(-c * (h - x)) * (x / h) ** k))


@pytest.mark.parametrize("sde", [False, True], ids=["ode", "sde"])
def test_dpm_weights_are_exponential_moments(sde):
    """c_1, c_2 are exact moments; c_3 is half of its own, in every public DPM-Solver++(3M); diffusers' SDE c_3 is off by -1."""
    for h in (1e-4, 0.05, 0.7, 3.0):
        _, c_1, c_2, c_3, _ = dpm._weights(True, sde, 1.0, 0.5, 1.0, 0.5 * np.exp(h), h)
        for c, k in ((c_1, 0), (c_2, 1), (2 * c_3, 2)):
            assert c == pytest.approx(_exponential_moment(k, h, sde), rel=1e-12)


def test_fixed_large_log_is_a_standard_deviation():
    plan = S.ddpm_plan(10, variance="fixed_large_log")
    assert plan == S.ddpm_plan(10, variance="fixed_large") and plan.noise_std(0) > 0


def test_token_sigmas_step_towards_the_data():
    sigmas = S.flow_grid(4, shift=3.0).sigmas
    whole = S.flow_match_euler_plan(S.flow_grid(4, shift=3.0))
    rows = S.flow_match_token_table(sigmas, np.array([sigmas[:3], sigmas[1:4]]))
    assert rows.shape == (2, 3, P.COLUMNS)
    for (b, i), step in {(0, 0): 0, (0, 2): 2, (1, 2): 3}.items():
        np.testing.assert_allclose(rows[b, i, P.COEF : P.COEF + 10], whole.coefficients(step)[0], atol=1e-15)


@pytest.mark.parametrize("n", [61, 103, 994])
def test_trailing_spacing_has_n_timesteps(n):
    t = S.alpha_grid(n, spacing="trailing").timesteps
    assert len(t) == n and t[0] == 999 and t[-1] >= 0


# ---------------------------------------------------------------------------------------------------
# arithmetic


def test_phi_against_50_digits():
    from decimal import Decimal, getcontext

    getcontext().prec = 50
    for k, h in itertools.product([1, 2, 3, 4, 5], [-40.0, -3.0, -1.0, -0.9, -1e-3, -1e-9, 0.0, 1e-6, 0.3, 0.99, 1.0, 5.0]):
        exact = sum((Decimal(h) ** n if n else 1) / Decimal(math.factorial(n + k)) for n in range(200))
        assert phi(k, h) == pytest.approx(float(exact), rel=1e-13 if abs(h) >= 1 else 4e-16)


def test_beta_quantiles_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    q = np.linspace(0, 1, 1001)
    for a, b in [(0.6, 0.6), (2.0, 0.5), (1.0, 1.0), (5.0, 3.0)]:
        np.testing.assert_allclose(beta_ppf(q, a, b), stats.beta.ppf(q, a, b), atol=2e-15)


ODE = {
    # maker -> (order of convergence, arguments); the toy's exact solution is below
    "euler": (1, lambda n: S.euler_plan(_toy_grid(n))),
    "heun": (2, lambda n: S.heun_plan(_toy_grid(n))),
    "kdpm2": (2, lambda n: S.kdpm2_plan(_toy_grid(n))),
    "lms4": (3.5, lambda n: S.lms_plan(_toy_grid(n))),
    "dpm++2m": (2, lambda n: S.dpm_solver_plan(_toy_grid(n), lower_order_final=False)),
    "dpm++3m heun": (2, lambda n: S.dpm_solver_plan(_toy_grid(n), order=3, lower_order_final=False)),
    "dpm 2m": (2, lambda n: S.dpm_solver_plan(_toy_grid(n), algorithm="dpmsolver", lower_order_final=False)),
    "dpm++2s": (2, lambda n: S.dpm_solver_singlestep_plan(_toy_grid(n))),
    "dpm++3s": (2, lambda n: S.dpm_solver_singlestep_plan(_toy_grid(n), order=3)),
    "deis3": (2, lambda n: S.deis_plan(_toy_grid(n), order=3)),
    "unipc2": (2.8, lambda n: S.unipc_plan(_toy_grid(n), lower_order_final=False)),
    "unipc3": (3.5, lambda n: S.unipc_plan(_toy_grid(n), order=3, lower_order_final=False)),
    "unipc3 eps bh1": (3.5, lambda n: S.unipc_plan(_toy_grid(n), order=3, solver_type="bh1", predict_x0=False, lower_order_final=False)),
    "sa tau=0": (2.8, lambda n: S.sa_solver_plan(_toy_grid(n), tau=lambda t: 0.0, predictor_order=3, corrector_order=3, lower_order_final=False)),
}  # fmt: skip
VE = {"euler", "heun", "kdpm2", "lms4"}


def _toy_grid(n):
    """n steps equal in log sigma from 10 to 0.1; the timestep carries sigma itself."""
    s = np.exp(np.linspace(np.log(10.0), np.log(0.1), n + 1))
    return S.SigmaGrid(s[:-1], s, table=np.exp(np.linspace(np.log(0.01), np.log(20), 1000)))


def _toy_error(plan, ve):
    """Data N(0, 0.5^2): the exact eps model is linear in x and the probability-flow ODE has the solution
    x(sigma) ~ sqrt(0.25 + sigma^2) (variance-exploding scale). Returns the relative error at the end."""
    state = S.SolverState.start(plan, torch.tensor([[1.0]], dtype=torch.float64))
    for r in range(len(plan)):
        sigma = plan.sigmas[r]
        scale = 1.0 if ve else math.sqrt(sigma**2 + 1)  # x_vp -> x_ve
        state = S.step(plan, state, state.x * scale * sigma / (0.25 + sigma**2))
    x = state.x.item() if ve else state.x.item() * math.sqrt(0.1**2 + 1)
    start = 1.0 if ve else math.sqrt(101.0)
    return abs(x / (start * math.sqrt((0.25 + 0.01) / (0.25 + 100.0))) - 1)


@pytest.mark.parametrize("name", ODE)
def test_order_of_convergence(name):
    """Doubling the steps of an exactly known ODE divides the error by 2^order; independent of diffusers."""
    order, make = ODE[name]
    coarse, fine = (_toy_error(make(n), name in VE) for n in (60, 120))
    assert math.log2(coarse / fine) > order - 0.3, (coarse, fine)
    assert fine < 0.03


# ---------------------------------------------------------------------------------------------------
# plans as objects


def test_plan_is_immutable_hashable_and_serialisable():
    plan = S.unipc_plan(12, order=3)
    assert plan == S.unipc_plan(12, order=3) and hash(plan) == hash(S.unipc_plan(12, order=3))
    assert plan != S.unipc_plan(12, order=2) and plan != S.unipc_plan(13, order=3)
    for copy in (P.SolverPlan.from_dict(json.loads(json.dumps(plan.to_dict()))), pickle.loads(pickle.dumps(plan))):
        assert copy == plan and {plan: 1}[copy] == 1
    with pytest.raises(ValueError, match="read-only"):
        plan.table[0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.slots = 3


@pytest.mark.parametrize("slots, make", [
    (0, lambda: S.ddim_plan(10)), (1, lambda: S.dpm_solver_plan(10)), (2, lambda: S.dpm_solver_plan(15, order=3)),
    (1, lambda: S.heun_plan(10)), (3, lambda: S.lms_plan(10)), (4, lambda: S.unipc_plan(15, order=3)),
    (4, lambda: S.sa_solver_plan(15, predictor_order=3, corrector_order=4)), (6, lambda: S.unipc_plan(15, order=5)),
], ids=["ddim", "dpm2m", "dpm3m", "heun", "lms4", "unipc3", "sa34", "unipc5"])  # fmt: skip
def test_slots_are_the_fewest(slots, make):
    assert make().slots == slots


def test_rows_tell_what_they_do():
    text = S.dpm_solver_plan(10, clip=1.0).describe(3)
    assert "|x0| <= 1" in text and "D2" in text and "H1 (denoised) <- +1 x0" in text


def test_requests_at_different_steps_share_a_batch():
    plans = [S.dpm_solver_plan(12, order=3), S.dpm_solver_plan(12, order=3), S.euler_ancestral_plan(7)]
    g = torch.Generator().manual_seed(0)
    rows = [2, 7, 3]
    draw = lambda: torch.randn(3, 2, 5, generator=g, dtype=torch.float64)  # noqa: E731
    x, m, z, H = draw(), draw(), draw(), [draw(), draw()]
    table, index = S.stack_rows(plans, rows)
    together = diffusion_step(x, m, table, history=H, noise=z)
    for b, (plan, r) in enumerate(zip(plans, rows, strict=True)):
        one = slice(b, b + 1)
        alone = diffusion_step(x[one], m[one], plan.table[r], history=[h[one] for h in H], noise=z[one])
        for a, t in zip(alone, together, strict=True):
            assert torch.equal(a, t[one])
        assert (index[b] == plan.index[r]).all()


@pytest.mark.parametrize("begin", [0, 4])
@pytest.mark.parametrize("make", [S.dpm_solver_plan, S.unipc_plan, S.lms_plan, S.heun_plan, S.ddim_plan, S.deis_plan, S.pndm_plan],
                         ids=lambda f: f.__name__)  # fmt: skip
def test_begin_starts_with_an_empty_history(make, begin):
    kw = dict(skip_prk=True) if make is S.pndm_plan else {}
    plan, whole = make(10, begin=begin, **kw), make(10, **kw)
    first = whole.index[:, P.STEP].tolist().index(begin)
    assert plan.num_steps == 10 - begin and plan.timesteps[0] == whole.timesteps[first]
    assert not any(3 <= s <= 8 for s in plan.sources(0))


BAD = {
    "steps 0": (ValueError, "steps", lambda: S.ddim_plan(0)),
    "steps float": (TypeError, "steps", lambda: S.euler_plan(3.5)),
    "too many": (ValueError, "at most 1000", lambda: S.ddim_plan(1001)),
    "prediction": (ValueError, "'epsilon', 'sample'", lambda: S.ddim_plan(5, prediction="eps")),
    "algorithm": (ValueError, "algorithm", lambda: S.dpm_solver_plan(5, algorithm="deis")),
    "order": (ValueError, "order", lambda: S.dpm_solver_plan(5, order=4)),
    "eta": (ValueError, "eta", lambda: S.ddim_plan(5, eta=1.5)),
    "clip": (ValueError, "clip", lambda: S.ddim_plan(5, clip=-1.0)),
    "ascending": (ValueError, "descending", lambda: S.ddpm_plan([1, 2, 3])),
    "beyond": (ValueError, "beyond", lambda: S.ddpm_plan([1000, 2])),
    "zero snr epsilon": (ValueError, "v_prediction", lambda: S.ddim_plan(
        S.alpha_grid(5, S.noise_schedule(zero_snr=True), spacing="trailing"))),
    "prk": (ValueError, "at least 4", lambda: S.pndm_plan(3)),
    "class": (ValueError, "DDIMScheduler", lambda: plan_from_config("NoScheduler", {}, 5)),
    "no steps": (ValueError, "num_inference_steps", lambda: plan_from_config("DDIMScheduler", {})),
    "mu": (ValueError, "mu", lambda: plan_from_config("FlowMatchEulerDiscreteScheduler", dict(use_dynamic_shifting=True), 5)),
    "kinds": (ValueError, "at most one", lambda: plan_from_config(
        "EulerDiscreteScheduler", dict(use_karras_sigmas=True, use_beta_sigmas=True), 5)),
    "sigmas shape": (ValueError, "sigmas", lambda: S.SigmaGrid([1.0], [1.0])),
    "sigmas nan": (ValueError, "sigmas", lambda: S.SigmaGrid([1.0], [1.0, float("nan")])),
    "schedule": (ValueError, "'linear'", lambda: S.noise_schedule("square")),
    "table": (ValueError, "table", lambda: P.SolverPlan.from_dict({**S.ddim_plan(2).to_dict(), "table": [[1.0]]})),
    "slots": (ValueError, "slots", lambda: P.SolverPlan.from_dict({**S.unipc_plan(5).to_dict(), "slots": 9})),
    "unwritten": (ValueError, "no row wrote", lambda: _unwritten()),
    "noise": (ValueError, "noise", lambda: S.step(S.ddpm_plan(2), S.SolverState(torch.zeros(1, 2)), torch.zeros(1, 2))),
    "finished": (ValueError, "finished", lambda: S.step(
        S.ddim_plan(2), S.SolverState(torch.zeros(1, 2), row=2), torch.zeros(1, 2))),
    "seed and generator": (ValueError, "seed, generator", lambda: S.sample(
        None, S.ddim_plan(2), torch.zeros(1, 2), seed=1, generator=torch.Generator())),
    "int x": (TypeError, "x_T", lambda: S.sample(None, S.ddim_plan(2), torch.zeros(1, 2, dtype=torch.int64))),
}  # fmt: skip


def _unwritten():
    d = S.dpm_solver_plan(5).to_dict()
    d["index"][0][P.WRITE_1] = 0
    return P.SolverPlan.from_dict(d)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    error, match, call = BAD[case]
    with pytest.raises(error, match=match):
        call()


# ---------------------------------------------------------------------------------------------------
# the loop


def _linear_model(x, t):
    return 0.3 * x + 0.01 * torch.sin(x)


@pytest.mark.parametrize("make", [
    lambda: S.ddpm_plan(6), lambda: S.euler_ancestral_plan(6), lambda: S.unipc_plan(6), lambda: S.heun_plan(6),
    lambda: S.dpm_solver_plan(6, algorithm="sde-dpmsolver++"), lambda: S.flow_match_euler_plan(6, stochastic=True),
], ids=["ddpm", "euler_a", "unipc", "heun", "dpm_sde", "flow_sde"])  # fmt: skip
def test_sample_is_a_function_of_the_seed(make):
    plan = make()
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))
    a = S.sample(_linear_model, plan, x, seed=7)
    assert torch.equal(a, S.sample(_linear_model, plan, x, seed=7)) and a.shape == x.shape
    stochastic = any(plan.needs_noise(r) for r in range(len(plan)))
    assert torch.equal(a, S.sample(_linear_model, plan, x, seed=8)) != stochastic
    seeds = torch.tensor([3, 7, 9])  # one per sample: a row of the batch is a function of its own seed
    b = S.sample(_linear_model, plan, x, seed=seeds)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(b[order], S.sample(_linear_model, plan, x[order], seed=seeds[order]))


@pytest.mark.parametrize("name, step_kw", [("DDPM", {}), ("EulerAncestralDiscrete", {}), ("DDIM", dict(eta=1.0)), ("SASolver", {}),
                                           ("LCM", {}), ("KDPM2AncestralDiscrete", {})])  # fmt: skip
def test_generator_stream_is_that_of_diffusers(name, step_kw):
    """Same torch.Generator, same images: count, order and dtype of the draws agree."""
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    diffusers.logging.set_verbosity_error()
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    scheduler.set_timesteps(7)
    x_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * float(scheduler.init_noise_sigma)
    x, g = x_T, torch.Generator().manual_seed(5)
    for t in scheduler.timesteps:
        x = scheduler.step(_linear_model(scheduler.scale_model_input(x, t), t), t, x, generator=g, **step_kw).prev_sample
    plan = plan_from_config(f"{name}Scheduler", dict(scheduler.config), 7, alphas_cumprod=scheduler.alphas_cumprod.double(), **step_kw)
    h = torch.Generator().manual_seed(5)
    ours = S.sample(_linear_model, plan, x_T, generator=h)
    torch.testing.assert_close(ours, x, rtol=2e-5, atol=2e-5 * x.abs().max().item())
    assert torch.equal(g.get_state(), h.get_state())


def test_guidance_callback_and_progress():
    pytest.importorskip("tqdm")
    plan, x, seen = S.dpm_solver_plan(5), torch.ones(2, 3), []

    def model(x, t):
        assert isinstance(t, int)
        return _linear_model(x, t), 0.5 * _linear_model(x, t)

    out = S.sample(model, plan, x, guidance=3.0, callback=lambda r, s: seen.append((r, s.denoised.shape)), progress=True)
    assert seen == [(r, x.shape) for r in range(5)]
    torch.testing.assert_close(out, S.sample(lambda x, t: 2.0 * _linear_model(x, t), plan, x))
    stopped = []
    S.sample(_linear_model, plan, x, callback=lambda r, s: stopped.append(s) if r == 2 else None)
    resumed = S.sample(_linear_model, plan, x, state=stopped[0])
    assert torch.equal(resumed, S.sample(_linear_model, plan, x))
