"""diffusers for the tests: its classes in float64, and the grid of options that is covered."""

import importlib
import inspect
import itertools
import sys
import types

import numpy as np
import pytest
import torch

N_GRID = [1, 2, 3, 10, 14, 15, 50]
SHAPE = (2, 3, 4, 2)

FILES = dict(
    DDPM="ddpm",
    DDIM="ddim",
    DDIMInverse="ddim_inverse",
    PNDM="pndm",
    IPNDM="ipndm",
    EulerDiscrete="euler_discrete",
    EulerAncestralDiscrete="euler_ancestral_discrete",
    HeunDiscrete="heun_discrete",
    KDPM2Discrete="k_dpm_2_discrete",
    KDPM2AncestralDiscrete="k_dpm_2_ancestral_discrete",
    LMSDiscrete="lms_discrete",
    DPMSolverMultistep="dpmsolver_multistep",
    DPMSolverSinglestep="dpmsolver_singlestep",
    DEISMultistep="deis_multistep",
    UniPCMultistep="unipc_multistep",
    SASolver="sasolver",
    LCM="lcm",
    TCD="tcd",
    CMStochasticIterative="consistency_models",
    EDMEuler="edm_euler",
    EDMDPMSolverMultistep="edm_dpmsolver_multistep",
    FlowMatchEulerDiscrete="flow_match_euler_discrete",
    FlowMatchHeunDiscrete="flow_match_heun_discrete",
    FlowMatchLCM="flow_match_lcm",
)
# With a plan but no drop-in: torchsde's tree draws their noise.
BROWNIAN = dict(
    DPMSolverSDE="dpmsolver_sde",
    CosineDPMSolverMultistep="cosine_dpmsolver_multistep",
)


class Brownian:
    """Stands for that tree: `draw` gives increments of one path from a sigma down. A second
    interval from the same sigma holds the first."""

    def __init__(self, draw):
        self.draw, self.sigma = draw, None

    def __call__(self, sigma, to):
        z = self.draw()
        if sigma == self.sigma:
            shared = (sigma - self.to) / (sigma - to)
            return shared.sqrt() * self.z + (1 - shared).sqrt() * z
        self.sigma, self.to, self.z = sigma, to, z
        return z


def double_class(name, _cache={}):  # noqa: B006
    """The diffusers class computing in float64 throughout, and the module it lives in."""
    if name not in _cache:
        pytest.importorskip("diffusers", exc_type=ImportError)
        file = {**FILES, **BROWNIAN}[name]
        with pytest.MonkeyPatch.context() as patch:
            if name in BROWNIAN:
                patch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
            original = importlib.import_module(f"diffusers.schedulers.scheduling_{file}")
            module = types.ModuleType(f"{original.__name__}_float64")
            module.__package__ = original.__package__
            module.__file__ = original.__file__
            sys.modules[module.__name__] = module  # dataclasses look their module up
            source = inspect.getsource(original).replace("float32", "float64")
            exec(compile(source, original.__file__, "exec"), module.__dict__)
        _cache[name] = getattr(module, f"{name}Scheduler"), module
    return _cache[name]


def peer(cls, config):
    """The scheduler object. Constructors that lay out all 1000 timesteps first (80 ms in KDPM2) are
    spared it: the tests set timesteps themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "set_timesteps", lambda self, *_: setattr(self, "sigmas", _EMPTY))
        return cls(**config)


_EMPTY = torch.zeros(0)
VP_PRED = ["epsilon", "sample", "v_prediction"]
SPACING = ["linspace", "leading", "trailing"]
KINDS = [
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
]
BETA = ["linear", "scaled_linear", "squaredcos_cap_v2"]


def cases():
    """(class, config, N, set_timesteps arguments, step arguments). Full products of the axes that
    interact in a class; the remaining axes are walked through cyclically, so every value meets
    every class (and nearly every pair occurs)."""
    cycle = itertools.count()

    def walk(*values):
        return values[next(cycle) % len(values)]

    for n, pred in itertools.product(N_GRID, VP_PRED):
        base = dict(prediction_type=pred)
        for spacing in SPACING:
            b = dict(
                base, timestep_spacing=spacing, beta_schedule=walk(*BETA), steps_offset=walk(0, 1)
            )
            clip = dict(clip_sample=walk(True, False), clip_sample_range=walk(1.0, 2.0))
            variances = ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"]
            yield "DDPM", {**b, **clip, "variance_type": walk(*variances)}, n, {}, {}
            yield (
                "DDIM",
                {**b, **clip, "set_alpha_to_one": walk(True, False)},
                n,
                {},
                dict(eta=walk(0.0, 0.5, 1.0), use_clipped_model_output=walk(False, True)),
            )
            if spacing != "linspace" and not (pred == "sample"):
                yield "DDIMInverse", {**b, **clip, "set_alpha_to_one": walk(True, False)}, n, {}, {}
            if pred != "sample":
                yield "PNDM", {**b, "skip_prk_steps": n < 4 or walk(True, False)}, n, {}, {}
                yield "EulerAncestralDiscrete", b, n, {}, {}
            churn = walk(
                {}, dict(s_churn=2.0, s_noise=1.1), dict(s_churn=40.0, s_tmin=0.5, s_tmax=10.0)
            )
            yield (
                "EulerDiscrete",
                {**b, "final_sigmas_type": walk("zero", "sigma_min")},
                n,
                {},
                churn,
            )
            for kind in KINDS:
                b = dict(base, timestep_spacing=spacing, beta_schedule=walk(*BETA[:2]), **kind)
                final = walk("zero", "sigma_min")
                yield "EulerDiscrete", {**b, "final_sigmas_type": final}, n, {}, churn
                yield "HeunDiscrete", {**b, **clip}, n, {}, {}
                yield "LMSDiscrete", b, n, {}, dict(order=walk(1, 2, 3, 4))
                if pred != "sample":
                    yield "KDPM2Discrete", b, n, {}, {}
                    yield "KDPM2AncestralDiscrete", b, n, {}, {}
                    yield "DPMSolverSDE", b, n, {}, dict(s_noise=0.9 if n % 2 else 1.0)
    flow = [{"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}]
    for n, kind, order in itertools.product(N_GRID, KINDS + flow, [1, 2, 3]):
        flowing = "use_flow_sigmas" in kind
        for pred in ["flow_prediction"] if flowing else VP_PRED:
            b = dict(
                timestep_spacing=walk(*SPACING),
                beta_schedule=walk(*BETA[:2]),
                steps_offset=walk(0, 1),
            )
            b = {**b, **kind, "prediction_type": pred, "solver_order": order}
            end = dict(
                lower_order_final=walk(True, True, False),
                final_sigmas_type=walk("zero", "sigma_min"),
            )
            for algorithm in ["dpmsolver++", "sde-dpmsolver++"]:
                yield (
                    "DPMSolverMultistep",
                    {
                        **b,
                        **end,
                        "algorithm_type": algorithm,
                        "euler_at_final": walk(False, True),
                        "solver_type": walk("midpoint", "heun"),
                    },
                    n,
                    {},
                    {},
                )
                single = {
                    k: v for k, v in b.items() if k not in ("timestep_spacing", "steps_offset")
                }
                # the peer has no noise level below the last one when two blocks meet at N < order
                yield (
                    "DPMSolverSinglestep",
                    {
                        **single,
                        **end,
                        "algorithm_type": algorithm,
                        "solver_type": walk("midpoint", "heun"),
                    },
                    n,
                    {},
                    {},
                )
            if not flowing:
                eps = {
                    **b,
                    "final_sigmas_type": "sigma_min",
                    "solver_type": walk("midpoint", "heun"),
                }
                yield "DPMSolverMultistep", {**eps, "algorithm_type": "dpmsolver"}, n, {}, {}
                if order < 3:
                    yield (
                        "DPMSolverMultistep",
                        {**eps, "algorithm_type": "sde-dpmsolver"},
                        n,
                        {},
                        {},
                    )
                eps = {
                    k: v for k, v in eps.items() if k not in ("timestep_spacing", "steps_offset")
                }
                yield "DPMSolverSinglestep", {**eps, "algorithm_type": "dpmsolver"}, n, {}, {}
            if not (
                "use_flow_sigmas" in kind and n >= 15
            ):  # h = 0 with order > 1 divides by zero there
                yield "DEISMultistep", {**b, "lower_order_final": True}, n, {}, {}
            for bh in ["bh1", "bh2"]:
                final = walk("zero", "sigma_min")
                yield (
                    "UniPCMultistep",
                    {
                        **b,
                        "solver_type": bh,
                        "predict_x0": walk(True, True, False) or flowing,
                        "final_sigmas_type": final,
                        "disable_corrector": walk([], [], [0, 2]),
                    },
                    n,
                    {},
                    {},
                )
            sa = {k: v for k, v in b.items() if k != "solver_order"}
            data = "data_prediction" if flowing else walk("data_prediction", "noise_prediction")
            yield (
                "SASolver",
                {
                    **sa,
                    "predictor_order": order,
                    "corrector_order": walk(1, 2, 3, 4),
                    "algorithm_type": data,
                },
                n,
                {},
                {},
            )
    for n, pred in itertools.product(N_GRID, VP_PRED):
        b = dict(prediction_type=pred, clip_sample=walk(True, False))
        yield "LCM", b, n, {}, {}
        yield "TCD", b, n, {}, dict(eta=walk(0.0, 0.3, 1.0))
    for n in N_GRID:
        yield "CMStochasticIterative", dict(clip_denoised=walk(True, False)), min(n, 40), {}, {}
        yield "IPNDM", {}, n, {}, {}
        yield (
            "FlowMatchHeunDiscrete",
            dict(shift=walk(1.0, 3.0)),
            n,
            {},
            walk({}, dict(s_churn=2.0, s_noise=1.1)),
        )
        for pred, schedule in itertools.product(
            ["epsilon", "v_prediction"], ["karras", "exponential"]
        ):
            b = dict(
                prediction_type=pred,
                sigma_schedule=schedule,
                final_sigmas_type=walk("zero", "sigma_min"),
            )
            if n > 1 or schedule == "karras":
                yield "EDMEuler", b, n, {}, walk({}, dict(s_churn=2.0))
            if n == 1 and schedule == "exponential":
                continue  # the peer starts at sigma_min then
            for order, algorithm in [
                (1, "dpmsolver++"),
                (2, "dpmsolver++"),
                (3, "dpmsolver++"),
                (1, "sde-dpmsolver++"),
                (2, "sde-dpmsolver++"),
            ]:
                yield (
                    "EDMDPMSolverMultistep",
                    dict(
                        b,
                        algorithm_type=algorithm,
                        solver_order=order,
                        solver_type=walk("midpoint", "heun"),
                    ),
                    n,
                    {},
                    {},
                )
            for order in (1, 2):
                config = dict(b, solver_order=order, solver_type=("heun", "midpoint")[n % 2])
                yield "CosineDPMSolverMultistep", config, n, {}, {}
        for kind in KINDS:
            shift = walk(
                dict(shift=3.0),
                dict(use_dynamic_shifting=True, time_shift_type=walk("exponential", "linear")),
            )
            mu = dict(mu=0.7) if "use_dynamic_shifting" in shift else {}
            b = {**kind, **shift, "shift_terminal": walk(None, 0.1) if n > 1 else None}
            yield (
                "FlowMatchEulerDiscrete",
                {
                    **b,
                    "stochastic_sampling": walk(False, True),
                    "invert_sigmas": walk(False, False, True),
                },
                n,
                mu,
                {},
            )
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
    for name in [
        "DDPM",
        "DDIM",
        "LCM",
        "TCD",
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "DPMSolverMultistep",
        "UniPCMultistep",
    ]:
        yield name, dict(v, rescale_betas_zero_snr=True, timestep_spacing="trailing"), 7, {}, {}
    for name in ["DPMSolverMultistep", "DPMSolverSinglestep", "SASolver"]:
        yield name, dict(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1), 12, {}, {}
    yield "DPMSolverMultistep", dict(use_lu_lambdas=True), 12, {}, {}
    yield (
        "DPMSolverMultistep",
        dict(use_karras_sigmas=True, beta_schedule="squaredcos_cap_v2"),
        12,
        {},
        {},
    )
    yield (
        "DPMSolverMultistep",
        dict(algorithm_type="deis", solver_type="bh2", final_sigmas_type="sigma_min"),
        5,
        {},
        {},
    )
    yield (
        "EulerDiscrete",
        dict(
            v, timestep_type="continuous", sigma_min=0.002, sigma_max=700.0, use_karras_sigmas=True
        ),
        9,
        {},
        {},
    )
    yield "EulerDiscrete", dict(interpolation_type="log_linear"), 9, {}, dict(s_churn=1.0)
    for name in [
        "DDPM",
        "DDIM",
        "LCM",
        "DPMSolverMultistep",
        "UniPCMultistep",
        "DEISMultistep",
        "SASolver",
    ]:
        yield (
            name,
            dict(thresholding=True, sample_max_value=2.0, dynamic_thresholding_ratio=0.9),
            6,
            {},
            {},
        )
    yield (
        "DPMSolverMultistep",
        dict(algorithm_type="dpmsolver", thresholding=True, final_sigmas_type="sigma_min"),
        6,
        {},
        {},
    )
    yield "EDMDPMSolverMultistep", dict(thresholding=True, sample_max_value=2.0), 6, {}, {}
    yield "UniPCMultistep", dict(solver_order=4), 12, {}, {}
    for schedule in ["sigmoid", "laplace"]:
        yield "DDPM", dict(beta_schedule=schedule), 8, {}, {}
    yield "HeunDiscrete", dict(beta_schedule="exp"), 8, {}, {}
    for name in ["DDIM", "EulerDiscrete", "DPMSolverMultistep"]:
        yield (
            name,
            dict(trained_betas=np.linspace(0.001, 0.05, 100).tolist(), num_train_timesteps=100),
            9,
            {},
            {},
        )
        yield name, dict(num_train_timesteps=37, timestep_spacing="trailing"), 5, {}, {}
    yield (
        "DDPM",
        dict(variance_type="learned"),
        1,
        {},
        {},
    )  # with more steps the peer roots negative numbers here


def pairwise(all_cases):
    """The cases that show a pair of values (config attributes, N, options) not seen before in their
    class.
    """
    seen = set()
    for case in all_cases:
        name, config, n, set_kw, step_kw = case
        values = [("N", n), *config.items(), *set_kw.items(), *step_kw.items()]
        pairs = {
            (name, *pair) for pair in itertools.combinations_with_replacement(map(repr, values), 2)
        }
        if not pairs <= seen:
            seen |= pairs
            yield case


# ---- whole runs ----------------------------------------------------------------------------------


def make(name, config=None, library=None):
    """The drop-in scheduler of this name, or diffusers' own where that is `library`."""
    library = library or importlib.import_module("genfast.integrations.diffusers")
    return getattr(library, f"{name}Scheduler")(**(config or {}))


def takes_generator(name):
    scheduler = getattr(importlib.import_module("diffusers"), f"{name}Scheduler")
    return "generator" in inspect.signature(scheduler.step).parameters


def started(scheduler, n, set_kw=None):
    if n is not None:
        scheduler.set_timesteps(n, **(set_kw or {}))
    else:
        scheduler.set_timesteps(**set_kw)
    if hasattr(scheduler, "is_scale_input_called"):
        scheduler.is_scale_input_called = True
    return scheduler


def run(scheduler, n=6, generator=None, seed=11, dtype=torch.float32, shape=(2, 3, 6, 5), **kw):
    """The whole loop with a fixed fake model; returns the last sample."""
    started(scheduler, n)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g).to(dtype) * float(getattr(scheduler, "init_noise_sigma", 1))
    if generator is not None:
        kw["generator"] = generator
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(torch.tanh(scaled * 0.7 + 0.1), t, x, **kw).prev_sample
    return x


def close(a, b, rtol=2e-5):
    assert a.dtype == b.dtype and a.shape == b.shape
    error = (a - b).abs().max().item()
    assert error <= rtol * max(b.abs().max().item(), 1e-3), error
