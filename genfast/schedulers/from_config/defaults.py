"""Defaults of the configs of diffusers' schedulers, by group."""

from __future__ import annotations

import math

BETAS = dict(
    num_train_timesteps=1000,
    beta_start=0.0001,
    beta_end=0.02,
    beta_schedule="linear",
    trained_betas=None,
    rescale_betas_zero_snr=False,
    prediction_type="epsilon",
)
CLIP = dict(clip_sample=False, clip_sample_range=1.0)
THRESHOLD = dict(thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0)
SPACING = dict(timestep_spacing="linspace", steps_offset=0)
SIGMAS = dict(
    use_karras_sigmas=False,
    use_exponential_sigmas=False,
    use_beta_sigmas=False,
    use_lu_lambdas=False,
    use_flow_sigmas=False,
    flow_shift=1.0,
    sigma_min=None,
    sigma_max=None,
)
EDM = dict(
    sigma_min=0.002,
    sigma_max=80.0,
    sigma_data=0.5,
    sigma_schedule="karras",
    rho=7.0,
    prediction_type="epsilon",
    final_sigmas_type="zero",
    num_train_timesteps=1000,
)
FLOW = dict(
    num_train_timesteps=1000,
    shift=1.0,
    use_dynamic_shifting=False,
    invert_sigmas=False,
    shift_terminal=None,
    use_karras_sigmas=False,
    use_exponential_sigmas=False,
    use_beta_sigmas=False,
    time_shift_type="exponential",
    stochastic_sampling=False,
    scale_factors=None,
)
DPM = dict(
    solver_order=2,
    algorithm_type="dpmsolver++",
    solver_type="midpoint",
    lower_order_final=True,
    euler_at_final=False,
    final_sigmas_type="zero",
    lambda_min_clipped=-math.inf,
    variance_type=None,
)
DISTILLED = {
    **BETAS,
    **CLIP,
    **THRESHOLD,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}
HEUN = {**BETAS, **SPACING, **SIGMAS, **CLIP, "beta_start": 0.00085, "beta_end": 0.012}
LAMBDA = {**BETAS, **SPACING, **SIGMAS, **THRESHOLD, **DPM}
