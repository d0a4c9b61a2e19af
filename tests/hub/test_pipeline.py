"""The pipeline: its images are those of this package's samplers, with its own schedulers and with diffusers'."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image

from diffussm.autoencoders.kl import AutoencoderKLCodec
from diffussm.autoencoders.pixel import PixelCodec
from diffussm.diffusion.guidance import Guided
from diffussm.diffusion.samplers import SAMPLERS
from diffussm.diffusion.schedule import Schedule
from diffussm.errors import UserError
from diffussm.hub import DiffuSSMModel, DiffuSSMPipeline
from diffussm.hub.schedulers import scheduler_for

pytestmark = pytest.mark.unit

FULL = Schedule.linear()
CODEC = PixelCodec(16, 16, 1, 16)
NAMES = {"0": "dark", "1": "bright", "2": "striped"}
LABELS, SCALE, CHANNELS = [0, 1, 2, 0], 2.0, 3
X = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@functools.cache
def weights(num_classes: int) -> dict[str, torch.Tensor]:
    """Trained for a moment, so that what is drawn is about as large as data: grey images, darker or lighter."""
    torch.manual_seed(1)
    made = DiffuSSMModel(4, 8, num_classes, 16, 1, 2, 4)
    made.set_ssm_backend("fft")
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    for _ in range(300):
        y, t, noise = torch.randint(3, (32,)), torch.randint(1000, (32,)), torch.randn(32, 4, 8, 8)
        x0 = (y - 1).view(-1, 1, 1, 1) / 2 + 0.2 * torch.randn(32, 1, 1, 1).expand_as(noise)
        output = made(FULL.q_sample(x0, t, noise), t, y if num_classes else None).sample
        optimizer.zero_grad()
        ((output[:, :4] - noise).square().mean() + output[:, 4:].square().mean()).backward()
        optimizer.step()
    return made.state_dict()


def model(num_classes: int = 3) -> DiffuSSMModel:
    made = DiffuSSMModel(4, 8, num_classes, 16, 1, 2, 4)
    made.load_state_dict(weights(num_classes))
    return made.eval()


def pipeline(scheduler=None, num_classes: int = 3, **parts) -> DiffuSSMPipeline:
    names = NAMES if num_classes else None
    parts = parts or {"codec": CODEC.spec()}
    made = DiffuSSMPipeline(model(num_classes), scheduler or scheduler_for("ancestral", 1000), id2label=names, **parts)
    made.set_progress_bar_config(disable=True)
    return made


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def ours(sampler: str, schedule: Schedule) -> torch.Tensor:
    """Latents by this package's samplers, with the noise that diffusers' schedulers draw of the same generator."""
    network, generator = model(), seeded()
    guided = Guided(network_call(network), torch.tensor(LABELS), 3, SCALE, CHANNELS)
    return SAMPLERS[sampler](guided, X, schedule, lambda step: torch.randn(X.shape, generator=generator))


def network_call(network: DiffuSSMModel):
    return lambda x, t, labels: network(x, t, labels).sample


def theirs(scheduler, steps: int, output_type: str = "latent"):
    made = pipeline(scheduler)
    return made(
        LABELS, guidance_scale=SCALE, guidance_channels=CHANNELS, num_inference_steps=steps, latents=X,
        generator=seeded(), output_type=output_type,
    ).images  # fmt: skip


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Latents to ``tolerance`` of the largest, and images of the same 8 bits."""
    assert actual.dtype == torch.float32 and expected.abs().max() > 0.5
    assert (actual - expected).abs().max() < tolerance * expected.abs().max()
    assert (CODEC.decode(actual) == CODEC.decode(expected)).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 21, 50])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_schedulers_of_a_folder_draw_what_the_samplers_draw(sampler, steps):
    """At 21 steps diffusers would round the middle timestep, 499.5, the other way."""
    assert_same(theirs(scheduler_for(sampler, 1000), steps), ours(sampler, FULL.respace(steps)), 2e-6)


def test_images_are_those_of_the_codec():
    images = theirs(scheduler_for("ancestral", 1000), 10, "np")
    expected = CODEC.decode(ours("ancestral", FULL.respace(10)))
    assert images.shape == (4, 16, 16, 1) and len(np.unique(expected)) > 50
    np.testing.assert_array_equal(np.round(images * 255).astype(np.uint8), expected)


@pytest.mark.parametrize("folder", SAMPLERS)
def test_diffusers_own_ancestral_scheduler(folder):
    """Its tables are fp32: 1 - ᾱ/ᾱ' has few digits."""
    stock = DDPMScheduler.from_config(scheduler_for(folder, 1000).config)
    assert_same(theirs(stock, 50), ours("ancestral", FULL.respace(50)), 1e-5)


@pytest.mark.parametrize("folder", SAMPLERS)
def test_diffusers_own_ddim(folder):
    """It takes T // n back from each timestep, whatever comes next: with trailing spacing that is the next."""
    stock = DDIMScheduler.from_config(scheduler_for(folder, 1000).config, timestep_spacing="trailing")
    kept = torch.arange(19, 1000, 20)
    assert_same(theirs(stock, 50), ours("ddim", Schedule(FULL.alphas_cumprod[kept], kept)), 1e-5)


@pytest.mark.parametrize("folder", SAMPLERS)
def test_diffusers_own_dpm_solver(folder):
    """Of n - 1 steps it ends at t = 0 with the noise of that; this package's sampler predicts the data from there."""
    config = scheduler_for(folder, 1000).config  # of a learned variance, by which it would cut noise to 3 channels
    options = {"final_sigmas_type": "sigma_min", "euler_at_final": True, "solver_order": 2}
    stock = DPMSolverMultistepScheduler.from_config(config, **options)
    schedule, seen = FULL.respace(50), []
    guided = Guided(network_call(model()), torch.tensor(LABELS), 3, SCALE, CHANNELS)
    SAMPLERS["dpm++"](lambda x, t: seen.append(x) or guided(x, t), X, schedule, None)
    assert_same(theirs(stock, 49), seen[-1], 1e-5)


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, DDPMScheduler])
def test_any_scheduler_goes_by_the_configuration_of_the_folders(kind, tmp_path):
    """Whichever folder it is of: of the same network and noise, and nothing is clipped to [-1, 1]."""
    drawn = []
    for sampler in SAMPLERS:
        scheduler = scheduler_for(sampler, 1000)
        theirs(scheduler, 1)  # the configuration is the same after a call, and once saved and loaded
        scheduler.save_pretrained(tmp_path / sampler)
        scheduler = type(scheduler).from_pretrained(tmp_path / sampler)
        fixed = {"solver_order": 2} if kind is DPMSolverMultistepScheduler else {}
        made = pipeline(kind.from_config(scheduler.config, **fixed))
        made.transformer.forward = lambda x, t, y, return_dict: (torch.zeros_like(x).repeat(1, 2, 1, 1),)
        far = made([0] * 4, num_inference_steps=5, latents=X, generator=seeded(), output_type="latent").images
        assert far.isfinite().all() and far.abs().max() > 10  # without noise it is x_T / sqrt(ᾱ_T)
        drawn.append(theirs(kind.from_config(scheduler.config, **fixed), 5))
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])


def test_classes_by_id_and_by_name():
    made = pipeline()
    keys = {"num_inference_steps": 2, "output_type": "latent"}

    def draw(labels, latents=X):
        return made(labels, latents=latents, generator=seeded(), **keys).images

    assert torch.equal(draw(["dark", "bright", 2, "dark"]), draw([0, 1, 2, 0]))
    assert torch.equal(draw("striped", X[:1]), draw(2, X[:1]))
    assert not torch.equal(draw([1, 1, 1, 1]), draw([0, 1, 2, 0]))
    for labels in (np.array([0, 1, 2, 0]), torch.tensor([0, 1, 2, 0]), (np.int64(0), torch.tensor(1), "striped", 0)):
        assert made.label_ids(labels) == [0, 1, 2, 0]
    assert made.label_ids(np.int64(1)) == made.label_ids(torch.tensor(1)) == made.label_ids(np.array(1)) == [1]


def test_an_image_of_its_own_generator_does_not_depend_on_the_batch():
    made, keys = pipeline(), {"num_inference_steps": 3, "output_type": "latent"}
    each = [torch.Generator().manual_seed(n) for n in range(3)]
    together = made([0, 1, 2], generator=each, **keys).images
    alone = made([1], generator=[torch.Generator().manual_seed(1)], **keys).images
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    whole = made([0, 1, 2], generator=seeded(), **keys).images
    assert torch.equal(whole, made([0, 1, 2], generator=seeded(), **keys).images)


def test_output_types():
    images = {kind: theirs(None, 2, kind) for kind in ("np", "pt", "pil", "latent")}
    assert images["np"].shape == (4, 16, 16, 1) and images["np"].dtype == np.float32
    assert 0 <= images["np"].min() < images["np"].max() <= 1
    assert torch.equal(images["pt"], torch.from_numpy(images["np"]).permute(0, 3, 1, 2))
    assert all(isinstance(image, Image.Image) and image.mode == "L" for image in images["pil"])
    assert (np.stack(images["pil"]) == np.round(255 * images["np"][..., 0])).all()
    np.testing.assert_array_equal(CODEC.decode(images["latent"]), np.round(255 * images["np"]))
    as_tuple = pipeline()(0, num_inference_steps=1, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple[0]) == 1


def test_the_callback_sees_each_step_and_may_change_it():
    made, seen = pipeline(), []

    def callback(given, step, t, tensors):
        assert given is made
        seen.append((step, int(t), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else None

    images = made(LABELS, num_inference_steps=3, callback_on_step_end=callback, output_type="latent").images
    assert seen == [(0, 999, X.shape), (1, 500, X.shape), (2, 0, X.shape)] and not images.any()
    made(0, num_inference_steps=1, callback_on_step_end=lambda *a: {}, callback_on_step_end_tensor_inputs=[])


def test_an_unconditional_model():
    made, generator = pipeline(num_classes=0), seeded()
    images = made(batch_size=4, num_inference_steps=5, latents=X, generator=seeded(), output_type="latent").images
    network = model(0)
    expected = SAMPLERS["ancestral"](
        lambda x, t: network(x, t).sample, X, FULL.respace(5), lambda step: torch.randn(X.shape, generator=generator)
    )
    assert_same(images, expected, 2e-6)
    assert len(made(batch_size=2, num_inference_steps=1).images) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_autoencoder_decodes_by_its_scale_and_shift(make_autoencoder, dtype):
    folder = make_autoencoder(scaling_factor=0.36, shift_factor=0.12)
    made = pipeline(vae=AutoencoderKL.from_pretrained(folder))
    latents = made(LABELS, num_inference_steps=2, latents=X, generator=seeded(), output_type="latent").images / 5
    expected = AutoencoderKLCodec.open(str(folder), 16).decode(latents)
    made.to(dtype)
    assert made.vae.dtype == dtype
    images = made.decode(latents)
    assert images.shape == (4, 16, 16, 3)
    assert np.abs(images.astype(int) - expected).max() <= (0 if dtype == torch.float32 else 8)


def test_saved_and_loaded_it_draws_the_same(tmp_path, make_autoencoder):
    vae = AutoencoderKL.from_pretrained(make_autoencoder())
    for name, parts in (("pixel", {}), ("kl", {"vae": vae})):
        made = pipeline(scheduler_for("dpm++", 1000), **parts)
        made.save_pretrained(tmp_path / name)
        loaded = DiffuSSMPipeline.from_pretrained(tmp_path / name)
        loaded.set_progress_bar_config(disable=True)
        keys = {"num_inference_steps": 3, "latents": X, "output_type": "np"}
        np.testing.assert_array_equal(made(LABELS, **keys).images, loaded(["dark", 1, 2, 0], **keys).images)
    half = DiffuSSMPipeline.from_pretrained(tmp_path / "kl", dtype=torch.bfloat16)
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
    assert half.transformer.blocks[0].ssm.C.dtype == torch.float32
    other = DiffuSSMPipeline.from_pretrained(tmp_path / "kl", scheduler=DDIMScheduler(clip_sample=False))
    assert type(other.scheduler) is DDIMScheduler


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"class_labels": 3}, "class label 3 is not one of 0..2 or a name (dark, bright, striped)"),
        ({"class_labels": -1}, "class label -1 is not one"),
        ({"class_labels": ["plaid"]}, "class label 'plaid' is not one"),
        ({"class_labels": 1.7}, "class label 1.7 is not one"),
        ({"class_labels": [0, None]}, "class label None is not one"),
        ({"class_labels": torch.tensor([0.5])}, "is not one of 0..2"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"class_labels": 0, "num_inference_steps": 0}, "num_inference_steps 0 is not at least 1"),
        ({"class_labels": 0, "num_inference_steps": -1}, "num_inference_steps -1 is not at least 1"),
        ({}, "this model has 3 classes: say class_labels"),
        ({"class_labels": 0, "output_type": "jpeg"}, "output_type 'jpeg' is not one of pil, np, pt, latent"),
        ({"class_labels": 0, "latents": X}, r"latents are [4, 4, 8, 8], where [1, 4, 8, 8] is wanted"),
        ({"class_labels": 0, "guidance_channels": 5}, "1..4"),
        ({"class_labels": 0, "num_inference_steps": 1001}, "cannot take 1001 sampling steps"),
        ({"class_labels": 0, "callback_on_step_end_tensor_inputs": ["prompt"]}, "prompt is not latents"),
    ],
)
def test_what_is_impossible_is_told(arguments, line):
    with pytest.raises(UserError) as error:
        pipeline()(**arguments)
    assert line in str(error.value)


def test_labels_of_an_unconditional_model_and_latents_that_nothing_decodes():
    with pytest.raises(UserError, match="this model has no classes"):
        pipeline(num_classes=0)(0)
    with pytest.raises(UserError, match="neither a vae nor a codec"):
        pipeline(vae=None)(0, num_inference_steps=1)


@pytest.mark.parametrize("autoencoder", [False, True])
def test_latents_that_are_not_decoded_are_refused_before_the_first_step(autoencoder, make_autoencoder):
    made = pipeline(vae=AutoencoderKL.from_pretrained(make_autoencoder())) if autoencoder else pipeline()
    steps, wide = [], torch.cat([X[:1], X[:1]], dim=3)
    keys = {"latents": wide, "num_inference_steps": 2, "callback_on_step_end": lambda *a: steps.append(1)}
    with pytest.raises(UserError, match=r"latents \[4, 8, 16\] are not decoded here, \[4, .*output_type='latent'"):
        made(0, **keys)
    assert not steps
    assert made(0, **keys, output_type="latent").images.shape == wide.shape and len(steps) == 2


@pytest.mark.parametrize(
    "kind", [FlowMatchEulerDiscreteScheduler, functools.partial(DDIMScheduler, prediction_type="sample")]
)
def test_schedulers_that_take_no_noise_are_refused(kind):
    with pytest.raises(UserError, match="takes no predicted noise"):
        pipeline(kind())(0, num_inference_steps=1)


def test_no_steps_are_not_all_steps():
    for sampler in SAMPLERS:
        scheduler = scheduler_for(sampler, 1000)
        with pytest.raises(UserError, match="cannot take 0 sampling steps"):
            scheduler.set_timesteps(0)
        scheduler.set_timesteps()
        assert len(scheduler.timesteps) == 1000


def test_what_is_saved_diffusers_alone_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name, scheduler in (("own", None), ("stock", DDIMScheduler(clip_sample=False))):
        pipeline(scheduler).save_pretrained(tmp_path / name)
        how = {"custom_pipeline": "pipeline", "trust_remote_code": True}
        loaded = DiffusionPipeline.from_pretrained(tmp_path / name, **how)
        assert type(loaded).__name__ == "DiffuSSMPipeline"
        assert torch.equal(loaded.transformer.embed.weight, model().embed.weight)


def test_of_the_hub_no_code_is_fetched(tmp_path, monkeypatch):
    pipeline().save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(
        "diffussm.hub.pipeline.snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path)
    )
    DiffuSSMPipeline.from_pretrained("someone/something", revision="v1", force_download=True)
    (((name,), options),) = asked
    assert name == "someone/something" and options["revision"] == "v1" and options["force_download"]
    assert options["ignore_patterns"] == ["*.py", "*.bin", "*.pt", "*.ckpt"]
