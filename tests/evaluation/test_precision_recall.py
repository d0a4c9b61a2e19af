"""Precision and recall against a loop over their definition, and where the answer is plain."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffussm.errors import UserError
from diffussm.evaluation import precision_recall as module
from diffussm.evaluation.precision_recall import precision_recall

pytestmark = pytest.mark.unit


def by_definition(reference: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    def coverage(points: np.ndarray, manifold: np.ndarray) -> float:
        covered = 0
        radii = [sorted(((other - point) ** 2).sum() for other in manifold)[3] for point in manifold]
        for point in points:
            distances = ((manifold - point) ** 2).sum(1)
            covered += any(distance <= radius for distance, radius in zip(distances, radii, strict=True))
        return covered / len(points)

    return coverage(samples, reference), coverage(reference, samples)


@pytest.mark.parametrize("block_elements", [1 << 25, 250])  # in one block, and in blocks with a remainder
def test_agrees_with_the_definition(block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whole numbers whose mean is zero: float32 has them exactly, so that ties at a ball's edge count on both sides.
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block_elements)
    generator = np.random.default_rng(0)
    half = generator.integers(-3, 4, (41, 3))
    reference = np.concatenate([half, -half])
    samples = generator.integers(-5, 6, (71, 3))
    expected = by_definition(reference, samples)
    assert min(expected) > 0 and max(expected) < 1
    found = precision_recall(torch.tensor(reference).float(), torch.tensor(samples).float())
    assert found == pytest.approx(expected, abs=1e-12)


def test_features_far_from_the_origin_lose_nothing_to_rounding() -> None:
    generator = np.random.default_rng(1)
    reference, samples = generator.normal(40, 1, (120, 24)), generator.normal(40.2, 1, (90, 24))
    expected = by_definition(reference, samples)
    assert 0.1 < min(expected) < max(expected) < 0.9
    assert precision_recall(torch.tensor(reference).float(), torch.tensor(samples).float()) == pytest.approx(expected)


def test_memory_does_not_grow_with_the_sets() -> None:
    points = torch.zeros(50_000, 1)
    _, distances = next(module._squared_distances(points, points[:10_000]))
    assert module.BLOCK_ELEMENTS / 2 < distances.numel() <= module.BLOCK_ELEMENTS


def test_identical_sets() -> None:
    features = torch.randn(60, 32, generator=torch.Generator().manual_seed(0)) + 40
    assert precision_recall(features, features.clone()) == (1, 1)


def test_sets_far_apart() -> None:
    features = torch.randn(60, 32, generator=torch.Generator().manual_seed(0))
    assert precision_recall(features, features + 100) == (0, 0)


def test_collapsed_samples_have_precision_without_recall() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(200, 4, generator=generator)
    samples = reference[7] + 1e-3 * torch.randn(200, 4, generator=generator)
    precision, recall = precision_recall(reference, samples)
    assert precision == 1
    assert recall == pytest.approx(1 / 200)


def test_too_few_images() -> None:
    with pytest.raises(UserError, match="at least 4 images in each set, got 3"):
        precision_recall(torch.ones(10, 2), torch.ones(3, 2))
