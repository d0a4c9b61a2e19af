"""LSUN: one LMDB a category, whose values are encoded images. lmdb is imported only here, and when one is opened."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from diffussm.data.sources.base import BadImage, Item, Version, shuffled_parts
from diffussm.data.sources.folder import FolderImages
from diffussm.data.sources.resize import read_image
from diffussm.errors import UserError, needs

DATA_FILE = "data.mdb"


def open_lsun(path: str | Path, size: int, resize: str) -> LmdbImages | FolderImages:
    """One category of LSUN, without classes: its LMDB, or the folder that its own tool exports from that.

    Raises:
        UserError: it is neither.
    """
    if Path(path, DATA_FILE).is_file():
        return LmdbImages(path, size, resize)
    return FolderImages(path, size, resize, classes=False)


class LmdbImages:
    """The images in an LMDB, by their keys.

    Raises:
        UserError: it cannot be opened, or is empty.
    """

    def __init__(self, path: str | Path, size: int, resize: str) -> None:
        self._path, self._size, self._resize = Path(path), size, resize
        self._environment = _open_lmdb(self._path.resolve())
        with self._environment.begin() as transaction, transaction.cursor() as cursor:
            self._keys = list(cursor.iternext(keys=True, values=False))
        if not self._keys:
            raise UserError(f"{path} is an empty LMDB")
        self.class_names: list[str] = []
        self.name = f"{self._path.resolve().name}, {resize} to {size}"

    @property
    def count(self) -> int:
        return len(self._keys)

    def parts(self, samples_per_shard: int, seed: int) -> Sequence[Callable[[], Iterable[Item]]]:
        return shuffled_parts(len(self._keys), samples_per_shard, seed, self._item)

    def files(self, samples_per_shard: int, seed: int) -> Sequence[Callable[[], Iterable[tuple[str, Version]]]]:
        """Each image by its size."""
        return shuffled_parts(len(self._keys), samples_per_shard, seed, self._file)

    def fingerprint(self) -> str:
        """Of the keys and the resizing."""
        digest = hashlib.sha256(f"{self._size} {self._resize}\n".encode())
        for key in self._keys:
            digest.update(key + b"\n")
        return digest.hexdigest()

    def _item(self, number: int) -> Item:
        key = self._keys[number]
        return Item(_name(key), 0, functools.partial(self._load, key))

    def _file(self, number: int) -> tuple[str, int]:
        key = self._keys[number]
        with self._environment.begin(buffers=True) as transaction:  # only mapped, not read
            return _name(key), len(transaction.get(key, default=b""))

    def _load(self, key: bytes) -> Any:
        with self._environment.begin() as transaction:
            content = transaction.get(key)
        if content is None:
            raise BadImage("it has gone from the LMDB")
        return read_image(content, self._size, self._resize)


def _name(key: bytes) -> str:
    return key.decode(errors="backslashreplace")


@functools.cache  # LMDB lets a process open it once; nobody writes, nor locks, so all may share it, forks included
def _open_lmdb(path: Path) -> Any:
    with needs("--source lsun", "lsun"):
        import lmdb
    try:
        return lmdb.open(str(path), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise UserError(f"{path} cannot be opened as an LMDB: {error}") from error
