"""Hybrids: models made of two kinds of model."""

from genfast.models.hybrid.autoencoder import KLAutoencoder
from genfast.models.hybrid.clip import CLIP
from genfast.models.hybrid.diffusion import DiTDiffusion
from genfast.models.hybrid.dit import DiT
from genfast.models.hybrid.guidance import CLIPGuide
from genfast.models.hybrid.latent import LatentDiffusion
from genfast.models.hybrid.prior import DiffusionPrior
from genfast.models.hybrid.vae_gan import VAEGAN

__all__ = [
    "CLIP",
    "CLIPGuide",
    "DiT",
    "DiTDiffusion",
    "DiffusionPrior",
    "KLAutoencoder",
    "LatentDiffusion",
    "VAEGAN",
]
