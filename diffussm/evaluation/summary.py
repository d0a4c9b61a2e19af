"""What the figures of a set of images are computed from, collected in one pass over it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffussm.errors import UserError
from diffussm.evaluation.features import Extractor, Features
from diffussm.evaluation.frechet import Moments
from diffussm.evaluation.inception_score import InceptionScore


class Summary:
    """Moments of features and sums of class probabilities: all that FID, sFID and IS need, in the same memory for any
    number of images. They come in parts, in any order.

    Attributes:
        pool, spatial: moments of the features.
        classes: the inception score.
        brightest: the greatest value of a pixel.
    """

    def __init__(self, extractor: Extractor) -> None:
        self.pool, self.spatial = Moments(extractor.pool_size), Moments(extractor.spatial_size)
        self.classes = InceptionScore()
        self.brightest = 0

    @property
    def count(self) -> int:
        """Images seen."""
        return self.pool.count

    def update(self, first: int, features: Features, brightest: int) -> None:
        """Take in the features of the images from number ``first``.

        Raises:
            UserError: they are not finite.
        """
        if not (features.pool.isfinite().all() and features.spatial.isfinite().all()):
            raise UserError(f"features of images {first} to {first + len(features) - 1} are not finite: wrong weights?")
        self.pool.update(features.pool)
        self.spatial.update(features.spatial)
        self.classes.update(first, features.probabilities)
        self.brightest = max(self.brightest, brightest)

    def combine(self, other: Summary) -> None:
        """Take in all that ``other`` has seen."""
        self.pool.combine(other.pool)
        self.spatial.combine(other.spatial)
        self.classes.combine(other.classes)
        self.brightest = max(self.brightest, other.brightest)

    def state(self) -> dict[str, Tensor]:
        """All of it, to be stored."""
        parts = {"pool": self.pool, "spatial": self.spatial, "classes": self.classes}
        state = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state().items()}
        return state | {"brightest": torch.tensor(self.brightest)}

    @classmethod
    def of_state(cls, extractor: Extractor, state: dict[str, Tensor]) -> Summary:
        summary = cls(extractor)
        for name, part in ("pool", summary.pool), ("spatial", summary.spatial), ("classes", summary.classes):
            prefix = f"{name}."
            part.load_state({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        summary.brightest = int(state["brightest"])
        return summary


@dataclass(frozen=True)
class Measured:
    """A set of images as the figures need it.

    Attributes:
        summary: of all.
        features: pool features of some of them, [n, D] float32; for precision, recall and the bootstrap.
    """

    summary: Summary
    features: Tensor

    def check(self, name: str) -> Measured:
        """Itself. UserError where what was taken for images has been none."""
        if self.summary.count and self.summary.brightest <= 1:
            raise UserError(f"{name}: the images hold nothing but 0 and 1: scale them to 0..255 before rounding them")
        return self


def measure_stream(batches: Iterable[np.ndarray], extractor: Extractor, name: str) -> Measured:
    """Measure images uint8 [n, H, W, 3] as they come; all pool features are kept.

    Raises:
        UserError: they are no images.
    """
    summary, kept = Summary(extractor), [torch.zeros(0, extractor.pool_size)]
    for images in batches:
        for start in range(0, len(images), extractor.batch_size):
            batch = images[start : start + extractor.batch_size]
            features = extractor(batch)
            summary.update(summary.count, features, int(batch.max()))
            kept.append(features.pool)
    return Measured(summary, torch.cat(kept)).check(name)
