"""The endless stream of batches that a rank trains on, read ahead in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np

from diffussm.data.order import SampleOrder
from diffussm.data.reader import SampleReader
from diffussm.errors import UserError

Batch = TypeVar("Batch")
DEPTH = 4  # steps made ahead
READERS = 4  # reads at once


class LatentStream(Generic[Batch]):
    """Iterates over the batches of steps ``start_step``, ``start_step + 1``, ... without end.

    The samples of one window of the order are held, and those of the next are on their way: 8 to 16 MiB for each of
    this rank's positions.

    Args:
        positions: this rank's part of the global batch.
        collate: ``(step, positions, moments [n, ...], labels [n]) → batch``. It runs in a thread, so that random draws
            and copies cost the trainer nothing.

    Reading begins in a ``with`` block, or at the first ``next``. What reading or ``collate`` raises is raised by
    ``next`` at that step, and again by every later ``next``: no step is ever skipped.
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
        self._step = start_step  # what `next` gives
        self._ahead = deque[Future[Batch]]()
        self._windows: dict[int, _Window] = {}

    def __iter__(self) -> LatentStream[Batch]:
        return self

    def __next__(self) -> Batch:
        self._read_ahead()
        batch = self._ahead[0].result()
        self._ahead.popleft()
        self._step += 1
        self._read_ahead()
        return batch

    def __enter__(self) -> LatentStream[Batch]:
        self._read_ahead()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; returns once they have ended. Another ``next`` would begin anew, with the same step."""
        if self._ahead:
            self._ahead.clear()
            self._readers.shutdown(cancel_futures=True)
            self._maker.shutdown(cancel_futures=True)
            self._windows.clear()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: all that another one, of any rank at any world size, needs to go on from there."""
        return {
            "data": self._reader.index.hash,
            "seed": self._order.seed,
            "global_batch": self._order.global_batch,
            "images": self._step * self._order.global_batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was called.

        Raises:
            UserError: the state is of another data set, seed or global batch, whose steps hold other samples.
        """
        here = self.state_dict()
        for name in ("data", "seed", "global_batch"):
            if state[name] != here[name]:
                raise UserError(
                    f"the stream of data was saved with {name} {state[name]}, this run has {here[name]}: restore that, "
                    f"or begin a new run"
                )
        self.close()
        self._step = state["images"] // self._order.global_batch

    def _read_ahead(self) -> None:
        if not self._ahead:
            self._readers = ThreadPoolExecutor(READERS, "latents-read")
            self._maker = ThreadPoolExecutor(1, "latents")
        while len(self._ahead) < DEPTH:
            self._ahead.append(self._maker.submit(self._make, self._step + len(self._ahead)))

    def _make(self, step: int) -> Batch:
        """Only the one thread of `_maker` runs this, so steps and windows come in turn."""
        number, place = self._order.find(step)
        window = self._fetch(number)
        moments, labels = window.read(place)
        self._fetch(number + 1)
        for old in [n for n in self._windows if n < number]:
            del self._windows[old]
        return self._collate(step, self._positions, moments, labels)

    def _fetch(self, number: int) -> _Window:
        if number not in self._windows:
            ids = self._order.window_ids(number, self._positions.start, self._positions.stop)
            self._windows[number] = _Window(self._reader, ids, self._readers)
        return self._windows[number]


class _Window:
    """The samples numbered ``ids`` [position, step], put in the order of their steps as they arrive."""

    def __init__(self, reader: SampleReader, ids: np.ndarray, readers: ThreadPoolExecutor) -> None:
        self._reader = reader
        self._ids = ids
        self._moments = np.empty((*ids.T.shape, *reader.index.moments_shape), reader.index.dtype)
        flat = self._moments.reshape(-1, *reader.index.moments_shape)
        places = np.argsort(ids.T, axis=None)
        ascending = ids.T.ravel()[places]
        self._reads = []
        for run in reader.plan(ascending):
            self._reads.append(readers.submit(reader.read_run, run, flat, places[: len(run.ids)]))
            places = places[len(run.ids) :]

    def read(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Moments [position, ...] and labels [position] of one step; waits until the whole window is there."""
        for read in self._reads:
            read.result()
        return self._moments[step], self._reader.labels(self._ids[:, step])
