"""CLIPGuide: a CLIP as the guide of a diffusion model that knows no texts.

    eps_hat = eps - s sigma_t grad_x_t e^tau z_i(x0(x_t)) z_t

Nichol et al., "GLIDE", 2022, section 2.3, with x0 in place of x_t: this CLIP has seen noise, but no
time. `genfast.models.Diffusion.sample(guide=CLIPGuide(clip, ids), guide_scale=s)`; the gradient is
one more model output of the affine step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.models.hybrid.clip import CLIP


class CLIPGuide:
    """clip: in eval mode; ids (P, S) int64: prompts. Image i is guided to prompt i % P.

    Called with x0 (B, C, H, W) in [-1, 1] and index (B,): ln p(prompt | x0) but for a constant,
    (B,).
    """

    def __init__(self, clip: CLIP, ids: Tensor):
        if not len(ids):
            raise ValueError("ids: expected at least one prompt (P, S), got none")
        with torch.no_grad():
            self.z_t = clip.encode_text(ids)
        self.clip = clip.requires_grad_(False)

    def __call__(self, x0: Tensor, index: Tensor) -> Tensor:
        return self.clip.log_p((x0 + 1) / 2, self.z_t[index % len(self.z_t)])
