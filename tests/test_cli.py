"""The command line and the benchmark harness behind it."""

import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

import genfast
from genfast import cli
from genfast._archs import best, covers
from genfast.benchmarks import harness, report, shapes
from genfast.cli import bench
from genfast.info import collect
from genfast.models import VAE

TINY = "rng/rand/1000"


def run(*args: str) -> int:
    """Exit code of `genfast ARGS`."""
    try:
        return cli.main(args)
    except SystemExit as stop:  # argparse
        return stop.code


@pytest.fixture
def fast(monkeypatch):
    """Readings of 10 ms and no machine-wide limits: these tests are about the harness."""
    monkeypatch.setattr(harness.Settings, "budget_s", 0.01)
    limits = {"copy_gbps": 10.0, "read_gbps": 20.0, "fma_gflops": 100.0}
    monkeypatch.setattr(harness, "measure_limits", lambda settings: limits)


def case(**work) -> harness.Case:
    x = torch.ones(100)
    given = {"ours": x.exp, "rivals": {"eager": x.exp}, "proof": lambda: None, **work}
    return harness.Case("rng", "made up", (100,), lambda _: harness.Work(**given), bytes=800)


def test_the_readme_names_what_is_public():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert [name for name in genfast.__all__ if not re.search(rf"\b{name}\b", readme)] == []


# ---- info ----------------------------------------------------------------------------------------


def test_the_installed_command_runs():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, genfast.cli; sys.exit(genfast.cli.main())", "info"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{genfast.__version__}, noise contract" in done.stdout


def test_info_json(capsys):
    assert run("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["genfast"] == genfast.__version__ and facts["versions"]["torch"]
    assert facts["isa"] in facts["isa_usable"] and "base" in facts["isa_usable"]
    names = {b["name"]: b for b in facts["backends"]}
    assert names["cpu"]["usable"] and names["reference"]["usable"]
    assert all(b["why"] for b in facts["backends"])
    assert names["cuda"]["usable"] == (facts["cuda"]["built"] and torch.cuda.is_available())


def test_info_says_why_not_and_what_to_do(monkeypatch):
    monkeypatch.setattr("genfast.info.installed", lambda package: False)
    monkeypatch.setattr("genfast.info.pkgutil.iter_modules", lambda path: [1])
    backends = {b["name"]: b for b in collect()["backends"]}
    assert backends["triton"]["why"] == 'not installed: pip install "genfast[triton]"'
    monkeypatch.setattr("genfast.info._C.build_info", lambda: {**BUILD, "cuda": False})
    assert "GENFAST_CUDA=ON" in collect()["backends"][1]["why"]
    monkeypatch.setattr("genfast.info._C.build_info", lambda: {**BUILD, "cuda": True})
    monkeypatch.setattr("genfast.info._gpus", lambda: [])
    cuda = collect()["backends"][1]
    assert not cuda["usable"] and cuda["why"]
    monkeypatch.setattr("genfast.info._gpus", lambda: ["Card (sm_90)"])
    assert collect()["backends"][1] == {
        "name": "cuda", "usable": True, "why": "architectures 90-real; Card (sm_90)",
    }  # fmt: skip
    monkeypatch.setattr("genfast.info._capabilities", lambda: [(9, 0), (8, 6)])
    cuda = collect()["backends"][1]
    assert not cuda["usable"] and "without code for sm_86; rebuild with" in cuda["why"]
    assert cuda["why"].endswith("GENFAST_CUDA_ARCHS=86-real")
    monkeypatch.setattr("genfast.info._capabilities", lambda: [(7, 5)])
    assert collect()["backends"][1]["why"] == "no kernels for sm_75: they want sm_80 or newer"


@pytest.mark.parametrize(
    "architectures, runs_on, not_on",
    [
        ("80-real", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("86", [(8, 6), (8, 9), (9, 0), (12, 0)], [(8, 0)]),
        ("90a-real", [(9, 0)], [(10, 0)]),
        ("100f-real", [(10, 0), (10, 3)], [(12, 0)]),
        ("80-real 90-virtual", [(8, 6), (9, 0), (10, 0), (12, 1)], [(7, 0)]),
        ("", [], [(9, 0)]),
    ],
)
def test_which_gpus_a_build_covers(architectures, runs_on, not_on):
    assert all(covers(architectures, c) for c in runs_on)
    assert not any(covers(architectures, c) for c in not_on)


def test_what_a_gpu_is_built_for_covers_it():
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)):
        assert covers(best(capability), capability)
    assert best((9, 0)) == "90a-real"  # without the a there are no warpgroups


BUILD = {
    "isa": "base", "isa_usable": ["base"], "threads": "gomp", "compiler": "GNU 12",
    "cuda": True, "cuda_archs": "90-real", "exchange_api": True,
}  # fmt: skip


# ---- bench ---------------------------------------------------------------------------------------


def test_every_family_file_has_cases_with_unique_ids():
    families = harness.available_families()
    assert {"rng", "sampling"} <= set(families)
    ids = [c.id for c in harness.load_cases()]
    assert len(set(ids)) == len(ids)
    assert {c.family for c in harness.load_cases()} == set(families)
    # No ideal amount of work is known of these.
    whole_models = {"models", "transformers", "gan", "hybrid"}
    kernels = (c for c in harness.load_cases()
               if c.family not in whole_models and not c.name.startswith("StyleGAN2"))  # fmt: skip
    assert all(c.bytes or c.flops for c in kernels)


@pytest.mark.parametrize(
    "case", [c for c in harness.load_cases(["rng", "sampling"])
             if torch.Size(c.shape).numel() <= 2**18], ids=lambda c: c.id,
)  # fmt: skip
def test_small_cases_pass_their_proofs(case):
    work = case.setup(torch.device("cpu"))
    harness.prove(case, work)
    for name, call in {"ours": work.ours, **work.rivals}.items():
        assert call() is not None, name


def test_bench_json_and_plot(tmp_path, capsys, fast):
    files = tmp_path / "rows.json", tmp_path / "rows.png"
    threads = torch.get_num_threads()
    done = run("bench", "rng", "--only", TINY, "--quick", "--threads", "1",
               "--json", str(files[0]), "--plot", str(files[1]))  # fmt: skip
    assert done == 0 and torch.get_num_threads() == threads
    shown = capsys.readouterr().out
    assert "rand" in shown and "vs eager" in shown and "1 threads" in shown
    found = json.loads(files[0].read_text())
    assert found["schema"] == report.SCHEMA and found["machine"]["threads"] == 1
    assert found["machine"]["cpu"] and found["machine"]["isa"] == collect()["isa"]
    assert found["versions"]["torch"] == torch.__version__ and "commit" in found["versions"]
    assert found["limits"] == {"copy_gbps": 10.0, "read_gbps": 20.0, "fma_gflops": 100.0}
    (row,) = found["rows"]
    assert row["id"] == "rng/rand/1000/float32" and row["shape"] == [1000]
    ours, eager = row["seconds"], row["rivals"]["eager"]
    assert 0 < ours["least"] <= ours["q1"] <= ours["median"] <= ours["q3"]
    assert eager["ratio"] == pytest.approx(eager["seconds"]["median"] / ours["median"])
    assert row["gbps"] == pytest.approx(4000 / ours["median"] / 1e9)
    assert row["share"] == pytest.approx(row["gbps"] / 10) and row["limit"] == "copy"
    assert files[1].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def wrong():
    raise AssertionError("y: error 1 against float64, allowed 1e-06")


def test_a_failed_proof_shows_no_time(tmp_path, capsys, fast, monkeypatch):
    timed = []
    cases = [case(), case(proof=wrong, ours=lambda: timed.append(1))]
    monkeypatch.setattr(harness, "load_cases", lambda *_: cases)
    out = tmp_path / "rows.json"
    assert run("bench", "--threads", "1", "--json", str(out)) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and not out.exists() and not timed
    said = " ".join(shown.err.split())
    assert "proof failed" in said and "error 1 against float64, allowed 1e-06" in said


def test_proof_helpers_catch_wrong_answers():
    truth = torch.linspace(-1, 1, 9, dtype=torch.float64)
    good = truth.float()
    harness.assert_bitwise("y", good, good.clone())
    harness.assert_judged("y", good, good, truth)
    nan = good.clone().index_fill_(0, torch.tensor([3]), torch.nan)
    for bad in (good + 1e-5, nan):
        with pytest.raises(AssertionError, match="y: "):
            harness.assert_judged("y", bad, good, truth)
        with pytest.raises(AssertionError, match="y: "):
            harness.assert_bitwise("y", bad, good)
    with pytest.raises(AssertionError, match="expected shape"):
        harness.assert_judged("y", good[:3], good, truth)
    with pytest.raises(AssertionError, match="expected float32"):
        harness.assert_bitwise("y", good.double(), good)


def test_readings_are_interleaved_and_ordered(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def call(name, cost):
        def go():
            order.append(name)
            clock[0] += cost

        return go

    found = harness.measure({"a": call("a", 2e-3), "b": call("b", 6e-3)}, 0.04)
    assert found["a"].median == pytest.approx(2e-3) and found["b"].median == pytest.approx(6e-3)
    assert found["a"].spread == pytest.approx(0, abs=1e-9) and found["a"].inner == 1
    assert found["a"].repeats == found["b"].repeats == 5
    assert order[-4:] == ["b", "a", "a", "b"]  # the order rotates


def test_a_rival_that_fails_is_skipped_with_its_reason(fast, capsys):
    def absent():
        raise ImportError("diffusers is not installed")

    (_, row) = harness.run([case(late={"diffusers": absent})], harness.Settings(threads=1))
    assert row.skipped == {"diffusers": "diffusers is not installed"} and "eager" in row.ratios
    report.show([row], harness.Settings(threads=1))
    assert "skipped diffusers: diffusers is not installed" in capsys.readouterr().out
    (_, row) = harness.run([case(late={"diffusers": absent})], harness.Settings(quick=True))
    assert row.skipped == {"diffusers": "--quick"}


def test_a_family_without_cases_is_named(capsys, monkeypatch):
    monkeypatch.setattr(harness, "load_cases", lambda *_: [])  # as without diffusers
    assert run("bench", "schedulers") != 0
    assert "family: expected one with cases on cpu here, got schedulers" in capsys.readouterr().err


def test_a_missed_target_is_named_and_fails_only_on_request(fast, capsys, monkeypatch):
    missed = harness.Case("rng", "slow", (100,), case().setup, bytes=8, targets={"eager": 1e9})
    monkeypatch.setattr(harness, "load_cases", lambda *_: [missed])
    assert run("bench", "--quick", "--threads", "1") == 0
    assert "below target: rng/slow/100/float32" in capsys.readouterr().out
    assert run("bench", "--quick", "--check") == 1


def test_bench_list_times_nothing(capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", None)
    assert run("bench", "rng", "--list") == 0
    assert capsys.readouterr().out.splitlines() == [c.id for c in harness.load_cases(["rng"])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (1, 1), (5, 3, 12), (2, 3, 5, 6)], ids=str)
def test_ops_of_a_users_shape_pass_their_proofs(shape, dtype):
    for channels_last in (False, True)[: 1 + (len(shape) == 4)]:
        found = shapes.cases([shape], dtype=dtype, channels_last=channels_last)
        assert len({c.id for c in found}) == len(found) >= 14
        assert not channels_last or {"rng", "attention"}.isdisjoint(c.family for c in found)
        for c in found:
            work = c.setup(torch.device("cpu"))
            harness.prove(c, work)
            ours, eager = work.ours(), work.rivals["eager"]()
            assert [y.shape for y in ours] == [y.shape for y in eager] or c.name in OTHER_SHAPES


# Of multinomial, whose draws keep a dimension.
OTHER_SHAPES = {"sample_categorical", "sample_tokens top_p"}


def test_a_wrong_answer_for_a_users_shape_shows_no_times(capsys, fast, monkeypatch):
    line = shapes.Line("rng", "wrong", lambda t, x: 1.01 * genfast.tanh_normal(x, x, seed=1),
                       lambda t, x: x, ("x",))  # fmt: skip
    right = genfast.tanh_normal
    monkeypatch.setattr(shapes, "LINES", (line,))
    monkeypatch.setattr(
        genfast, "tanh_normal",
        lambda *args, **more: right(*args, **more) * (1 + (genfast.get_backend() == "auto")),
    )  # fmt: skip
    assert run("bench", "--shape", "4x5", "--threads", "1") == 1
    seen = capsys.readouterr()
    assert "wrong: error" in seen.err and "GB/s" not in seen.out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_of_zeros_fails_its_proof(dtype, monkeypatch):
    """That of a mean is small beside the normals that it is of."""
    right = genfast.denoising_loss

    def wrong(output, *args, **more):
        found = right(output, *args, **more)
        return found if genfast.get_backend() != "auto" else found.detach() + 0 * output.sum()

    monkeypatch.setattr(genfast, "denoising_loss", wrong)
    found = [c for c in shapes.cases([(4096, 10), (2, 3, 5, 5)], ["diffusion"], dtype)
             if "loss" in c.name and "bwd" in c.name]  # fmt: skip
    assert len(found) == 4
    for c in found:
        with pytest.raises(harness.ProofFailed, match="loss.*error"):
            harness.prove(c, c.setup(torch.device("cpu")))


def test_an_interrupt_keeps_what_was_measured(fast, capsys, monkeypatch, tmp_path):
    def interrupted(cases, settings):
        yield None
        yield harness.run_case(cases[0], settings, harness.measure_limits(settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "run", interrupted)
    out = tmp_path / "rows.json"
    assert run("bench", "rng", "--shape", "4x5", "--json", str(out)) == 130
    seen = capsys.readouterr()
    assert "stopped after 1 of 3 cases" in seen.err and "randn" in seen.out
    assert len(json.loads(out.read_text())["rows"]) == 1


def test_bench_of_a_users_shape(capsys, fast):
    assert run("bench", "diffusion", "--shape", "3,5", "--shape", "2x3x4x4", "--dtype", "bfloat16",
               "--only", "add_noise", "--threads", "1") == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("(3,5)", "(2,3,4,4)", "bfloat16", "vs eager"))
    assert run("bench", "--sweep", "--list") == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(set(listed)) == len(listed) == len(shapes.cases(shapes.SWEEP)) > 400
    assert len(shapes.cases([(4, 5), (4, 5)])) == len(shapes.cases([(4, 5)]))


# ---- train and generate --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    threads = torch.get_num_threads()
    assert run("train", "vae", "--data", "mnist5k", "--out", str(folder), "--epochs", "1",
               "--batch-size", "256", "--seed", "3", "--threads", "1") == 0  # fmt: skip
    torch.set_num_threads(threads)
    return folder


def pixels(path):
    from PIL import Image

    with Image.open(path) as image:
        return image.size, image.tobytes(), json.loads(image.text.get("genfast", "null"))


def test_train_writes_its_files(trained):
    assert {p.name for p in trained.iterdir()} >= {
        "model.safetensors", "state.safetensors", "log.jsonl", "loss.png", "samples.png",
        "reconstructions.png", "interpolations.png",
    }  # fmt: skip
    (record,) = map(json.loads, (trained / "log.jsonl").read_text().splitlines())
    assert record["step"] == 16 and record["validation_loss"] < 350  # nats; 544 before training
    assert pixels(trained / "samples.png")[0] == (8 * 30 + 2, 8 * 30 + 2)


def test_generate_gives_the_same_pixels_for_any_batch_size(trained, tmp_path):
    found = []
    for batch in (1, 7, 64, 100):
        out = tmp_path / f"{batch}.png"
        assert run("generate", "--from", str(trained), "--seed", "5", "--count", "70",
                   "--batch-size", str(batch), "--out", str(out)) == 0  # fmt: skip
        found.append(pixels(out)[1])
    assert len(set(found)) == 1
    size, first, about = pixels(tmp_path / "7.png")
    assert size == (9 * 30 + 2, 8 * 30 + 2) and about["seed"] == 5 and about["model"] == "vae"
    assert run("generate", "--from", str(trained), "--seed", "6", "--count", "70") == 0
    assert pixels(trained / "generated-6.png")[1] != first


@pytest.mark.parametrize("name", ["drawn.png", "DRAWN.PNG", "drawn.safetensors"])
def test_a_generated_file_says_where_it_comes_from(trained, tmp_path, name, capsys):
    out = tmp_path / name
    assert run("generate", "--from", str(trained), "--seed", "5", "--count", "3",
               "--out", str(out)) == 0  # fmt: skip
    capsys.readouterr()
    assert run("inspect", str(out), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    digest = hashlib.sha256((trained / "model.safetensors").read_bytes()).hexdigest()
    assert said["model"] == "vae" and said["checkpoint_sha256"] == digest
    assert said["seed"] == 5 and said["count"] == 3 and said["genfast"] == genfast.__version__
    assert abs(datetime.now(timezone.utc) - datetime.fromisoformat(said["date"])).seconds < 600
    assert run("inspect", str(out)) == 0
    assert f"checkpoint_sha256  {digest}" in capsys.readouterr().out


def test_inspect_reads_checkpoints(trained, capsys):
    for name in ("model", "state"):
        assert run("inspect", str(trained / f"{name}.safetensors"), "--json") == 0
        said = json.loads(capsys.readouterr().out)
        assert said["model"] == "vae" and said["settings"]["batch_size"] == 256
        assert said["config"]["z_dim"] == 20 and said["data"] == "mnist5k"


def test_evaluate_prints_and_writes_metrics(trained, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    assert run("evaluate", "--from", str(trained), "--count", "60", "--json", str(out)) == 0
    shown = capsys.readouterr().out
    said = json.loads(out.read_text())
    metrics = said["metrics"]
    assert metrics["digit-classifier accuracy"] > 0.9 and metrics["digit-classifier FID"] > 0
    assert metrics["ln p(x) >= (50 draws), nats"] > metrics["elbo, nats"] > -350
    assert all(0 <= metrics[k] <= 1 for k in ("precision", "recall", "coverage"))
    assert all(name in shown for name in metrics) and "FID" not in {n.split()[0] for n in metrics}


def test_a_config_file_and_flags_make_the_same_run_and_resume_ends_there(tmp_path, capsys):
    by_file, by_flags = tmp_path / "file", tmp_path / "flags"
    config = tmp_path / "run.yaml"
    config.write_text("model: conv-vae\ndata: digits\nepochs: 2\nlr: 0.001\nwidth: 4\n"
                      "z-dim: 6\nthreads: 1\n")  # fmt: skip
    assert run("train", "--config", str(config), "--out", str(by_file), "--epochs", "1") == 0
    assert run("train", "conv-vae", "--data", "digits", "--out", str(by_flags), "--epochs", "1",
               "--lr", "1e-3", "--width", "4", "--z-dim", "6") == 0  # fmt: skip
    files = [(folder / "model.safetensors").read_bytes() for folder in (by_file, by_flags)]
    assert files[0] == files[1]
    capsys.readouterr()
    (by_file / "log.jsonl").write_bytes(b"\xff\n3\n")  # no record left: none to draw
    assert run("train", "--resume", "--out", str(by_file)) == 0
    assert (by_file / "model.safetensors").read_bytes() == files[0]
    assert "wrote model.safetensors, log.jsonl, reconstructions.png" in capsys.readouterr().out
    assert run("train", "--resume", "--out", str(by_file), "--lr", "0.1") == 2
    assert "leave --lr away" in capsys.readouterr().err
    config.write_text("model: vae\ndata: digits\nepochs: 1\nlr: 0.1\nwidth: 4\n")
    assert run("train", "--resume", "--out", str(by_file), "--config", str(config)) == 2
    assert "of the run (conv-vae); leave --lr, --model away" in capsys.readouterr().err
    config.write_text("model: conv-vae\ndata: digits\nepochs: 1\nz-dim: 6\n")
    assert run("train", "--resume", "--out", str(by_file), "--config", str(config)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["generate", "inpaint", "super-resolution"])
def test_diffusion_from_the_command_line(task, tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert run("train", "diffusion", "--data", "digits", "--out", folder, "--epochs", "1",
               "--widths", "8,16", "--task", task, "--threads", "1") == 0  # fmt: skip
    label = ("--label", "3", "--guidance", "2")
    for batch in ("5", "20"):
        assert run("generate", "--from", folder, "--seed", "1", "--count", "20", "--plan", "ddim",
                   "--steps", "3", "--batch-size", batch, "--out", f"{folder}/{batch}.png",
                   *label) == 0  # fmt: skip
    (_, one, about), (_, two, _) = (pixels(f"{folder}/{b}.png") for b in ("5", "20"))
    assert one == two and about["options"]["plan"] == "ddim" and about["options"]["label"] == 3
    capsys.readouterr()
    assert run("evaluate", "--from", folder, "--count", "20", "--steps", "2") == 0
    shown = capsys.readouterr().out
    assert ("bits per dimension" if task == "generate" else "PSNR, dB, what was given") in shown
    if task != "generate":
        assert run("evaluate", "--from", folder, "--count", "20", "--label", "3") == 2
        assert "--label: no option here" in capsys.readouterr().err
    for label in ("10", "-2"):
        assert run("generate", "--from", folder, "--seed", "1", "--label", label) == 2
        assert (
            f"--label: expected a class in 0 ... 9, or -1 for every one in turn, got {label}"
            in (capsys.readouterr().err)
        )


# ---- wrong input ---------------------------------------------------------------------------------

WRONG = {
    "no command": ([], "COMMAND"),
    "unknown command": (["fly"], "fly"),
    "unknown family": (["bench", "rgn"], "expected one of rng, sampling"),
    "no such case": (
        ["bench", "--only", "rng/rand/1e3"],
        "contains 'rng/rand/1e3'; the closest are rng/rand/1000/float32, ",
    ),
    "whole number": (
        ["train", "vae", "--data", "digits", "--out", ".", "--h-dim", "9" * 5000],
        f"--h-dim: expected an int in [-2**63, 2**63), got '{'9' * 40}'...",
    ),
    "whole numbers": (
        ["train", "diffusion", "--data", "digits", "--out", ".", "--widths", f"8,{2**63}"],
        "widths: expected whole numbers such as 16,32,64, got '8,9",
    ),
    "threads": (["bench", "--threads", "0"], "expected an int >= 1, got '0'"),
    "many threads": (["bench", "--threads", "100000000"], "--threads: expected an int <= 1024"),
    "out is empty": (
        ["train", "vae", "--data", "mnist5k", "--out", ""],
        "--out: expected the name of a folder, got ''",
    ),
    "from is empty": (["generate", "--from", "", "--seed", "1"], "--from: expected the name of a"),
    "prompt of bytes": (
        ["generate", "--from", ".", "--seed", "1", "--prompt", "\udcff\udcfe"],
        "--prompt: expected UTF-8 text, got '\\udcff\\udcfe'",
    ),
    "json name": (["bench", "--json", "rows.txt"], "expected a file name in .json"),
    "json folder": (["bench", "--json", "no/such/rows.json"], "does not exist"),
    "json is a folder": (["bench", "--json", "FOLDER.json"], "expected a file, got the folder"),
    "calibrate a family": (["bench", "rng", "--calibrate"], "--calibrate: measures all"),
    "shape": (
        ["bench", "--shape", "4xb"],
        "--shape: expected a shape such as 16x4x32x32, got '4xb'",
    ),
    "shape of none": (["bench", "--shape", "4x0"], "--shape: expected an int >= 1, got '0'"),
    "huge shape": (["bench", "--shape", "65536x65536"], "--shape: expected at most 2**26 numbers"),
    "family of a shape": (
        ["bench", "models", "--shape", "4x4"],
        "family: expected one of rng, sampling, diffusion, attention, filtering, normalization",
    ),
    "shape that none takes": (
        ["bench", "attention", "--shape", "4x4"],
        "--shape: expected one that an op of attention takes, got (4, 4)",
    ),
    "rows with channels last": (
        ["bench", "--shape", "4x4", "--channels-last"],
        "--channels-last: expected shapes of images such as 16x4x32x32, got (4, 4)",
    ),
    "dtype of the grid": (
        ["bench", "--dtype", "bfloat16"],
        "--dtype: of --shape and --sweep; the grid has its own",
    ),
    "long attention": (
        ["bench", "attention", "--shape", "1x16x32768x64"],
        "--shape: expected one that an op of attention takes, got (1, 16, 32768, 64)",
    ),
    "calibrate an order": (
        ["bench", "--calibrate", "--channels-last"],
        "--calibrate: measures all that the table",
    ),
    "calibrate a shape": (
        ["bench", "--calibrate", "--shape", "4x4"],
        "--calibrate: measures all that the table",
    ),
    "unknown model": (["train", "vea", "--data", "mnist5k", "--out", "."], "expected one of vae"),
    "unknown data": (["train", "vae", "--data", "mnist", "--out", "."], "expected one of mnist5k"),
    "learning rate": (
        ["train", "vae", "--data", "mnist5k", "--out", ".", "--lr", "-1"],
        "lr: expected a number > 0",
    ),
    "no out": (["train", "vae", "--data", "mnist5k"], "pass --out DIR"),
    "another model's option": (
        ["train", "vae", "--data", "mnist5k", "--out", ".", "--width", "3"],
        "--width: no option of vae, which takes --h-dim",
    ),
    "nothing to resume": (["train", "--resume", "--out", "/nowhere"], "nothing to resume"),
    "no config": (["train", "--config", "no.toml", "--out", "."], "no.toml"),
    "inspect nothing": (["inspect", "no.png"], "no such file"),
    "inspect text": (["inspect", "no.txt"], "expected a file in .png, .safetensors"),
    "no checkpoint": (["generate", "--from", "/nowhere", "--seed", "1"], "model.safetensors"),
    "seed": (["generate", "--from", ".", "--seed", "x"], "expected an int in [0, 2**63), got 'x'"),
    "count": (["generate", "--from", ".", "--seed", "1", "--count", "-3"], "expected an int >= 1"),
}


@pytest.mark.parametrize(("args", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_says_what_was_expected(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER.json").mkdir()
    assert run(*args) == 2
    assert message in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m genfast.cli bench --list | true; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_help_says_which_defaults_a_model_has_of_its_own(capsys):
    assert run("train", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "conv-vae: --lr 0.002, --epochs 30; diffusion:" in shown
    assert "--epochs EPOCHS passes over the training part, at most (default: 60)" in shown


def test_a_missing_package_names_the_install_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("genfast._extras.installed", lambda package: package != "rich")
    assert run("bench", "--quick") == 2
    assert 'needs rich, which is not installed: pip install "genfast[cli]"' in (
        capsys.readouterr().err
    )
    assert run("train", "vae", "--data", "mnist5k", "--out", str(tmp_path)) == 2
    assert 'pip install "genfast[cli]"' in capsys.readouterr().err


def refused(config, text, message, capsys):
    config.write_text(text)
    assert run("train", "--config", str(config), "--out", str(config.parent)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "epoch: expected one of"),
        ("epoch = 3", "did you mean epochs?"),
        ("epochs = 'many'", "epochs: expected a whole number, got 'many'"),
        ("epochs = 2.5", "epochs: expected a whole number, got 2.5"),
        ("lr = [1, 2]", "lr: expected a number, got [1, 2]"),
        ("threads = 0", "threads: expected an int >= 1, got '0'"),
        (
            "model = 'diffusion'\ndata = 'digits'\nwidths = [8, 'x']",
            "widths: expected whole numbers such as 16,32,64, got '8,x'",
        ),
        ("resume = 'yes'", "resume: expected true or false"),
        ("device = 'gpu'", "device: expected one of auto, cpu, got 'gpu'"),
        ("model = 'vea'\ndata = 'digits'", "model: expected one of vae"),
    ],
)
def test_a_wrong_config_names_the_entry(text, message, tmp_path, capsys):
    refused(tmp_path / "run.toml", text, message, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h-dim: 3\nh_dim: 4", "expected each name once, got 'h-dim' and 'h_dim'; leave one away"),
        ("threads: 100000000", "threads: expected an int <= 1024, got '100000000'"),
        ("data:", "data: expected a value, got none"),
        ("epochs: true", "epochs: expected a whole number, got True"),
        ("alarm: on\nmodel: vae\ndata: here", "alarm: expected one of warn, stop, off, got 'on'"),
        # off is the word, not false: what is wrong is the data
        ("alarm: off\nmodel: vae\ndata: here", "expected one of mnist5k, digits"),
    ],
)
def test_words_of_yaml(text, message, tmp_path, capsys):
    refused(tmp_path / "run.yaml", text, message, capsys)


def test_a_list_in_a_config_is_a_flag_with_commas(tmp_path, capsys):
    pytest.importorskip("sklearn")
    path = tmp_path / "run.yaml"
    path.write_text("model: diffusion\ndata: digits\nepochs: 1\nwidths: [4, 8]\nthreads: 1\n"
                    "labels: false\nbatch_size: 500\n")  # fmt: skip
    assert run("train", "--config", str(path), "--out", str(tmp_path)) == 0
    capsys.readouterr()
    assert run("inspect", str(tmp_path / "model.safetensors"), "--json") == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert config["widths"] == [4, 8] and config["classes"] == 0


def test_evaluate_refuses_other_images_and_too_few(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("mlxtend")
    folder = str(tmp_path)
    assert run("train", "vae", "--data", "digits", "--out", folder, "--epochs", "1") == 0
    capsys.readouterr()
    assert run("evaluate", "--from", folder, "--data", "mnist5k") == 2
    assert "--data: expected images of [1, 8, 8], the model's, got [1, 28, 28]" in (
        capsys.readouterr().err
    )
    assert run("evaluate", "--from", folder, "--count", "5") == 2
    assert "count: expected more than 5 samples" in capsys.readouterr().err


def test_a_run_without_notes_says_what_it_lacks(tmp_path, capsys):
    """Of `genfast.train.loop.train`, which names no data set by itself."""
    pytest.importorskip("sklearn")
    from genfast.train import checkpoint, loop
    from genfast.train.recipes import RECIPES
    from genfast.train.settings import Settings

    recipe, folder = RECIPES["vae"], str(tmp_path)
    defaults = {key: option.default for key, option in recipe.options.items()}
    data = recipe.load("digits", defaults)
    model = checkpoint.initialised(lambda: VAE(64, 8, 2), 1)
    loop.train("vae", recipe, model, data, Settings(epochs=1), tmp_path, show=lambda *a: None)
    capsys.readouterr()
    assert run("evaluate", "--from", folder) == 2
    assert f"--data: expected a data set, as {folder} names none" in capsys.readouterr().err
    assert run("evaluate", "--from", folder, "--data", "digits", "--count", "60") == 0
    assert run("train", "vae", "--resume", "--out", folder) == 2
    assert "names no data and no options; it goes on by" in capsys.readouterr().err


def test_damaged_facts_are_named(trained, tmp_path, capsys):
    from genfast import _files
    from genfast.train import checkpoint, state

    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = {name: checkpoint.read(folder / name) for name in (checkpoint.CHECKPOINT, state.STATE)}
    generate = ("generate", "--from", str(folder), "--seed", "1", "--count", "2")
    resume = ("train", "--resume", "--out", str(folder))
    for name, command, key, value in (
        (checkpoint.CHECKPOINT, generate, "shape", None),
        (checkpoint.CHECKPOINT, generate, "shape", [1, 7, 7]),
        (checkpoint.CHECKPOINT, generate, "options", [1]), (state.STATE, resume, "options", [1]),
        (state.STATE, resume, "model", "diffusion"), (state.STATE, resume, "data", ["mnist5k"]),
        (state.STATE, resume, "progress", {"step": "x"}), (state.STATE, resume, "settings", None),
    ):  # fmt: skip
        tensors, about = before[name]
        facts = {k: v for k, v in (about | {key: value}).items() if v is not None}
        _files.write_tensors(folder / name, tensors, facts)
        assert run(*command) == 2
        told = capsys.readouterr().err
        assert ("options" if key == "model" else key) in told and told.count("\n") == 1
        _files.write_tensors(folder / name, *before[name])
    assert run(*generate) == run(*resume) == 0


def test_inspect_refuses_what_says_nothing(tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # for speed: 90 million else
    Image.new("L", (20, 20)).save(tmp_path / "bomb.png")
    Image.new("L", (2, 2)).save(tmp_path / "plain.png")
    (tmp_path / "half.safetensors").write_bytes(b"xx")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "latin.json").write_bytes(b"caf\xe9")
    (tmp_path / "folder.png").mkdir()
    for name, message in (
        ("plain.png", "says nothing"), ("half.safetensors", "not a readable"),
        ("empty.json", "empty.json: says nothing"), ("latin.json", "latin.json: expected UTF-8"),
        ("folder.png", "a folder"), ("bomb.png", "bomb.png: not a readable PNG"),
    ):  # fmt: skip
        assert run("inspect", str(tmp_path / name)) == 2
        assert message in capsys.readouterr().err


_FREED = """
import ctypes, sys, torch
from genfast._memory import keep_freed_memory

class Mallinfo2(ctypes.Structure):  # malloc.h, glibc 2.33 and later
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]

kept = sys.argv[1] == "keep" and keep_freed_memory()
info = ctypes.CDLL(None).mallinfo2
info.restype = Mallinfo2
x = torch.ones(2**26)
mapped = info().hblkhd
del x
print(kept, mapped, info().fordblks)
"""


def _freed(*words: str, **environment: str) -> list[str]:
    """Whether malloc was told to keep, what of 256 MiB it maps from the system on its own, and
    what it holds for the next allocation once they are freed."""
    return subprocess.run(
        [sys.executable, "-c", _FREED, *words], check=True, capture_output=True, text=True,
        env=os.environ | environment,
    ).stdout.split()  # fmt: skip


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="malloc says nothing: glibc before 2.33"
)
def test_freed_memory_is_kept_by_what_steps_a_model():
    size = 2**28
    kept, mapped, held = _freed("keep")
    if kept != "True":
        pytest.skip("a glibc that refuses the threshold")
    assert int(mapped) < size <= int(held)
    kept, mapped, held = _freed("leave")  # its own habit: mapped, and given back
    assert kept == "False" and int(held) < size <= int(mapped)
    # What a user sets stays.
    kept, mapped, held = _freed("keep", MALLOC_MMAP_THRESHOLD_="65536")
    assert int(held) < size <= int(mapped)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["train", "vae"], True),
        (["generate", "--seed", "1"], True),
        (["evaluate"], True),
        (["info"], False),
    ],
)
def test_the_commands_that_step_a_model_keep_freed_memory(words, wanted, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: asked.append(words[0]))
    nowhere = str(tmp_path / "nowhere")
    run(*words, *{"train": ["--data", nowhere, "--out", nowhere], "info": []}.get(
        words[0], ["--from", nowhere]))  # fmt: skip
    assert asked == ([words[0]] if wanted else [])
