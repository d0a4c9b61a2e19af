"""Whole shards on a node's own disk, so that each is fetched once however many ranks and epochs read it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from diffussm.data.index import Shard
from diffussm.data.store import Store
from diffussm.errors import UserError
from diffussm.files import fsync

PIECE_BYTES = 16 << 20  # fetched at once
WAIT_SECONDS = 0.1
ATTEMPTS = 3  # to fetch what arrives damaged


class ShardCache:
    """Shards of a store, kept in a folder of a local disk; all processes of a node may share it, for any data sets.

    A file bears the sha256 of its content. It is fetched by one process, under a lock, into a file of another name, and
    gets its own once it is on the disk and its sha256 is right; so what bears a name is whole, whoever is killed when.

    Args:
        max_bytes: what the folder may hold; the shards that were not read for longest make room.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, store: Store, folder: str | Path, max_bytes: int) -> None:
        self._store = store
        self._folder = Path(folder)
        self._max_bytes = max_bytes
        self._maps = weakref.WeakValueDictionary[str, mmap.mmap]()  # unmapped when the last reader lets go
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the cache folder {folder} cannot be made: {error.strerror}: choose another data.cache"
            ) from error

    def read(self, shard: Shard, start: int, length: int) -> memoryview:
        """Bytes of a shard, fetched first if need be; the view keeps them readable even when the file makes room.

        Raises:
            FileNotFoundError: the store has no such shard.
            UserError: it is damaged or cannot be fetched, or the disk is full.
        """
        mapped = self._maps.get(shard.sha256) or self._open(shard)
        return memoryview(mapped)[start : start + length]

    def drop(self, shard: Shard) -> None:
        """Forget a shard whose file has turned out damaged."""
        self._maps.pop(shard.sha256, None)
        self._path(shard).unlink(missing_ok=True)

    def _open(self, shard: Shard) -> mmap.mmap:
        with self._locked(self._lock(shard.sha256)):
            mapped = self._open_kept(shard) or self._fetch(shard)
        self._maps[shard.sha256] = mapped
        return mapped

    def _open_kept(self, shard: Shard) -> mmap.mmap | None:
        with contextlib.suppress(FileNotFoundError), self._path(shard).open("rb") as file:
            if os.fstat(file.fileno()).st_size == shard.size:
                os.utime(file.fileno())  # read just now: the last to make room
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return None

    def _fetch(self, shard: Shard) -> mmap.mmap:
        path = self._path(shard)
        part = path.with_suffix(".part")
        try:
            self._make_room(shard, part)
            if not any(self._download(shard, part) for _ in range(ATTEMPTS)):
                raise UserError(
                    f"{self._store}/{shard.name} is damaged: its sha256 is not what the index says: restore it, or "
                    f"delete index.json and run tools/encode_latents.py again"
                )
            fsync(part)
            with part.open("rb") as file:  # before it has a name, and another process can take its room
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            os.replace(part, path)
            fsync(self._folder)
            return mapped
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(
                f"cannot keep {shard.name} in the cache {self._folder}: {error.strerror}: lower data.cache_gib"
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def _download(self, shard: Shard, part: Path) -> bool:
        """Whether what came is the shard: a network may alter or cut it on its way."""
        digest = hashlib.sha256()
        with part.open("r+b") as file:
            for start in range(0, shard.size, PIECE_BYTES):
                piece = self._store.read(shard.name, start, min(PIECE_BYTES, shard.size - start), shard.etag)
                digest.update(piece)
                file.write(piece)
        return digest.hexdigest() == shard.sha256

    def _make_room(self, shard: Shard, part: Path) -> None:
        """Set the shard's room aside, by a file of its size; waits for it while others are fetching theirs."""
        if shard.size > self._max_bytes:
            raise UserError(
                f"the cache {self._folder} has no room for {shard.name} of {shard.size} bytes: raise data.cache_gib"
            )
        while not self._set_aside(shard.size, part):
            time.sleep(WAIT_SECONDS)

    def _set_aside(self, size: int, part: Path) -> bool:
        with self._locked(self._folder / "lock"):
            for left in self._folder.glob("*.part"):
                if self._lock(left.stem) == self._lock(part.stem):
                    left.unlink()  # we hold its lock
                else:
                    self._remove_abandoned(left)
            kept = {}
            for path in self._folder.iterdir():
                if path.suffix in (".tar", ".part"):
                    with contextlib.suppress(FileNotFoundError):  # it has just got its name, or been dropped
                        kept[path] = path.stat()
            free = self._max_bytes - sum(stat.st_size for stat in kept.values())
            for path in sorted(kept, key=lambda path: kept[path].st_mtime_ns):
                if free >= size:
                    break
                if path.suffix == ".tar":
                    path.unlink(missing_ok=True)
                    free += kept[path].st_size
            if free < size:
                return False
            with part.open("wb") as file:
                file.truncate(size)
            return True

    def _remove_abandoned(self, part: Path) -> None:
        """Remove what a killed process has left: nobody holds its lock."""
        with self._lock(part.stem).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Hold a lock between threads and processes; the system unlocks it however this process ends."""
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _path(self, shard: Shard) -> Path:
        return self._folder / f"{shard.sha256}.tar"

    def _lock(self, sha256: str) -> Path:
        return self._folder / f"{sha256[:2]}.lock"
