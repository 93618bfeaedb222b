"""Models of two kinds joined in one."""

from genfast.models.hybrid.vae_gan import VAEGAN

__all__ = ["VAEGAN"]
