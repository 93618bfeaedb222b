"""The training loop. The same settings give the same run: every random number is a function of
(seed, step), so a resumed run repeats, bit for bit, the one that was never interrupted.

Streams of the run's seed: the seeds of step s's samples have stream s, for player k (the first is
0) k STRIDE + s, the shuffle of epoch e SHUFFLE + e, the seeds of an evaluation EVALUATION. Dropout
and the like, which draw from torch's generator, find it seeded anew at every move.

Processes (torchrun, accelerate launch) share each batch: process r of W takes rows r, r + W, …; the
seeds go with the rows, so W changes nothing but the order of sums, and what looks across a batch:
CLIP's contrast, BatchNorm's statistics and the minibatch deviation are of one process's rows.
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
from genfast._files import held, remove_leftovers, write_atomic
from genfast.models._seeds import sample_seeds
from genfast.ops import _check
from genfast.ops.rng import rand
from genfast.train import alarms, checkpoint, state
from genfast.train.players import alone, means, seats, together, torch_seed
from genfast.train.recipe import Batch, Part, Recipe, Split
from genfast.train.settings import Settings
from genfast.train.state import Progress

SHUFFLE, EVALUATION = 1 << 32, 2 << 32
LOG = "log.jsonl"


class Diverged(RuntimeError):
    """The loss became NaN or infinite; the checkpoint of the best epoch is untouched."""


class Processes:
    """The processes of a run, behind accelerate: device, precision, gradients, sums."""

    def __init__(self, settings: Settings, device: str):
        need("accelerate")
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        _check.choice("device", device, ("auto", "cpu"))
        AcceleratorState._reset_state()  # the precision is the run's, not the process's
        precision = "no" if settings.precision == "fp32" else settings.precision
        # Unless told so, accelerate makes of N processes without a GPU N runs of one each.
        cpu = device == "cpu" or not torch.accelerator.is_available()
        if cpu and precision == "fp16":  # accelerate would train in fp32
            raise ValueError(
                "precision: expected fp32 or bf16 on a CPU, got 'fp16', which needs a GPU"
            )
        self.accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
        self.device = self.accelerator.device
        self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process

    def sum(self, value: float) -> float:
        if self.count == 1:
            return value
        value = torch.tensor(value, dtype=torch.float64, device=self.device)
        return self.accelerator.reduce(value).item()

    def of_main(self, call: Callable[[], dict]) -> dict:
        """call() of the first process, in all of them."""
        found = [call() if self.main else None]
        if self.count > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(found)
        return found[0]

    def take(
        self, recipe: Recipe, part: Part, index: Tensor, seeds: Tensor
    ) -> tuple[Batch, Tensor, float]:
        """This process's rows of a batch, on its device, and their share of its terms times the
        number of processes: DDP then averages to the mean over the batch. Never empty: the share
        may be 0.
        """
        rows, own = (x[self.rank :: self.count].contiguous() for x in (index, seeds))
        none = not len(rows)
        if none:
            rows, own = index[:1], seeds[:1]
        batch, own = tuple(x.to(self.device) for x in part[rows]), own.to(self.device)
        if self.count == 1:
            return batch, own, 1.0
        terms = 0 if none else recipe.terms(batch, own)
        return batch, own, terms * self.count / max(self.sum(terms), 1)


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
    total = terms = 0.0
    for index in torch.arange(len(part))[rank::count].split(batch_size):
        batch = tuple(x.to(device) for x in part[index])
        own = seeds[index].to(device)
        n = recipe.terms(batch, own)
        total, terms = total + recipe.loss(model, batch, own).item() * n, terms + n
    model.train(training)
    if processes:
        total, terms = processes.sum(total), processes.sum(terms)
    return total / terms


def validate(
    recipe: Recipe, model: nn.Module, data: Split, part: Part, seed: int, processes: Processes
) -> dict[str, float]:
    """What the recipe watches on a part, and the loss where that decides which epoch is best."""

    @torch.no_grad()
    def watched() -> dict[str, float]:
        model.eval()
        found = recipe.watch(model, data, part, seed)
        model.train()
        return found

    found = {}
    if recipe.best == "loss":
        found["loss"] = evaluate(recipe, model, part, seed, processes)
    # Of one process: each has seen other rows, so where there is a BatchNorm they may differ.
    found |= processes.of_main(watched)
    if recipe.best not in found:
        raise ValueError(f"best: expected one of {', '.join(found)}, got {recipe.best!r}")
    return found


class Average:
    """An exponential moving average of the weights (Polyak & Juditsky 1992), none when decay is 0.

    The decay of step s is at most (1 + s) / (10 + s): early weights are soon forgotten.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float):
        self.parameters, self.decay = parameters if decay else {}, decay
        self.tensors = {k: p.detach().clone() for k, p in self.parameters.items()}

    def update(self, step: int) -> None:
        if self.parameters:
            decay = min(self.decay, (1 + step) / (10 + step))
            weights = [p.detach() for p in self.parameters.values()]
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
        for name, p in self.parameters.items():
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
    """Trains `model` on the losses of `recipe.players` and returns a summary.

    Writes to out: model.safetensors at every best epoch, state.safetensors to resume from, a line
    per epoch to log.jsonl. Killed at any moment, it leaves each of them whole; `resume` goes on.
    Leaves the best epoch's weights in `model`. notes: JSON facts for the files; "options" in it are
    the recipe's. show: told the progress after each step, with a record after each epoch. device:
    "auto" or "cpu". Raises Diverged, Collapsed (`genfast.train.alarms`) if so set, and ValueError
    where another process trains into out.
    """
    s, processes = settings, Processes(settings, device)
    if not len(data.train):
        raise ValueError("data: expected samples to train on, got an empty training part")
    devices = [processes.device] if processes.device.type == "cuda" else []
    if processes.main:
        out.mkdir(parents=True, exist_ok=True)
    alone_here = held(out) if processes.main else contextlib.nullcontext()
    with torch.random.fork_rng(devices), alone_here:
        return _train(name, recipe, model, data, s, out, notes or {}, show, resume, processes)


def _train(name, recipe, model, data, s, out, notes, show, resume, processes) -> dict:
    accelerator, n = processes.accelerator, len(data.train)
    steps = s.epochs * math.ceil(n / s.batch_size)
    model.to(processes.device).train()
    table = seats(recipe, model, notes.get("options", {}), s)
    optimizers = [seat.optimizer for seat in table]
    averaged = (seat.parameters for seat in table if seat.player.averaged)
    average = Average({k: p for parameters in averaged for k, p in parameters.items()}, s.ema)
    facts = {**data.about, **notes, "settings": asdict(s)}
    progress = Progress()
    if resume:
        state.check_data(out, data.about)
        progress = state.restore(out, model, average.tensors, optimizers)
        if progress.best_epoch:
            checkpoint.check_kept(out, name, model)
        if progress.scaler and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(progress.scaler)
    if processes.main:
        if not resume:
            (out / state.STATE).unlink(missing_ok=True)  # of an earlier run
        remove_leftovers(out)
        log = _Log(out / LOG, progress.epoch if resume else 1)
    for seat in table:
        alone(seat, table)
        seat.prepare(accelerator, model)

    def save_state():
        progress.seconds = seconds + time.perf_counter() - start
        if accelerator.scaler is not None:
            progress.scaler = accelerator.scaler.state_dict()
        if processes.main:
            about = {**checkpoint.facts(name, model), **facts}
            state.save(out, model, average.tensors, optimizers, progress, about)
        accelerator.wait_for_everyone()

    def move(seat, index):
        step, player = progress.step, seat.player
        torch.manual_seed(torch_seed(s.seed, step, processes.rank, processes.count, seat))
        alone(seat, table)
        seat.set_lr(s.lr_at(step, steps))
        seeds = sample_seeds(len(index), s.seed, seat.stream + step)
        loss, norm = seat.gradients(*processes.take(recipe, data.train, index, seeds), step)
        value, norm = processes.sum(loss.item() / processes.count), norm.item()
        # With fp16 an infinite norm only lowers the loss scale.
        if not math.isfinite(value) or (s.precision != "fp16" and not math.isfinite(norm)):
            kept = f"epoch {progress.best_epoch} is kept" if progress.best_epoch else "none yet"
            who = f", {player.name}" if player.name else ""
            raise Diverged(
                f"step {step} (epoch {progress.epoch}){who}: loss {value}, gradient norm {norm}; "
                f"checkpoint: {kept}. Try a smaller lr or clip."
            )
        seat.stepper.step()
        with torch.no_grad():
            player.after(model)
        before = progress.sums.get(player.name, [0.0] * 4)
        more = (value * len(index), len(index), norm, 1)
        progress.sums[player.name] = [a + b for a, b in zip(before, more, strict=True)]

    seconds, start = progress.seconds, time.perf_counter()
    while not progress.finished:
        epoch = progress.epoch
        order = torch.argsort(rand(n, seed=s.seed, stream=SHUFFLE + epoch), stable=True)
        for index in order.split(s.batch_size)[progress.done :]:
            for seat in table:
                if seat.moves(progress.step):
                    move(seat, index)
            average.update(progress.step)
            progress.step += 1
            progress.done += 1
            show(progress, None)
            if s.save_every and progress.step % s.save_every == 0:
                save_state()
        with average.shown():
            watched = validate(recipe, model, data, data.validation, s.seed, processes)
            alarm = alarms.check(watched, progress.alarms, s, epoch)
            record = {
                "epoch": epoch,
                "step": progress.step,
                **means(progress.sums, table, "loss"),
                **{f"validation_{k}": v for k, v in watched.items()},
                **means(progress.sums, table, "grad_norm"),
                "lr": s.lr_at(progress.step - 1, steps),
                "seconds": round(seconds + time.perf_counter() - start, 3),
            }
            if alarm.on:
                record["alarms"] = alarm.on
            if processes.main:
                log.add(record)
            show(progress, record)
            found = watched[recipe.best]
            if math.isfinite(found) and (progress.best is None or found < progress.best):
                progress.best, progress.best_epoch = found, epoch
                if processes.main:
                    kept = {"epoch": epoch, f"validation_{recipe.best}": found}
                    checkpoint.save(out, name, model, {**kept, **facts})
        if alarm.stop:
            raise alarms.Collapsed(alarm.stop)
        progress.epoch, progress.done, progress.sums = epoch + 1, 0, {}
        late = epoch - progress.best_epoch >= s.patience
        progress.finished = late or progress.epoch > s.epochs
        save_state()
    together(table)
    if not progress.best_epoch:
        raise Diverged(f"the validation {recipe.best} was never finite; try a smaller lr")
    best, _ = checkpoint.load(out, {name: type(model)})
    model.load_state_dict(best.state_dict())
    test = validate(recipe, model, data, data.test, s.seed, processes)
    return {
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch - 1,
        f"validation_{recipe.best}": progress.best,
        f"test_{recipe.best}": test[recipe.best],
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
    """The lines of a log. What is no record of an epoch is left out: a half-written last line, or
    what another program or a broken disk made of one."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, no UTF-8, or 10,000 brackets
            continue
        if isinstance(record, dict) and all(type(record.get(k)) is int for k in ("epoch", "step")):
            found.append(record)
    return found
