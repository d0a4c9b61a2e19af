"""The sets of images of one evaluation, measured by all processes and compared by rank 0."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from diffussm.data.workers import Alone, Workers, from_first
from diffussm.errors import UserError
from diffussm.evaluation.features import Extractor
from diffussm.evaluation.images import FolderImages, ImageSet, Subset, open_images, random_subset, read_stream
from diffussm.evaluation.precision_recall import FEWEST, MAX_REFERENCE
from diffussm.evaluation.reference import Reference, holds_statistics, read_reference, write_reference
from diffussm.evaluation.score import bootstrap_distances, interval, score
from diffussm.evaluation.summary import Measured, measure_stream
from diffussm.evaluation.survey import Survey
from diffussm.files import hold_lock

REFERENCE = "the reference"


class Scoring:
    """Name the reference and the sets, then :meth:`run`, in a ``with``. Every process does so, alike.

    Args:
        workers: those who share the work.
        folder: for what lets it be broken off; this evaluation's alone.
        size: brings the images of folders to this side; see :func:`open_images`.
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
        self._lock: IO[str] | None = None
        self.count = 0
        self.reference_count: int | None = None

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *exception: object) -> None:
        """Let others have the folder; what is measured stays there."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def compare_with(self, path: str | Path, limit: int | None) -> None:
        """Take the images at ``path``, at most ``limit`` of them, or a file of statistics, as the reference.

        Raises:
            UserError: it cannot be read, or its statistics are of another extractor.
        """
        if holds_statistics(path):
            self._reference, self._real = read_reference(path, self._extractor)
            self.reference_count = self._reference.count
        else:
            self._real = open_images(path, limit, self._size, alone=self._alone)
            self.reference_count = len(self._real)

    def add(self, name: str, path: str | Path, limit: int | None = None, first: bool = False) -> None:
        """Score the images at ``path``, at most ``limit`` of them, as the last row, or the first.

        Raises:
            UserError: they cannot be read, or another set has that name.
        """
        if name in (*self._sets, REFERENCE):
            raise UserError(f"two sets are called {name}: name them apart")
        images = open_images(path, limit, self._size, alone=self._alone)
        self._sets = {name: images} | self._sets if first else self._sets | {name: images}
        self.count = self.count or len(images)

    def add_stream(self, name: str, file: IO[bytes]) -> None:
        """Score the images that come from a pipe, after :meth:`compare_with`.

        Raises:
            UserError: several processes would read it, or it holds something else.
        """
        if not self._alone:
            raise UserError("a pipe is read by one process: start without a launcher, or give a file or a folder")
        self._check({})
        with tqdm(
            desc=f"features of {name}", unit="image", mininterval=0.5 if sys.stderr.isatty() else 10, miniters=1
        ) as bar:

            def counted() -> Iterator[np.ndarray]:
                for images in read_stream(file, name):
                    yield images
                    bar.update(len(images))

            measured = measure_stream(counted(), self._extractor, self._keeps_features)
        self._sets[name] = measured.check(name)
        self.count = measured.summary.count
        _require(name, self.count, FEWEST)

    def run(self) -> list[dict[str, Any]] | None:
        """A row of figures for each set, on rank 0; None on the others.

        Raises:
            UserError: images are damaged or too few, or another process is lost, or scores the same.
        """
        from_first(self._workers, "checked", lambda: self._check(self._sets))
        reference = self._prepare_reference()
        rows = []
        for name, images in self._sets.items():
            measured: Measured | None
            if isinstance(images, Measured):
                measured = images
            else:
                measured = self._measure(images, name, np.arange(len(images) if self._keeps_features else 0))
            if reference and measured:
                row = {"name": name, **score(measured, reference, self._extractor)}
                rows.append(row | self._interval(row, measured, reference))
        return rows if reference else None

    def write_reference(self, path: str | Path, limit: int | None, target: str | Path) -> None:
        """Write a reference file of the images at ``path``.

        Raises:
            UserError: they cannot be read, or are fewer than two, or lie at ``target``.
        """
        if holds_statistics(path):
            raise UserError(f"{path} is a reference file already: give the images")
        if Path(target).exists() and Path(target).samefile(path):
            raise UserError(f"{target} holds the images themselves: write to another file")
        self._real = images = open_images(path, limit, self._size, alone=self._alone)
        from_first(self._workers, "checked", lambda: self._check({}))
        kept = np.sort(random_subset(len(images), MAX_REFERENCE))
        measured = self._measure(images, REFERENCE, kept)
        if measured:
            write_reference(target, measured, images, kept, self._extractor)
            print(f"{target}: {len(images):,} images of {path}, by {self._extractor.name}")
        self.remove()

    def remove(self) -> None:
        """Forget what is stored of the work, as it is done."""
        if self._workers.rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            with suppress(OSError):  # another evaluation is in it
                self._folder.parent.rmdir()

    @property
    def _alone(self) -> bool:
        return isinstance(self._workers, Alone)

    @property
    def _keeps_features(self) -> bool:
        """Of samples: whether something but the moments needs them."""
        return bool(self._bootstrap or self._real or (self._reference and self._reference.features is not None))

    def _check(self, sets: dict[str, ImageSet | Measured]) -> int:
        """Find at the start what would end it later, and keep others from the same evaluation."""
        every = {name: images for name, images in sets.items() if not isinstance(images, Measured)}
        for name, images in every.items():
            _require(name, len(images), FEWEST)
        if self._real is not None:
            _require(REFERENCE, len(self._real), FEWEST)
            every[REFERENCE] = self._real
        whole = [images.whole if isinstance(images, Subset) else images for images in every.values()]
        if self._size is not None and not any(isinstance(images, FolderImages) for images in whole):
            raise UserError(f"--size {self._size} is for folders of image files, of which there is none here")
        for images in every.values():
            images.check()
        if self._lock is None:
            self._lock = hold_lock(self._folder / "lock", "scoring")
        return 0

    def _prepare_reference(self) -> Reference | None:
        if self._real is None:
            return self._reference if self._workers.rank == 0 else None
        if self._reference:  # a file of statistics: of its images only the features are wanted
            subset = open_images(self._real.name, MAX_REFERENCE, alone=self._alone)
            measured = self._measure(subset, REFERENCE, np.arange(len(subset)))
            return measured and Reference(
                self._reference.pool, self._reference.spatial, measured.features, self._reference.count
            )
        measured = self._measure(self._real, REFERENCE, np.sort(random_subset(len(self._real), MAX_REFERENCE)))
        return measured and Reference.of(measured)

    def _measure(self, images: ImageSet, name: str, kept: np.ndarray) -> Measured | None:
        return Survey(images, self._extractor, f"features of {name}", kept, self._folder).measure(self._workers)

    def _interval(self, row: dict[str, Any], measured: Measured, reference: Reference) -> dict[str, list[float]]:
        if not self._bootstrap:
            return {}
        extractor = self._extractor
        distances = bootstrap_distances(measured.features, reference.pool, self._bootstrap, extractor.device)
        bar = tqdm(distances, f"bootstrap of {row['name']}", self._bootstrap, unit="set", leave=False)
        return {f"FID 95% ({extractor.name})": list(interval(row[f"FID ({extractor.name})"], list(bar)))}


def _require(name: str, count: int, least: int) -> None:
    if count < least:
        raise UserError(f"precision and recall need at least {least} images in each set, got {count}: {name}")
