"""The order in which a run sees its samples: a pure function of (seed, step), the same at any world size.

A global batch is fed by as many virtual streams as it has samples. Each epoch permutes the shards, joins them, turns
the joined sequence by a random shift and cuts it into one run of consecutive samples a stream. A stream walks its run
window by window, each window shuffled; a step takes one sample of each stream. So

- a step's samples depend on the seed and the step only: a rank just computes its own streams;
- a sample comes at most once an epoch, and each epoch leaves out fewer than one batch (another tail each time);
- the place of any step is found without walking there;
- a stream's window is one range of a shard, seldom of two: it is fetched as such, and by one rank only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from diffussm.data.index import Index
from diffussm.errors import UserError

SHARD_ORDER, WINDOW_ORDER, ENCODING_ORDER = 1, 2, 3  # what a random draw is for
WINDOW_BYTES = 4 << 20  # of shard, a stream and window: what object stores serve at full speed
MAX_WINDOW = 1 << 16  # samples
BLOCK_WORDS = 8  # 32-bit words that Philox draws per count


class SampleOrder:
    """Which samples each global step takes.

    Args:
        shard_counts: samples in each shard; sample numbers run through the shards in turn.
        global_batch: samples of one step.
        seed: of the order, 0 ≤ seed < 2^64.
        window: samples of a stream that are shuffled together, at least; up to twice as many make the windows of an
            epoch equal. More mix better and read longer ranges.

    Raises:
        UserError: there are fewer samples than one global batch.
    """

    def __init__(
        self, shard_counts: Sequence[int] | np.ndarray, global_batch: int, seed: int, window: int = 256
    ) -> None:
        self._counts = np.asarray(shard_counts, np.int64)
        self._first = np.cumsum(self._counts) - self._counts
        self._count = int(self._counts.sum())
        if self._count < global_batch:
            raise UserError(
                f"the data set has {self._count} samples, fewer than one global batch of {global_batch}: "
                f"lower the global batch to {self._count} or less"
            )
        self.global_batch = global_batch
        self.steps_per_epoch = self._count // global_batch
        self.windows_per_epoch = max(1, self.steps_per_epoch // min(window, MAX_WINDOW // 2))
        self.seed = seed
        self._epoch_sequence = functools.lru_cache(maxsize=2)(self._compute_epoch_sequence)
        self._shuffles = functools.lru_cache(maxsize=2)(self._compute_shuffles)

    @classmethod
    def of_index(cls, index: Index, global_batch: int, seed: int) -> SampleOrder:
        """The order of training on a data set: windows of about ``WINDOW_BYTES`` a stream."""
        sample_bytes = sum(shard.size for shard in index.shards) / len(index)
        return cls(index.shard_counts, global_batch, seed, max(1, round(WINDOW_BYTES / sample_bytes)))

    def step_ids(self, step: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Numbers (int64) of the samples at positions ``start`` to ``stop`` of the global batch of ``step``."""
        window, offset = self.find(step)
        stop = self.global_batch if stop is None else stop
        return self._ids(window, start, stop, slice(offset, offset + 1))[:, 0]

    def window_ids(self, window: int, start: int, stop: int) -> np.ndarray:
        """What ``step_ids`` gives for the steps of a window, side by side: int64 [stop - start, steps]."""
        return self._ids(window, start, stop, slice(None))

    def find(self, step: int) -> tuple[int, int]:
        """The window that holds ``step``, counted through all epochs, and the step's place in it."""
        epoch, place = divmod(step, self.steps_per_epoch)
        window = ((place + 1) * self.windows_per_epoch - 1) // self.steps_per_epoch
        return epoch * self.windows_per_epoch + window, place - self._bounds(window)[0]

    def _bounds(self, window: int) -> tuple[int, int]:
        """The steps of an epoch's window: as equal as can be."""
        steps, windows = self.steps_per_epoch, self.windows_per_epoch
        return window * steps // windows, (window + 1) * steps // windows

    def _ids(self, window: int, start: int, stop: int, steps: slice) -> np.ndarray:
        epoch, window = divmod(window, self.windows_per_epoch)
        runs = np.arange(start, stop)[:, None] * self.steps_per_epoch
        positions = runs + self._bounds(window)[0] + self._shuffles(epoch, window, start, stop)[:, steps]
        return self._ids_at(epoch, positions)

    def _compute_shuffles(self, epoch: int, window: int, start: int, stop: int) -> np.ndarray:
        """A permutation of the window for each of the streams ``start`` to ``stop``: uint32 [stream, step]."""
        first, end = self._bounds(window)
        length = end - first
        # Philox is counted: each stream's random words begin at a count of its own, so any slice of the streams can be
        # drawn without the others.
        blocks = -(-length // BLOCK_WORDS)
        draw = philox(self.seed, WINDOW_ORDER, epoch, window, start=start * blocks)
        words = draw.random_raw((stop - start) * blocks * BLOCK_WORDS // 2).astype("<u8", copy=False).view("<u4")
        # Sorting numbers that carry their places in their low bits is several times faster than argsort.
        places = np.uint32((1 << (length - 1).bit_length()) - 1)
        keys = words.reshape(stop - start, -1)[:, :length]
        keys &= ~places
        keys |= np.arange(length, dtype=np.uint32)
        keys.sort(axis=1)
        keys &= places
        return keys

    def _ids_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Numbers of the samples at ``positions`` of an epoch's sequence."""
        shift, firsts, ends = self._epoch_sequence(epoch)
        positions = (positions + shift) % self._count
        place = np.searchsorted(ends, positions, side="right")
        return firsts[place] + positions

    def _compute_epoch_sequence(self, epoch: int) -> tuple[int, np.ndarray, np.ndarray]:
        """An epoch's shift, and of each shard in turn the number of its first sample less that sample's position, and
        the position where it ends."""
        draw = philox(self.seed, SHARD_ORDER, epoch)
        shift = int(draw.random_raw() % self._count)
        shards = random_permutation(draw, len(self._counts))
        ends = np.cumsum(self._counts[shards])
        return shift, self._first[shards] - (ends - self._counts[shards]), ends


def philox(seed: int, purpose: int, major: int = 0, minor: int = 0, start: int = 0) -> np.random.Philox:
    """A counter-based stream of random words, one per (seed, purpose, major, minor), from its block ``start`` on."""
    return np.random.Philox(
        key=np.array([seed, purpose], np.uint64), counter=np.array([start, minor, major, 0], np.uint64)
    )


def random_permutation(draw: np.random.Philox, n: int) -> np.ndarray:
    """A permutation of 0 to n - 1. NumPy vouches for the words of a bit generator in all its versions, but not for
    what ``Generator.permutation`` makes of them; so we sort the words.
    """
    return np.argsort(draw.random_raw(n), kind="stable")
