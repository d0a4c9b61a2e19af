"""The processes that a launcher started on work that is shared by counting, such as encoding."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import timedelta

from torch.distributed import Store, rendezvous

from diffussm.data.workers import Alone, Workers
from diffussm.errors import UserError
from diffussm.training.cluster import identify

MEETING = timedelta(minutes=5)
FAREWELL_SECONDS = 60


class Counting:
    """This process among those that count in one store, which rank 0 or the launcher keeps."""

    def __init__(self, store: Store, rank: int, size: int, local_rank: int) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store = store

    def add(self, counter: str, amount: int) -> int:
        try:
            return self._store.add(counter, amount)
        except RuntimeError as error:
            raise UserError("another process has ended, and the counters with it: run the command again") from error

    def leave(self) -> None:
        """Return once all have come here: the one that keeps the counters stays until then."""
        left, since = self.add("left", 1), time.monotonic()
        while self.rank == 0 and left < self.size and time.monotonic() - since < FAREWELL_SECONDS:
            time.sleep(0.05)
            left = self.add("left", 0)


@contextlib.contextmanager
def join() -> Iterator[Workers]:
    """This process among those that torchrun, deepspeed, srun or mpirun has started; or alone.

    Raises:
        UserError: the launcher does not say where to meet, or the others do not come.
    """
    try:
        workers = _meet()
    except (RuntimeError, ValueError) as error:  # torch's own errors of connecting are RuntimeErrors
        raise UserError(f"the processes that the launcher has started cannot meet: {error}") from error
    yield workers
    if isinstance(workers, Counting):
        workers.leave()


def _meet() -> Workers:
    found = identify()
    if found.world_size == 1:
        return Alone()
    store, *_ = next(rendezvous("env://", timeout=MEETING))  # where torchrun keeps a store, that one
    return Counting(store, found.rank, found.world_size, found.local_rank)
