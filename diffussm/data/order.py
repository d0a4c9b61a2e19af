"""The order in which a run sees its samples: a pure function of (seed, step), the same at any world size.

A global batch is fed by as many virtual streams as it has samples. Each epoch permutes the shards, joins them, turns
the joined sequence by a random shift and cuts it into one run of consecutive samples a stream. A stream walks its run
window by window, each window shuffled; a step takes one sample of each stream. So

- a step's samples depend on the seed and the step only: a rank just computes its own streams;
- a sample comes at most once an epoch, and each epoch leaves out fewer than one batch (another tail each time);
- the place of any step is found without walking there;
- neighbouring streams read neighbouring samples, and each reads on through its shards: ranges, not single samples.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from diffussm.errors import UserError

SHARD_ORDER, WINDOW_ORDER, ENCODING_ORDER = 1, 2, 3  # what a random draw is for
PHILOX_BLOCK = 4  # words that Philox draws per count


class SampleOrder:
    """Which samples each global step takes.

    Args:
        shard_counts: samples in each shard; sample numbers run through the shards in turn.
        global_batch: samples of one step.
        seed: of the order, 0 ≤ seed < 2^64.
        window: samples of a stream that are shuffled together. More mix better and read longer ranges.

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
        self._seed = seed
        self._window = window
        self._window_ids = functools.lru_cache(maxsize=2)(self._compute_window_ids)

    def step_ids(self, step: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Numbers (int64) of the samples at positions ``start`` to ``stop`` of the global batch of ``step``."""
        epoch, place = divmod(step, self.steps_per_epoch)
        window, offset = divmod(place, self._window)
        return self._window_ids(epoch, window, start, self.global_batch if stop is None else stop)[:, offset]

    def _compute_window_ids(self, epoch: int, window: int, start: int, stop: int) -> np.ndarray:
        """Sample numbers [stream, step] of streams ``start`` to ``stop`` through one window of an epoch."""
        first = window * self._window
        length = min(self._window, self.steps_per_epoch - first)
        # Philox is counted: each stream's random words begin at a count of its own, so any slice of the streams can be
        # drawn without the others.
        blocks = -(-length // PHILOX_BLOCK)
        draw = philox(self._seed, WINDOW_ORDER, epoch, window, start=start * blocks)
        words = draw.random_raw((stop - start) * blocks * PHILOX_BLOCK).reshape(stop - start, -1)
        shuffled = np.argsort(words[:, :length], axis=1, kind="stable")
        runs = np.arange(start, stop)[:, None] * self.steps_per_epoch
        return self._ids_at(epoch, runs + first + shuffled)

    def _ids_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Numbers of the samples at ``positions`` of an epoch's sequence."""
        draw = philox(self._seed, SHARD_ORDER, epoch)
        shift = draw.random_raw() % self._count
        shards = random_permutation(draw, len(self._counts))
        ends = np.cumsum(self._counts[shards])
        starts = ends - self._counts[shards]
        positions = (positions + shift) % self._count
        place = np.searchsorted(ends, positions, side="right")
        return self._first[shards[place]] + positions - starts[place]


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
