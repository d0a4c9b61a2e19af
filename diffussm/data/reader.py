"""Samples by number: whole ranges of a shard are read at once, and each sample in them is checked."""

from __future__ import annotations

import itertools
import math
import threading
from dataclasses import dataclass

import numpy as np

from diffussm.data.cache import ATTEMPTS, ShardCache
from diffussm.data.index import Index
from diffussm.data.store import Buffer, Store
from diffussm.errors import UserError

try:
    from isal.isal_zlib import crc32 as crc32_of  # the same as zlib's, three times as fast
except ImportError:
    from zlib import crc32 as crc32_of

RANGE_BYTES = 16 << 20  # of one read, to a sample; more are cut into equal parts
GAP_BYTES = 64 << 10  # between two samples: reading over it is cheaper than asking again
BLOCK = 64  # samples copied at once, while the processor still has them at hand from their check


@dataclass(frozen=True, eq=False)
class Run:
    """Samples of one shard that one read fetches: ``ids`` int64 [n], ascending."""

    shard: int
    ids: np.ndarray


class SampleReader:
    """Random access to the samples of an encoded data set.

    Args:
        cache: where whole shards are kept on this node, if anywhere.
    """

    def __init__(self, store: Store, index: Index, cache: ShardCache | None = None) -> None:
        self.index = index
        self._store = store
        self._cache = cache
        self._checking = threading.Lock()  # threads that check at once hinder each other more than they help
        self._shard_ends = np.cumsum(index.shard_counts)

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples numbered ``ids`` [n], in any order: moments [n, C or 2C, h, w] as stored, and labels int64 [n].

        Raises:
            UserError: a sample is missing, torn or altered; the line names its shard and its key.
        """
        ascending, places = np.unique(ids, return_inverse=True)
        moments = np.empty((len(ascending), *self.index.moments_shape), self.index.dtype)
        done = 0
        for run in self.plan(ascending):
            self.read_run(run, moments, np.arange(done, done + len(run.ids)))
            done += len(run.ids)
        return moments[places], self.labels(ids)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """The classes of the samples numbered ``ids`` [n], int64 [n]."""
        return self.index.samples["label"][ids].astype(np.int64)

    def plan(self, ids: np.ndarray) -> list[Run]:
        """The reads that fetch the samples numbered ``ids`` [n], ascending: neighbours together, in the same order."""
        shards = self._shards_of(ids)
        rows = self.index.samples[ids]
        starts = rows["offset"].astype(np.int64)
        ends = starts + rows["length"]
        far = (np.diff(shards) != 0) | (starts[1:] - ends[:-1] > GAP_BYTES)
        edges = [0, *(np.flatnonzero(far) + 1).tolist(), len(ids)] if len(ids) else [0]
        runs = []
        for first, end in itertools.pairwise(edges):
            parts = math.ceil((ends[end - 1] - starts[first]) / RANGE_BYTES)
            cuts = [first + (end - first) * part // parts for part in range(parts + 1)]
            runs += [Run(int(shards[first]), ids[a:b]) for a, b in itertools.pairwise(cuts) if a < b]
        return runs

    def read_run(self, run: Run, moments: np.ndarray, places: np.ndarray) -> None:
        """Write the run's samples to ``moments[places]``, each once it is checked.

        Raises:
            UserError: as :meth:`read`.
        """
        rows = self.index.samples[run.ids]
        for _ in range(ATTEMPTS):  # a network may alter bytes on their way; what lies altered stays so
            data = self._read_range(run, rows)
            with self._checking:
                problem = _check_and_copy(data, rows, moments, places)
            if problem is None:
                return
            if self._cache:
                self._cache.drop(self.index.shards[run.shard])
        number, reason = problem
        raise self._damaged(run.shard, run.ids[number], reason)

    def keys(self, ids: np.ndarray) -> list[str]:
        """The samples' keys in their shards."""
        return [self._key(shard, number) for shard, number in zip(self._shards_of(ids), ids, strict=True)]

    def _read_range(self, run: Run, rows: np.ndarray) -> Buffer:
        """The bytes from the run's first sample to the end of its last."""
        shard = self.index.shards[run.shard]
        start, end = int(rows["offset"][0]), int(rows["offset"][-1]) + int(rows["length"][-1])
        try:
            if self._cache:
                return self._cache.read(shard, start, end - start)
            return self._store.read(shard.name, start, end - start, shard.etag)
        except OSError as error:
            raise self._damaged(run.shard, run.ids[0], error.strerror or str(error)) from error

    def _key(self, shard: int, number: int) -> str:
        entry = self.index.shards[shard]
        return entry.key(int(number - self._shard_ends[shard]) + entry.count)

    def _shards_of(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self.index):
            raise IndexError(f"samples are numbered 0 to {len(self.index) - 1}, got {ids.min()} to {ids.max()}")
        return np.searchsorted(self._shard_ends, ids, side="right")

    def _damaged(self, shard: int, number: int, problem: str) -> UserError:
        return UserError(
            f"{self._store}/{self.index.shards[shard].name}: sample {self._key(shard, number)} is unreadable: "
            f"{problem}: restore the shard, or delete index.json and run tools/encode_latents.py again"
        )


def _check_and_copy(data: Buffer, rows: np.ndarray, moments: np.ndarray, places: np.ndarray) -> tuple[int, str] | None:
    """Copy the samples of a range to ``moments[places]``.

    Returns:
        The number of the first that is not as it was encoded, and what is wrong with it; None if all are well.
    """
    data = memoryview(data)
    starts = rows["offset"].astype(np.int64) - int(rows["offset"][0])
    steps = np.diff(starts)
    evenly_spaced = len(steps) == 0 or bool((steps == steps[0]).all())
    step = int(steps[0]) if len(steps) and evenly_spaced else 0
    inner = moments[0].strides
    block = BLOCK if evenly_spaced else 1
    columns = zip(starts.tolist(), rows["length"].tolist(), rows["crc32"].tolist(), strict=True)
    for first in range(0, len(rows), block):
        for number, (start, length, crc32) in enumerate(itertools.islice(columns, block), first):
            if start + length > len(data):
                return number, "the file ends before it"
            if crc32_of(data[start : start + length]) != crc32:
                return number, "its bytes have changed since they were encoded"
        to = places[first : first + block]
        shape = (len(to), *moments.shape[1:])
        moments[to] = np.ndarray(shape, moments.dtype, data, int(starts[first]), (step, *inner))
    return None
