"""Models on the fused ops: plain nn.Modules in their papers' letters, each but the networks
UNet and DiT with a `config`."""

from genfast.models.diffusion import Diffusion
from genfast.models.gan import DCGAN, GAN, WGAN, WGANGP, CycleGAN
from genfast.models.hybrid import (
    CLIP,
    VAEGAN,
    DiffusionPrior,
    DiT,
    DiTDiffusion,
    KLAutoencoder,
    LatentDiffusion,
)
from genfast.models.stylegan import StyleGAN2
from genfast.models.transformer import BERT, GPT, T5, ViT
from genfast.models.unet import UNet
from genfast.models.vae import VAE, ConvVAE

__all__ = [
    "BERT", "CLIP", "DCGAN", "GAN", "GPT", "T5", "VAE", "VAEGAN", "WGAN", "WGANGP", "ConvVAE",
    "CycleGAN", "DiT", "DiTDiffusion", "Diffusion", "DiffusionPrior", "KLAutoencoder",
    "LatentDiffusion", "StyleGAN2", "UNet", "ViT",
]  # fmt: skip
