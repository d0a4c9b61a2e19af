from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data.encode import encode
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store

COUNT, CLASSES = 230, 5


@pytest.fixture(scope="session")
def images() -> ArrayImages:
    """230 random images [6, 8, 1], sorted by class as real sources are."""
    pixels = np.random.default_rng(1).integers(0, 256, (COUNT, 6, 8, 1), dtype=np.uint8)
    labels = np.sort(np.arange(COUNT) % CLASSES)
    return ArrayImages("noise/train", [f"class {i}" for i in range(CLASSES)], pixels, labels)


@pytest.fixture(scope="session")
def codec() -> PixelCodec:
    return PixelCodec(6, 8, 1, size=8)


@pytest.fixture(scope="session")
def encoded_once(images: ArrayImages, codec: PixelCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoded") / "train"
    encode(images, codec, open_store(folder), samples_per_shard=50, seed=3)
    return folder


@pytest.fixture
def encoded(encoded_once: Path, tmp_path: Path) -> Path:
    """A folder with the images encoded in five shards: the test's own, to damage."""
    return shutil.copytree(encoded_once, tmp_path / "encoded")
