"""Training: the loop, its files whatever happens to it, settings, data. The model is a tiny VAE."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import genfast
from genfast import _files
from genfast.models import VAE
from genfast.models._seeds import sample_seeds
from genfast.train import checkpoint, data, images, loop, plot, state
from genfast.train.recipes import RECIPES, load_trained
from genfast.train.settings import SCHEDULES, Settings, read_config

SEED = 11
VAE_RECIPE = RECIPES["vae"]


pytestmark = pytest.mark.usefixtures("one_thread")


def blobs(n=120, seed=0):
    """Images with one bright column: something that a small VAE learns in seconds."""
    at = genfast.randint(0, 6, n, seed=seed)
    images = 0.9 * F.one_hot(at, 6).float()[:, None, None].expand(n, 1, 6, 6) + 0.05
    return data.split(data.Images(images.contiguous(), at), seed=1)


def fresh():
    return checkpoint.initialised(lambda: VAE(36, 24, 5), SEED)


def run(folder, model=None, resume=False, show=None, recipe=VAE_RECIPE, **settings):
    folder.mkdir(exist_ok=True)
    model = model or fresh()
    chosen = Settings(**{"epochs": 4, "batch_size": 32, **settings})
    more = {"show": show} if show else {}
    summary = loop.train("vae", recipe, model, blobs(), chosen, folder, resume=resume, **more)
    return model, summary


def same(a, b):
    for k, v in a.state_dict().items():
        assert torch.equal(v, b.state_dict()[k]), k


# ---- the loop ------------------------------------------------------------------------------------


def test_training_learns(tmp_path):
    before = loop.evaluate(VAE_RECIPE, fresh(), blobs().test, 0)
    _, summary = run(tmp_path, epochs=30, batch_size=8, lr=1e-2)
    assert summary["test_loss"] < before - 10  # nats; measured 25.1 before, 12.5 after
    records = loop.records(tmp_path / loop.LOG)
    assert [r["epoch"] for r in records] == list(range(1, len(records) + 1))
    assert min(r["validation_loss"] for r in records) == summary["validation_loss"]
    plot.losses(records, tmp_path / plot.PLOT)
    assert (tmp_path / plot.PLOT).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_same_seed_is_the_same_run_and_torch_state_does_not_matter(tmp_path):
    torch.manual_seed(1)
    first, one = run(tmp_path / "a")
    torch.manual_seed(2)
    second, two = run(tmp_path / "b")
    other, _ = run(tmp_path / "c", seed=1)
    assert one["validation_loss"] == two["validation_loss"]
    same(first, second)
    assert not torch.equal(first.fc1.weight, other.fc1.weight)


def test_training_leaves_torchs_generator_alone(tmp_path):
    before = torch.random.get_rng_state()
    run(tmp_path, epochs=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_validation_loss_does_not_depend_on_its_batch_size():
    """Up to rounding: the seeds go with the samples."""
    x = blobs().train
    one, many = (loop.evaluate(VAE_RECIPE, fresh(), x, 3, batch_size=b) for b in (7, 500))
    assert one == pytest.approx(many, rel=1e-6)
    assert one != pytest.approx(loop.evaluate(VAE_RECIPE, fresh(), x, 4), rel=1e-6)


def test_sample_seeds_are_functions_of_seed_stream_and_index():
    whole = sample_seeds(100, SEED, 3)
    assert torch.equal(sample_seeds(10, SEED, 3, 20), whole[20:30])
    assert len(set(whole.tolist())) == 100 and whole.min() >= 0
    assert not torch.equal(sample_seeds(100, SEED, 4), whole)
    with pytest.raises(TypeError, match="seed: expected an int, .* got a tensor of shape"):
        sample_seeds(3, torch.arange(3))
    with pytest.raises(TypeError, match="seed: expected an int, got a"):
        VAE(36, 24, 5).sample(3, torch.arange(64))
    with pytest.raises(TypeError, match="n: expected an int, got float"):
        VAE(36, 24, 5).sample(2.0, 1)


def test_early_stopping_keeps_the_best_epoch(tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 3.5, 99.0, 7.0])
    monkeypatch.setattr(loop, "evaluate", lambda *_: next(losses))
    _, summary = run(tmp_path, epochs=30, patience=2)
    assert summary["best_epoch"] == 2 and summary["epochs"] == 4
    assert load_trained(tmp_path)[1]["epoch"] == 2


@pytest.mark.parametrize("where", ["first step", "later"])
def test_a_nan_loss_stops_and_keeps_the_checkpoint(tmp_path, where):
    """In a folder that holds a good checkpoint, and within the run after its first epoch."""
    if where == "first step":
        run(tmp_path, epochs=1)
        bad = fresh()
        with torch.no_grad():
            bad.fc3.weight[0, 0] = math.nan
        kept = (tmp_path / checkpoint.CHECKPOINT).read_bytes()
        with pytest.raises(loop.Diverged, match="step 0 .*Try a smaller lr"):
            run(tmp_path, bad, epochs=1)
    else:
        model = fresh()

        def poison(progress, record):
            if progress.step == 5 and not record:
                (tmp_path / "kept").write_bytes((tmp_path / checkpoint.CHECKPOINT).read_bytes())
                model.fc3.weight.data[0, 0] = math.nan

        with pytest.raises(loop.Diverged, match="step 5 .epoch 2.*epoch 1 is kept"):
            run(tmp_path, model, show=poison)
        kept = (tmp_path / "kept").read_bytes()
        assert state.about(tmp_path)["progress"]["step"] == 3  # resumable from before
    assert (tmp_path / checkpoint.CHECKPOINT).read_bytes() == kept
    assert all(x.isfinite().all() for x in load_trained(tmp_path)[0].state_dict().values())


def test_the_average_of_the_weights_is_what_is_kept(tmp_path):
    seen, model = [], fresh()
    start = model.fc1.weight.detach().clone()
    run(
        tmp_path, model, epochs=1, ema=0.5,
        show=lambda p, record: seen.append(model.fc1.weight.detach().clone()) or None,
    )  # fmt: skip
    *steps, shown = seen  # the last call, with the record, sees the average
    want = start
    for i, weight in enumerate(steps):
        want = torch.lerp(want, weight, 1 - min(0.5, (1 + i) / (10 + i)))
    torch.testing.assert_close(shown, want)
    assert torch.equal(load_trained(tmp_path)[0].fc1.weight, shown)


def test_mixed_precision_trains_and_keeps_fp32_weights(tmp_path):
    model, summary = run(tmp_path / "bf16", precision="bf16")
    exact, other = run(tmp_path / "fp32")
    assert model.fc1.weight.dtype == torch.float32
    assert not torch.equal(model.fc1.weight, exact.fc1.weight)
    assert summary["test_loss"] == pytest.approx(other["test_loss"], rel=0.01)
    if not torch.accelerator.is_available():
        with pytest.raises(ValueError, match="precision: expected fp32 or bf16 on a CPU"):
            run(tmp_path / "fp16", precision="fp16")


class Dropped(type(VAE_RECIPE)):
    """Draws from torch's generator in every step, like nn.Dropout."""

    def loss(self, model, batch, seeds):
        x = F.dropout(batch[0], 0.3, model.training)
        return super().loss(model, (x,), seeds)


# ---- resume and kill -----------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("more", [{}, {"save_every": 2}], ids=["epochs", "steps"])
@pytest.mark.parametrize("at", [1, 3, 5, 11])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, at, more):
    settings = dict(ema=0.9, recipe=Dropped(), weight_decay=0.01, **more)
    whole, summary = run(tmp_path / "whole", **settings)

    def stop(progress, record):
        if progress.step == at:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "cut", show=stop, **settings)
    first = at <= (2 if more else 3)  # nothing saved yet
    if first:
        with pytest.raises(checkpoint.BadCheckpoint, match="nothing to resume"):
            run(tmp_path / "cut", resume=True, **settings)
    resumed, again = run(tmp_path / "cut", resume=not first, **settings)
    same(whole, resumed)
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}
    for name in (checkpoint.CHECKPOINT, loop.LOG):
        files = [(tmp_path / f / name).read_bytes() for f in ("whole", "cut")]
        if name == loop.LOG:
            files = [[{**json.loads(x), "seconds": 0} for x in f.splitlines()] for f in files]
        assert files[0] == files[1], name


ODD_LOGS = {
    "missing": None,
    "empty": b"",
    "no UTF-8": b"\xff\xfe\n",
    "no records": b'[1, 2]\n3\nnull\n{}\n{"epoch": 1, "step": "x"}\n' + b"[" * 100_000,
    "among others": b"[1, 2]\nGOOD{}\n\xe9\n",
    "a half": b'GOOD{"epoch": 1, "train_l',
    "more columns": b'GOOD{"epoch": 1, "step": 3, "old_loss": "x"}\n',
}  # fmt: skip


@pytest.mark.filterwarnings("error")  # of the plot
def test_a_run_resumes_whatever_became_of_its_log(tmp_path):
    """With the epochs that are still readable, or without a log."""

    def stop(progress, record):
        if progress.step == 4:
            raise Killed

    cut = tmp_path / "cut"
    with pytest.raises(Killed):
        run(cut, show=stop, epochs=2)
    good = (cut / loop.LOG).read_bytes()
    for name, odd in ODD_LOGS.items():
        folder = shutil.copytree(cut, tmp_path / name)
        if odd is None:
            (folder / loop.LOG).unlink()
        else:
            (folder / loop.LOG).write_bytes(odd.replace(b"GOOD", good))
        run(folder, resume=True, epochs=2)
        records = loop.records(folder / loop.LOG)
        kept = {"among others": [1], "a half": [1], "more columns": [1, 1]}.get(name, [])
        assert [r["epoch"] for r in records] == [*kept, 2], name
        assert plot.losses(records, folder / plot.PLOT) == [plot.PLOT]
    # A finished run has nothing to add.
    (folder / loop.LOG).unlink()
    (folder / plot.PLOT).unlink()
    run(folder, resume=True, epochs=2)
    assert plot.losses(loop.records(folder / loop.LOG), folder / plot.PLOT) == []
    assert not (folder / plot.PLOT).exists()


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    def second(progress, record):
        if progress.step == 1:
            with pytest.raises(ValueError, match="out: expected a folder that no other run"):
                run(tmp_path)

    whole, _ = run(tmp_path, show=second)
    same(whole, run(tmp_path, resume=True)[0])  # free again, and left alone


def test_a_finished_run_resumes_to_itself(tmp_path):
    first, one = run(tmp_path)
    before = (tmp_path / state.STATE).stat().st_mtime_ns
    second, two = run(tmp_path, resume=True)
    same(first, second)
    assert one == two and (tmp_path / state.STATE).stat().st_mtime_ns == before


def test_dying_between_any_two_file_operations_leaves_a_run_that_resumes(tmp_path, monkeypatch):
    """Every place where kill -9 can strike while files change: the k-th operation never happens,
    nor any clean-up after it."""
    whole, _ = run(tmp_path / "whole", epochs=2)
    operations = ("mkstemp", "mkdtemp", "fsync", "chmod", "replace")
    done = 0

    def counted(module, name, limit):
        real = getattr(module, name)

        def call(*args, **more):
            nonlocal done
            if done == limit:
                raise Killed
            done += 1
            return real(*args, **more)

        return call

    limit = 0
    while True:
        folder, done = tmp_path / str(limit), 0
        with monkeypatch.context() as patch:
            for name in operations:
                module = _files.tempfile if name.startswith("mk") else _files.os
                patch.setattr(module, name, counted(module, name, limit))
            patch.setattr(_files.Path, "unlink", lambda *_, **__: None)
            try:
                run(folder, epochs=2)
                died = False
            except Killed:
                died = True
        if not died:
            break
        kept = list(folder.glob("*.safetensors"))
        for path in kept:
            checkpoint.read(path)  # whole
        model, _ = run(folder, resume=(folder / state.STATE).is_file(), epochs=2)
        same(whole, model)
        assert not list(folder.glob(".*"))  # the leftovers are gone
        limit += 1
    assert limit == 5 + 2 * 14  # log; then best and state in both epochs


SLOW = """
import sys, time, pathlib
sys.path.insert(0, sys.argv[2])
import test_train as t
t.torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
said = []
t.run(folder, resume=(folder / t.state.STATE).is_file(), epochs=150, patience=150, save_every=1,
      show=lambda *_: said or said.append(print("training", flush=True)))
"""


def test_kill_9_and_resume(tmp_path):
    """A real process, killed at three moments, resumed each time; then to its end."""
    child = [sys.executable, "-c", SLOW, str(tmp_path), os.path.dirname(__file__)]
    steps = []
    for delay in (0.25, 0.4, 0.33):
        with subprocess.Popen(child, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        if (tmp_path / state.STATE).is_file():
            steps.append(state.about(tmp_path)["progress"]["step"])
            checkpoint.read(tmp_path / state.STATE)
    assert steps == sorted(steps) and steps and 0 < steps[-1]
    settings = dict(epochs=150, patience=150)
    resumed, _ = run(tmp_path, resume=True, **settings)
    whole, _ = run(tmp_path / "whole", **settings)
    same(whole, resumed)


# ---- processes -----------------------------------------------------------------------------------

SHARED = """
import sys, pathlib
sys.path.insert(0, sys.argv[2])
import test_train as t
t.torch.set_num_threads(1)
t.run(pathlib.Path(sys.argv[1]), epochs=2, batch_size=33, ema=0.9)
"""


def test_two_gloo_processes_train_as_one(tmp_path):
    """96 samples in batches of 33: odd shares. Only the order of sums differs. Without a GPU the
    command needs no word about it."""
    cpu = {"ACCELERATE_USE_CPU": "1"} if torch.accelerator.is_available() else {}
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script), str(tmp_path / "two"), os.path.dirname(__file__)],
        capture_output=True, text=True, timeout=240, env={**os.environ, **cpu},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    one, _ = run(tmp_path / "one", epochs=2, batch_size=33, ema=0.9)
    two, about = load_trained(tmp_path / "two")
    for k, v in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[k], v, rtol=1e-4, atol=1e-6, msg=k)
    logs = [loop.records(tmp_path / f / loop.LOG) for f in ("one", "two")]
    assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]] == [3, 6]
    for a, b in zip(*logs, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], rel=1e-5)


def test_a_state_that_is_none_is_named(tmp_path):
    run(tmp_path, epochs=1)
    path = tmp_path / state.STATE
    tensors, about = checkpoint.read(path)
    for part, facts in (
        ({}, about),
        (tensors, {k: v for k, v in about.items() if k != "progress"}),
        (tensors, {**about, "progress": {"steps": 3}}),
        (tensors, about),  # without averages
    ):
        _files.write_tensors(path, part, facts)
        with pytest.raises(checkpoint.BadCheckpoint, match="state.safetensors: expected the state"):
            run(tmp_path, resume=True, ema=0.9)


def test_a_damaged_state_is_not_resumed(tmp_path):
    """Whole as a file, but not what was written: a missing moment would start anew from 0."""
    run(tmp_path, epochs=1)
    path = tmp_path / state.STATE
    tensors, about = checkpoint.read(path)
    first = "optimizer.fc1.weight.exp_avg"
    for damaged in (
        {k: x for k, x in tensors.items() if k != first},
        {k: x for k, x in tensors.items() if not k.startswith("optimizer.fc1.weight.")},
        {k.replace("exp_avg", "mean"): x for k, x in tensors.items()},
        {**tensors, first: tensors[first][:1]},
    ):
        _files.write_tensors(path, damaged, about)
        with pytest.raises(checkpoint.BadCheckpoint, match="other names or shapes"):
            run(tmp_path, resume=True)
    _files.write_tensors(path, tensors, about)
    run(tmp_path, resume=True)


# ---- settings ------------------------------------------------------------------------------------


def test_a_run_whose_best_epoch_is_another_models_is_not_resumed(tmp_path):
    def stop(progress, record):
        if progress.step == 5:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path, show=stop)
    checkpoint.save(tmp_path, "vae", VAE(h_dim=3, z_dim=2), {})
    with pytest.raises(checkpoint.BadCheckpoint, match="expected the best epoch of the run"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_rise_then_keep_their_shape(name):
    s = Settings(lr=2.0, warmup=0.1, schedule=name)
    rates = [s.lr_at(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(2.0 if name == "constant" else 1.0)
    assert rates[100] == pytest.approx(2.0 if name == "constant" else 0.0)
    assert replace(s, warmup=0.0).lr_at(0, 100) == 2.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0}, {"lr": -1.0}, {"lr": math.nan}, {"warmup": 2.0}, {"clip": 0.0},
        {"seed": -1}, {"ema": 1.0}, {"schedule": "cosin"}, {"precision": "fp8"},
        {"save_every": -1}, {"weight_decay": math.inf}, {"alarm": "shout"}, {"alarm_after": 0},
        {"coverage_floor": 1.5}, {"accuracy_ceiling": -0.1},
    ],
    ids=str,
)  # fmt: skip
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        Settings(**wrong)


def test_config_files(tmp_path):
    toml, yaml = tmp_path / "run.toml", tmp_path / "run.yaml"
    toml.write_text('model = "vae"\nbatch-size = 64\nlr = 1e-3\n')
    yaml.write_text("model: vae\nbatch-size: 64\nlr: 0.001\n")
    assert read_config(toml) == read_config(yaml) == {"model": "vae", "batch_size": 64, "lr": 1e-3}
    for path in (toml, yaml):  # as an editor on Windows saves it
        path.write_text("\ufeff" + path.read_text())
        assert read_config(path)["batch_size"] == 64
    for path in (toml, yaml):
        path.write_bytes(b"model: caf\xe9")
        with pytest.raises(ValueError, match=f"{path.name}: expected UTF-8 text"):
            read_config(path)
    for path, text, message in (
        (toml, "a = ", "not readable TOML"), (yaml, "a: [", "not readable YAML"),
        (yaml, "epochs: 1\nepochs: 2", "epochs twice"),
        (yaml, "- 3", "expected a table of names"), (tmp_path / "run.ini", "", "expected a file"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(path)


# ---- checkpoints and data ------------------------------------------------------------------------


def test_checkpoint_round_trip(tmp_path):
    vae = fresh()
    path = checkpoint.save(tmp_path, "vae", vae, {"shape": [1, 6, 6]})
    loaded, about = load_trained(tmp_path)
    assert about["config"] == {"x_dim": 36, "h_dim": 24, "z_dim": 5, "beta": 1.0} and about[
        "shape"
    ] == [1, 6, 6]
    assert not loaded.training and [p.name for p in tmp_path.iterdir()] == [path.name]
    same(vae, loaded)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path, "vae", fresh(), {})
    kept = path.read_bytes()

    def broken(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, "vae", fresh(), {})
    assert path.read_bytes() == kept and len(list(tmp_path.iterdir())) == 1


def test_a_writer_that_is_killed_leaves_what_is_found(tmp_path, monkeypatch):
    """safetensors' own temporary file lies in a folder that `remove_leftovers` knows."""
    beside = []

    def killed(tensors, file, metadata):
        (file.parent / ".tmpAbC").write_bytes(b"half")
        beside.append(file.parent)
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        _files.write_tensors(tmp_path / "x", {}, {})
    assert not list(tmp_path.iterdir())
    beside[0].mkdir()
    (beside[0] / ".tmpAbC").write_bytes(b"half")
    _files.remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    path = tmp_path / "x"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        _files.write_atomic(path, full)

    def full_of_tensors(*_):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_of_tensors)
    with pytest.raises(OSError, match=f"{path}: could not be written .*No space left"):
        _files.write_tensors(path, {}, {})
    assert not list(tmp_path.iterdir())


def test_bad_checkpoints_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / checkpoint.CHECKPOINT
    with pytest.raises(checkpoint.BadCheckpoint, match="as `genfast train` writes it"):
        load_trained(tmp_path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(checkpoint.BadCheckpoint, match="not a readable safetensors file"):
        load_trained(tmp_path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(checkpoint.BadCheckpoint, match="not a genfast checkpoint"):
        load_trained(tmp_path)
    save_file({"x": torch.ones(1)}, path, {"genfast": "{"})
    with pytest.raises(checkpoint.BadCheckpoint, match="its genfast metadata is no JSON"):
        load_trained(tmp_path)
    checkpoint.save(tmp_path, "gqn", fresh(), {})
    with pytest.raises(
        checkpoint.BadCheckpoint, match="expected a trained vae or .*, got one of gqn"
    ):
        load_trained(tmp_path)
    model = fresh()
    weights = model.state_dict()
    for config, message in (
        (None, "config: expected that of a vae, got None"),
        ({**model.config, "widths": 3}, "config: expected that of a vae.*widths"),
        ({**model.config, "z_dim": 0}, "config: expected that of a vae.*z_dim"),
        ({**model.config, "z_dim": 3}, "not the weights of its config"),
    ):
        about = {"format": checkpoint.FORMAT, "model": "vae", "config": config}
        _files.write_tensors(path, weights, about)
        with pytest.raises(checkpoint.BadCheckpoint, match=message):
            load_trained(tmp_path)
    for name, value, message in (
        ("model", ["vae"], "not a genfast checkpoint"), ("model", {}, "not a genfast checkpoint"),
        ("config", {**model.config, "x_dim": 10**30}, "config: expected that of a vae"),
        ("shape", "abc", "shape: expected that of a vae.*got 'abc'"),
        ("shape", [1, 2.5, 3], "shape: expected"), ("data", ["digits"], "data: expected"),
        ("options", [1], "options: expected"), ("options", {"z_dim": "5"}, "options: expected"),
        ("options", {"widths": "8"}, "options: expected that of a vae.*widths"),
        ("settings", {"epochs": None}, "settings: expected"),
    ):  # fmt: skip
        about = checkpoint.facts("vae", model) | {name: value}
        _files.write_tensors(path, weights, about)
        with pytest.raises(checkpoint.BadCheckpoint, match=message):
            load_trained(tmp_path)


def test_mnist5k_is_real_and_its_split_is_fixed():
    digits = data.load("mnist5k")
    assert digits.images.shape == (5000, 1, 28, 28) and digits.images.dtype == torch.float32
    assert digits.images.min() == 0 and digits.images.max() == 1
    assert digits.labels.bincount().tolist() == [500] * 10
    parts = data.split(digits)
    sizes = [len(p) for p in (parts.train, parts.validation, parts.test)]
    assert sizes == [4000, 500, 500] and parts.about == {"shape": [1, 28, 28], "classes": 10}
    again = data.split(digits)
    assert torch.equal(parts.test.labels, again.test.labels)
    everything = torch.cat([parts.train.images, parts.validation.images, parts.test.images])
    sums = (x.sum((1, 2, 3)).sort()[0] for x in (everything, digits.images))
    assert torch.equal(*sums)


def test_unknown_data_lists_the_table():
    with pytest.raises(data.UnknownData, match="expected one of mnist5k.*, got 'cifar'"):
        data.load("cifar")
    with pytest.raises(ValueError, match="expected shares"):
        data.split(data.Images(torch.zeros(3, 1, 2, 2), torch.zeros(3)), 0.5, 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: images.grid(torch.rand(3, 4, 5)),
            r"images: expected \(N, C, H, W\) .* \(3, ",
        ),
        (lambda: images.grid(torch.rand(0, 1, 4, 5)), "images: expected .* N >= 1"),
        (lambda: images.grid(torch.rand(2, 2, 4, 5)), "images: expected .* one or three channels"),
        (lambda: images.grid(torch.ones(2, 1, 4, 5, dtype=torch.uint8)), "floats .* x / 255"),
        (lambda: images.grid(torch.rand(2, 1, 4, 5), columns=0), "columns: expected an int >= 1"),
        (lambda: images.grid(torch.rand(2, 1, 4, 5), gap=-1), "gap: expected an int >= 0"),
    ],
)
def test_what_is_no_picture_is_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
