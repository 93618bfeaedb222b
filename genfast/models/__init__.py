"""Models on the fused ops: plain nn.Modules in their papers' letters, each with a `config`."""

from genfast.models.vae import VAE

__all__ = ["VAE"]
