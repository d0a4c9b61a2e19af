from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import runs

from diffussm.autoencoders.kl import AutoencoderKLCodec
from diffussm.commands import convert_checkpoint
from diffussm.data.encode import encode
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store


@pytest.fixture
def convert(call):
    """Runs the command; its record."""

    def convert(*arguments: object) -> dict:
        code, out, error = call(convert_checkpoint.main, *arguments, "--json", "-")
        assert code == 0, error
        return json.loads(out)

    return convert


@pytest.fixture(scope="session")
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
