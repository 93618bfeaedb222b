"""CLIPGuide: a CLIP as the guide of a diffusion model that knows no texts.

    eps_hat = eps - s sigma_t grad_x_t mean_k e^tau z_i(a_k(x0(x_t))) z_t

Nichol et al., "GLIDE", 2022, section 2.3, with x0 in place of x_t: this CLIP has seen noise, but no
time. a_k: the changes that its training images went through, K of them, as Crowson et al., "VQGAN-
CLIP", 2022, section 2.1, average over cut-outs: of one view alone the gradient soon finds what CLIP
takes for the prompt and no eye does. `genfast.models.Diffusion.sample(guide=CLIPGuide(clip, ids),
guide_scale=s)`; the gradient is one more model output of the affine step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.models.hybrid.clip import CLIP
from genfast.ops import _check


class CLIPGuide:
    """clip: in eval mode; it is frozen. ids (P, S) int64: prompts. Image i is guided to prompt
    i % P; its K = `views` are functions of i alone.

    Called with x0 (B, C, H, W) in [-1, 1] and index (B,): ln p(prompt | x0) but for a constant,
    (B,).
    """

    def __init__(self, clip: CLIP, ids: Tensor, views: int = 8):
        if not len(ids):
            raise ValueError("ids: expected at least one prompt (P, S), got none")
        _check.counts(views=views)
        with torch.no_grad():
            self.z_t = clip.encode_text(ids)
        self.clip, self.views = clip.requires_grad_(False), views

    def __call__(self, x0: Tensor, index: Tensor) -> Tensor:
        K = self.views
        x = ((x0 + 1) / 2).repeat_interleave(K, 0)
        seeds = (index[:, None] * K + torch.arange(K, device=index.device)).flatten()
        z_t = self.z_t[index % len(self.z_t)].repeat_interleave(K, 0)
        return self.clip.log_p(self.clip.augment(x, seeds), z_t).view(-1, K).mean(1)
