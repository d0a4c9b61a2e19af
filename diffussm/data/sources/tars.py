"""webdataset's tars, on a disk or in S3: KEY.jpg (or .png, ...) and KEY.cls or KEY.json. Nothing is unpickled."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import io
import itertools
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath

from diffussm.data.sources.base import Item, Version
from diffussm.data.sources.resize import SUFFIXES, read_image
from diffussm.data.store import Stat, Store, open_store
from diffussm.errors import UserError, needs

PIECE_BYTES = 16 << 20  # fetched at once
MAX_MEMBER_BYTES = 1 << 28
KEY, META = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)"), re.compile("__[^/]*__(/|$)")  # as webdataset has them


class TarImages:
    """The images of a list of tars; each makes one shard, in its own order.

    Args:
        urls: a folder or ``s3://bucket/prefix`` of tars, or some of them by ``*`` or ``{000..099}``.
        classes: how many classes the labels name; 0: labels are left out.
        size, resize: as :func:`read_image`.

    Raises:
        UserError: there are no tars.
    """

    count = None

    def __init__(self, urls: str, classes: int | None, size: int, resize: str) -> None:
        self._classes, self._size, self._resize = classes, size, resize
        self._tars = list(find_tars(urls))
        if not self._tars:
            raise UserError(f"--input {urls}: there are no tars")
        self.class_names = [str(label) for label in range(classes or 0)]
        self.name = f"{PurePosixPath(urls).name}, {resize} to {size}"

    def parts(self, samples_per_shard: int, seed: int) -> Sequence[Callable[[], Iterable[Item]]]:
        """One a tar: both arguments are without effect."""
        return [functools.partial(self._read, *tar) for tar in self._tars]

    def files(self, samples_per_shard: int, seed: int) -> Sequence[Callable[[], Iterable[tuple[str, Version]]]]:
        """Each tar by its size and etag."""
        return [
            functools.partial(iter, [(f"{store}/{name}", f"{stat.size} {stat.etag}")])
            for store, name, stat in self._tars
        ]

    def fingerprint(self) -> str:
        """Of the tars' names, of the number of classes and the resizing."""
        tars = [name for _, name, _ in self._tars]
        return hashlib.sha256(repr((self._size, self._resize, self._classes, tars)).encode()).hexdigest()

    def _read(self, store: Store, name: str, stat: Stat) -> Iterator[Item]:
        members = read_members(store, name, stat)
        for key, group in itertools.groupby(members, key=lambda member: member[0]):
            yield self._item(f"{store}/{name}: {key}", {suffix: content for _, suffix, content in group})

    def _item(self, name: str, fields: dict[str, bytes]) -> Item:
        image = next((content for suffix, content in fields.items() if f".{suffix}" in SUFFIXES), None)
        if image is None:
            raise UserError(f"{name} has no image ({', '.join(SUFFIXES)}), only {', '.join(fields)}")
        label = _parse_label(name, fields)
        if self._classes is None and label is not None:
            raise UserError(f"{name} has a label: give --classes N, or --classes 0 to leave labels out")
        if self._classes and (label is None or not 0 <= label < self._classes):
            raise UserError(f"{name} has label {label}, not one of 0 to {self._classes - 1}: mend it or --classes")
        load = functools.partial(read_image, image, self._size, self._resize)
        return Item(name, label if self._classes else 0, load)


def find_tars(urls: str) -> Iterator[tuple[Store, str, Stat]]:
    """Store, name and size of each tar that ``urls`` means, in order.

    Raises:
        UserError: one that is named is not there.
    """
    with needs("--source webdataset", "data"):
        import braceexpand
    for url in braceexpand.braceexpand(urls):
        folder, _, name = url.rpartition("/")
        if not name.endswith(".tar"):
            folder, name = url, "*.tar"
        store = open_store(folder or ("/" if url.startswith("/") else "."))
        if not any(sign in name for sign in "*?["):
            try:
                yield store, name, store.stat(name)
            except FileNotFoundError:
                raise UserError(f"--input {url}: there is no such tar") from None
            continue
        for found, stat in store.list(re.match(r"[^*?[]*", name)[0]).items():
            if "/" not in found and fnmatch.fnmatchcase(found, name):
                yield store, found, stat


def read_members(store: Store, name: str, stat: Stat) -> Iterator[tuple[str, str, bytes]]:
    """Key, lower-case suffix and content of a tar's files, in order.

    Raises:
        UserError: the tar is cut short or damaged, or has a member that is a link, absurdly large, or outside of it.
    """
    where, end = f"{store}/{name}", 0
    file = _StoreFile(store, name, stat)
    try:
        with tarfile.open(fileobj=io.BufferedReader(file, PIECE_BYTES), mode="r|") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isdir():
                    continue
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or not member.isreg():
                    raise UserError(f"{where}: {member.name!r} is not a file inside the tar: make it anew without that")
                if member.size > MAX_MEMBER_BYTES:
                    raise UserError(f"{where}: {member.name} has {member.size} bytes, which no image has")
                content = tar.extractfile(member).read()
                match = KEY.fullmatch(member.name)
                if match and not META.match(member.name):
                    yield match[1], match[2].lower(), content
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{where} is damaged after byte {end}: {error}: fetch or make it anew") from error
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}: mend that and run the command again") from error
    # tarfile takes a tar that was cut at a member's end, or whose headers are zeros, for a whole one.
    rest = bytes(store.read(name, end, None, stat.etag))
    if len(rest) < tarfile.BLOCKSIZE or any(rest):
        raise UserError(f"{where} is damaged after byte {end}: it does not end as a tar does: fetch or make it anew")


class _StoreFile(io.RawIOBase):
    """An object of a store, read from its beginning to its end."""

    def __init__(self, store: Store, name: str, stat: Stat) -> None:
        self._store, self._name, self._stat = store, name, stat
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        piece = self._store.read(self._name, self._position, len(buffer), self._stat.etag)
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


def _parse_label(name: str, fields: dict[str, bytes]) -> int | None:
    try:
        if "cls" in fields:
            return int(fields["cls"])
        label = json.loads(fields["json"]).get("label") if "json" in fields else None
        return None if label is None else int(label)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{name}: its label is not a number") from None
