"""The drop-in schedulers against diffusers. About 60 s.

Truth of one step: the diffusers class rebuilt in float64 (peers.py), given this scheduler's own
tables, history, sample, model output and noise.
"""

import copy
import inspect
import itertools
import pickle
import sys

import numpy as np
import pytest
import torch
from peers import (
    FILES,
    cases,
    close,
    double_class,
    extra_cases,
    make,
    pairwise,
    peer,
    run,
    started,
    takes_generator,
)  # fmt: skip

diffusers = pytest.importorskip("diffusers", exc_type=ImportError)

import genfast  # noqa: E402
from genfast.integrations import diffusers as dropin  # noqa: E402
from genfast.integrations.diffusers import base, rows  # noqa: E402

diffusers.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("one_thread"),  # tiny tensors
]

NAMES = list(FILES)
#: tables that become the truth's, in float64
TABLES = (
    "alphas_cumprod", "final_alpha_cumprod", "initial_alpha_cumprod", "sigmas", "sigmas_interpol",
    "sigmas_up", "sigmas_down", "betas", "alphas", "timesteps",
)  # fmt: skip
#: history that becomes the truth's before every step
STATE = (
    "model_outputs", "ets", "derivatives", "last_sample", "last_noise", "sample",
    "prev_derivative", "cur_sample", "cur_model_output",
)  # fmt: skip
COUNTERS = (
    "_step_index", "lower_order_nums", "this_order", "this_predictor_order",
    "this_corrector_order", "counter", "timestep_list",
)  # fmt: skip
STOCHASTIC = [n for n in NAMES if takes_generator(n)]


def doubled(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list):
        return [doubled(v) for v in value]
    return value


def ulps(got, truth, least=0.0):
    """Largest error in rounding steps of got's dtype at the largest value of truth (or least)."""
    if truth.isnan().any():  # diffusers' own 0 / 0, or the root of a rounding error
        return 0.0 if torch.isfinite(got).all() else np.inf
    top = max(truth.abs().max().item(), least) or 1.0
    step = torch.finfo(got.dtype).eps * 2.0 ** np.floor(np.log2(top))
    return (got.double() - truth).abs().max().item() / step


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a slice": lambda x: torch.stack([x, x], -1)[..., 0],
}
SHAPES = [(2, 3, 5, 7), (1, 3, 4, 4), (3, 3, 1, 9)]
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16]


def stored_errors(got, scheduler, want, truth, least=0.0):
    """ulps of every output and every stored tensor."""
    errors = {key: ulps(got[key], want[key], least) for key in got.keys()}
    for attribute in STATE:
        a, b = getattr(scheduler, attribute, None), getattr(truth, attribute, None)
        pairs = [(a, b)] if isinstance(a, torch.Tensor) else []
        if isinstance(a, list):
            pairs = list(zip(a[::-1], b[::-1], strict=False))  # IPNDM's is longer there
        found = [ulps(u, v, least) for u, v in pairs if u is not None]
        if found:
            errors[attribute] = max(found)
    return errors


@pytest.mark.parametrize("name", NAMES)
def test_each_step_against_float64(name, monkeypatch):
    """Outputs and stored tensors within 2 ulp, over the pairwise-covering grid of options, walking
    through dtypes, shapes and strides."""
    mine = [c for c in itertools.chain(extra_cases(), cases()) if c[0] == name]
    drawn, asked = [], []

    def record(shape, generator=None, device=None, dtype=None, layout=None):
        drawn.append(torch.randn(tuple(shape), generator=generator, dtype=dtype))
        return drawn[-1]

    def replay(shape, **_):
        asked.append(tuple(shape))
        return drawn[-1].double()

    monkeypatch.setattr(base, "randn_tensor", record)
    cls, module = double_class(name)
    monkeypatch.setattr(module, "randn_tensor", replay, raising=False)
    kernel, terms = rows._step_row, []

    def watched(table, row, outputs, x, m, *rest):
        """The kernel, noting the largest of the terms it sums."""
        c = table[row].double().abs()
        sizes = [t.abs().max().item() for t in (x, m)]
        sizes.append(c[:2] @ torch.tensor(sizes, dtype=torch.float64))
        largest = (c[6:].reshape(3, 10)[:outputs, :3] * torch.tensor(sizes)).max().item()
        terms.append(max(largest, sizes[2].item()))
        return kernel(table, row, outputs, x, m, *rest)

    monkeypatch.setattr(rows, "_step_row", watched)
    shipped = getattr(diffusers, f"{name}Scheduler")
    monkeypatch.setattr(sys.modules[shipped.__module__], "randn_tensor", lambda *_, **__: drawn[-1],
                        raising=False)  # fmt: skip
    checked = 0
    walk = itertools.count()
    for _, config, n, set_kw, step_kw in pairwise(mine):
        k = next(walk)
        dtype, shape = DTYPES[k % 4], SHAPES[k % 3]
        layout = list(LAYOUTS.values())[k // 2 % 3]
        g = started(peer(getattr(dropin, f"{name}Scheduler"), config), n, set_kw)
        t = started(peer(cls, config), n, set_kw)
        if len(g.timesteps) > 1 and g.timesteps[0] == g.timesteps[1]:  # else diffusers starts at 1
            g.set_begin_index(0), t.set_begin_index(0)
        for table in TABLES:
            if isinstance(getattr(g, table, None), torch.Tensor):
                setattr(t, table, doubled(getattr(g, table)))
        if config.get("trained_betas") is not None and name == "IPNDM":
            t.betas = g.betas.double()
        learned = 2 if "learned" in (config.get("variance_type") or "") else 1
        gen = torch.Generator().manual_seed(k)
        x = layout(torch.randn(shape, generator=gen).to(dtype))
        for i, time in enumerate(times := g.timesteps.clone()):
            case = f"{name} {config} N={n} {set_kw} {step_kw} {dtype} {shape} t={time}"
            for attribute in (*STATE, *COUNTERS):
                if attribute in vars(g):
                    setattr(t, attribute, doubled(getattr(g, attribute)))
            if "Heun" in name:
                t.dt = None if g.dt is None else torch.tensor(g._genfast_dt[1], dtype=torch.float64)
            channels = (shape[0], learned * shape[1], *shape[2:])
            m = layout(torch.randn(channels, generator=gen).to(dtype))
            drawn.clear(), asked.clear()
            before = {k: list(v) if isinstance(v, list) else v for k, v in vars(g).items()}
            if 5 < i < len(times) - 5 and i % 9 > 1:  # the middle of long runs is all alike
                x = layout(g.step(m, time, x, **step_kw).prev_sample)
                continue
            if hasattr(g, "scale_model_input"):
                scaled = t.scale_model_input(x.double(), doubled(time))
                assert ulps(g.scale_model_input(x, time), scaled) <= 2, case
            got = g.step(m, time, x, **step_kw)
            want = t.step(m.double(), doubled(time), x.double(), **step_kw)
            assert g.genfast_fallback is None, f"{case}: {g.genfast_fallback}"
            assert len(drawn) == len(asked) <= 1, case
            assert list(got.keys()) == list(want.keys())
            errors = stored_errors(got, g, want, t)
            if max(errors.values()) > 2 and dtype == torch.float32:
                # fp32 cancels here (an amplifying noise level, a clamp): judged by diffusers' error
                y = object.__new__(shipped)
                vars(y).update(before)
                theirs = stored_errors(y.step(m, time, x, **step_kw), y, want, t)
                errors = {k: v - 2 * theirs[k] if v > 2 else v for k, v in errors.items()}
                if config.get("clip_sample", name in ("DDPM", "DDIM", "DDIMInverse")):
                    # a bound on x0 keeps x - x0 from being folded: 2 ulp of the largest term
                    bounded = stored_errors(got, g, want, t, terms[-1])
                    errors = {k: min(v, bounded[k]) for k, v in errors.items()}
            for key, error in errors.items():
                assert error <= 2, f"{case}: {key} {error:.2f} ulp"
            checked += 1
            for count in COUNTERS[:-1]:
                assert getattr(g, count, None) == getattr(t, count, None), case
            x = layout(got.prev_sample)
    assert checked


def test_a_learned_variance_is_as_exact_as_diffusers(monkeypatch):
    """The last step's smallest log variance is log(1e-20): half of it times fp32's rounding is 10
    ulp in the exponential, for anybody. One draw compares luck; 200 compare the arithmetic."""
    config = dict(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False,
                  variance_type="learned_range")  # fmt: skip
    cls, module = double_class("DDPM")
    shipped = diffusers.DDPMScheduler
    shape, ours, theirs = (1, 3, 4, 4), [], []
    for seed in range(200):
        gen = torch.Generator().manual_seed(seed)
        x, z = (torch.randn(shape, generator=gen) for _ in range(2))
        m = torch.randn((1, 6, 4, 4), generator=gen)
        draws = {base: z, module: z.double(), sys.modules[shipped.__module__]: z}
        for place, noise in draws.items():
            monkeypatch.setattr(place, "randn_tensor", lambda *_, noise=noise, **__: noise)
        g, t, y = (started(peer(c, config), 3) for c in (dropin.DDPMScheduler, cls, shipped))
        t.alphas_cumprod, t.betas = g.alphas_cumprod.double(), g.betas.double()
        t.alphas = g.alphas.double()
        time = g.timesteps[2]
        truth = t.step(m.double(), time, x.double()).prev_sample
        ours.append(ulps(g.step(m, time, x).prev_sample, truth))
        theirs.append(ulps(y.step(m, time, x).prev_sample, truth))
    assert np.median(theirs) > 4  # the case is what it says
    assert np.median(ours) <= 1.25 * np.median(theirs)
    assert max(ours) <= 1.25 * max(theirs)


# --------------------------------------------------------------------------------------------------
# against the class as shipped


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["one", "list"])
def test_runs_and_torch_stream(name, kind):
    """Whole loops agree, and the generators end in the same state: same count, order and dtype of
    draws, also where a coefficient is 0."""

    def generators():
        many = [torch.Generator().manual_seed(s) for s in (5, 6)]
        return many if kind == "list" else many[0]

    if name not in STOCHASTIC:
        if kind == "list":
            return
        close(run(make(name)), run(make(name, library=diffusers)))
        return
    mine, theirs = generators(), generators()
    close(run(make(name), generator=mine), run(make(name, library=diffusers), generator=theirs))
    for a, b in zip(*((g if kind == "list" else [g]) for g in (mine, theirs)), strict=True):
        assert torch.equal(a.get_state(), b.get_state())
    torch.manual_seed(3)
    a = run(make(name))
    torch.manual_seed(3)
    close(a, run(make(name, library=diffusers)))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_draw_dtype_in_half_precision(name):
    """bf16: the same generator state and output dtypes, images within bf16."""
    ga, gb = (torch.Generator().manual_seed(5) for _ in range(2))
    a = run(make(name), generator=ga, dtype=torch.bfloat16)
    b = run(make(name, library=diffusers), generator=gb, dtype=torch.bfloat16)
    assert torch.equal(ga.get_state(), gb.get_state())
    assert a.dtype == b.dtype
    assert (a - b).abs().max() <= 0.15 * max(b.abs().max(), 1)


@pytest.mark.parametrize("name", NAMES)
def test_output_and_state_dtypes(name):
    """Sample and model output of different dtypes: those of the outputs as in diffusers."""
    for dtypes in itertools.product([torch.float32, torch.bfloat16], repeat=2):
        schedulers = [started(make(name, library=lib), 4) for lib in (dropin, diffusers)]
        for t in schedulers[0].timesteps[:3]:
            x, m = (torch.randn(1, 3, 4, 4, dtype=d) for d in dtypes)
            a, b = (s.step(m, t, x) for s in schedulers)
            assert type(a) is type(b)
            assert {k: v.dtype for k, v in a.items()} == {k: v.dtype for k, v in b.items()}
            tuples = [s.step(m, t, x, return_dict=False) for s in map(copy.deepcopy, schedulers)]
            assert [v.dtype for v in tuples[0]] == [v.dtype for v in tuples[1]]
            for key in ("prev_sample", *a.keys()):
                assert getattr(a, key) is a[key]


@pytest.mark.parametrize("dtypes", [*itertools.product([torch.float32, torch.bfloat16], repeat=2)])
@pytest.mark.parametrize(
    "name, config, set_kw",
    [  # the estimate of x0 is x itself, or the model output itself
        ("DDIMInverse", dict(clip_sample=False), dict(num_inference_steps=5)),
        ("LCM", dict(clip_sample=False), dict(timesteps=[999, 0])),
        ("DDIM", dict(clip_sample=False, prediction_type="sample"), dict(num_inference_steps=5)),
        ("HeunDiscrete", dict(prediction_type="sample"), dict(num_inference_steps=5)),
    ],
)
def test_estimates_that_are_an_input(name, config, set_kw, dtypes):
    mine, theirs = (started(make(name, config, lib), None, set_kw) for lib in (dropin, diffusers))
    for t in mine.timesteps[:3]:
        x, m = (torch.randn(1, 3, 4, 4, dtype=d) for d in dtypes)
        a, b = (
            s.step(m, t, x, **({"generator": torch.manual_seed(1)} if name in STOCHASTIC else {}))
            for s in (mine, theirs)
        )
        assert mine.genfast_fallback is None
        for key in b.keys():
            close(a[key], b[key], 2e-5 if set(dtypes) == {torch.float32} else 0.02)


@pytest.mark.parametrize(
    "name, config",
    [
        ("DEISMultistep", dict(use_flow_sigmas=True, prediction_type="v_prediction")),
        (
            "UniPCMultistep",
            dict(predict_x0=False, thresholding=True, final_sigmas_type="sigma_min"),
        ),
        ("EulerDiscrete", dict(interpolation_type="log_linear", use_karras_sigmas=True)),
    ],
)
def test_options_together(name, config):
    mine = make(name, config)
    close(run(mine), run(make(name, config, diffusers)), 1e-4)  # DEIS's own fp32: 3e-5
    assert mine.genfast_fallback is None


SDE = [
    dict(algorithm_type="sde-dpmsolver++", prediction_type=p, final_sigmas_type="sigma_min")
    for p in ("epsilon", "sample")
]
EPS_SDE = dict(SDE[0], algorithm_type="sde-dpmsolver")
#: where the options decide what the noise is like
DRAWS = [
    *((n, {}, {}) for n in ("DDPM", "KDPM2AncestralDiscrete", "LCM", "TCD", "FlowMatchLCM")),
    ("DDPM", dict(variance_type="learned_range"), {}),
    ("DDIM", {}, dict(eta=1.0)),
    ("EulerDiscrete", {}, dict(s_churn=1.0)),
    *(("DPMSolverMultistep", c, {}) for c in (*SDE, EPS_SDE)),
    *(("DPMSolverSinglestep", c, {}) for c in SDE),
    ("EDMDPMSolverMultistep", dict(algorithm_type="sde-dpmsolver++"), {}),
    ("FlowMatchEulerDiscrete", dict(stochastic_sampling=True), {}),
]


@pytest.mark.parametrize("batches", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("name, config, step_kw", DRAWS)
def test_noise_where_sample_and_model_output_broadcast(name, config, step_kw, batches):
    outs, channels = [], 6 if "variance_type" in config else 3
    for library in (dropin, diffusers):
        s, g = started(make(name, config, library), 4), torch.Generator().manual_seed(3)
        torch.manual_seed(0)
        for t in s.timesteps[:2]:
            x = torch.randn(batches[0], 3, 4, 4)
            m = torch.randn(batches[1], channels, 4, 4)
            outs.append(s.step(m, t, x, generator=g, **step_kw).prev_sample)
        outs.append(g.get_state())
    for a, b in zip(outs[:2], outs[3:5], strict=True):
        close(a, b)
    assert torch.equal(outs[2], outs[5])


@pytest.mark.parametrize("name", NAMES)
def test_begin_index_and_repeated_steps(name):
    """Started in the middle (image to image), then a step with a timestep again."""
    if name == "PNDM":
        config = dict(skip_prk_steps=True)
    else:
        config = {}
    outs = []
    for library in (dropin, diffusers):
        s = started(make(name, config, library), 8)
        if hasattr(s, "set_begin_index"):
            s.set_begin_index(2)
        g = torch.Generator().manual_seed(0)
        x = torch.randn(1, 3, 4, 4, generator=g)
        torch.manual_seed(0)
        got = []
        for t in [*s.timesteps[2:5], s.timesteps[4], *s.timesteps[5:-1]]:
            x = s.step(torch.randn(1, 3, 4, 4, generator=g), t, x).prev_sample
            got.append(x)
        outs.append(got)
    for a, b in zip(*outs, strict=True):
        close(a, b)


def test_signatures_are_supersets():
    """Pipelines look arguments up by name in the signatures."""
    for name in NAMES:
        mine, theirs = (getattr(lib, f"{name}Scheduler") for lib in (dropin, diffusers))
        assert issubclass(mine, theirs) and mine.__name__ == theirs.__name__
        for method in ("step", "add_noise", "set_timesteps", "scale_noise", "get_velocity"):
            assert hasattr(mine, method) == hasattr(theirs, method)
            if hasattr(theirs, method):
                a, b = (list(inspect.signature(getattr(c, method)).parameters)
                        for c in (mine, theirs))  # fmt: skip
                assert a[: len(b)] == b
                assert a[len(b) :] in ([], ["seed"])
        for p, q in zip(
            *(inspect.signature(c.step).parameters.values() for c in (mine, theirs)), strict=False
        ):
            assert p.default == q.default


# --------------------------------------------------------------------------------------------------
# attributes


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "UniPCMultistep", "DEISMultistep",
                                  "SASolver", "DPMSolverSinglestep", "IPNDM", "LMSDiscrete",
                                  "PNDM", "HeunDiscrete", "FlowMatchHeunDiscrete",
                                  "KDPM2Discrete"])  # fmt: skip
def test_history_written_between_steps_is_used(name):
    """The same edit of the history has the same effect as in diffusers."""
    outs = []
    for library in (dropin, diffusers):
        s = started(make(name, library=library), 8)
        g, torch_seed = torch.Generator().manual_seed(0), torch.manual_seed(0)
        x, got = torch.randn(1, 3, 4, 4, generator=g), []
        for i, t in enumerate(s.timesteps[:6]):
            x = s.step(torch.randn(1, 3, 4, 4, generator=g), t, x).prev_sample
            got.append(x)
            if i == 2:
                for attribute in STATE:
                    value = getattr(s, attribute, None)
                    if isinstance(value, list) and value and value[-1] is not None:
                        value[-1] = value[-1] * 0.5
                    elif isinstance(value, torch.Tensor):
                        setattr(s, attribute, value + 1)
        assert torch_seed is not None
        outs.append(got)
    assert not torch.equal(outs[0][2], outs[0][3])
    for a, b in zip(*outs, strict=True):
        close(a, b)


@pytest.mark.parametrize("how", ["in place", "assigned", "config"])
@pytest.mark.parametrize("name", ["EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DDIM"])
def test_edited_tables_and_configs_are_noticed(name, how):
    outs = []
    for library in (dropin, diffusers):
        s = started(make(name, library=library), 6)
        g = torch.Generator().manual_seed(0)
        x = torch.randn(1, 3, 4, 4, generator=g)
        for i, t in enumerate(s.timesteps):
            x = s.step(torch.randn(1, 3, 4, 4, generator=g), t, x).prev_sample
            table = "alphas_cumprod" if name == "DDIM" else "sigmas"
            if i == 1 and how == "in place":
                getattr(s, table).mul_(0.9)
            elif i == 1 and how == "assigned":
                setattr(s, table, getattr(s, table) * 0.9)
            elif i == 1:
                s.register_to_config(prediction_type="v_prediction")
        outs.append(x)
    close(*outs)
    assert not torch.equal(outs[0], run(make(name)))


def test_under_inference_mode():
    with torch.inference_mode():
        for name in ("DDIM", "EulerDiscrete", "KDPM2Discrete", "UniPCMultistep", "PNDM"):
            close(run(make(name)), run(make(name, library=diffusers)))


@pytest.mark.parametrize(
    "name", ["DDIM", "EulerDiscrete", "UniPCMultistep", "HeunDiscrete", "PNDM"]
)
def test_inside_a_compiled_loop(name):
    """Rows are made outside the graph: Dynamo would trace the planner's NumPy and fail."""

    def loop(s, x):
        for t in s.timesteps[:3]:
            x = s.step(torch.tanh(x), t, x).prev_sample
        return x

    x = torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    compiled = torch.compile(loop, backend="eager")
    close(compiled(started(make(name), 5), x), loop(started(make(name), 5), x))


def test_gradients_flow_through_a_step():
    for name in ("DDIM", "EulerDiscrete", "DPMSolverMultistep", "FlowMatchEulerDiscrete"):
        found = []
        for library in (dropin, diffusers):
            s = started(make(name, library=library), 5)
            g = torch.Generator().manual_seed(0)
            x, m = (torch.randn(1, 3, 4, 4, generator=g).requires_grad_() for _ in range(2))
            y = s.step(m * 2, s.timesteps[0], x).prev_sample
            y = s.step(m * 3, s.timesteps[1], y).prev_sample
            found.append(torch.autograd.grad((y**2).sum(), (x, m)))
        for a, b in zip(*found, strict=True):
            close(a, b, 1e-4)


# --------------------------------------------------------------------------------------------------
# what diffusers gets wrong, and what runs in its own code


def test_sde_of_order_three():
    for name, algorithm in (
        ("DPMSolverMultistep", "sde-dpmsolver"),
        ("EDMDPMSolverMultistep", "sde-dpmsolver++"),
    ):
        config = dict(algorithm_type=algorithm, solver_order=3, final_sigmas_type="sigma_min")
        s = make(name, config)
        assert torch.isfinite(run(s, 20)).all() and s.genfast_fallback is None
        with pytest.raises(UnboundLocalError):
            run(make(name, config, diffusers), 20)


def test_fixed_large_log():
    a = run(make("DDPM", dict(variance_type="fixed_large_log")), generator=torch.manual_seed(0))
    b = run(
        make("DDPM", dict(variance_type="fixed_large"), diffusers), generator=torch.manual_seed(0)
    )
    close(a, b)
    assert run(make("DDPM", dict(variance_type="fixed_large_log"), diffusers)).isnan().any()


def test_ipndm_keeps_what_it_reads():
    s = make("IPNDM")
    run(s, 12)
    assert len(s.ets) == 4


def test_diffusers_own_code_where_no_row_can():
    x, m = torch.randn(2, 1, 6), torch.randn(2, 1, 6)
    outs = []
    for library in (dropin, diffusers):
        s = started(make("FlowMatchEulerDiscrete", library=library), 4)
        tokens = torch.rand(1, 2, generator=torch.manual_seed(0)) * 1000
        out = s.step(m, s.timesteps[0], x, per_token_timesteps=tokens.expand(2, 2)[:, :1])
        outs.append(out.prev_sample)
        if library is dropin:
            assert "token" in s.genfast_fallback
    close(*outs)
    inner = diffusers.DPMSolverMultistepScheduler()
    s = make("UniPCMultistep", dict(solver_p=inner))
    close(run(s), run(make("UniPCMultistep", dict(solver_p=inner), diffusers)))
    assert "solver_p" in s.genfast_fallback
    s = make("DDIM", dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"))
    close_nan = run(s, 3), run(make("DDIM", dict(s.config), diffusers), 3)
    assert torch.allclose(*close_nan, equal_nan=True, rtol=1e-4)
    assert "not finite" in s.genfast_fallback


@pytest.mark.parametrize("name", NAMES)
def test_integers_are_diffusers_own(name):
    """A sample, a model output or both of integers: its numbers, dtypes and errors, in its code."""
    whole, real = torch.int64, torch.float32
    for kinds in ((whole, whole), (whole, real), (real, whole)):
        found = []
        for library in (dropin, diffusers):
            s, g, steps = started(make(name, library=library), 4), torch.Generator(), []
            torch.manual_seed(0)
            g.manual_seed(0)
            for t in s.timesteps[:3]:
                x, m = ((3 * torch.randn(1, 3, 4, 4, generator=g)).to(kind) for kind in kinds)
                try:
                    steps.append(s.step(m, t, x))
                except Exception as error:  # noqa: BLE001  noise of an integer dtype
                    steps.append({"error": str(error)})
                    break
            found.append(steps)
            if library is dropin:
                assert s.genfast_fallback == "an integer sample or model output"
        for a, b in zip(*found, strict=True):
            assert dict(a).keys() == dict(b).keys()
            for key, value in b.items():
                if key == "error":
                    assert a[key] == value
                else:
                    assert a[key].dtype == value.dtype and torch.equal(a[key], value), key


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_diffusers_own(name):
    """No set_timesteps, integer timesteps, unknown timesteps, too many steps: same exception."""
    x = torch.randn(1, 3, 4, 4)

    def attempt(library, what):
        s = make(name, library=library)
        try:
            if what != "unset":
                started(s, 4)
            if what == "too many":
                for t in [*s.timesteps, s.timesteps[-1]]:
                    s.step(x, t, x)
            t = {"integer": 1, "unknown": torch.tensor(0.123)}.get(what, s.timesteps)
            t = t if t is None or not isinstance(t, torch.Tensor) or t.ndim == 0 else t[0]
            s.step(x, t, x)
        except Exception as error:  # noqa: BLE001
            return type(error)

    for what in ("unset", "integer", "unknown", "too many"):
        assert attempt(dropin, what) is attempt(diffusers, what), what


# --------------------------------------------------------------------------------------------------
# seeds, forward process, storage


@pytest.mark.parametrize("name", STOCHASTIC)
def test_seed_needs_no_generator(name):
    """Same seed, same image, for any batch size; torch's generator untouched."""
    kw = dict(eta=1.0) if name == "DDIM" else {}
    state = torch.random.get_rng_state()
    s = make(name)
    s.genfast_seed = torch.tensor([7, 8])
    both = run(s, **kw)
    assert torch.equal(torch.random.get_rng_state(), state)
    s = make(name)
    s.genfast_seed = torch.tensor([7, 8])
    assert torch.equal(run(s, **kw), both)
    if name in ("EulerDiscrete", "EDMEuler", "FlowMatchHeunDiscrete", "FlowMatchEulerDiscrete",
                "DPMSolverMultistep", "DPMSolverSinglestep", "EDMDPMSolverMultistep"):  # fmt: skip
        return  # deterministic by default
    assert not torch.equal(run(make(name), seed=11, **kw), both)
    with pytest.raises(ValueError, match="seed, generator"):
        s = started(make(name), 4)
        x = torch.randn(1, 3, 4, 4)
        for t in s.timesteps[:2]:
            s.step(x, t, x, generator=torch.Generator(), seed=1, **kw)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_seeded_noise_is_that_of_seed_and_step(name, monkeypatch):
    """The noise drawn inside the kernel is genfast.randn's, given as a tensor."""
    kw = dict(eta=1.0) if name == "DDIM" else {}
    config = dict(algorithm_type="sde-dpmsolver++") if "DPMSolver" in name else {}
    x, m = torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 5)
    for at in (1, 2):
        a, b = started(make(name, config), 4), started(make(name, config), 4)
        for i, t in enumerate(a.timesteps[: at + 1]):

            def same(shape, i=i, **_):
                return genfast.randn(shape, seed=7, stream=i)

            monkeypatch.setattr(base, "randn_tensor", same)
            got, want = a.step(m, t, x, seed=7, **kw), b.step(m, t, x, **kw)
            assert a.genfast_fallback is None
            assert torch.equal(got.prev_sample, want.prev_sample)


def test_timesteps_edited_in_place_are_looked_up_again():
    found = []
    for library in (dropin, diffusers):
        s = started(make("EulerDiscrete", library=library), 10)
        x, z, t = torch.ones(2, 1, 2), torch.ones(2, 1, 2), s.timesteps[[2, 5]].clone()
        before = s.add_noise(x, z, t)
        s.timesteps[[2, 5]] = s.timesteps[[5, 2]]
        after = s.add_noise(x, z, t)
        assert torch.equal(before, after.flip(0))
        found.append(after)
    close(*found)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("DDIMInverse", "IPNDM")])
def test_add_noise(name):
    """float32: equal to diffusers; bf16: within 2 ulp of the float32 answer (diffusers is not)."""
    method = "scale_noise" if name.startswith("FlowMatch") else "add_noise"
    for begin in (None, 1):
        mine, theirs = (started(make(name, library=lib), 10) for lib in (dropin, diffusers))
        t = mine.timesteps[[1, 4, 8]]
        if name == "FlowMatchHeunDiscrete":
            t = mine.timesteps[3]
        if begin is not None and hasattr(mine, "set_begin_index"):
            mine.set_begin_index(begin), theirs.set_begin_index(begin)
        x, z = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)

        def call(s, x, z, t=t):
            return s.scale_noise(x, t, z) if method == "scale_noise" else s.add_noise(x, z, t)

        want = call(theirs, x, z)
        close(call(mine, x, z), want, 1e-6)
        exact = call(theirs, x.bfloat16().float(), z.bfloat16().float())
        assert ulps(call(mine, x.bfloat16(), z.bfloat16()), exact.double()) <= 2
        if hasattr(theirs, "get_velocity"):
            close(mine.get_velocity(x, z, t), theirs.get_velocity(x, z, t), 1e-6)


def test_bf16_training_noise_is_not_lost():
    """In bf16 diffusers gives some timesteps of the linear schedule no noise at all."""
    t = torch.arange(20)
    x, z = torch.zeros(20, 1, 2, 2, dtype=torch.bfloat16), torch.ones(20, 1, 2, 2).bfloat16()
    assert (make("DDPM", library=diffusers).add_noise(x, z, t) == 0).any()
    assert (make("DDPM").add_noise(x, z, t) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_save_load_copy_pickle(name, tmp_path):
    theirs = make(name, library=diffusers)
    theirs.save_pretrained(tmp_path)
    mine = getattr(dropin, f"{name}Scheduler").from_pretrained(tmp_path)
    assert type(mine) is getattr(dropin, f"{name}Scheduler")
    mine.save_pretrained(tmp_path / "again")
    back = getattr(diffusers, f"{name}Scheduler").from_pretrained(tmp_path / "again")
    plain = [{k: v for k, v in c.items() if k[0] != "_"} for c in (back.config, mine.config)]
    assert plain == [{k: v for k, v in theirs.config.items() if k[0] != "_"}] * 2
    again = type(mine).from_config(theirs.config)
    torch.manual_seed(0)
    want = run(mine)
    copies = [again, copy.deepcopy(mine)]
    if name != "SASolver":  # diffusers' lambda cannot be pickled
        copies.append(pickle.loads(pickle.dumps(mine)))
    for other in copies:
        torch.manual_seed(0)
        assert torch.equal(run(other), want)
