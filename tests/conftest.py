from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data.encode import encode
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store
from diffussm.errors import run_command


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI a test that could not run has failed: a fresh Debian machine can run them all."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI does not allow: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def no_rank_left_behind() -> Iterator[None]:
    """A command that is called in this process tells its environment its rank, which is none of later tests'."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command's main in this process: its exit code, stdout and stderr."""

    def call(main: Callable[[], None], *arguments: object) -> tuple[int, str, str]:
        name = main.__module__.rpartition(".")[2]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        code = 0
        try:
            run_command(main)
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


CLASSES = ["dark", "bright", "striped"]


def shaded_images(split: str, count: int, seed: int) -> ArrayImages:
    """16×16 grey images of three classes that differ."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = random.integers(0, 60, (count, 16, 16, 1))
    images[labels == 1] += 180
    images[labels == 2, ::2] += 120
    return ArrayImages(f"shades/{split}", CLASSES, images.astype(np.uint8), labels)


@pytest.fixture(scope="session")
def shades(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set folder with train/ and test/, latents of 4×8×8. Not to be changed."""
    folder = tmp_path_factory.mktemp("shades")
    for split, count, seed in (("train", 130, 0), ("test", 60, 1)):
        encode(shaded_images(split, count, seed), PixelCodec(16, 16, 1, size=16), open_store(folder / split), 40)
    return folder


@pytest.fixture(scope="session")
def trained(shades: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of twelve steps by two ranks under the deepspeed launcher. Not to be changed."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    done = runs.run(runs.command("deepspeed", 2, runs.arguments(shades, run, train__sample_images=48)))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="session")
def make_autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a tiny AutoencoderKL of random weights: by default of factor 2, with 4 channels."""

    def make(seed: int = 0, safe: bool = True, levels: int = 2, **config: Any) -> Path:
        import torch
        from diffusers import AutoencoderKL  # takes seconds, which most tests can do without

        torch.manual_seed(seed)
        blocks = {
            "block_out_channels": (8, 16, 16, 16)[:levels],
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
        }
        settings = {"layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4} | blocks | config
        folder = tmp_path_factory.mktemp("autoencoder")
        AutoencoderKL(**settings).save_pretrained(folder, safe_serialization=safe)
        return folder

    return make
