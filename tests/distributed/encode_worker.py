"""One rank of an encoding, for test_encode.py: `encode_worker.py STORE SLOW SECONDS`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from diffussm import errors
from diffussm.autoencoders.pixel import PixelCodec
from diffussm.data.encode import encode
from diffussm.data.sources.base import ArrayImages, Item
from diffussm.data.store import open_store
from diffussm.errors import UserError, run_command
from diffussm.training.workers import join

COUNT, SHARD = 230, 10
ALL, NOBODY, FAILING = "all", "nobody", "failing"


@dataclass(frozen=True, eq=False)
class SlowImages(ArrayImages):
    """Takes ``seconds`` for a shard, and says which shards this process has begun."""

    seconds: float = 0.0

    def parts(self, samples_per_shard: int, seed: int) -> list[Callable[[], Iterable[Item]]]:
        def slow(number: int, part: Callable[[], Iterable[Item]]) -> Iterable[Item]:
            print(f"shard {number} by {os.environ.get('RANK', '0')}", flush=True)
            time.sleep(self.seconds)
            return part()

        parts = super().parts(samples_per_shard, seed)
        return [lambda number=number, part=part: slow(number, part) for number, part in enumerate(parts)]


def images(kind: type[ArrayImages] = ArrayImages, **more: float) -> ArrayImages:
    """230 random images [6, 8, 1] of five classes."""
    pixels = np.random.default_rng(1).integers(0, 256, (COUNT, 6, 8, 1), dtype=np.uint8)
    return kind("noise/train", [f"class {i}" for i in range(5)], pixels, np.arange(COUNT) % 5, **more)


def main() -> None:
    store, slow, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    with join() as workers:
        workers.add("here", 1)
        while workers.add("here", 0) < getattr(workers, "size", 1):
            time.sleep(0.01)
        if slow == FAILING and workers.rank == 1:
            errors.WAIT_FOR_RANK_0 = 1
            raise UserError("here is bad input")
        source = images(SlowImages, seconds=seconds if slow in (ALL, str(workers.rank)) else 0.002)
        encode(source, PixelCodec(6, 8, 1, size=8), open_store(store), SHARD, flip=True, workers=workers)


if __name__ == "__main__":
    run_command(main)
