"""DiffusionPrior: from a text to the CLIP embedding of an image.

    L = E |f(z_i^(t), t, c) - z_i|^2,  z_i^(t) = alpha_t z_i + sigma_t eps

Ramesh et al., "Hierarchical text-conditional image generation with CLIP latents", 2022, section
2.2: a causal transformer over the text's tokens, its CLIP embedding z_t, the time, the noised z_i
and a last token whose output is z_i; of two draws the one is kept that fits z_t better. f predicts
x0; the noise is squared-cosine and x0 clamped to +-5, as in diffusers' UnCLIPScheduler for this
model. Letters: those of `clip`; embeddings inside are multiplied by sqrt(e), to deviation 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast import schedulers
from genfast.models import _inputs
from genfast.models.hybrid.clip import CLIP
from genfast.models.hybrid.diffusion import frozen, takes_over
from genfast.models.process import NOISE, NoiseProcess
from genfast.models.transformer import blocks
from genfast.models.transformer.blocks import Attention, Block, FeedForward
from genfast.models.unet import timestep_embedding
from genfast.nn.linear import Linear
from genfast.nn.normalization import LayerNorm
from genfast.ops import _check
from genfast.ops._noise import Seed
from genfast.ops.diffusion import denoising_loss

CANDIDATE = 1 << 20  # streams between the draws of one sample
_OWN = 4  # tokens behind the text's: z_t, t, z_i^(t), the last
_CLIP_RANGE = 5.0


class DiffusionPrior(NoiseProcess):
    """clip: the config of a `CLIP`, whose weights are put in with `adopt`. d, layers, heads: of the
    transformer. T, schedule: of `schedulers.noise_schedule`. condition_dropout: share of training
    samples without their text, for guidance.
    """

    TILE = 32

    def __init__(
        self,
        clip: dict,
        d: int = 96,
        layers: int = 3,
        heads: int = 4,
        T: int = 1000,
        schedule: str = "squaredcos_cap_v2",
        condition_dropout: float = 0.1,
    ):
        config = blocks.arguments(locals())
        super().__init__(T, schedule, "sample")
        self.config = config
        _check.counts(d=d, layers=layers, heads=heads)
        if d % 2:  # cos and sin of the time
            raise ValueError(f"d: expected an even number, got {d}")
        _check.number("condition_dropout", condition_dropout, low=0.0, high=1.0)
        self.condition_dropout = condition_dropout
        self.clip = frozen(CLIP, clip)
        e, S = self.clip.e, self.clip.context
        self.of_token, self.of_text = Linear(self.clip.d, d), Linear(e, d)
        self.no_token, self.no_text = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))
        self.time = nn.Sequential(Linear(d, d), nn.SiLU(), Linear(d, d))
        self.of_z, self.last = Linear(e, d), nn.Parameter(torch.empty(d))
        self.positions = nn.Parameter(torch.empty(S + _OWN, d))
        self.blocks = nn.ModuleList(
            Block(Attention(d, heads), FeedForward(d, 4 * d), LayerNorm(d), LayerNorm(d))
            for _ in range(layers)
        )
        self.norm, self.leave = LayerNorm(d), Linear(d, e)
        blocks.initialise(self, layers, std=(2 / (5 * d)) ** 0.5)
        for p in (self.last, self.positions):
            nn.init.normal_(p, std=0.02)

    def adopt(self, clip: CLIP) -> DiffusionPrior:
        """Takes the weights of a trained CLIP over. Returns itself."""
        takes_over("clip", self.clip, clip)
        return self

    def forward(
        self, z: Tensor, t: Tensor, tokens: Tensor, seen: Tensor, z_t: Tensor,
        drop: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The predicted sqrt(e) z_i (B, e) of the noised one z (B, e); t (B,); tokens (B, S, w),
        seen, z_t: of `CLIP.text_tokens`; drop: (B,) bool, the samples that get no text."""
        h, text = self.of_token(tokens), self.of_text(z_t * math.sqrt(self.clip.e))
        if drop is not None:
            h = torch.where(drop[:, None, None], self.no_token, h)
            text = torch.where(drop[:, None], self.no_text, text)
        time = self.time(timestep_embedding(t, self.last.shape[0]).to(z.dtype))
        own = torch.stack([text, time, self.of_z(z), self.last.expand(len(z), -1)], 1)
        x = torch.cat([h, own], 1)
        x = x + torch.cat([self.positions[: h.shape[1]], self.positions[-_OWN:]])
        mask = F.pad(seen, (0, _OWN), value=True)[:, None, None]
        for block in self.blocks:
            x = block(x, mask=mask, causal=True)
        return self.leave(self.norm(x[:, -1]))

    def losses(self, x: Tensor, ids: Tensor, *, seed: Seed) -> Tensor:
        """Of each pair of an image x (B, C, H, W) in [0, 1] and a text ids (B, S), (B,). seed: int,
        or int64 (B,) of one per pair."""
        if len(x) != len(ids):
            raise ValueError(f"ids: expected a text for each of {len(x)} images, got {len(ids)}")
        with torch.no_grad():
            z_i = self.clip.encode_image(x) * math.sqrt(self.clip.e)
            text = self.clip.text_tokens(ids)
        z, t, alpha, sigma = self._noised(z_i, seed)
        m = self(z, t, *text, self._dropped(x, self.condition_dropout, seed))
        return denoising_loss(m, z_i, alpha, sigma, seed=seed, stream=NOISE, prediction="sample",
                              reduction="none")  # fmt: skip

    def plan(self, steps: int | None = None) -> schedulers.SolverPlan:
        """DDPM's, with the clamp of the module's head. steps: 1 ... T, default min(25, T)."""
        return self._plan("ddpm", steps, 25, {"clip_sample_range": _CLIP_RANGE})

    @torch.no_grad()
    def sample(
        self, n: int, seed: int, start: int = 0, *, ids: Tensor, plan=None, guidance: float = 1.0,
        candidates: int = 2,
    ) -> Tensor:  # fmt: skip
        """Image embeddings of length 1 for texts ids (n, S), (n, e): of samples start ...
        start + n - 1 of `seed`, the same bits however they are cut into calls. candidates: draws
        of which the one nearest to z_t is kept. guidance: scale w of uncond + w (cond - uncond),
        1: none."""
        plan, e = self.plan() if plan is None else plan, self.clip.e
        self._check_sampling(n, plan, guidance)
        _inputs.ids("ids", ids, self.clip.config["vocab"], self.clip.context)
        if len(ids) != n:
            raise ValueError(f"ids: expected a text for each of {n} samples, got {len(ids)}")
        _check.counts(candidates=candidates)

        def call(rows: Tensor, seeds: Tensor) -> Tensor:
            text = self.clip.text_tokens(ids[rows])
            model = self._denoiser(self, text, guidance)
            best = fit = None
            for k in range(candidates):
                z = self._solve(model, plan, (e,), seeds, None if guidance == 1 else guidance,
                                k * CANDIDATE)  # fmt: skip
                z = F.normalize(z, dim=-1)
                found = (z * text[-1]).sum(-1)
                better = None if fit is None else found > fit
                best = z if fit is None else torch.where(better[:, None], z, best)
                fit = found if fit is None else torch.maximum(fit, found)
            return best

        return self._in_tiles(call, n, seed, start) if n else self.alpha.new_empty(0, e)
