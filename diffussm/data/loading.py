"""Images read and decoded in threads, ahead of who encodes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from diffussm.data.sources.base import BadImage, Item

BATCH = 64  # images that are encoded at once; as many are being loaded meanwhile
LOADERS = 8  # threads


def load_ahead(items: Iterable[Item], pool: ThreadPoolExecutor) -> Iterator[list[tuple[Item, np.ndarray | BadImage]]]:
    """The items in batches, each with its image or what is wrong with it; the next batch is being loaded meanwhile."""
    items = iter(items)

    def start() -> list[tuple[Item, Future[np.ndarray | BadImage]]]:
        return [(item, pool.submit(_load, item)) for item in itertools.islice(items, BATCH)]

    following = pool.submit(start)
    while batch := following.result():
        following = pool.submit(start)
        yield [(item, image.result()) for item, image in batch]


def _load(item: Item) -> np.ndarray | BadImage:
    try:
        return item.load()
    except BadImage as problem:
        return problem
