"""Images from sample files and encoded data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data.encode import encode
from diffussm.data.sources.base import ArrayImages
from diffussm.data.store import open_store
from diffussm.evaluation.images import ReferenceStatistics, random_subset, read_images, read_reference

pytestmark = pytest.mark.unit


@pytest.fixture
def data_set(tmp_path: Path, images: np.ndarray) -> Path:
    source = ArrayImages("test", ["all"], images, np.zeros(len(images), np.int64))
    encode(source, PixelCodec(20, 24, 3), open_store(tmp_path / "data"), samples_per_shard=40)
    return tmp_path / "data"


def as_set(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


def test_a_sample_file_is_read_in_order(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "samples.npz"
    np.savez_compressed(path, images, labels=np.arange(90))
    np.testing.assert_array_equal(read_images(path), images)
    np.testing.assert_array_equal(read_images(path, 90), images)


def test_an_encoded_data_set_gives_its_very_images(data_set: Path, images: np.ndarray) -> None:
    found = read_images(data_set)
    assert found.shape == images.shape
    assert as_set(found) == as_set(images)
    assert as_set(read_images(f"file://{data_set}")) == as_set(images)


def test_a_subset_is_random_but_always_the_same(data_set: Path, images: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", images)
    for path in (data_set, tmp_path / "samples.npz"):
        found = read_images(path, 30)
        assert len(as_set(found)) == 30 and as_set(found) < as_set(images)
        assert as_set(found) != as_set(read_images(path)[:30])
        np.testing.assert_array_equal(found, read_images(path, 30))


def test_a_subset_is_spread_over_the_whole() -> None:
    chosen = random_subset(10_000, 1000)
    assert len(set(chosen.tolist())) == 1000
    assert np.histogram(chosen, 10, (0, 10_000))[0].min() > 60  # 100 expected, standard deviation 9
    assert chosen[:4].tolist() == random_subset(10_000, 4).tolist()


def test_a_reference_file_of_statistics_and_one_of_images(tmp_path: Path, images: np.ndarray) -> None:
    moments = {"mu": np.ones(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": 2 * np.eye(2)}
    np.savez(tmp_path / "statistics.npz", **moments)
    np.savez(tmp_path / "both.npz", images, **moments)
    np.savez(tmp_path / "images.npz", images)
    statistics, both = (read_reference(tmp_path / name, 50) for name in ("statistics.npz", "both.npz"))
    assert isinstance(statistics, ReferenceStatistics) and isinstance(both, ReferenceStatistics)
    assert statistics.images is None
    assert both.images is not None and both.images.shape == (50, 20, 24, 3)
    assert both.spatial_covariance.tolist() == [[2, 0], [0, 2]]
    np.testing.assert_array_equal(read_reference(tmp_path / "images.npz", 100), images)
