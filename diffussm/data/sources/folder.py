"""Folders of image files: a sub-folder a class, as ImageNet lies, or images without classes, as LSUN is exported."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from diffussm.data.sources.base import Item, Version, shuffled_parts
from diffussm.data.sources.resize import SUFFIXES, read_image
from diffussm.errors import UserError


class FolderImages:
    """The image files of a folder.

    Args:
        size, resize: as :func:`read_image`.
        classes: True: each sub-folder is a class, in the order of their names; without sub-folders there are none.
            False: there are none, however the files are nested.

    Raises:
        UserError: there are no images, or images beside the classes, or links that go round in circles.
    """

    def __init__(self, root: str | Path, size: int, resize: str, classes: bool = True) -> None:
        self._root, self._size, self._resize = Path(root), size, resize
        if not self._root.is_dir():
            raise UserError(f"--input {root} is not a folder")
        self._files = sorted(image_files(self._root))  # (relative path, bytes)
        self.class_names = sorted({_first_part(name) for name, _ in self._files} - {""}) if classes else []
        beside = next((name for name, _ in self._files if not _first_part(name)), None)
        if not self._files:
            raise UserError(f"{root} holds no images ({', '.join(SUFFIXES)}), nor do its sub-folders")
        if self.class_names and beside:
            raise UserError(
                f"{root} holds classes, such as {self.class_names[0]}, and images beside them: move {beside}"
            )
        self._labels = {name: label for label, name in enumerate(self.class_names)}
        self.name = f"{self._root.resolve().name}, {resize} to {size}"

    @property
    def count(self) -> int:
        return len(self._files)

    def parts(self, samples_per_shard: int, seed: int) -> Sequence[Callable[[], Iterable[Item]]]:
        return shuffled_parts(len(self._files), samples_per_shard, seed, self._item)

    def files(self, samples_per_shard: int, seed: int) -> Sequence[Callable[[], Iterable[tuple[str, Version]]]]:
        """Each image by its size."""
        return shuffled_parts(len(self._files), samples_per_shard, seed, self._files.__getitem__)

    def fingerprint(self) -> str:
        """Of the names and the resizing."""
        digest = hashlib.sha256(f"{self._size} {self._resize} {self.class_names}\n".encode())
        for name, _ in self._files:
            digest.update(f"{name}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _item(self, number: int) -> Item:
        name, _ = self._files[number]
        load = functools.partial(read_image, self._root / name, self._size, self._resize)
        return Item(name, self._labels.get(_first_part(name), 0), load)


def image_files(root: Path) -> Iterable[tuple[str, int]]:
    """Relative path and bytes of each image file in a folder and its sub-folders; hidden ones do not count."""
    for folder, folders, files in os.walk(root, onerror=_raise, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            _refuse_cycle(Path(folder, name))
        for name in files:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), _size(path)


def _raise(error: OSError) -> None:
    """A folder that cannot be listed is not an empty one."""
    raise error


def _refuse_cycle(folder: Path) -> None:
    if folder.is_symlink() and folder.resolve() in map(Path.resolve, folder.parents):
        raise UserError(f"{folder} is a link to a folder that it lies in: remove it, as it has no end")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a link to nothing: a bad image, which says so when it is loaded
        return 0


def _first_part(name: str) -> str:
    """The sub-folder of the root in which a file lies; "" for one in the root itself."""
    return name.partition("/")[0] if "/" in name else ""
