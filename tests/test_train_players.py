"""Training with several players: whose parameters move, resume, processes, alarms. The model is a
tiny GAN."""

import json
import os
import subprocess
import sys

import pytest
import torch

import genfast
from genfast.models import DCGAN, GAN
from genfast.models._seeds import sample_seeds
from genfast.train import alarms, checkpoint, data, loop, plot, state
from genfast.train.players import STRIDE, seats
from genfast.train.recipe import Player
from genfast.train.recipes import load_trained
from genfast.train.recipes.gan import DCGANRecipe, GANRecipe
from genfast.train.settings import Settings

SEED = 3
PENALTIES = {"r1": 0.1, "penalty": 0.5}  # both differentiate twice


pytestmark = pytest.mark.usefixtures("one_thread")


class Recipe(GANRecipe):
    """Watches what costs nothing: how far the mean image is off."""

    def watch(self, model, data, part, seed):
        x, _ = part[torch.arange(len(part))]
        drawn = model.sample(len(x), seed)
        return {"classifier_fid": (drawn.mean(0) - x.mean(0)).square().mean().item()}


def blobs(n=120):
    at = genfast.randint(0, 6, n, seed=0)
    images = torch.nn.functional.one_hot(at, 6).float()[:, None, None].expand(n, 1, 6, 6)
    return data.split(data.Images(images.contiguous(), at), seed=1)


def fresh(**more):
    return checkpoint.initialised(lambda: GAN((1, 6, 6), 4, 12, **{**PENALTIES, **more}), SEED)


def run(folder, model=None, recipe=None, resume=False, show=None, options=None, name="gan",
        **settings):  # fmt: skip
    folder.mkdir(exist_ok=True)
    model = model or fresh()
    chosen = Settings(**{"epochs": 3, "batch_size": 32, "lr": 1e-2, "warmup": 0.0, **settings})
    more = {"show": show} if show else {}
    notes = {"options": {"n_critic": 2, "d_lr": 0.5, **(options or {})}}
    summary = loop.train(name, recipe or Recipe(), model, blobs(), chosen, folder, notes,
                         resume=resume, **more)  # fmt: skip
    return model, summary


def weights(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(a, b):
    for k, v in a.state_dict().items():
        assert torch.equal(v, b.state_dict()[k]), k


# ---- moves ---------------------------------------------------------------------------------------


def test_each_player_moves_its_own_parameters_in_its_own_steps(tmp_path):
    model = fresh()
    seen = [weights(model)]
    run(tmp_path, model, epochs=2, show=lambda p, record: record or seen.append(weights(model)))
    assert len(seen) == 7
    for step, (before, after) in enumerate(zip(seen, seen[1:], strict=False)):
        moved = {k[0] for k in before if not torch.equal(before[k], after[k])}
        assert moved == ({"D", "G"} if step % 2 else {"D"}), step  # n_critic 2
    assert all(p.requires_grad for p in model.parameters())


def test_a_run_is_the_two_optimizers_by_hand(tmp_path):
    """Three steps in PyTorch lines: seeds of (seed, step, player), Adam of each, D before G."""
    model, twin = fresh(), fresh()
    run(tmp_path, model, epochs=1, schedule="constant")
    x = blobs().train.images
    betas = {"betas": (0.5, 0.999), "weight_decay": 0.0}
    d = torch.optim.AdamW(twin.D.parameters(), lr=0.5e-2, **betas)
    g = torch.optim.AdamW(twin.G.parameters(), lr=1e-2, **betas)
    order = torch.argsort(genfast.rand(len(x), seed=0, stream=loop.SHUFFLE + 1), stable=True)
    for step, index in enumerate(order.split(32)):
        seeds = [sample_seeds(len(index), 0, k * STRIDE + step) for k in range(2)]
        losses = {d: lambda: twin.d_loss(x[index], seed=seeds[0], step=step)}  # noqa: B023
        losses |= {g: lambda: twin.g_loss(len(index), seed=seeds[1], step=step)}  # noqa: B023
        for optimizer, loss in losses.items():
            if optimizer is g and step % 2 == 0:
                continue
            twin.zero_grad()
            loss().backward()
            optimizer.step()
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


def test_the_log_has_a_loss_and_a_norm_of_each_player(tmp_path):
    _, summary = run(tmp_path)
    records = loop.records(tmp_path / loop.LOG)
    assert [r["step"] for r in records] == [3, 6, 9]
    names = {
        f"{p}_{what}" for p in ("discriminator", "generator") for what in ("loss", "grad_norm")
    }
    assert names | {"validation_classifier_fid"} <= set(records[0])
    assert "train_loss" not in records[0] and "validation_loss" not in records[0]
    best = min(records, key=lambda r: r["validation_classifier_fid"])
    assert summary["best_epoch"] == best["epoch"]
    assert summary["validation_classifier_fid"] == best["validation_classifier_fid"]
    assert summary["test_classifier_fid"] != summary["validation_classifier_fid"]
    plot.losses(records, tmp_path / plot.PLOT, "classifier_fid")
    assert (tmp_path / plot.PLOT).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_player_that_never_moved_in_an_epoch_has_no_loss(tmp_path):
    run(tmp_path, epochs=2, options={"n_critic": 4})
    losses = [r["generator_loss"] for r in loop.records(tmp_path / loop.LOG)]
    assert losses[0] is None and losses[1] is not None
    plot.losses(loop.records(tmp_path / loop.LOG), tmp_path / plot.PLOT, "classifier_fid")


def test_only_the_generator_is_averaged(tmp_path):
    seen, model = [], fresh()
    run(tmp_path, model, epochs=1, ema=0.9, show=lambda p, r: seen.append(weights(model)))
    *_, last, shown = seen  # the last call, with the record, sees the average
    changed = {k[0] for k in last if not torch.equal(last[k], shown[k])}
    assert changed == {"G"}


def test_weights_are_clipped_after_each_move(tmp_path):
    model = fresh(objective="wasserstein", clip_weight=0.02, r1=0.0, penalty=0.0)
    largest = []

    def show(progress, record):
        largest.append(max(p.abs().max().item() for p in model.D.parameters()))

    run(tmp_path, model, epochs=1, show=show)
    assert all(w == pytest.approx(0.02) for w in largest)
    assert max(p.abs().max() for p in model.G.parameters()) > 0.02


def test_mixed_precision_differentiates_twice(tmp_path):
    model, _ = run(tmp_path / "bf16", precision="bf16")
    exact, _ = run(tmp_path / "fp32")
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in weights(model).values())
    assert not torch.equal(model.D[1].weight, exact.D[1].weight)


# ---- resume and processes ------------------------------------------------------------------------


class Killed(BaseException):
    pass


class RMSprop(Recipe):
    optimizer = {"optimizer": "rmsprop"}


@pytest.mark.parametrize("recipe", [Recipe(), RMSprop()], ids=["adamw", "rmsprop"])
@pytest.mark.parametrize("at", [2, 5, 8])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, at, recipe):
    settings = dict(ema=0.9, save_every=2, recipe=recipe, weight_decay=0.01)
    noisy = dict(noise=0.1, noise_steps=6)
    whole, summary = run(tmp_path / "whole", fresh(**noisy), **settings)

    def stop(progress, record):
        if progress.step == at + 1:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "cut", fresh(**noisy), show=stop, **settings)
    resumed, again = run(tmp_path / "cut", fresh(**noisy), resume=True, **settings)
    same(whole, resumed)
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}
    logs = [loop.records(tmp_path / f / loop.LOG) for f in ("whole", "cut")]
    assert [{**r, "seconds": 0} for r in logs[0]] == [{**r, "seconds": 0} for r in logs[1]]
    files = [(tmp_path / f / checkpoint.CHECKPOINT).read_bytes() for f in ("whole", "cut")]
    assert files[0] == files[1]


SHARED = """
import sys, pathlib
sys.path.insert(0, sys.argv[2])
import test_train_players as t
t.torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
t.run(folder, epochs=2, batch_size=33, ema=0.9)
t.run_dcgan(folder / "dcgan")
"""


def run_dcgan(folder):
    """BatchNorm, spectral norm's buffers, and all that the recipe really watches."""
    more = {"spectral_norm": True, "noise": 0.1}
    model = checkpoint.initialised(lambda: DCGAN((1, 6, 6), 4, 4, 1, **more), SEED)
    return run(folder, model, DCGANRecipe(), name="dcgan", epochs=1, batch_size=33, ema=0.9)


def test_two_gloo_processes_play_as_one(tmp_path):
    """With both penalties: gradients of gradients under DDP. Only the order of sums differs."""
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script), str(tmp_path / "two"), os.path.dirname(__file__)],
        capture_output=True, text=True, timeout=240, env={**os.environ, "ACCELERATE_USE_CPU": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    one, _ = run(tmp_path / "one", epochs=2, batch_size=33, ema=0.9)
    two, _ = load_trained(tmp_path / "two")
    for k, v in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[k], v, rtol=1e-3, atol=1e-5, msg=k)
    logs = [loop.records(tmp_path / f / loop.LOG) for f in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        for name in ("discriminator_loss", "generator_loss", "validation_classifier_fid"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name
    _, summary = run_dcgan(tmp_path / "one" / "dcgan")
    name = "validation_classifier_fid"  # BatchNorm took its statistics of other rows
    for record in loop.records(tmp_path / "two" / "dcgan" / loop.LOG):
        assert record[name] == pytest.approx(summary[name], rel=0.2)


# ---- alarms --------------------------------------------------------------------------------------


class Watched(Recipe):
    """Says what a list tells it, epoch by epoch."""

    def __init__(self, *told):
        self.told = iter(told)

    def watch(self, model, data, part, seed):
        return {"classifier_fid": 1.0, **next(self.told, {})}


BAD, GOOD = {"coverage": 0.01}, {"coverage": 0.5}


def test_a_collapse_is_reported_once_and_stays_in_the_log(tmp_path):
    recipe = Watched(BAD, BAD, BAD, GOOD, BAD)
    with pytest.warns(UserWarning, match="epoch 2: coverage 0.010 .*has collapsed") as found:
        run(tmp_path, recipe=recipe, epochs=5, alarm_after=2, patience=9)
    assert len([w for w in found if "collapsed" in str(w.message)]) == 1
    on = [r.get("alarms") for r in loop.records(tmp_path / loop.LOG)]
    assert on == [None, ["collapse"], ["collapse"], None, None]


def test_a_run_may_stop_at_an_alarm_and_keeps_its_best_epoch(tmp_path):
    beaten = {"accuracy_real": 1.0, "accuracy_fake": 0.995}
    recipe = Watched({}, beaten, beaten)
    with pytest.raises(alarms.Collapsed, match="epoch 3: .*the discriminator has won"):
        run(tmp_path, recipe=recipe, epochs=9, alarm_after=2, alarm="stop")
    assert load_trained(tmp_path)[1]["epoch"] == 1
    assert state.about(tmp_path)["progress"]["alarms"]["one-sided"] == 1  # of before epoch 3
    assert loop.records(tmp_path / loop.LOG)[-1]["alarms"] == ["one-sided"]


def test_an_alarm_needs_all_of_its_metrics_and_may_be_off():
    counts = {}
    one_right = {"accuracy_real": 1.0, "accuracy_fake": 0.5}
    assert not alarms.check(one_right, counts, Settings(alarm_after=1), 1).on
    assert not alarms.check({"accuracy_real": 1.0}, counts, Settings(alarm_after=1), 1).on
    assert not alarms.check(BAD, counts, Settings(alarm_after=1, alarm="off"), 1).on
    found = alarms.check(BAD, counts, Settings(alarm_after=1, alarm="stop"), 7)
    assert found.on == ["collapse"] and "coverage_floor 0.05" in found.stop


def test_divergence_names_the_player(tmp_path):
    model = fresh()

    def poison(progress, record):
        if progress.step == 4 and not record:
            model.G[0].weight.data[0, 0] = float("nan")

    with pytest.raises(loop.Diverged, match=r"step 4 .epoch 2., discriminator: loss nan.*epoch 1"):
        run(tmp_path, model, show=poison)


def test_a_best_that_is_never_finite_is_an_error(tmp_path):
    nothing = Watched(*[{"classifier_fid": float("nan")}] * 3)
    with pytest.raises(loop.Diverged, match="classifier_fid was never finite"):
        run(tmp_path, recipe=nothing, epochs=3)


# ---- wrong tables --------------------------------------------------------------------------------


def table(*players):
    return type("Of", (GANRecipe,), {"players": lambda self, model, options: players})()


@pytest.mark.parametrize(
    ("players", "message"),
    [
        ([Player("a", None, ("Q",))], "player 'a' has no parameter: .* of G, D, got"),
        ([Player("a", None, ("G",)), Player("b", None)], "one player a parameter, got several"),
        ([Player("a", None, ("G",)), Player("a", None, ("D",))], "name: expected another one"),
        ([Player("a", None, ("G.",))], "has no parameter"),
    ],
)  # fmt: skip
def test_players_without_a_place_are_refused(players, message):
    with pytest.raises(ValueError, match=message):
        seats(table(*players), fresh(), {}, Settings())


@pytest.mark.parametrize(
    "wrong", [{"optimizer": "lion"}, {"every": 0}, {"lr": 0.0}], ids=str
)  # fmt: skip
def test_players_are_checked(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        Player("a", None, **wrong)


def test_a_recipe_that_watches_no_best_is_refused(tmp_path):
    recipe = type("Blind", (GANRecipe,), {"watch": lambda *_: {"coverage": 1.0}})()
    with pytest.raises(ValueError, match="best: expected one of coverage, got 'classifier_fid'"):
        run(tmp_path, recipe=recipe)


def test_progress_is_json(tmp_path):
    run(tmp_path, epochs=1)
    assert json.dumps(state.about(tmp_path)["progress"])
