"""LatentDiffusion: a DiT on the latents of a frozen autoencoder.

Rombach et al., "High-resolution image synthesis with latent diffusion models", 2022: diffusion in
the space of z = (draw of q(z|x) - mean) / std, decoded at the end. Both the posterior's noise and
the diffusion's come from the sample's seed. On condition "image" it is the decoder of Ramesh et
al., "Hierarchical text-conditional image generation with CLIP latents", 2022, section 2.1.
"""

from __future__ import annotations

from torch import Tensor

from genfast.models.hybrid.autoencoder import KLAutoencoder
from genfast.models.hybrid.diffusion import POSTERIOR, DiTDiffusion, frozen
from genfast.ops._noise import Seed
from genfast.ops.sampling import reparameterize


class LatentDiffusion(DiTDiffusion):
    """autoencoder: the config of a `KLAutoencoder`, whose weights are put in with `adopt`. The
    others: of `DiTDiffusion`, whose `sample`, `loss` and `plan` it has; images in [0, 1] outside,
    latents within. Its defaults differ: patches of one latent, and prediction v (Salimans & Ho,
    "Progressive distillation", 2022): latents have no bound to clamp x0 to, and an error of eps is
    multiplied by 1 / alpha, 20,000 at the noisy end, where v's is not.
    """

    _bounded = False

    def __init__(self, autoencoder: dict, patch: int = 1, prediction: str = "v_prediction", **dit):
        stage = frozen(KLAutoencoder, autoencoder)
        super().__init__(stage.z_shape, patch, prediction=prediction, **dit)
        self.autoencoder = stage
        del self.config["shape"]
        self.config["autoencoder"] = stage.config

    def _enter(self, x: Tensor, seed: Seed) -> Tensor:
        mu, logvar = self.autoencoder.encode(x)
        return self.autoencoder.standard(reparameterize(mu, logvar, seed=seed, stream=POSTERIOR))

    def _leave(self, x0: Tensor) -> Tensor:
        return self.autoencoder.image(x0)
