"""All figures together: what they rank, and references as images and as statistics."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from diffussm.errors import UserError
from diffussm.evaluation.efficientnet import EfficientNetLite0
from diffussm.evaluation.frechet import Moments
from diffussm.evaluation.images import ReferenceStatistics
from diffussm.evaluation.score import prepare_reference, score

pytestmark = pytest.mark.unit

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz")


def statistics_of(real: np.ndarray, extractor, **changes) -> ReferenceStatistics:
    features = extractor(real)
    pool, spatial = Moments(extractor.pool_size), Moments(extractor.spatial_size)
    pool.update(features.pool)
    spatial.update(features.spatial)
    fields = {
        "path": "reference.npz",
        "mean": pool.mean,
        "covariance": pool.covariance,
        "spatial_mean": spatial.mean,
        "spatial_covariance": spatial.covariance,
        "images": real,
    }
    return ReferenceStatistics(**{**fields, **changes})


def test_images_and_their_statistics_are_the_same_reference(images: np.ndarray, block_means) -> None:
    real, samples = images[:50], images[50:] // 2
    by_images = score(samples, prepare_reference(real, block_means), block_means, "samples")
    by_file = score(samples, prepare_reference(statistics_of(real, block_means), block_means), block_means, "samples")
    assert list(by_images) == [
        *(f"{metric} (block-means)" for metric in ("FID", "sFID", "IS", "precision", "recall")),
        "images",
    ]
    assert by_images["images"] == 40
    assert by_images["FID (block-means)"] > 1
    assert by_images["FID (block-means)"] != by_images["sFID (block-means)"]
    assert by_file == pytest.approx(by_images, rel=1e-6)


def test_without_reference_images_there_is_no_precision(images: np.ndarray, block_means) -> None:
    reference = prepare_reference(statistics_of(images, block_means, images=None), block_means)
    figures = score(images, reference, block_means, "samples")
    assert figures["precision (block-means)"] is None and figures["recall (block-means)"] is None
    assert figures["FID (block-means)"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("size", "spatial", "owner"), [(2048, 2023, "--extractor inception-2015"), (17, 4, "another")])
def test_statistics_of_another_extractor(size: int, spatial: int, owner: str, images: np.ndarray, block_means) -> None:
    statistics = statistics_of(images, block_means, mean=torch.zeros(size), spatial_mean=torch.zeros(spatial))
    with pytest.raises(UserError, match=f"holds statistics of {size} and {spatial} .*block-means.*{owner}"):
        prepare_reference(statistics, block_means)


@pytest.mark.skipif(not FASHION_MNIST.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_ranks_real_above_blurred_above_noise(efficientnet: EfficientNetLite0) -> None:
    pixels = np.frombuffer(gzip.decompress(FASHION_MNIST.read_bytes()), np.uint8, 120 * 28 * 28, offset=16)
    reference, real = pixels.reshape(2, 60, 28, 28, 1).copy()
    blurred = gaussian_filter(real, (0, 1, 1, 0))
    noise = np.random.default_rng(0).integers(0, 256, real.shape, dtype=np.uint8)
    prepared = prepare_reference(reference, efficientnet)
    rows = [score(images, prepared, efficientnet, "samples") for images in (real, blurred, noise)]
    fid, sfid, inception, precision, recall = (
        [row[f"{metric} (efficientnet-lite0)"] for row in rows]
        for metric in ("FID", "sFID", "IS", "precision", "recall")
    )
    assert fid[0] < 0.7 * fid[1] < 0.5 * fid[2]
    assert sfid[0] < 0.6 * sfid[2]
    assert inception[0] > inception[1] > inception[2]
    assert precision[0] > 0.5 and precision[0] > precision[1] > precision[2] == 0
    assert recall[0] > 0.5 and recall[0] > 2 * recall[1] >= recall[2] == 0
