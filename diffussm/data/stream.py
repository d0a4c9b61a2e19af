"""The endless stream of batches that a rank trains on, read ahead in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np

from diffussm.data.order import SampleOrder
from diffussm.data.reader import SampleReader

Batch = TypeVar("Batch")
DEPTH = 4  # steps read ahead


class LatentStream(Generic[Batch]):
    """Iterates over the batches of steps ``start_step``, ``start_step + 1``, ... without end.

    Args:
        positions: this rank's part of the global batch.
        collate: ``(step, positions, moments [n, ...], labels [n]) → batch``. It runs in the thread, so that random
            draws and copies cost the trainer nothing.

    What reading or ``collate`` raises is raised by ``next`` at that step, and again by every later ``next``: no step
    is ever skipped. Close the stream, or use it in a ``with`` block, to end the thread.
    """

    def __init__(
        self,
        reader: SampleReader,
        order: SampleOrder,
        start_step: int,
        positions: slice,
        collate: Callable[[int, slice, np.ndarray, np.ndarray], Batch],
    ) -> None:
        self._reader = reader
        self._order = order
        self._positions = positions
        self._collate = collate
        self._next_step = start_step
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="latents")
        self._ahead = deque[Future[Batch]]()
        for _ in range(DEPTH):
            self._read_ahead()

    def __iter__(self) -> LatentStream[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._ahead[0].result()
        self._ahead.popleft()
        self._read_ahead()
        return batch

    def __enter__(self) -> LatentStream[Batch]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; returns once it has ended."""
        self._thread.shutdown(cancel_futures=True)

    def _read_ahead(self) -> None:
        self._ahead.append(self._thread.submit(self._load, self._next_step))
        self._next_step += 1

    def _load(self, step: int) -> Batch:
        ids = self._order.step_ids(step, self._positions.start, self._positions.stop)
        return self._collate(step, self._positions, *self._reader.read(ids))
