"""The training loop. The same settings give the same run: every random number is contract noise.

Streams of the run's seed: the seeds of step s's samples have stream s, the shuffle of epoch e
SHUFFLE + e, the seeds of an evaluation EVALUATION.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from genfast.models._seeds import sample_seeds
from genfast.ops.rng import rand
from genfast.train import checkpoint
from genfast.train.recipe import Part, Recipe, Split

SHUFFLE, EVALUATION = 1 << 32, 2 << 32
LOG = "log.jsonl"


class Diverged(RuntimeError):
    """The loss became NaN or infinite; the checkpoint of the best epoch is untouched."""


@dataclass(frozen=True)
class Settings:
    """lr: peak of the schedule. warmup: share of all steps spent rising to it. clip: largest norm
    of the gradient. patience: epochs without a better validation loss before stopping.
    """

    epochs: int = 60
    batch_size: int = 128
    lr: float = 3e-3
    warmup: float = 0.05
    clip: float = 50.0
    patience: int = 8
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not (0 < getattr(self, name) < math.inf):
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup: expected a share in [0, 1], got {self.warmup}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an int in [0, 2**63), got {self.seed}")


def lr_share(step: int, steps: int, warmup: int) -> float:
    """Linear rise over `warmup` steps, then half a cosine down to 0 (Loshchilov & Hutter 2017)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


@torch.no_grad()
def evaluate(
    recipe: Recipe, model: nn.Module, part: Part, seed: int, batch_size: int = 500
) -> float:
    """Mean loss over a part, always with the same noise: sample i's is that of (seed, i)."""
    training = model.training
    model.eval()
    seeds = sample_seeds(len(part), seed, EVALUATION)
    total = 0.0
    for index in torch.arange(len(part)).split(batch_size):
        total += recipe.loss(model, part[index], seeds[index]).item() * len(index)
    model.train(training)
    return total / len(part)


def train(
    name: str,
    recipe: Recipe,
    model: nn.Module,
    data: Split,
    settings: Settings,
    out: Path,
    notes: dict | None = None,
    on_epoch: Callable[[dict], None] = lambda record: None,
) -> dict:
    """Trains `model` on `recipe.loss` and returns a summary.

    Writes out/model.safetensors at every best epoch and a line per epoch to out/log.jsonl; leaves
    the best epoch's weights in `model`. on_epoch: told each epoch's record. Raises Diverged.
    """
    s = settings
    n = len(data.train)
    steps_per_epoch = math.ceil(n / s.batch_size)
    steps = s.epochs * steps_per_epoch
    optimizer = torch.optim.Adam(model.parameters(), lr=s.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_share(step, steps, round(s.warmup * steps))
    )
    best, best_epoch, best_state, step = math.inf, 0, {}, 0
    start = time.perf_counter()
    model.train()
    with open(out / LOG, "w") as log:
        for epoch in range(1, s.epochs + 1):
            order = torch.argsort(rand(n, seed=s.seed, stream=SHUFFLE + epoch), stable=True)
            total = norm_sum = 0.0
            for index in order.split(s.batch_size):
                seeds = sample_seeds(len(index), s.seed, step)
                loss = recipe.loss(model, data.train[index], seeds)
                optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), s.clip)
                if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
                    kept = f"epoch {best_epoch} is kept" if best_epoch else "none was saved yet"
                    raise Diverged(
                        f"step {step} (epoch {epoch}): loss {loss.item()}, gradient norm "
                        f"{norm.item()}; checkpoint: {kept}. Try a smaller lr or clip."
                    )
                optimizer.step()
                schedule.step()
                total += loss.item() * len(index)
                norm_sum += norm.item()
                step += 1
            record = {
                "epoch": epoch,
                "step": step,
                "train_loss": total / n,
                "validation_loss": evaluate(recipe, model, data.validation, s.seed),
                "grad_norm": norm_sum / steps_per_epoch,
                "lr": schedule.get_last_lr()[0],
                "seconds": round(time.perf_counter() - start, 3),
            }
            log.write(json.dumps(record) + "\n")
            log.flush()
            on_epoch(record)
            if record["validation_loss"] < best:
                best, best_epoch = record["validation_loss"], epoch
                best_state = {k: v.clone() for k, v in model.state_dict().items()}
                kept = {"epoch": epoch, "validation_loss": best, "settings": asdict(s)}
                checkpoint.save(out, name, model, {**kept, **data.about, **(notes or {})})
            elif epoch - best_epoch >= s.patience:
                break
    if not best_epoch:
        raise Diverged("the validation loss was never finite; try a smaller lr")
    model.load_state_dict(best_state)
    return {
        "best_epoch": best_epoch,
        "epochs": epoch,
        "validation_loss": best,
        "test_loss": evaluate(recipe, model, data.test, s.seed),
        "seconds": time.perf_counter() - start,
    }
