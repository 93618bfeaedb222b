"""The drop-in schedulers in pipelines, accelerated and restored, and what they fall back on."""

import gc
import weakref

import numpy as np
import pytest
import torch
from peers import FILES, close, make, run, started, takes_generator

diffusers = pytest.importorskip("diffusers", exc_type=ImportError)

import genfast  # noqa: E402
from genfast.integrations import diffusers as dropin  # noqa: E402
from genfast.integrations.diffusers import rows  # noqa: E402
from genfast.ops import _backend  # noqa: E402

diffusers.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("one_thread"),  # tiny tensors
]

STOCHASTIC = [n for n in FILES if takes_generator(n)]


# --------------------------------------------------------------------------------------------------
# pipelines


def tiny_unet(**kw):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **kw,
    )  # fmt: skip


def tiny_dit():
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8
    )
    return transformer.eval(), vae.eval()  # labels are dropped at random in training


def images(pipe, **kw):
    return pipe(generator=torch.Generator().manual_seed(1), output_type="np", **kw).images


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_unet_pipelines_accelerated_and_restored(name, tmp_path):
    pipe = getattr(diffusers, f"{name}Pipeline")(tiny_unet(), make(name, library=diffusers))
    pipe.set_progress_bar_config(disable=True)
    kw = dict(batch_size=2, num_inference_steps=8, **(dict(eta=0.5) if name == "DDIM" else {}))
    want = images(pipe, **kw)
    assert genfast.accelerate(pipe) is pipe and genfast.accelerate(pipe) is pipe
    assert type(pipe.scheduler) is getattr(dropin, f"{name}Scheduler")
    np.testing.assert_allclose(images(pipe, **kw), want, atol=2e-4)
    assert pipe.scheduler.genfast_fallback is None
    pipe.save_pretrained(tmp_path)  # loads without genfast
    loaded = type(pipe).from_pretrained(tmp_path)
    assert type(loaded.scheduler) is getattr(diffusers, f"{name}Scheduler")
    assert genfast.restore(pipe) is pipe
    assert type(pipe.scheduler) is getattr(diffusers, f"{name}Scheduler")
    assert not [k for k in vars(pipe.scheduler) if "genfast" in k]
    np.testing.assert_array_equal(images(pipe, **kw), want)


def test_an_accelerated_pipeline_gives_a_replaced_part_up():
    """As one frees a text encoder that has done its work."""
    pipe = genfast.accelerate(diffusers.DDIMPipeline(tiny_unet(), make("DDIM", library=diffusers)))
    gone = weakref.ref(pipe.unet)
    pipe.unet = tiny_unet()
    gc.collect()
    assert gone() is None
    genfast.restore(pipe)


def test_modular_pipelines():
    from diffusers.modular_pipelines import ComponentSpec

    class Blocks(diffusers.ModularPipelineBlocks):
        @property
        def expected_components(self):
            kinds = {"unet": diffusers.UNet2DModel, "scheduler": diffusers.DDIMScheduler}
            return [ComponentSpec(name, kind) for name, kind in kinds.items()]

    pipe = diffusers.ModularPipeline(blocks=Blocks())
    unet, scheduler = tiny_unet(), make("DDIM", library=diffusers)
    pipe.update_components(unet=unet, scheduler=scheduler)
    genfast.accelerate(pipe)
    assert type(scheduler) is dropin.DDIMScheduler
    assert any(type(m) is genfast.nn.Linear for m in unet.modules())
    genfast.restore(pipe)
    assert type(scheduler) is diffusers.DDIMScheduler
    assert not any(type(m) is genfast.nn.Linear for m in unet.modules())


@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep", "EulerDiscrete", "UniPCMultistep"])
def test_dit_pipeline(name, tmp_path):
    transformer, vae = tiny_dit()
    found = []
    for library in (diffusers, dropin):
        pipe = diffusers.DiTPipeline(transformer, vae, make(name, library=library))
        pipe.set_progress_bar_config(disable=True)
        found.append(images(pipe, class_labels=[1, 2], num_inference_steps=5))
    np.testing.assert_allclose(found[1], found[0], atol=2e-4)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is getattr(dropin, f"{name}Scheduler")


def test_accelerate_in_the_middle_of_a_run():
    """State is kept both ways."""
    for name in FILES:
        outs = []
        for switch in (False, True):
            s = started(make(name, library=diffusers), 8)
            g = torch.Generator().manual_seed(0)
            x = torch.randn(1, 3, 4, 4, generator=g)
            torch.manual_seed(0)
            for i, t in enumerate(s.timesteps):
                if switch and i in (2, 5):
                    (genfast.accelerate if i == 2 else genfast.restore)(s)
                x = s.step(torch.randn(1, 3, 4, 4, generator=g), t, x).prev_sample
            outs.append(x)
        close(*outs)


FLOWLESS = ("DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "SASolver",
            "UniPCMultistep", "DDIM", "DDPM")  # fmt: skip


@pytest.mark.parametrize("name", FLOWLESS)
def test_flow_prediction_off_a_flows_grid_is_diffusers(name):
    """Its numbers, or its refusal: our rows need alpha = 1 - sigma there."""
    found = []
    for library in (dropin, diffusers):
        s = make(name, {"prediction_type": "flow_prediction"}, library)
        try:
            drawn = {"generator": torch.Generator().manual_seed(1)} if name in STOCHASTIC else {}
            found.append(run(s, **drawn))
        except ValueError as error:
            found.append(str(error))
    if isinstance(found[1], str):
        assert found[0] == found[1]
    else:
        close(*found)


def test_the_reason_of_a_fallback_ends_with_its_schedule():
    s = started(make("FlowMatchEulerDiscrete"), 4)
    x = torch.randn(1, 3, 4)
    s.step(x, s.timesteps[0], x, per_token_timesteps=torch.full((1, 3), 500.0))
    assert "per-token" in s.genfast_fallback
    started(s, 4)
    s.step(x, s.timesteps[0], x)
    assert s.genfast_fallback is None


def test_fp64_outputs_draw_fp64_noise():
    for name in STOCHASTIC:
        ga, gb = (torch.Generator().manual_seed(5) for _ in range(2))
        a = run(make(name), generator=ga, dtype=torch.float64)
        b = run(make(name, library=diffusers), generator=gb, dtype=torch.float64)
        assert torch.equal(ga.get_state(), gb.get_state()), name
        close(a, b)


def test_an_accelerated_scheduler_can_be_forgotten():
    s = genfast.accelerate(make("DDIM", library=diffusers))
    seen = weakref.ref(s)
    del s
    gc.collect()
    assert seen() is None


def test_accelerate_leaves_other_things_alone():
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, a diffusers pipeline"):
        genfast.accelerate(3)
    other = diffusers.RePaintScheduler()
    assert genfast.accelerate(other) is other and type(other) is diffusers.RePaintScheduler


def test_a_backend_asked_for_by_name_does_the_steps_or_says_why_not(monkeypatch):
    """Clipped, thresholded, in 16 bit with fp32 samples, seeded, and in the forward process."""

    def run(name, dtype=torch.float32, **config):
        s = make(name, config)
        s.genfast_seed = 3
        s.set_timesteps(5)
        x = genfast.randn(1, 3, 8, 8, seed=0)
        for t in s.timesteps[:3]:
            m = genfast.randn(1, 3, 8, 8, seed=1, dtype=dtype)
            s.scale_model_input(x, t)
            x = s.step(m, t, x).prev_sample
        t = s.timesteps[:2]
        return x, s.add_noise(x, x, t[:1]), (s, x, t)

    kinds = [
        ("DDPM", {}), ("DDIM", {"thresholding": True}), ("EulerDiscrete", {}),
        ("DPMSolverMultistep", {"dtype": torch.float16}),
    ]  # fmt: skip
    expected = [run(name, **given)[:2] for name, given in kinds]
    monkeypatch.setattr(rows.reference, "diffusion_step", lambda *a, **k: pytest.fail("composed"))
    table, done = _backend._functions("cpu"), []
    step = table["diffusion_step"]
    monkeypatch.setitem(table, "diffusion_step", lambda *a: (done.append(a), step(*a))[1])
    for (name, given), (x, noised) in zip(kinds, expected, strict=True):
        done.clear()
        with genfast.backend("cpu"):
            found, again, (s, y, t) = run(name, **given)
            torch.testing.assert_close((found, again), (x, noised), rtol=0, atol=0)
            assert len(done) == 3, name
            with pytest.raises(RuntimeError, match="one sample at many timesteps"):
                s.add_noise(y, y.expand(2, -1, -1, -1), t)
        calls = [
            ("cpu", lambda x: (x.double(), x.double()), "float64 has no kernels"),
            ("cpu", lambda x: (x.clone().requires_grad_(), x), "a gradient has no kernels"),
            ("torch", lambda x: (x, x), "PyTorch has attention alone"),
            ("triton", lambda x: (x, x), "Triton does not run"),
        ]
        for other, of, why in calls:
            s = make(name, {k: v for k, v in given.items() if k != "dtype"})
            s.set_timesteps(5)
            s.scale_model_input(y, s.timesteps[0])
            with genfast.backend(other), pytest.raises(RuntimeError, match=why):
                m, x = of(y)
                s.step(m, s.timesteps[0], x)
