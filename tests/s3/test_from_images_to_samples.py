"""The whole way as a user goes it, through a bucket: images → latents → training by two ranks → samples."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import runs
from PIL import Image
from s3.conftest import BUCKET

from diffussm.data.store import open_store

pytestmark = pytest.mark.s3


def tool(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(runs.ROOT / f"tools/{name}.py"), *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_images(folder: Path) -> Path:
    random = np.random.default_rng(0)
    for number in range(48):
        pixels = random.integers(0, 90, (24, 20, 3), dtype=np.uint8) + np.uint8(80 * (number % 2))
        path = folder / ("bright" if number % 2 else "dark") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def records(run: Path) -> list[dict[str, float]]:
    """The losses of a run, of which no clock decides anything."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("images", "loss/total", "grad_norm") if key in line} for line in lines]


def test_latents_of_an_autoencoder_through_a_bucket(
    tmp_path: Path, prefix: str, make_autoencoder: Callable[..., Path]
) -> None:
    autoencoder, url = make_autoencoder(), f"s3://{BUCKET}/{prefix}"
    tool(
        "encode_latents", "--source", "folder", "--input", make_images(tmp_path / "images"), "--size", 16, "--flip",
        "--codec", "autoencoder-kl", "--autoencoder", autoencoder, "--samples-per-shard", 10, "--out", url,
    )  # fmt: skip
    sheet = tmp_path / "sheet.png"
    assert tool("verify_shards", url, "--sheet", sheet).endswith("sound\n") and Image.open(sheet).size[0] >= 8 * 16

    local = tmp_path / "local/train"
    store, copy = open_store(url), open_store(local)
    for name in store.list():
        copy.put(name, bytes(store.read(name)))
    logs = {}
    for where, path, cache in (("bucket", url, tmp_path / "node"), ("disk", local, "null")):
        run = tmp_path / where
        keys = {
            "data__path": path,
            "data__reference": "null",
            "data__cache": cache,
            "train__total_images": 24,
            "train__decay_images": 8,
        }
        last = {"train__sample_images": 24} if where == "bucket" else {}
        done = runs.run(runs.command("torchrun", 2, runs.arguments(tmp_path, run, **keys, **last)))
        assert done.returncode == 0, done.stderr
        logs[where] = records(run)
    assert logs["bucket"] == logs["disk"] and len(logs["disk"]) == 3
    assert len(list((tmp_path / "node").glob("*.tar"))) >= 3

    moved = autoencoder.rename(tmp_path / "moved")
    tool("sample", tmp_path / "bucket", "--count", 4, "--steps", 2, "--autoencoder", moved)
    assert np.load(tmp_path / "bucket/samples/samples.npz")["arr_0"].shape == (4, 16, 16, 3)

    other = make_autoencoder(seed=1)
    draws = {"data__path": local, "data__reference": "null", "data__autoencoder": other, "train__sample_images": 24}
    sample = [sys.executable, str(runs.ROOT / "tools/sample.py"), str(tmp_path / "bucket"), "--autoencoder", str(other)]
    for command in (
        [*sample, "--out", str(tmp_path / "none")],
        runs.command("python", 1, runs.arguments(tmp_path, tmp_path / "none", **draws)),
    ):
        done = runs.run(command)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and "has other weights" in line
        assert not list(tmp_path.glob("none/*.npz")) and not list(tmp_path.glob("none/log.jsonl"))
