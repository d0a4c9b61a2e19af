"""Where data sets live: named objects under one root, each complete or absent."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import unquote, urlsplit

from diffussm.errors import UserError, needs
from diffussm.files import atomic_path, fsync, link_or_copy, locked, remove_temporaries, write_atomically

OPEN_FILES = 256  # kept open by one store; a process may usually hold 1024
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Stat:
    """What a store tells of an object without reading it. ``etag`` names this version of it; None on a disk."""

    size: int
    etag: str | None = None


class Store(Protocol):
    """An object store. ``str(store)`` is its URL. Names are relative, with '/' between their parts.

    Every method raises UserError for a name that is absolute or has a '..' in it, and where the store cannot be
    reached or refuses; the line names the object. Threads and forked processes may share one store.
    """

    def read(self, name: str, start: int = 0, length: int | None = None, etag: str | None = None) -> Buffer:
        """The object's bytes from ``start``: ``length`` of them, or to its end; fewer where the object ends sooner.

        Raises:
            FileNotFoundError: there is no such object.
            UserError: ``etag`` is given, and the object is another version.
        """
        ...

    def stat(self, name: str) -> Stat:
        """Raises FileNotFoundError where there is no such object."""
        ...

    def put(self, name: str, content: bytes | bytearray | Path, if_absent: bool = False) -> Stat:
        """Create or replace an object by bytes or a file's content, in one step: no reader ever sees a part of it.

        A file is given away: on the same disk it becomes the object, so nobody may write into it any more; it may be
        deleted.

        Raises:
            FileExistsError: there is such an object, and ``if_absent`` asked for none.
            OSError: the disk or the quota is full; it names the object, of which nothing is left.
        """
        ...

    def swap(self, name: str, old: bytes | None, new: bytes) -> None:
        """Replace a small object, or create it, if it is still ``old``; None: not there. One of many racing wins.

        On a disk this holds among those that swap: nobody is to put or delete the object.

        Raises:
            FileExistsError: it is not ``old``; even if it is ``new`` already, by somebody else.
            OSError: as of :meth:`put`.
        """
        ...

    def delete(self, name: str) -> None:
        """Remove an object, if it is there."""
        ...

    def delete_all(self, prefix: str, first: str | None = None) -> None:
        """Remove everything below ``prefix``, which ends in '/'; what a killed call has left, another one removes.

        Args:
            first: the object, its ``prefix`` included, without which the others are nothing; it goes before them.

        Raises:
            UserError: ``prefix`` does not end in '/', or ``first`` is not below it.
        """
        ...

    def sweep(self) -> None:
        """Remove what killed writers have left, which no other method shows. Nobody may be writing meanwhile."""
        ...

    def exists(self, name: str) -> bool: ...

    def list(self, prefix: str = "") -> dict[str, Stat]:
        """The objects whose names begin with ``prefix``, sorted by name."""
        ...


def open_store(url: str | Path) -> Store:
    """The store at a path, a ``file://`` or an ``s3://bucket/prefix`` URL; where nothing is yet, it is empty.

    Raises:
        UserError: the URL is of another kind.
    """
    url = str(url)
    if "://" not in url:
        return LocalStore(Path(url))
    parts = urlsplit(url)
    if parts.scheme == "s3":
        with needs(url, "s3"):
            from diffussm.data.s3 import S3Store

        return S3Store(parts.netloc, parts.path)
    if parts.scheme != "file":
        raise UserError(f"cannot open {url}: {parts.scheme}:// is not supported, give s3://bucket/prefix or a path")
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"cannot open {url}: a file URL has three slashes, file:///{parts.netloc}{parts.path}")
    return LocalStore(Path(unquote(parts.path)))


def checked_name(store: Store, name: str) -> PurePosixPath:
    """``name`` as a relative path; UserError where it would leave the store."""
    parts = PurePosixPath(name)
    if not parts.parts or parts.is_absolute() or ".." in parts.parts:
        raise UserError(f"{name!r} is not a name inside {store}: it may be neither absolute nor contain '..'")
    return parts


def checked_folder(store: Store, prefix: str, first: str | None) -> PurePosixPath:
    """The folder of :meth:`Store.delete_all`, and its errors."""
    folder = checked_name(store, prefix)
    if not prefix.endswith("/"):
        raise UserError(f"{prefix!r} is not a folder inside {store}: it must end in '/'")
    if first is not None and folder not in checked_name(store, first).parents:
        raise UserError(f"{first!r} is not below {prefix}")
    return folder


def not_swapped(place: str) -> FileExistsError:
    """The error of :meth:`Store.swap`; ``place`` is the object's path or URL."""
    return FileExistsError(errno.EEXIST, "Somebody else has written it", place)


class LocalStore:
    """A folder. Reads are positional, so threads and forked processes can share one store.

    Files of which ranges are read are kept open; a read to the end opens anew, as others may have replaced the file.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open = functools.lru_cache(maxsize=OPEN_FILES)(lambda name: _File(self._path(name)))

    def __str__(self) -> str:
        return str(self._root)

    def read(self, name: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        file = _File(self._path(name)) if length is None else self._open(name)
        if length is None:
            length = max(0, os.fstat(file.descriptor).st_size - start)
        data = os.pread(file.descriptor, length, start)
        while 0 < len(data) < length:  # the kernel reads at most 2 GiB at once
            more = os.pread(file.descriptor, length - len(data), start + len(data))
            if not more:
                break
            data += more
        return data

    def stat(self, name: str) -> Stat:
        return Stat(self._path(name).stat().st_size)

    def put(self, name: str, content: bytes | bytearray | Path, if_absent: bool = False) -> Stat:
        with atomic_path(self._path(name), replace=not if_absent) as temporary:
            if isinstance(content, Path):
                link_or_copy(content, temporary)
            else:
                temporary.write_bytes(content)
        self._open.cache_clear()  # what is open under this name is the old file
        return self.stat(name)

    def swap(self, name: str, old: bytes | None, new: bytes) -> None:
        path = self._path(name)
        with locked(path):
            if (path.read_bytes() if path.exists() else None) != old:
                raise not_swapped(str(path))
            write_atomically(path, new)
        self._open.cache_clear()

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)
        self._open.cache_clear()

    def delete_all(self, prefix: str, first: str | None = None) -> None:
        folder = self._root / checked_folder(self, prefix, first)
        if not folder.is_dir():
            return
        if first is not None and self.exists(first):
            self.delete(first)
            fsync(self._path(first).parent)  # gone before the others even if the power fails
        self._open.cache_clear()  # on NFS, a folder of open files stays
        shutil.rmtree(folder)

    def sweep(self) -> None:
        remove_temporaries(self._root)

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def list(self, prefix: str = "") -> dict[str, Stat]:
        found = {}
        for folder, folders, files in os.walk(self._root):
            folders[:] = [name for name in folders if not name.startswith(".")]  # writes under way
            for path in (Path(folder, name) for name in files if name[0] != "."):
                name = path.relative_to(self._root).as_posix()
                if name.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                        found[name] = self.stat(name)
        return dict(sorted(found.items()))

    def _path(self, name: str) -> Path:
        return self._root / checked_name(self, name)


class _File:
    """An open file, closed when the last user lets go of it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
