"""tools/convert_checkpoint.py on real runs: what it writes, what loads it, that nothing changes on the way."""

from __future__ import annotations

import json
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
from safetensors.torch import load_file

from benchmarks.common import in_fresh_process, peak_memory
from diffussm.autoencoders.pixel import PixelCodec
from diffussm.commands import convert_checkpoint, eval_fid, sample
from diffussm.config import Config, to_dict
from diffussm.data.index import Index
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


@torch.no_grad()
def output(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 8, 8)
    out = model(x, torch.tensor([0, 400, 999]), torch.tensor([0, 3, 2]))
    return out if isinstance(out, torch.Tensor) else out.sample


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_weights_and_outputs_are_the_same_bit_for_bit(zero, staged, convert, tmp_path):
    run, ranks = staged[zero]
    found = runs.newest_checkpoint(run)
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
    spec = runs.newest_checkpoint(unconditional).meta["codec"]
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
    parameters = sum(tensor.numel() for tensor in runs.newest_checkpoint(run).tensors("weight").values())
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
    report["samples"]["manifest"] = runs.newest_checkpoint(tmp_path).digest
    (tmp_path / "scores.json").write_text(json.dumps(report))  # of the current folder, which was not named
    convert("checkpoints/" + runs.newest_checkpoint(tmp_path).name, "--out", tmp_path / "bare")
    for name in ("other", "bare"):
        assert "## Scores" not in (tmp_path / name / "README.md").read_text(), name


def test_a_license_and_names_that_are_markup_in_a_card(trained, unconditional, convert, tmp_path, monkeypatch):
    record = runs.newest_checkpoint(trained).meta
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
    for number, place in enumerate(["null", runs.newest_checkpoint(trained), tmp_path / "pipeline"]):
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
    found = runs.newest_checkpoint(tmp_path / "big").tensors("ema-40")
    assert all(torch.equal(tensor, found[name]) for name, tensor in load_file(tmp_path / "big-out.safetensors").items())


def test_the_door_and_the_newest_run(trained, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(trained)
    command = [sys.executable, str(runs.ROOT / "tools/convert_checkpoint.py"), "--out", "w.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("w.safetensors: ") and "EMA of" in done.stdout
    assert len(load_file(tmp_path / "w.safetensors")) == len(runs.newest_checkpoint(trained).manifest["shapes"])


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
