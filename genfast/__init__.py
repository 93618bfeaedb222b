"""genfast: fused attention, diffusion noise scheduling and reparameterized sampling for PyTorch."""

from importlib.metadata import version as _version

from genfast.accelerate import accelerate, restore
from genfast.ops._backend import backend, set_backend
from genfast.ops._force import get_backend
from genfast.ops.attention import (
    attention,
    attention_varlen,
    attention_with_kvcache,
    scaled_dot_product_attention,
)
from genfast.ops.convolution import conv2d, residual_conv2d, upsampled_conv2d
from genfast.ops.diffusion import (
    add_noise,
    denoising_loss,
    diffusion_step,
    dynamic_threshold,
    guidance_weights,
    guide,
    scale_model_input,
    scale_noise,
    step_log_prob,
    velocity,
)
from genfast.ops.filtering import (
    bias_act,
    downsample2d,
    filter2d,
    gated_act,
    setup_filter,
    upfirdn2d,
    upsample2d,
)
from genfast.ops.linear import linear
from genfast.ops.normalization import group_norm, layer_norm, rms_norm
from genfast.ops.rng import NOISE_VERSION, rand, rand_like, randint, randn, randn_like
from genfast.ops.sampling import (
    bernoulli_nll,
    gaussian_kl,
    gumbel_softmax,
    log_normal,
    relaxed_bernoulli,
    reparameterize,
    sample_categorical,
    sample_tokens,
    tanh_normal,
)
from genfast.schedulers.sample import sample

__version__ = _version("genfast")

__all__ = [
    "NOISE_VERSION",
    "accelerate",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "add_noise",
    "backend",
    "bernoulli_nll",
    "bias_act",
    "conv2d",
    "denoising_loss",
    "diffusion_step",
    "downsample2d",
    "dynamic_threshold",
    "filter2d",
    "gated_act",
    "gaussian_kl",
    "get_backend",
    "group_norm",
    "guidance_weights",
    "guide",
    "gumbel_softmax",
    "layer_norm",
    "linear",
    "log_normal",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "relaxed_bernoulli",
    "reparameterize",
    "residual_conv2d",
    "restore",
    "rms_norm",
    "sample",
    "sample_categorical",
    "sample_tokens",
    "scale_model_input",
    "scale_noise",
    "scaled_dot_product_attention",
    "set_backend",
    "setup_filter",
    "step_log_prob",
    "tanh_normal",
    "upfirdn2d",
    "upsample2d",
    "upsampled_conv2d",
    "velocity",
]
