"""The diffusion family against its reference, and the reference against autograd and its peers."""

import math
from functools import partial

import draws
import numpy as np
import pytest
import torch

from genfast import schedulers as S
from genfast.reference import diffusion as R
from genfast.schedulers import plan as P

F64 = torch.float64
draw = partial(draws.draw, dtype=F64)


# --------------------------------------------------------------------------------------------------
# the step


def _row(plan, r=2):
    history = [draw(2, 3, 4, seed=10 + k) for k in range(plan.slots)]
    return torch.from_numpy(plan.table[r].copy()), history


PLANS = {
    "ddpm clipped": lambda: S.ddpm_plan(6, clip=0.8),
    "unipc3": lambda: S.unipc_plan(15, order=3),
    "dpm sde": lambda: S.dpm_solver_plan(6, algorithm="sde-dpmsolver++"),
    "lcm": lambda: S.lcm_plan(4),
}


@pytest.mark.parametrize("name", PLANS)
def test_step_differentiates_twice(name):
    plan = PLANS[name]()
    coef, history = _row(plan)
    inputs = [draw(2, 3, 4, seed=s).requires_grad_() for s in (1, 2, 3)] + [
        h.requires_grad_() for h in history
    ]

    def f(x, m, z, *H):
        return R.diffusion_step(x, m, coef, history=H, noise=z)

    assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("mode", [1, 2], ids=["learned_range", "learned"])
def test_learned_variance_scales_the_noise(mode):
    plan = S.ddpm_plan(6, variance=("learned_range", "learned")[mode - 1])
    x, m, v, z = draw(2, 3, 4), draw(2, 3, 4, seed=1), draw(2, 3, 4, seed=2), draw(2, 3, 4, seed=3)
    m = m.requires_grad_()
    both = torch.cat([m, v.abs() if mode == 2 else v], 1)
    row = plan.table[1]
    out = R.diffusion_step(x, both, row, noise=z, variance_mode=mode)[0]
    mean = R.diffusion_step(x, both, row, variance_mode=mode)[0]
    tilde, beta = math.exp(row[P.LOGVAR_MIN]), math.exp(row[P.LOGVAR_MAX])
    std = v.abs().sqrt() if mode == 2 else tilde ** ((1 - v) / 4) * beta ** ((1 + v) / 4)
    torch.testing.assert_close(out - mean, std * z)
    assert torch.autograd.gradcheck(
        lambda b: R.diffusion_step(x, b, row, noise=z, variance_mode=mode)[0],
        both.detach().requires_grad_(),
    )


def test_rows_per_token():
    sigmas = S.flow_grid(5).sigmas
    token = sigmas[np.array([[0, 1, 2], [3, 1, 0]])]
    rows = torch.from_numpy(S.flow_match_token_table(sigmas, token))
    x, m = draw(2, 3, 8), draw(2, 3, 8, seed=1)
    out, _, x0 = R.diffusion_step(x, m, rows)
    for b in range(2):
        for i in range(3):
            one = R.diffusion_step(x[b : b + 1, i], m[b : b + 1, i], rows[b, i])
            torch.testing.assert_close(out[b, i], one[0][0], rtol=0, atol=1e-15)
            torch.testing.assert_close(x0[b, i], one[2][0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_keeps_fp32_coefficients(dtype):
    """Within half an ulp of the fp64 value of the same inputs, up to fp32 accumulation."""
    plan = S.dpm_solver_plan(20)
    x, m, h = (draw(2, 3, 64, seed=s, dtype=dtype) for s in (1, 2, 3))
    for r in (1, 10, 19):
        low = R.diffusion_step(x, m, plan.table[r], history=[h])[0]
        exact = R.diffusion_step(x.to(F64), m.to(F64), plan.table[r], history=[h.to(F64)])[0]
        assert low.dtype == dtype
        ulp = torch.finfo(dtype).eps * exact.abs()
        assert (
            (low.to(F64) - exact).abs() <= 0.51 * ulp + 4e-6 * (dtype == torch.float32) + 2e-6
        ).all()


# --------------------------------------------------------------------------------------------------
# forward process


def test_forward_process_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    peer, t = diffusers.DDPMScheduler(), torch.tensor([0, 500, 999])
    a = peer.alphas_cumprod[t].double()
    x0, z = draw(3, 2, 4), draw(3, 2, 4, seed=1)
    alpha, sigma = a.sqrt(), (1 - a).sqrt()
    torch.testing.assert_close(R.add_noise(x0, z, alpha, sigma), peer.add_noise(x0, z, t))
    torch.testing.assert_close(R.velocity(x0, z, alpha, sigma), peer.get_velocity(x0, z, t))
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(4)
    s = flow.sigmas[:3].double()
    torch.testing.assert_close(
        R.add_noise(x0, z, 1 - s, s), flow.scale_noise(x0, flow.timesteps[:3], z)
    )
    edm = diffusers.EulerDiscreteScheduler()
    edm.set_timesteps(4)
    plan = S.plan_from_config("EulerDiscreteScheduler", dict(edm.config), 4)
    torch.testing.assert_close(
        R.scale_model_input(x0, plan.table[0, P.INPUT_SCALE]),
        edm.scale_model_input(x0, edm.timesteps[0]),
        rtol=1e-6,
        atol=0,
    )


# --------------------------------------------------------------------------------------------------
# guidance


def _peers():
    guiders = pytest.importorskip("diffusers.guiders", exc_type=ImportError)
    from diffusers.guiders import adaptive_projected_guidance as a
    from diffusers.guiders import classifier_free_zero_star_guidance as z
    from diffusers.guiders import guider_utils as u
    from diffusers.guiders import tangential_classifier_free_guidance as t

    def zero_star(c, n, w):
        s = z.cfg_zero_star_scale(c.flatten(1), n.flatten(1)).view(-1, 1, 1, 1)
        return n * s + w * (c - n * s)

    assert guiders
    return {
        "rescale": (
            lambda c, n, w: u.rescale_noise_cfg(n + w * (c - n), c, 0.7),
            dict(rescale=0.7),
            1e-12,
        ),
        "apg": (
            lambda c, n, w: a.normalized_guidance(c, n, w, None, 0.3, 5.0),
            dict(eta=0.3, norm_threshold=5.0),
            1e-12,
        ),
        "cfg_zero_star": (zero_star, {}, 1e-5),  # the peer computes in fp32
        "tcfg": (lambda c, n, w: t.normalized_guidance(c, n, w), {}, 1e-4),  # SVD in fp32
    }


@pytest.mark.parametrize("method", ["rescale", "apg", "cfg_zero_star", "tcfg"])
def test_guidance_is_that_of_diffusers(method):
    peer, options, rtol = _peers()[method]
    for seed in range(4):
        c = draw(3, 4, 8, 8, seed=seed)
        u = 0.8 * c + 0.5 * draw(3, 4, 8, 8, seed=seed + 10) * (-1) ** seed
        if seed == 3:  # orthogonal and of one length, to the bit
            c, u = (torch.zeros_like(c).index_fill_(3, torch.tensor(i), 1.0) for i in (0, 1))
        ours = R.guide(c, u, 5.0, method=method, **options)
        torch.testing.assert_close(
            ours, peer(c, u, 5.0), rtol=rtol, atol=rtol * ours.abs().max().item()
        )


@pytest.mark.parametrize("method", R.GUIDANCE)
def test_guidance_properties(method):
    """Per sample (a batch is its samples), differentiable twice, and cond itself when both outputs
    agree.
    """
    options = dict(cfg={}, rescale=dict(rescale=0.5), apg=dict(eta=0.5, norm_threshold=2.0)).get(
        method, {}
    )
    c, u = draw(3, 2, 3), draw(3, 2, 3, seed=1)
    w = torch.tensor([2.0, 5.0, 1.5], dtype=F64)
    whole = R.guide(c, u, w, method=method, **options)
    for b in range(3):
        torch.testing.assert_close(
            whole[b : b + 1],
            R.guide(c[b : b + 1], u[b : b + 1], float(w[b]), method=method, **options),
        )
    args = (c.requires_grad_(), u.requires_grad_())
    f = lambda c, u: R.guide(c, u, w, method=method, **options)  # noqa: E731
    assert torch.autograd.gradcheck(f, args) and torch.autograd.gradgradcheck(f, args)
    if method != "apg":
        torch.testing.assert_close(R.guide(c, c, w, method=method, **options), c)
    assert R.guide(c) is c


def test_combine_is_a_weighted_sum():
    a, b, c = (draw(2, 3, seed=s) for s in range(3))
    g = torch.tensor([1.0, 2.0], dtype=F64)
    torch.testing.assert_close(R.combine([a, b, c], [g, -1.0, 0.5]), g[:, None] * a - b + 0.5 * c)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_dynamic_threshold_is_the_quantile(ratio, n):
    x0 = 3 * draw(4, n)
    expected = torch.quantile(x0.abs(), ratio, dim=1).clamp(1.0, 2.5)
    torch.testing.assert_close(R.dynamic_threshold(x0, ratio, 2.5), expected)
    x0[2, 0] = float("nan")
    assert torch.isnan(R.dynamic_threshold(x0, ratio, 2.5)).tolist() == [False, False, True, False]


# --------------------------------------------------------------------------------------------------
# training


PREDICTIONS = ["epsilon", "sample", "v_prediction", "flow_prediction"]
WEIGHTS = ["none", "min_snr", "p2", "snr", "sigma_sqrt", "cosmap", "edm"]


def _output(prediction, eps_hat, x0_hat, alpha, sigma):
    return {
        "epsilon": eps_hat,
        "sample": x0_hat,
        "v_prediction": alpha * eps_hat - sigma * x0_hat,
        "flow_prediction": eps_hat - x0_hat,
    }[prediction]


@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "flow_prediction"])
def test_min_snr_means_the_same_loss_for_every_prediction(prediction):
    """One belief about x_t, told as different predictions, costs the same under min-SNR."""
    flow = prediction == "flow_prediction"
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    alpha = 1 - sigma if flow else torch.sqrt(1 - sigma**2)
    a, s = alpha[:, None, None], sigma[:, None, None]
    x0, z, guess = draw(3, 2, 4), draw(3, 2, 4, seed=1), draw(3, 2, 4, seed=2)
    x0_hat = (a * x0 + s * z - s * guess) / a
    loss = {
        p: R.denoising_loss(
            _output(p, guess, x0_hat, a, s),
            x0,
            z,
            alpha,
            sigma,
            prediction=p,
            weighting="min_snr",
            reduction="none",
        )
        for p in ("epsilon", prediction)
    }
    torch.testing.assert_close(loss["epsilon"], loss[prediction])


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoising_loss(prediction, weighting):
    sigma = torch.tensor([0.2, 0.7], dtype=F64)
    alpha = torch.sqrt(1 - sigma**2)
    out, x0, z = (
        draw(2, 3, 2).requires_grad_(),
        draw(2, 3, 2, seed=1).requires_grad_(),
        draw(2, 3, 2, seed=2),
    )

    def f(o, x):
        return R.denoising_loss(o, x, z, alpha, sigma, prediction=prediction, weighting=weighting)

    assert torch.autograd.gradcheck(f, (out, x0)) and torch.autograd.gradgradcheck(f, (out, x0))
    per = R.denoising_loss(
        out, x0, z, alpha, sigma, prediction=prediction, weighting=weighting, reduction="none"
    )
    assert per.shape == (2,) and (per > 0).all()
    torch.testing.assert_close(f(out, x0), per.mean())
    perfect = _output(prediction, z, x0, alpha[:, None, None], sigma[:, None, None])
    assert f(perfect, x0).item() == 0.0


def test_step_log_prob_is_the_gaussian_density():
    plan, x, m, z = (
        S.ddim_plan(10, eta=1.0),
        draw(2, 3, 4),
        draw(2, 3, 4, seed=1),
        draw(2, 3, 4, seed=2),
    )
    row = plan.table[3]
    sample, mean = (R.diffusion_step(x, m, row, noise=n)[0] for n in (z, torch.zeros_like(z)))
    std = plan.noise_std(3)
    normal = torch.distributions.Normal(mean, std)
    for reduction in ("mean", "sum"):
        expected = getattr(normal.log_prob(sample).flatten(1), reduction)(1)
        torch.testing.assert_close(
            R.step_log_prob(sample, mean, std, reduction=reduction), expected
        )
    assert torch.autograd.gradcheck(
        lambda m: R.step_log_prob(sample, m, std), mean.requires_grad_()
    )
