"""FID while training: of a small fixed number of images that all ranks draw with the averaged weights.

What needs the GPUs holds up training: drawing, decoding, features. What is left, the distance, is computed by the
thread that saves the checkpoint of the same weights, before it publishes that; so `best` is the best that was scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from diffussm.config import Config
from diffussm.evaluation.extractors import make_extractor
from diffussm.evaluation.features import Extractor
from diffussm.evaluation.frechet import Gaussian, frechet_distance
from diffussm.evaluation.images import open_images
from diffussm.evaluation.precision_recall import MAX_REFERENCE
from diffussm.evaluation.reference import holds_statistics, read_reference
from diffussm.evaluation.summary import Summary, measure_stream
from diffussm.training.cluster import Cluster
from diffussm.training.previews import Painter


class Scorer:
    """Scores the averaged weights against `data.reference`. Made by every rank.

    Args:
        beat: told what goes on, for who watches for hangs.

    Raises:
        UserError: the extractor cannot be had, or the reference not be read.
    """

    def __init__(self, config: Config, painter: Painter, cluster: Cluster, beat: Callable[[str], None]) -> None:
        self._settings, self._painter, self._cluster, self._beat = config.score, painter, cluster, beat
        made: list[Extractor] = []
        cluster.from_main(lambda: made.append(self._make_extractor()))  # one rank downloads weights
        self._extractor = made[0] if made else self._make_extractor()
        path = config.data.reference
        self._reference: Gaussian | None = None
        known: list[Gaussian] = []
        if cluster.from_main(lambda: self._read_statistics(path, known)):
            self._reference = known[0] if known else None
        else:
            real = self._measure(self._real_images(path))
            self._reference = real and real.pool.gaussian()

    def _read_statistics(self, path: str, found: list[Gaussian]) -> bool:
        """Whether ``path`` is a file of statistics, which goes to ``found``."""
        if holds_statistics(path):
            found.append(read_reference(path, self._extractor)[0].pool)
        return bool(found)

    def measure(self, weights: dict[str, Tensor]) -> Callable[[], float] | None:
        """Draw images with ``weights``, given by parameter name, and measure them. Collective.

        Returns:
            On rank 0, what computes the distance: seconds on a CPU.
        """
        summary = self._measure(self._drawn_images(weights))
        return summary and (lambda: frechet_distance(summary.pool.gaussian(), self._reference))

    def _drawn_images(self, weights: dict[str, Tensor]) -> Iterator[np.ndarray]:
        settings = self._settings
        model = self._painter.model(weights)
        for numbers in self._mine(settings.images, settings.batch):
            self._beat(f"images to score, from number {numbers[0]}")
            yield self._painter.draw(model, settings, numbers, [self._label(number) for number in numbers])

    def _label(self, number: int) -> int:
        """Classes take turns; of fewer images than classes each has its own, spread over them."""
        classes, images = self._painter.num_classes, self._settings.images
        return number if images >= classes else number * classes // images

    def _real_images(self, path: str) -> Iterator[np.ndarray]:
        images = open_images(path, MAX_REFERENCE)
        for numbers in self._mine(len(images), self._settings.batch):
            self._beat(f"features of {path}, from number {numbers[0]}")
            yield images.read(numbers)

    def _mine(self, count: int, batch: int) -> Iterator[range]:
        """This rank's share of ``count`` images, in batches."""
        mine = range(self._cluster.rank, count, self._cluster.world_size)
        return (mine[start : start + batch] for start in range(0, len(mine), batch))

    def _measure(self, images: Iterable[np.ndarray]) -> Summary | None:
        """All ranks' images together, on rank 0. Collective."""
        state = measure_stream(images, self._extractor, keep=False).summary.state()
        states: list[Any] = [None] * self._cluster.world_size
        dist.gather_object(state, states if self._cluster.is_main else None, group=self._cluster.control)
        if not self._cluster.is_main:
            return None
        whole = Summary(self._extractor)
        for state in states:
            whole.combine(Summary.of_state(self._extractor, state))
        return whole

    def _make_extractor(self) -> Extractor:
        return make_extractor(self._settings.extractor, self._settings.inception_weights, self._cluster.device)
