from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image

from diffussm.autoencoders.codec import codec_from_spec
from diffussm.commands import encode_latents
from diffussm.data.index import Index
from diffussm.data.reader import SampleReader
from diffussm.data.sources.fashion_mnist import DEBIAN_FOLDER, DEBIAN_PACKAGE, load_fashion_mnist
from diffussm.data.store import open_store

pytestmark = pytest.mark.e2e

TOOL = Path(__file__).parents[2] / "tools" / "encode_latents.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOOL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason=f"Debian's {DEBIAN_PACKAGE} is not installed")
def test_fashion_mnist_comes_back_pixel_for_pixel(tmp_path: Path) -> None:
    out = tmp_path / "test"
    arguments = ["--source", "fashion-mnist", "--split", "test", "--codec", "pixel", "--out", out]
    done = run(*arguments, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    assert "10,000" in done.stdout and "10000/10000" in done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())

    store = open_store(out)
    index = Index.load(store)
    moments, labels = SampleReader(store, index).read(np.arange(10_000))
    latents = (torch.from_numpy(moments).float() - index.shift) * index.scale
    images = codec_from_spec(index.codec).decode(latents)
    truth = load_fashion_mnist("test", tmp_path / "raw")
    assert sorted(zip(labels.tolist(), (image.tobytes() for image in images), strict=True)) == sorted(
        zip(truth.labels.tolist(), (image.tobytes() for image in truth.images), strict=True)
    )
    expected_bytes = sum(path.stat().st_size for path in out.glob("*.tar"))
    assert len(figures) == 1 and figures[0]["samples"] == 10_000 and figures[0]["bytes"] == expected_bytes
    np.testing.assert_allclose(figures[0]["normalised"]["mean"], latents.double().mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(figures[0]["normalised"]["std"], latents.double().std((0, 2, 3)), rtol=1e-4)

    again = run(*arguments, "--json", "-")
    assert again.returncode == 0 and "nothing to do" in again.stderr
    assert json.loads(again.stdout)[0]["images_per_second"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "fashion-mnist", "--out", "gopher://host/data"], "error: cannot open gopher://host/data/train: "),
        (["--source", "fashion-mnist", "--out", "x", "--samples-per-shard", "0"], "error: --samples-per-shard must be"),
        (["--source", "folder", "--out", "x"], "error: --source folder needs --input"),
        (["--source", "folder", "--input", ".", "--split", "test", "--out", "x"], "error: --split does not go with"),
        (["--source", "folder", "--input", ".", "--size", "0", "--out", "x"], "error: --size must be"),
        (
            ["--source", "webdataset", "--input", ".", "--samples-per-shard", "9", "--out", "x"],
            "error: --samples-per-shard does not go with --source webdataset",
        ),
        (["--source", "folder", "--input", ".", "--on-bad-image", "guess", "--out", "x"], "error: argument --on-bad"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


COUNT, SIZE, SHARD = 50, 16, 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """50 pictures of two classes, each of one colour on the left and another on the right; two that are no pictures."""
    random = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = random.integers(0, 256, (1, 2, 3), dtype=np.uint8).repeat(20, 0).repeat(10, 1)
        path = tmp_path / "images" / ("cat" if number % 2 else "dog") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    for torn in ("cat/07.png", "dog/20.png"):
        path = tmp_path / "images" / torn
        path.write_bytes(path.read_bytes()[:50])
    return tmp_path / "images"


def test_bad_images_stop_it_or_are_left_out_whatever_the_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    arguments = ["--source", "folder", "--input", folder, "--size", SIZE, "--codec", "pixel", "--flip"]
    arguments += ["--samples-per-shard", SHARD]
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2"]

    def encode_into(name: str, launcher: list[str], *more: str) -> subprocess.CompletedProcess[str]:
        out = ["--out", str(tmp_path / name)]
        return runs.run([*launcher, sys.executable, str(TOOL), *map(str, arguments), *out, *more])

    stopped = encode_into("by-two", mpirun)
    assert stopped.returncode != 0
    (line,) = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"(cat/07|dog/20)\.png cannot be decoded: .*--on-bad-image skip", line)
    assert not (tmp_path / "by-two/index.json").exists()

    for name, launcher in (("by-two", mpirun), ("by-one", [])):
        done = encode_into(name, launcher, "--on-bad-image", "skip", "--json", str(tmp_path / "figures.json"))
        assert done.returncode == 0, done.stderr
        assert "left out      2 images" in done.stdout and "bad-images.json" in done.stdout
        (figures,) = json.loads((tmp_path / "figures.json").read_text())
        assert (figures["samples"], figures["skipped"], figures["shards"]) == (96, 2, 14)
    one, two = (open_store(tmp_path / name) for name in ("by-one", "by-two"))
    assert {name: one.read(name) for name in one.list()} == {name: two.read(name) for name in two.list()}
    listed = json.loads(one.read("bad-images.json"))
    assert sorted(Path(bad["name"]).name for bad in listed) == ["07.png", "20.png"]

    index = Index.load(one)
    moments, labels = SampleReader(one, index).read(np.arange(96))
    images = codec_from_spec(index.codec).decode((torch.from_numpy(moments).float() - index.shift) * index.scale)
    np.testing.assert_array_equal(images[48:], images[:48, :, ::-1])
    assert index.class_names == ["cat", "dog"] and np.bincount(labels).tolist() == [48, 48]


def test_figures_of_a_data_set_take_the_memory_of_a_run_and_no_more(shades: Path, monkeypatch) -> None:
    monkeypatch.setattr(encode_latents, "RUN", 50)
    reads, read = [], SampleReader.read
    monkeypatch.setattr(SampleReader, "read", lambda self, ids: reads.append(len(ids)) or read(self, ids))
    store = open_store(shades / "train")
    index = Index.load(store)
    figures = encode_latents.describe(store, index)
    assert reads == [50, 50, 30]
    moments = read(SampleReader(store, index), np.arange(130))[0]
    np.testing.assert_allclose(figures["stored"]["mean"], moments.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(figures["stored"]["std"], moments.std((0, 2, 3)), rtol=1e-6)


def test_help_has_examples_for_each_launcher() -> None:
    done = run("--help")
    assert done.returncode == 0
    for launcher in ("\n  python ", "\n  torchrun ", "\n  mpirun "):
        assert launcher in done.stdout
