"""The training loop. The same settings give the same run: every random number is a function of
(seed, step), so a resumed run repeats, bit for bit, the one that was never interrupted.

Streams of the run's seed: the seeds of step s's samples have stream s, the shuffle of epoch e
SHUFFLE + e, the seeds of an evaluation EVALUATION. Dropout and the like, which draw from torch's
generator, find it seeded anew at every step.

Processes (torchrun, accelerate launch) share each batch: process r of W takes rows r, r + W, …; the
seeds go with the rows, so W changes nothing but the order of sums.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from genfast._extras import need
from genfast._files import remove_leftovers, write_atomic
from genfast.models._seeds import sample_seeds
from genfast.ops.rng import rand
from genfast.train import checkpoint, state
from genfast.train.recipe import Batch, Part, Recipe, Split
from genfast.train.settings import Settings
from genfast.train.state import Progress

SHUFFLE, EVALUATION = 1 << 32, 2 << 32
LOG = "log.jsonl"
DEVICES = ("auto", "cpu")


class Diverged(RuntimeError):
    """The loss became NaN or infinite; the checkpoint of the best epoch is untouched."""


class Objective(nn.Module):
    """The loss as a module: what DDP and autocast wrap."""

    def __init__(self, recipe: Recipe, model: nn.Module):
        super().__init__()
        self.recipe, self.model = recipe, model

    def forward(self, batch: Batch, seeds: Tensor) -> Tensor:
        return self.recipe.loss(self.model, batch, seeds)


class Processes:
    """The processes of a run, behind accelerate: device, precision, gradients, sums."""

    def __init__(self, settings: Settings, device: str):
        need("accelerate")
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()  # the precision is the run's, not the process's
        precision = "no" if settings.precision == "fp32" else settings.precision
        self.accelerator = Accelerator(mixed_precision=precision, cpu=device == "cpu")
        self.device = self.accelerator.device
        self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process

    def sum(self, value: float) -> float:
        if self.count == 1:
            return value
        return self.accelerator.reduce(torch.tensor(value, dtype=torch.float64)).item()

    def take(self, part: Part, index: Tensor, seeds: Tensor) -> tuple[Batch, Tensor, float]:
        """This process's rows of a batch, on its device, and their share of it times the number of
        processes: DDP then averages to the mean over the batch. Never empty: the share may be 0.
        """
        rows, own = index[self.rank :: self.count], seeds[self.rank :: self.count]
        share = len(rows) * self.count / len(index)
        if not len(rows):
            rows, own = index[:1], seeds[:1]
        return tuple(x.to(self.device) for x in part[rows]), own.to(self.device), share


@torch.no_grad()
def evaluate(
    recipe: Recipe, model: nn.Module, part: Part, seed: int, processes=None, batch_size: int = 500
) -> float:
    """Mean loss over a part, always with the same noise: sample i's is that of (seed, i)."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    seeds = sample_seeds(len(part), seed, EVALUATION)
    rank, count = (processes.rank, processes.count) if processes else (0, 1)
    total = 0.0
    for index in torch.arange(len(part))[rank::count].split(batch_size):
        batch = tuple(x.to(device) for x in part[index])
        total += recipe.loss(model, batch, seeds[index].to(device)).item() * len(index)
    model.train(training)
    return (processes.sum(total) if processes else total) / len(part)


class Average:
    """An exponential moving average of the weights (Polyak & Juditsky 1992), none when decay is 0.

    The decay of step s is at most (1 + s) / (10 + s): early weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.tensors = {k: p.detach().clone() for k, p in model.named_parameters()} if decay else {}

    def update(self, step: int) -> None:
        if self.decay:
            decay = min(self.decay, (1 + step) / (10 + step))
            weights = [p.detach() for p in self.model.parameters()]
            torch._foreach_lerp_(list(self.tensors.values()), weights, 1 - decay)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """The model holds the average within."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, p in self.model.named_parameters():
            if name in self.tensors:
                p.data, self.tensors[name] = self.tensors[name], p.data


def train(
    name: str,
    recipe: Recipe,
    model: nn.Module,
    data: Split,
    settings: Settings,
    out: Path,
    notes: dict | None = None,
    show: Callable[[Progress, dict | None], None] = lambda progress, record: None,
    resume: bool = False,
    device: str = "auto",
) -> dict:
    """Trains `model` on `recipe.loss` and returns a summary.

    Writes to out: model.safetensors at every best epoch, state.safetensors to resume from, a line
    per epoch to log.jsonl. Killed at any moment, it leaves each of them whole; `resume` goes on.
    Leaves the best epoch's weights in `model`. notes: JSON facts for the files. show: told the
    progress after each step, with a record after each epoch. device: "auto" or "cpu". Raises
    Diverged.
    """
    s, processes = settings, Processes(settings, device)
    devices = [processes.device] if processes.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        return _train(name, recipe, model, data, s, out, notes or {}, show, resume, processes)


def _train(name, recipe, model, data, s, out, notes, show, resume, processes) -> dict:
    accelerator, n = processes.accelerator, len(data.train)
    steps_per_epoch = math.ceil(n / s.batch_size)
    steps = s.epochs * steps_per_epoch
    model.to(processes.device).train()
    average = Average(model, s.ema)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=s.weight_decay)
    facts = {**data.about, **notes, "settings": asdict(s)}
    progress = Progress()
    if resume:
        progress = state.restore(out, model, average.tensors, optimizer)
        if progress.scaler and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(progress.scaler)
    if processes.main:
        if not resume:
            (out / state.STATE).unlink(missing_ok=True)  # of an earlier run
        remove_leftovers(out)
        log = _Log(out / LOG, progress.epoch if resume else 1)
    objective, stepper = accelerator.prepare(Objective(recipe, model), optimizer)

    def save_state():
        progress.seconds = seconds + time.perf_counter() - start
        if accelerator.scaler is not None:
            progress.scaler = accelerator.scaler.state_dict()
        if processes.main:
            about = {**checkpoint.facts(name, model), **facts}
            state.save(out, model, average.tensors, optimizer, progress, about)
        accelerator.wait_for_everyone()

    seconds, start = progress.seconds, time.perf_counter()
    while not progress.finished:
        epoch = progress.epoch
        order = torch.argsort(rand(n, seed=s.seed, stream=SHUFFLE + epoch), stable=True)
        for index in order.split(s.batch_size)[progress.done :]:
            step = progress.step
            torch.manual_seed((s.seed * 2**32 + step * processes.count + processes.rank) % 2**63)
            for group in optimizer.param_groups:
                group["lr"] = s.lr_at(step, steps)
            batch, seeds, share = processes.take(
                data.train, index, sample_seeds(len(index), s.seed, step)
            )
            loss = objective(batch, seeds) * share
            stepper.zero_grad()
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), s.clip).item()
            value = processes.sum(loss.item() / processes.count)
            # With fp16 an infinite norm only lowers the loss scale.
            if not math.isfinite(value) or (s.precision != "fp16" and not math.isfinite(norm)):
                kept = f"epoch {progress.best_epoch} is kept" if progress.best_epoch else "none yet"
                raise Diverged(
                    f"step {step} (epoch {epoch}): loss {value}, gradient norm {norm}; "
                    f"checkpoint: {kept}. Try a smaller lr or clip."
                )
            stepper.step()
            average.update(step)
            progress.step += 1
            progress.done += 1
            progress.loss += value * len(index)
            progress.norm += norm
            show(progress, None)
            if s.save_every and progress.step % s.save_every == 0:
                save_state()
        with average.shown():
            found = evaluate(recipe, model, data.validation, s.seed, processes)
            record = {
                "epoch": epoch,
                "step": progress.step,
                "train_loss": progress.loss / n,
                "validation_loss": found,
                "grad_norm": progress.norm / steps_per_epoch,
                "lr": optimizer.param_groups[0]["lr"],
                "seconds": round(seconds + time.perf_counter() - start, 3),
            }
            if processes.main:
                log.add(record)
            show(progress, record)
            if math.isfinite(found) and (progress.best is None or found < progress.best):
                progress.best, progress.best_epoch = found, epoch
                if processes.main:
                    kept = {"epoch": epoch, "validation_loss": found}
                    checkpoint.save(out, name, model, {**kept, **facts})
        progress.epoch, progress.done, progress.loss, progress.norm = epoch + 1, 0, 0.0, 0.0
        late = epoch - progress.best_epoch >= s.patience
        progress.finished = late or progress.epoch > s.epochs
        save_state()
    if not progress.best_epoch:
        raise Diverged("the validation loss was never finite; try a smaller lr")
    best, _ = checkpoint.load(out)
    model.load_state_dict(best.state_dict())
    return {
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch - 1,
        "validation_loss": progress.best,
        "test_loss": evaluate(recipe, model, data.test, s.seed, processes),
        "seconds": progress.seconds,
        "main": processes.main,
    }


class _Log:
    """log.jsonl: a line per epoch. Starting at an epoch drops what an interrupted run had written
    of it and after it."""

    def __init__(self, path: Path, epoch: int):
        self.path = path
        lines = records(path) if epoch > 1 else []
        text = "".join(json.dumps(r) + "\n" for r in lines if r["epoch"] < epoch)
        write_atomic(path, lambda p: p.write_text(text))

    def add(self, record: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


def records(path: Path) -> list[dict]:
    """The lines of a log; a half-written last one is left out."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found
