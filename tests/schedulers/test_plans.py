"""Schedules, solver plans and the sampling loop: arithmetic, objects, errors. About 5 s."""

import dataclasses
import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch

import genfast
from genfast import schedulers as S
from genfast.reference.diffusion import diffusion_step
from genfast.schedulers import dpm
from genfast.schedulers import plan as P
from genfast.schedulers._special import beta_ppf, phi
from genfast.schedulers.from_config import plan_from_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


# --------------------------------------------------------------------------------------------------
# where diffusers is wrong


def test_sde_order_3_plans_exist():
    for kw in [dict(algorithm="sde-dpmsolver"), dict(algorithm="sde-dpmsolver++")]:
        g = S.sigma_grid(10, drop_last=True, final="sigma_min")
        assert np.isfinite(S.dpm_solver_plan(g, order=3, **kw).table[:, P.COEF :]).all()
    assert len(S.edm_dpm_plan(10, algorithm="sde-dpmsolver++", order=3)) == 10


def _exponential_moment(k, h, sde):
    """int_0^h c e^{-c (h-u)} (u/h)^k du, c = 2 for the SDE: what a data solver gives D(u) =
    (u/h)^k.
    """
    u = np.polynomial.legendre.leggauss(40)
    x, w = (u[0] + 1) / 2 * h, u[1] / 2 * h
    c = 2 if sde else 1
    return float(np.sum(w * c * np.exp(-c * (h - x)) * (x / h) ** k))


@pytest.mark.parametrize("sde", [False, True], ids=["ode", "sde"])
def test_dpm_weights_are_exponential_moments(sde):
    """c_1, c_2 are exact moments; c_3 is half of its own, in every public DPM-Solver++(3M);
    diffusers' SDE c_3 is off by -1.
    """
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
        np.testing.assert_allclose(
            rows[b, i, P.COEF : P.COEF + 10], whole.coefficients(step)[0], atol=1e-15
        )


@pytest.mark.parametrize("n", [61, 103, 994])
def test_trailing_spacing_has_n_timesteps(n):
    t = S.alpha_grid(n, spacing="trailing").timesteps
    assert len(t) == n and t[0] == 999 and t[-1] >= 0


# --------------------------------------------------------------------------------------------------
# arithmetic


def test_phi_against_50_digits():
    from decimal import Decimal, getcontext

    getcontext().prec = 50
    for k, h in itertools.product(
        [1, 2, 3, 4, 5], [-40.0, -3.0, -1.0, -0.9, -1e-3, -1e-9, 0.0, 1e-6, 0.3, 0.99, 1.0, 5.0]
    ):
        exact = sum(
            (Decimal(h) ** n if n else 1) / Decimal(math.factorial(n + k)) for n in range(200)
        )
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
    "dpm++ sde eta=0": (2, lambda n: S.dpm_sde_plan(_toy_grid(n), eta=0.0)),
    "lms4": (3.5, lambda n: S.lms_plan(_toy_grid(n))),
    "dpm++2m": (2, lambda n: S.dpm_solver_plan(_toy_grid(n), lower_order_final=False)),
    "dpm++3m heun": (
        2,
        lambda n: S.dpm_solver_plan(_toy_grid(n), order=3, lower_order_final=False),
    ),
    "dpm 2m": (
        2,
        lambda n: S.dpm_solver_plan(_toy_grid(n), algorithm="dpmsolver", lower_order_final=False),
    ),
    "dpm++2s": (2, lambda n: S.dpm_solver_singlestep_plan(_toy_grid(n))),
    "dpm++3s": (2, lambda n: S.dpm_solver_singlestep_plan(_toy_grid(n), order=3)),
    "deis3": (2, lambda n: S.deis_plan(_toy_grid(n), order=3)),
    "unipc2": (2.8, lambda n: S.unipc_plan(_toy_grid(n), lower_order_final=False)),
    "unipc3": (3.5, lambda n: S.unipc_plan(_toy_grid(n), order=3, lower_order_final=False)),
    "unipc3 eps bh1": (
        3.5,
        lambda n: S.unipc_plan(
            _toy_grid(n), order=3, solver_type="bh1", predict_x0=False, lower_order_final=False
        ),
    ),
    "sa tau=0": (
        2.8,
        lambda n: S.sa_solver_plan(
            _toy_grid(n),
            tau=lambda t: 0.0,
            predictor_order=3,
            corrector_order=3,
            lower_order_final=False,
        ),
    ),
}
VE = {"euler", "heun", "kdpm2", "dpm++ sde eta=0", "lms4"}


def _toy_grid(n):
    """n steps equal in log sigma from 10 to 0.1; the timestep carries sigma itself."""
    s = np.exp(np.linspace(np.log(10.0), np.log(0.1), n + 1))
    return S.SigmaGrid(s[:-1], s, table=np.exp(np.linspace(np.log(0.01), np.log(20), 1000)))


def _toy_error(plan, ve):
    """Data N(0, 0.5^2): the exact eps model is linear in x and the probability-flow ODE has the
    solution x(sigma) ~ sqrt(0.25 + sigma^2) (variance-exploding scale). Returns the relative error
    at the end."""
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
    """Doubling the steps of an exactly known ODE divides the error by 2^order; independent of
    diffusers.
    """
    order, make = ODE[name]
    coarse, fine = (_toy_error(make(n), name in VE) for n in (60, 120))
    assert math.log2(coarse / fine) > order - 0.3, (coarse, fine)
    assert fine < 0.03


# --------------------------------------------------------------------------------------------------
# plans as objects


def test_plan_is_immutable_hashable_and_serialisable():
    plan = S.unipc_plan(12, order=3)
    assert plan == S.unipc_plan(12, order=3) and hash(plan) == hash(S.unipc_plan(12, order=3))
    assert plan != S.unipc_plan(12, order=2) and plan != S.unipc_plan(13, order=3)
    for copy in (
        P.SolverPlan.from_dict(json.loads(json.dumps(plan.to_dict()))),
        pickle.loads(pickle.dumps(plan)),
    ):
        assert copy == plan and {plan: 1}[copy] == 1
    with pytest.raises(ValueError, match="read-only"):
        plan.table[0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.slots = 3


@pytest.mark.parametrize(
    "slots, make",
    [
        (0, lambda: S.ddim_plan(10)),
        (1, lambda: S.dpm_solver_plan(10)),
        (2, lambda: S.dpm_solver_plan(15, order=3)),
        (1, lambda: S.heun_plan(10)),
        (1, lambda: S.dpm_sde_plan(10)),
        (3, lambda: S.lms_plan(10)),
        (4, lambda: S.unipc_plan(15, order=3)),
        (4, lambda: S.sa_solver_plan(15, predictor_order=3, corrector_order=4)),
        (6, lambda: S.unipc_plan(15, order=5)),
    ],
    ids=["ddim", "dpm2m", "dpm3m", "heun", "dpm_sde", "lms4", "unipc3", "sa34", "unipc5"],
)
def test_slots_are_the_fewest(slots, make):
    assert make().slots == slots


def test_rows_tell_what_they_do():
    text = S.dpm_solver_plan(10, clip=1.0).describe(3)
    assert "|x0| <= 1" in text and "D2" in text and "H1 (denoised) <- +1 x0" in text


def test_requests_at_different_steps_share_a_batch():
    plans = [
        S.dpm_solver_plan(12, order=3),
        S.dpm_solver_plan(12, order=3),
        S.euler_ancestral_plan(7),
    ]
    g = torch.Generator().manual_seed(0)
    rows = [2, 7, 3]
    draw = lambda: torch.randn(3, 2, 5, generator=g, dtype=torch.float64)  # noqa: E731
    x, m, z, H = draw(), draw(), draw(), [draw(), draw()]
    table, index = S.stack_rows(plans, rows)
    together = diffusion_step(x, m, table, history=H, noise=z)
    for b, (plan, r) in enumerate(zip(plans, rows, strict=True)):
        one = slice(b, b + 1)
        alone = diffusion_step(
            x[one], m[one], plan.table[r], history=[h[one] for h in H], noise=z[one]
        )
        for a, t in zip(alone, together, strict=True):
            assert torch.equal(a, t[one])
        assert (index[b] == plan.index[r]).all()


@pytest.mark.parametrize("begin", [0, 4])
@pytest.mark.parametrize(
    "make",
    [
        S.dpm_solver_plan,
        S.unipc_plan,
        S.lms_plan,
        S.heun_plan,
        S.ddim_plan,
        S.deis_plan,
        S.pndm_plan,
    ],
    ids=lambda f: f.__name__,
)
def test_begin_starts_with_an_empty_history(make, begin):
    kw = dict(skip_prk=True) if make is S.pndm_plan else {}
    plan, whole = make(10, begin=begin, **kw), make(10, **kw)
    first = whole.index[:, P.STEP].tolist().index(begin)
    assert plan.num_steps == 10 - begin and plan.timesteps[0] == whole.timesteps[first]
    assert not any(3 <= s <= 8 for s in plan.sources(0))


NAN = float("nan")

#: setting -> (what the makers refuse by its name when the plan is built, makers)
SETTINGS = {
    "eta": ((NAN, -1.0, "much"), [S.euler_ancestral_plan, S.kdpm2_ancestral_plan, S.dpm_sde_plan,
                                  S.ddim_plan, S.tcd_plan]),
    "s_churn": ((NAN, -1.0), [S.euler_plan, S.edm_euler_plan, S.flow_match_heun_plan]),
    "s_tmin": ((NAN,), [S.euler_plan, S.edm_euler_plan, S.flow_match_heun_plan]),
    "s_tmax": ((NAN,), [S.euler_plan, S.edm_euler_plan, S.flow_match_heun_plan]),
    "s_noise": ((NAN, -1.0, math.inf), [S.euler_plan, S.edm_euler_plan, S.flow_match_heun_plan,
                                        S.dpm_sde_plan, S.consistency_plan]),
    "churn_steps": ((0, -3, 2.5), [S.euler_plan]),
    "sigma_data": ((NAN, 0.0, -1.0), [S.edm_euler_plan, S.edm_dpm_plan, S.lcm_plan,
                                      S.consistency_plan]),
    "timestep_scaling": ((NAN, 0.0), [S.lcm_plan]),
    "tau": ((0.5, lambda t: NAN, lambda t: -1.0), [S.sa_solver_plan]),
    "sigma_min": ((NAN, -1.0, 90.0), [S.consistency_plan, S.edm_grid]),
    "rho": ((NAN, 0.0), [S.consistency_grid, S.edm_grid]),
    "shift": ((NAN, 0.0), [S.flow_grid, S.flow_sigma_grid]),
    "threshold": (((NAN, 1), (2, 1), (0.5, 0.5), (0.9, NAN), (0.9, math.inf), 0.9, ()),
                  [S.ddpm_plan, S.ddim_plan, S.lcm_plan, S.dpm_solver_plan, S.sa_solver_plan,
                   S.dpm_solver_singlestep_plan, S.deis_plan, S.unipc_plan]),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_bad_settings_are_named_when_the_plan_is_built(name):
    values, makers = SETTINGS[name]
    for make, value in itertools.product(makers, values):
        with pytest.raises((TypeError, ValueError), match=f"^{name}.*: expected .* got"):
            make(4, **{name: value})


def test_settings_at_their_ends_make_plans():
    """Those that mean something: no noise, all of it, churn at every sigma or at none."""
    assert S.euler_plan(4, s_tmin=-1.0, s_churn=math.inf) == S.euler_plan(4, s_churn=9.0)
    assert S.euler_plan(4, s_tmin=5.0, s_tmax=1.0, s_churn=1.0) == S.euler_plan(4)
    for make in (S.euler_ancestral_plan, S.kdpm2_ancestral_plan):
        assert not make(4, eta=0.0).coefficients(0)[0, -1] and len(make(4, eta=2.0))
    assert S.ddim_plan(4, threshold=(1, 1)).threshold == (1.0, 1.0)
    assert len(S.lcm_plan([999, 759, 0])) == 3


BAD = {
    "steps 0": (ValueError, "steps", lambda: S.ddim_plan(0)),
    "steps float": (TypeError, "steps", lambda: S.euler_plan(3.5)),
    "too many": (ValueError, "at most 1000", lambda: S.ddim_plan(1001)),
    "prediction": (ValueError, "'epsilon', 'sample'", lambda: S.ddim_plan(5, prediction="eps")),
    "algorithm": (ValueError, "algorithm", lambda: S.dpm_solver_plan(5, algorithm="deis")),
    "order": (ValueError, "order", lambda: S.dpm_solver_plan(5, order=4)),
    "eta": (ValueError, "eta", lambda: S.ddim_plan(5, eta=1.5)),
    "clip": (ValueError, "clip", lambda: S.ddim_plan(5, clip=-1.0)),
    "clip and churn": (ValueError, "churn", lambda: S.euler_plan(5, clip=1.0, s_churn=1.0)),
    "ascending": (ValueError, "descending", lambda: S.ddpm_plan([1, 2, 3])),
    "beyond": (ValueError, "beyond", lambda: S.ddpm_plan([1000, 2])),
    "zero snr epsilon": (
        ValueError,
        "v_prediction",
        lambda: S.ddim_plan(S.alpha_grid(5, S.noise_schedule(zero_snr=True), spacing="trailing")),
    ),
    "prk": (ValueError, "at least 4", lambda: S.pndm_plan(3)),
    "class": (ValueError, "DDIMScheduler", lambda: plan_from_config("NoScheduler", {}, 5)),
    "no steps": (ValueError, "num_inference_steps", lambda: plan_from_config("DDIMScheduler", {})),
    "mu": (
        ValueError,
        "mu",
        lambda: plan_from_config(
            "FlowMatchEulerDiscreteScheduler", dict(use_dynamic_shifting=True), 5
        ),
    ),
    "kinds": (
        ValueError,
        "at most one",
        lambda: plan_from_config(
            "EulerDiscreteScheduler", dict(use_karras_sigmas=True, use_beta_sigmas=True), 5
        ),
    ),
    "begin": (ValueError, "begin", lambda: S.euler_plan(5, begin=-1)),  # not the last row first
    "begin beyond": (ValueError, "begin", lambda: S.ddim_plan(5, begin=5)),
    "negative timestep": (ValueError, "steps", lambda: S.alpha_grid([900, 500, -5])),
    "fraction": (ValueError, "steps: .* integer", lambda: S.alpha_grid([999.5, 3.0])),
    "NaN timestep": (ValueError, "steps", lambda: S.alpha_grid([float("nan"), 1.0])),
    "final": (ValueError, "final_alpha_bar", lambda: S.alpha_grid(5, final_alpha_bar=2.0)),
    "rising": (ValueError, "steps: .* descending", lambda: S.sigma_grid([5, 6])),
    "flow time": (ValueError, "steps: .*divide", lambda: S.flow_grid([900, 500])),
    "shift": (ValueError, "shift", lambda: S.flow_grid(5, shift=0.0)),
    "no edm steps": (ValueError, "steps", lambda: S.edm_grid(0)),
    "reversed sigmas": (ValueError, "sigma_min", lambda: S.edm_grid(5, sigma_max=0.1, sigma_min=1)),
    "rho": (ValueError, "rho", lambda: S.edm_grid(5, rho=0.0)),
    "sigma 0": (ValueError, "timesteps", lambda: S.edm_grid(5, sigma_min=0.0)),
    "ramp below 0": (ValueError, "steps: .*rising", lambda: S.edm_euler_plan([-1.0])),
    "ramp above 1": (ValueError, "steps: .*rising", lambda: S.edm_grid([0.0, 1.5])),
    "falling ramp": (ValueError, "steps: .*rising", lambda: S.edm_grid([1.0, 0.0])),
    "NaN ramp": (ValueError, "steps: .*rising", lambda: S.edm_grid([0.0, NAN])),
    "rising indices": (ValueError, "steps: .*descending", lambda: S.consistency_plan([1, 3, 5])),
    "repeated index": (ValueError, "steps: .*descending", lambda: S.consistency_plan([5, 5])),
    "negative index": (ValueError, "steps: .*descending", lambda: S.consistency_plan([-1])),
    "half an index": (ValueError, "steps: .*descending", lambda: S.consistency_plan([39.5, 2])),
    "index beyond": (ValueError, "steps: .*descending", lambda: S.consistency_plan([40, 2])),
    "no index": (ValueError, "steps: .*descending", lambda: S.consistency_plan([])),
    "too many indices": (ValueError, "at most 40", lambda: S.consistency_plan(41)),
    "no grid": (TypeError, "grid: .*ddim_inverse_grid", lambda: S.ddim_inverse_plan(5)),
    "ipndm steps": (TypeError, "steps: expected an int", lambda: S.ipndm_plan([0.9, 0.5])),
    "ipndm betas": (ValueError, r"betas: .*\[0, 1\]", lambda: S.ipndm_plan(1, betas=[2.0, 0.0])),
    "distilled": (TypeError, "steps", lambda: S.lcm_plan("4")),
    "sigmas shape": (ValueError, "sigmas", lambda: S.SigmaGrid([1.0], [1.0])),
    "sigmas nan": (ValueError, "sigmas", lambda: S.SigmaGrid([1.0], [1.0, float("nan")])),
    "schedule": (ValueError, "'linear'", lambda: S.noise_schedule("square")),
    "table": (
        ValueError,
        "table",
        lambda: P.SolverPlan.from_dict({**S.ddim_plan(2).to_dict(), "table": [[1.0]]}),
    ),
    "slots": (
        ValueError,
        "slots",
        lambda: P.SolverPlan.from_dict({**S.unipc_plan(5).to_dict(), "slots": 9}),
    ),
    "unwritten": (ValueError, "no row wrote", lambda: _unwritten()),
    "noise": (
        ValueError,
        "noise",
        lambda: S.step(S.ddpm_plan(2), S.SolverState(torch.zeros(1, 2)), torch.zeros(1, 2)),
    ),
    "finished": (
        ValueError,
        "finished",
        lambda: S.step(S.ddim_plan(2), S.SolverState(torch.zeros(1, 2), row=2), torch.zeros(1, 2)),
    ),
    "seed and generator": (
        ValueError,
        "seed, generator",
        lambda: S.sample(
            None, S.ddim_plan(2), torch.zeros(1, 2), seed=1, generator=torch.Generator()
        ),
    ),
    "guidance": (
        TypeError,
        "cond, uncond",
        lambda: S.sample(lambda x, t: x, S.ddim_plan(2), torch.zeros(1, 2), guidance=2.0),
    ),
    "int x": (
        TypeError,
        "x_T",
        lambda: S.sample(None, S.ddim_plan(2), torch.zeros(1, 2, dtype=torch.int64)),
    ),
    "callback": (
        TypeError,
        "callback: expected a SolverState or None, got int 5",
        lambda: S.sample(_linear_model, S.ddim_plan(2), torch.zeros(1, 2), callback=lambda *_: 5),
    ),
    "state": (
        TypeError,
        "state: expected a SolverState or None, got int 5",
        lambda: S.sample(_linear_model, S.ddim_plan(2), torch.zeros(1, 2), state=5),
    ),
    "no model": (TypeError, "model", lambda: S.sample(None, S.ddim_plan(2), torch.zeros(1, 2))),
    "generators": (
        ValueError,
        "generator: .*one per sample",
        lambda: S.sample(
            _linear_model, S.ddpm_plan(2), torch.zeros(1, 2), generator=[torch.Generator()] * 2
        ),
    ),
    "stride": (ValueError, "grid: .*250 apart", lambda: S.pndm_plan([900, 700, 500, 100])),
    "rising alpha": (ValueError, "alpha_bar: .*fall", lambda: S.NoiseSchedule([0.1, 0.5])),
    "no schedule": (TypeError, "schedule: ", lambda: S.alpha_grid(4, [])),
    "half an offset": (TypeError, "offset", lambda: S.alpha_grid(4, offset=1.5)),
    "teacher's steps": (
        ValueError,
        "original_steps",
        lambda: S.distilled_timesteps(4, original_steps=5000),
    ),
    "strength": (ValueError, "strength", lambda: S.distilled_timesteps(4, strength=2.0)),
    "sigma_min NaN": (
        ValueError,
        "sigma_min",
        lambda: S.sigma_grid(4, kind="karras", sigma_min=NAN),
    ),
    "terminal": (ValueError, "terminal", lambda: S.flow_grid(4, terminal=2.0)),
    "no T": (ValueError, "T: ", lambda: S.flow_sigma_grid(4, T=0)),
    "wide mu": (ValueError, "mu: ", lambda: S.flow_grid(4, mu=1000.0)),
    "negative shift": (ValueError, "shift: ", lambda: S.time_shift(0.5, shift=-1.0)),
    "wide number": (ValueError, "eta: ", lambda: S.ddim_plan(4, eta=10**400)),
    "no x": (TypeError, "x_T", lambda: S.sample(None, S.ddim_plan(2), [0.0])),
    "no plan": (TypeError, "plan", lambda: S.sample(None, None, torch.zeros(1, 2))),
    "generator": (
        TypeError,
        "generator",
        lambda: S.sample(None, S.ddim_plan(2), torch.zeros(1, 2), generator="cpu"),
    ),
}


def _unwritten():
    d = S.dpm_solver_plan(5).to_dict()
    d["index"][0][P.WRITE_1] = 0
    return P.SolverPlan.from_dict(d)


def test_given_timesteps_lead_to_the_next_of_them():
    """A number of steps goes by T // N, as diffusers'; of a list that has no meaning."""
    alpha_bar = S.noise_schedule().alpha_bar
    plan = S.ddim_plan([900, 500, 100])
    x = torch.ones(1, 1)
    for row, (t, to) in enumerate([(900, alpha_bar[500]), (500, alpha_bar[100]), (100, 1.0)]):
        table = torch.tensor(plan.table, dtype=torch.float32)
        got = genfast.diffusion_step(x, torch.zeros(1, 1), table, row).item()
        assert got == pytest.approx(math.sqrt(to / alpha_bar[t]), rel=1e-6)
    listed = S.alpha_grid(10).timesteps
    assert S.ddim_plan(listed) == S.ddim_plan(10) and S.pndm_plan(listed) == S.pndm_plan(10)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    error, match, call = BAD[case]
    with pytest.raises(error, match=match):
        call()


# --------------------------------------------------------------------------------------------------
# the loop


def _linear_model(x, t):
    return 0.3 * x + 0.01 * torch.sin(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: S.ddpm_plan(6),
        lambda: S.euler_ancestral_plan(6),
        lambda: S.unipc_plan(6),
        lambda: S.heun_plan(6),
        lambda: S.dpm_solver_plan(6, algorithm="sde-dpmsolver++"),
        lambda: S.dpm_sde_plan(6),
        lambda: S.flow_match_euler_plan(6, stochastic=True),
    ],
    ids=["ddpm", "euler_a", "unipc", "heun", "dpm2m_sde", "dpm_sde", "flow_sde"],
)
def test_sample_is_a_function_of_the_seed(make):
    plan = make()
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))
    a = genfast.sample(_linear_model, plan, x, seed=7)
    assert torch.equal(a, S.sample(_linear_model, plan, x, seed=7)) and a.shape == x.shape
    stochastic = any(plan.needs_noise(r) for r in range(len(plan)))
    assert torch.equal(a, S.sample(_linear_model, plan, x, seed=8)) != stochastic
    seeds = torch.tensor(
        [3, 7, 9]
    )  # one per sample: a row of the batch is a function of its own seed
    b = S.sample(_linear_model, plan, x, seed=seeds)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(b[order], S.sample(_linear_model, plan, x[order], seed=seeds[order]))


@pytest.mark.parametrize(
    "name, step_kw",
    [
        ("DDPM", {}),
        ("EulerAncestralDiscrete", {}),
        ("DDIM", dict(eta=1.0)),
        ("SASolver", {}),
        ("LCM", {}),
        ("KDPM2AncestralDiscrete", {}),
    ],
)
def test_generator_stream_is_that_of_diffusers(name, step_kw):
    """Same torch.Generator, same images: count, order and dtype of the draws agree."""
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    diffusers.logging.set_verbosity_error()
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    scheduler.set_timesteps(7)
    x_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * float(
        scheduler.init_noise_sigma
    )
    x, g = x_T, torch.Generator().manual_seed(5)
    for t in scheduler.timesteps:
        x = scheduler.step(
            _linear_model(scheduler.scale_model_input(x, t), t), t, x, generator=g, **step_kw
        ).prev_sample
    plan = plan_from_config(
        f"{name}Scheduler",
        dict(scheduler.config),
        7,
        alphas_cumprod=scheduler.alphas_cumprod.double(),
        **step_kw,
    )
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

    out = S.sample(
        model,
        plan,
        x,
        guidance=3.0,
        callback=lambda r, s: seen.append((r, s.denoised.shape)),
        progress=True,
    )
    assert seen == [(r, x.shape) for r in range(5)]
    torch.testing.assert_close(out, S.sample(lambda x, t: 2.0 * _linear_model(x, t), plan, x))
    stopped = []
    S.sample(_linear_model, plan, x, callback=lambda r, s: stopped.append(s) if r == 2 else None)
    resumed = S.sample(_linear_model, plan, x, state=stopped[0])
    assert torch.equal(resumed, S.sample(_linear_model, plan, x))


def test_respaced_sigmas_of_zero_snr_begin_at_the_last_timestep():
    """The 4096 that stands for a zero alpha_bar there is less than the sigmas before it."""
    schedule = S.noise_schedule("linear", 1000, 1e-4, 0.02, zero_snr=True)
    assert schedule.sigmas[-1] < schedule.sigmas[-2]
    for kind in ("karras", "exponential", "beta", "lu"):
        for N in (1, 2, 10):
            t = S.sigma_grid(N, schedule, kind=kind, range_of="table").timesteps
            assert t[0] == 999 and (np.diff(t) < 0).all()
            np.testing.assert_allclose(t[-1], 0 if N > 1 else 999, atol=1e-9)
