"""Samples by number: read by offset from their shards, each checked."""

from __future__ import annotations

import zlib

import numpy as np

from diffussm.data.index import Index, sample_key
from diffussm.data.store import Store
from diffussm.errors import UserError


class SampleReader:
    """Random access to the samples of an encoded data set."""

    def __init__(self, store: Store, index: Index) -> None:
        self.index = index
        self._store = store
        self._names = [shard.name for shard in index.shards]
        self._shard_ends = np.cumsum(index.shard_counts)

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples numbered ``ids`` [n]: moments [n, C or 2C, h, w] as stored, and labels int64 [n].

        Raises:
            UserError: a sample is missing, torn or altered; the line names its shard and its key.
        """
        shards = self._shards_of(ids)
        rows = self.index.samples[ids]
        samples = []
        columns = (rows[name].tolist() for name in ("offset", "length", "crc32"))
        for i, (shard, offset, length, crc32) in enumerate(zip(shards.tolist(), *columns, strict=True)):
            try:
                data = self._store.read(self._names[shard], offset, length)
            except OSError as error:
                raise self._damaged(shard, ids[i], error.strerror or str(error)) from error
            if len(data) != length:
                raise self._damaged(shard, ids[i], "the file ends before it")
            if zlib.crc32(data) != crc32:
                raise self._damaged(shard, ids[i], "its bytes have changed since they were encoded")
            samples.append(data)
        moments = np.frombuffer(bytearray().join(samples), self.index.dtype)
        return moments.reshape(len(ids), *self.index.moments_shape), rows["label"].astype(np.int64)

    def keys(self, ids: np.ndarray) -> list[str]:
        """The samples' keys in their shards."""
        return [self._key(shard, number) for shard, number in zip(self._shards_of(ids), ids, strict=True)]

    def _key(self, shard: int, number: int) -> str:
        return sample_key(shard, number - self._shard_ends[shard] + self.index.shards[shard].count)

    def _shards_of(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self.index):
            raise IndexError(f"samples are numbered 0 to {len(self.index) - 1}, got {ids.min()} to {ids.max()}")
        return np.searchsorted(self._shard_ends, ids, side="right")

    def _damaged(self, shard: int, number: int, problem: str) -> UserError:
        return UserError(
            f"{self._store}/{self._names[shard]}: sample {self._key(shard, number)} is unreadable: {problem}: restore "
            f"the shard, or delete index.json and run tools/encode_latents.py again"
        )
