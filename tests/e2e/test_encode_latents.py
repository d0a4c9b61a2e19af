from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffussm.autoencoders.codec import codec_from_spec
from diffussm.data.index import Index
from diffussm.data.reader import SampleReader
from diffussm.data.sources import DEBIAN_FOLDER, DEBIAN_PACKAGE, fashion_mnist
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
    truth = fashion_mnist("test", tmp_path / "raw")
    assert sorted(zip(labels.tolist(), (image.tobytes() for image in images), strict=True)) == sorted(
        zip(truth.labels.tolist(), (image.tobytes() for image in truth.images), strict=True)
    )
    expected_bytes = sum(path.stat().st_size for path in out.glob("*.tar"))
    assert len(figures) == 1 and figures[0]["samples"] == 10_000 and figures[0]["bytes"] == expected_bytes
    np.testing.assert_allclose(figures[0]["mean"], latents.double().mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(figures[0]["std"], latents.double().std((0, 2, 3)), rtol=1e-4)

    again = run(*arguments, "--json", "-")
    assert again.returncode == 0 and "nothing to do" in again.stderr
    assert json.loads(again.stdout)[0]["images_per_second"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "fashion-mnist", "--out", "gopher://host/data"], "error: cannot open gopher://host/data: "),
        (["--source", "fashion-mnist", "--out", "x", "--samples-per-shard", "0"], "error: --samples-per-shard must be"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
