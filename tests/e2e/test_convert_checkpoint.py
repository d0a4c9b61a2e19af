"""tools/convert_checkpoint.py on real runs: what it writes, what loads it, that nothing changes on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffussm.convert as convert_module
from benchmarks.common import in_fresh_process, peak_memory
from diffussm.autoencoders.kl import AutoencoderKLCodec
from diffussm.autoencoders.pixel import PixelCodec
from diffussm.commands import convert_checkpoint, eval_fid, sample
from diffussm.config import Config, to_dict
from diffussm.data.encode import encode
from diffussm.data.index import Index
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store
from diffussm.diffusion.noise import sample_noise
from diffussm.files import sha256_of
from diffussm.hub import DiffuSSMModel, DiffuSSMPipeline
from diffussm.hub.card import model_card
from diffussm.models.diffussm import DiffuSSM, ModelConfig
from diffussm.models.macs import forward_macs
from diffussm.training import checkpoint
from diffussm.training.monitor import log_of
from diffussm.training.resume import weights_from
from diffussm.training.tensor_file import pack

pytestmark = pytest.mark.e2e

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def convert(call):
    """Runs the command; its record."""

    def convert(*arguments: object) -> dict:
        code, out, error = call(convert_checkpoint.main, *arguments, "--json", "-")
        assert code == 0, error
        return json.loads(out)

    return convert


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """Modules that diffusers copies go to a place of this test, and nothing is asked of the network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def draw(call):
    """Runs tools/sample.py; its images."""

    def draw(run: Path, out: Path, *options: object) -> np.ndarray:
        code, _, error = call(sample.main, run, "--out", out, "--count", 4, "--steps", 3, "--seed", 5, *options)
        assert code == 0, error
        return np.load(out / "samples.npz", allow_pickle=False)["arr_0"]

    return draw


@pytest.fixture(scope="module")
def staged(shades, trained, tmp_path_factory):
    """Stage → the folder of a run at that stage, and its ranks."""
    made = {"zero2": (trained, 2)}
    for zero, ranks in (("zero1", 1), ("zero3", 2)):
        run = tmp_path_factory.mktemp(zero) / "run"
        keys = {"train__total_images": 16, "train__ema_images": "[4,400]", "train__decay_images": 0}
        arguments = [*runs.arguments(shades, run, **keys), f"--deepspeed={runs.ROOT}/ds_configs/{zero}.json"]
        done = runs.run(runs.command("torchrun" if ranks > 1 else "python", ranks, arguments))
        assert done.returncode == 0, done.stderr
        made[zero] = run, ranks
    return made


@pytest.fixture(scope="module")
def unconditional(make_autoencoder, tmp_path_factory) -> Path:
    """The folder of a run without classes on an AutoencoderKL's latents, whose folder's scale is altered since."""
    folder, autoencoder = tmp_path_factory.mktemp("kl"), make_autoencoder(scaling_factor=0.5, shift_factor=0.25)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    images = ArrayImages("noise/train", [], pixels, np.zeros(16, np.int64))
    encode(images, AutoencoderKLCodec.open(str(autoencoder), 16), open_store(folder / "train"))
    keys = {"train__total_images": 8, "train__decay_images": 0, "sample__sampler": "ddim"}
    done = runs.run(runs.command("python", 1, runs.arguments(folder, folder / "run", **keys)))
    assert done.returncode == 0, done.stderr
    config = json.loads((autoencoder / "config.json").read_text())
    (autoencoder / "config.json").write_text(json.dumps(config | {"scaling_factor": 9.0, "shift_factor": None}))
    return folder / "run"


def newest(run: Path) -> checkpoint.Checkpoint:
    return checkpoint.find(open_store(run / "checkpoints"))


@torch.no_grad()
def output(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 8, 8)
    out = model(x, torch.tensor([0, 400, 999]), torch.tensor([0, 3, 2]))
    return out if isinstance(out, torch.Tensor) else out.sample


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_weights_and_outputs_are_the_same_bit_for_bit(zero, staged, convert, tmp_path):
    run, ranks = staged[zero]
    found = newest(run)
    assert (found.meta["world_size"], f"zero{found.meta['zero_stage']}") == (ranks, zero)
    choices = {"weight": ["--raw"]}
    for length in found.meta["ema_images"]:
        choices[checkpoint.ema_kind(length)] = ["--ema-images", length]
    seen = []
    for kind, options in choices.items():
        record = convert(run, "--out", tmp_path / f"{kind}.safetensors", *options)
        assert record["checkpoint"] == str(found) and record["images_seen"] == found.meta["images"]
        weights, expected = load_file(tmp_path / f"{kind}.safetensors"), found.tensors(kind)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
        before = output(checkpoint.load_model(found, kind))
        seen.append(before)
        bare = DiffuSSM(ModelConfig("custom", 16, 2, 2, 4), 4, 3).eval()
        bare.load_state_dict(weights)
        assert torch.equal(output(bare), before)
        convert(run / "checkpoints" / found.name, "--out", tmp_path / kind, *options)
        assert sha256_of(tmp_path / kind / WEIGHTS) == sha256_of(tmp_path / f"{kind}.safetensors")
        assert torch.equal(output(DiffuSSMModel.from_pretrained(tmp_path / kind, subfolder="transformer")), before)
    assert all(not torch.equal(a, b) for number, a in enumerate(seen) for b in seen[:number])
    convert(run, "--out", tmp_path / "default.safetensors")  # the first average
    first = checkpoint.ema_kind(found.meta["ema_images"][0])
    assert sha256_of(tmp_path / "default.safetensors") == sha256_of(tmp_path / f"{first}.safetensors")


def test_a_file_tells_what_it_is_of(trained, convert, tmp_path):
    convert(trained, "--out", tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        told = json.loads(file.metadata()["diffussm"])
    assert (
        told["model"]["width"] == 16 and told["images"] == 96 and told["class_names"] == ["dark", "bright", "striped"]
    )
    assert str(tmp_path.parent.parent) not in json.dumps(told)  # no path of this machine


LOAD = {
    "own class": "from diffussm.hub import DiffuSSMPipeline\npipeline = DiffuSSMPipeline.from_pretrained({folder!r})",
    "diffusers alone": "from diffusers import DiffusionPipeline\n"
    "pipeline = DiffusionPipeline.from_pretrained({folder!r}, custom_pipeline='pipeline', trust_remote_code=True)",
}


@pytest.mark.parametrize("how", LOAD)
def test_a_fresh_process_draws_the_images_of_tools_sample(how, trained, convert, draw, tmp_path):
    convert(trained, "--out", tmp_path / "pipeline")
    np.save(tmp_path / "noise.npy", sample_noise(5, range(4), (4, 8, 8), 0).numpy())
    code = f"""
import numpy as np, torch, sys
{LOAD[how].format(folder=str(tmp_path / "pipeline"))}
from diffussm.hub.schedulers import scheduler_for
noise, labels = torch.from_numpy(np.load("noise.npy")), ["dark", 1, 2, "dark"]
assert type(pipeline).__name__ == "DiffuSSMPipeline" and type(pipeline.scheduler).__name__ == "RespacedDDPMScheduler"
assert pipeline(labels, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images[3].size == (16, 16)
for sampler in ("ddim", "dpm++"):
    pipeline.scheduler = scheduler_for(sampler, 1000)
    images = pipeline(labels, guidance_scale=2.0, num_inference_steps=3, latents=noise, output_type="np").images
    np.save(sampler + ".npy", images)
assert "deepspeed" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for sampler in ("ddim", "dpm++"):
        expected = draw(trained, tmp_path / sampler, "--sampler", sampler, "--guidance", 2)
        images = np.round(255 * np.load(tmp_path / f"{sampler}.npy")).astype(np.uint8)
        np.testing.assert_array_equal(images.repeat(3, axis=3), expected)


def test_diffusers_runs_nothing_of_a_folder_that_is_not_trusted(trained, convert, tmp_path):
    convert(trained, "--out", tmp_path / "pipeline")
    for file in (tmp_path / "pipeline").rglob("*.py"):
        file.write_text("raise SystemExit('it was run')")
    assert DiffuSSMPipeline.from_pretrained(tmp_path / "pipeline").transformer.config.width == 16


def test_an_unconditional_model_with_an_autoencoder(unconditional, convert, draw, tmp_path):
    convert(unconditional, "--out", tmp_path / "pipeline")
    made = DiffuSSMPipeline.from_pretrained(tmp_path / "pipeline")
    assert (made.vae.config.scaling_factor, made.vae.config.shift_factor) == (0.5, 0.25)  # as recorded by the run
    assert made.labels == {} and made.config.codec is None
    assert made.scheduler.config.solver_order == 1  # the run's sampler is ddim
    latents = sample_noise(5, range(4), (4, 8, 8), 0)
    images = made(batch_size=4, num_inference_steps=3, latents=latents, output_type="np").images
    expected = draw(unconditional, tmp_path / "samples")
    np.testing.assert_array_equal(np.round(255 * images).astype(np.uint8), expected)
    told = "\n".join(file.read_text() for file in (tmp_path / "pipeline").rglob("*") if file.suffix in (".json", ".md"))
    spec = newest(unconditional).meta["codec"]
    assert spec["location"] not in told and spec["weights"] in told


def test_the_model_card(trained, shades, convert, call, draw, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    draw(run, run / "samples")
    code, _, error = call(eval_fid.main, run / "samples/samples.npz", "--max-reference", 10)
    assert code == 0, error
    convert(run, "--out", tmp_path / "pipeline")
    card = ModelCard.load(tmp_path / "pipeline/README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "diffusers")
    assert {"diffussm", "class-conditional-image-generation"} <= set(card.data.tags)
    parameters = sum(tensor.numel() for tensor in newest(run).tensors("weight").values())
    report = json.loads((run / "scores.json").read_text())
    row, fid = report["rows"][-1], f"FID ({report['extractor']})"
    for text in (
        f"| parameters | {parameters:,} |",
        "| images seen in training | 96 |",
        f"`{Index.read(open_store(shades / 'train')).hash}`",
        "| weights | EMA of ",
        f"By {report['extractor']}",
        f"| trained | {row[fid]:.3f} |",
        "dark, bright, striped",
    ):
        assert text in card.text, text
    configuration = yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])
    assert configuration["train"]["lr"] == 1e-2 and configuration["codec"]["name"] == "pixel"
    assert str(tmp_path) not in card.content and str(shades) not in card.content  # no path of this machine
    convert(run, "--raw", "--out", tmp_path / "raw")  # the scores are of other weights
    assert "## Scores" not in (tmp_path / "raw/README.md").read_text()


def test_a_card_has_no_scores_of_another_model(trained, convert, draw, tmp_path, monkeypatch):
    """Of a checkpoint with the same name and length of its average, in the same or in the current folder."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    draw(run, run / "samples")
    record = json.loads((run / "samples/samples.json").read_text())
    row = {"name": "a|b", "FID (x)": 1.5, "images": 4}
    report = {"extractor": "x", "samples": {"path": "here", **record}, "rows": [row]}
    (run / "scores.json").write_text(json.dumps(report))
    convert(run, "--out", tmp_path / "same")
    assert r"| a\|b | 1.500 | 4 |" in (tmp_path / "same/README.md").read_text()

    report["samples"]["manifest"] = "0" * 64
    for place in (run, tmp_path):
        (place / "scores.json").write_text(json.dumps(report))
    convert(run, "--out", tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    shutil.move(run / "checkpoints", tmp_path / "checkpoints")
    report["samples"]["manifest"] = newest(tmp_path).digest
    (tmp_path / "scores.json").write_text(json.dumps(report))  # of the current folder, which was not named
    convert("checkpoints/" + newest(tmp_path).name, "--out", tmp_path / "bare")
    for name in ("other", "bare"):
        assert "## Scores" not in (tmp_path / name / "README.md").read_text(), name


def test_a_license_and_names_that_are_markup_in_a_card(trained, unconditional, convert, tmp_path, monkeypatch):
    record = newest(trained).meta
    card = model_card({**record, "class_names": ["a|b", "<i>c", "d\n# e"]}, "some", "", "cc-by-4.0")
    assert r"Classes: a\|b, \<i\>c, d \# e." in card
    macs = sum(forward_macs(ModelConfig("custom", 16, 2, 2, 4), 4, 64).values())
    assert f"| {6 * macs * 96:.3g} FLOPs |" in card and f"| {macs / 1e9:,.4g} G |" in card
    convert(unconditional, "--license", "cc-by-nc-4.0", "--out", tmp_path / "pipeline")
    card = ModelCard.load(tmp_path / "pipeline/README.md")
    assert card.data.license == "cc-by-nc-4.0" and "Apache" not in card.content and "apache" not in card.content
    assert "its own licence holds" in card.text


def test_training_begins_with_what_was_converted(trained, shades, convert, tmp_path):
    """The file of a pipeline and the one alone are the same: the test before."""
    convert(trained, "--out", tmp_path / "pipeline")
    weights = load_file(tmp_path / "pipeline" / WEIGHTS)
    for place in ("pipeline", "pipeline/", "pipeline/transformer"):
        read = weights_from(f"{tmp_path}/{place}")
        assert read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in weights)
    first = {}
    for number, place in enumerate(["null", newest(trained), tmp_path / "pipeline"]):
        keys = {"train__init_from": place, "train__total_images": 8, "train__decay_images": 0}
        done = runs.run(runs.command("python", 1, runs.arguments(shades, tmp_path / f"run{number}", **keys)))
        assert done.returncode == 0, done.stderr
        first[number] = log_of(tmp_path / f"run{number}")[0]["loss/total"]
    assert first[1] == first[2] < 0.9 * first[0]


def write_checkpoint(run: Path, size: ModelConfig) -> int:
    """A checkpoint of two ranks with weights and one average alone, made by hand; the bytes of its weights."""
    torch.manual_seed(0)
    network = DiffuSSM(size, channels=4, num_classes=3)
    place = run / "checkpoints/images-000000000008"
    place.mkdir(parents=True)
    config = to_dict(Config(model=size))
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    pieces, files = {}, {}
    halves = {"rank-00000-x.safetensors": {}, "rank-00001-y.safetensors": {}}
    for name, parameter in network.named_parameters():
        flat, middle = parameter.detach().flatten(), parameter.numel() // 3
        for file, start, part in zip(halves, (0, middle), (flat[:middle], flat[middle:]), strict=True):
            pieces.setdefault(file, []).append((name, start, part.numel()))
            halves[file] |= {f"weight:{name}": part, f"ema-40:{name}": 2 * part}
    meta = {
        "format": checkpoint.FORMAT, "images": 8, "config": config, "channels": 4, "num_classes": 3,
        "ema_images": [40.0], "class_names": ["a", "b", "c"], "codec": PixelCodec(16, 16, 1, 16).spec(),
        "latent_shape": [4, 8, 8],
    }  # fmt: skip
    for file, tensors in halves.items():
        (place / file).write_bytes(pack(tensors))
    (place / checkpoint.META).write_text(json.dumps(meta))
    for file in (*halves, checkpoint.META):
        files[file] = {"size": (place / file).stat().st_size, "sha256": sha256_of(place / file)}
    shapes = {name: list(parameter.shape) for name, parameter in network.named_parameters()}
    manifest = {"format": checkpoint.FORMAT, "files": files, "pieces": pieces, "shapes": shapes}
    (place / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    return sum(parameter.nbytes for parameter in network.parameters())


def convert_here(*arguments: str) -> None:
    sys.argv = ["convert_checkpoint.py", *arguments]
    convert_checkpoint.main()


def peaks_of_conversions(folder: Path) -> list[int]:
    """Bytes, to a file and to a pipeline, in a process that has done the same with something small before."""
    peaks = []
    for suffix in (".safetensors", ""):
        convert_here(str(folder / "small"), "--out", str(folder / f"small-out{suffix}"))
        big = (str(folder / "big"), "--out", str(folder / f"big-out{suffix}"))
        peaks.append(peak_memory(lambda big=big: convert_here(*big), torch.device("cpu")))
    return peaks


def test_memory_does_not_grow_with_the_model(tmp_path):
    write_checkpoint(tmp_path / "small", ModelConfig("custom", 16, 1, 2, 4))
    weights = write_checkpoint(tmp_path / "big", ModelConfig("custom", 512, 8))
    assert weights > 100 << 20
    peaks = in_fresh_process(peaks_of_conversions, tmp_path)
    assert max(peaks) < 0.75 * weights, peaks  # far below the twice that was allowed
    assert sha256_of(tmp_path / "big-out.safetensors") == sha256_of(tmp_path / "big-out" / WEIGHTS)
    found = newest(tmp_path / "big").tensors("ema-40")
    assert all(torch.equal(tensor, found[name]) for name, tensor in load_file(tmp_path / "big-out.safetensors").items())


def foreign(folder: Path) -> dict[str, tuple[Path, str]]:
    """What people have, and what they are told."""
    from diffusers import DiTTransformer2DModel, UNet2DModel

    tensor = torch.zeros(2)
    vit = {"patch_embed.proj.weight": tensor, "blocks.0.attn.qkv.weight": tensor}
    dit = {**vit, "blocks.0.adaLN_modulation.1.weight": tensor}
    torch.save(vit, folder / "vit.pt")
    torch.save(dit, folder / "dit.pt")
    torch.save(dit, folder / "dit-without-extension")
    torch.save({"ema": dit}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    results = folder / "000-DiT-XL-2"
    (results / "checkpoints").mkdir(parents=True)
    (results / "log.txt").write_text("training")
    torch.save({"model": dit, "opt": [], "args": ModelConfig()}, results / "checkpoints/0400000.pt")
    encrypted = bytearray((folder / "dit.pt").read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the bit that says so, of each entry
        at = -1
        while (at := encrypted.find(signature, at + 1)) >= 0:
            encrypted[at + flags] |= 1
    (folder / "encrypted.pt").write_bytes(encrypted)
    typed = {"position_ids": torch.zeros(2, dtype=torch.int64), "scale": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    save_file({**{name: tensor.clone() for name in dit}, **typed}, folder / "typed.safetensors")
    unets = {
        "sd": ["down_blocks.0.resnets.0.conv1.weight",
               "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"],
        "ldm": ["model.diffusion_model.input_blocks.0.0.weight",
                "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"],
    }  # fmt: skip
    for name, names in unets.items():
        save_file({key: tensor.clone() for key in reversed(names)}, folder / f"{name}.safetensors")
    torch.save({"ema": dit, "args": ModelConfig()}, folder / "dit-training.pt")  # an object, which is never unpickled
    save_file({name: tensor.clone() for name in dit}, folder / "dit.safetensors")
    torch.save([1], folder / "list.pt")
    (folder / "text.pt").write_text("no weights")
    (folder / "text.safetensors").write_text("no weights")
    save_file({"blocks.0.ssm.log_A_real": tensor}, folder / "ours.safetensors")
    DiTTransformer2DModel(2, 4, num_layers=1, sample_size=8, num_embeds_ada_norm=3).save_pretrained(folder / "dit")
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(8, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4, **blocks)
    unet.save_pretrained(folder / "unet")
    steps = folder / "deepspeed/global_step10"
    steps.mkdir(parents=True)
    for place in (folder / "deepspeed/zero_to_fp32.py", steps / "mp_rank_00_model_states.pt"):
        place.write_text("")
    torch.save({"module": {}, "ds_config": {}, "ds_version": "0.19"}, folder / "mp_rank_00_model_states.pt")
    for name in ("empty", "bare"):
        (folder / name).mkdir()
    bare = folder / "bare"
    (bare / "latest").write_text("global_step10")
    return {
        "DiT": (folder / "dit.pt", "is a DiT or SiT checkpoint, which is another network"),
        "DiT's training": (folder / "dit-training.pt", "is a DiT or SiT checkpoint"),
        "DiT's safetensors": (folder / "dit.safetensors", "is a DiT or SiT checkpoint"),
        "DiT's, of other types": (folder / "typed.safetensors", "is a DiT or SiT checkpoint"),
        "DiT's, without an extension": (folder / "dit-without-extension", "is a DiT or SiT checkpoint"),
        "DiT's, before torch 1.6": (folder / "legacy.pt", "is a DiT or SiT checkpoint"),
        "DiT's results": (results, "is a folder with checkpoints/0400000.pt, a DiT or SiT checkpoint"),
        "a vision transformer": (folder / "vit.pt", "is a file of another program"),
        "an encrypted zip": (folder / "encrypted.pt", "is a file of another program"),
        "Stable Diffusion by diffusers": (folder / "sd.safetensors", "is a UNet of diffusers"),
        "latent diffusion": (folder / "ldm.safetensors", "is a latent diffusion model with a UNet"),
        "a file of DiT by diffusers": (folder / "dit/diffusion_pytorch_model.safetensors", "such as DiT"),
        "a folder of DiT by diffusers": (folder / "dit", "is a DiTTransformer2DModel of diffusers"),
        "UNet": (folder / "unet", "is a UNet2DModel of diffusers"),
        "a UNet's file": (folder / "unet/diffusion_pytorch_model.safetensors", "is a UNet"),
        "DeepSpeed": (folder / "deepspeed", "--safe_serialization"),
        "DeepSpeed's, without its script": (bare, "a checkpoint of DeepSpeed's own"),
        "a step of DeepSpeed": (steps, "a checkpoint of DeepSpeed's own"),
        "a file of DeepSpeed": (folder / "mp_rank_00_model_states.pt", "never unpickled"),
        "another pickle": (folder / "list.pt", "is a file of another program"),
        "no pickle": (folder / "text.pt", "is a file of another program"),
        "no safetensors": (folder / "text.safetensors", "is not a safetensors file"),
        "converted weights": (folder / "ours.safetensors", "converted already"),
        "an empty folder": (folder / "empty", "holds no complete checkpoint"),
        "nothing": (folder / "nowhere", "holds no complete checkpoint"),
    }


def refused(call, line: str, out: Path, *arguments: object) -> None:
    code, printed, error = call(convert_checkpoint.main, *arguments, "--out", out)
    assert (code, printed) == (2, ""), error
    (told,) = error.splitlines()
    assert told.startswith("error: ") and line in told
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_what_is_foreign_is_named_and_nothing_is_written(suffix, call, tmp_path):
    (tmp_path / "there").mkdir()
    for source, line in foreign(tmp_path / "there").values():
        refused(call, line, tmp_path / f"out{suffix}", source)


def test_what_is_torn_or_does_not_fit_is_refused(trained, call, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(trained, run)
    name = newest(run).name
    place = run / "checkpoints" / name
    refused(call, "has no weights ema-7, but weight, exp_avg", out, run, "--ema-images", 7)
    refused(call, "has no weights ema-0, but weight, exp_avg", out, run, "--ema-images", 0)
    refused(call, "not allowed with", out, run, "--ema-images", 7, "--raw")
    scores = {"samples": {"manifest": newest(run).digest, "weights": "EMA of 40 images"}}
    scores["samples"]["weights"] = f"EMA of {newest(run).meta['ema_images'][0]:,.0f} images"
    for damaged in ({"rows": []}, {**scores, "extractor": "x", "rows": []}, {**scores, "rows": [{"name": "x"}]}):
        (run / "scores.json").write_text(json.dumps(damaged))
        refused(call, "scores.json is damaged", out, run)
    (run / "scores.json").unlink()
    code, _, error = call(convert_checkpoint.main, run, "--out", "s3://bucket")
    assert code == 2 and "s3://bucket is a bucket" in error
    config = (run / "config.yaml").read_text()
    for damage in ("train: [", "- 1", "train: 3"):
        (run / "config.yaml").write_text(damage)
        refused(call, "config.yaml is damaged", out, run)
    (run / "config.yaml").write_text(config)

    (piece,) = place.glob("rank-00000*.safetensors")
    content = piece.read_bytes()
    piece.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(call, "is torn", out, place)
    piece.write_bytes(content[:-1])
    refused(call, "is torn", out, place)
    piece.write_bytes(content)
    manifest = (place / "manifest.json").read_text()
    meta, table = json.loads((place / "meta.json").read_text()), json.loads(manifest)

    def refused_with(line: str, **changed: object) -> None:
        told = {key: value for key, value in {**meta, **changed}.items() if value is not None}
        (place / "meta.json").write_text(json.dumps(told))
        size, digest = (place / "meta.json").stat().st_size, sha256_of(place / "meta.json")
        table["files"]["meta.json"] = {"size": size, "sha256": digest}
        (place / "manifest.json").write_text(json.dumps(table))
        refused(call, line, out, place)

    config = meta["config"]
    refused_with("do not fit the model of its meta.json", config={**config, "model": {**config["model"], "width": 32}})
    refused_with("is not a checkpoint of diffussm: meta.json: 'images'", images=None)
    for key in ("config", "codec", "ema_images", "class_names"):
        refused_with(f"meta.json has no {key}", **{key: None})
    refused_with("has no averages: say --raw", ema_images=[])
    refused_with("the config of its meta.json is damaged", config={**config, "model": 5})
    refused_with("sampler 'euler' is none of", config={**config, "sample": {**config["sample"], "sampler": "euler"}})
    refused_with("unknown codec", codec={"name": "jpeg"})
    (place / "manifest.json").unlink()
    refused(call, "not a complete checkpoint", out, place)


def test_what_is_there_is_not_written_over(trained, call, tmp_path):
    for name in ("there.safetensors", "there"):
        (tmp_path / name).write_text("mine")
        code, _, error = call(convert_checkpoint.main, trained, "--out", tmp_path / name)
        assert code == 2 and "exists: remove it" in error and (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["made.safetensors", "made"])
def test_what_is_made_meanwhile_is_not_written_over(name, trained, call, tmp_path, monkeypatch):
    written, out = convert_module.write_weights, tmp_path / name

    def slow(found: checkpoint.Checkpoint, kind: str, path: Path) -> None:
        written(found, kind, path)
        if name == "made":
            out.mkdir()
        (out / "mine" if name == "made" else out).write_text("mine")

    for module in (convert_module, convert_checkpoint):
        monkeypatch.setattr(module, "write_weights", slow)
    code, _, error = call(convert_checkpoint.main, trained, "--out", out)
    assert code == 2 and error == f"error: {out} has been made by somebody else meanwhile: choose another --out\n"
    assert os.listdir(tmp_path) == [name]
    assert os.listdir(out) == ["mine"] if name == "made" else out.read_text() == "mine"


def test_a_slash_after_a_file_name_is_no_folder(trained, convert, tmp_path):
    assert convert(trained, "--out", f"{tmp_path}/w.safetensors/")["format"] == "safetensors"
    assert (tmp_path / "w.safetensors").is_file()


@pytest.mark.parametrize("name", ["out.safetensors", "out"])
def test_a_conversion_that_is_terminated_leaves_nothing(name, trained, tmp_path):
    code = f"""
import os, signal, sys
from diffussm import convert
from diffussm.commands import convert_checkpoint
convert.write = lambda *a: os.kill(os.getpid(), signal.SIGTERM)
sys.argv = ["convert_checkpoint.py", {str(trained)!r}, "--out", {name!r}]
convert_checkpoint.main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, os.listdir(tmp_path)) == (143, []), done.stderr


def test_a_conversion_that_fails_leaves_nothing(trained, unconditional, call, tmp_path, monkeypatch):
    missing = call(
        convert_checkpoint.main, unconditional, "--autoencoder", tmp_path / "none", "--out", tmp_path / "out"
    )
    assert missing[0] == 2 and "neither a folder nor to be had" in missing[2] and not (tmp_path / "out").exists()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffussm.convert.write", full)
    for name in ("out", "out.safetensors"):
        code, _, error = call(convert_checkpoint.main, trained, "--out", tmp_path / name)
        assert code == 2 and error == f"error: {tmp_path / name}: No space left on device\n"
    assert os.listdir(tmp_path) == []


def test_the_door_and_the_newest_run(trained, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(trained)
    command = [sys.executable, str(runs.ROOT / "tools/convert_checkpoint.py"), "--out", "w.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("w.safetensors: ") and "EMA of" in done.stdout
    assert len(load_file(tmp_path / "w.safetensors")) == len(newest(trained).manifest["shapes"])


def test_a_pipeline_needs_diffusers_and_a_file_does_not(trained, tmp_path):
    for name, code in (("out", 2), ("w.safetensors", 0)):
        script = f"""
import sys
sys.modules["diffusers"] = None
from diffussm.commands import convert_checkpoint
from diffussm.errors import run_command
sys.argv = ["convert_checkpoint.py", {str(trained)!r}, "--out", {name!r}]
run_command(convert_checkpoint.main)
"""
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        line = "error: a pipeline, unlike a .safetensors file, needs diffusers: pip install 'diffussm[hub]'\n"
        assert done.stderr == line * (code == 2)


def test_the_example_draws_a_row_a_class(trained, convert, tmp_path):
    convert(trained, "--out", tmp_path / "pipeline")
    script = [sys.executable, str(runs.ROOT / "examples/grid.py"), "pipeline", "grid.png"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "grid.png").size == (8 * 16, 3 * 16)
