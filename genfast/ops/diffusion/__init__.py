"""diffusion: the solver step, the forward process, guidance, thresholds and the training loss."""

from genfast.ops.diffusion.forward import add_noise, scale_model_input, scale_noise, velocity
from genfast.ops.diffusion.guidance import guidance_weights, guide
from genfast.ops.diffusion.log_prob import step_log_prob
from genfast.ops.diffusion.loss import denoising_loss
from genfast.ops.diffusion.step import diffusion_step
from genfast.ops.diffusion.threshold import dynamic_threshold

__all__ = [
    "add_noise",
    "denoising_loss",
    "diffusion_step",
    "dynamic_threshold",
    "guidance_weights",
    "guide",
    "scale_model_input",
    "scale_noise",
    "step_log_prob",
    "velocity",
]
