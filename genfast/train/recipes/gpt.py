"""gpt: `genfast.models.GPT` on the bytes of a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from genfast.metrics import text as metrics
from genfast.models.transformer import GPT
from genfast.train import text
from genfast.train.recipe import Batch, Option, Split
from genfast.train.recipes.text import TextRecipe

# Rows of one step of `generate`: makes the bits of sample i independent of --batch-size.
TILE = 8


class GPTRecipe(TextRecipe):
    model = GPT
    settings = {"epochs": 8, "batch_size": 16, "lr": 2e-3, "clip": 1.0, "weight_decay": 0.1,
                "patience": 2}  # fmt: skip
    options = TextRecipe.options | {
        "positions": Option("rotary", "rotary or learned"),
        "norm": Option("rms", "rms or layer"),
        "activation": Option("swiglu", "swiglu, geglu, gelu, gelu_tanh or relu"),
        "kv_heads": Option(0, "heads of keys and values; 0: as many as heads"),
    }
    sample_options = {
        "prompt": Option("", "text to go on from"),
        "tokens": Option(0, "bytes to write, at most; 0: as many as the context holds"),
        "temperature": Option(0.8, "0: greedy"),
        "top_k": Option(0, "keep the k likeliest; 0: all"),
        "top_p": Option(0.95, "keep the likeliest that make up this probability"),
    }

    def build(self, about: dict, options: dict) -> GPT:
        options = options | {"kv_heads": options["kv_heads"] or None}
        return GPT(about["vocab"], **options)

    def loss(self, model: GPT, batch: Batch, seeds: Tensor) -> Tensor:
        return model.loss(batch[0])

    def sample(self, model: GPT, about, count, seed, start, options) -> list[str]:
        """Prompt and continuation, up to the end of the document."""
        options = dict(options)
        prompt, tokens = options.pop("prompt"), options.pop("tokens")
        ids = torch.tensor([text.EOS, *text.encode(prompt)])
        tokens = tokens or max(model.context - len(ids), 0)
        found = model.generate(
            ids.expand(count, -1),
            tokens,
            seed=seed,
            start=start,
            eos=text.EOS,
            tile=TILE,
            **options,
        )
        return [prompt + text.decode(y.tolist()) for y in found]

    def unread(self, model: GPT) -> Sequence[str]:
        return tuple(self.sample_options)

    @torch.no_grad()
    def evaluate(self, model: GPT, data: Split, seed, count, options) -> dict[str, float]:
        total, n = 0.0, 0
        for index in torch.arange(len(data.test)).split(32):
            (ids,) = data.test[index]
            real = ids[:, 1:] != text.PAD
            total += model.nll(ids)[real].sum(dtype=torch.float64).item()
            n += int(real.sum())
        written = text.decode(data.test.ids.tolist())
        return {
            "bits_per_byte": metrics.bits_per_byte(total, written),
            "perplexity": metrics.perplexity(total, n),
            "tokens": n,
        }

    def finish(self, model: GPT, data: Split, seed: int, out: Path) -> list[str]:
        options = {name: option.default for name, option in self.sample_options.items()}
        samples = self.sample(model, data.about, 4, seed, 0, options)
        self.write([samples], out / "samples.txt", data.about, {"seed": seed, **options})
        return ["samples.txt", "samples.txt.json"]
