"""All figures of a set of images against a reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from diffussm.errors import UserError
from diffussm.evaluation.features import Extractor, extract
from diffussm.evaluation.frechet import Gaussian, frechet_distance
from diffussm.evaluation.images import ReferenceStatistics, random_subset
from diffussm.evaluation.inception import Inception2015
from diffussm.evaluation.inception_score import inception_score
from diffussm.evaluation.precision_recall import MAX_REFERENCE, precision_recall

METRICS = ("FID", "sFID", "IS", "precision", "recall")


@dataclass(frozen=True)
class Reference:
    """What scoring needs of the real images, computed once for any number of sets."""

    pool: Gaussian
    spatial: Gaussian
    features: Tensor | None  # [N, D], N at most 10,000: for precision and recall
    count: int | None  # images that the statistics are of; None: the file does not say


def prepare_reference(source: np.ndarray | ReferenceStatistics, extractor: Extractor) -> Reference:
    """The features' statistics of real images [N, H, W, C], or a file's.

    Raises:
        UserError: the file's statistics are of another extractor, or there are fewer than two images.
    """
    if isinstance(source, ReferenceStatistics):
        _check_sizes(source, extractor)
        features = None
        if source.images is not None:
            images = source.images[random_subset(len(source.images), MAX_REFERENCE)]
            features = extract(extractor, images, "the reference").pool
        return Reference(
            pool=Gaussian.of_moments(source.mean, source.covariance),
            spatial=Gaussian.of_moments(source.spatial_mean, source.spatial_covariance),
            features=features,
            count=None,
        )
    features = extract(extractor, source, "the reference")
    return Reference(
        pool=Gaussian.of_samples(features.pool),
        spatial=Gaussian.of_samples(features.spatial),
        features=features.pool[random_subset(len(features), MAX_REFERENCE)],
        count=len(features),
    )


def score(images: np.ndarray, reference: Reference, extractor: Extractor, what: str) -> dict[str, float | int | None]:
    """The :data:`METRICS` of images [N, H, W, C], by the name and the extractor: ``FID (efficientnet-lite0)``.

    Precision and recall are None where the reference has no images. ``what`` is the set's name for the progress bar.

    Raises:
        UserError: fewer than 4 images.
    """
    features = extract(extractor, images, what)
    precision, recall = None, None
    if reference.features is not None:
        precision, recall = precision_recall(reference.features, features.pool)
    values = (
        frechet_distance(Gaussian.of_samples(features.pool), reference.pool),
        frechet_distance(Gaussian.of_samples(features.spatial), reference.spatial),
        inception_score(features.probabilities),
        precision,
        recall,
    )
    figures = {f"{metric} ({extractor.name})": value for metric, value in zip(METRICS, values, strict=True)}
    return {**figures, "images": len(images)}


def _check_sizes(statistics: ReferenceStatistics, extractor: Extractor) -> None:
    sizes = len(statistics.mean), len(statistics.spatial_mean)
    if sizes != (extractor.pool_size, extractor.spatial_size):
        theirs = "they are of another one: give a data set or an .npz of images instead"
        if sizes == (Inception2015.pool_size, Inception2015.spatial_size):  # what published files are made with
            theirs = f"they are of the 2015 Inception graph: add --extractor {Inception2015.name}"
        raise UserError(
            f"{statistics.path} holds statistics of {sizes[0]} and {sizes[1]} features, but {extractor.name} has "
            f"{extractor.pool_size} and {extractor.spatial_size}: {theirs}"
        )
