"""One pass over a set of images by any number of processes, in as many goes as it takes.

    scoring/4f2c81d09be3a675/                       named by a digest of what is measured
        state-LAUNCH-earlier.safetensors            what earlier launches had measured: parts, moments and sums
        state-LAUNCH-RANK.safetensors               what a process of this one has, saved every half minute
        pool-00012.npy                              features of a part's images that are kept

Processes claim parts of 100 images by counting. What a process has measured when it is killed is lost back to its last
save; the next launch takes up the rest. A state of another launch is never added to this one's, so a process that
outlived its launch does no harm.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from diffussm import __version__
from diffussm.data.workers import Progress, Workers, from_first
from diffussm.errors import UserError
from diffussm.evaluation.features import Extractor, Features
from diffussm.evaluation.images import ImageSet
from diffussm.evaluation.summary import Measured, Summary
from diffussm.files import atomic_path
from diffussm.threads import map_batches

PART = 100  # images; divides the chunks of the inception score
SAVE_SECONDS = 30.0
ROUNDS = 4  # batches of a thread between two claims


class Survey:
    """The pass over ``images``.

    Args:
        title: of the progress bar; no two sets that are measured in a launch have the same.
        kept: numbers of the images whose pool features are kept, ascending.
        folder: for what lets it be broken off, such as `scoring/` beside the samples. All processes see it.
    """

    def __init__(self, images: ImageSet, extractor: Extractor, title: str, kept: np.ndarray, folder: Path) -> None:
        self._images, self._extractor, self._title, self._kept = images, extractor, title, kept
        what = f"{images.identity} {len(images)} {extractor.identity} {extractor.device.type} {__version__} {PART}"
        digest = hashlib.sha256(what.encode() + np.asarray(kept, "<i8").tobytes()).hexdigest()
        self.folder = folder / digest[:16]
        self._parts = math.ceil(len(images) / PART)

    def measure(self, workers: Workers) -> Measured | None:
        """Measure all, together with the other workers, of which each calls this; rank 0 gets what they have found.

        Raises:
            UserError: an image is damaged, or another process is lost.
        """
        launch = from_first(workers, f"{self._title}: launch", self._prepare)
        done = set(_parts_of(self._state_file(launch, "earlier")))
        summary, parts, saved = Summary(self._extractor), [], time.monotonic()
        begin = sum(len(self._numbers(part)) for part in done)
        with Progress(self._title, self._parts, len(self._images), workers, begin=begin) as progress:
            claims = self._claims(progress, done)
            # many threads have too little to do in one part
            at_once = math.ceil(ROUNDS * torch.get_num_threads() * self._extractor.batch_size / PART)
            while claimed := list(islice(claims, at_once)):
                self._measure_parts(claimed, summary, progress)
                parts += claimed
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save(launch, workers.rank, parts, summary, progress)
                    saved = time.monotonic()
            self._save(launch, workers.rank, parts, summary, progress)
            if workers.rank:
                return None
            progress.wait_for_shards()
        return self._combine(launch).check(self._images.name)

    def _prepare(self) -> int:
        """Join what earlier launches have measured, and give this one a number."""
        self.folder.mkdir(parents=True, exist_ok=True)
        launch, earlier = secrets.randbits(48), sorted(self.folder.glob("state-*.safetensors"))
        summary, done = Summary(self._extractor), set()
        for path in earlier:
            parts = set(_parts_of(path))
            if done.isdisjoint(parts) and all(part < self._parts for part in parts):
                summary.combine(self._load(path))
                done |= parts
        if done:
            self._write(self._state_file(launch, "earlier"), sorted(done), summary)
        for path in earlier:
            path.unlink(missing_ok=True)
        return launch

    def _claims(self, progress: Progress, done: set[int]) -> Iterator[int]:
        while (part := progress.claim()) is not None:
            if not self.folder.exists():  # asked now: who comes when nothing is left to claim may find it removed
                raise UserError(f"{self.folder} is not there: the processes see different files or folders")
            if part in done:
                progress.add_shard()
            else:
                yield part

    def _measure_parts(self, parts: list[int], summary: Summary, progress: Progress) -> None:
        size = self._extractor.batch_size
        batches = [
            numbers[start : start + size]
            for numbers in map(self._numbers, parts)
            for start in range(0, len(numbers), size)
        ]
        found: dict[int, list[Features]] = {part: [] for part in parts}
        for numbers, (features, brightest) in zip(batches, map_batches(self._extract, batches), strict=True):
            found[numbers[0] // PART].append(features)
            summary.brightest = max(summary.brightest, brightest)
            progress.add_images(len(numbers))
        for part, of_part in found.items():
            features, numbers = Features.join(of_part), self._numbers(part)
            summary.update(numbers[0], features)
            with atomic_path(self._pool_file(part)) as temporary:
                np.save(temporary, features.pool[np.isin(numbers, self._kept)].numpy())

    def _extract(self, numbers: range) -> tuple[Features, int]:
        images = self._images.read(numbers)
        return self._extractor(images), int(images.max())

    def _save(self, launch: int, rank: int, parts: list[int], summary: Summary, progress: Progress) -> None:
        path = self._state_file(launch, str(rank))
        before = len(_parts_of(path))
        if len(parts) > before:
            self._write(path, parts, summary)
        for _ in parts[before:]:
            progress.add_shard()

    def _write(self, path: Path, parts: list[int], summary: Summary) -> None:
        if not self.folder.exists():
            raise UserError(f"{self.folder} has been removed by another process, which measures the same")
        with atomic_path(path) as temporary:
            save_file({"parts": torch.tensor(parts)} | summary.state(), temporary)

    def _combine(self, launch: int) -> Measured:
        summary, done = Summary(self._extractor), []
        for path in sorted(self.folder.glob(f"state-{launch:012x}-*.safetensors")):
            done += _parts_of(path)
            summary.combine(self._load(path))
        if sorted(done) != list(range(self._parts)):
            raise UserError(f"another process measures the same images, in {self.folder}: end one, and start again")
        try:
            pools = [np.load(self._pool_file(part), allow_pickle=False) for part in range(self._parts)]
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.folder} is damaged ({error}): delete it, and start again") from error
        return Measured(summary, torch.from_numpy(np.concatenate(pools)))

    def _load(self, path: Path) -> Summary:
        return Summary.of_state(self._extractor, load_file(path))

    def _numbers(self, part: int) -> range:
        return range(part * PART, min((part + 1) * PART, len(self._images)))

    def _state_file(self, launch: int, of: str) -> Path:
        return self.folder / f"state-{launch:012x}-{of}.safetensors"

    def _pool_file(self, part: int) -> Path:
        return self.folder / f"pool-{part:05d}.npy"


def _parts_of(path: Path) -> list[int]:
    """The parts in a state; none where there is no file."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("parts").tolist()
    except FileNotFoundError:
        return []
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete {path.parent}") from error
