"""tools/convert_checkpoint.py: what it refuses, and that nothing is then written, left, or written over."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import save_file

import diffussm.convert as convert_module
from diffussm.commands import convert_checkpoint
from diffussm.files import sha256_of
from diffussm.models.diffussm import ModelConfig
from diffussm.training import checkpoint

pytestmark = pytest.mark.e2e


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
    name = runs.newest_checkpoint(run).name
    place = run / "checkpoints" / name
    refused(call, "has no weights ema-7, but weight, exp_avg", out, run, "--ema-images", 7)
    refused(call, "has no weights ema-0, but weight, exp_avg", out, run, "--ema-images", 0)
    refused(call, "not allowed with", out, run, "--ema-images", 7, "--raw")
    scores = {"samples": {"manifest": runs.newest_checkpoint(run).digest, "weights": "EMA of 40 images"}}
    scores["samples"]["weights"] = f"EMA of {runs.newest_checkpoint(run).meta['ema_images'][0]:,.0f} images"
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
