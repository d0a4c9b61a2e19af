from __future__ import annotations

import numpy as np
import pytest
import torch

from diffussm.evaluation.efficientnet import EfficientNetLite0
from diffussm.evaluation.extractors import make_extractor
from diffussm.evaluation.features import Features


class BlockMeans:
    """An extractor without a network: means of an image's sixteenths, and of its quarters."""

    name = identity = "block-means"
    pool_size = 16
    spatial_size = 4
    batch_size = 7
    device = torch.device("cpu")

    def __call__(self, images: np.ndarray) -> Features:
        means = torch.from_numpy(images).float().mean(3)[:, None]
        pool = torch.nn.functional.adaptive_avg_pool2d(means, 4).flatten(1) / 16
        spatial = torch.nn.functional.adaptive_avg_pool2d(means, 2).flatten(1) / 16
        return Features(pool, spatial, pool.softmax(1))


@pytest.fixture
def block_means() -> BlockMeans:
    return BlockMeans()


@pytest.fixture(scope="session")
def efficientnet() -> EfficientNetLite0:
    return make_extractor("efficientnet-lite0")


@pytest.fixture
def images() -> np.ndarray:
    """uint8 [90, 20, 24, 3]: smooth, each of its own colours."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (90, 5, 6, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)
