"""What encoding asks of a set of images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from diffussm.data.order import ENCODING_ORDER, philox, random_permutation

Part = TypeVar("Part")
Version = int | str  # of a file: its size, or what else tells that its content is another


class BadImage(Exception):
    """An image that cannot be decoded; the message says why."""


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        name: how a report names it: a path, a key in a tar.
        label: its class, an index into ``class_names``; 0 where there are none.
        load: → uint8 [H, W, channels], cropped and resized as the encoder takes it; raises BadImage, or UserError where
            it cannot be read at all. Called in threads.
    """

    name: str
    label: int
    load: Callable[[], np.ndarray]


class ImageSource(Protocol):
    """A set of images, cut into the parts that shards are made of."""

    @property
    def name(self) -> str:
        """Goes into the index."""
        ...

    @property
    def class_names(self) -> list[str]:
        """Empty where there are no classes."""
        ...

    @property
    def count(self) -> int | None:
        """Of the images; None where that shows only once all are read."""
        ...

    def parts(self, samples_per_shard: int, seed: int) -> Sequence[Callable[[], Iterable[Item]]]:
        """What each shard holds: the same at every call.

        Raises:
            UserError: when a part is read, where the source is damaged.
        """
        ...

    def files(self, samples_per_shard: int, seed: int) -> Sequence[Callable[[], Iterable[tuple[str, Version]]]]:
        """Name and version of each file that the parts are read from, as they are now, part by part.

        Their names are part of the fingerprint. Empty where the fingerprint tells all.
        """
        ...

    def fingerprint(self) -> str:
        """A hash that tells two sources apart, but for what the versions of :meth:`files` tell: a source of which an
        image has been mended is the same."""
        ...


def shuffled_parts(
    count: int, samples_per_shard: int, seed: int, item: Callable[[int], Part]
) -> list[Callable[[], Iterable[Part]]]:
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

    def files(self, samples_per_shard: int, seed: int) -> Sequence[Callable[[], Iterable[tuple[str, Version]]]]:
        return [tuple] * math.ceil(len(self.images) / samples_per_shard)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images))
        digest.update(np.ascontiguousarray(self.labels, "<i8"))
        return digest.hexdigest()

    def _item(self, number: int) -> Item:
        return Item(f"image {number}", int(self.labels[number]), lambda: self.images[number])
