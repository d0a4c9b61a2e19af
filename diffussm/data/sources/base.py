"""What encoding asks of a set of images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from diffussm.data.order import ENCODING_ORDER, philox, random_permutation


class BadImage(Exception):
    """An image that cannot be decoded; the message says why."""


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        name: how a report names it: a path, a key in a tar.
        label: its class, an index into ``class_names``; 0 where there are none.
        load: → uint8 [H, W, channels], cropped and resized as the encoder takes it; raises BadImage. Called in threads.
    """

    name: str
    label: int
    load: Callable[[], np.ndarray]


class ImageSource(Protocol):
    """A set of images, cut into the parts that shards are made of.

    Attributes:
        name: goes into the index.
        class_names: empty where there are no classes.
        count: of the images; None where that shows only once all are read.
    """

    name: str
    class_names: list[str]
    count: int | None

    def parts(self, samples_per_shard: int, seed: int) -> Sequence[Callable[[], Iterable[Item]]]:
        """What each shard holds: the same at every call.

        Raises:
            UserError: when a part is read, where the source is damaged.
        """
        ...

    def fingerprint(self) -> str:
        """A hash that tells two sources apart, without reading all images."""
        ...


def shuffled_parts(
    count: int, samples_per_shard: int, seed: int, item: Callable[[int], Item]
) -> list[Callable[[], Iterable[Item]]]:
    """The parts of a source of ``count`` images that can be had in any order, by their numbers: a random order cut."""
    order = random_permutation(philox(seed, ENCODING_ORDER), count)
    return [
        lambda ids=order[start : start + samples_per_shard]: map(item, ids.tolist())
        for start in range(0, count, samples_per_shard)
    ]


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """A source held in memory: images uint8 [N, H, W, channels], labels int64 [N]."""

    name: str
    class_names: list[str]
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    @property
    def count(self) -> int:
        return len(self.images)

    def parts(self, samples_per_shard: int, seed: int) -> Sequence[Callable[[], Iterable[Item]]]:
        return shuffled_parts(len(self.images), samples_per_shard, seed, self._item)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images))
        digest.update(np.ascontiguousarray(self.labels, "<i8"))
        return digest.hexdigest()

    def _item(self, number: int) -> Item:
        return Item(f"image {number}", int(self.labels[number]), lambda: self.images[number])
