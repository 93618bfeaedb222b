"""Models on the fused ops. `MODELS`: the table behind `genfast train NAME`."""

from genfast.models.vae import VAE

MODELS = {"vae": VAE}

__all__ = ["MODELS", "VAE"]
