"""diffusion in Triton; each launcher takes the arguments of the native entry point of its name."""

from .forward import diffusion_mix
from .loss import denoising_loss
from .reduce import dynamic_threshold, guidance_weights
from .step import diffusion_step, diffusion_step_backward

__all__ = [
    "denoising_loss",
    "diffusion_mix",
    "diffusion_step",
    "diffusion_step_backward",
    "dynamic_threshold",
    "guidance_weights",
]
