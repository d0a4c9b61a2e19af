"""tools/convert_checkpoint.py from a bucket and into it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from s3.conftest import BUCKET

from diffussm.commands import convert_checkpoint
from diffussm.data.s3 import S3Store
from diffussm.files import sha256_of

pytestmark = pytest.mark.s3

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def upload(run: Path, store: S3Store) -> str:
    """A run's newest checkpoint, under a name of its own; that name."""
    name = (run / "checkpoints/latest").read_text().strip()
    for file in (run / "checkpoints" / name).iterdir():
        store.put(f"checkpoints/{name}/{file.name}", file.read_bytes())
    return f"checkpoints/{name}"


def test_a_checkpoint_in_a_bucket_becomes_a_pipeline_there(trained, call, tmp_path, store, prefix):
    url, name = f"s3://{BUCKET}/{prefix}", upload(trained, store)
    for source, out in (
        (trained, tmp_path / "pipeline"),
        (f"{url}/{name}", f"{url}/pipeline"),
        (f"{url}/checkpoints", f"{url}/weights.safetensors"),
    ):
        code, _, error = call(convert_checkpoint.main, source, "--out", out)
        assert code == 0, error
    local = {file.relative_to(tmp_path / "pipeline").as_posix() for file in (tmp_path / "pipeline").rglob("*.*")}
    assert {name.removeprefix("pipeline/") for name in store.list("pipeline/")} == local
    for file in local:
        assert bytes(store.read(f"pipeline/{file}")) == (tmp_path / "pipeline" / file).read_bytes(), file
    (tmp_path / "weights").write_bytes(store.read("weights.safetensors"))
    assert sha256_of(tmp_path / "weights") == sha256_of(tmp_path / "pipeline" / WEIGHTS)
    for out in (f"{url}/pipeline", f"{url}/weights.safetensors"):
        code, _, error = call(convert_checkpoint.main, trained, "--out", out)
        assert code == 2 and f"{out} exists" in error
    code, _, error = call(convert_checkpoint.main, f"{url}/pipeline", "--out", tmp_path / "again")
    assert code == 2 and "converted already" in error


def test_the_index_comes_last_and_a_failure_leaves_nothing(trained, call, store, prefix, monkeypatch):
    order, put = [], S3Store.put

    def failing(self, name, content, if_absent=False):
        if name.endswith("model_index.json"):
            raise OSError(28, "No space left on device", name)
        order.append(name)
        return put(self, name, content, if_absent)

    monkeypatch.setattr(S3Store, "put", failing)
    code, _, error = call(convert_checkpoint.main, trained, "--out", f"s3://{BUCKET}/{prefix}/pipeline")
    assert code == 2 and "No space left" in error and len(order) == 7
    assert not store.list("pipeline/")


def test_what_is_made_meanwhile_in_a_bucket_is_not_written_over(trained, call, store, prefix, monkeypatch):
    url, put = f"s3://{BUCKET}/{prefix}", S3Store.put
    monkeypatch.setattr("diffussm.commands.convert_checkpoint.check_target", lambda target: None)
    for name, theirs in (("pipeline", "pipeline/scheduler/scheduler_config.json"), ("w.safetensors", "w.safetensors")):
        put(store, theirs, b"mine")
        code, _, error = call(convert_checkpoint.main, trained, "--out", f"{url}/{name}")
        assert code == 2 and f"{url}/{name} has been made by somebody else meanwhile" in error
        assert list(store.list(name)) == [theirs] and bytes(store.read(theirs)) == b"mine"


def test_a_checkpoint_of_dit_in_a_bucket_is_named(call, store, prefix, tmp_path):
    weights = {"blocks.0.adaLN_modulation.1.weight": torch.zeros(2)}
    for zipped in (True, False):
        torch.save({"model": weights}, tmp_path / "0400000.pt", _use_new_zipfile_serialization=zipped)
        store.put("run/checkpoints/0400000.pt", (tmp_path / "0400000.pt").read_bytes())
        for place in ("run", "run/checkpoints", "run/checkpoints/0400000.pt"):
            code, _, error = call(convert_checkpoint.main, f"s3://{BUCKET}/{prefix}/{place}", "--out", tmp_path / "out")
            assert code == 2 and "a DiT or SiT checkpoint" in error, error
