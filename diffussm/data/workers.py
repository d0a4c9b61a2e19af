"""Processes that share a piece of work by counting: whoever is free claims the next part."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

from tqdm import tqdm

from diffussm.errors import UserError

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 1800  # without a sign of life from the others


class Workers(Protocol):
    """This process among those that share the work. They share counters, and nothing else."""

    rank: int
    local_rank: int  # among those on this machine: it picks the GPU

    def add(self, counter: str, amount: int) -> int:
        """Add to a shared counter, which begins at 0; its value after that.

        Raises:
            UserError: the process that keeps the counters is lost.
        """
        ...


class Alone:
    """One process by itself."""

    rank = local_rank = 0

    def __init__(self) -> None:
        self._counters: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, counter: str, amount: int) -> int:
        with self._lock:
            self._counters[counter] = self._counters.get(counter, 0) + amount
            return self._counters[counter]


def from_first(workers: Workers, counter: str, find: Callable[[], int]) -> int:
    """The number, from 0 up, that ``find`` returns on rank 0, on every rank: the others wait for it."""
    if workers.rank == 0:
        workers.add(counter, find() + 1)
    while not (found := workers.add(counter, 0)):
        time.sleep(POLL_SECONDS)
    return found - 1


class Progress:
    """The counters of one piece of work, named ``title``, and a bar that rank 0 shows of what all have done.

    Threads may share one.

    Args:
        shards: into which the work is divided.
        images: how many there are; None where nobody knows: the bar counts shards, and tells how many images a second.
        begin: images that were done before.
        steps: that an image takes, where it is counted by :meth:`add_steps`: the bar moves with each.
    """

    def __init__(
        self, title: str, shards: int, images: int | None, workers: Workers, *, begin: int = 0, steps: int = 1
    ) -> None:
        self._title, self._shards, self._workers, self._begin = title, shards, workers, time.monotonic()
        self._unit, total = ("shard", shards) if images is None else ("image", images)
        self._steps, self._steps_before, self._lock = steps, begin * steps, threading.Lock()
        self._bar = tqdm(
            total=total * steps,
            desc=title,
            unit=self._unit,
            unit_scale=1 / steps if steps > 1 else False,
            initial=begin * steps,
            mininterval=0.5 if sys.stderr.isatty() else 10,
            miniters=1,
            disable=workers.rank != 0,
            bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def claim(self) -> int | None:
        """The number of a shard that nobody else has claimed; None when all have been."""
        number = self._add("claimed", 1) - 1
        return number if number < self._shards else None

    def add_images(self, count: int) -> None:
        self.add_steps(count * self._steps)

    def add_steps(self, count: int) -> None:
        """Count steps, of any images."""
        self._add("image", count)
        self._show()

    def add_shard(self) -> None:
        """Count a shard that is finished."""
        self._add("shard", 1)
        self._show()

    def announce_end(self) -> None:
        """Let the others go: there is nothing left to do."""
        self._add("end", 1)

    def wait_for_shards(self) -> None:
        """Return once all shards are finished.

        Raises:
            UserError: nobody has done anything for half an hour.
        """
        self._wait_for("shard", self._shards)

    def wait_for_end(self) -> None:
        """Return once the end is announced. Raises as :meth:`wait_for_shards`."""
        self._wait_for("end", 1)

    def _wait_for(self, counter: str, value: int) -> None:
        done, since = -1, time.monotonic()
        while self._add(counter, 0) < value:
            if (now := self._add("image", 0)) != done:
                done, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE_SECONDS:
                raise UserError(
                    f"{self._title}: no process has done anything for {PATIENCE_SECONDS // 60} minutes: end them all "
                    f"and run the command again, finished shards are kept"
                )
            self._show()
            time.sleep(POLL_SECONDS)
        self._show()

    def _show(self) -> None:
        if self._bar.disable:
            return
        if self._unit == "shard":
            seconds = time.monotonic() - self._begin
            self._bar.set_postfix_str(f"{self._add('image', 0) / seconds:.1f} images/s", refresh=False)
        with self._lock:
            self._bar.update(self._steps_before + self._add(self._unit, 0) - self._bar.n)

    def _add(self, counter: str, amount: int) -> int:
        return self._workers.add(f"{self._title}: {counter}", amount)
