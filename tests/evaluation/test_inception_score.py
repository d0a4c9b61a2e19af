"""The inception score against its definition and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffussm.evaluation.inception_score import InceptionScore

pytestmark = pytest.mark.unit


def inception_score(probabilities: torch.Tensor) -> float:
    score = InceptionScore()
    score.update(0, probabilities)
    return score.value()


def by_definition(probabilities: np.ndarray, chunk: int) -> float:
    scores = []
    for start in range(0, len(probabilities), chunk):
        conditional = probabilities[start : start + chunk].astype(np.float64)
        marginal = conditional.mean(0, keepdims=True)
        divergences = [(row * np.log(row / marginal[0])).sum() for row in conditional]
        scores.append(np.exp(np.mean(divergences)))
    return float(np.mean(scores))


@pytest.mark.parametrize("count", [40, 5000, 11_000])  # 11,000: two chunks and a shorter third that counts as much
def test_agrees_with_the_definition(count: int) -> None:
    logits = torch.randn(count, 12, generator=torch.Generator().manual_seed(count))
    logits[: count // 2, 0] += 3  # chunks that differ
    probabilities = logits.softmax(1)
    assert inception_score(probabilities) == pytest.approx(by_definition(probabilities.numpy(), 5000), rel=1e-6)


def test_sure_and_equally_often_of_k_classes_is_k() -> None:
    assert inception_score(torch.eye(10).repeat(20, 1)) == pytest.approx(10, rel=1e-12)


def test_all_alike_is_1() -> None:
    assert inception_score(torch.tensor([[0.2, 0.0, 0.8]]).repeat(30, 1)) == pytest.approx(1, rel=1e-12)


def test_parts_may_come_in_any_order_from_anywhere() -> None:
    probabilities = torch.randn(11_000, 12, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1)
    starts = [*range(0, 11_000, 700)]
    scores = InceptionScore(), InceptionScore()
    for number, start in enumerate(reversed(starts)):  # 4900 to 5600 is of two chunks
        scores[number % 2].update(start, probabilities[start : start + 700])
    stored = InceptionScore()
    stored.load_state(scores[1].state())
    scores[0].combine(stored)
    assert scores[0].value() == pytest.approx(inception_score(probabilities), rel=1e-12)
