"""The sets of images of one evaluation, measured by all processes and compared by rank 0."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from diffussm.data.workers import Alone, Workers
from diffussm.errors import UserError
from diffussm.evaluation.features import Extractor
from diffussm.evaluation.images import ImageSet, open_images, random_subset, read_stream
from diffussm.evaluation.precision_recall import MAX_REFERENCE
from diffussm.evaluation.reference import Reference, holds_statistics, read_reference, write_reference
from diffussm.evaluation.score import bootstrap_distances, interval, score
from diffussm.evaluation.summary import Measured, measure_stream
from diffussm.evaluation.survey import Survey

REFERENCE = "the reference"


class Scoring:
    """Name the sets, then :meth:`run`. Every process does so, alike.

    Args:
        workers: those who share the work.
        folder: for what lets it be broken off.
        size: see :func:`open_images`.
        bootstrap: how many sets to draw anew for the interval of FID; None: no interval.

    Attributes:
        count: samples of the set that was named first.
        reference_count: images that the reference's statistics are of; None: its file does not say.
    """

    def __init__(
        self, extractor: Extractor, workers: Workers, folder: Path, size: int | None, bootstrap: int | None = None
    ) -> None:
        self._extractor, self._workers, self._folder, self._size = extractor, workers, folder, size
        self._bootstrap = bootstrap
        self._sets: dict[str, ImageSet | Measured] = {}
        self._reference: Reference | None = None
        self._real: ImageSet | None = None
        self._surveys: list[Survey] = []
        self.count = 0
        self.reference_count: int | None = None

    def add(self, name: str, path: str | Path, limit: int | None = None, first: bool = False) -> None:
        """Score the images at ``path``, at most ``limit`` of them, as the last row, or the first.

        Raises:
            UserError: they cannot be read, or another set has that name.
        """
        if name in (*self._sets, REFERENCE):
            raise UserError(f"two sets are called {name}: name them apart")
        images = open_images(path, limit, self._size)
        self._sets = {name: images} | self._sets if first else self._sets | {name: images}
        self.count = self.count or len(images)

    def add_stream(self, name: str, file: IO[bytes]) -> None:
        """Score the images that come from a pipe. UserError where several processes would read it."""
        if not isinstance(self._workers, Alone):
            raise UserError("a pipe is read by one process: start without a launcher, or give a file or a folder")
        bar = tqdm(desc=f"features of {name}", unit="image", mininterval=0.5 if sys.stderr.isatty() else 10)
        with bar:

            def counted():
                for images in read_stream(file, name):
                    yield images
                    bar.update(len(images))

            self._sets[name] = measure_stream(counted(), self._extractor, name)
        self.count = self._sets[name].summary.count

    def compare_with(self, path: str | Path, limit: int | None) -> None:
        """Take the images at ``path``, at most ``limit`` of them, or a file of statistics, as the reference.

        Raises:
            UserError: it cannot be read, or its statistics are of another extractor.
        """
        if holds_statistics(path):
            self._reference, self._real = read_reference(path, self._extractor)
            self.reference_count = self._reference.count
        else:
            self._real = open_images(path, limit, self._size)
            self.reference_count = len(self._real)

    def run(self) -> list[dict[str, Any]] | None:
        """A row of figures for each set, on rank 0; None on the others.

        Raises:
            UserError: images are damaged or too few, or another process is lost.
        """
        reference = self._prepare_reference()
        rows = []
        for name, images in self._sets.items():
            measured = images
            if not isinstance(images, Measured):
                measured = self._measure(images, name, np.arange(len(images)))
            if reference and measured:
                row = {"name": name, **score(measured, reference, self._extractor)}
                rows.append(row | self._interval(row, measured, reference))
        return rows if reference else None

    def write_reference(self, path: str | Path, limit: int | None, target: str | Path) -> None:
        """Write a reference file of the images at ``path``.

        Raises:
            UserError: they cannot be read, or are fewer than two.
        """
        if holds_statistics(path):
            raise UserError(f"{path} is a reference file already: give the images")
        images = open_images(path, limit, self._size)
        kept = np.sort(random_subset(len(images), MAX_REFERENCE))
        measured = self._measure(images, REFERENCE, kept)
        if measured:
            write_reference(target, measured, images, kept, self._extractor)
            print(f"{target}: {len(images):,} images of {path}, by {self._extractor.name}")
        self.remove()

    def remove(self) -> None:
        """Forget what is stored of the work, as it is done."""
        if self._workers.rank == 0:
            for survey in self._surveys:
                survey.remove()

    def _prepare_reference(self) -> Reference | None:
        if self._real is None:
            return self._reference if self._workers.rank == 0 else None
        kept = np.sort(random_subset(len(self._real), MAX_REFERENCE))
        if self._reference:  # a file of statistics: of its images only the features are wanted
            subset = open_images(self._real.name, MAX_REFERENCE)
            measured = self._measure(subset, REFERENCE, np.arange(len(subset)))
            return measured and Reference(self._reference.pool, self._reference.spatial, measured.features, None)
        measured = self._measure(self._real, REFERENCE, kept)
        return measured and Reference.of(measured)

    def _measure(self, images: ImageSet, name: str, kept: np.ndarray) -> Measured | None:
        survey = Survey(images, self._extractor, f"features of {name}", kept, self._folder)
        self._surveys.append(survey)
        return survey.measure(self._workers)

    def _interval(self, row: dict[str, Any], measured: Measured, reference: Reference) -> dict[str, list[float]]:
        if not self._bootstrap:
            return {}
        extractor = self._extractor.name
        distances = bootstrap_distances(measured.features, reference.pool, self._bootstrap)
        bar = tqdm(distances, f"bootstrap of {row['name']}", self._bootstrap, unit="set", leave=False, disable=None)
        return {f"FID 95% ({extractor})": list(interval(row[f"FID ({extractor})"], list(bar)))}
