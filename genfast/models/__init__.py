"""Models on the fused ops: plain nn.Modules in their papers' letters, each with a `config`."""

from genfast.models.diffusion import Diffusion, UNet
from genfast.models.vae import VAE, ConvVAE

__all__ = ["VAE", "ConvVAE", "Diffusion", "UNet"]
