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

TOGETHER = 100  # features that moments take in at once: each time they touch matrices of D × D


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

    def update(self, first: int, features: Features) -> None:
        """Take in the features of the images from number ``first``.

        Raises:
            UserError: they are not finite.
        """
        if not (features.pool.isfinite().all() and features.spatial.isfinite().all()):
            raise UserError(f"features of images {first} to {first + len(features) - 1} are not finite: wrong weights?")
        self.pool.update(features.pool)
        self.spatial.update(features.spatial)
        self.classes.update(first, features.probabilities)

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


def measure_stream(batches: Iterable[np.ndarray], extractor: Extractor, keep: bool = True) -> Measured:
    """Measure images uint8 [n, H, W, 1 or 3] as they come.

    Args:
        keep: all pool features.
    """
    summary, kept = Summary(extractor), [torch.zeros(0, extractor.pool_size)]
    waiting: list[Features] = []

    def take_in() -> None:
        features = Features.join(waiting)
        summary.update(summary.count, features)
        kept.extend([features.pool] if keep else [])
        waiting.clear()

    for images in batches:
        summary.brightest = max(summary.brightest, int(images.max()))
        for start in range(0, len(images), extractor.batch_size):
            waiting.append(extractor(images[start : start + extractor.batch_size]))
            if sum(map(len, waiting)) >= TOGETHER:
                take_in()
    if waiting:
        take_in()
    return Measured(summary, torch.cat(kept))
