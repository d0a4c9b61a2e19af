"""All figures of a set of images against a reference."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffussm.errors import UserError
from diffussm.evaluation.features import Extractor
from diffussm.evaluation.frechet import Gaussian, frechet_distance
from diffussm.evaluation.precision_recall import precision_recall
from diffussm.evaluation.reference import Reference
from diffussm.evaluation.summary import Measured

METRICS = ("FID", "sFID", "IS", "precision", "recall")
BOOTSTRAP_SEED = 0
CONFIDENCE = 0.95


def score(measured: Measured, reference: Reference, extractor: Extractor) -> dict[str, float | int | None]:
    """The :data:`METRICS` of images, by the name and the extractor: ``FID (efficientnet-lite0)``; and their number.

    Precision and recall are None where the reference has no images; they are of the images whose features are kept.

    Raises:
        UserError: fewer than 4 images, or a figure that is not finite.
    """
    summary = measured.summary
    precision, recall = None, None
    if reference.features is not None:
        precision, recall = precision_recall(
            reference.features.to(extractor.device), measured.features.to(extractor.device)
        )
    values = (
        frechet_distance(summary.pool.gaussian(), reference.pool),
        frechet_distance(summary.spatial.gaussian(), reference.spatial),
        summary.classes.value(),
        precision,
        recall,
    )
    if not all(value is None or math.isfinite(value) for value in values):
        raise UserError(f"a figure is not finite: {values}: look at the reference's statistics")
    figures = {f"{metric} ({extractor.name})": value for metric, value in zip(METRICS, values, strict=True)}
    return {**figures, "images": summary.count}


def bootstrap_distances(
    features: Tensor, reference: Gaussian, replicates: int, device: torch.device
) -> Iterator[float]:
    """Fréchet distances of as many images drawn anew, with replacement, from features [N, D]; ``device`` computes."""
    generator = torch.Generator().manual_seed(BOOTSTRAP_SEED)
    features = features.to(device)
    reference = Gaussian(reference.mean.to(device), reference.factor.to(device))
    for _ in range(replicates):
        drawn = torch.randint(len(features), (len(features),), generator=generator)
        yield frechet_distance(Gaussian.of_samples(features[drawn.to(device)]), reference)


def interval(distance: float, replicates: list[float]) -> tuple[float, float]:
    """95 % of the distances that as many other images of the same model would have, by those of a bootstrap.

    A set drawn with replacement holds fewer images that differ, and so is further away on average; that is taken off.
    """
    values = torch.tensor(replicates, dtype=torch.float64)
    ends = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = (distance + (values - values.mean()).quantile(ends)).tolist()
    return max(0.0, low), high
