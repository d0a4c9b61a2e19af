"""Where data sets live: named objects under one root, each complete or absent."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import unquote, urlsplit

from diffussm.errors import UserError
from diffussm.files import atomic_path, write_atomically

OPEN_FILES = 256  # kept open by one store; a process may usually hold 1024


class Store(Protocol):
    """An object store. ``str(store)`` is its URL. Names are relative, with '/' between their parts.

    Every method raises UserError for a name that is absolute or has a '..' in it.
    """

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """The object's bytes from ``start``: ``length`` of them, or to its end; fewer where the object ends sooner.

        Raises FileNotFoundError where there is no such object.
        """
        ...

    def size(self, name: str) -> int:
        """The object's bytes. Raises FileNotFoundError where there is no such object."""
        ...

    def put(self, name: str, content: bytes | Path) -> None:
        """Create or replace an object by bytes or a file's content, in one step: no reader ever sees a part of it."""
        ...

    def exists(self, name: str) -> bool: ...

    def list(self, prefix: str = "") -> list[str]:
        """The names that begin with ``prefix``, sorted."""
        ...


def open_store(url: str | Path) -> Store:
    """The store at a path or a ``file://`` URL; a folder that does not exist is an empty store.

    Raises:
        UserError: the URL is of another kind.
    """
    url = str(url)
    if "://" not in url:
        return LocalStore(Path(url))
    parts = urlsplit(url)
    if parts.scheme != "file":
        raise UserError(f"cannot open {url}: {parts.scheme}:// is not supported, give a path or file:///path")
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"cannot open {url}: a file URL has three slashes, file:///{parts.netloc}{parts.path}")
    return LocalStore(Path(unquote(parts.path)))


class LocalStore:
    """A folder. Reads are positional on files kept open, so threads and forked processes can share one store."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open = functools.lru_cache(maxsize=OPEN_FILES)(lambda name: _File(self._path(name)))

    def __str__(self) -> str:
        return str(self._root)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        file = self._open(name)
        if length is None:
            length = max(0, os.fstat(file.descriptor).st_size - start)
        data = os.pread(file.descriptor, length, start)
        while 0 < len(data) < length:  # the kernel reads at most 2 GiB at once
            more = os.pread(file.descriptor, length - len(data), start + len(data))
            if not more:
                break
            data += more
        return data

    def size(self, name: str) -> int:
        return self._path(name).stat().st_size

    def put(self, name: str, content: bytes | Path) -> None:
        path = self._path(name)
        if isinstance(content, bytes):
            write_atomically(path, content)
        else:
            with atomic_path(path) as temporary:
                shutil.copyfile(content, temporary)
        self._open.cache_clear()  # what is open under this name is the old file

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def list(self, prefix: str = "") -> list[str]:
        names = []
        for folder, folders, files in os.walk(self._root):
            folders[:] = [name for name in folders if not name.startswith(".")]  # writes under way
            names += [Path(folder, name).relative_to(self._root).as_posix() for name in files if name[0] != "."]
        return sorted(name for name in names if name.startswith(prefix))

    def _path(self, name: str) -> Path:
        parts = PurePosixPath(name)
        if not parts.parts or parts.is_absolute() or ".." in parts.parts:
            raise UserError(f"{name!r} is not a name inside {self}: it may be neither absolute nor contain '..'")
        return self._root / parts


class _File:
    """An open file, closed when the last user lets go of it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
